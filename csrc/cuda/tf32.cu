#include "run_templates.h"

namespace rnnfast::cuda {
RNNFAST_RUN(tf32);
}
