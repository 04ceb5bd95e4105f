// CUDA kernels that add S to a dense matrix and read a dense matrix at the support.
//
// Bound by memory: at density 0.05 about half of the 32-byte sectors of W are touched, so scattered
// access to single elements moves less than streaming all of W through shared memory would. The
// work of a thread stands in support_body.h, where it is tested without a GPU.

#include <cuda_runtime.h>

#include "support.h"

namespace sltrain_cuda {
namespace {

template <typename Operation, int kWidth, typename T, typename Offset>
__global__ void __launch_bounds__(kThreads)
    support_kernel(Layout layout, T* matrix, T* values, const Offset* offsets) {
    thread_body<Operation, kWidth>(layout, matrix, values, offsets,
                                   static_cast<int64_t>(blockIdx.x), static_cast<int>(threadIdx.x));
}

template <typename Operation, int kWidth, typename T, typename Offset>
cudaError_t launch_width(const Layout& layout, T* matrix, T* values, const Offset* offsets,
                         cudaStream_t stream) {
    const int64_t groups = group_count(layout, kWidth);
    if (groups == 0) {
        return cudaSuccess;
    }
    if (groups > INT32_MAX) {  // the grid's limit, past 2^39 elements
        return cudaErrorInvalidConfiguration;
    }
    support_kernel<Operation, kWidth>
        <<<static_cast<unsigned>(groups), kThreads, 0, stream>>>(layout, matrix, values, offsets);
    return cudaGetLastError();
}

template <typename Operation, typename T, typename Offset>
cudaError_t launch_offset(const Layout& layout, void* matrix, void* values, const void* offsets,
                          cudaStream_t stream) {
    constexpr int kWidth = 16 / sizeof(T);
    T* m = static_cast<T*>(matrix);
    T* v = static_cast<T*>(values);
    const Offset* o = static_cast<const Offset*>(offsets);
    if (vectors_fit(layout, kWidth, sizeof(T), sizeof(Offset), m, v, o)) {
        return launch_width<Operation, kWidth>(layout, m, v, o, stream);
    }
    return launch_width<Operation, 1>(layout, m, v, o, stream);
}

template <typename Operation, typename T>
cudaError_t launch_dtype(const Layout& layout, OffsetType offset_type, void* matrix, void* values,
                         const void* offsets, cudaStream_t stream) {
    switch (offset_type) {
        case OffsetType::kUInt8:
            return launch_offset<Operation, T, uint8_t>(layout, matrix, values, offsets, stream);
        case OffsetType::kInt32:
            return launch_offset<Operation, T, int32_t>(layout, matrix, values, offsets, stream);
        case OffsetType::kInt64:
            return launch_offset<Operation, T, int64_t>(layout, matrix, values, offsets, stream);
    }
    return cudaErrorInvalidValue;
}

template <typename Operation>
int launch(const Layout& layout, DType dtype, OffsetType offset_type, void* matrix, void* values,
           const void* offsets, void* stream) {
    cudaStream_t s = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case DType::kFloat32:
            return launch_dtype<Operation, float>(layout, offset_type, matrix, values, offsets, s);
        case DType::kBFloat16:
            return launch_dtype<Operation, BFloat16>(layout, offset_type, matrix, values, offsets,
                                                     s);
        case DType::kFloat64:
            return launch_dtype<Operation, double>(layout, offset_type, matrix, values, offsets, s);
    }
    return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace sltrain_cuda

extern "C" int slt_cuda_add_support(const sltrain_cuda::Layout* layout, sltrain_cuda::DType dtype,
                                    sltrain_cuda::OffsetType offset_type, void* w,
                                    const void* values, const void* offsets, void* stream) {
    return sltrain_cuda::launch<sltrain_cuda::AddSupport>(
        *layout, dtype, offset_type, w, const_cast<void*>(values), offsets, stream);
}

extern "C" int slt_cuda_gather_support(const sltrain_cuda::Layout* layout,
                                       sltrain_cuda::DType dtype,
                                       sltrain_cuda::OffsetType offset_type, const void* panel,
                                       void* dvalues, const void* offsets, void* stream) {
    return sltrain_cuda::launch<sltrain_cuda::GatherSupport>(
        *layout, dtype, offset_type, const_cast<void*>(panel), dvalues, offsets, stream);
}
