// The machine that plans are made for: what decides between them, asked or measured when a call first needs it, never
// at import. Results do not depend on it, since they do not depend on the plan.
#pragma once

#include "caches.h"

namespace rnnfast {

// Of one core. Unmeasured: of the size found on servers whose vectors of 512 bits take both of their multiply-add units
// together.
struct Rates {
    double multiply_adds = 1;  // vectors a cycle
    double far_bytes = 26;     // a cycle, of what comes from beyond the second-level cache
};

struct Machine {
    Caches caches = Caches::agreed({});
    Rates rates;

    // Bytes of weights that stay near a core from step to step: half of the second level, since inputs, gates and
    // states pass through it as well.
    double near_bytes() const { return double(caches.l2) / 2; }
};

// This machine with unmeasured rates.
const Machine& asked_machine();
// With its own, of the instruction set in use at the first call, which takes about a millisecond. Threads may call at
// once.
const Machine& measured_machine();
// nullptr: nobody has needed it so far.
const Machine* machine_if_measured();

}  // namespace rnnfast
