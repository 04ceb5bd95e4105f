// What one thread of the support kernels does, in plain C++ that tests/ops runs with g++.
//
// Threads run along the elements of S in the order in which values are stored, a slot of kWidth
// neighbours each, so values and offsets are read (dvalues are written) as whole vectors, and the
// threads of a warp touch one row of the matrix, or two. For 1 x 1 blocks every element of a slot
// has its own offset; larger blocks are as wide as a slot or wider, and a slot is a piece of a
// block's row, contiguous in the matrix too.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SLT_INLINE __host__ __device__ __forceinline__
#else
#define SLT_INLINE inline
#endif

namespace sltrain_cuda {

// bfloat16 as its bits: the same arithmetic on host and device, no CUDA header in the g++ test.
struct BFloat16 {
    uint16_t bits;
};

template <typename To, typename From>
SLT_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

SLT_INLINE float add(float a, float b) { return a + b; }
SLT_INLINE double add(double a, double b) { return a + b; }

SLT_INLINE float widen(BFloat16 a) { return bit_cast<float>(static_cast<uint32_t>(a.bits) << 16); }

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
SLT_INLINE BFloat16 narrow(float a) {
    uint32_t bits = bit_cast<uint32_t>(a);
    if (a != a) {
        return BFloat16{static_cast<uint16_t>((bits >> 16) | 0x40)};
    }
    return BFloat16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

SLT_INLINE BFloat16 add(BFloat16 a, BFloat16 b) { return narrow(widen(a) + widen(b)); }

enum class Kind : int {
    kWhole,     // the matrix is one tile: offsets count its elements row-major, sorted
    kAlongIn,   // tile one block tall: offsets count blocks along a row
    kAlongOut,  // tile one block wide: offsets count blocks along a column
};

struct Layout {
    Kind kind;
    int64_t tile_out, tile_in;  // in matrix elements
    int64_t block;              // side of a block
    int64_t tile_columns;       // tiles along `in`
    int64_t per_tile;           // blocks in a tile
    int64_t in_features;
    int64_t start, rows;  // the rows of the matrix that are at hand
    int64_t first, last;  // elements of S to look at: all that can lie in these rows
};

constexpr int kThreads =
    256;  // per block, one slot each: a panel of 1/8 of a 7b matrix still fills the GPU

// 64-bit division takes some ninety instructions on a GPU, 32-bit division a quarter of it.
SLT_INLINE int64_t divide(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) {
        return static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
    }
    return a / b;
}

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth <= 16 ? sizeof(T) * kWidth : 16) Vector {
    T at[kWidth];
};

template <int kWidth, typename T>
SLT_INLINE Vector<T, kWidth> load(const T* from) {
    return *reinterpret_cast<const Vector<T, kWidth>*>(from);
}

template <int kWidth, typename T>
SLT_INLINE void store(T* to, const Vector<T, kWidth>& value) {
    *reinterpret_cast<Vector<T, kWidth>*>(to) = value;
}

// Place of element `inner` of a block (row-major in the block) in the rows at hand, counted
// row-major from row `start`; negative or >= rows * in_features where it lies outside of them.
SLT_INLINE int64_t place(const Layout& s, int64_t block_index, int64_t inner, int64_t offset) {
    const int64_t origin = s.start * s.in_features;
    if (s.kind == Kind::kWhole) {
        return offset - origin;
    }
    const int64_t tile = divide(block_index, s.per_tile);
    if (s.kind == Kind::kAlongIn && s.block == 1) {
        return tile * s.tile_in + offset -
               origin;  // tiles are 1 x tile_in, side by side, row by row
    }
    const int64_t tile_row = divide(tile, s.tile_columns);
    int64_t row = tile_row * s.tile_out + divide(inner, s.block);
    int64_t column = (tile - tile_row * s.tile_columns) * s.tile_in + inner % s.block;
    (s.kind == Kind::kAlongIn ? column : row) += offset * s.block;
    return row * s.in_features + column - origin;
}

// The elements [element, element + kWidth) of S and their places.
template <int kWidth>
struct Slot {
    int64_t at[kWidth];
    bool contiguous;  // one piece of a block's row
    bool inside;      // all of them are in the rows at hand
};

template <int kWidth, typename Offset>
SLT_INLINE Slot<kWidth> find(const Layout& s, const Offset* offsets, int64_t element) {
    Slot<kWidth> slot;
    const int64_t size = s.rows * s.in_features;
    slot.inside = true;
    slot.contiguous = s.block > 1;
    if (s.block > 1) {
        const int64_t index = divide(element, s.block * s.block);
        const int64_t base = place(s, index, element - index * s.block * s.block,
                                   static_cast<int64_t>(offsets[index]));
        for (int i = 0; i < kWidth; ++i) {
            slot.at[i] = base + i;
        }
        slot.inside =
            base >= 0 && base < size;  // a row of the matrix is at hand as a whole, or not
        return slot;
    }
    const Vector<Offset, kWidth> own = load<kWidth>(offsets + element);
    for (int i = 0; i < kWidth; ++i) {
        slot.at[i] = place(s, element + i, 0, static_cast<int64_t>(own.at[i]));
        slot.inside = slot.inside && slot.at[i] >= 0 && slot.at[i] < size;
    }
    return slot;
}

