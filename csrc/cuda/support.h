// Launchers of the support kernels (support.cu), free of torch headers: what binding.cpp calls.
//
//   add_support      w[position(e)] += values[e]               w [out, in]
//   gather_support   dvalues[e] = panel[position(e) - start*in] panel [rows, in], rows `start` and
//   on of dW
//
// for every element e of S that lies in the matrix (the panel). Positions are unique: no atomics.

#pragma once

#include <cstdint>

#include "support_body.h"

namespace sltrain_cuda {

enum class DType : int { kFloat32, kBFloat16, kFloat64 };
enum class OffsetType : int { kUInt8, kInt32, kInt64 };

}  // namespace sltrain_cuda

extern "C" {

// Both return a cudaError_t (0: launched) and do not wait. `stream` is a cudaStream_t. The caller
// has made the tensors' device current; all tensors are contiguous and on it. `layout.rows` is the
// number of rows of w, or of the panel. Nothing to do launches nothing.
int slt_cuda_add_support(const sltrain_cuda::Layout* layout, sltrain_cuda::DType dtype,
                         sltrain_cuda::OffsetType offset_type, void* w, const void* values,
                         const void* offsets, void* stream);
int slt_cuda_gather_support(const sltrain_cuda::Layout* layout, sltrain_cuda::DType dtype,
                            sltrain_cuda::OffsetType offset_type, const void* panel, void* dvalues,
                            const void* offsets, void* stream);
}
