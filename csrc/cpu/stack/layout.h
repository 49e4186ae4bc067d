// The one place that knows how blocks of memory are cut into the arrays of a stack.
#pragma once

#include "../../rnnfast.h"

namespace rnnfast {

// Numbers from row to row, `width` of them in each: not a multiple of 4096 bytes, for rows on the same cache sets drive
// each other out.
inline int64_t row_stride(int64_t width) { return (width + 15) / 16 * 16 + 16; }

// Arrays for all rows of all layers, one after another in a block of `size` numbers; the offset of each.
struct ReserveLayout {
    int64_t gates;   // (L,D,N,G,H) activated, of a cell that saves them; of gradients: those of the pre-activations
    int64_t c;       // (L,D,N,H), of a cell that has c
    int64_t m;       // (L,D,N,H), projected: outputs of the cell before W_hr
    int64_t hidden;  // (L-1,N,D*R) outputs of the layers below the top, before dropout
    int64_t size;

    // What a training forward pass saves, and gradients of it.
    static ReserveLayout of_forward(const Shape& s, int64_t N) { return {s, N, s.cell->saves_gates ? s.gates() : 0}; }
    // Tangents of the same, without the gates.
    static ReserveLayout of_tangents(const Shape& s, int64_t N) { return {s, N, 0}; }

private:
    ReserveLayout(const Shape& s, int64_t N, int64_t saved_gates) {
        const int64_t units = s.L * s.D * N * s.H;
        gates = 0;
        c = gates + saved_gates * units;
        m = c + (s.cell->has_c() ? units : 0);
        hidden = m + (s.P ? units : 0);
        size = hidden + (s.L - 1) * N * s.D * s.recurrent();
    }
};

// What a backward pass carries through time.
struct AdjointLayout {
    int64_t dz_stride;  // numbers from row to row of dz
    int64_t dz;         // (L,D,N,(G+U)*H) dL/dz_t, then what step t adds to those of the unit parameters
    int64_t dm;         // (L,D,N,H) dL/d output of the cell
    int64_t dc;         // (L,D,N,H) all of dL/dc_t, of a cell that has c
    int64_t dh;         // (L,D,N,P) dL/dh_t, projected
    int64_t size;

    explicit AdjointLayout(const Shape& s) : AdjointLayout(s, s.rows()) {}
    AdjointLayout(const Shape& s, int64_t N) {
        const int64_t rows = s.L * s.D * N;
        dz_stride = row_stride((s.gates() + s.cell->unit_parameters) * s.H);
        dz = 0;
        dm = dz + rows * dz_stride;
        dc = dm + rows * s.H;
        dh = dc + (s.cell->has_c() ? rows * s.H : 0);
        size = dh + rows * s.P;
    }
};

template <class T>
SavedGradients<T> saved_gradients(const Shape& s, T* y, T* block) {
    const ReserveLayout at = ReserveLayout::of_forward(s, s.rows());
    return {y, block + at.gates, block + at.c, block + at.m, block + at.hidden};
}

// The arrays of a block of gradients as cotangents of a backward pass, beside those of the outputs.
template <class T>
void add_saved(const Shape& s, const T* block, Cotangents<T>& to) {
    const ReserveLayout at = ReserveLayout::of_forward(s, s.rows());
    if (s.cell->saves_gates) to.z = block + at.gates;
    if (s.cell->has_c()) to.c = block + at.c;
    if (s.P) to.m = block + at.m;
    to.hidden = block + at.hidden;
}

// The rows of one pass, of numbers or of tangents: what entered and left each layer.
template <class T>
struct Trace {
    const T* x;      // (N,I) or nullptr: zeros
    const T* h0;     // (L*D,B,R) or nullptr: zeros
    const T* c0;     // (L*D,B,H) or nullptr: zeros
    const T* y;      // (N,D*R)
    const T* saved;  // as ReserveLayout
    ReserveLayout at;

    const T* output(const Shape& s, int64_t N, int64_t l) const {  // (N,D*R)
        return l == s.L - 1 ? y : saved + at.hidden + l * N * s.D * s.recurrent();
    }
    // Of layer and direction i: (N,H) each.
    const T* c(const Shape& s, int64_t N, int64_t i) const { return saved + at.c + i * N * s.H; }
    const T* m(const Shape& s, int64_t N, int64_t i) const { return saved + at.m + i * N * s.H; }
    // The activated gates of a row, (G,H).
    const T* gates(const Shape& s, int64_t N, int64_t l, int64_t d, int64_t row) const {
        if (s.cell->saves_gates) return saved + at.gates + ((l * s.D + d) * N + row) * s.gates() * s.H;
        return output(s, N, l) + (row * s.D + d) * s.recurrent();
    }
};

template <class T>
Trace<T> trace_of(const Past<T>& past, const ReserveLayout& at) {
    return {past.x, past.h0, past.c0, past.y, past.reserve, at};
}

}  // namespace rnnfast
