// The operators sparse_forward and sparse_backward, and the choice of the instruction set.
#include "sparse.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cstdlib>
#include <string>

#include "operators.h"

namespace sltrain {
namespace {

const KernelTable& choose() {
    const char* asked = std::getenv("SLT_CPU_ISA");
    const std::string name = asked ? asked : "";
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    if (avx512 && (name.empty() || name == "avx512")) return avx512_kernels;
    if (avx2 && (name.empty() || name == "avx2")) return avx2_kernels;
#endif
    TORCH_CHECK_VALUE(name.empty() || name == "portable", "SLT_CPU_ISA=", name,
                      ": this CPU does not have it; unset it");
    return portable_kernels;
}

// Rows that stand one after the other, elements of a row side by side.
Tensor in_rows(const Tensor& matrix) {
    return matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1) ? matrix
                                                                       : matrix.contiguous();
}

}  // namespace

const KernelTable& kernels() {
    static const KernelTable& chosen = choose();
    return chosen;
}

std::string cpu_capability() { return kernels().name; }

void sparse_forward(const Tensor& x, const Tensor& y, const Tensor& values, const Tensor& offsets,
                    int64_t tile_out, int64_t tile_in, int64_t block) {
    const Tiling tiling = tiling_of(values, offsets, tile_out, tile_in, block);
    check_matrix(x, "x", tiling.in, values);
    check_matrix(y, "y", tiling.out, values);
    TORCH_CHECK_VALUE(y.is_contiguous() && y.size(0) == x.size(0), "y ", y.sizes(),
                      " must be contiguous and have the rows of x ", x.sizes());
    const Tensor from = in_rows(x);
    with_type(x, [&](auto type) {
        using T = decltype(type);
        const auto rows = with_offsets(
            offsets, [&](auto* at) { return rows_of(tiling, data<T>(values), at, false); });
        apply<T>(data<T>(from), from.stride(0), from.size(0), tiling.in, tiling.out, rows.view(),
                 mutable_data<T>(y));
    });
}

Tensor sparse_backward(const Tensor& dy, const Tensor& x, const Optional& dx, const Tensor& values,
                       const Tensor& offsets, int64_t tile_out, int64_t tile_in, int64_t block,
                       bool need_values) {
    constexpr int64_t most_groups = 8;  // copies of dvalues that threads sum into
    const Tiling tiling = tiling_of(values, offsets, tile_out, tile_in, block);
    check_matrix(dy, "dy", tiling.out, values);
    check_matrix(x, "x", tiling.in, values);
    TORCH_CHECK_VALUE(dy.size(0) == x.size(0), "dy ", dy.sizes(), " and x ", x.sizes(),
                      " differ in tokens");
    if (dx) {
        check_matrix(*dx, "dx", tiling.in, values);
        TORCH_CHECK_VALUE(dx->is_contiguous() && dx->size(0) == x.size(0), "dx ", dx->sizes(),
                          " must be contiguous and have the rows of x ", x.sizes());
    }
    const Tensor from_dy = in_rows(dy), from_x = in_rows(x);
    const Tensor dvalues = need_values ? at::empty_like(values) : at::empty({0}, values.options());
    with_type(x, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        const auto build = [&](bool transposed) {
            return with_offsets(offsets, [&](auto* at) {
                return rows_of(tiling, data<T>(values), at, transposed);
            });
        };
        const Rows<A> rows = need_values ? build(false) : Rows<A>{};
        const Rows<A> columns = dx ? build(true) : Rows<A>{};
        const int64_t groups = need_values ? std::min(threads(), most_groups) : threads();
        std::vector<A> sums(need_values ? groups * tiling.entries() : 0);
        const Samples<T> samples{data<T>(from_dy), data<T>(from_x), from_dy.stride(0),
                                 from_x.stride(0), x.size(0),       tiling.in,
                                 tiling.out};
        apply_backward<T>(samples, rows.view(), columns.view(), dx ? mutable_data<T>(*dx) : nullptr,
                          need_values ? sums.data() : nullptr, tiling.entries(), groups);
        if (need_values) add_groups<T>(sums.data(), groups, rows, mutable_data<T>(dvalues));
    });
    return dvalues;
}

}  // namespace sltrain
