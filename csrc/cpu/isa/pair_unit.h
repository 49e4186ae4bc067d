// Multiplies pairs of bfloat16 numbers as vectors do: MR rows times NV vectors of columns held in registers while k
// runs, two neighbours along k at once. AVX512-BF16 has an instruction for it.
#pragma once

#include "bfloat16.h"
#include "operands.h"
#include "tile.h"

namespace rnnfast {
namespace {

#if defined(__AVX512BF16__) && RNNFAST_VECTOR_BYTES == 64
inline Vec<float> add_products(Vec<float> sum, Pairs a, Pairs b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
inline Vec<float> add_products(Vec<float> sum, Pairs a, Pairs b) {
    sum += second_of(a) * second_of(b);
    return sum + first_of(a) * first_of(b);
}
#endif

inline Pairs splat(uint32_t pair) { return pair - Pairs{}; }

// As `tile`.
template <int MR, int NV>
void pair_tile(const Operands<1>& of, Rows<const float*> init, Rows<float*> c, ptrdiff_t c_stride) {
    constexpr int V = lanes_of<float>;
    Vec<float> sum[MR][NV] = {};
    const uint32_t *a = of.a[0], *panel = of.panel[0];
    const ptrdiff_t a_row = of.a_row;
#pragma GCC unroll 2
    for (int64_t k = 0; k < of.pairs; ++k) {
        Pairs s[MR];
#pragma GCC unroll 6
        for (int r = 0; r < MR; ++r) {
            s[r] = splat(a[r * a_row]);
            keep_in_register(s[r]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            Pairs b = (Pairs)load(reinterpret_cast<const float*>(panel + v * V));
            keep_in_register(b);
#pragma GCC unroll 6
            for (int r = 0; r < MR; ++r) sum[r][v] = add_products(sum[r][v], s[r], b);
        }
        panel += NV * V;
        ++a;
    }
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
            store(c[r] + v * c_stride, (init ? load(init[r] + v * c_stride) : Vec<float>{}) + sum[r][v]);
}

using PairTile = void (*)(const Operands<1>&, Rows<const float*>, Rows<float*>, ptrdiff_t);

template <int MR>
constexpr PairTile pair_tiles_of_rows[max_tile_vectors] = {pair_tile<MR, 1>, pair_tile<MR, 2>, pair_tile<MR, 3>,
                                                           pair_tile<MR, 4>};

constexpr const PairTile* pair_tiles[] = {pair_tiles_of_rows<1>, pair_tiles_of_rows<2>, pair_tiles_of_rows<3>,
                                          pair_tiles_of_rows<4>, pair_tiles_of_rows<5>, pair_tiles_of_rows<6>};

struct PairUnit {
    static constexpr int rows = 6;  // of a tile, at most
    static constexpr double speed = 2;

    // Adds what `of` has to `init`: `rows` rows, `vectors` vectors of columns.
    static void tile(int rows, int vectors, const Operands<1>& of, Rows<const float*> init, Rows<float*> c,
                     ptrdiff_t c_stride) {
        pair_tiles[rows - 1][vectors - 1](of, init, c, c_stride);
    }

    // As Plain::burn.
    static int64_t burn(int64_t rounds) {
        constexpr int chains = 12;
        Vec<float> sum[chains];
        Pairs factor = beside(splat(.999f), splat(.001f));
#pragma GCC unroll 12
        for (int j = 0; j < chains; ++j) sum[j] = splat(float(j));
        for (int64_t i = 0; i < rounds; ++i) {
            keep_in_register(factor);
#pragma GCC unroll 12
            for (int j = 0; j < chains; ++j) sum[j] = add_products(sum[j], factor, factor);
        }
        Vec<float> total = {};
        for (int j = 0; j < chains; ++j) total += sum[j];
        const bool used = total[0] > 0;  // always; keeps the loop alive
        return used ? rounds * chains * lanes_of<float> * 4 : 0;
    }
};

}  // namespace
}  // namespace rnnfast
