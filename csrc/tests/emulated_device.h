// cuda/device.h for a C++ compiler: threads of the device are threads of the CPU, so that the very source of the
// kernels runs in tests, under sanitizers too. Slow. The products of tensor cores follow the tables of the PTX ISA, not
// layout.h, which is what is tested against them.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)

namespace rnnfast::cuda {

struct Barrier {
    explicit Barrier(unsigned count) { pthread_barrier_init(&barrier, nullptr, count); }
    ~Barrier() { pthread_barrier_destroy(&barrier); }
    Barrier(const Barrier&) = delete;
    void wait() { pthread_barrier_wait(&barrier); }
    pthread_barrier_t barrier;
};

struct Warp {
    Barrier barrier{32};
    float a[16][16], b[16][8];
};

struct Block {
    Block(int threads, size_t shared) : barrier(threads), memory(shared / 16 + 1) {
        for (int warp = 0; warp < threads / 32; ++warp) warps.push_back(std::make_unique<Warp>());
        std::memset(memory.data(), 0xff, memory.size() * 16);  // NaN: a kernel must not rely on zeros
    }
    struct alignas(16) Chunk {
        unsigned char x[16];
    };
    Barrier barrier;
    std::vector<Chunk> memory;
    std::vector<std::unique_ptr<Warp>> warps;
};

struct Cluster {
    explicit Cluster(int threads) : barrier(threads) {}
    Barrier barrier;
    std::vector<std::unique_ptr<Block>> blocks;
};

struct Index {
    unsigned x, y, z;
};
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;
inline thread_local Block* my_block;
inline thread_local Cluster* my_cluster;

inline void sync_block() { my_block->barrier.wait(); }
inline unsigned char* shared_memory() { return my_block->memory.data()->x; }
inline void arrive_at_cluster() {}
inline void wait_for_cluster() { my_cluster->barrier.wait(); }
inline void store_in_block(Vector* here, int rank, const Vector& v) {
    const auto offset = reinterpret_cast<unsigned char*>(here) - shared_memory();
    *reinterpret_cast<Vector*>(my_cluster->blocks[rank]->memory.data()->x + offset) = v;
}
inline void arrive_at(unsigned* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE); }
inline void wait_until(unsigned* counter, unsigned count) {
    while (static_cast<int>(__atomic_load_n(counter, __ATOMIC_ACQUIRE) - count) < 0) sched_yield();
}

inline Vector load_vector(const Vector* p) { return *p; }
inline void store_vector(Vector* p, const Vector& v) { *p = v; }
inline Vector load_from_others(const Vector* p) { return *p; }

constexpr int emulated_multiprocessors = 4;
constexpr unsigned most_blocks_along_y = 2;  // few, so that small batches take several launches, too

// --- numbers ---------------------------------------------------------------------------------------------------------

using Float16 = _Float16;
struct BFloat16 {
    uint16_t x;
};

