// What a kernel sees of the device: numbers, shared memory, barriers, tensor cores. With a C++ compiler in place of
// nvcc it is ../tests/emulated_device.h, where each thread of the device is a thread of the CPU.
#pragma once

#include <cstdint>

#include "sweep.h"

namespace rnnfast::cuda {

// The type that sums and states have.
template <class T>
struct WideOf {
    using type = float;
};
template <>
struct WideOf<double> {
    using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// What is loaded, stored and passed on at a time.
struct alignas(16) Vector {
    uint32_t x[4];
};

}  // namespace rnnfast::cuda

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace rnnfast::cuda {

using Float16 = __half;
using BFloat16 = __nv_bfloat16;

__device__ inline float wide(Float16 x) { return __half2float(x); }
__device__ inline float wide(BFloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T narrow(Wide<T> x);
template <>
__device__ inline Float16 narrow<Float16>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float x) {
    return __float2bfloat16_rn(x);
}

__device__ inline uint16_t bits(Float16 x) { return __half_as_ushort(x); }
__device__ inline uint16_t bits(BFloat16 x) { return __bfloat16_as_ushort(x); }

__device__ inline float float_of(uint32_t x) { return __uint_as_float(x); }
__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }

// The 32 bits that stand for x in a TF32 product: rounded to 10 bits of mantissa.
__device__ inline uint32_t tf32_bits(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

__device__ inline void sync_block() { __syncthreads(); }

constexpr unsigned most_blocks_along_y = 65535;

// 2^x and 1/x of the special function units, wrong by at most 2^-22 of the result (PTX ISA).
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline Vector vector_of(uint4 v) { return {{v.x, v.y, v.z, v.w}}; }
__device__ inline uint4 native(const Vector& v) { return make_uint4(v.x[0], v.x[1], v.x[2], v.x[3]); }
__device__ inline Vector load_vector(const Vector* p) { return vector_of(*reinterpret_cast<const uint4*>(p)); }
__device__ inline void store_vector(Vector* p, const Vector& v) { *reinterpret_cast<uint4*>(p) = native(v); }

// d (16,8) += a (16,K) b (K,8); see layout.h for who holds what. Volatile, since all lanes of a warp have to be there:
// the compiler must not move it under a condition that some of them meet.
template <Number number>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define RNNFAST_MMA(shape)                                                                                    \
    asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (number == Number::float16)
        RNNFAST_MMA("m16n8k16.row.col.f32.f16.f16.f32");
    else if constexpr (number == Number::bfloat16)
        RNNFAST_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
    else
        RNNFAST_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#undef RNNFAST_MMA
}

// The blocks of a cluster. arrive releases what a thread has written, wait acquires it; every thread does both.
#if __CUDA_ARCH__ >= 900
__device__ inline void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// To where block `rank` of the cluster has what this block has at `here`.
__device__ inline void store_in_block(Vector* here, int rank, const Vector& v) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(here));
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(v.x[0]), "r"(v.x[1]),
                 "r"(v.x[2]), "r"(v.x[3])
                 : "memory");
}
#else  // there are no clusters, and plan.cpp chooses none
__device__ inline void arrive_at_cluster() { __trap(); }
__device__ inline void wait_for_cluster() { __trap(); }
__device__ inline void store_in_block(Vector*, int, const Vector&) { __trap(); }
#endif

// A counter in global memory that blocks meet at. One thread of each block calls them, between two sync_block(), which
// make what the block's other threads have written part of what is released, and what is acquired known to them.
__device__ inline void arrive_at(unsigned* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
}
__device__ inline void wait_until(unsigned* counter, unsigned count) {
    // counts may wrap around in a long sequence: what is compared is the difference
    unsigned seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(seen)
                     : "l"(__cvta_generic_to_global(counter))
                     : "memory");
    } while (static_cast<int>(seen - count) < 0);
}

// A vector that other blocks wrote: from L2, past this multiprocessor's own cache.
__device__ inline Vector load_from_others(const Vector* p) {
    return vector_of(__ldcg(reinterpret_cast<const uint4*>(p)));
}

}  // namespace rnnfast::cuda

#else
#include "../tests/emulated_device.h"
#endif

namespace rnnfast::cuda {

__device__ inline float wide(float x) { return x; }
__device__ inline double wide(double x) { return x; }
template <>
__device__ inline float narrow<float>(float x) {
    return x;
}
template <>
__device__ inline double narrow<double>(double x) {
    return x;
}

}  // namespace rnnfast::cuda
