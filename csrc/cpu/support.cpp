// S written into a dense matrix, and a dense matrix read at the support.
#include <algorithm>

#include "operators.h"
#include "tensors.h"

namespace sltrain {

Tiling tiling_of(const at::Tensor& values, const at::Tensor& offsets, int64_t tile_out,
                 int64_t tile_in, int64_t block) {
    TORCH_CHECK_VALUE(
        tile_out > 0 && tile_in > 0 && block > 0 && tile_out % block == 0 && tile_in % block == 0,
        "tile ", tile_out, " x ", tile_in, " with blocks of ", block,
        ": blocks must fill the tile");
    TORCH_CHECK_VALUE(values.is_contiguous() && offsets.is_contiguous(),
                      "values and offsets must be contiguous");
    Tiling tiling{tile_out, tile_in, tile_out, tile_in, block, offsets.numel()};
    if (values.dim() == 1) {
        TORCH_CHECK_VALUE(block == 1 && offsets.sizes() == values.sizes(), "flat values ",
                          values.sizes(), " need blocks of 1 and offsets of their shape, not ",
                          block, " and ", offsets.sizes());
        return tiling;
    }
    TORCH_CHECK_VALUE(values.dim() == 4 && values.size(3) == block * block &&
                          offsets.sizes() == values.sizes().slice(0, 3),
                      "values ", values.sizes(), " and offsets ", offsets.sizes(),
                      " do not fit blocks of ", block);
    TORCH_CHECK_VALUE(tile_out == block || tile_in == block, "tile ", tile_out, " x ", tile_in,
                      ": one side must be a block of ", block);
    tiling.out = values.size(0) * tile_out;
    tiling.in = values.size(1) * tile_in;
    tiling.per_tile = values.size(2);
    return tiling;
}

void check_matrix(const at::Tensor& matrix, const char* name, int64_t columns,
                  const at::Tensor& values) {
    TORCH_CHECK_VALUE(matrix.dim() == 2 && matrix.size(1) == columns, name, " is ", matrix.sizes(),
                      "; [n, ", columns, "] is expected");
    TORCH_CHECK_TYPE(matrix.scalar_type() == values.scalar_type(), name, " is ",
                     matrix.scalar_type(), ", values are ", values.scalar_type(),
                     ": they must agree");
}

namespace {

// Calls visit(entry, position) for the elements of S with position = row * in + column in the tiles
// first .. last, in parallel over tiles (over entries where the matrix is one tile).
template <typename Offset, typename Visit>
void over_tiles(const Tiling& tiling, const Offset* offsets, int64_t first, int64_t last,
                Visit visit) {
    const auto at_position = [&](int64_t entry, int64_t row, int64_t column) {
        visit(entry, row * tiling.in + column);
    };
    constexpr int64_t grain = 1 << 14;  // elements
    const int64_t tile_size = std::max<int64_t>(1, tiling.per_tile * tiling.area());
    if (tiling.tiles() == 1) {
        at::parallel_for(0, tiling.per_tile, grain, [&](int64_t begin, int64_t end) {
            for_each_in_tile(tiling, 0, begin, end, offsets, at_position);
        });
        return;
    }
    at::parallel_for(
        first, last, (grain + tile_size - 1) / tile_size, [&](int64_t begin, int64_t end) {
            for (int64_t tile = begin; tile < end; ++tile)
                for_each_in_tile(tiling, tile, 0, tiling.per_tile, offsets, at_position);
        });
}

}  // namespace

void add_support(const at::Tensor& w, const at::Tensor& values, const at::Tensor& offsets,
                 int64_t tile_out, int64_t tile_in, int64_t block) {
    const Tiling tiling = tiling_of(values, offsets, tile_out, tile_in, block);
    check_matrix(w, "w", tiling.in, values);
    TORCH_CHECK_VALUE(w.is_contiguous() && w.size(0) == tiling.out, "w ", w.sizes(),
                      " must be contiguous with ", tiling.out, " rows");
    with_type(w, [&](auto type) {
        using T = decltype(type);
        T* to = mutable_data<T>(w);
        const T* from = data<T>(values);
        with_offsets(offsets, [&](auto* at) {
            over_tiles(tiling, at, 0, tiling.tiles(), [=](int64_t entry, int64_t position) {
                to[position] = narrow<T>(widen(to[position]) + widen(from[entry]));
            });
        });
    });
}

void gather_support(const at::Tensor& panel, int64_t start, const at::Tensor& dvalues,
                    const at::Tensor& offsets, int64_t tile_out, int64_t tile_in, int64_t block) {
    const Tiling tiling = tiling_of(dvalues, offsets, tile_out, tile_in, block);
    check_matrix(panel, "panel", tiling.in, dvalues);
    const int64_t rows = panel.size(0), stop = start + rows;
    const bool whole = dvalues.dim() == 1;
    TORCH_CHECK_VALUE(panel.is_contiguous() && start >= 0 && stop <= tiling.out &&
                          (whole || (start % tile_out == 0 && rows % tile_out == 0)),
                      "panel ", panel.sizes(), " at row ", start,
                      " must be contiguous and cut between tiles of ", tile_out, " rows in ",
                      tiling.out);
    with_type(panel, [&](auto type) {
        using T = decltype(type);
        T* to = mutable_data<T>(dvalues);
        const T* from = data<T>(panel);
        const int64_t low = start * tiling.in, high = stop * tiling.in;
        const int64_t first = whole ? 0 : start / tile_out * tiling.tile_columns();
        const int64_t last = whole ? 1 : stop / tile_out * tiling.tile_columns();
        with_offsets(offsets, [&](auto* at) {
            over_tiles(tiling, at, first, last, [=](int64_t entry, int64_t position) {
                if (position >= low && position < high) to[entry] = from[position - low];
            });
        });
    });
}

}  // namespace sltrain
