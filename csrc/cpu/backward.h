// Back-propagation through time of a stack. Layer by layer from the top: the sweep backwards through the steps gives
// dz (N,G*H), and then everything else is one matrix product each over all N rows: dx = dz W_ih, dW = dz^T [x, h].
//
// The second derivative has the same products, with dz as the pass has left it and tangents (dots) in the other place:
// dx = dz W_ih_dot, dW = dz^T [x_dot, h_dot], and dz W_hh_dot for h.
#pragma once

#include <utility>

#include "reserve.h"
#include "run.h"

namespace rnnfast {

template <class T>
class BackwardRun : Run<T> {
    using Run<T>::s, Run<T>::R, Run<T>::G, Run<T>::N, Run<T>::sequence, Run<T>::kernel, Run<T>::plan, Run<T>::zeros,
        Run<T>::everyone, Run<T>::group_barriers;

public:
    // adjoint.swept may be given: then what the sweep carries through time stays there.
    BackwardRun(const Shape& shape, const Past<T>& past, const Adjoint<T>& adjoint, int threads);
    // The same products with `dot` in place of what the forward pass took and gave, after a pass that left `swept`:
    // into `adjoint` those for inputs and parameters, into `bend` those for what the forward pass gave.
    BackwardRun(const Shape& shape, const Past<T>& past, const T* swept, const Trace<T>& dot,
                const std::vector<Parameters<const T*>>& parameters_dot, const Adjoint<T>& adjoint, const Bend<T>& bend,
                int threads);
    bool run() {
        return run_parallel(plan.threads(), [this](int thread) { work(this->share(thread)); });
    }

private:
    // Of one thread: row pointers, and a block of rows for the weight gradients.
    struct Scratch {
        Scratch(int64_t n, int64_t left_size, int64_t right_size)
            : a(n),
              init(n),
              gates(n),
              c(n),
              c_prev(n),
              h(n),
              to(n),
              dc(n),
              dz(n),
              all(n),
              block(n),
              left(left_size),
              right(right_size) {}
        Buffer<const T*> a, init, gates, c, c_prev, h;
        Buffer<T*> to, dc, dz, all;
        struct Row {
            int64_t t, b, row;
        };
        Buffer<Row> block;
        Buffer<T> left, right;
    };
    // Where the arrays of the sweep at hand are; those that nobody wants kept serve one layer, or one step, after
    // another.
    struct Places {
        T *dz, *dm, *dc, *dh;
        int64_t dz_stride;
    };

    void work(const Share& my);
    void pack(int64_t l, int thread);
    void pack_share(const Columns& columns, int64_t K, const T* w, int64_t stride, int thread, T* packed);
    void sweep_backward(const Share& my, int64_t l, int64_t d);
    void backward_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch, bool carried);
    Product<T> unproject(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch);
    void lstm_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch, const Product<T>& product);
    void elman_step(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch, const Product<T>& product);
    void add_to_dz(const Share& my, int64_t l, int64_t d, int64_t t);
    void add_to_dc(const Share& my, int64_t l, int64_t d, int64_t t);
    void initial_output_gradient(const Share& my, int64_t l, int64_t d);
    void bend_outputs(int64_t l, int64_t d, int thread);
    void bend_cell_outputs(int64_t l, int64_t d, int thread);
    void drop(int64_t l, int thread);
    void input_gradient(int64_t l, int thread);
    void weight_gradients(int64_t l, int64_t d, int64_t group, int thread);
    void add_block(const Parameters<T*>& to, int64_t l, int64_t d, int64_t n, int thread, bool first);
    template <class RowOf>
    void add_outer(int thread, int64_t rows, int64_t width, int64_t n, const RowOf& row_of, int64_t stride, bool first,
                   T* w);
    template <class RowOf>
    std::pair<const T*, int64_t> together(Scratch& at, int64_t n, const Range& columns, const RowOf& row_of,
                                          int64_t stride);
    void make_room();

    bool wants_input(int64_t l) const { return l > 0 || adjoint.x; }
    const T* input(int64_t l) const {  // (N,I of the layer) or nullptr
        return l == 0 ? trace.x : past.dropout ? dropped.get() : trace.output(s, N, l - 1);
    }
    const T* output_gradient(int64_t l) const {  // (N,D*R) or nullptr
        return l == s.L - 1 ? adjoint.y : d_hidden[l % 2].get();
    }
    T* output_bend(int64_t l) const {  // (N,D*R)
        return l == s.L - 1 ? bend.y : bend.kept + reserve.hidden + l * N * s.D * R;
    }
    int64_t first_row(int64_t l, int64_t d) const { return (keep ? this->sweep(l, d) : d) * N; }
    T* dz_row(int64_t l, int64_t d, int64_t row) const {
        return places.dz + (first_row(l, d) + row) * places.dz_stride;
    }
    T* dh_row(int64_t l, int64_t d, int64_t row) const { return places.dh + (first_row(l, d) + row) * s.P; }
    T* dm_row(int64_t l, int64_t d, int64_t row, int64_t b) const {
        return places.dm + (keep ? first_row(l, d) + row : d * s.B + b) * s.H;
    }
    T* dc_row(int64_t d, int64_t b) const { return dc.get() + (d * s.B + b) * s.H; }
    const T* h_previous(const Direction& way, int64_t l, int64_t d, int64_t t, int64_t b) const {
        return this->previous(way, t, b, trace.output(s, N, l) + d * R, s.D * R, this->state(trace.h0, l, d, b, R));
    }

    const Past<T>& past;
    const Adjoint<T>& adjoint;
    const std::vector<Parameters<const T*>>& parameters;  // [L*D], of the forward pass or of the tangents
    const Bend<T> bend;
    const bool sweeps;  // or bends
    const bool keep;    // all layers and steps in `places`
    const Reserve reserve;
    const Trace<T> trace;          // of the forward pass or of the tangents
    const Columns units, outputs;  // of W_hr or the cell (H); of h (R)
    const int64_t GH;
    Buffer<T> own;                 // of what is not kept
    Places places;                 // dz (D,N,G*H), dm (D,B,H), dh (D,N,P); kept: as Swept
    Buffer<T> x, h, hr;            // (D, ...) packed W_ih (G*H,I), W_hh (G*H,R), W_hr (P,H), of the layer at hand
    Buffer<T> dropped;             // (N,D*R), input of the layer at hand after dropout
    Buffer<T> dc;                  // (D,B,H), of the step at hand
    Buffer<T> d_hidden[2];         // (N,D*R), dL/d output of the lower layers, by turns
    std::vector<Scratch> scratch;  // [threads]
};

}  // namespace rnnfast
