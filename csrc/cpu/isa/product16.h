// Products of float32 numbers whose factors are rounded to bfloat16, or to the sum of two such numbers; the sums are
// float32. Two neighbours along k stand in the place of one number: W is packed in pairs, and the rows on its left are
// put in pairs block by block. A unit multiplies pairs: see pair_unit.h and tile_unit.h.
#pragma once

#include "bfloat16.h"
#include "operands.h"

namespace rnnfast {
namespace {

RNNFAST_INLINE int64_t pairs_of(int64_t K) { return (K + 1) / 2; }
RNNFAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Part 0 of a number is the nearest bfloat16 number, once it is rounded; part 1 is what that leaves.
inline Vec<float> part(Vec<float> x, int part) { return part ? rest(x, second_of(beside(x, x))) : x; }

// Rows that are put in pairs at a time, and pairs of each: as many as the second-level cache holds beside a panel.
constexpr int64_t block_rows = 96, block_pairs = 256;

// Numbers of a row from number k on; zeros from number K on.
template <class W>
inline Vec<float> numbers(const W* row, int64_t k, int64_t K) {
    constexpr int V = lanes_of<float>;
    return load(row + k, K - k > V ? V : K < k ? 0 : int(K - k));
}

// The same of a row on the left, whose numbers are `stride` apart.
inline Vec<float> factors(const float* row, ptrdiff_t stride, int64_t k, int64_t K) {
    constexpr int V = lanes_of<float>;
    if (stride == 1) return numbers(row, k, K);
    const int there = K - k > V ? V : K < k ? 0 : int(K - k);
    if (stride == -1 && there == V) return reversed(load(row - k - (V - 1)));
    float some[V] = {};
    for (int i = 0; i < there; ++i) some[i] = row[(k + i) * stride];
    return load(some);
}

// Part i of a row's numbers from number k on, in pairs. Those of bfloat16 are pairs as they lie, and leave nothing.
template <class W>
inline Pairs row_pairs(const W* row, int64_t k, int64_t K, int i) {
    return neighbours(part(numbers(row, k, K), i), part(numbers(row, k + lanes_of<float>, K), i));
}
inline Pairs row_pairs(const BFloat16* row, int64_t k, int64_t K, int i) {
    Pairs pairs = {};
    if (i > 0) return pairs;
    if (K - k < 2 * lanes_of<float>)
        std::memcpy(&pairs, row + k, (K - k) * sizeof *row);
    else
        std::memcpy(&pairs, row + k, sizeof pairs);
    return pairs;
}

// Some rows on the left of a product in pairs.
template <int parts>
struct Factors {
    // Rows that fall on the same cache sets would drive each other out.
    static constexpr int64_t row_size = block_pairs + 16;
    alignas(64) uint32_t pairs[parts][block_rows][row_size];

    // Takes numbers [k0, k1) of rows [row0, row0 + rows) of p.
    void take(const Product<float>& p, int64_t row0, int64_t rows, int64_t k0, int64_t k1) {
        if (k0 == k1) return;
        const float* const* const a = p.a + row0;
        if (p.a_stride > 1 && are_side_by_side(a, rows))
            take_columns(a[0] + k0 * p.a_stride, p.a_stride, rows, k1 - k0);
        else
            for (int64_t r = 0; r < rows; ++r) take_row(a[r], p.a_stride, r, k0, k1);
    }

private:
    static constexpr int V = lanes_of<float>;

    static bool are_side_by_side(const float* const* a, int64_t rows) {
        for (int64_t r = 1; r < rows; ++r)
            if (a[r] != a[0] + r) return false;
        return true;
    }

    void take_row(const float* row, ptrdiff_t stride, int64_t r, int64_t k0, int64_t k1) {
        for (int64_t k = k0; k < k1; k += 2 * V) {
            const Vec<float> low = factors(row, stride, k, k1), high = factors(row, stride, k + V, k1);
            for (int i = 0; i < parts; ++i) store_pairs(i, r, (k - k0) / 2, neighbours(part(low, i), part(high, i)));
        }
    }

    // Rows that are the columns of an array (K, stride).
    void take_columns(const float* from, ptrdiff_t stride, int64_t rows, int64_t K) {
        for (int64_t r = 0; r < rows; r += V)
            for (int64_t k = 0; k < K; k += 2 * V)
                for (int i = 0; i < parts; ++i) {
                    const int lanes = int(least(rows - r, V)), count = int(least(pairs_of(K - k), V));
                    Vec<float> square[V] = {};
                    for (int j = 0; j < count; ++j) {
                        const float* const two = from + (k + 2 * j) * stride + r;
                        const bool lone = k + 2 * j + 1 == K;
                        square[j] = (Vec<float>)beside(part(load(two, lanes), i),
                                                       part(load(lone ? two : two + stride, lone ? 0 : lanes), i));
                    }
                    transpose<float>(square);
                    for (int j = 0; j < lanes; ++j) store_pairs(i, r + j, k / 2, (Pairs)square[j]);
                }
    }

    void store_pairs(int part, int64_t r, int64_t pair, Pairs some) {
        store(reinterpret_cast<float*>(&pairs[part][r][pair]), (Vec<float>)some);
    }
};

template <class Unit, int parts>
struct Sixteen {
    using Number = float;
    static constexpr bool has_all_bits = false;
    static constexpr ProductCosts costs = {Unit::rows, 2. * parts, Unit::speed / (parts * (parts + 1) / 2)};

