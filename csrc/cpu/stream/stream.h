// A stack of layers that answers step by step: weights packed once, the state kept inside. Nothing here knows of
// threads, files, torch or Python; after the constructor nothing allocates, locks or calls the system.
#pragma once

#include <memory>
#include <vector>

#include "../../rnnfast.h"
#include "../kernels.h"
#include "../runtime/buffer.h"
#include "../runtime/threads.h"

namespace rnnfast {

struct StreamShape {
    const Cell* cell;  // of cells()
    int64_t I, H;
    int64_t P;  // 0: no projection
    int64_t L;
    bool bias;
    int64_t O;  // outputs of a linear readout y = W h + b of the top layer; 0: there is none, y = h
    bool readout_bias;

    int64_t recurrent() const { return P ? P : H; }  // R
    int64_t input(int64_t layer) const { return layer ? recurrent() : I; }
    int64_t output() const { return O ? O : recurrent(); }
    // Multiply-adds of a step of one sequence.
    double work() const;
};

// How a matrix (rows, K) lies in vectors of its rows, side by side in groups: Affine. Rows are those of `slots` gates
// one after another; a vector holds neighbouring units of one gate, and vectors of the same units are neighbours.
struct Placement {
    int64_t size;  // rows of one gate
    int64_t slots, K, lanes;
    const int* gates = nullptr;  // [slots] which of the matrix' gates a slot is; nullptr: in the same order

    int64_t rows() const { return size * slots; }
    int64_t vectors() const { return (size + lanes - 1) / lanes * slots; }
    int64_t groups() const { return (vectors() + affine_group - 1) / affine_group; }
    int64_t packed() const { return vectors() * lanes * K; }
};

// The same for either type of numbers, as arrays of bytes.
class AnyStream {
public:
    virtual ~AnyStream() = default;

    virtual int number_bytes() const = 0;
    // Arrays as get_parameters() and set_parameters() take them, numbers in each: for each layer w_ih (G*H,I),
    // w_hh (G*H,R), b_ih (G*H), b_hh (G*H) if biased, w_hr (P,H) if projected, unit parameters (U,H); of a readout w
    // (O,R), b (O) if biased.
    virtual std::vector<int64_t> parameter_sizes() const = 0;
    virtual void set_parameters(const std::vector<const void*>& arrays) = 0;
    virtual void get_parameters(const std::vector<void*>& arrays) const = 0;

    // x (steps,B,I) -> y (steps,B,output()), which may be x where rows have the same size.
    virtual void run(int64_t steps, const void* x, void* y) = 0;
    // The part of one of `parts` threads that run the same call and meet at `barrier`. When all are through, one of
    // them calls finish_parts().
    virtual void run_part(int64_t steps, const void* x, void* y, int part, int parts, Barrier& barrier) = 0;
    virtual void finish_parts(int64_t steps) = 0;

    // Zeros for the sequences of the batch where mask (B) is not 0; nullptr: for all.
    virtual void reset(const uint8_t* mask) = 0;
    // h (L,B,R), c (L,B,H); c is nullptr for a cell without a state of its own, and is left alone then.
    virtual void get_state(void* h, void* c) const = 0;
    virtual void set_state(const void* h, const void* c) = 0;

    const StreamShape shape;
    const int64_t B;

protected:
    AnyStream(const StreamShape& shape, int64_t B) : shape(shape), B(B) {}
};

template <class T>
class Stream final : public AnyStream {
public:
    // All parameters and states are zeros. Throws std::bad_alloc.
    Stream(const StreamShape& shape, int64_t B);

    int number_bytes() const override { return sizeof(T); }
    std::vector<int64_t> parameter_sizes() const override;
    void set_parameters(const std::vector<const void*>& arrays) override;
    void get_parameters(const std::vector<void*>& arrays) const override;
    void run(int64_t steps, const void* x, void* y) override;
    void run_part(int64_t steps, const void* x, void* y, int part, int parts, Barrier& barrier) override;
    void finish_parts(int64_t steps) override;
    void reset(const uint8_t* mask) override;
    void get_state(void* h, void* c) const override;
    void set_state(const void* h, const void* c) override;

private:
    struct Product {
        Placement at;
        int64_t vectors, groups;  // of `at`: a small step has no time for divisions
        Buffer<T> w, bias;

        Product(int64_t size, int64_t slots, int64_t K, int64_t lanes, const int* gates = nullptr);
        bool exists() const { return at.size > 0; }
    };
    struct Layer {
        Product x, h, hr;  // W_ih, W_hh, W_hr
        Buffer<T> hidden;  // (block + 1,B,R) h of the last steps; the state is that of step now_
        Buffer<T> c;       // (B,H)
        Buffer<T> unit;    // (U,H), as vectors of a Placement
    };
    // An array of parameters, as part of a product.
    struct Array {
        Placement at;
        T* numbers;
    };
    // Of a call: some sequences of the batch, and of their vectors those that are one thread's among `count`.
    struct Part {
        Range sequences;
        int index, count;

        Range of(int64_t size) const { return count == 1 ? Range{0, size} : Range::part(size, index, count); }
        int64_t rows() const { return sequences.end - sequences.begin; }
    };

    std::vector<Array> arrays() const;
    // -> where the state is then.
    template <class Wait>
    int64_t work(int64_t steps, const T* x, T* y, const Part& my, Wait wait);
    template <class Wait>
    void run_layer(int64_t l, int64_t now, int64_t steps, const T* x, const Part& my, Wait wait);
    T* hidden(const Layer& layer, int64_t now) const { return layer.hidden.get() + now * B * R_; }
    // The part of the block that a call starts with: as many steps as there is room for, else a new block.
    int64_t room(int64_t now) const { return now < block_ ? block_ - now : block_; }
    template <class F>
    void for_rows(int64_t steps, const Part& my, F f) const;
    void multiply(const Product& by, int64_t rows, const T* a, int64_t a_stride, T* out, const Part& my) const;
    static void copy_rows(int64_t rows, const T* from, int64_t from_stride, T* to, int64_t size);

    const Kernels<T>& kernel_;
    const int64_t lanes_;
    const int64_t R_, H_, O_;  // numbers of whole vectors that hold R, H and O
    const int64_t unit_vectors_;
    const int64_t block_;  // steps that go through W_ih together
    std::vector<Layer> layers_;
    int64_t now_ = 0;
    Product readout_;
    Buffer<T> z_x_, z_h_;  // (block,B,H/V,slots,V), (B,H/V,slots,V)
    Buffer<T> m_;          // (B,H), projected
    Buffer<T> y_;          // (block,B,O), of a readout
};

}  // namespace rnnfast
