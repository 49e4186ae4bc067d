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
    Run(const ReadoutRows& of, double* gram, double* moment)
        : S(of.S),
          n(of.n),
          Z(of.Z),
          O(of.O),
          gram(gram),
          columns(Columns::of_matrix(Z, kernel.lanes, 1)),
          tasks(n > 0 ? S * columns.panels : 0),
          x_rows(S * n),
          y_columns(O),
          moment_rows(S * O),
          packed(S * columns.packed(n)) {
        for (int64_t s = 0; s < S; ++s)
            for (int64_t i = 0; i < n; ++i) x_rows[s * n + i] = of.x + s * of.x_stride + i * Z;
        for (int64_t o = 0; o < O; ++o) y_columns[o] = of.y + o;
        for (int64_t i = 0; i < S * O; ++i) moment_rows[i] = moment + i * Z;
    }

    void work() {
        for (int64_t i; (i = next_pack++) < tasks; ++packs_done) pack(i % S, i / S);
        wait_until([this] { return packs_done.load() == tasks; });
        // the last panels first: they have the most to their left
        for (int64_t i; (i = next_product++) < tasks; ++products_done) multiply(i % S, columns.panels - 1 - i / S);
        wait_until([this] { return products_done.load() == tasks; });
    }

private:
    double* packed_of(int64_t s) const { return packed.get() + s * columns.packed(n); }

    void pack(int64_t s, int64_t panel) const {
        kernel.pack_rows(columns, n, x_rows.get() + s * n, panel, panel + 1, packed_of(s));
    }

    // Rows of the Gram matrix that belong to a panel, up to the diagonal; its columns of the moment.
    void multiply(int64_t s, int64_t panel) const {
        const int64_t first = columns.first_vector(panel), vectors = columns.first_vector(panel + 1) - first;
        const int64_t row0 = first * columns.lanes, width = vectors * columns.lanes;
        const int64_t count = std::min(width, Z - row0);
        const double* a[max_rows];
        double* c[max_rows];
        for (int64_t r = 0; r < count; ++r) {
            a[r] = packed_of(s) + row0 * n + r;
            c[r] = gram + (s * Z + row0 + r) * Z;
        }
        kernel.product({count, n, a, width, columns, 0, panel + 1, packed_of(s), c, c});
        double* const* const m = moment_rows.get() + s * O;
        kernel.product({O, n, y_columns.get(), O, columns, panel, panel + 1, packed_of(s), m, m});
    }

    static constexpr int64_t max_rows = 4 * 64 / sizeof(double);  // columns of a panel of the widest vectors

    const int64_t S, n, Z, O;
    double* const gram;
    const Kernels<double>& kernel = kernels<double>();
    const Columns columns;
    const int64_t tasks;
    Buffer<const double*> x_rows;     // [S*n]
    Buffer<const double*> y_columns;  // [O]
    Buffer<double*> moment_rows;      // [S*O]
    Buffer<double> packed;            // [S] (n,Z) packed
    std::atomic<int64_t> next_pack{0}, packs_done{0}, next_product{0}, products_done{0};
};

GramSum::GramSum(const ReadoutRows& rows, double* gram, double* moment)
    : run_(std::make_unique<Run>(rows, gram, moment)) {}

GramSum::~GramSum() = default;

void GramSum::work(int threads) {
    if (!run_parallel(threads, [this](int) { run_->work(); })) run_->work();
}

}  // namespace rnnfast
