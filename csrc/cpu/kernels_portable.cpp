// The kernels for any instruction set the compiler assumes by default.
#include <cstdint>
#include <type_traits>

#include "kernels.h"

#define VECTOR_BYTES 16
#include "kernels.inl"

const sltrain::KernelTable sltrain::portable_kernels = {"portable", table<float>(), table<double>(),
                                                        table<BFloat16>()};
