// Reservoirs through time. A job is one recurrent matrix and some of the sequences that run on it; a team of threads
// takes jobs one after another. Alone a thread never waits; in a team each has a part of the units, with a barrier a
// step.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../rnnfast.h"
#include "../kernels.h"
#include "../runtime/buffer.h"
#include "../runtime/threads.h"

namespace rnnfast {
namespace {

// Rows of x that go through W_in together.
constexpr int64_t chunk_rows = 96;
// So many cycles of a step, ten barriers' worth and more, are a share of work for a thread: a barrier costs far more
// than its instructions where other programs keep the cores busy.
constexpr double cycles_to_share = 30000;
// What a vector of units costs.
constexpr double cycles_per_connection = 3;
constexpr double cycles_per_activation = 25;

}  // namespace

template <class T>
struct Reservoirs<T>::Packed {
    Packed(const ReservoirShape& s, const ReservoirWeights<T>& weights)
        : kernel(kernels<T>()),
          columns(Columns::of_matrix(s.H, kernel.lanes, 1)),
          runs((s.H + run_length - 1) / run_length),
          sparse(!weights.dense),
          w_in(s.reservoirs() * columns.packed(s.I)),
          bias(s.reservoirs() * s.H),
          leak(s.reservoirs()),
          scale(s.reservoirs()),
          dense_w(sparse ? 0 : s.M * columns.packed(s.H)),
          sparse_w(sparse ? s.M * runs * s.F * run_length : 0) {
        std::copy_n(weights.bias, s.reservoirs() * s.H, bias.get());
        std::copy_n(weights.leak, s.reservoirs(), leak.get());
        std::copy_n(weights.scale, s.reservoirs(), scale.get());
        const auto pack = [&](const void* from, int64_t K, T* to) {
            kernel.pack_transposed(columns, K, {&from, false}, K, 0, columns.panels, to);
        };
        for (int64_t i = 0; i < s.reservoirs(); ++i)
            pack(weights.w_in + i * s.H * s.I, s.I, w_in.get() + i * columns.packed(s.I));
        if (!sparse) {
            for (int64_t m = 0; m < s.M; ++m)
                pack(weights.dense + m * s.H * s.H, s.H, dense_w.get() + m * columns.packed(s.H));
            return;
        }
        starts = std::vector<int32_t>(weights.starts, weights.starts + s.M * runs * s.F);
        for (const int32_t start : starts)
            if (start < 0 || start >= s.H)
                throw std::invalid_argument("starts: expected units in [0, " + std::to_string(s.H) + "), got " +
                                            std::to_string(start));
        for (int64_t m = 0; m < s.M; ++m)
            pack_runs(s, weights.sparse + m * s.H * s.F, sparse_w.get() + m * runs * s.F * run_length);
    }

    // (H,F) -> (H/run_length,F,run_length)
    void pack_runs(const ReservoirShape& s, const float* from, float* to) const {
        for (int64_t j = 0; j < runs * run_length; ++j)
            for (int64_t k = 0; k < s.F; ++k)
                to[(j / run_length * s.F + k) * run_length + j % run_length] = j < s.H ? from[j * s.F + k] : 0.0f;
    }

    const Kernels<T>& kernel;
    const Columns columns;  // of the units
    const int64_t runs;     // of units
    const bool sparse;
    Buffer<T> w_in;               // [M*Q] (I,H) packed
    Buffer<T> bias, leak, scale;  // (M*Q,H), (M*Q), (M*Q)
    Buffer<T> dense_w;            // [M] (H,H) packed
    Buffer<float> sparse_w;       // (M,H/run_length,F,run_length)
    std::vector<int32_t> starts;  // (M,H/run_length,F), sparse
};

namespace {

// Who does what: the sequences on each matrix in `parts`, which `teams` of `splits` threads take one after another.
struct Work {
    int64_t parts;
    int teams, splits;

