// The whole surface of the C++ core: plain pointers and sizes, no torch, no Python.
//
// Dims legend: T steps, B batch, I input size, H hidden size, G gates (slots of pre-activations), U unit parameters,
// P proj_size, L layers, D directions. R is the size of h_t that recurs: P if projected, else H.
// N rows: the (step, batch) pairs, step by step. Padded N = T*B; packed N = sum of the batch sizes.
//
// Every array is dense and row-major. Outputs never overlap inputs or each other.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cells/traits.h"
#include "precision.h"
#include "unit.h"

namespace rnnfast {

// What the drivers, the layouts and Python know of a cell; csrc/cells has the cells themselves.
struct Cell {
    const char* name;
    int index;               // in cells()
    int gates;               // G
    Slots input_gates;       // those that W_ih x + b_ih is added to
    Slots recurrent_gates;   // those that W_hh h + b_hh is added to
    const int* torch_gates;  // [G] which of the gates in torch's order of W_ih, or W_hh, a slot is
    State state;
    bool saves_gates;     // a training pass saves its activated gates; else they are h itself
    bool projects;        // may have W_hr
    int unit_parameters;  // U

    bool has_c() const { return state == State::own; }
    bool carries_h() const { return state == State::output; }
};
const std::vector<Cell>& cells();
// Throws std::invalid_argument for a name that there is not.
const Cell& find_cell(const std::string& name);

struct Shape {
    const Cell* cell;  // of cells()
    int64_t T, B, I, H;
    int64_t P;  // 0: no projection
    int64_t L, D;
    bool bias;
    const int64_t* batch_sizes;  // (T), non-increasing, the first is B; nullptr: B at every step
    // (N) not 0: this row begins an episode, which is as if it were a sequence of its own, in both directions. h0 and
    // c0 are those of the episode that begins at step 0 without a reset there; others begin with zeros. nullptr: none.
    const uint8_t* resets = nullptr;
    Precision precision = Precision::highest;

