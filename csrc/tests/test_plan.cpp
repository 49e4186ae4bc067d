// How threads share a layer on made-up machines, and what is made of a machine that says little or nonsense of itself.
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <thread>

#include "cpu/runtime/machine.h"
#include "cpu/runtime/plan.h"
#include "rnnfast.h"

namespace {

using namespace rnnfast;

int failures = 0;

void expect(bool is, const std::string& what) {
    if (is) return;
    ++failures;
    std::printf("failed: %s\n", what.c_str());
}

constexpr int64_t KiB = 1024, MiB = 1024 * KiB;

// Two units for vectors of 512 bits, a large second level and a slow third one.
const Machine intel{{48 * KiB, 2 * MiB, 105 * MiB, 56}, {2, 10}};
// One such unit, as large as both of 256 bits, and a fast third level: Zen 4, whose numbers were measured.
const Machine amd{{32 * KiB, 1 * MiB, 32 * MiB, 16}, {1, 26}};

// Of the kernels of AVX-512 in float32.
Plan plan_of(const char* cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t L, int threads,
             const Machine& machine, double bytes = 4, Sweep sweep = Sweep::forward) {
    const Shape shape{&find_cell(cell), T, B, I, H, 0, L, 1, true, nullptr};
    return choose_plan(shape, sweep, threads, 16, {6, bytes, 1}, machine);
}

struct Shared {
    int row_groups, splits;
};

struct Choice {
    int64_t T, B, I, H, L;
    Shared of[3][2];  // the LSTM, the Elman network, the GRU; on 2 and on 4 threads
};

// Forward: the quick preset of the benchmarks, then sizes around it. Measured on two threads of the AMD machine: a
// change that is meant for another one must not move these.
const Choice on_amd[] = {
    {20, 32, 64, 64, 2, {{{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}}},
    {50, 32, 1, 64, 1, {{{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}}},
    {100, 1, 32, 32, 1, {{{1, 1}, {1, 1}}, {{1, 1}, {1, 1}}, {{1, 1}, {1, 1}}}},
    {100, 32, 64, 64, 1, {{{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}}},
    {100, 64, 128, 128, 1, {{{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}}},
    {1000, 1, 128, 128, 1, {{{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}}},
    {100, 32, 256, 256, 1, {{{2, 1}, {2, 2}}, {{2, 1}, {4, 1}}, {{2, 1}, {2, 2}}}},
    {100, 1, 1024, 1024, 1, {{{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}}},
    {50, 32, 512, 512, 1, {{{1, 2}, {1, 4}}, {{2, 1}, {2, 2}}, {{1, 2}, {1, 4}}}},
    {20, 32, 1024, 1024, 1, {{{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}}},
    {1, 1, 64, 64, 1, {{{1, 1}, {1, 1}}, {{1, 1}, {1, 1}}, {{1, 1}, {1, 1}}}},
    {1, 1, 256, 256, 2, {{{1, 2}, {1, 4}}, {{1, 1}, {1, 4}}, {{1, 2}, {1, 4}}}},
    {1, 32, 64, 64, 2, {{{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}}},
    {1, 1, 1024, 1024, 1, {{{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}}},

    {100, 40, 60, 60, 1, {{{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}}},
    {100, 48, 120, 120, 1, {{{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}}},
    {100, 32, 128, 128, 1, {{{2, 1}, {2, 2}}, {{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}}},
    {1000, 8, 128, 128, 1, {{{2, 1}, {2, 2}}, {{2, 1}, {4, 1}}, {{2, 1}, {2, 2}}}},
    {100, 24, 240, 240, 1, {{{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}, {{2, 1}, {4, 1}}}},
    {256, 16, 512, 512, 1, {{{1, 2}, {1, 4}}, {{1, 2}, {4, 1}}, {{1, 2}, {1, 4}}}},
    {100, 64, 512, 512, 1, {{{1, 2}, {4, 1}}, {{2, 1}, {4, 1}}, {{1, 2}, {4, 1}}}},
    {50, 40, 600, 600, 1, {{{1, 2}, {2, 2}}, {{1, 2}, {4, 1}}, {{1, 2}, {2, 2}}}},
    {20, 28, 960, 960, 1, {{{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}}},
    {20, 8, 512, 512, 1, {{{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}}},
    {5, 16, 128, 128, 1, {{{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}, {{1, 2}, {1, 4}}}},
    {1, 128, 64, 64, 1, {{{1, 2}, {1, 4}}, {{2, 1}, {4, 1}}, {{1, 2}, {1, 4}}}},
};

void check_amd() {
    const char* const names[] = {"lstm", "tanh", "gru"};
    for (const Choice& c : on_amd)
        for (int cell = 0; cell < 3; ++cell)
            for (int i = 0; i < 2; ++i) {
                const int threads = i ? 4 : 2;
                const Plan plan = plan_of(names[cell], c.T, c.B, c.I, c.H, c.L, threads, amd);
                const Shared& want = c.of[cell][i];
                expect(plan.row_groups == want.row_groups && plan.splits == want.splits,
                       std::string(names[cell]) + " B" + std::to_string(c.B) + " H" + std::to_string(c.H) + " on " +
                           std::to_string(threads) + " threads of AMD");
            }
    expect(plan_of("lstm", 150, 20, 9, 512, 1, 2, amd).splits == 1, "T150 B20 H512 on AMD");
}

// Where splitting the units was measured to win.
void check_intel() {
    expect(plan_of("lstm", 150, 20, 9, 512, 1, 2, intel).splits == 2, "T150 B20 H512 on Intel");
    expect(plan_of("lstm", 20, 32, 1024, 1024, 1, 2, intel).splits == 2, "T20 B32 H1024 on Intel");
    expect(plan_of("lstm", 50, 32, 512, 512, 1, 2, intel).splits == 2, "T50 B32 H512 on Intel");
    // All weights stay near: nothing arrives late.
    expect(plan_of("lstm", 100, 20, 200, 200, 1, 2, intel).splits == 1, "T100 B20 H200 on Intel");
}

// What threads write for each other: all weights once a call, or each step's states, of dz four times as much.
void check_between_cores() {
    const auto splits = [](int64_t T, int64_t B, Sweep sweep) {
        return plan_of("lstm", T, B, 512, 512, 1, 2, amd, 4, sweep).splits;
    };
    expect(splits(20, 32, Sweep::forward) == 2 && splits(2000, 32, Sweep::forward) == 1, "packed once for many steps");
    expect(splits(50, 8, Sweep::forward) == 2 && splits(50, 256, Sweep::forward) == 1, "states of many sequences");
    expect(splits(50, 32, Sweep::forward) == 2 && splits(50, 32, Sweep::backward) == 1, "dz of all gates");
    expect(plan_of("tanh", 1, 32, 64, 64, 2, 2, amd, 4, Sweep::backward).threads() == 2, "products after the sweep");
}

// Each of the numbers decides, each way.
void check_model() {
    const auto splits = [](const Machine& machine, double bytes = 4) {
        return plan_of("lstm", 150, 20, 9, 512, 1, 2, machine, bytes).splits;
    };
    Machine machine = intel;
    machine.rates.far_bytes = 40;
    expect(splits(machine) == 1, "weights that come fast enough for two units");
    machine = intel, machine.rates.multiply_adds = .5;
    expect(splits(machine) == 1, "multiply-adds slower than slow weights");
    machine = amd, machine.rates.far_bytes = 5;
    expect(splits(machine) == 2, "weights that come too slowly for one unit");
    machine = intel, machine.caches.l2 = 16 * MiB;
    expect(splits(machine) == 1, "a second level that holds all weights");
    expect(splits(intel, 1) == 1, "weights of so few bytes that they stay near");
    machine = intel, machine.rates.far_bytes = 15;
    expect(splits(machine) == 2 && splits(machine, 2) == 1, "half the bytes arrive in half the time");
    for (const Machine& any : {intel, amd}) {
        expect(plan_of("lstm", 150, 20, 9, 512, 1, 1, any).threads() == 1, "one thread");
        expect(plan_of("lstm", 150, 0, 9, 512, 1, 2, any).threads() == 1, "an empty batch");
    }
}

bool same(const Caches& a, const Caches& b) {
    return a.l1d == b.l1d && a.l2 == b.l2 && a.l3 == b.l3 && a.l3_threads == b.l3_threads;
}

void check_agreed() {
    const Caches usual{32 * KiB, 1 * MiB, 0, 0}, full{48 * KiB, 2 * MiB, 105 * MiB, 56};
    expect(same(Caches::agreed({}), usual), "nobody answers");
    expect(same(Caches::agreed({{}, {-1, -1, -1, -1}}), usual), "sysconf says 0 or -1");
    expect(same(Caches::agreed({{}, full}), full), "the next one answers");
    expect(same(Caches::agreed({{48 * KiB, 0, 105 * MiB, 0}, {1, 2 * MiB, 7 * MiB, 56}}), full),
           "each number has its first answer");
    expect(same(Caches::agreed({{1, int64_t(1) << 40, 1 * KiB, 1 << 20}, full}), full), "nonsense is no answer");
    expect(same(Caches::agreed({{0, 2 * MiB, 1 * MiB, 4}}), {32 * KiB, 2 * MiB, 0, 0}), "L3 below L2");
    expect(same(Caches::agreed({{0, 0, 8 * MiB, 0}}), {32 * KiB, 1 * MiB, 8 * MiB, 1}), "L3 of nobody knows how many");
}

// One entry of the leaf, as CPUs write it.
CpuidLeaf entry(int type, int level, int threads, int ways, int line, int sets) {
    return {uint32_t(type | level << 5 | (threads - 1) << 14), uint32_t((line - 1) | uint32_t(ways - 1) << 22),
            uint32_t(sets - 1), 0};
}

void check_leaves() {
    const CpuidLeaf sapphire_rapids[] = {entry(1, 1, 2, 12, 64, 64), entry(2, 1, 2, 8, 64, 64),
                                         entry(3, 2, 2, 16, 64, 2048), entry(3, 3, 128, 15, 64, 114688)};
    const auto of_intel = [&](uint32_t i) { return i < 4 ? sapphire_rapids[i] : CpuidLeaf{}; };
    expect(same(caches_of_leaves(of_intel), {48 * KiB, 2 * MiB, 105 * MiB, 128}), "leaves of Intel");
    expect(same(caches_of_leaves([](uint32_t) { return CpuidLeaf{}; }), {}), "leaves of a CPU that has none");
    const CpuidLeaf ones{~0u, ~0u, ~0u, ~0u};
    expect(same(Caches::agreed({caches_of_leaves([&](uint32_t) { return ones; })}), Caches::agreed({})),
           "leaves of ones");
}

namespace fs = std::filesystem;

void write_cache(const fs::path& directory, const char* level, const char* type, const char* size, const char* shared) {
    fs::create_directories(directory);
    std::ofstream(directory / "level") << level << '\n';
    std::ofstream(directory / "type") << type << '\n';
    std::ofstream(directory / "size") << size << '\n';
    std::ofstream(directory / "shared_cpu_list") << shared << '\n';
}

void check_sysfs() {
    const fs::path root = fs::temp_directory_path() / ("rnnfast_test_plan_" + std::to_string(getpid()));
    expect(same(caches_of_sysfs(root.string()), {}), "no such directory");
    write_cache(root / "index0", "1", "Data", "48K", "0,56");
    write_cache(root / "index1", "1", "Instruction", "32K", "0,56");
    write_cache(root / "index2", "2", "Unified", "2M", "0,56");
    write_cache(root / "index3", "3", "Unified", "107520K", "0-27,56-83");
    expect(same(caches_of_sysfs(root.string()), {48 * KiB, 2 * MiB, 105 * MiB, 56}), "sysfs");
    write_cache(root / "index2", "2", "Unified", "", "");
    write_cache(root / "index3", "3", "Unified", "many", "a-b");
    expect(same(caches_of_sysfs(root.string()), {48 * KiB, 0, 0, 0}), "files that say nothing");
    fs::remove_all(root);
}

// Small calls ask, the first large one measures; all threads see the same.
void check_this_machine() {
    const Caches& caches = asked_machine().caches;
    expect(same(Caches::agreed({caches}), caches), "what is asked can be true");
    const auto plan = [](int64_t T, int64_t B, int64_t H, int threads) {
        choose_plan({&find_cell("lstm"), T, B, H, H, 0, 1, 1, true, nullptr}, Sweep::forward, threads, 16, {6, 4, 1});
    };
    plan(100, 32, 64, 2), plan(1, 2, 1024, 2), plan(100, 1, 1024, 2), plan(100, 32, 1024, 1);
    expect(!machine_if_measured(), "what needs no measurement takes none");
    const Machine* seen[4] = {};
    std::vector<std::thread> threads;
    for (const Machine*& mine : seen)
        threads.emplace_back([&] { mine = (plan(20, 32, 1024, 2), machine_if_measured()); });
    for (std::thread& thread : threads) thread.join();
    for (const Machine* one : seen) expect(one && one == seen[0], "all threads see the same machine");
    if (!seen[0]) return;
    const Rates& rates = seen[0]->rates;
    expect(same(seen[0]->caches, caches), "the caches stay as asked");
    expect(rates.multiply_adds >= .25 && rates.multiply_adds <= 4, "vectors a cycle");
    expect(rates.far_bytes >= 2 && rates.far_bytes <= 64, "bytes a cycle");
    std::printf("%s: L1d %lld, L2 %lld, L3 %lld bytes for %d threads; %.2f vectors and %.1f bytes a cycle\n",
                cpu_name().c_str(), (long long)caches.l1d, (long long)caches.l2, (long long)caches.l3,
                caches.l3_threads, rates.multiply_adds, rates.far_bytes);
}

}  // namespace

int main() {
    check_amd();
    check_intel();
    check_between_cores();
    check_model();
    check_agreed();
    check_leaves();
    check_sysfs();
    check_this_machine();
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
