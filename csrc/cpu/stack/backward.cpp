// Back-propagation through time of a stack: layer by layer from the top, the sweep backwards through the steps gives
// dz, and Products does the rest.
#include "products.h"

namespace rnnfast {
namespace {

template <class T>
class BackwardRun : public Products<T> {
    using Products<T>::s, Products<T>::R, Products<T>::N, Products<T>::sequence, Products<T>::kernel, Products<T>::cell,
        Products<T>::plan, Products<T>::everyone, Products<T>::group_barriers, Products<T>::trace, Products<T>::dropout,
        Products<T>::gradients, Products<T>::GH, Products<T>::recurrent_rows, Products<T>::units, Products<T>::outputs,
        Products<T>::scratch;

public:
    // adjoints: as in backward().
    BackwardRun(const Shape& shape, const Past<T>& past, const Cotangents<T>& cotangents, const Gradients<T>& gradients,
                T* adjoints, int threads)
        : Products<T>(shape, trace_of(past, ReserveLayout::of_forward(shape, shape.rows())), past.parameters,
                      past.dropout, gradients, threads),
          cotangents(cotangents) {
        const AdjointLayout at(s, N);
        if (adjoints) {
            to = {adjoints + at.dz, adjoints + at.dm, adjoints + at.dc, adjoints + at.dh, at.dz_stride, true};
        } else {
            const int64_t dz_size = s.D * N * at.dz_stride, dm_size = dm_is_dz() ? 0 : s.D * s.B * s.H;
            own = Buffer<T>(dz_size + dm_size + s.D * N * s.P);
            to = {own.get(), own.get() + dz_size, nullptr, own.get() + dz_size + dm_size, at.dz_stride, false};
        }
        this->adjoints = {to.dz, to.dm, to.dc, to.dh, to.dz_stride, to.all};
        if (s.cell->state != State::none) dc = Buffer<T>(s.D * s.B * s.H);
        for (int64_t i = 0; i < std::min<int64_t>(2, s.L - 1); ++i) d_hidden[i] = Buffer<T>(N * s.D * R);
        for (int i = 0; i < plan.threads(); ++i) rows.push_back(Rows(s.B));
    }

private:
    // Row pointers of one thread.
    struct Rows {
        explicit Rows(int64_t n)
            : from(3 * n),
              to(3 * n),
              gates(from.get()),
              c(gates + n),
              c_prev(c + n),
              dc(to.get()),
              dz(dc + n),
              dc_total(dz + n) {}
        Buffer<const T*> from;
        Buffer<T*> to;
        const T **gates, **c, **c_prev;
        T **dc, **dz, **dc_total;
    };

    void work(const Share& my) override {
        for (int64_t l = s.L - 1; l >= 0; --l) {
            this->pack(l, my.thread);
            everyone.wait();
            for (int64_t d = my.directions.begin; d < my.directions.end; ++d) sweep(my, l, d);
            this->drop(l, my.thread);
            everyone.wait();
            for (int64_t d = my.directions.begin; d < my.directions.end; ++d) this->initial_output_gradient(my, l, d);
            if (this->wants_input(l)) input_gradient(l, my.thread);
            for (int64_t d = 0; d < s.D; ++d) this->weight_gradients(l, d, my.thread);
            if (l > 0) everyone.wait();
        }
    }

    void sweep(const Share& my, int64_t l, int64_t d) {
        const Direction way = this->direction(d);
        const Range columns = this->columns_of(units, this->my_panels(my, units));
        if (dc) start_carrying(my, l, d, columns);
        Origin next;  // of the states of the step after t, which is none at first
        for (int64_t step = s.T - 1; step >= 0; --step) {
            const int64_t t = way.time(step);
            const Range batch = this->my_rows(my, t);
            const Origin from = way.origin(t);
            // Sequences that run at the next step, too, get dz from there; the others end here.
            const int64_t ended = std::max(batch.begin, std::min(batch.end, next.count));
            if (cotangents.c) add_to_dc(my, l, d, t);
            output_step(my, l, d, t, from, {batch.begin, ended}, &next);
            output_step(my, l, d, t, from, {ended, batch.end}, nullptr);
            if (s.P) {
                group_barriers[my.group].wait();
                cell_step(my, l, d, t, from, batch, unproject(my, l, d, t, batch));
            }
            if (cotangents.z) add_to_dz(my, l, d, t);
            if (dc) stop_carrying(my, l, d, t, from, columns);
            group_barriers[my.group].wait();
            next = from;
        }
    }

