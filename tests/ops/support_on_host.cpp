// Runs the body of the CUDA support kernels thread by thread on the CPU (test_cuda_sources.py).

#include "support_body.h"

namespace {

using namespace sltrain_cuda;

// As launch_width of support.cu, with the grid as a loop.
template <typename Operation, int kWidth, typename T, typename Offset>
int run_width(const Layout& layout, T* matrix, T* values, const Offset* offsets) {
    const int64_t groups = group_count(layout, kWidth);
    for (int64_t group = 0; group < groups; ++group) {
        for (int thread = 0; thread < kThreads; ++thread) {
            thread_body<Operation, kWidth>(layout, matrix, values, offsets, group, thread);
        }
    }
    return kWidth;
}

template <typename Operation, typename T, typename Offset>
int run_offset(const Layout& layout, void* matrix, void* values, const void* offsets) {
    constexpr int kWidth = 16 / sizeof(T);
    T* m = static_cast<T*>(matrix);
    T* v = static_cast<T*>(values);
    const Offset* o = static_cast<const Offset*>(offsets);
    if (vectors_fit(layout, kWidth, sizeof(T), sizeof(Offset), m, v, o)) {
        return run_width<Operation, kWidth>(layout, m, v, o);
    }
    return run_width<Operation, 1>(layout, m, v, o);
}

template <typename Operation, typename T>
int run_dtype(const Layout& layout, int offset_bytes, void* matrix, void* values,
              const void* offsets) {
    switch (offset_bytes) {
        case 1:
            return run_offset<Operation, T, uint8_t>(layout, matrix, values, offsets);
        case 4:
            return run_offset<Operation, T, int32_t>(layout, matrix, values, offsets);
        default:
            return run_offset<Operation, T, int64_t>(layout, matrix, values, offsets);
    }
}

template <typename Operation>
int run(const Layout& layout, int bytes, int offset_bytes, void* matrix, void* values,
        const void* offsets) {
    switch (bytes) {
        case 2:
            return run_dtype<Operation, BFloat16>(layout, offset_bytes, matrix, values, offsets);
        case 4:
            return run_dtype<Operation, float>(layout, offset_bytes, matrix, values, offsets);
        default:
            return run_dtype<Operation, double>(layout, offset_bytes, matrix, values, offsets);
    }
}

}  // namespace

// Elements per slot that the launcher would have taken. `sizes`: whole, tile_out, tile_in, block,
// tile_columns, per_tile, in_features, start, rows, total.
extern "C" int support_on_host(int gather, int bytes, int offset_bytes, const int64_t* sizes,
                               void* matrix, void* values, const void* offsets) {
    const Layout layout = make_layout(sizes[0] != 0, sizes[1], sizes[2], sizes[3], sizes[4],
                                      sizes[5], sizes[6], sizes[7], sizes[8], sizes[9]);
    return gather ? run<GatherSupport>(layout, bytes, offset_bytes, matrix, values, offsets)
                  : run<AddSupport>(layout, bytes, offset_bytes, matrix, values, offsets);
}

// Place of one block's element in a matrix that need not exist (larger than 2^31 elements).
extern "C" int64_t place_on_host(const int64_t* sizes, int64_t block_index, int64_t inner,
                                 int64_t offset) {
    const Layout layout = make_layout(sizes[0] != 0, sizes[1], sizes[2], sizes[3], sizes[4],
                                      sizes[5], sizes[6], sizes[7], sizes[8], sizes[9]);
    return place(layout, block_index, inner, offset);
}

extern "C" uint16_t bfloat16_sum(uint16_t a, uint16_t b) {
    return add(BFloat16{a}, BFloat16{b}).bits;
}