inline float float_of(uint32_t x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline uint32_t bits_of(float x) {
    uint32_t y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline float wide(Float16 x) { return static_cast<float>(x); }
inline float wide(BFloat16 x) { return float_of(uint32_t(x.x) << 16); }
template <class T>
T narrow(Wide<T> x);
template <>
inline Float16 narrow<Float16>(float x) {
    return static_cast<Float16>(x);
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
    const uint32_t y = bits_of(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((y + 0x7fff + (y >> 16 & 1)) >> 16)};
}
inline uint16_t bits(Float16 x) {
    uint16_t y;
    std::memcpy(&y, &x, 2);
    return y;
}
inline uint16_t bits(BFloat16 x) { return x.x; }
inline uint32_t tf32_bits(float x) { return (bits_of(x) + 0x1000) & ~0x1fffu; }

// As far from the truth as the PTX ISA allows, to either side.
inline float off_by_2_to_minus_22(float x) {
    const bool above = bits_of(x) * 2654435761u >> 31;
    return x * (above ? 1 + 0x1p-22f : 1 - 0x1p-22f);
}
inline float exp2_approx(float x) { return off_by_2_to_minus_22(std::exp2(x)); }
inline float reciprocal_approx(float x) { return off_by_2_to_minus_22(1 / x); }

template <Number number>
float element(uint32_t reg, int half) {
    if (number == Number::tf32) return float_of(reg);
    const auto x = static_cast<uint16_t>(reg >> 16 * half);
    if (number == Number::bfloat16) return wide(BFloat16{x});
    Float16 y;
    std::memcpy(&y, &x, 2);
    return wide(y);
}

// PTX ISA 9.7.14.5 (warp-level mma): groupID = lane >> 2, threadID_in_group = lane % 4.
template <Number number>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Warp& warp = *my_block->warps[threadIdx.x / 32];
    const int group = threadIdx.x % 32 >> 2, in_group = threadIdx.x % 4;
    const int K = number == Number::tf32 ? 8 : 16;
    if (number == Number::tf32) {
        for (int i = 0; i < 4; ++i) {
            const int row = i == 0 || i == 2 ? group : group + 8;
            const int column = i == 0 || i == 1 ? in_group : in_group + 4;
            warp.a[row][column] = element<number>(a[i], 0);
        }
        warp.b[in_group][group] = element<number>(b[0], 0);
        warp.b[in_group + 4][group] = element<number>(b[1], 0);
    } else {
        for (int i = 0; i < 8; ++i) {
            const int row = (i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8;
            const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
            warp.a[row][column] = element<number>(a[i / 2], i & 1);
        }
        for (int i = 0; i < 4; ++i) {
            const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
            warp.b[row][group] = element<number>(b[i / 2], i & 1);
        }
    }
    warp.barrier.wait();
    for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
        for (int k = 0; k < K; ++k) d[i] += warp.a[row][k] * warp.b[k][column];
    }
    warp.barrier.wait();
}

// --- launches --------------------------------------------------------------------------------------------------------

// std::thread with a small stack: there are hundreds of them.
class EmulatedThread {
public:
    template <class F>
    explicit EmulatedThread(F run) : run_(std::make_unique<std::function<void()>>(run)) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, 256 * 1024);
        const auto start = [](void* f) -> void* {
            (*static_cast<std::function<void()>*>(f))();
            return nullptr;
        };
        if (pthread_create(&thread_, &attributes, start, run_.get())) throw std::runtime_error("no more threads");
        pthread_attr_destroy(&attributes);
    }
    void join() { pthread_join(thread_, nullptr); }

private:
    std::unique_ptr<std::function<void()>> run_;
    pthread_t thread_;
};

struct Size {
    unsigned x = 1, y = 1, z = 1;
};

// Clusters one after the other, all blocks of a cluster at a time; a cooperative grid is one cluster.
template <class Args>
void emulate(void (*kernel)(Args), Size grid, int threads, size_t shared, int cluster_size, const Args& args) {
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned first = 0; first < blocks; first += cluster_size) {
        Cluster cluster(threads * cluster_size);
        for (int rank = 0; rank < cluster_size; ++rank)
            cluster.blocks.push_back(std::make_unique<Block>(threads, shared));
        const auto run = [&](int rank, int t) {
            const unsigned block = first + rank;
            threadIdx = {static_cast<unsigned>(t), 0, 0};
            blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
            blockDim = {static_cast<unsigned>(threads), 1, 1};
            gridDim = {grid.x, grid.y, grid.z};
            my_block = cluster.blocks[rank].get();
            my_cluster = &cluster;
            kernel(args);
        };
        std::vector<EmulatedThread> running;
        running.reserve(threads * cluster_size);
        for (int rank = 0; rank < cluster_size; ++rank)
            for (int t = 0; t < threads; ++t) running.emplace_back([&run, rank, t] { run(rank, t); });
        for (EmulatedThread& one : running) one.join();
    }
}

}  // namespace rnnfast::cuda
