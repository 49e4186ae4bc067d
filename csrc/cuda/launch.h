// How kernels are launched, and what is said when that fails.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"
#include "plan.h"

namespace rnnfast::cuda {

struct Launch {
    const char* kernel;
    unsigned x, y, z;  // blocks
    int threads;
    int shared;        // bytes
    int together;      // blocks of a cluster, or all of them if cooperative
    bool cooperative;  // do all blocks have to run at a time?
    void* stream;
};

#ifdef __CUDACC__

inline std::string card_name() {
    int device = -1;
    cudaDeviceProp card;
    if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&card, device) != cudaSuccess) {
        cudaGetLastError();
        return "an unknown card";
    }
    return std::string(card.name) + " (sm_" + std::to_string(card.major * 10 + card.minor) + ")";
}

// What went wrong where nothing may be thrown; the next check says it.
inline cudaError_t& left_over() {
    static thread_local cudaError_t error = cudaSuccess;
    return error;
}

// Throws for an error, which is taken off the runtime first: it must not come up again in somebody else's call.
inline void check(cudaError_t status, const std::string& what) {
    const cudaError_t before = left_over();
    left_over() = cudaSuccess;
    if (status == cudaSuccess && before == cudaSuccess) return;
    cudaGetLastError();
    if (before != cudaSuccess)
        throw std::runtime_error(std::string("rnnfast: back to the device that was in use: ") +
                                 cudaGetErrorString(before));
    throw std::runtime_error("rnnfast: " + what + " on " + card_name() + ": " + cudaGetErrorString(status));
}

inline std::string described(const Launch& l) {
    return std::string("kernel ") + l.kernel + " (" + std::to_string(l.x) + "," + std::to_string(l.y) + "," +
           std::to_string(l.z) + ") blocks of " + std::to_string(l.threads) + " threads and " +
           std::to_string(l.shared) + " bytes of shared memory, " + std::to_string(l.together) + " together,";
}

inline void configure(const Launch& l, cudaLaunchConfig_t& config, cudaLaunchAttribute& attribute) {
    config.gridDim = dim3(l.x, l.y, l.z);
    config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.shared;
    config.stream = static_cast<cudaStream_t>(l.stream);
    if (l.cooperative) {
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
    } else {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(l.together), 1, 1};
    }
    config.attrs = &attribute;
    config.numAttrs = l.cooperative || l.together > 1 ? 1 : 0;
}

template <class Args>
void launch(void (*kernel)(Args), const Launch& l, const Args& args) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    configure(l, config, attribute);
    const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args);
    if (status != cudaSuccess || left_over() != cudaSuccess) check(status, described(l));
}

// Once for a kernel, when a plan is made: all the shared memory that a block may have, clusters of any size. Also loads
// it, so that the first launch may be captured in a graph.
template <class Args>
void prepare(void (*kernel)(Args), const char* name, const Card& card) {
    const std::string what = std::string("kernel ") + name + ", its attributes,";
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, card.shared_memory), what);
    if (card.sm >= 90) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what);
}

// How many clusters of such a launch run at a time; 0 also where the card refuses such a launch.
template <class Args>
int clusters_at_a_time(void (*kernel)(Args), const Launch& l) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    configure(l, config, attribute);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) return clusters;
    cudaGetLastError();
    return 0;
}

// Makes a device the current one; returns the one before.
inline int change_device(int device) {
    int before = 0;
    check(cudaGetDevice(&before), "cudaGetDevice");
    if (device != before) check(cudaSetDevice(device), "cudaSetDevice");
    return before;
}
inline void restore_device(int before) noexcept {
    int now = before;
    cudaError_t status = cudaGetDevice(&now);
    if (status == cudaSuccess && now != before) status = cudaSetDevice(before);
    if (status == cudaSuccess) return;
    cudaGetLastError();
    left_over() = status;
}

inline Card describe_card(int device) {
    const auto attribute = [&](cudaDeviceAttr which) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
        return value;
    };
    return {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
            attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// Has this build code for the card?
template <class Args>
bool has_code(void (*kernel)(Args)) {
    cudaFuncAttributes attributes;
    const bool found = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    cudaGetLastError();
    return found;
}

#else

template <class Args>
void launch(void (*kernel)(Args), const Launch& l, const Args& args) {
    emulate(kernel, {l.x, l.y, l.z}, l.threads, l.shared, l.together, args);
}
template <class Args>
void prepare(void (*)(Args), const char*, const Card&) {}
template <class Args>
int clusters_at_a_time(void (*)(Args), const Launch& l) {
    return emulated_multiprocessors / l.together;
}
inline int change_device(int device) { return device; }
inline void restore_device(int) noexcept {}
inline Card describe_card(int) { return {90, emulated_multiprocessors, 227 * 1024}; }  // a small Hopper
template <class Args>
bool has_code(void (*)(Args)) {
    return true;
}

#endif

}  // namespace rnnfast::cuda
