// The arrays of a call (sweep.h) by the types of their numbers.
#pragma once

#include "device.h"

namespace rnnfast::cuda {

template <class T>
struct Arrays {
    T* gates;
    const T* w_hh;
    const T* w_hr;
    const T* h0;
    const T* c0;
    Wide<T>* c;    // backward: dc
    Wide<T>* c_0;  // backward: dc_0
    T* cells;
    T* m;
    T* y;
    T* h_n;
    const T* dy;
    const T* dh_n;
    T* dz;
    T* dh;
    T* dh0;
    T* d_cells;
    const T* unit;
    T* d_unit;
    T* dm;
    const T* dc_more;
    bool add;

    void set(const Forward& call) {
        to(gates, call.gates), to(w_hh, call.w_hh), to(w_hr, call.w_hr), to(h0, call.h0), to(c, call.c);
        to(cells, call.cells), to(m, call.m), to(y, call.y), to(h_n, call.h_n), to(unit, call.unit), to(c_0, call.c_0);
    }
    void set(const Backward& call) {
        to(gates, call.gates), to(cells, call.cells), to(w_hh, call.w_hh), to(w_hr, call.w_hr), to(c0, call.c0);
        to(dy, call.dy), to(dh_n, call.dh_n), to(c, call.dc), to(dz, call.dz), to(dh, call.dh), to(dh0, call.dh0);
        to(d_cells, call.d_cells), to(y, call.y), to(h0, call.h0), to(unit, call.unit), to(d_unit, call.d_unit);
        to(dm, call.dm), to(dc_more, call.dc_more), to(c_0, call.dc_0);
        add = call.add;
    }

private:
    template <class P>
    static void to(P*& typed, const void* address) {
        typed = static_cast<P*>(const_cast<void*>(address));
    }
};

}  // namespace rnnfast::cuda
