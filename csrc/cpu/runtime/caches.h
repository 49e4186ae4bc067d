// How large the machine's caches are. Several places know it, and each of them says nothing, or nonsense, somewhere: in
// containers, on virtual machines, without glibc.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace rnnfast {

// Of one core, the first of the machine; 0: not known.
struct Caches {
    int64_t l1d = 0, l2 = 0, l3 = 0;  // bytes
    int l3_threads = 0;               // hardware threads that share an L3

    // Of each number the first answer that can be true; where there is none, that of a usual server core.
    static Caches agreed(const std::vector<Caches>& answers);
};

// What the C library says.
Caches caches_of_sysconf();
// What Linux says in a directory like /sys/devices/system/cpu/cpu0/cache.
Caches caches_of_sysfs(const std::string& directory);
// What an x86 CPU says: leaf(i) is entry i, in eax, ebx, ecx, edx, of leaf 4 (Intel) or 0x8000001D (AMD).
using CpuidLeaf = std::array<uint32_t, 4>;
Caches caches_of_leaves(const std::function<CpuidLeaf(uint32_t i)>& leaf);
Caches caches_of_cpuid();

// "" where the CPU does not tell.
std::string cpu_name();

}  // namespace rnnfast