// w += values for one slot. All reads stand before the first write, so that they are in flight
// together.
template <int kWidth, typename T, typename Offset>
SLT_INLINE void add_slot(const Layout& s, T* w, const T* values, const Offset* offsets,
                         int64_t element) {
    const Slot<kWidth> slot = find<kWidth>(s, offsets, element);
    const Vector<T, kWidth> value = load<kWidth>(values + element);
    Vector<T, kWidth> sum;
    if (slot.contiguous) {
        sum = load<kWidth>(w + slot.at[0]);
        for (int i = 0; i < kWidth; ++i) {
            sum.at[i] = add(sum.at[i], value.at[i]);
        }
        store<kWidth>(w + slot.at[0], sum);
        return;
    }
    for (int i = 0; i < kWidth; ++i) {
        sum.at[i] = w[slot.at[i]];
    }
    for (int i = 0; i < kWidth; ++i) {
        w[slot.at[i]] = add(sum.at[i], value.at[i]);
    }
}

// dvalues = panel for one slot; elements outside of the panel are left alone.
template <int kWidth, typename T, typename Offset>
SLT_INLINE void gather_slot(const Layout& s, const T* panel, T* dvalues, const Offset* offsets,
                            int64_t element) {
    const Slot<kWidth> slot = find<kWidth>(s, offsets, element);
    if (slot.inside) {
        Vector<T, kWidth> found;
        if (slot.contiguous) {
            found = load<kWidth>(panel + slot.at[0]);
        } else {
            for (int i = 0; i < kWidth; ++i) {
                found.at[i] = panel[slot.at[i]];
            }
        }
        store<kWidth>(dvalues + element, found);
        return;
    }
    if (slot.contiguous) {
        return;
    }
    const int64_t size = s.rows * s.in_features;
    for (int i = 0; i < kWidth; ++i) {
        if (slot.at[i] >= 0 && slot.at[i] < size) {
            dvalues[element + i] = panel[slot.at[i]];
        }
    }
}

struct AddSupport {
    template <int kWidth, typename T, typename Offset>
    static SLT_INLINE void slot(const Layout& s, T* w, T* values, const Offset* offsets,
                                int64_t element) {
        add_slot<kWidth>(s, w, static_cast<const T*>(values), offsets, element);
    }
};

struct GatherSupport {
    template <int kWidth, typename T, typename Offset>
    static SLT_INLINE void slot(const Layout& s, T* panel, T* dvalues, const Offset* offsets,
                                int64_t element) {
        gather_slot<kWidth>(s, static_cast<const T*>(panel), dvalues, offsets, element);
    }
};

// What thread `thread` of block `group` does. Slots start at multiples of kWidth, so the vectors
// are aligned; elements of a slot that first or last cut are handled one by one.
template <typename Operation, int kWidth, typename T, typename Offset>
SLT_INLINE void thread_body(const Layout& s, T* matrix, T* values, const Offset* offsets,
                            int64_t group, int thread) {
    const int64_t stretch = static_cast<int64_t>(kThreads) * kWidth;
    const int64_t begin = s.first / kWidth * kWidth + group * stretch;
    if (s.kind == Kind::kWhole) {
        // Sorted: the ends of the block's stretch tell whether any of it lies in the panel.
        const int64_t end = begin + stretch < s.last ? begin + stretch : s.last;
        const int64_t low = s.start * s.in_features;
        const int64_t high = low + s.rows * s.in_features;
        if (static_cast<int64_t>(offsets[begin]) >= high ||
            static_cast<int64_t>(offsets[end - 1]) < low) {
            return;
        }
    }
    const int64_t element = begin + static_cast<int64_t>(thread) * kWidth;
    if (element >= s.first && element + kWidth <= s.last) {
        Operation::template slot<kWidth>(s, matrix, values, offsets, element);
        return;
    }
    for (int i = 0; i < kWidth; ++i) {
        if (element + i >= s.first && element + i < s.last) {
            Operation::template slot<1>(s, matrix, values, offsets, element + i);
        }
    }
}

// The layout of S for rows [start, start + rows) of the matrix. `total` elements (values.numel());
// for a whole-matrix tile tile_columns and per_tile are not read.
inline Layout make_layout(bool whole, int64_t tile_out, int64_t tile_in, int64_t block,
                          int64_t tile_columns, int64_t per_tile, int64_t in_features,
                          int64_t start, int64_t rows, int64_t total) {
    Layout s{};
    s.kind = whole ? Kind::kWhole : tile_out == block ? Kind::kAlongIn : Kind::kAlongOut;
    s.tile_out = tile_out;
    s.tile_in = tile_in;
    s.block = block;
    s.tile_columns = tile_columns;
    s.per_tile = per_tile;
    s.in_features = in_features;
    s.start = start;
    s.rows = rows;
    s.first = 0;
    s.last = total;
    if (!whole) {  // the tile rows that meet these rows
        const int64_t per_tile_row = tile_columns * per_tile * block * block;
        const int64_t last = (start + rows + tile_out - 1) / tile_out * per_tile_row;
        s.first = start / tile_out * per_tile_row;
        s.last = last < total ? last : total;
    }
    return s;
}

// Blocks to launch for the elements [first, last) in slots of `width`.
inline int64_t group_count(const Layout& s, int width) {
    if (s.last <= s.first || s.rows <= 0 || s.in_features <= 0) {
        return 0;
    }
    const int64_t stretch = static_cast<int64_t>(kThreads) * width;
    return (s.last - s.first / width * width + stretch - 1) / stretch;
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether slots of `width` elements may be read and written as vectors. Parameters are views into
// flat buffers under ZeRO and FSDP2, so pointers may stand anywhere.
inline bool vectors_fit(const Layout& s, int width, int64_t element_size, int64_t offset_size,
                        const void* matrix, const void* values, const void* offsets) {
    const int64_t bytes = width * element_size;  // 16
    if (!is_aligned(values, bytes)) {
        return false;
    }
    if (s.block > 1) {
        return s.block % width == 0 && s.in_features % width == 0 && is_aligned(matrix, bytes);
    }
    return is_aligned(offsets, width * offset_size <= 16 ? width * offset_size : 16);
}

}  // namespace sltrain_cuda
