// The kernels for AVX2 and FMA.
#include <cstdint>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define VECTOR_BYTES 32
#include "kernels.inl"

const sltrain::KernelTable sltrain::avx2_kernels = {"avx2", table<float>(), table<double>(),
                                                    table<BFloat16>()};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
