// Keyed random supports: splitmix64 counters, Floyd's sampling and a Feistel permutation.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "operators.h"

namespace sltrain {
namespace {

constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
constexpr uint64_t mix_1 = 0xBF58476D1CE4E5B9u;
constexpr uint64_t mix_2 = 0x94D049BB133111EBu;
constexpr int feistel_rounds = 4;

uint64_t hash64(uint64_t key, uint64_t index) {
    uint64_t x = index * golden + key;
    x = (x ^ (x >> 30)) * mix_1;
    x = (x ^ (x >> 27)) * mix_2;
    return x ^ (x >> 31);
}

// A keyed bijection of [0, size) at `index`: Feistel over 2 * half bits, walked until inside.
uint64_t permute(uint64_t key, uint64_t index, uint64_t size, int half) {
    const uint64_t low = (uint64_t{1} << half) - 1;
    do {
        uint64_t left = index >> half, right = index & low;
        for (int round = 0; round < feistel_rounds; ++round) {
            uint64_t digest = (right + key + round * golden) * mix_1;
            // The shift is arithmetic, as int64 has it in the reference.
            digest ^= static_cast<uint64_t>(static_cast<int64_t>(digest) >> 32);
            digest *= mix_2;
            const uint64_t mixed = (digest >> (64 - half)) ^ left;
            left = right;
            right = mixed;
        }
        index = (left << half) | right;
    } while (index >= size);
    return index;
}

template <typename T>
void distinct(uint64_t key, const int64_t* tiles, int64_t rows, int64_t bound, int64_t count,
              T* out) {
    at::parallel_for(0, rows, 1 << 12, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            T* chosen = out + row * count;
            for (int64_t j = 0; j < count; ++j) {
                const uint64_t top = bound - count + j;
                const uint64_t bits = hash64(key, static_cast<uint64_t>(tiles[row] * count + j));
                T draw = static_cast<T>(((bits >> 32) * (top + 1)) >> 32);
                if (std::find(chosen, chosen + j, draw) != chosen + j) draw = static_cast<T>(top);
                chosen[j] = draw;
            }
            std::sort(chosen, chosen + count);
        }
    });
}

}  // namespace

Tensor distinct_offsets(int64_t key, const at::Tensor& tiles, int64_t bound, int64_t count) {
    TORCH_CHECK_TYPE(tiles.scalar_type() == at::kLong, "tiles are ", tiles.scalar_type(),
                     ", not int64");
    TORCH_CHECK_VALUE(tiles.dim() == 1 && tiles.is_contiguous(), "tiles are ", tiles.sizes(),
                      ", not one dense line");
    TORCH_CHECK_VALUE(0 <= count && count <= bound && bound <= 32768, "count ", count, " of ",
                      bound, " positions");
    const auto dtype = bound <= 256 ? at::kByte : at::kShort;
    at::Tensor result = at::empty({tiles.numel(), count}, tiles.options().dtype(dtype));
    const auto* from = tiles.const_data_ptr<int64_t>();
    if (dtype == at::kByte)
        distinct(key, from, tiles.numel(), bound, count, result.mutable_data_ptr<uint8_t>());
    else
        distinct(key, from, tiles.numel(), bound, count, result.mutable_data_ptr<int16_t>());
    return result;
}

void sample_positions(const Tensor& positions, int64_t key, int64_t size) {
    TORCH_CHECK_TYPE(positions.scalar_type() == at::kInt, "positions are ", positions.scalar_type(),
                     ", not int32");
    const int64_t count = positions.numel();
    TORCH_CHECK_VALUE(positions.is_contiguous() && count <= size && size <= INT32_MAX, "count ",
                      count, " of ", size, " positions");
    int bits = 0;
    while (bits < 63 && ((size - 1) >> bits) > 0) ++bits;
    const int half = std::max(1, (bits + 1) / 2);
    // One bit for every position: reading them in order sorts.
    std::vector<std::atomic<uint64_t>> taken((size + 63) / 64);
    at::parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const uint64_t position = permute(key, i, size, half);
            taken[position / 64].fetch_or(uint64_t{1} << (position % 64),
                                          std::memory_order_relaxed);
        }
    });
    auto* to = positions.mutable_data_ptr<int32_t>();
    for (size_t word = 0; word < taken.size(); ++word)
        for (uint64_t rest = taken[word].load(std::memory_order_relaxed); rest; rest &= rest - 1)
            *to++ = static_cast<int32_t>(word * 64 + __builtin_ctzll(rest));
}

}  // namespace sltrain