    // As those of Plain. A panel is packed part by part, (pairs,vectors,V) each.
    template <bool done_stores, class Done>
    static void run(const Product<float>& p, const Done& done);
    static void pack_transposed(const Columns& columns, int64_t K, const Matrices& w, ptrdiff_t stride, int64_t panel0,
                                int64_t panel1, float* packed);
    static void pack_rows(const Columns& columns, int64_t K, const float* const* rows, int64_t panel0, int64_t panel1,
                          float* packed);
    static int64_t burn(int64_t rounds) { return Unit::burn(rounds) / (parts * (parts + 1) / 2); }

private:
    static constexpr int V = lanes_of<float>;

    // Part i of a panel, or of one that is to be.
    template <class P>
    static P* part_of(P* packed, const Panel& panel, int64_t K, int i) {
        return packed + (panel.offset * parts + i * panel.vectors * V) * pairs_of(K);
    }
};

template <class Unit, int parts>
template <bool done_stores, class Done>
void Sixteen<Unit, parts>::run(const Product<float>& p, const Done& done) {
    Unit unit;
    const int64_t pairs = pairs_of(p.K), k_blocks = pairs ? (pairs + block_pairs - 1) / block_pairs : 1;
    const RowTiles blocks(p.rows, block_rows);
    FullTile<float, Unit::rows> full;
    Factors<parts> left;
    int64_t block;
    for (int64_t first = 0; first < p.rows; first += block) {
        block = blocks.rows_at(first);
        const RowTiles row_tiles(block, Unit::rows);
        for (int64_t kb = 0; kb < k_blocks; ++kb) {
            const int64_t pair0 = kb * pairs / k_blocks, pair1 = (kb + 1) * pairs / k_blocks;
            const bool last = kb == k_blocks - 1;
            const float* const* const init = kb ? p.c : p.init;
            left.take(p, first, block, 2 * pair0, least(2 * pair1, p.K));
            for (int64_t q = p.panel0; q < p.panel1; ++q) {
                const Panel panel(p.columns, q);
                const auto* const packed = reinterpret_cast<const uint32_t*>(p.packed);
                Operands<parts> of{pair1 - pair0, {}, left.row_size, {}};
                for (int i = 0; i < parts; ++i)
                    of.panel[i] = part_of(packed, panel, p.K, i) + pair0 * panel.vectors * V;
                int rows;
                for (int64_t r = 0; r < block; r += rows) {
                    rows = row_tiles.rows_at(r);
                    for (int i = 0; i < parts; ++i) of.a[i] = left.pairs[i][r];
                    const int64_t row0 = first + r;
                    const Rows<const float*> start{init ? init + row0 : nullptr, p.columns.first + panel.column};
                    const Rows<float*> c{p.c + row0, p.columns.first + panel.column};
                    const auto tile = [&](Rows<const float*> from, Rows<float*> to, ptrdiff_t stride) {
                        unit.tile(rows, panel.vectors, of, from, to, stride);
                    };
                    const Piece<float> piece = run_tile(p, panel, rows, start, c, full, !done_stores || !last, tile);
                    if (last) done(row0, row0 + rows, panel, piece);
                }
            }
        }
    }
}

template <class Unit, int parts>
void Sixteen<Unit, parts>::pack_transposed(const Columns& columns, int64_t K, const Matrices& w, ptrdiff_t stride,
                                           int64_t panel0, int64_t panel1, float* packed) {
    with_numbers_of<float>(w, [&](auto* const* matrices) {
        for (int64_t q = panel0; q < panel1; ++q) {
            const Panel panel(columns, q);
            const ptrdiff_t row = panel.vectors * V;
            for (int v = 0; v < panel.vectors; ++v) {
                const auto* from = matrices[panel.gate(columns, v)] + panel.column_of(columns, v) * stride;
                for (int i = 0; i < parts; ++i)
                    for (int64_t k = 0; k < K; k += 2 * V) {
                        float* const to = part_of(packed, panel, K, i) + v * V + k / 2 * row;
                        Vec<float> square[V] = {};
                        for (int j = 0; j < panel.lanes(columns, v); ++j)
                            square[j] = (Vec<float>)row_pairs(from + j * stride, k, K, i);
                        transpose<float>(square);
                        for (int j = 0; j < least(pairs_of(K - k), V); ++j) store(to + j * row, square[j]);
                    }
            }
        }
    });
}

template <class Unit, int parts>
void Sixteen<Unit, parts>::pack_rows(const Columns& columns, int64_t K, const float* const* rows, int64_t panel0,
                                     int64_t panel1, float* packed) {
    for (int64_t q = panel0; q < panel1; ++q) {
        const Panel panel(columns, q);
        for (int i = 0; i < parts; ++i) {
            float* to = part_of(packed, panel, K, i);
            for (int64_t k = 0; k < K; k += 2)
                for (int v = 0; v < panel.vectors; ++v, to += V) {
                    const ptrdiff_t at = panel.column + v * panel.stride;
                    const int lanes = panel.lanes(columns, v);
                    const Vec<float> first = load(rows[k] + at, lanes);
                    const Vec<float> second = k + 1 < K ? load(rows[k + 1] + at, lanes) : Vec<float>{};
                    store(to, (Vec<float>)beside(part(first, i), part(second, i)));
                }
        }
    }
}

}  // namespace
}  // namespace rnnfast
