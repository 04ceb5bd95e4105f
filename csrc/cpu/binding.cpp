// Registers the CPU implementations for the operators that sltrain_dist/ops declares.
#include <torch/library.h>

#include "operators.h"

TORCH_LIBRARY_FRAGMENT(sltrain_dist, m) {
    m.def("cpu_capability() -> str", &sltrain::cpu_capability);
    m.def("cpu_interface() -> int", []() -> int64_t { return 2; });  // ops/kernels.py has the same
}

TORCH_LIBRARY_IMPL(sltrain_dist, CPU, m) {
    m.impl("add_support", &sltrain::add_support);
    m.impl("gather_support", &sltrain::gather_support);
    m.impl("sparse_forward", &sltrain::sparse_forward);
    m.impl("sparse_backward", &sltrain::sparse_backward);
    m.impl("factorized_linear", &sltrain::factorized_linear);
    m.impl("factorized_linear_backward", &sltrain::factorized_linear_backward);
    m.impl("distinct_offsets", &sltrain::distinct_offsets);
    m.impl("sample_positions", &sltrain::sample_positions);
}