    Work(const ReservoirShape& s, const Columns& columns, int64_t B, int threads) {
        const int64_t streams = s.Q * B;
        parts = std::max<int64_t>(1, std::min<int64_t>(threads / s.M, streams));
        teams = int(std::min<int64_t>(threads, s.M * parts));
        const double vectors = double(columns.vectors()) * double((streams + parts - 1) / parts);
        const double cycles = vectors * (cycles_per_connection * double(s.F) + cycles_per_activation);  // of a step
        const int64_t most = std::min<int64_t>({threads / teams, columns.panels, int64_t(cycles / cycles_to_share)});
        splits = int(std::max<int64_t>(1, most));
    }
};

template <class T, class Packed>
class ReservoirRunner {
public:
    ReservoirRunner(const ReservoirShape& shape, const Packed& packed, const ReservoirRun<T>& call, const Work& work)
        : s(shape),
          packed(packed),
          call(call),
          streams(shape.Q * call.B),
          parts(work.parts),
          teams(work.teams),
          splits(work.splits) {
        barriers = std::vector<Barrier>(teams);
        for (Barrier& barrier : barriers) barrier.expect(splits);
        for (int i = 0; i < teams; ++i) shared.emplace_back(*this);
        for (int i = 0; i < teams * splits; ++i) local.emplace_back(*this);
    }

    bool run() {
        return run_parallel(teams * splits, [this](int thread) { work(thread); });
    }

private:
    // Sequences of one job: neighbours among the Q*B of a matrix.
    struct Job {
        int64_t matrix;
        Range streams;
        int64_t size() const { return streams.end - streams.begin; }
    };

    int64_t largest_job() const { return (streams + parts - 1) / parts; }
    int64_t chunk_steps() const {
        return call.O ? 1 : std::max<int64_t>(1, std::min(call.steps, chunk_rows / std::max<int64_t>(1, call.B)));
    }
    // Working memory of a team.
    struct Shared {
        explicit Shared(const ReservoirRunner& run) {
            const int64_t n = run.largest_job();
            for (int i = 0; i < 2; ++i) {
                if (!run.call.states) rows[i] = Buffer<T>(n * run.s.H);
                if (run.packed.sparse) rings[i] = Buffer<T>(run.row_stride(n) * run.ring_size());
            }
        }
        Buffer<T> rows[2];  // (n,H) of this step and the one before, if the states are not wanted
        // Likewise, for sparse products: (n,H + run_length), wide (H + run_length,n), each state and its start again.
        Buffer<T> rings[2];
    };
    // Of a thread.
    struct Local {
        explicit Local(const ReservoirRunner& run)
            : x(run.chunk_steps() * run.call.B),
              bias(x_rows(run)),
              z(x_rows(run)),
              leak(run.largest_job()),
              scale(run.largest_job()),
              h_prev(run.largest_job()),
              noise(run.largest_job()),
              h(run.largest_job()),
              sums(run.packed.sparse ? 0 : run.largest_job() * run.s.H),
              sum_rows(run.largest_job()),
              ring_prev(run.largest_job()),
              ring(run.largest_job()),
              u(run.call.O ? run.largest_job() * run.s.I : 0),
              y(run.largest_job() * run.call.O) {}
        static int64_t x_rows(const ReservoirRunner& run) { return run.chunk_steps() * run.call.B; }

        Buffer<const T*> x, bias;  // rows of a chunk of one reservoir
        Buffer<T*> z;
        Buffer<T> leak, scale;  // [n]
        Buffer<const T*> h_prev, noise;
        Buffer<T*> h;
        Buffer<T> sums;  // (n,H) dense products
        Buffer<T*> sum_rows;
        Buffer<const T*> ring_prev;
        Buffer<T*> ring;
        Buffer<T> u;  // (n,I) inputs of a step, closed loop
        Buffer<T> y;  // (n,O)
    };
    struct Share {
        int team;
        bool first;     // of its team
        Range panels;   // its units
        Range vectors;  // the same
        Range units;    // the same
    };

    void work(int thread) {
        const int team = thread / splits, split = thread % splits;
        const Columns& c = packed.columns;
        const Range panels = Range::part(c.panels, split, splits);
        const Range vectors{c.first_vector(panels.begin), c.first_vector(panels.end)};
        const Share my{team,
                       split == 0,
                       panels,
                       vectors,
                       {vectors.begin * c.lanes, std::min<int64_t>(s.H, vectors.end * c.lanes)}};
        const Range jobs = Range::part(s.M * parts, team, teams);
        for (int64_t i = jobs.begin; i < jobs.end; ++i)
            run_job(my, {i / parts, Range::part(streams, i % parts, parts)}, local[thread]);
    }

    // Number of a job's row r among all sequences, and its reservoir.
    int64_t stream(const Job& job, int64_t r) const { return job.matrix * streams + job.streams.begin + r; }
    int64_t reservoir(const Job& job, int64_t r) const { return stream(job, r) / call.B; }

