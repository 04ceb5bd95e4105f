// Registers the CUDA kernels as implementations of the operators that sltrain_dist/ops declares.

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <type_traits>

#include "../cpu/operators.h"
#include "support.h"

namespace {

using at::Tensor;

sltrain_cuda::DType dtype_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case at::kFloat:
            return sltrain_cuda::DType::kFloat32;
        case at::kBFloat16:
            return sltrain_cuda::DType::kBFloat16;
        case at::kDouble:
            return sltrain_cuda::DType::kFloat64;
        default:
            TORCH_CHECK_TYPE(false, name, " is ", tensor.scalar_type(),
                             "; float32, bfloat16 or float64 is expected");
    }
}

sltrain_cuda::OffsetType offset_type_of(const Tensor& offsets) {
    switch (offsets.scalar_type()) {
        case at::kByte:
            return sltrain_cuda::OffsetType::kUInt8;
        case at::kInt:
            return sltrain_cuda::OffsetType::kInt32;
        case at::kLong:
            return sltrain_cuda::OffsetType::kInt64;
        default:
            TORCH_CHECK_TYPE(false, "offsets are ", offsets.scalar_type(),
                             "; uint8, int32 or int64 is expected");
    }
}

// `matrix` holds rows [start, start + its rows) of the matrix S belongs to.
sltrain_cuda::Layout check(const char* name, const Tensor& matrix, int64_t start,
                           const Tensor& values, const Tensor& offsets, int64_t tile_out,
                           int64_t tile_in, int64_t block) {
    TORCH_CHECK(matrix.dim() == 2, name, " has shape ", matrix.sizes(), "; a matrix is expected");
    for (const Tensor* tensor : {&matrix, &values, &offsets}) {
        TORCH_CHECK(tensor->is_contiguous(), name,
                    ", values and offsets must be contiguous; got shape ", tensor->sizes(),
                    " with strides ", tensor->strides());
        TORCH_CHECK(tensor->device() == matrix.device(), name, " is on ", matrix.device(),
                    ", values or offsets on ", tensor->device());
    }
    TORCH_CHECK_TYPE(values.scalar_type() == matrix.scalar_type(), "values are ",
                     values.scalar_type(), ", ", name, " is ", matrix.scalar_type(),
                     ": they must agree");
    TORCH_CHECK(tile_out > 0 && tile_in > 0 && block > 0, "tile ", tile_out, " x ", tile_in,
                " of blocks of ", block, ": all must be positive");
    const bool whole = values.dim() == 1;
    if (whole) {
        TORCH_CHECK(block == 1, "block is ", block, "; a flat support has blocks of 1");
        TORCH_CHECK(offsets.sizes() == values.sizes(), "offsets have shape ", offsets.sizes(),
                    ", values ", values.sizes());
    } else {
        TORCH_CHECK(values.dim() == 4 && offsets.dim() == 3 &&
                        values.sizes().slice(0, 3) == offsets.sizes() &&
                        values.size(3) == block * block,
                    "values have shape ", values.sizes(), ", offsets ", offsets.sizes(),
                    " with blocks of ", block);
        TORCH_CHECK(tile_out == block || tile_in == block, "a tile of ", tile_out, " x ", tile_in,
                    " is neither one block of ", block, " tall nor one wide");
        TORCH_CHECK(tile_out % block == 0 && tile_in % block == 0, "blocks of ", block,
                    " do not divide a tile of ", tile_out, " x ", tile_in);
    }
    const int64_t out = whole ? tile_out : values.size(0) * tile_out;
    const int64_t in = whole ? tile_in : values.size(1) * tile_in;
    TORCH_CHECK(matrix.size(1) == in, name, " has ", matrix.size(1), " columns, the support ", in);
    TORCH_CHECK(start >= 0 && start + matrix.size(0) <= out, name, " holds rows ", start, " to ",
                start + matrix.size(0), ", the support has ", out);
    return sltrain_cuda::make_layout(whole, tile_out, tile_in, block, whole ? 1 : values.size(1),
                                     whole ? values.numel() : values.size(2), in, start,
                                     matrix.size(0), values.numel());
}

void add_support(const at::Tensor& w, const Tensor& values, const Tensor& offsets, int64_t tile_out,
                 int64_t tile_in, int64_t block) {
    const sltrain_cuda::DType dtype = dtype_of(w, "w");
    const sltrain_cuda::OffsetType offset_type = offset_type_of(offsets);
    const sltrain_cuda::Layout layout = check("w", w, 0, values, offsets, tile_out, tile_in, block);
    TORCH_CHECK(values.dim() == 1 ? w.size(0) == tile_out : w.size(0) == values.size(0) * tile_out,
                "w has ", w.size(0), " rows, the support ",
                values.dim() == 1 ? tile_out : values.size(0) * tile_out);
    const c10::cuda::CUDAGuard guard(w.device());
    C10_CUDA_CHECK(static_cast<cudaError_t>(slt_cuda_add_support(
        &layout, dtype, offset_type, w.data_ptr(), values.const_data_ptr(),
        offsets.const_data_ptr(), c10::cuda::getCurrentCUDAStream().stream())));
}

void gather_support(const Tensor& panel, int64_t start, const at::Tensor& dvalues,
                    const Tensor& offsets, int64_t tile_out, int64_t tile_in, int64_t block) {
    const sltrain_cuda::DType dtype = dtype_of(panel, "panel");
    const sltrain_cuda::OffsetType offset_type = offset_type_of(offsets);
    const sltrain_cuda::Layout layout =
        check("panel", panel, start, dvalues, offsets, tile_out, tile_in, block);
    const c10::cuda::CUDAGuard guard(panel.device());
    C10_CUDA_CHECK(static_cast<cudaError_t>(slt_cuda_gather_support(
        &layout, dtype, offset_type, panel.const_data_ptr(), dvalues.data_ptr(),
        offsets.const_data_ptr(), c10::cuda::getCurrentCUDAStream().stream())));
}

// torch aborts the process where two devices register one operator with other C++ types.
static_assert(std::is_same_v<decltype(&add_support), decltype(&sltrain::add_support)>);
static_assert(std::is_same_v<decltype(&gather_support), decltype(&sltrain::gather_support)>);

}  // namespace

TORCH_LIBRARY_FRAGMENT(sltrain_dist, m) {
    m.def("cuda_interface() -> int", []() -> int64_t { return 2; });  // ops/kernels.py has the same
}

TORCH_LIBRARY_IMPL(sltrain_dist, CUDA, m) {
    m.impl("add_support", &add_support);
    m.impl("gather_support", &gather_support);
}
