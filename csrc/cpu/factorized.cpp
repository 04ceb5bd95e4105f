// The factorized linear, a chunk of tokens at a time: while a thread's share of x, h and y is in
// its cache, the products with A and B and the one with S all use it, and bfloat16 is widened only
// there.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <cmath>

#include "operators.h"
#include "sparse.h"

namespace sltrain {
namespace {

constexpr int64_t most_workers = 8;  // each sums its own dA, dB and dvalues

// Whether bfloat16 products have units of their own; else they are computed in float32.
bool native_bfloat16() {
#if defined(__x86_64__)
    static const bool found = __builtin_cpu_supports("avx512bf16");
    return found;
#else
    return false;
#endif
}

at::ScalarType compute_dtype(const Tensor& x) {
    return x.scalar_type() == at::kBFloat16 && !native_bfloat16() ? at::kFloat : x.scalar_type();
}

// The arguments that both directions share, in the dtype of the products.
struct Linear {
    Tiling tiling;
    at::ScalarType dtype;
    Tensor b, a;  // undefined where there are none
    double scale;

    Linear(const Tensor& x, const Optional& b, const Optional& a, const Tensor& values,
           const Tensor& offsets, const Optional& scaling, double scale, int64_t tile_out,
           int64_t tile_in, int64_t block)
        : tiling(tiling_of(values, offsets, tile_out, tile_in, block)), dtype(compute_dtype(x)) {
        TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == tiling.in, "x has ",
                          x.dim() ? x.size(-1) : 0, " features, the support is for ", tiling.in);
        TORCH_CHECK_TYPE(x.scalar_type() == values.scalar_type(), "x is ", x.scalar_type(),
                         ", values are ", values.scalar_type(), ": they must agree");
        this->scale = scaling ? std::tanh(scaling->item<double>()) : scale;
        if (!b || !a) return;
        this->b = b->to(dtype);
        this->a = a->to(dtype);
        TORCH_CHECK_VALUE(b->dim() == 2 && a->dim() == 2 && b->size(0) == tiling.out &&
                              a->size(1) == tiling.in && b->size(1) == a->size(0),
                          "B ", b->sizes(), " and A ", a->sizes(), " do not fit a matrix of ",
                          tiling.out, " x ", tiling.in);
    }

    int64_t factor_bytes() const {
        return b.defined() ? b.numel() * b.element_size() + a.numel() * a.element_size() : 0;
    }
};

// How tokens are cut: few threads take whole chunks, each with sums of dA, dB and dvalues of its
// own; where those copies would take too much memory, all threads share the products of one large
// chunk.
struct Plan {
    int64_t tokens, chunk, workers;

    Plan(int64_t tokens, const Linear& linear) : tokens(tokens) {
        constexpr int64_t most_copied_bytes = 256 << 20;
        const int64_t copy = std::max<int64_t>(
            1, linear.factor_bytes() + linear.tiling.entries() * int64_t{sizeof(float)});
        const int64_t most = std::clamp<int64_t>(most_copied_bytes / copy, 1, most_workers);
        const bool shared = threads() > most;
        // So many tokens that reading A and B for each chunk costs little beside their products.
        chunk = shared ? 4096 : std::clamp<int64_t>(linear.factor_bytes() / 8192, 128, 1024);
        // No more workers than chunks, and as many chunks for one worker as for another.
        const int64_t chunks = std::max<int64_t>(1, (tokens + chunk - 1) / chunk);
        workers = shared ? 1 : std::min(threads(), chunks);
        const int64_t share = (tokens + workers - 1) / workers;
        const int64_t rounds = std::max<int64_t>(1, (share + chunk - 1) / chunk);
        chunk = std::max<int64_t>(64, ((share + rounds - 1) / rounds + 15) / 16 * 16);
    }

