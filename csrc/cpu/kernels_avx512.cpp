// The kernels for AVX-512.
#include <cstdint>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
#define VECTOR_BYTES 64
#include "kernels.inl"

const sltrain::KernelTable sltrain::avx512_kernels = {"avx512", table<float>(), table<double>(),
                                                      table<BFloat16>()};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
