// The product of the persistent kernels: W_hh stays in registers, sums of the warps that share rows.
#pragma once

#include "group.h"
#include "layout.h"
#include "operands.h"

namespace rnnfast::cuda {

// A warp's part of W_hh in registers, and its product with an operand.
template <Number number, int row_tiles, int k_steps>
struct Stationary {
    using Operand = typename NumberOf<number>::Operand;
    static constexpr int K = k_of_step(number), per_vector = 16 / sizeof(Operand);
    uint32_t w[k_steps][row_tiles][4];
    int first, count;  // column, steps along K; a multiple of k_batch

    // weights(tile, row, column): per_vector weights from a column on, as operands; 0 where there are none.
    template <class Weights>
    __device__ Stationary(const Here& here, const Geometry& g, const Weights& weights)
        : first(here.split * g.k_steps * K + here.lane % 4 * per_vector), count(g.k_steps) {
#pragma unroll
        for (int k = 0; k < k_steps; k += 2)
#pragma unroll
            for (int tile = 0; tile < row_tiles; ++tile) {
                Vector rows[2] = {};
                if (k < count)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        rows[half] = weights(tile, here.lane / 4 + 8 * half, first + k * K);
#pragma unroll
                for (int step = 0; step < 2; ++step)
#pragma unroll
                    for (int reg = 0; reg < 4; ++reg)
                        w[k + step][tile][reg] = rows[lower_rows(reg)].x[word_of_register(step, reg)];
            }
    }

    // sum[tile][n] of the 8 sequences of tile n. One product waits for the one before with the same sum: where there is
    // one sum only, two are made of it.
    template <int tiles>
    __device__ void multiply(float (&sum)[row_tiles][tiles][4], const Operand* operand, int stride, int lane) const {
        constexpr int chains = row_tiles * tiles == 1 ? 2 : 1, batch = tiles == 4 ? 2 : k_batch;  // registers are few
        float part[chains][row_tiles][tiles][4] = {};
        const Operand* const row = operand + lane / 4 * stride + first;
#pragma unroll
        for (int k = 0; k < k_steps; k += batch)
            if (k < count) {
                Vector b[batch / 2][tiles];
#pragma unroll
                for (int pair = 0; pair < batch / 2; ++pair)
#pragma unroll
                    for (int n = 0; n < tiles; ++n)
                        b[pair][n] =
                            load_vector(reinterpret_cast<const Vector*>(row + n * 8 * stride + (k + 2 * pair) * K));
#pragma unroll
                for (int i = 0; i < batch; ++i)
#pragma unroll
                    for (int n = 0; n < tiles; ++n) {
                        const uint32_t (&x)[4] = b[i / 2][n].x;
                        const uint32_t both[2] = {x[2 * (i % 2)], x[2 * (i % 2) + 1]};
#pragma unroll
                        for (int tile = 0; tile < row_tiles; ++tile)
                            multiply_add<number>(part[i % chains][tile][n], w[k + i][tile], both);
                    }
            }
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile)
#pragma unroll
            for (int n = 0; n < tiles; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sum[tile][n][i] = part[0][tile][n][i] + (chains == 2 ? part[chains - 1][tile][n][i] : 0.f);
    }
};

// The sums of all warps that share rows: warp `split` of the first few gets those of part split, split + finishers, ...
// of all tiles and halves. A row tile of 16 units has two halves of 8, so that a lane ends up with one unit in any
// case. After it no warp reads the operand any more.
template <int row_tiles, int tiles, int halves, int owned, bool always_sync>
__device__ inline void add_splits(float (&total)[owned][row_tiles * 4 / halves],
                                  const float (&sum)[row_tiles][tiles][4], float* parts, const Here& here,
                                  const Geometry& g) {
    constexpr int values = row_tiles * 4 / halves, all = tiles * halves, finishers = all / owned;
    const auto part = [&](int one, int split, int value) -> float& {
        return parts[(((here.row * all + one) * g.splits + split) * values + value) * 32 + here.lane];
    };
#pragma unroll
    for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int one = n * halves + (halves == 2 ? i / 2 : 0);
                const int value = halves == 2 ? i % 2 : tile * 4 + i;
                if (one % finishers == here.split)
                    total[one / finishers][value] = sum[tile][n][i];
                else
                    part(one, here.split, value) = sum[tile][n][i];
            }
    if (g.splits > 1 || always_sync) sync_block();
    if (here.split >= finishers) return;
    for (int split = 0; split < g.splits; ++split)
        if (split != here.split)
#pragma unroll
            for (int j = 0; j < owned; ++j)
#pragma unroll
                for (int value = 0; value < values; ++value)
                    total[j][value] += part(here.split + j * finishers, split, value);
}

}  // namespace rnnfast::cuda