    // Calls work(first token, tokens) for every chunk, on all workers.
    template <typename Work>
    void run(Work work) const {
        const int64_t chunks = (tokens + chunk - 1) / chunk;
        const auto some = [&](int64_t begin, int64_t end) {
            // Worker threads start without the caller's dispatch state; autograd stands above this
            // kernel.
            at::AutoDispatchBelowADInplaceOrView below;
            for (int64_t i = begin; i < end; ++i)
                work(i * chunk, std::min(chunk, tokens - i * chunk));
        };
        if (workers == 1)
            some(0, chunks);
        else
            at::parallel_for(0, chunks, 1, some);
    }
};

// Calls visit(T{}) with the type of the products; the values may be stored narrower.
template <typename Visit>
void with_dtype(at::ScalarType dtype, Visit visit) {
    if (dtype == at::kDouble) return visit(double{});
    if (dtype == at::kBFloat16) return visit(BFloat16{});
    visit(float{});
}

template <typename A>
Rows<A> build_rows(const Tiling& tiling, const Tensor& values, const Tensor& offsets,
                   bool transposed) {
    Rows<A> rows;
    with_type(values, [&](auto type) {
        using T = decltype(type);
        if constexpr (std::is_same_v<accumulate_t<T>, A>)
            rows = with_offsets(offsets, [&](auto* at) {
                return rows_of(tiling, data<T>(values), at, transposed);
            });
    });
    return rows;
}

// sum += left right, in the dtype of the sum.
void add_product(Tensor& sum, const Tensor& left, const Tensor& right) {
    if (sum.scalar_type() == left.scalar_type())
        at::addmm_out(sum, sum, left, right);
    else
        sum.add_(at::mm(left, right));
}

Tensor total(const std::vector<Tensor>& parts, double factor, at::ScalarType dtype) {
    Tensor sum = parts[0];
    for (size_t i = 1; i < parts.size(); ++i) sum.add_(parts[i]);
    return sum.mul_(factor).to(dtype);
}

}  // namespace

std::tuple<Tensor, Tensor> factorized_linear(const Tensor& x, const Optional& b, const Optional& a,
                                             const Tensor& values, const Tensor& offsets,
                                             const Optional& bias, const Optional& scaling,
                                             double scale, int64_t tile_out, int64_t tile_in,
                                             int64_t block, bool keep_hidden) {
    const Linear linear(x, b, a, values, offsets, scaling, scale, tile_out, tile_in, block);
    const int64_t in = linear.tiling.in, out = linear.tiling.out;
    const Tensor x2 = x.reshape({-1, in}).contiguous();
    const int64_t tokens = x2.size(0);
    const Tensor y = at::empty({tokens, out}, x.options());
    const bool narrows = x.scalar_type() != linear.dtype;
    // Where h is kept its products are written where they stay; else each chunk has its own.
    const bool keep = keep_hidden && linear.b.defined();
    const Tensor hidden =
        keep ? at::empty({tokens, linear.a.size(0)}, x.options()) : at::empty({0}, x.options());
    const Tensor wide_bias = bias ? bias->to(linear.dtype) : Tensor();
    with_dtype(linear.dtype, [&](auto type) {
        using T = decltype(type);
        const auto rows = build_rows<accumulate_t<T>>(linear.tiling, values, offsets, false);
        Plan(tokens, linear).run([&](int64_t first, int64_t count) {
            const Tensor xs = x2.narrow(0, first, count).to(linear.dtype);
            Tensor ys = narrows ? at::empty({count, out}, xs.options()) : y.narrow(0, first, count);
            if (linear.b.defined()) {
                Tensor hs = keep && !narrows ? hidden.narrow(0, first, count)
                                             : at::empty({count, linear.a.size(0)}, xs.options());
                at::mm_out(hs, xs, linear.a.t());
                at::addmm_out(ys, ys, hs, linear.b.t(), 0, linear.scale);
                if (keep && narrows) hidden.narrow(0, first, count).copy_(hs);
            } else {
                ys.zero_();
            }
            if (bias) ys.add_(wide_bias);
            apply<T>(data<T>(xs), in, count, in, out, rows.view(), mutable_data<T>(ys));
            if (narrows) y.narrow(0, first, count).copy_(ys);
        });
    });
    auto shape = x.sizes().vec();
    shape.back() = out;
    return {y.view(shape), hidden};
}

