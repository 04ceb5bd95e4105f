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

    // Moves row and column from the corner of a tile to that of its block at `offset`.
    void place(int64_t offset, int64_t& row, int64_t& column) const {
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

// Calls visit(entry, row, column) for the elements of blocks begin .. end of one tile.
template <typename Offset, typename Visit>
void for_each_in_tile(const Tiling& tiling, int64_t tile, int64_t begin, int64_t end,
                      const Offset* offsets, Visit visit) {
    const int64_t block = tiling.block, area = tiling.area(), columns = tiling.tile_columns();
    const int64_t top = tile / columns * tiling.tile_out, left = tile % columns * tiling.tile_in;
    for (int64_t at = tile * tiling.per_tile + begin; at < tile * tiling.per_tile + end; ++at) {
        int64_t row = top, column = left;
        tiling.place(offsets[at], row, column);
        for (int64_t y = 0; y < block; ++y)
            for (int64_t x = 0; x < block; ++x)
                visit(at * area + y * block + x, row + y, column + x);
    }
}

// The same for every element of S, in the order of the values tensor.
template <typename Offset, typename Visit>
void for_each_entry(const Tiling& tiling, const Offset* offsets, Visit visit) {
    for (int64_t tile = 0; tile < tiling.tiles(); ++tile)
        for_each_in_tile(tiling, tile, 0, tiling.per_tile, offsets, visit);
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
