// Which instruction set runs.
#include <atomic>
#include <stdexcept>
#if defined(__linux__) && defined(RNNFAST_X86)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../../rnnfast.h"
#include "../isa/tables.h"

namespace rnnfast {
namespace {

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && has_avx2();
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux hands out the state of AMX's tiles to a process that asks for it, once, and may refuse.
bool has_amx() {
#if defined(__linux__) && defined(RNNFAST_X86)
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = has_avx512_bf16() && __builtin_cpu_supports("amx-tile") &&
                                __builtin_cpu_supports("amx-bf16") &&
                                syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
#else
    return false;
#endif
}

struct Isa {
    const char* name;
    bool (*usable)();
    const Kernels<float>* (*f32)();
    const Kernels<double>* (*f64)();
    const Kernels<float>* (*products)(Precision);  // with fewer bits than `highest`; nullptr: has no such units
};

// Slowest first.
const Isa isas[] = {
    {"baseline", [] { return true; }, baseline_kernels<float>, baseline_kernels<double>, nullptr},
#ifdef RNNFAST_X86
    {"avx2", has_avx2, avx2_kernels<float>, avx2_kernels<double>, nullptr},
    {"avx512", has_avx512, avx512_kernels<float>, avx512_kernels<double>, nullptr},
    {"avx512_bf16", has_avx512_bf16, avx512_kernels<float>, avx512_kernels<double>, avx512_bf16_products},
#endif
};

// Taken by name alone: units of 16 bits in plain C++, which every CPU runs, and what has never run on a CPU that has
// it.
const Isa by_name[] = {
#ifdef RNNFAST_X86
    {"amx", has_amx, avx512_kernels<float>, avx512_kernels<double>, amx_products},
#endif
    {"emulated_avx512_bf16", [] { return true; }, baseline_kernels<float>, baseline_kernels<double>,
     emulated_avx512_bf16_products},
    {"emulated_amx", [] { return true; }, baseline_kernels<float>, baseline_kernels<double>, emulated_amx_products},
};

const Isa* fastest() {
    const Isa* best = isas;
    for (const Isa& isa : isas)
        if (isa.usable()) best = &isa;
    return best;
}

std::atomic<const Isa*>& selected() {
    static std::atomic<const Isa*> isa{fastest()};
    return isa;
}

// Those of float32 numbers with products of so many bits; nullptr: the instruction set in use has none.
const Kernels<float>* kernels_of_products(Precision precision) {
    const auto find = selected().load(std::memory_order_relaxed)->products;
    return find && precision != Precision::highest ? find(precision) : nullptr;
}

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas)
        if (isa.usable()) names.push_back(isa.name);
    return names;
}

std::vector<std::string> isas_by_name() {
    std::vector<std::string> names;
    for (const Isa& isa : by_name)
        if (isa.usable()) names.push_back(isa.name);
    return names;
}

std::string isa() { return selected().load()->name; }

void select_isa(const std::string& name) {
    if (name.empty()) {
        selected() = fastest();
        return;
    }
    std::string known;
    const auto select_among = [&](const auto& isas) {
        for (const Isa& isa : isas) {
            known += (known.empty() ? "" : ", ") + std::string(isa.name);
            if (name != isa.name) continue;
            if (!isa.usable()) throw std::invalid_argument("this CPU does not have the instruction set " + name);
            selected() = &isa;
            return true;
        }
        return false;
    };
    if (!select_among(isas) && !select_among(by_name))
        throw std::invalid_argument("unknown instruction set '" + name + "', this build has: " + known);
}

bool has_products(Precision precision) { return kernels_of_products(precision) != nullptr; }

template <>
const Kernels<float>& kernels<float>() {
    return *selected().load(std::memory_order_relaxed)->f32();
}
template <>
const Kernels<double>& kernels<double>() {
    return *selected().load(std::memory_order_relaxed)->f64();
}

namespace {

// AVX2's in place of those of AVX-512 where half a vector holds all units; nullptr: not so.
template <class T>
const Kernels<T>* narrow_kernels(int64_t H) {
#ifdef RNNFAST_X86
    if (&kernels<T>() == avx512_kernels<T>() && 2 * H <= kernels<T>().lanes) return avx2_kernels<T>();
#endif
    return nullptr;
}

}  // namespace

template <>
const Kernels<double>& kernels_for<double>(int64_t H, Precision) {
    const Kernels<double>* const narrow = narrow_kernels<double>(H);
    return narrow ? *narrow : kernels<double>();
}

template <>
const Kernels<float>& kernels_for<float>(int64_t H, Precision precision) {
    if (const Kernels<float>* const narrow = narrow_kernels<float>(H)) return *narrow;
    const Kernels<float>* const of_products = kernels_of_products(precision);
    return of_products ? *of_products : kernels<float>();
}

}  // namespace rnnfast
