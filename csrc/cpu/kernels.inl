// The kernels of kernels.h, written once with the compiler's vector extensions.
//
// Included by kernels_*.cpp, each of which sets the instruction set (by pragma, after the standard
// headers: an inline function of those compiled for AVX-512 could otherwise be the copy that the
// linker keeps for all) and VECTOR_BYTES, the size of a register.

#pragma GCC diagnostic ignored "-Wpsabi"

namespace sltrain {
namespace {

#define INLINE inline __attribute__((always_inline))

template <typename A, int N>
struct Vector {
    typedef A type __attribute__((vector_size(N * sizeof(A)), may_alias));
};
template <typename A>
using Register = typename Vector<A, VECTOR_BYTES / sizeof(A)>::type;
template <typename A>
using Quad = typename Vector<A, 4>::type;

#if defined(__clang__)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
template <typename A>
using Integer = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
#define SHUFFLE(a, b, i, j, k, l) \
    __builtin_shuffle(a, b, (typename Vector<Integer<A>, 4>::type){i, j, k, l})
#endif

template <typename A>
INLINE void transpose(Quad<A> (&q)[4]) {
    Quad<A> a = SHUFFLE(q[0], q[1], 0, 4, 1, 5), b = SHUFFLE(q[0], q[1], 2, 6, 3, 7);
    Quad<A> c = SHUFFLE(q[2], q[3], 0, 4, 1, 5), d = SHUFFLE(q[2], q[3], 2, 6, 3, 7);
    q[0] = SHUFFLE(a, c, 0, 1, 4, 5);
    q[1] = SHUFFLE(a, c, 2, 3, 6, 7);
    q[2] = SHUFFLE(b, d, 0, 1, 4, 5);
    q[3] = SHUFFLE(b, d, 2, 3, 6, 7);
}

template <typename A>
INLINE Quad<A> load_quad(const A* from) {
    Quad<A> result;
    __builtin_memcpy(&result, from, sizeof result);
    return result;
}
INLINE Quad<float> load(const float* from) { return load_quad(from); }
INLINE Quad<double> load(const double* from) { return load_quad(from); }
INLINE Quad<float> load(const BFloat16* from) {
    Vector<uint16_t, 4>::type bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return (Quad<float>)(__builtin_convertvector(bits, Vector<uint32_t, 4>::type) << 16);
}
INLINE void store(float* to, const Quad<float>& x) { __builtin_memcpy(to, &x, sizeof x); }
INLINE void store(double* to, const Quad<double>& x) { __builtin_memcpy(to, &x, sizeof x); }
INLINE void store(BFloat16* to, const Quad<float>& x) {
    typedef Vector<uint32_t, 4>::type Bits;
    const Bits bits = (Bits)x, nan = (Bits)(x != x);
    const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Bits chosen = (nan & 0x7FC0) | (~nan & rounded);
    const auto result = __builtin_convertvector(chosen, Vector<uint16_t, 4>::type);
    __builtin_memcpy(to, &result, sizeof result);
}

template <typename T>
void pack(const T* x, int64_t stride, int64_t tokens, int64_t features, accumulate_t<T>* packed,
          int lines) {
    using A = accumulate_t<T>;
    constexpr int L = line<T>;
    const int64_t width = lines * L, whole = features / L * L;
    for (int64_t t = 0; t < width; t += L) {
        // A square of L tokens x L features reads and writes whole cache lines.
        const int64_t fast = t + L <= tokens ? whole : 0;
        for (int64_t f = 0; f < fast; f += L)
            for (int i = 0; i < L; i += 4)
                for (int j = 0; j < L; j += 4) {
                    Quad<A> q[4];
                    for (int k = 0; k < 4; ++k) q[k] = load(x + (t + i + k) * stride + f + j);
                    transpose<A>(q);
                    for (int k = 0; k < 4; ++k) store(packed + (f + j + k) * width + t + i, q[k]);
                }
        for (int64_t f = fast; f < features; ++f)
            for (int64_t i = t; i < t + L; ++i)
                packed[f * width + i] = i < tokens ? widen(x[i * stride + f]) : A(0);
    }
}

// One row of S times a block, into sums[width]. N registers of sums at a time, U entries in flight.
template <typename A, int LINES>
INLINE void row_times_block(const A* packed, const int32_t* column, const A* value, int64_t count,
                            A* sums) {
    constexpr int width = LINES * 64 / sizeof(A), lanes = VECTOR_BYTES / sizeof(A);
    constexpr int registers = width / lanes, N = registers < 8 ? registers : 8;
    constexpr int U = N < 8 ? 8 / N : 1;
    using V = Register<A>;
    for (int part = 0; part < registers; part += N) {
        V sum[U][N] = {};
        int64_t j = 0;
        for (; j + U <= count; j += U)
            for (int u = 0; u < U; ++u) {
                const V* p =
                    reinterpret_cast<const V*>(packed + int64_t(column[j + u]) * width) + part;
                const A v = value[j + u];
                for (int i = 0; i < N; ++i) sum[u][i] += v * p[i];
            }
        for (; j < count; ++j) {
            const V* p = reinterpret_cast<const V*>(packed + int64_t(column[j]) * width) + part;
            for (int i = 0; i < N; ++i) sum[0][i] += value[j] * p[i];
        }
        for (int u = 1; u < U; ++u)
            for (int i = 0; i < N; ++i) sum[0][i] += sum[u][i];
        for (int i = 0; i < N; ++i) reinterpret_cast<V*>(sums)[part + i] = sum[0][i];
    }
}

template <typename T, int LINES>
void multiply_lines(const accumulate_t<T>* packed, RowView<accumulate_t<T>> rows, int64_t first,
                    int64_t last, T* y, int64_t stride, int64_t tokens) {
    using A = accumulate_t<T>;
    constexpr int L = line<T>, width = LINES * L;
    alignas(64) A sums[L][width];
    for (int64_t row = first; row < last; row += L) {
        const int count = static_cast<int>(row + L <= last ? L : last - row);
        for (int r = 0; r < count; ++r) {
            const int64_t at = rows.start[row + r];
            row_times_block<A, LINES>(packed, rows.column + at, rows.value + at,
                                      rows.start[row + r + 1] - at, sums[r]);
        }
        const int64_t fast_tokens = count == L ? tokens / 4 * 4 : 0;
        for (int64_t t = 0; t < fast_tokens; t += 4)
            for (int r = 0; r < L; r += 4) {
                Quad<A> q[4];
                for (int k = 0; k < 4; ++k) q[k] = load(&sums[r + k][t]);
                transpose<A>(q);
                for (int k = 0; k < 4; ++k) {
                    T* to = y + (t + k) * stride + row + r;
                    store(to, load(to) + q[k]);
                }
            }
        for (int64_t t = fast_tokens; t < tokens; ++t)
            for (int r = 0; r < count; ++r) {
                T* to = y + t * stride + row + r;
                *to = narrow<T>(widen(*to) + sums[r][t]);
            }
    }
}

template <typename A>
INLINE Quad<A> fold(const Register<A>& x) {
    constexpr int lanes = VECTOR_BYTES / sizeof(A);
    if constexpr (lanes <= 4) {
        Quad<A> result = {};
        __builtin_memcpy(&result, &x, sizeof x);
        return result;
    } else {
        A parts[lanes];
        __builtin_memcpy(parts, &x, sizeof x);
        Quad<A> result = load(parts);
        for (int i = 4; i < lanes; i += 4) result += load(parts + i);
        return result;
    }
}

template <typename A, int LINES>
void sample_lines(const A* x, const A* dy, RowView<A> rows, int64_t first, int64_t last, A* sums) {
    constexpr int width = LINES * 64 / sizeof(A);
    constexpr int registers = width / (VECTOR_BYTES / sizeof(A));
    using V = Register<A>;
    for (int64_t row = first; row < last; ++row) {
        const V* d = reinterpret_cast<const V*>(dy + row * width);
        int64_t j = rows.start[row];
        const int64_t end = rows.start[row + 1];
        for (; j + 4 <= end; j += 4) {
            const V* p[4];
            for (int k = 0; k < 4; ++k)
                p[k] = reinterpret_cast<const V*>(x + int64_t(rows.column[j + k]) * width);
            V sum[4] = {};
            for (int i = 0; i < registers; ++i)
                for (int k = 0; k < 4; ++k) sum[k] += d[i] * p[k][i];
            Quad<A> q[4];
            for (int k = 0; k < 4; ++k) q[k] = fold<A>(sum[k]);
            transpose<A>(q);
            store(sums + j, load(sums + j) + ((q[0] + q[1]) + (q[2] + q[3])));
        }
        for (; j < end; ++j) {
            const V* p = reinterpret_cast<const V*>(x + int64_t(rows.column[j]) * width);
            V sum = {};
            for (int i = 0; i < registers; ++i) sum += d[i] * p[i];
            Quad<A> q = fold<A>(sum);
            sums[j] += (q[0] + q[1]) + (q[2] + q[3]);
        }
    }
}

template <typename T>
void multiply(const accumulate_t<T>* packed, int lines, RowView<accumulate_t<T>> rows,
              int64_t first, int64_t last, T* y, int64_t stride, int64_t tokens) {
    if (lines == 4) return multiply_lines<T, 4>(packed, rows, first, last, y, stride, tokens);
    if (lines == 2) return multiply_lines<T, 2>(packed, rows, first, last, y, stride, tokens);
    return multiply_lines<T, 1>(packed, rows, first, last, y, stride, tokens);
}

template <typename T>
void sample(const accumulate_t<T>* x, const accumulate_t<T>* dy, int lines,
            RowView<accumulate_t<T>> rows, int64_t first, int64_t last, accumulate_t<T>* sums) {
    using A = accumulate_t<T>;
    if (lines == 4) return sample_lines<A, 4>(x, dy, rows, first, last, sums);
    if (lines == 2) return sample_lines<A, 2>(x, dy, rows, first, last, sums);
    return sample_lines<A, 1>(x, dy, rows, first, last, sums);
}

template <typename T>
constexpr Kernels<T> table() {
    return {pack<T>, multiply<T>, sample<T>};
}

}  // namespace
}  // namespace sltrain
