// The surface of the CUDA extension: one layer's way through time, forward and backward. rnnfast/_backends/sweeps.py
// has the same contract in a few lines of Python, cuda.py beside it what is around it.
//
// Dims legend as in ../rnnfast.h; N rows: the (step, sequence) pairs, step by step. Arrays are dense, row-major, on the
// device, of type Number but for those that say "wide": float64 for float64, float32 for all others. Nothing is
// allocated, nothing waits for the device, all goes to one stream and may be captured in a graph.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RNNFAST_BOTH __host__ __device__
#else
#define RNNFAST_BOTH
#endif

namespace rnnfast::cuda {

enum class Number { float64, float32, tf32, float16, bfloat16 };  // tf32: float32, products of numbers cut to 10 bits

struct Sweep {
    int cell;   // index in the list of csrc/cells
    int gates;  // G, of this cell
    int64_t T, B, H;
    int64_t P;  // 0: no projection
    int64_t D;
    const int64_t* batch_sizes;  // (T) on the host, not increasing; nullptr: B at every step
    const int64_t* offsets;      // (T+1) on the device, the first row of each step; given with batch_sizes
    const bool* resets;          // (N) on the device: does an episode begin with this row? nullptr: nowhere
    const int64_t* first_reset;  // (B) on the device, step of the first reset, T if there is none; given with resets
    bool by_steps;               // has it what only `steps` knows? A cell (plan.h), resets, dm, dc_more

    int64_t recurrent() const { return P ? P : H; }  // R
};

struct Forward {
    void* gates;  // (N,D,G,H) in: W_ih x with biases; out, if a cell saves them and cells are wanted: activated. Of a
                  // cell that saves none the same memory as y
    const void* w_hh;  // (D,g*H,R), of the g recurrent gates
    const void* w_hr;  // (D,P,H), projected
    const void* h0;    // (D,B,R) or nullptr: zeros
    void* c;           // (D,B,H) wide, of a cell with a state c; in: c_0, out: c_n
    void* cells;       // (N,D,H) out, of a cell with a state c; nullptr: neither wanted nor the gates
    void* m;           // (N,D,H) out, projected: h_t before W_hr
    void* y;           // (N,D,R) out
    void* h_n;         // (D,B,R) out
    const void* unit;  // (D,U,H), of a cell with unit parameters
    const void* c_0;   // (D,B,H) wide, of a cell with a state c; c itself where there are no resets
    void* workspace;   // of the plan
};

struct Backward {
    const void* gates;    // (N,D,G,H) activated; y of a cell that saves none
    const void* cells;    // (N,D,H), of a cell with a state c
    const void* w_hh;     // (D,g*H,R), of the g recurrent gates
    const void* w_hr;     // (D,P,H), projected
    const void* c0;       // (D,B,H) or nullptr: zeros
    const void* dy;       // (N,D,R) or nullptr: zeros
    const void* dh_n;     // (D,B,R) or nullptr: zeros
    void* dc;             // (D,B,H) wide, of a cell with a state; of c in: dL/dc_n, out: dL/dc_0
    void* dz;             // (N,D,G,H) out: dL/d pre-activations; in, if add: what to add to it
    void* dh;             // (N,D,P) out, projected: dL/dh_t
    void* dh0;            // (D,B,R) out; with resets in: zeros
    void* d_cells;        // (N,D,H) out, of a cell with a state c: dL/dc_t; nullptr: not wanted
    const void* y;        // (N,D,R), of a cell whose state is h
    const void* h0;       // (D,B,R), of a cell whose state is h; nullptr: zeros
    const void* unit;     // (D,U,H), of a cell with unit parameters
    void* d_unit;         // (N,D,U,H) out, of a cell with unit parameters
    void* dm;             // (N,D,H) out: dL/dm, m being h before W_hr; nullptr: not wanted
    const void* dc_more;  // (N,D,H), of a cell with a state c: what to add to dL/dc_t; nullptr: zeros
    void* dc_0;       // (D,B,H) wide, of a cell with a state c, out: dL/dc_0, with resets in: zeros; dc itself where
                      // there are none
    void* workspace;  // of the plan
    bool add;
};

}  // namespace rnnfast::cuda
