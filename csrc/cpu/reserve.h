// Where in its reserve the forward pass keeps what the backward pass needs; see rnnfast.h.
#pragma once

#include "../rnnfast.h"

namespace rnnfast {

struct Reserve {
    int64_t gates;   // (L,D,N,G,H)
    int64_t cells;   // (L,D,N,H)
    int64_t m;       // (L,D,N,H), projected only
    int64_t hidden;  // (L-1,N,D*R)
    int64_t size;

    Reserve(const Shape& s, int64_t N) : Reserve(s, N, s.cell == Cell::lstm ? 4 : 0) {}

    // The same arrays of tangents, which keep no gates.
    static Reserve of_tangents(const Shape& s, int64_t N) { return Reserve(s, N, 0); }

private:
    Reserve(const Shape& s, int64_t N, int64_t kept_gates) {
        const int64_t units = s.L * s.D * N * s.H;
        gates = 0;
        cells = gates + kept_gates * units;
        m = cells + (s.cell == Cell::lstm ? units : 0);
        hidden = m + (s.P ? units : 0);
        size = hidden + (s.L - 1) * N * s.D * s.recurrent();
    }
};

// The rows of one pass, of numbers or of tangents: what entered and left each layer.
template <class T>
struct Trace {
    const T* x;       // (N,I) or nullptr: zeros
    const T* h0;      // (L*D,B,R) or nullptr: zeros
    const T* c0;      // (L*D,B,H) or nullptr: zeros
    const T* y;       // (N,D*R)
    const T* gates;   // (L,D,N,G,H), activated; of tangents: none
    const T* cells;   // (L,D,N,H)
    const T* m;       // (L,D,N,H), projected: o * tanh(c)
    const T* hidden;  // (L-1,N,D*R)

    Trace(const Past<T>& past, const Reserve& at) : Trace(past.x, past.h0, past.c0, past.y, past.reserve, at) {}
    Trace(const Tangent<T>& dot, const T* kept, const Reserve& at) : Trace(dot.x, dot.h0, dot.c0, dot.y, kept, at) {}

    const T* output(const Shape& s, int64_t N, int64_t l) const {  // (N,D*R)
        return l == s.L - 1 ? y : hidden + l * N * s.D * s.recurrent();
    }

private:
    Trace(const T* x, const T* h0, const T* c0, const T* y, const T* kept, const Reserve& at)
        : x(x),
          h0(h0),
          c0(c0),
          y(y),
          gates(kept + at.gates),
          cells(kept + at.cells),
          m(kept + at.m),
          hidden(kept + at.hidden) {}
};

}  // namespace rnnfast
