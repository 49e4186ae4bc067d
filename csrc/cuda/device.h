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

}  // namespace rnnfast::cuda

#ifdef __CUDACC__

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda/atomic>

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

// d (16,8) += a (16,K) b (K,8); see layout.h for who holds what.
template <Number number>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define RNNFAST_MMA(shape)                                                                           \
    asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
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
__device__ inline void arrive_at_cluster() { cooperative_groups::this_cluster().barrier_arrive(); }
__device__ inline void wait_for_cluster() { cooperative_groups::this_cluster().barrier_wait(); }
template <class T>
__device__ inline T* in_block(T* shared, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else  // there are no clusters, and plan.cpp chooses none
__device__ inline void arrive_at_cluster() { __trap(); }
__device__ inline void wait_for_cluster() { __trap(); }
template <class T>
__device__ inline T* in_block(T*, int) {
    __trap();
    return nullptr;
}
#endif

// A counter in global memory that blocks meet at. One thread of each block calls them, between two sync_block().
__device__ inline void arrive_at(unsigned* counter) {
    __threadfence();
    ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>(*counter).fetch_add(1, ::cuda::memory_order_release);
}
__device__ inline void wait_until(unsigned* counter, unsigned count) {
    // counts may wrap around in a long sequence: what is compared is the difference
    ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device> seen(*counter);
    while (static_cast<int>(seen.load(::cuda::memory_order_acquire) - count) < 0) {
    }
    __threadfence();
}

// A vector that other blocks wrote: from L2, past this multiprocessor's own cache.
struct alignas(16) Vector {
    uint4 x;
};
__device__ inline Vector load_from_others(const Vector* p) { return {__ldcg(&p->x)}; }

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