    // dL/dc_n is carried from the end on. A state before all steps that enters none of them has no gradient.
    void start_carrying(const Share& my, int64_t l, int64_t d, const Range& columns) {
        const T* const c_n = s.cell->has_c() ? cotangents.c_n : nullptr;
        T* const to = initial_gradient(l, d);
        for (int64_t b = my.batch.begin; b < my.batch.end; ++b) {
            copy_columns(dc_row(d, b), this->state(c_n, l, d, b, s.H), columns);
            if (to && s.resets) copy_columns(to + b * s.H, this->zeros.get(), columns);
        }
    }

    // Where an episode begins, what was carried is the gradient of its first state, if that is c0 (or h0), and ends.
    void stop_carrying(const Share& my, int64_t l, int64_t d, int64_t t, const Origin& from, const Range& columns) {
        const Range batch = this->my_rows(my, t);
        T* const to = initial_gradient(l, d);
        for (int64_t b = from.resets ? batch.begin : std::max(batch.begin, from.count); b < batch.end; ++b) {
            if (from.goes_on(b)) continue;
            if (to && sequence.under_way(t, b)) copy_columns(to + b * s.H, dc_row(d, b), columns);
            copy_columns(dc_row(d, b), this->zeros.get(), columns);
        }
    }

    // dL/dh_t of the sequences in `batch`: from y_t and from z_{t+1}, as far as `next` goes on from here, or from h_n
    // if all have ended (nullptr); then through the cell.
    void output_step(const Share& my, int64_t l, int64_t d, int64_t t, const Origin& from, const Range& batch,
                     const Origin* next) {
        if (batch.begin >= batch.end) return;
        const int64_t next_row = next ? sequence.row(t + this->direction(d).stride()) : 0;
        auto& at = scratch[my.thread];
        const T* dy = output_gradient(l);
        const Range panels = this->my_panels(my, outputs);
        const Range columns = this->columns_of(outputs, panels);
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            const int64_t row = sequence.row(t) + b;
            at.to[n] = s.P ? to.dh + (this->first_row(l, d) + row) * s.P : dm_row(l, d, row, b);
            at.init[n] = dy ? dy + (row * s.D + d) * R : nullptr;
            if (next) {
                at.a[n] = next->goes_on(b) ? this->recurrent_row(l, d, next_row + b) : this->zeros.get();
            } else {
                const T* dh_n = this->state(cotangents.h_n, l, d, b, R);
                for (int64_t j = columns.begin; j < columns.end; ++j)
                    at.to[n][j] = dh_n[j] + (dy ? at.init[n][j] : T(0));
                at.init[n] = at.to[n];
            }
        }
        const Product<T> product{n,
                                 next ? recurrent_rows : 0,
                                 at.a.get(),
                                 1,
                                 outputs,
                                 panels.begin,
                                 panels.end,
                                 this->h.get() + d * outputs.packed(recurrent_rows),
                                 dy || !next ? at.init.get() : nullptr,
                                 at.to.get()};
        if (s.P)
            kernel.product(product);
        else
            cell_step(my, l, d, t, from, batch, product);
    }

    // dm = dh W_hr
    Product<T> unproject(const Share& my, int64_t l, int64_t d, int64_t t, const Range& batch) {
        auto& at = scratch[my.thread];
        const Range panels = this->my_panels(my, units);
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            const int64_t row = sequence.row(t) + b;
            at.a[n] = this->dh_row(l, d, row);
            if (cotangents.m) at.init[n] = cotangents.m + (this->index(l, d) * N + row) * s.H;
            at.to[n] = dm_row(l, d, row, b);
        }
        return {n,
                s.P,
                at.a.get(),
                1,
                units,
                panels.begin,
                panels.end,
                this->hr.get() + d * units.packed(s.P),
                cotangents.m ? at.init.get() : nullptr,
                at.to.get()};
    }

    // From the product, dm, to dz and dL/dc_{t-1}.
    void cell_step(const Share& my, int64_t l, int64_t d, int64_t t, const Origin& from, const Range& batch,
                   const Product<T>& product) {
        Rows& at = rows[my.thread];
        const int64_t i = this->index(l, d);
        int64_t n = 0;
        for (int64_t b = batch.begin; b < batch.end; ++b, ++n) {
            const int64_t row = sequence.row(t) + b;
            at.gates[n] = trace.gates(s, N, l, d, row);
            at.dz[n] = dz_row(l, d, row);
            if (!dc) continue;
            at.dc[n] = dc_row(d, b);
            if (s.cell->carries_h()) {
                at.c_prev[n] = this->previous(from, t, b, trace.output(s, N, l) + d * R, s.D * R,
                                              this->state(trace.h0, l, d, b, R));
                at.dc_total[n] = dm_row(l, d, row, b);
                continue;
            }
            const T* c = trace.c(s, N, i);
            at.c[n] = c + row * s.H;
            at.c_prev[n] = this->previous(from, t, b, c, s.H, this->state(trace.c0, l, d, b, s.H));
            if (to.all) at.dc_total[n] = to.dc + (i * N + row) * s.H;
        }
        cell.step_backward({product, at.gates, at.c, at.c_prev, at.dc, at.dz, to.all ? at.dc_total : nullptr,
                            this->parameters[i].unit});
    }

