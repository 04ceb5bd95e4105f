// Where the entries of S stand: the tiles of sltrain_dist/ops/tiles.py as rows of (column, value).
// Free of torch headers.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace sltrain {

// A matrix [out, in] in tiles; `per_tile` blocks of block x block in each. One tile: the whole
// matrix.
struct Tiling {
    int64_t out, in, tile_out, tile_in, block, per_tile;

    bool along_in() const { return tile_out == block; }
    int64_t tile_columns() const { return in / tile_in; }
    int64_t tiles() const { return (out / tile_out) * tile_columns(); }
    int64_t area() const { return block * block; }
    int64_t entries() const { return tiles() * per_tile * area(); }

    // Row and column of the first element of the block at `offset` of a tile.
    void corner(int64_t tile, int64_t offset, int64_t& row, int64_t& column) const {
        row = tile / tile_columns() * tile_out;
        column = tile % tile_columns() * tile_in;
        if (along_in()) {
            column += offset * block;
        } else if (tile_in == block) {
            row += offset * block;
        } else {  // single elements, counted row-major
            row += offset / tile_in;
            column += offset % tile_in;
        }
    }
};

// The rows of S, or of its transpose, with the position of each entry in the values tensor.
template <typename A>
struct Rows {
    std::vector<int64_t> start;
    std::vector<int32_t> column;
    std::vector<A> value;
    std::vector<int64_t> source;  // empty: entries stand in the order of the values

    RowView<A> view() const { return {start.data(), column.data(), value.data()}; }
};

// Calls visit(entry, row, column) for every element of S, in the order of the values tensor.
template <typename Offset, typename Visit>
void for_each_entry(const Tiling& tiling, const Offset* offsets, Visit visit) {
    const int64_t block = tiling.block, area = tiling.area();
    for (int64_t tile = 0, at = 0; tile < tiling.tiles(); ++tile)
        for (int64_t k = 0; k < tiling.per_tile; ++k, ++at) {
            int64_t row, column;
            tiling.corner(tile, offsets[at], row, column);
            for (int64_t i = 0; i < area; ++i)
                visit(at * area + i, row + i / block, column + i % block);
        }
}

// S row by row (`transposed`: column by column) by a counting sort, stable in the order of the
// values.
template <typename T, typename Offset>
Rows<accumulate_t<T>> rows_of(const Tiling& tiling, const T* values, const Offset* offsets,
                              bool transposed) {
    Rows<accumulate_t<T>> rows;
    const int64_t count = tiling.entries();
    rows.start.assign((transposed ? tiling.in : tiling.out) + 1, 0);
    rows.column.resize(count);
    rows.value.resize(count);
    if (!transposed && tiling.along_in() && tiling.block == 1) {  // fan_in: already row by row
        const int64_t per_row = tiling.tile_columns() * tiling.per_tile;
        for (int64_t row = 0; row <= tiling.out; ++row) rows.start[row] = row * per_row;
        for_each_entry(tiling, offsets, [&](int64_t entry, int64_t, int64_t column) {
            rows.column[entry] = static_cast<int32_t>(column);
            rows.value[entry] = widen(values[entry]);
        });
        return rows;
    }
    for_each_entry(tiling, offsets, [&](int64_t, int64_t row, int64_t column) {
        ++rows.start[(transposed ? column : row) + 1];
    });
    for (size_t i = 1; i < rows.start.size(); ++i) rows.start[i] += rows.start[i - 1];
    rows.source.resize(count);
    std::vector<int64_t> next(rows.start.begin(), rows.start.end() - 1);
    for_each_entry(tiling, offsets, [&](int64_t entry, int64_t row, int64_t column) {
        const int64_t to = next[transposed ? column : row]++;
        rows.column[to] = static_cast<int32_t>(transposed ? row : column);
        rows.value[to] = widen(values[entry]);
        rows.source[to] = entry;
    });
    return rows;
}

}  // namespace sltrain
