// Runs the inner loops of csrc/cpu/kernels.inl with any size of register on any CPU, against plain
// loops: the compiler lowers 64-byte vectors to what the machine has, so the AVX-512 source is proven
// on machines without it. Usage: the program exits 1 and says where it differs.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "kernels.inl"

using namespace sltrain;

std::mt19937 generator(std::random_device{}());
int below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(generator); }
double normal() { return std::normal_distribution<double>()(generator); }

template <typename A>
struct Aligned {
  A* data;
  explicit Aligned(size_t n) : data(static_cast<A*>(std::aligned_alloc(64, (n * sizeof(A) + 63) / 64 * 64))) {}
  ~Aligned() { std::free(data); }
};

template <typename T>
int check(const char* name, double tolerance) {
  using A = accumulate_t<T>;
  for (int trial = 0; trial < 60; ++trial) {
    const int lines = 1 << below(3), width = lines * line<T>;
    const int in = 1 + below(70), out = 1 + below(50), tokens = 1 + below(width);
    const int x_stride = in + below(3), y_stride = out + below(3);
    std::vector<int64_t> start{0};
    std::vector<int32_t> column;
    std::vector<A> value;
    for (int row = 0; row < out; ++row) {
      for (int k = below(14); k > 0; --k) {
        column.push_back(below(in));
        value.push_back(static_cast<A>(normal()));
      }
      start.push_back(column.size());
    }
    const RowView<A> rows{start.data(), column.data(), value.data()};
    std::vector<T> x(tokens * x_stride), y(tokens * y_stride), dy(tokens * out), before;
    for (T& element : x) element = narrow<T>(static_cast<A>(normal()));
    for (T& element : y) element = narrow<T>(static_cast<A>(normal()));
    for (T& element : dy) element = narrow<T>(static_cast<A>(normal()));
    before = y;
    Aligned<A> packed(size_t(in) * width), packed_dy(size_t(out) * width);
    const Kernels<T> kernels = table<T>();
    kernels.pack(x.data(), x_stride, tokens, in, packed.data, lines);
    for (int f = 0; f < in; ++f)
      for (int t = 0; t < width; ++t) {
        const A expected = t < tokens ? widen(x[t * x_stride + f]) : A(0);
        if (packed.data[f * width + t] != expected) return std::printf("%s pack %d %d\n", name, f, t), 1;
      }
    const int first = below(out), last = first + 1 + below(out - first);
    kernels.multiply(packed.data, lines, rows, first, last, y.data(), y_stride, tokens);
    for (int t = 0; t < tokens; ++t)
      for (int o = 0; o < y_stride; ++o) {
        double expected = widen(before[t * y_stride + o]);
        if (o >= first && o < last)
          for (int64_t j = start[o]; j < start[o + 1]; ++j)
            expected += double(value[j]) * widen(x[t * x_stride + column[j]]);
        if (std::abs(widen(y[t * y_stride + o]) - expected) > tolerance * (1 + std::abs(expected)))
          return std::printf("%s multiply %d %d\n", name, t, o), 1;
      }
    kernels.pack(dy.data(), out, tokens, out, packed_dy.data, lines);
    std::vector<A> sums(value.size(), A(0.5));
    kernels.sample(packed.data, packed_dy.data, lines, rows, first, last, sums.data());
    for (int o = 0; o < out; ++o)
      for (int64_t j = start[o]; j < start[o + 1]; ++j) {
        double expected = 0.5;
        if (o >= first && o < last)
          for (int t = 0; t < tokens; ++t)
            expected += double(widen(dy[t * out + o])) * widen(x[t * x_stride + column[j]]);
        if (std::abs(sums[j] - expected) > 1e-4 * (1 + std::abs(expected)))
          return std::printf("%s sample %d %d\n", name, o, int(j)), 1;
      }
  }
  return 0;
}

int main() {
  return check<float>("float", 1e-4) || check<double>("double", 1e-12) || check<BFloat16>("bfloat16", 1e-2);
}