std::vector<Tensor> factorized_linear_backward(const Tensor& dy, const Tensor& x, const Optional& b,
                                               const Optional& a, const Tensor& values,
                                               const Tensor& offsets, const Optional& hidden,
                                               const Optional& scaling, double scale,
                                               int64_t tile_out, int64_t tile_in, int64_t block,
                                               const c10::List<bool>& needs) {
    const Linear linear(x, b, a, values, offsets, scaling, scale, tile_out, tile_in, block);
    const int64_t in = linear.tiling.in, out = linear.tiling.out;
    const bool need_x = needs[0], need_values = needs[3], low_rank = linear.b.defined();
    const bool need_b = low_rank && (needs[1] || needs[4]), need_a = low_rank && needs[2];
    const Tensor x2 = x.reshape({-1, in}).contiguous(), dy2 = dy.reshape({-1, out}).contiguous();
    TORCH_CHECK_VALUE(x2.size(0) == dy2.size(0), "dy ", dy.sizes(), " and x ", x.sizes(),
                      " differ in tokens");
    if (hidden && low_rank)
        TORCH_CHECK_VALUE(hidden->dim() == 2 && hidden->size(0) == x2.size(0) &&
                              hidden->size(1) == linear.a.size(0),
                          "hidden ", hidden->sizes(), " is not x A^T of x ", x.sizes(), " and A ",
                          linear.a.sizes());
    const auto none = [&] { return at::empty({0}, x.options()); };
    const Tensor dx = need_x ? at::empty(x2.sizes(), x.options()) : none();
    const Tensor dvalues = need_values ? at::empty_like(values) : none();
    const bool narrows = x.scalar_type() != linear.dtype;
    const auto wide = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    const Plan plan(x2.size(0), linear);
    std::vector<Tensor> da(need_a ? plan.workers : 0), db(need_b ? plan.workers : 0);
    for (Tensor& sum : da) sum = at::zeros_like(linear.a, wide);
    for (Tensor& sum : db) sum = at::zeros_like(linear.b, wide);

    with_dtype(linear.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        const Rows<A> rows =
            need_values ? build_rows<A>(linear.tiling, values, offsets, false) : Rows<A>{};
        const Rows<A> columns =
            need_x ? build_rows<A>(linear.tiling, values, offsets, true) : Rows<A>{};
        const int64_t entries = rows.column.size();
        // One worker shares its chunks among all threads, in groups with a sum each.
        const int64_t groups = plan.workers > 1 ? 1 : std::min(threads(), most_workers);
        std::vector<A> sums(plan.workers * groups * entries);
        plan.run([&](int64_t first, int64_t count) {
            const int64_t worker = plan.workers > 1 ? at::get_thread_num() : 0;
            const Tensor xs = x2.narrow(0, first, count).to(linear.dtype);
            const Tensor dys = dy2.narrow(0, first, count).to(linear.dtype);
            Tensor dxs = !need_x   ? Tensor()
                         : narrows ? at::empty({count, in}, xs.options())
                                   : dx.narrow(0, first, count);
            if (need_b) {
                const Tensor hs = hidden ? hidden->narrow(0, first, count).to(linear.dtype)
                                         : at::mm(xs, linear.a.t());
                add_product(db[worker], dys.t(), hs);
            }
            if (low_rank && (need_x || need_a)) {
                Tensor dh = at::empty({count, linear.b.size(1)}, dys.options());
                at::addmm_out(dh, dh, dys, linear.b, 0, linear.scale);
                if (need_x) at::mm_out(dxs, dh, linear.a);
                if (need_a) add_product(da[worker], dh.t(), xs);
            } else if (need_x) {
                dxs.zero_();
            }
            const Samples<T> samples{data<T>(dys), data<T>(xs), out, in, count, in, out};
            if (need_x || need_values)
                apply_backward<T>(samples, rows.view(), columns.view(),
                                  need_x ? mutable_data<T>(dxs) : nullptr,
                                  need_values ? sums.data() + worker * groups * entries : nullptr,
                                  entries, groups);
            if (need_x && narrows) dx.narrow(0, first, count).copy_(dxs);
        });
        if (need_values)
            with_type(values, [&](auto stored) {
                using S = decltype(stored);
                if constexpr (std::is_same_v<accumulate_t<S>, A>)
                    add_groups<S>(sums.data(), plan.workers * groups, rows,
                                  mutable_data<S>(dvalues));
            });
    });

    Tensor ds = none();
    if (needs[4] && need_b) {
        for (size_t i = 1; i < db.size(); ++i) db[0].add_(db[i]);
        db.resize(1);
        const double slope =
            1 - linear.scale * linear.scale;  // of tanh, where the scale is trained
        ds = ((db[0] * linear.b).sum() * slope).reshape({1}).to(scaling->scalar_type());
    }
    return {dx.view(need_x ? x.sizes() : dx.sizes()),
            needs[1] && need_b ? total(db, linear.scale, x.scalar_type()) : none(),
            need_a ? total(da, 1, x.scalar_type()) : none(), dvalues, ds};
}

}  // namespace sltrain
