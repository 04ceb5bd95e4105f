// S applied to activations, in parallel over blocks of tokens (and over rows where these are few).
#pragma once

#include <algorithm>

#include "tensors.h"

namespace sltrain {

// The table of the best instruction set of this CPU, or of the one that SLT_CPU_ISA names.
const KernelTable& kernels();

// Tokens are taken in blocks of 1, 2 or 4 cache lines, so that a packed block stays in the cache.
template <typename T>
int lines_for(int64_t features, int64_t tokens) {
    constexpr int64_t cached_bytes = 256 * 1024;  // about half of a core's L2 cache
    int lines = 4;
    while (lines > 1 &&
           (features * 64 * lines > cached_bytes || tokens < int64_t{lines} * line<T> * threads()))
        lines /= 2;
    return lines;
}

struct Range {
    int64_t first, last;
};
inline Range part_of(int64_t count, int64_t parts, int64_t index) {
    return {count * index / parts, count * (index + 1) / parts};
}

// y[token][row] += S x: x [tokens, in] with `stride` between tokens, y [tokens, out] contiguous.
template <typename T>
void apply(const T* x, int64_t stride, int64_t tokens, int64_t in, int64_t out,
           const RowView<accumulate_t<T>>& rows, T* y) {
    using A = accumulate_t<T>;
    const Kernels<T>& kernel = kernels().get<T>();
    const int lines = lines_for<T>(in, tokens);
    const int64_t width = lines * line<T>, blocks = (tokens + width - 1) / width;
    if (blocks == 0) return;
    const int64_t ranges = std::max<int64_t>(1, threads() / blocks);
    at::parallel_for(0, blocks * ranges, 1, [&](int64_t begin, int64_t end) {
        Block<A> packed(in * width);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t token = task / ranges * width, count = std::min(width, tokens - token);
            const Range range = part_of(out, ranges, task % ranges);
            kernel.pack(x + token * stride, stride, count, in, packed.data, lines);
            kernel.multiply(packed.data, lines, rows, range.first, range.last, y + token * out, out,
                            count);
        }
    });
}

// What the backward of S works on: dy [tokens, out] and x [tokens, in], any stride between tokens.
template <typename T>
struct Samples {
    const T *dy, *x;
    int64_t dy_stride, x_stride, tokens, in, out;
};

// dx += S^T dy where dx is given, and sums[group][entry] += dy x at the entries where sums are
// given. Each of `groups` takes its own share of the tokens.
template <typename T>
void apply_backward(const Samples<T>& s, const RowView<accumulate_t<T>>& rows,
                    const RowView<accumulate_t<T>>& columns, T* dx, accumulate_t<T>* sums,
                    int64_t entries, int64_t groups) {
    using A = accumulate_t<T>;
    const Kernels<T>& kernel = kernels().get<T>();
    const int lines = lines_for<T>(std::max(s.in, s.out), s.tokens);
    const int64_t width = lines * line<T>, blocks = (s.tokens + width - 1) / width;
    groups = std::min(groups, blocks);
    if (groups == 0) return;
    const int64_t ranges = std::max<int64_t>(1, threads() / groups);
    at::parallel_for(0, groups * ranges, 1, [&](int64_t begin, int64_t end) {
        Block<A> packed_dy(s.out * width), packed_x(sums ? s.in * width : 0);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t group = task / ranges;
            const Range own = part_of(blocks, groups, group);
            const Range over_in = part_of(s.in, ranges, task % ranges);
            const Range over_out = part_of(s.out, ranges, task % ranges);
            for (int64_t token = own.first * width; token < std::min(own.last * width, s.tokens);
                 token += width) {
                const int64_t count = std::min(width, s.tokens - token);
                kernel.pack(s.dy + token * s.dy_stride, s.dy_stride, count, s.out, packed_dy.data,
                            lines);
                if (dx)
                    kernel.multiply(packed_dy.data, lines, columns, over_in.first, over_in.last,
                                    dx + token * s.in, s.in, count);
                if (!sums) continue;
                kernel.pack(s.x + token * s.x_stride, s.x_stride, count, s.in, packed_x.data,
                            lines);
                kernel.sample(packed_x.data, packed_dy.data, lines, rows, over_out.first,
                              over_out.last, sums + group * entries);
            }
        }
    });
}

// dvalues[source of entry] = sum over groups of sums[group][entry].
template <typename T>
void add_groups(const accumulate_t<T>* sums, int64_t groups, const Rows<accumulate_t<T>>& rows,
                T* dvalues) {
    const int64_t entries = rows.column.size();
    at::parallel_for(0, entries, 1 << 14, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            accumulate_t<T> sum = 0;
            for (int64_t group = 0; group < groups; ++group) sum += sums[group * entries + i];
            dvalues[rows.source.empty() ? i : rows.source[i]] = narrow<T>(sum);
        }
    });
}

}  // namespace sltrain
