// Which instruction set runs.
#include <atomic>
#include <stdexcept>

#include "../../rnnfast.h"
#include "../isa/tables.h"

namespace rnnfast {
namespace {

struct Isa {
    const char* name;
    bool (*usable)();
    const Kernels<float>* (*f32)();
    const Kernels<double>* (*f64)();
};

// Slowest first.
const Isa isas[] = {
    {"baseline", [] { return true; }, baseline_kernels<float>, baseline_kernels<double>},
#ifdef RNNFAST_X86
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2_kernels<float>,
     avx2_kernels<double>},
    {"avx512",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     },
     avx512_kernels<float>, avx512_kernels<double>},
#endif
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

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas)
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
    for (const Isa& isa : isas) {
        if (name == isa.name) {
            if (!isa.usable()) throw std::invalid_argument("this CPU does not have the instruction set " + name);
            selected() = &isa;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw std::invalid_argument("unknown instruction set '" + name + "', this build has: " + known);
}

template <>
const Kernels<float>& kernels<float>() {
    return *selected().load(std::memory_order_relaxed)->f32();
}
template <>
const Kernels<double>& kernels<double>() {
    return *selected().load(std::memory_order_relaxed)->f64();
}

template <class T>
const Kernels<T>& kernels_for(int64_t H, Precision) {
#ifdef RNNFAST_X86
    if (&kernels<T>() == avx512_kernels<T>() && 2 * H <= kernels<T>().lanes) return *avx2_kernels<T>();
#endif
    return kernels<T>();
}

template const Kernels<float>& kernels_for<float>(int64_t, Precision);
template const Kernels<double>& kernels_for<double>(int64_t, Precision);

}  // namespace rnnfast
