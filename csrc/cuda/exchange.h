// How the blocks of a group tell each other h (backward: dz).
#pragma once

#include "group.h"

namespace rnnfast::cuda {

// Passes a block's columns of an operand on to the other blocks of its group. unit_bytes: columns of a unit.
template <class S, int unit_bytes, int number_bytes, bool grid>
class Exchange {
public:
    __device__ Exchange(const PersistentArgs<S>& a, const Here& here) : a_(a), here_(here), met_(0) {
        // Threads go through the vectors of a block's columns; those that are left do so for other blocks at the same
        // time. All divisions are made here.
        const int threads = blockDim.x, thread = threadIdx.x, per_row = a.g.U * unit_bytes / 16;
        vectors_ = 8 * a.g.tiles * per_row;
        step_ = vectors_ < threads ? vectors_ : threads;
        teams_ = threads / step_;
        team_ = thread / step_;
        vector_ = team_ < teams_ ? thread % step_ : vectors_;  // no part for what is left of the threads
        block_bytes_ = per_row * 16;
        row_bytes_ = a.g.stride * number_bytes;
        per_row_ = per_row;
        at_ = place(vector_);
    }

    // Before anything is passed on: all blocks have filled their first operand.
    __device__ void begin() const {
        sync_block();
        if (grid || a_.g.C == 1) return;
        arrive_at_cluster();
        wait_for_cluster();
    }

    // After the block's own columns are in `operand`, which is number `which` of two. Ends in a state where all threads
    // of the block have passed a barrier.
    __device__ void arrive(unsigned char* operand, int which) {
        sync_block();
        const int own = here_.rank * block_bytes_;
        if (grid) {
            for (int i = threadIdx.x; i < vectors_; i += blockDim.x) {
                const int at = own + (i == vector_ ? at_ : place(i));
                store_vector(vector(buffer(which) + at), load_vector(vector(operand + at)));
            }
            sync_block();
            if (threadIdx.x == 0) arrive_at(counter());
        } else if (a_.g.C > 1) {
            for (int i = vector_; i < vectors_; i += step_) {
                Vector* const at = vector(operand + own + (i == vector_ ? at_ : place(i)));
                const Vector mine = load_vector(at);
                for (int other = team_; other < a_.g.C; other += teams_)
                    if (other != here_.rank) store_in_block(at, other, mine);
            }
            arrive_at_cluster();
        }
    }

    // Until the others' columns are in `operand`.
    __device__ void wait(unsigned char* operand, int which) {
        if (grid) {
            met_ += a_.g.C;
            if (threadIdx.x == 0) wait_until(counter(), met_);
            sync_block();
            gather(operand, buffer(which));
            sync_block();
        } else if (a_.g.C > 1) {
            wait_for_cluster();
        }
    }

private:
    // As many loads at a time as hide their way from L2.
    __device__ void gather(unsigned char* operand, unsigned char* from) const {
        constexpr int batch = 4;
        for (int i = vector_; i < vectors_; i += step_) {
            const int at = i == vector_ ? at_ : place(i);
            for (int first = team_; first < a_.g.C; first += batch * teams_) {
                Vector some[batch];
#pragma unroll
                for (int j = 0; j < batch; ++j) {
                    const int other = first + j * teams_;
                    if (other < a_.g.C) some[j] = load_from_others(vector(from + at + other * block_bytes_));
                }
#pragma unroll
                for (int j = 0; j < batch; ++j) {
                    const int other = first + j * teams_;
                    if (other < a_.g.C) store_vector(vector(operand + at + other * block_bytes_), some[j]);
                }
            }
        }
    }

    // Bytes from the first column of a block in an operand to vector i of the block.
    __device__ int place(int i) const { return i / per_row_ * row_bytes_ + i % per_row_ * 16; }
    __device__ unsigned char* group() const { return a_.exchange + int64_t(here_.group) * a_.g.exchanged; }
    __device__ unsigned* counter() const { return reinterpret_cast<unsigned*>(group()); }
    __device__ unsigned char* buffer(int which) const {
        return group() + counter_bytes + which * 8 * a_.g.tiles * row_bytes_;
    }
    __device__ static Vector* vector(unsigned char* p) { return reinterpret_cast<Vector*>(p); }

    const PersistentArgs<S>& a_;
    const Here& here_;
    unsigned met_;
    int vectors_, per_row_, block_bytes_, row_bytes_;  // of a block's columns, of these in a row of the operand
    int vector_, step_, team_, teams_, at_;            // which of them this thread has, for which blocks
};

}  // namespace rnnfast::cuda
