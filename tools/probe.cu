// What the design of csrc/cuda rests on, measured: how many clusters run at a time, what a meeting of blocks costs in a
// cluster and in a grid, what a product of the tensor cores costs. gpu.sh compiles and runs it.
#include <cooperative_groups.h>

#include <cstdint>
#include <cstdio>
namespace cg = cooperative_groups;
#define OK(x)                                                   \
    do {                                                        \
        cudaError_t e = (x);                                    \
        if (e != cudaSuccess) {                                 \
            std::printf("%s: %s\n", #x, cudaGetErrorString(e)); \
            cudaGetLastError();                                 \
        }                                                       \
    } while (0)
constexpr int N = 1000;
__device__ uint32_t addr(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
// mode 0: barrier.cluster release/acquire, 1: relaxed, 2: plain remote stores of 16 B x 2 a thread, then 0, 3: st.async
// + mbarrier
__global__ void __launch_bounds__(256, 1) exchange(int mode, long long* out) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto* bars = reinterpret_cast<uint64_t*>(memory);
    unsigned char* data = memory + 128;  // [2][C][512]
    cg::cluster_group cluster = cg::this_cluster();
    const unsigned rank = cluster.block_rank(), C = cluster.num_blocks(), tid = threadIdx.x;
    if (tid < 2) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(addr(bars + tid)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    cluster.sync();
    const long long start = clock64();
    for (int k = 0; k < N; ++k) {
        const uint32_t bar = addr(bars + (k & 1)), mine = addr(data + ((k & 1) * C + rank) * 512 + tid % 32 * 16);
        if (mode == 3 && tid == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"((C - 1) * 512)
                         : "memory");
        if (mode >= 2)
            for (unsigned other = tid / 32; other < C; other += 8) {
                if (other == rank) continue;
                uint32_t there, there_bar;
                asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(mine), "r"(other));
                asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there_bar) : "r"(bar), "r"(other));
                if (mode == 3)
                    asm volatile(
                        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %1, %1, %1}, "
                        "[%2];" ::"r"(there),
                        "r"(k), "r"(there_bar)
                        : "memory");
                else
                    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(there), "r"(k) : "memory");
            }
        if (mode == 3) {
            uint32_t done = 0;
            while (!done)
                asm volatile(
                    "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 "
                    "%0, 1, 0, p; }"
                    : "=r"(done)
                    : "r"(bar), "r"(k / 2 & 1)
                    : "memory");
            __syncthreads();
        } else if (mode == 1) {
            asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
            asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
        } else {
            asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
            asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
        }
    }
    const long long stop = clock64();
    cluster.sync();
    if (rank == 0 && tid == 0) *out = (stop - start) / N;
}
__global__ void __launch_bounds__(256, 1) grid_barrier(unsigned* counter, long long* out, bool fences) {
    const long long start = clock64();
    for (unsigned k = 1; k <= N; ++k) {
        __syncthreads();
        if (threadIdx.x == 0) {
            if (fences) __threadfence();
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
            unsigned seen;
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
            while (seen < k * gridDim.x);
            if (fences) __threadfence();
        }
        __syncthreads();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *out = (clock64() - start) / N;
}
template <int chains>
__global__ void mma(long long* out, float* sink) {
    float d[chains][4] = {};
    uint32_t a[4] = {threadIdx.x, 1, 2, 3}, b[2] = {4, threadIdx.x};
    __syncthreads();
    const long long start = clock64();
    for (int k = 0; k < N; ++k)
#pragma unroll
        for (int i = 0; i < chains; ++i)
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    __syncthreads();
    if (threadIdx.x == 0) *out = clock64() - start;
    for (int i = 0; i < chains; ++i) sink[threadIdx.x] += d[i][0] + d[i][1] + d[i][2] + d[i][3];
}
int main() {
    long long* out;
    unsigned* counter;
    float* sink;
    if (cudaMallocHost(&out, 8) != cudaSuccess) {
        std::printf("no GPU\n");
        return 1;
    }
    OK(cudaMalloc(&counter, 4));
    OK(cudaMalloc(&sink, 4096));
    OK(cudaFuncSetAttribute(exchange, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    OK(cudaFuncSetAttribute(exchange, cudaFuncAttributeMaxDynamicSharedMemorySize, 160 * 1024));
    for (unsigned C : {2u, 4u, 8u, 16u}) {
        cudaLaunchConfig_t config = {};
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {C, 1, 1};
        config.gridDim = C;
        config.blockDim = 256;
        config.dynamicSmemBytes = 160 * 1024;
        config.attrs = &attribute;
        config.numAttrs = 1;
        int clusters = -1;
        OK(cudaOccupancyMaxActiveClusters(&clusters, exchange, &config));
        std::printf("cluster of %2u: %d at a time; cycles a meeting:", C, clusters);
        for (int mode = 0; mode < 4; ++mode) {
            OK(cudaLaunchKernelEx(&config, exchange, mode, out));
            OK(cudaDeviceSynchronize());
            std::printf(" %s %lld", (const char*[]){"release", "relaxed", "store+release", "st.async"}[mode], *out);
        }
        std::printf("\n");
        std::fflush(stdout);
    }
    for (int blocks : {32, 64, 128})
        for (bool fences : {true, false}) {
            OK(cudaMemset(counter, 0, 4));
            void* args[] = {&counter, &out, &fences};
            OK(cudaLaunchCooperativeKernel((void*)grid_barrier, blocks, 256, args, 0, 0));
            OK(cudaDeviceSynchronize());
            std::printf("grid of %d, %s: %lld cycles a meeting\n", blocks, fences ? "fences" : "no fences", *out);
        }
    for (int warps : {1, 4, 8}) {
        mma<1><<<1, 32 * warps>>>(out, sink);
        OK(cudaDeviceSynchronize());
        std::printf("mma m16n8k16: %d warps, 1 chain %.1f", warps, double(*out) / N);
        mma<2><<<1, 32 * warps>>>(out, sink);
        OK(cudaDeviceSynchronize());
        std::printf(", 2 chains %.1f", double(*out) / N / 2);
        mma<4><<<1, 32 * warps>>>(out, sink);
        OK(cudaDeviceSynchronize());
        std::printf(", 4 chains %.1f cycles each\n", double(*out) / N / 4);
    }
}