    int64_t gates() const { return cell->gates; }                               // G
    int64_t input_rows() const { return cell->input_gates.count * H; }          // of W_ih
    int64_t recurrent_rows() const { return cell->recurrent_gates.count * H; }  // of W_hh
    int64_t recurrent() const { return P ? P : H; }                             // R
    int64_t input(int64_t layer) const { return layer ? D * recurrent() : I; }  // I of that layer
    int64_t rows() const;                                                       // N
};

// Parameters of one layer and direction, and with the same shapes their gradients (nullptr: not wanted).
template <class P>
struct Parameters {
    P w_ih;  // (input_rows, I)
    P w_hh;  // (recurrent_rows, R)
    P b_ih;  // (input_rows) or nullptr
    P b_hh;  // (recurrent_rows) or nullptr
    P w_hr;  // (P, H) or nullptr
    P unit;  // (U, H) or nullptr
};

template <class T>
struct Forward {
    const T* x;                                    // (N,I)
    const T* h0;                                   // (L*D,B,R) or nullptr: zeros
    const T* c0;                                   // (L*D,B,H) or nullptr: zeros
    std::vector<Parameters<const T*>> parameters;  // [L*D], directions side by side
    const T* dropout;                              // (L-1,N,D*R) scale on the output of each lower layer, or nullptr
    T* y;                                          // (N,D*R)
    T* h_n;                                        // (L*D,B,R)
    T* c_n;                                        // (L*D,B,H), of a cell that has c
    T* reserve;                                    // as ReserveLayout; nullptr: inference, nothing is saved
    bool bfloat16_weights = false;                 // of float32: w_ih, w_hh and w_hr point to bfloat16 numbers
};

// A finished forward pass: what forward() got, and what it gave.
template <class T>
struct Past {
    const T* x;
    const T* h0;
    const T* c0;
    std::vector<Parameters<const T*>> parameters;
    const T* dropout;
    const T* y;
    const T* reserve;
};

// dL/d what a forward pass gave and saved; nullptr: zeros.
template <class T>
struct Cotangents {
    const T* y;    // (N,D*R)
    const T* h_n;  // (L*D,B,R)
    const T* c_n;  // (L*D,B,H)
    // On top of what the outputs bring:
    const T* z = nullptr;       // (L,D,N,G,H) dL/d pre-activations
    const T* c = nullptr;       // (L,D,N,H)
    const T* m = nullptr;       // (L,D,N,H), projected
    const T* hidden = nullptr;  // (L-1,N,D*R) of the outputs of the layers below the top, before dropout
};

// dL/d inputs and parameters, out; overwritten. nullptr: not wanted.
template <class T>
struct Gradients {
    T* x;                                    // (N,I)
    T* h0;                                   // (L*D,B,R)
    T* c0;                                   // (L*D,B,H)
    std::vector<Parameters<T*>> parameters;  // [L*D], each array (groups, ...)
    // Gradients of the parameters are summed up over each group of sequences on its own: sequence b is of group
    // b % groups. 1: over the whole batch.
    int64_t groups;
};

// A direction in the space of inputs and parameters (nullptr: zeros), and the derivative of the outputs along it.
template <class T>
struct Tangent {
    const T* x;                                    // (N,I)
    const T* h0;                                   // (L*D,B,R)
    const T* c0;                                   // (L*D,B,H)
    std::vector<Parameters<const T*>> parameters;  // [L*D]
    T* y;                                          // (N,D*R), out
    T* h_n;                                        // (L*D,B,R), out
    T* c_n;                                        // (L*D,B,H), out, of a cell that has c
};

// Run a whole stack of layers and directions on up to `threads` threads. Results do not depend on `threads`.
template <class T>
void forward(const Shape& shape, const Forward<T>& call, int threads);
// Inference, and the tangents of its outputs along those of x, h0 and c0 on the same way. call.reserve and the tangents
// of the parameters are nullptr: nothing is saved, the parameters stay where they are.
template <class T>
void forward_dual(const Shape& shape, const Forward<T>& call, const Tangent<T>& dot, int threads);
// `adjoints`: what the sweep carries through time, as AdjointLayout, out; nullptr: not wanted.
template <class T>
void backward(const Shape& shape, const Past<T>& past, const Cotangents<T>& cotangents, const Gradients<T>& gradients,
              T* adjoints, int threads);
// z_dot: (L,D,N,G,H) tangents of the pre-activations, out; nullptr: not wanted.
template <class T>
void tangent(const Shape& shape, const Past<T>& past, const Tangent<T>& dot, T* z_dot, int threads);

// Gradients with respect to what a forward pass gave and saved, out: arrays as in Cotangents.
template <class T>
struct SavedGradients {
    T* y;
    T* z;  // of a cell that saves its gates; else the gradients of h among those of y and hidden are all
    T* c;
    T* m;
    T* hidden;
};

// Differentiates a backward pass: the gradients of S = <its gradients, tangents> = <its cotangents, tangent outputs>.
// This is double backward, forward over reverse and reverse over forward in one. `dot` gets the tangent outputs, which
// are the gradients of the cotangents. S depends on inputs and parameters in two ways: `direct` gets the gradients of
// those that enter a tangent themselves, `saved` those of what the forward pass made of them, which backward() carries
// on to the inputs. `adjoints` is what the backward pass has left.
template <class T>
void second(const Shape& shape, const Past<T>& past, const T* adjoints, const Tangent<T>& dot,
            const Gradients<T>& direct, const SavedGradients<T>& saved, int threads);

// Reservoirs of echo state networks: Elman layers with leaky units and weights that stay as they were drawn,
//   h_t = (1 - a) h_{t-1} + a f(W_in x_t + b + s W h_{t-1}) + noise_t.
// Any number of them at once: M matrices W, and on each of them Q reservoirs that differ in all the rest.
struct ReservoirShape {
    Unit unit;  // f
    int64_t M, Q;
    int64_t I, H;
    int64_t F;  // fan-in: recurrent connections into each unit

