// Multiplies pairs of bfloat16 numbers as AMX does: sums of 16 rows and up to 4 vectors of columns are tiles 0 to 3,
// and 16 pairs along k are a tile on the left (4), which meets one of the panel (5) for each of them. Tiles 6 and 7 are
// of the pairs that are left over at the end, so that nothing beyond them is read.
#pragma once

#include "operands.h"
#include "tile.h"
#include "tiles.h"

namespace rnnfast {
namespace {

class TileUnit {
public:
    static constexpr int rows = tile_numbers;
    static constexpr double speed = 16;
    static_assert(lanes_of<float> == tile_numbers);

    TileUnit() = default;
    TileUnit(const TileUnit&) = delete;
    // The kernel saves tiles of a thread that has any whenever it is interrupted.
    ~TileUnit() {
        if (rows_) release_tiles();
    }

    // As PairUnit::tile. Numbers of two parts are multiplied in three products; that of both rests is lost in the
    // rounding of the others.
    template <int parts>
    void tile(int rows, int vectors, const Operands<parts>& of, Rows<const float*> init, Rows<float*> c,
              ptrdiff_t c_stride) {
        set(rows, int(of.pairs % tile_numbers));
        Sums sums, rests;
        switch (vectors) {
            case 1:
                multiply<1>(of, sums, rests);
                break;
            case 2:
                multiply<2>(of, sums, rests);
                break;
            case 3:
                multiply<3>(of, sums, rests);
                break;
            default:
                multiply<4>(of, sums, rests);
                break;
        }
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < vectors; ++v) {
                Vec<float> sum = init ? load(init[r] + v * c_stride) : Vec<float>{};
                if constexpr (parts > 1) sum += finite(load(rests.row[r] + v * V));
                store(c[r] + v * c_stride, sum + load(sums.row[r] + v * V));
            }
    }

    // As Plain::burn, in rounds that take as long.
    static int64_t burn(int64_t rounds) {
        constexpr int64_t rounds_of_vectors = 6;
        TileUnit unit;
        unit.set(tile_numbers, 0);
        clear_sums<4>(), clear_tile<4>(), clear_tile<5>();
        for (int64_t i = 0; i < rounds / rounds_of_vectors; ++i) {
            add_tile_products<0, 4, 5>(), add_tile_products<1, 4, 5>();
            add_tile_products<2, 4, 5>(), add_tile_products<3, 4, 5>();
        }
        return rounds / rounds_of_vectors * 4 * tile_numbers * V * tile_numbers * 2 * 2;
    }

private:
    static constexpr int V = lanes_of<float>;

    // Tiles for so many rows, and so many pairs at the end.
    void set(int rows, int rest) {
        if (rows == rows_ && rest == rest_) return;
        TileSizes sizes;
        const auto size = [&](int tile, int rows, int numbers) {
            sizes.rows[tile] = uint8_t(numbers ? rows : 0), sizes.row_bytes[tile] = uint16_t(rows ? numbers * 4 : 0);
        };
        for (int v = 0; v < max_tile_vectors; ++v) size(v, rows, V);
        size(4, rows, tile_numbers), size(5, tile_numbers, V);
        size(6, rows, rest), size(7, rest, V);
        set_tiles(sizes);
        rows_ = rows, rest_ = rest;
    }

    struct alignas(64) Sums {
        float row[tile_numbers][max_tile_vectors * V];
    };

    // An infinity times the rest of a number has any sign: what counts is its product with the number.
    static Vec<float> finite(Vec<float> x) { return x - x == Vec<float>{} ? x : Vec<float>{}; }

    template <int NV, int parts>
    static void multiply(const Operands<parts>& of, Sums& sums, [[maybe_unused]] Sums& rests) {
        clear_sums<NV>();
        add_parts<NV>(of.pairs, of.a[0], of.a_row, of.panel[0]);
        store_sums<NV>(sums);
        if constexpr (parts > 1) {
            clear_sums<NV>();
            add_parts<NV>(of.pairs, of.a[0], of.a_row, of.panel[1]);
            add_parts<NV>(of.pairs, of.a[1], of.a_row, of.panel[0]);
            store_sums<NV>(rests);
        }
    }

    template <int NV>
    static void clear_sums() {
        clear_tile<0>();
        if constexpr (NV > 1) clear_tile<1>();
        if constexpr (NV > 2) clear_tile<2>();
        if constexpr (NV > 3) clear_tile<3>();
    }

    template <int NV>
    static void store_sums(Sums& to) {
        store_tile<0>(to.row[0], sizeof to.row[0]);
        if constexpr (NV > 1) store_tile<1>(to.row[0] + V, sizeof to.row[0]);
        if constexpr (NV > 2) store_tile<2>(to.row[0] + 2 * V, sizeof to.row[0]);
        if constexpr (NV > 3) store_tile<3>(to.row[0] + 3 * V, sizeof to.row[0]);
    }

    template <int NV>
    static void add_parts(int64_t pairs, const uint32_t* a, ptrdiff_t a_row, const uint32_t* panel) {
        int64_t k = 0;
        for (; k + tile_numbers <= pairs; k += tile_numbers) {
            load_tile<4>(a + k, a_row * 4);
            add_products<NV, 4, 5>(panel + k * NV * V);
        }
        if (k == pairs) return;
        load_tile<6>(a + k, a_row * 4);
        add_products<NV, 6, 7>(panel + k * NV * V);
    }

    // Tiles v += left * vector v of the panel, which goes to `right`.
    template <int NV, int left, int right>
    static void add_products(const uint32_t* panel) {
        const auto add = [&](auto tile, int v) {
            load_tile<right>(panel + v * V, NV * V * 4);
            add_tile_products<decltype(tile)::number, left, right>();
        };
        add(Number<0>(), 0);
        if constexpr (NV > 1) add(Number<1>(), 1);
        if constexpr (NV > 2) add(Number<2>(), 2);
        if constexpr (NV > 3) add(Number<3>(), 3);
    }
    template <int n>
    struct Number {
        static constexpr int number = n;
    };

    int rows_ = 0, rest_ = 0;
};

}  // namespace
}  // namespace rnnfast
