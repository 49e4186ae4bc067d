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

// Throws for an error, which is taken off the runtime first: it must not come up again in somebody else's call.
inline void check(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error("rnnfast: " + what + " on " + card_name() + ": " + cudaGetErrorString(status));
}

template <class Args>
void launch(void (*kernel)(Args), const Launch& l, const Args& args) {
    const std::string what = std::string("kernel ") + l.kernel + " (" + std::to_string(l.x) + "," +
                             std::to_string(l.y) + "," + std::to_string(l.z) + ") blocks of " +
                             std::to_string(l.threads) + " threads and " + std::to_string(l.shared) +
                             " bytes of shared memory, " + std::to_string(l.together) + " together,";
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(l.x, l.y, l.z);
    config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.shared;
    config.stream = static_cast<cudaStream_t>(l.stream);
    cudaLaunchAttribute attribute = {};
    if (l.cooperative) {
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
    } else {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(l.together), 1, 1};
    }
    config.attrs = &attribute;
    config.numAttrs = l.cooperative || l.together > 1 ? 1 : 0;
    if (l.shared > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared), what);
    if (!l.cooperative && l.together > 8)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what);
    check(cudaLaunchKernelEx(&config, kernel, args), what);
}

// Makes a device the current one; returns the one before.
inline int change_device(int device) {
    int before = 0;
    check(cudaGetDevice(&before), "cudaGetDevice");
    if (device != before) check(cudaSetDevice(device), "cudaSetDevice");
    return before;
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

#else

template <class Args>
void launch(void (*kernel)(Args), const Launch& l, const Args& args) {
    emulate(kernel, {l.x, l.y, l.z}, l.threads, l.shared, l.together, args);
}
inline int change_device(int device) { return device; }
inline Card describe_card(int) { return {90, 4, 227 * 1024}; }  // a small Hopper

#endif

}  // namespace rnnfast::cuda
