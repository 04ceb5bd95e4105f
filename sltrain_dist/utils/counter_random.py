"""Random numbers as pure functions of (key, counter).

A generator with state gives every rank, world size and resume another pattern unless all of them
replay the same draws. Here number i of a stream is a hash of (key, i): a rank computes just the
numbers it needs, in any order, on any device, and they are the same everywhere. The mixing function
is splitmix64 (Steele, Lea, Flood, OOPSLA 2014), computed in wrapping int64 arithmetic because torch
has no full set of uint64 operators.
"""

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_FEISTEL_ROUNDS = 4


def signed(word: int) -> int:
    """Reinterpret an unsigned 64-bit word as int64, which is what torch has."""
    word &= 0xFFFFFFFFFFFFFFFF
    return word - (1 << 64) if word >> 63 else word


def key(*parts: int | str) -> int:
    """Derive a 64-bit stream key from labels, e.g. ``key(seed, "model.layers.0.mlp.up_proj", "a")``."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix64(x: Tensor) -> Tensor:
    """The splitmix64 finaliser: a bijection of int64, element by element."""
    x = (x ^ _shift_right(x, 30)).mul_(signed(_MIX_1))
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(signed(_MIX_2))
    return x.bitwise_xor_(_shift_right(x, 31))


def hash64(key: int, index: Tensor) -> Tensor:
    """64 random bits for every counter in ``index`` (int64, any shape) under ``key``; int64."""
    return mix64(index * signed(_GOLDEN) + signed(key))


def below(bits: Tensor, bound: int) -> Tensor:
    """Map random 64-bit words to integers in [0, bound), bound <= 2**31, by the upper 32 bits (bias < bound/2**32)."""
    return _shift_right(bits, 32).mul_(bound) >> 32


def uniform(key: int, index: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, shape of ``index``."""
    return _shift_right(hash64(key, index), 11).double().mul_(2.0**-53)


def normal(key: int, index: Tensor) -> Tensor:
    """Standard normal numbers, float64, shape of ``index`` (Box-Muller on the two halves of one hash)."""
    bits = hash64(key, index)
    radius = (_shift_right(bits, 32).double() + 0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFFFFFF).double().mul_(2.0 * math.pi * 2.0**-32)
    return radius.mul_(angle.cos_())


def permute(key: int, index: Tensor, n: int) -> Tensor:
    """A keyed bijection of [0, n) evaluated at ``index`` (int64, every element in [0, n)).

    A Feistel network over the next even power of two, walked until it lands inside [0, n)
    (Black and Rogaway, CT-RSA 2002): no table of n entries is ever made.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"permute needs n >= 1, got {n}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    result = index.clone()
    pending = torch.arange(index.numel(), device=index.device)
    flat = result.view(-1)
    while pending.numel():
        x = flat[pending]
        left, right = x >> half, x & low
        for round_number in range(_FEISTEL_ROUNDS):
            digest = (right + signed(key + round_number * _GOLDEN)).mul_(signed(_MIX_1))
            digest = digest.bitwise_xor_(digest >> 32).mul_(signed(_MIX_2))
            left, right = right, _shift_right(digest, 64 - half).bitwise_xor_(left)
        x = (left << half) | right
        flat[pending] = x
        pending = pending[x >= n]
    return result