    int64_t reservoirs() const { return M * Q; }
};

template <class T>
struct ReservoirWeights {
    const T* dense;  // (M,H,H) or nullptr
    // Else: connections of 24 bits, which are half as many bytes a step where T is double.
    const float* sparse;  // (M,H,F)
    // (M,H/run_length,F), rounded up: where connections start, in [0, H). Connection k into unit j is from unit
    // (starts[j / run_length, k] + j % run_length) mod H.
    const int32_t* starts;
    const T* w_in;   // (M*Q,H,I)
    const T* bias;   // (M*Q,H)
    const T* leak;   // (M*Q) a
    const T* scale;  // (M*Q) s
};

// B sequences of T steps through each reservoir.
template <class T>
struct ReservoirRun {
    int64_t B, steps;      // steps: T
    const T* x;            // (M*Q,B,T,X), X = I - O
    bool shared_x;         // the same (B,T,X) for all reservoirs
    const T* noise;        // (M*Q,B,T,H) or nullptr: zeros
    T* h;                  // (M*Q,B,H), in: before the first step, out: after the last one
    T* states;             // (M*Q,B,T,H) h_t, out; with O also nullptr: not wanted
    int64_t state_stride;  // numbers between two rows (H) of states
    // Closed loop, if O > 0: the last O inputs of a step are y_{t-1}, where y_t = b_out + W_x x_t[:E] + W_h h_t and x_t
    // is all of the inputs.
    int64_t O, E;
    const T* b_out;  // (M*Q,O)
    const T* w_x;    // (M*Q,O,E)
    const T* w_h;    // (M*Q,O,H)
    const T* y0;     // (M*Q,B,O) y before the first step
    T* y;            // (M*Q,B,T,O), out
};

// Reservoirs with their weights laid out for the instruction set that was in use when they were made.
template <class T>
class Reservoirs {
public:
    // Throws std::invalid_argument for a start outside [0, H).
    Reservoirs(const ReservoirShape& shape, const ReservoirWeights<T>& weights);
    ~Reservoirs();
    // On up to `threads` threads; the results do not depend on how many. May run more than once at a time.
    void run(const ReservoirRun<T>& call, int threads) const;

    // How many of `threads` threads a run of B sequences would use.
    int threads_for(int64_t B, int threads) const;

    const ReservoirShape shape;

private:
    struct Packed;
    std::unique_ptr<const Packed> packed_;
};

// Sums over rows for S linear readouts: X (n,Z), x_stride numbers apart, and one Y (n,O) for all.
struct ReadoutRows {
    int64_t S, n, Z, O;
    const double* x;
    int64_t x_stride;
    const double* y;
};

// gram (S,Z,Z) += X^T X on and below the diagonal, what is above may change or not; moment (S,O,Z) += Y^T X. The result
// does not depend on who works on it.
class GramSum {
public:
    GramSum(const ReadoutRows& rows, double* gram, double* moment);
    ~GramSum();

    // Takes part with up to `threads` threads, and returns when all is done. Others may call it too, at any time: who
    // comes after the end touches neither x nor gram.
    void work(int threads);

private:
    struct Run;
    const std::unique_ptr<Run> run_;
};

// Instruction sets that this build has and this CPU runs, slowest first; the one in use.
std::vector<std::string> usable_isas();
std::string isa();
// Those that nobody takes but by name: units of 16 bits in plain C++, slow, for tests; AMX, which has never run so far.
std::vector<std::string> isas_by_name();
// Does the one in use have products of so many bits? Else they have all bits.
bool has_products(Precision precision);
// Choose by name, "" for the fastest. Throws std::invalid_argument for one that is unknown or that the CPU lacks.
void select_isa(const std::string& name);

// Multiply-add rate that `threads` threads reach without touching memory, in GFLOP/s, in products of so many bits.
template <class T>
double fma_peak_gflops(int threads, Precision precision = Precision::highest);

}  // namespace rnnfast
