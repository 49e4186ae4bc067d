// A sweep by the kernel that a plan names.
#pragma once

#include "plan.h"
#include "sweep.h"

namespace rnnfast::cuda {

// One file for each number makes these of the templates.
template <Number number, class Call>
void run(const Plan& plan, const Sweep& sweep, const Call& call, void* stream);  // Forward or Backward
// The plan for a sweep on the current device, whose kernel is ready to be launched.
template <Number number>
Plan make_plan(const Card& card, const Sweep& sweep, bool backward, const std::string& forced);

// Copies int64 numbers of the host to the device, within launches, so that no pinned memory is needed and the numbers
// are part of a captured graph.
void upload(const int64_t* host, int64_t count, int64_t* there, void* stream);

Card card_of(int device);
// Has this build code for the current device? Not if it is older than all that was built for.
bool runs_here();

// Makes a device the current one for as long as it lives.
class OnDevice {
public:
    explicit OnDevice(int device);
    ~OnDevice() noexcept;
    OnDevice(const OnDevice&) = delete;

private:
    int before_;
};

}  // namespace rnnfast::cuda