    // Adds what reaches z_t from elsewhere than the outputs to the dz that this thread has just written.
    void add_to_dz(const Share& my, int64_t l, int64_t d, int64_t t) {
        const Range columns = this->columns_of(units, this->my_panels(my, units));
        const Range batch = this->my_rows(my, t);
        for (int64_t b = batch.begin; b < batch.end; ++b) {
            const int64_t row = sequence.row(t) + b;
            const T* z = cotangents.z + (this->index(l, d) * N + row) * GH;
            T* dz = dz_row(l, d, row);
            for (int64_t gate = 0; gate < GH; gate += s.H)
                for (int64_t j = gate + columns.begin; j < gate + columns.end; ++j) dz[j] += z[j];
        }
    }

    // Adds what reaches c_t from elsewhere, before the step that carries it on.
    void add_to_dc(const Share& my, int64_t l, int64_t d, int64_t t) {
        const Range columns = this->columns_of(units, this->my_panels(my, units));
        const Range batch = this->my_rows(my, t);
        const T* c = cotangents.c + (this->index(l, d) * N + sequence.row(t)) * s.H;
        for (int64_t b = batch.begin; b < batch.end; ++b)
            for (int64_t j = columns.begin; j < columns.end; ++j) dc_row(d, b)[j] += c[b * s.H + j];
    }

    void input_gradient(int64_t l, int thread) {
        const int64_t size = N * s.input(l);
        T* const dx = l ? d_hidden[(l - 1) % 2].get() : gradients.x;
        const T* const more = l && cotangents.hidden ? cotangents.hidden + (l - 1) * size : nullptr;
        Products<T>::input_gradient(l, thread, dx, false, [&](const Range& all) {
            if (more) add_columns(dx, more, all);
        });
    }

    void add_vectors(const Parameters<T*>& to, int64_t l, int64_t d, int64_t n, int thread) override {
        const auto row_of = [&](int64_t r) { return Products<T>::dz_row(l, d, scratch[thread].block[r].row); };
        this->for_vectors(to, thread, [&](const Range& columns, const Range& numbers, T* vector) {
            this->add_rows(n, columns, row_of, this->to.dz_stride, thread, vector + numbers.begin);
        });
    }

    // One gate: its dm becomes dz where it is.
    bool dm_is_dz() const { return s.gates() == 1; }
    T* dz_row(int64_t l, int64_t d, int64_t row) const { return to.dz + (this->first_row(l, d) + row) * to.dz_stride; }
    T* dm_row(int64_t l, int64_t d, int64_t row, int64_t b) const {
        if (to.all) return to.dm + (this->first_row(l, d) + row) * s.H;
        return dm_is_dz() ? dz_row(l, d, row) : to.dm + (d * s.B + b) * s.H;
    }
    T* dc_row(int64_t d, int64_t b) const { return dc.get() + (d * s.B + b) * s.H; }
    // (B,H) where the gradient goes that the state before all steps gets past W_hh, or nullptr
    T* initial_gradient(int64_t l, int64_t d) const {
        T* const to = s.cell->has_c() ? gradients.c0 : s.cell->carries_h() ? gradients.h0 : nullptr;
        return to ? to + this->index(l, d) * s.B * s.H : nullptr;
    }
    const T* output_gradient(int64_t l) const {  // (N,D*R) or nullptr
        return l == s.L - 1 ? cotangents.y : d_hidden[l % 2].get();
    }

    const Cotangents<T>& cotangents;
    AdjointRows<T*> to;
    Buffer<T> own;           // of `to`, where nobody wants it
    Buffer<T> dc;            // (D,B,H) dL/d state, of the step at hand; of a cell that has one
    Buffer<T> d_hidden[2];   // (N,D*R), dL/d output of the lower layers, by turns
    std::vector<Rows> rows;  // [threads]
};

}  // namespace

template <class T>
void backward(const Shape& shape, const Past<T>& past, const Cotangents<T>& cotangents, const Gradients<T>& gradients,
              T* adjoints, int threads) {
    run_with(threads,
             [&](int n) { return std::make_unique<BackwardRun<T>>(shape, past, cotangents, gradients, adjoints, n); });
}

template void backward<float>(const Shape&, const Past<float>&, const Cotangents<float>&, const Gradients<float>&,
                              float*, int);
template void backward<double>(const Shape&, const Past<double>&, const Cotangents<double>&, const Gradients<double>&,
                               double*, int);

}  // namespace rnnfast
