// Where a matrix product's numbers are: the fragments of mma.sync (PTX ISA, "Matrix fragments for mma.m16n8k16" and
// "...m16n8k8"), and which gate of which unit is a row of a tile. Host and device; tested on the CPU.
//
//   D (16,8) += A (16,K) B (K,8)    K = 16 for 16-bit numbers, 8 for TF32
//
// Each of a warp's 32 lanes holds some elements of A, B and D. Here A is the recurrent weights, B is h (or dz) of 8
// sequences, D are pre-activations (or dL/dh).
#pragma once

#include "sweep.h"

namespace rnnfast::cuda {

struct Place {
    int row, column;
};

// Element i of A that a lane holds; bytes: of a number. 16-bit numbers come in pairs, 2 to a register.
RNNFAST_BOTH constexpr Place place_in_a(int bytes, int lane, int i) {
    if (bytes == 2) return {lane / 4 + 8 * (i / 2 % 2), lane % 4 * 2 + i % 2 + 8 * (i / 4)};  // i < 8
    return {lane / 4 + 8 * (i % 2), lane % 4 + 4 * (i / 2)};                                  // i < 4
}

RNNFAST_BOTH constexpr Place place_in_b(int bytes, int lane, int i) {
    if (bytes == 2) return {lane % 4 * 2 + i % 2 + 8 * (i / 2), lane / 4};  // i < 4
    return {lane % 4 + 4 * i, lane / 4};                                    // i < 2
}

RNNFAST_BOTH constexpr Place place_in_d(int lane, int i) {  // i < 4
    return {lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2};
}

// Operands in memory are not in the order of a fragment's columns: 16 bytes in a row, which a lane moves at a time, are
// what it holds of two steps along K. Lane lane % 4 has bytes 16 * (lane % 4) ... of each 64; of their four words two
// are of the first step, two of the second. Both A and B are so, therefore no product sees it.
struct Word {
    int word, half;  // 32 bits of a lane's 16 bytes, and which 16 bits of these
};
// Where the column that element i of A or B is of is, in what a lane holds of two steps; step: 0 or 1.
RNNFAST_BOTH constexpr Word word_of_a(int bytes, int step, int i) {
    if (bytes == 2) return {2 * step + i / 4, i % 2};
    return {2 * step + i / 2, 0};
}
RNNFAST_BOTH constexpr Word word_of_b(int bytes, int step, int i) {
    if (bytes == 2) return {2 * step + i / 2, i % 2};
    return {2 * step + i, 0};
}
// Registers of A: rows of the first 8 or the last 8, and a word of these rows' 16 bytes.
RNNFAST_BOTH constexpr int lower_rows(int reg) { return reg % 2; }
RNNFAST_BOTH constexpr int word_of_register(int step, int reg) { return 2 * step + reg / 2; }

// Rows of the forward product. A warp has 16 units of a cell of one gate, else tiles of 16 rows for 8 units with 2
// gates each, such that one lane ends up with all gates of a unit.
struct GateRow {
    int gate, unit;
};
RNNFAST_BOTH constexpr GateRow row_of_tile(int gates, int tile, int row) {
    if (gates == 1) return {0, row};
    return {2 * tile + row / 8, row % 8};
}
// Of a lane's D of all tiles, 4 elements each: gate `gate` of its sequence lane % 4 * 2 + e, e < 2. The unit is lane /
// 4, of a cell of one gate lane / 4 of a half.
RNNFAST_BOTH constexpr int sum_of(int gate, int e) { return 2 * gate + e; }

// The columns of dz in the backward product, K = C * G * U: what one block computes is in one piece. Block `rank` has
// units rank * U ...
struct GateColumn {
    int gate, unit;
};
RNNFAST_BOTH constexpr GateColumn dz_column(int G, int U, int k) {
    if (G == 1) return {0, k};
    const int rank = k / (G * U), rest = k % (G * U);
    return {rest / U, rank * U + rest % U};
}

}  // namespace rnnfast::cuda