    T* row(const Share& my, const Job& job, int64_t t, int64_t r) const {
        if (call.states) return call.states + (stream(job, r) * call.steps + t) * call.state_stride;
        return shared[my.team].rows[t % 2].get() + r * s.H;
    }

    void run_job(const Share& my, const Job& job, Local& to) {
        const int64_t n = job.size();
        for (int64_t r = 0; r < n; ++r) {
            to.leak[r] = packed.leak[reservoir(job, r)];
            to.scale[r] = packed.scale[reservoir(job, r)];
            if (!packed.sparse) to.sum_rows[r] = to.sums.get() + r * s.H;
            if (call.O) std::copy_n(call.y0 + stream(job, r) * call.O, call.O, to.y.get() + r * call.O);
        }
        if (packed.sparse) start_rings(my, job);
        barriers[my.team].wait();
        for (int64_t t = 0; t < call.steps; ++t) {
            if (call.O)
                close_loop(my, job, t, to);
            else if (t % chunk_steps() == 0)
                project_inputs(my, job, t, std::min(call.steps, t + chunk_steps()), to);
            step(my, job, t, to);
            barriers[my.team].wait();
            if (call.O) read_out(my, job, t, to);
        }
        for (int64_t r = 0; r < n; ++r) {
            const T* last = row(my, job, call.steps - 1, r);
            std::copy(last + my.units.begin, last + my.units.end, call.h + stream(job, r) * s.H + my.units.begin);
        }
        barriers[my.team].wait();  // the next job takes the same working memory
    }

    int64_t ring_size() const { return s.H + run_length; }
    // Are there sequences enough for lanes?
    bool wide(int64_t n) const { return 2 * n > packed.kernel.lanes; }
    int64_t row_stride(int64_t n) const {
        return (n + packed.kernel.lanes - 1) / packed.kernel.lanes * packed.kernel.lanes;
    }

    void start_rings(const Share& my, const Job& job) {
        const int64_t n = job.size(), stride = row_stride(n);
        for (Buffer<T>& rings : shared[my.team].rings)
            for (int64_t r = 0; r < (wide(n) ? stride : n); ++r)
                for (int64_t j = my.units.begin; j < my.units.end; ++j) {
                    const T h = r < n ? call.h[stream(job, r) * s.H + j] : T(0);
                    for (int64_t to = j; to < ring_size(); to += s.H)
                        rings[wide(n) ? to * stride + r : r * ring_size() + to] = h;
                }
    }

    // z = W_in x + b of rows of one reservoir.
    void project(const Share& my, int64_t which, int64_t n, Local& to) const {
        const T* bias = packed.bias.get() + which * s.H;
        for (int64_t i = 0; i < n; ++i) to.bias[i] = bias;
        packed.kernel.product({n, s.I, to.x.get(), 1, packed.columns, my.panels.begin, my.panels.end,
                               packed.w_in.get() + which * packed.columns.packed(s.I), to.bias.get(), to.z.get()});
    }

    // Calls body(reservoir, row0, row1) for the rows of a job that are of the same reservoir.
    template <class Body>
    void for_reservoirs(const Job& job, Body body) const {
        for (int64_t r = 0, end; r < job.size(); r = end) {
            const int64_t which = reservoir(job, r);
            end = std::min(job.size(), r + call.B - stream(job, r) % call.B);
            body(which, r, end);
        }
    }

    void project_inputs(const Share& my, const Job& job, int64_t t0, int64_t t1, Local& to) const {
        for_reservoirs(job, [&](int64_t which, int64_t row0, int64_t row1) {
            int64_t n = 0;
            for (int64_t r = row0; r < row1; ++r)
                for (int64_t t = t0; t < t1; ++t, ++n) {
                    to.x[n] = given(job, r, t, s.I);
                    to.z[n] = row(my, job, t, r);
                }
            project(my, which, n, to);
        });
    }

    const T* given(const Job& job, int64_t r, int64_t t, int64_t width) const {
        const int64_t sequence = call.shared_x ? stream(job, r) % call.B : stream(job, r);
        return call.x + (sequence * call.steps + t) * width;
    }

    // Every thread of the team for itself: the few inputs, then its part of W_in.
    void close_loop(const Share& my, const Job& job, int64_t t, Local& to) const {
        const int64_t X = s.I - call.O;
        for_reservoirs(job, [&](int64_t which, int64_t row0, int64_t row1) {
            for (int64_t r = row0; r < row1; ++r) {
                T* u = to.u.get() + r * s.I;
                if (X) std::copy_n(given(job, r, t, X), X, u);
                std::copy_n(to.y.get() + r * call.O, call.O, u + X);
                to.x[r - row0] = u;
                to.z[r - row0] = row(my, job, t, r);
            }
            project(my, which, row1 - row0, to);
        });
    }

