// The whole surface of the C++ core: plain pointers and sizes, no torch, no Python.
//
// Dims legend: T steps, B batch, I input size, H hidden size, G gates (1 Elman, 4 LSTM in the order i,f,g,o),
// P proj_size, L layers, D directions. R is the size of h_t that recurs: P if projected, else H.
// N rows: the (step, batch) pairs, step by step. Padded N = T*B; packed N = sum of the batch sizes.
//
// Every array is dense and row-major. Outputs never overlap inputs or each other.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "unit.h"

namespace rnnfast {

enum class Cell { tanh, relu, lstm };

struct Shape {
    Cell cell;
    int64_t T, B, I, H;
    int64_t P;  // 0: no projection; LSTM only
    int64_t L, D;
    bool bias;
    const int64_t* batch_sizes;  // (T), non-increasing, the first is B; nullptr: B at every step

    int64_t gates() const { return cell == Cell::lstm ? 4 : 1; }
    int64_t recurrent() const { return P ? P : H; }                             // R
    int64_t input(int64_t layer) const { return layer ? D * recurrent() : I; }  // I of that layer
    int64_t rows() const;                                                       // N
};

// Parameters of one layer and direction, and with the same shapes their gradients (nullptr: not wanted).
template <class P>
struct Parameters {
    P w_ih;  // (G*H, I)
    P w_hh;  // (G*H, R)
    P b_ih;  // (G*H) or nullptr
    P b_hh;  // (G*H) or nullptr
    P w_hr;  // (P, H) or nullptr
};

// What the backward pass needs of the forward one, kept in one block of reserve_per_row() * N numbers:
//   LSTM:      gates (L,D,N,G,H) activated, cells (L,D,N,H), projected: outputs before W_hr (L,D,N,H)
//   all cells: outputs of the layers below the top (L-1,N,D*R), before dropout
int64_t reserve_per_row(const Shape& shape);

template <class T>
struct Forward {
    const T* x;                                    // (N,I)
    const T* h0;                                   // (L*D,B,R) or nullptr: zeros
    const T* c0;                                   // (L*D,B,H) or nullptr: zeros
    std::vector<Parameters<const T*>> parameters;  // [L*D], directions side by side
    const T* dropout;                              // (L-1,N,D*R) scale on the output of each lower layer, or nullptr
    T* y;                                          // (N,D*R)
    T* h_n;                                        // (L*D,B,R)
    T* c_n;                                        // (L*D,B,H), LSTM only
    T* reserve;                                    // see above; nullptr: inference, nothing is kept
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

// dL/d outputs in, dL/d inputs and parameters out.
template <class T>
struct Adjoint {
    const T* y;                              // (N,D*R), or nullptr: zeros
    const T* h_n;                            // (L*D,B,R) or nullptr: zeros
    const T* c_n;                            // (L*D,B,H) or nullptr: zeros
    T* x;                                    // (N,I), like the following overwritten; nullptr: not wanted
    T* h0;                                   // (L*D,B,R)
    T* c0;                                   // (L*D,B,H)
    std::vector<Parameters<T*>> parameters;  // [L*D], each array (groups, ...)
    // Gradients of the parameters are summed up over each group of sequences on its own: sequence b is of group
    // b % groups. 1: over the whole batch.
    int64_t groups;
    // On top of what the outputs bring; nullptr: zeros. An LSTM's pass takes one of the two at most.
    const T* z = nullptr;     // (L,D,N,G,H) dL/d pre-activations, in
    const T* kept = nullptr;  // (as the reserve) dL/d what was kept, in; in place of the gates their pre-activations
    T* swept = nullptr;       // what the sweep carries through time, as Swept, out; nullptr: not wanted
};

// Where a backward pass leaves what it carries through time: all of dL/dz_t, of dL/d(what the cell gives), of dL/dc_t
// and, projected, of dL/dh_t. An array starts at its offset.
struct Swept {
    int64_t dz_stride;  // numbers from row to row of dz
    int64_t dz;         // (L,D,N,G*H)
    int64_t dm;         // (L,D,N,H)
    int64_t dc;         // (L,D,N,H), LSTM only
    int64_t dh;         // (L,D,N,P), projected only
    int64_t size;

    explicit Swept(const Shape& shape);
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
    T* c_n;                                        // (L*D,B,H), out, LSTM only
    T* z = nullptr;                                // (L,D,N,G,H) pre-activations, out; nullptr: not wanted
};

// Run a whole stack of layers and directions on up to `threads` threads. Results do not depend on `threads`.
template <class T>
void forward(const Shape& shape, const Forward<T>& call, int threads);
// Inference, and the tangents of its outputs along those of x, h0 and c0 on the same way. call.reserve, the tangents of
// the parameters and dot.z are nullptr: nothing is kept, the parameters stay where they are.
template <class T>
void forward_dual(const Shape& shape, const Forward<T>& call, const Tangent<T>& dot, int threads);
template <class T>
void backward(const Shape& shape, const Past<T>& past, const Adjoint<T>& adjoint, int threads);
template <class T>
void tangent(const Shape& shape, const Past<T>& past, const Tangent<T>& dot, int threads);

// Gradients with respect to what the forward pass gave and kept, out.
template <class T>
struct Bend {
    T* y;     // (N,D*R)
    T* kept;  // as Adjoint::kept
};

// Back-propagation through a backward pass and so the second derivative, of S = <a backward pass' cotangents, tangent
// outputs> = <its gradients, tangents>, S being a function of the inputs and parameters in two ways: `direct` gets the
// gradients of those that enter a tangent themselves (of its own cotangents nothing is read), `bend` those of what the
// forward pass made of them, which backward() carries on to the inputs. `dot` gets the tangent outputs, the gradients
// of the cotangents. `swept` is what the backward pass has left. This is double backward, forward over reverse and
// reverse over forward in one. dot.z is nullptr.
template <class T>
void second(const Shape& shape, const Past<T>& past, const T* swept, const Tangent<T>& dot, const Adjoint<T>& direct,
            const Bend<T>& bend, int threads);

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
    const T* w;  // (M,H,F)
    // (M,H/run_length,F), rounded up: where connections start, in [0, H). Connection k into unit j is from unit
    // (starts[j / run_length, k] + j % run_length) mod H. nullptr: F = H, and w is dense.
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

// gram (S,Z,Z) += X^T X for S matrices X (n,Z), x_stride numbers apart; on and below the diagonal. What is above may
// change or not. The result does not depend on `threads`.
void add_gram(int64_t S, int64_t n, int64_t Z, const double* x, int64_t x_stride, double* gram, int threads);

// Instruction sets that this build has and this CPU runs, slowest first; the one in use.
std::vector<std::string> usable_isas();
std::string isa();
// Choose by name, "" for the fastest. Throws std::invalid_argument for one that is unknown or that the CPU lacks.
void select_isa(const std::string& name);

// Multiply-add rate that `threads` threads reach without touching memory, in GFLOP/s.
template <class T>
double fma_peak_gflops(int threads);

}  // namespace rnnfast
