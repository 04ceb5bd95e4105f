// The operators of this folder; schemas, fakes and references stand in sltrain_dist/ops.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace sltrain {

using at::Tensor;
using Optional = std::optional<Tensor>;

std::string cpu_capability();

void add_support(const Tensor& w, const Tensor& values, const Tensor& offsets, int64_t tile_out,
                 int64_t tile_in, int64_t block);
void gather_support(const Tensor& panel, int64_t start, const Tensor& dvalues,
                    const Tensor& offsets, int64_t tile_out, int64_t tile_in, int64_t block);
void sparse_forward(const Tensor& x, const Tensor& y, const Tensor& values, const Tensor& offsets,
                    int64_t tile_out, int64_t tile_in, int64_t block);
Tensor sparse_backward(const Tensor& dy, const Tensor& x, const Optional& dx, const Tensor& values,
                       const Tensor& offsets, int64_t tile_out, int64_t tile_in, int64_t block,
                       bool need_values);
std::tuple<Tensor, Tensor> factorized_linear(const Tensor& x, const Optional& b, const Optional& a,
                                             const Tensor& values, const Tensor& offsets,
                                             const Optional& bias, const Optional& scaling,
                                             double scale, int64_t tile_out, int64_t tile_in,
                                             int64_t block, bool keep_hidden);
std::vector<Tensor> factorized_linear_backward(const Tensor& dy, const Tensor& x, const Optional& b,
                                               const Optional& a, const Tensor& values,
                                               const Tensor& offsets, const Optional& hidden,
                                               const Optional& scaling, double scale,
                                               int64_t tile_out, int64_t tile_in, int64_t block,
                                               const c10::List<bool>& needs);
Tensor distinct_offsets(int64_t key, const Tensor& tiles, int64_t bound, int64_t count);
void sample_positions(const Tensor& positions, int64_t key, int64_t size);

}  // namespace sltrain
