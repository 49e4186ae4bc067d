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

    Reserve(const Shape& s, int64_t N) {
        const int64_t units = s.cell == Cell::lstm ? s.L * s.D * N * s.H : 0;
        gates = 0;
        cells = gates + 4 * units;
        m = cells + units;
        hidden = m + (s.P ? units : 0);
        size = hidden + (s.L - 1) * N * s.D * s.recurrent();
    }
};

}  // namespace rnnfast
