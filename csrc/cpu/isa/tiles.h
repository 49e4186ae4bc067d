// The tiles of AMX (Intel's SDM 1, chapter 18): eight registers of up to 16 rows of 64 bytes, and the instruction that
// multiplies two of bfloat16 pairs into one of float32. Or, for any CPU, the same in plain C++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rnnfast {
namespace {

constexpr int tile_numbers = 16;  // of 32 bits in a row, and rows, that a tile has at most

// How large each of the eight tiles is, as the instruction reads it.
struct alignas(64) TileSizes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

#ifdef RNNFAST_TILES_EMULATED

struct EmulatedTile {
    int rows, numbers;
    uint32_t row[tile_numbers][tile_numbers];
};
thread_local EmulatedTile emulated_tiles[8];

// What the CPU answers with an illegal instruction.
inline void expect_tiles(bool fit) {
    if (!fit) __builtin_trap();
}

inline void set_tiles(const TileSizes& sizes) {
    std::memset(emulated_tiles, 0, sizeof emulated_tiles);
    for (int i = 0; i < 8; ++i) {
        expect_tiles(sizes.rows[i] <= 16 && sizes.row_bytes[i] <= 64 && !sizes.rows[i] == !sizes.row_bytes[i]);
        emulated_tiles[i].rows = sizes.rows[i], emulated_tiles[i].numbers = sizes.row_bytes[i] / 4;
    }
}
inline void release_tiles() { std::memset(emulated_tiles, 0, sizeof emulated_tiles); }

template <int to>
inline void clear_tile() {
    expect_tiles(emulated_tiles[to].rows);
    std::memset(emulated_tiles[to].row, 0, sizeof emulated_tiles[to].row);
}
template <int to>
inline void load_tile(const void* from, ptrdiff_t bytes) {
    EmulatedTile& tile = emulated_tiles[to];
    clear_tile<to>();
    for (int r = 0; r < tile.rows; ++r)
        std::memcpy(tile.row[r], static_cast<const char*>(from) + r * bytes, tile.numbers * 4);
}
template <int from>
inline void store_tile(void* to, ptrdiff_t bytes) {
    const EmulatedTile& tile = emulated_tiles[from];
    expect_tiles(tile.rows);
    for (int r = 0; r < tile.rows; ++r) std::memcpy(static_cast<char*>(to) + r * bytes, tile.row[r], tile.numbers * 4);
}
inline float as_float(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}
template <int to, int left, int right>
inline void add_tile_products() {
    EmulatedTile &sum = emulated_tiles[to], &a = emulated_tiles[left], &b = emulated_tiles[right];
    expect_tiles(sum.rows && sum.rows == a.rows && a.numbers == b.rows && sum.numbers == b.numbers);
    for (int m = 0; m < a.rows; ++m)
        for (int n = 0; n < b.numbers; ++n) {
            float total = as_float(sum.row[m][n]);
            for (int k = 0; k < a.numbers; ++k) {
                const uint32_t one = a.row[m][k], other = b.row[k][n];
                total += as_float(one << 16) * as_float(other << 16);
                total += as_float(one & 0xffff0000u) * as_float(other & 0xffff0000u);
            }
            std::memcpy(&sum.row[m][n], &total, 4);
        }
}

#else

// Tells the compiler what it cannot see: memory is read and written here, in this order.
inline void set_tiles(const TileSizes& sizes) { asm volatile("ldtilecfg %0" ::"m"(sizes) : "memory"); }
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }

template <int to>
inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(to));
}
template <int to>
inline void load_tile(const void* from, ptrdiff_t bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(to) : "memory");
}
template <int from>
inline void store_tile(void* to, ptrdiff_t bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(from) : "memory");
}
template <int to, int left, int right>
inline void add_tile_products() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(to), "i"(left), "i"(right));
}

#endif

}  // namespace
}  // namespace rnnfast
