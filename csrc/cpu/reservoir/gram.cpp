// Sums for a linear readout: X^T X of many rows. Every panel of columns is packed once, and serves as either factor.
// Threads take panels as they come, whenever they come: the one that has run a reservoir helps with what is left.
#include <algorithm>
#include <atomic>

#include "../../rnnfast.h"
#include "../kernels.h"
#include "../runtime/buffer.h"
#include "../runtime/threads.h"

namespace rnnfast {

struct GramSum::Run {
    Run(int64_t S, int64_t n, int64_t Z, const double* x, int64_t x_stride, double* gram)
        : n(n),
          Z(Z),
          gram(gram),
          columns(Columns::of_matrix(Z, kernel.lanes, 1)),
          S(S),
          tasks(n > 0 ? S * columns.panels : 0),
          rows(S * n),
          packed(S * columns.packed(n)) {
        for (int64_t s = 0; s < S; ++s)
            for (int64_t i = 0; i < n; ++i) rows[s * n + i] = x + s * x_stride + i * Z;
    }

    void work() {
        for (int64_t i; (i = next_pack++) < tasks; ++packs_done) pack(i % S, i / S);
        wait_until([this] { return packs_done.load() == tasks; });
        // the last panels first: they have the most to their left
        for (int64_t i; (i = next_product++) < tasks; ++products_done) multiply(i % S, columns.panels - 1 - i / S);
        wait_until([this] { return products_done.load() == tasks; });
    }

private:
    double* of(int64_t s) const { return packed.get() + s * columns.packed(n); }

    void pack(int64_t s, int64_t panel) const {
        kernel.pack_rows(columns, n, rows.get() + s * n, panel, panel + 1, of(s));
    }

    // Rows of the Gram matrix that belong to a panel, up to the diagonal.
    void multiply(int64_t s, int64_t panel) const {
        const int64_t first = columns.first_vector(panel), vectors = columns.first_vector(panel + 1) - first;
        const int64_t row0 = first * columns.lanes, width = vectors * columns.lanes;
        const int64_t count = std::min(width, Z - row0);
        const double* a[max_rows];
        double* c[max_rows];
        for (int64_t r = 0; r < count; ++r) {
            a[r] = of(s) + row0 * n + r;
            c[r] = gram + (s * Z + row0 + r) * Z;
        }
        kernel.product({count, n, a, width, columns, 0, panel + 1, of(s), c, c});
    }

    static constexpr int64_t max_rows = 4 * 64 / sizeof(double);  // columns of a panel of the widest vectors

    const int64_t n, Z;
    double* const gram;
    const Kernels<double>& kernel = kernels<double>();
    const Columns columns;
    const int64_t S, tasks;
    Buffer<const double*> rows;  // [S*n]
    Buffer<double> packed;       // [S] (n,Z) packed
    std::atomic<int64_t> next_pack{0}, packs_done{0}, next_product{0}, products_done{0};
};

GramSum::GramSum(int64_t S, int64_t n, int64_t Z, const double* x, int64_t x_stride, double* gram)
    : run_(std::make_unique<Run>(S, n, Z, x, x_stride, gram)) {}

GramSum::~GramSum() = default;

void GramSum::work(int threads) {
    if (!run_parallel(threads, [this](int) { run_->work(); })) run_->work();
}

}  // namespace rnnfast