    void step(const Share& my, const Job& job, int64_t t, Local& to) const {
        const int64_t n = job.size();
        for (int64_t r = 0; r < n; ++r) {
            to.h[r] = row(my, job, t, r);
            to.h_prev[r] = t ? row(my, job, t - 1, r) : call.h + stream(job, r) * s.H;
            if (call.noise) to.noise[r] = call.noise + (stream(job, r) * call.steps + t) * s.H;
        }
        const LeakyRows<T> leaky{
            s.unit, to.leak.get(), to.scale.get(), to.h_prev.get(), call.noise ? to.noise.get() : nullptr, to.h.get()};
        if (!packed.sparse) {
            const T* w = packed.dense_w.get() + job.matrix * packed.columns.packed(s.H);
            packed.kernel.dense_reservoir_step({{n, s.H, to.h_prev.get(), 1, packed.columns, my.panels.begin,
                                                 my.panels.end, w, nullptr, to.sum_rows.get()},
                                                leaky});
            return;
        }
        const auto& rings = shared[my.team].rings;
        const int64_t connections = job.matrix * packed.runs * s.F;  // before this matrix, of runs
        const float* w = packed.sparse_w.get() + connections * run_length;
        const int32_t* starts = packed.starts.data() + connections;
        if (wide(n)) {
            packed.kernel.wide_reservoir_step({n, s.H, s.F, my.vectors.begin, my.vectors.end, w, starts,
                                               rings[t % 2].get(), rings[(t + 1) % 2].get(), row_stride(n), leaky});
            return;
        }
        for (int64_t r = 0; r < n; ++r) {
            to.ring_prev[r] = rings[t % 2].get() + r * ring_size();
            to.ring[r] = rings[(t + 1) % 2].get() + r * ring_size();
        }
        packed.kernel.sparse_reservoir_step(
            {n, s.H, s.F, my.vectors.begin, my.vectors.end, w, starts, to.ring_prev.get(), to.ring.get(), leaky});
    }

    // y_t, by every thread of the team for itself: that is cheaper than to wait for it.
    void read_out(const Share& my, const Job& job, int64_t t, Local& to) const {
        const Columns outputs = Columns::of_matrix(call.O, packed.kernel.lanes, 1);
        for (int64_t r = 0; r < job.size(); ++r) {
            const int64_t which = reservoir(job, r);
            const T *u = to.u.get() + r * s.I, *h = row(my, job, t, r), *bias = call.b_out + which * call.O;
            const void *w_x = call.w_x + which * call.O * call.E, *w_h = call.w_h + which * call.O * s.H;
            T* y = to.y.get() + r * call.O;
            packed.kernel.direct_product(
                {1, {call.E, s.H}, {&u, &h}, {{&w_x, false}, {&w_h, false}}, outputs, 0, outputs.panels, &bias, &y});
            if (my.first) std::copy_n(y, call.O, call.y + (stream(job, r) * call.steps + t) * call.O);
        }
    }

    const ReservoirShape& s;
    const Packed& packed;
    const ReservoirRun<T>& call;
    const int64_t streams;  // that run on one matrix
    const int64_t parts;
    const int teams, splits;
    std::vector<Barrier> barriers;  // [teams]
    std::vector<Shared> shared;     // [teams]
    std::vector<Local> local;       // [threads]
};

}  // namespace

template <class T>
Reservoirs<T>::Reservoirs(const ReservoirShape& shape, const ReservoirWeights<T>& weights)
    : shape(shape), packed_(std::make_unique<const Packed>(shape, weights)) {}

template <class T>
Reservoirs<T>::~Reservoirs() = default;

template <class T>
void Reservoirs<T>::run(const ReservoirRun<T>& call, int threads) const {
    if (call.B < 1 || call.steps < 1) return;
    for (const int count : {threads, 1})
        if (ReservoirRunner<T, Packed>(shape, *packed_, call, {shape, packed_->columns, call.B, count}).run()) return;
}

template <class T>
int Reservoirs<T>::threads_for(int64_t B, int threads) const {
    const Work work(shape, packed_->columns, B, threads);
    return work.teams * work.splits;
}

template class Reservoirs<float>;
template class Reservoirs<double>;

}  // namespace rnnfast
