// Tensors as the kernels see them: pointers by dtype, checks that name the offending value,
// threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdlib>

#include "kernels.h"
#include "support.h"

namespace sltrain {

// Threads that a parallel_for here can use: one inside of another.
inline int64_t threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Calls visit(T{}) with the kernels' type for a tensor's dtype.
template <typename Visit>
auto with_type(const at::Tensor& tensor, Visit visit) {
    switch (tensor.scalar_type()) {
        case at::kFloat:
            return visit(float{});
        case at::kDouble:
            return visit(double{});
        case at::kBFloat16:
            return visit(BFloat16{});
        default:
            TORCH_CHECK_TYPE(false, "dtype ", tensor.scalar_type(),
                             ": float32, float64 or bfloat16 is expected");
    }
}

template <typename Visit>
auto with_offsets(const at::Tensor& offsets, Visit visit) {
    switch (offsets.scalar_type()) {
        case at::kByte:
            return visit(offsets.const_data_ptr<uint8_t>());
        case at::kInt:
            return visit(offsets.const_data_ptr<int32_t>());
        case at::kLong:
            return visit(offsets.const_data_ptr<int64_t>());
        default:
            TORCH_CHECK_TYPE(false, "offsets are ", offsets.scalar_type(),
                             "; uint8, int32 or int64 is expected");
    }
}

template <typename T>
const T* data(const at::Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const at::Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

Tiling tiling_of(const at::Tensor& values, const at::Tensor& offsets, int64_t tile_out,
                 int64_t tile_in, int64_t block);

// Raises unless `matrix` is [n, columns] in the dtype of `values`.
void check_matrix(const at::Tensor& matrix, const char* name, int64_t columns,
                  const at::Tensor& values);

// Uninitialised memory aligned to cache lines.
template <typename A>
struct Block {
    explicit Block(int64_t count)
        : data(static_cast<A*>(std::aligned_alloc(64, (count * sizeof(A) + 63) / 64 * 64))) {
        TORCH_CHECK(data || count == 0, "out of memory");
    }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block() { std::free(data); }
    A* data;
};

}  // namespace sltrain
