// The inner loops of S applied to activations, one table of them per instruction set.
//
// A block of `width` tokens is packed feature-major, packed[feature][width], so that one entry of S
// multiplies contiguous tokens. Free of torch headers.
#pragma once

#include <cstdint>

namespace sltrain {

struct BFloat16 {
    uint16_t bits;
};

template <typename T>
struct Accumulate {
    using type = T;
};
template <>
struct Accumulate<BFloat16> {
    using type = float;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

inline float widen(BFloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof result);
    return result;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// Round to nearest even, as torch does; NaN stays NaN.
template <typename T>
inline T narrow(accumulate_t<T> x) {
    return x;
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    if (x != x) return {0x7FC0};
    bits += 0x7FFF + ((bits >> 16) & 1);
    return {static_cast<uint16_t>(bits >> 16)};
}

// The entries of a sparse matrix row by row: of row r they stand at start[r] .. start[r + 1].
template <typename A>
struct RowView {
    const int64_t* start;
    const int32_t* column;
    const A* value;
};

// Tokens of a block are counted in cache lines: width = lines * line<T>, lines is 1, 2 or 4.
template <typename T>
constexpr int line = 64 / sizeof(accumulate_t<T>);

template <typename T>
struct Kernels {
    using A = accumulate_t<T>;
    // packed[feature][width] = x[token][feature]; missing tokens become zero. packed is aligned to
    // 64 bytes.
    void (*pack)(const T* x, int64_t stride, int64_t tokens, int64_t features, A* packed,
                 int lines);
    // y[token][row] += sum over the row's entries of value * packed[column][token], rows first ..
    // last.
    void (*multiply)(const A* packed, int lines, RowView<A> rows, int64_t first, int64_t last, T* y,
                     int64_t stride, int64_t tokens);
    // sums[entry] += sum over tokens of dy[row][token] * x[column][token], rows first .. last.
    void (*sample)(const A* x, const A* dy, int lines, RowView<A> rows, int64_t first, int64_t last,
                   A* sums);
};

struct KernelTable {
    const char* name;
    Kernels<float> f32;
    Kernels<double> f64;
    Kernels<BFloat16> bf16;
    template <typename T>
    const Kernels<T>& get() const;
};
template <>
inline const Kernels<float>& KernelTable::get<float>() const {
    return f32;
}
template <>
inline const Kernels<double>& KernelTable::get<double>() const {
    return f64;
}
template <>
inline const Kernels<BFloat16>& KernelTable::get<BFloat16>() const {
    return bf16;
}

extern const KernelTable portable_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
#endif

}  // namespace sltrain
