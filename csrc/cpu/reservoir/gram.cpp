// Sums for a linear readout: X^T X of many rows. Every panel of columns is packed once, and serves as either factor.
#include <algorithm>
#include <atomic>

#include "../../rnnfast.h"
#include "../kernels.h"
#include "../runtime/buffer.h"
#include "../runtime/threads.h"

namespace rnnfast {
namespace {

class GramRun {
public:
    GramRun(int64_t S, int64_t n, int64_t Z, const double* x, int64_t x_stride, double* gram, int threads)
        : S(S),
          n(n),
          Z(Z),
          x(x),
          x_stride(x_stride),
          gram(gram),
          threads(threads),
          columns(Columns::of_matrix(Z, kernel.lanes, 1)),
          rows(S * n),
          packed(S * columns.packed(n)) {
        for (int64_t s = 0; s < S; ++s)
            for (int64_t i = 0; i < n; ++i) rows[s * n + i] = x + s * x_stride + i * Z;
        everyone.expect(threads);
    }

    bool run() {
        return run_parallel(threads, [this](int) { work(); });
    }

private:
    void work() {
        const int64_t tasks = S * columns.panels;
        for (int64_t i; (i = next_pack++) < tasks;) {
            const int64_t s = i / columns.panels, panel = i % columns.panels;
            kernel.pack_rows(columns, n, rows.get() + s * n, panel, panel + 1, of(s));
        }
        everyone.wait();
        // the last panels first: they have the most to their left
        for (int64_t i; (i = next_product++) < tasks;) multiply(i % S, columns.panels - 1 - i / S);
    }

    double* of(int64_t s) const { return packed.get() + s * columns.packed(n); }

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

    const int64_t S, n, Z;
    const double* const x;
    const int64_t x_stride;
    double* const gram;
    const int threads;
    const Kernels<double>& kernel = kernels<double>();
    const Columns columns;
    Buffer<const double*> rows;  // [S*n]
    Buffer<double> packed;       // [S] (n,Z) packed
    Barrier everyone;
    std::atomic<int64_t> next_pack{0}, next_product{0};
};

}  // namespace

void add_gram(int64_t S, int64_t n, int64_t Z, const double* x, int64_t x_stride, double* gram, int threads) {
    if (S < 1 || n < 1 || Z < 1) return;
    if (!GramRun(S, n, Z, x, x_stride, gram, threads).run()) GramRun(S, n, Z, x, x_stride, gram, 1).run();
}

}  // namespace rnnfast
