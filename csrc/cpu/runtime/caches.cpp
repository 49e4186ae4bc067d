#include "caches.h"

#include <unistd.h>
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define RNNFAST_CPUID
#endif

#include <algorithm>
#include <fstream>
#include <sstream>

namespace rnnfast {
namespace {

constexpr int64_t KiB = 1024, MiB = 1024 * KiB;

template <class Number>
Number first_within(const std::vector<Caches>& answers, Number Caches::* number, Number least, Number most,
                    Number otherwise) {
    for (const Caches& answer : answers)
        if (answer.*number >= least && answer.*number <= most) return answer.*number;
    return otherwise;
}

void set_level(Caches& caches, int level, bool instructions, int64_t bytes, int threads) {
    if (instructions) return;
    if (level == 1) caches.l1d = bytes;
    if (level == 2) caches.l2 = bytes;
    if (level == 3) caches.l3 = bytes, caches.l3_threads = threads;
}

std::string line_of(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

// "48K", "2M" or a number of bytes; 0: anything else.
int64_t bytes_of(const std::string& text) {
    std::istringstream stream(text);
    int64_t number = 0;
    char unit = 0;
    if (!(stream >> number) || number < 0 || number > INT64_MAX / MiB) return 0;
    stream >> unit;
    return number * (unit == 'K' ? KiB : unit == 'M' ? MiB : 1);
}

// How many there are in "0-3,8-11".
int count_of_list(const std::string& text) {
    std::istringstream ranges(text);
    int64_t count = 0;
    for (std::string range; std::getline(ranges, range, ',');) {
        std::istringstream stream(range);
        int64_t first = 0, last = 0;
        char dash = 0;
        if (!(stream >> first)) return 0;
        if (!(stream >> dash >> last)) last = first;
        count += last - first + 1;
    }
    return int(std::clamp<int64_t>(count, 0, INT32_MAX));
}

}  // namespace

Caches Caches::agreed(const std::vector<Caches>& answers) {
    Caches all;
    all.l1d = first_within(answers, &Caches::l1d, 8 * KiB, 512 * KiB, 32 * KiB);
    // larger: shared by several cores, or made up
    all.l2 = first_within(answers, &Caches::l2, 128 * KiB, 4 * MiB, 1 * MiB);
    all.l3 = first_within(answers, &Caches::l3, all.l2, 4096 * MiB, int64_t(0));
    all.l3_threads = all.l3 ? first_within(answers, &Caches::l3_threads, 1, 4096, 1) : 0;
    return all;
}

Caches caches_of_sysconf() {
#ifdef _SC_LEVEL2_CACHE_SIZE
    return {sysconf(_SC_LEVEL1_DCACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE), 0};
#else
    return {};
#endif
}

Caches caches_of_sysfs(const std::string& directory) {
    Caches caches;
    for (int i = 0; i < 8; ++i) {
        const std::string of_cache = directory + "/index" + std::to_string(i) + "/";
        const int64_t level = bytes_of(line_of(of_cache + "level"));
        if (!level) break;
        set_level(caches, int(level), line_of(of_cache + "type") == "Instruction", bytes_of(line_of(of_cache + "size")),
                  count_of_list(line_of(of_cache + "shared_cpu_list")));
    }
    return caches;
}

Caches caches_of_leaves(const std::function<CpuidLeaf(uint32_t)>& leaf) {
    const auto bits = [](uint32_t number, int low, int high) {
        return int64_t(number >> low & ((uint64_t(1) << (high - low + 1)) - 1));
    };
    Caches caches;
    for (uint32_t i = 0; i < 8; ++i) {
        const auto [eax, ebx, ecx, edx] = leaf(i);
        (void)edx;
        const int64_t type = bits(eax, 0, 4);
        if (!type) break;
        const int64_t line = bits(ebx, 0, 11) + 1, partitions = bits(ebx, 12, 21) + 1, ways = bits(ebx, 22, 31) + 1;
        const int64_t sets = bits(ecx, 0, 23) + 1;  // more cannot be true, and would overflow
        set_level(caches, int(bits(eax, 5, 7)), type == 2, line * partitions * ways * sets, int(bits(eax, 14, 25) + 1));
    }
    return caches;
}

Caches caches_of_cpuid() {
#ifdef RNNFAST_CPUID
    for (const uint32_t which : {0x4u, 0x8000001Du}) {
        const Caches caches = caches_of_leaves([&](uint32_t i) {
            CpuidLeaf to{};
            __get_cpuid_count(which, i, &to[0], &to[1], &to[2], &to[3]);
            return to;
        });
        if (caches.l2) return caches;
    }
#endif
    return {};
}

std::string cpu_name() {
    std::string name;
#ifdef RNNFAST_CPUID
    for (uint32_t leaf = 0x80000002; leaf <= 0x80000004; ++leaf) {
        uint32_t text[5] = {};
        if (!__get_cpuid(leaf, &text[0], &text[1], &text[2], &text[3])) return "";
        name += reinterpret_cast<const char*>(text);
    }
    name.erase(0, name.find_first_not_of(' '));
    name.erase(name.find_last_not_of(' ') + 1);
#endif
    return name;
}

}  // namespace rnnfast
