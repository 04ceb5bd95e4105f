"""Arithmetic cost of one token, in closed form: for planning, and for MFU while training.

Only matrix products count (2 operations per multiply-add); norms, softmax and rotations are memory
traffic. Per linear with out x in weights, rank r, density d, n tokens per pass (DESIGN section 4):

    full                  forward 2 out in                          both  6 out in
    low_rank              forward 2 r (out + in)                    both  6 r (out + in)
    sltrain, composed     forward 2 out in + 2 r out in / n         both  6 out in + 8 r out in / n
    sltrain, factorized   forward 2 r (out + in) + 2 d out in       both  6 r (out + in) + 6 d out in [+ 2 r in]
    sltrain, needed       forward 2 r (out + in) + 2 d out in       both  6 r (out + in) + 6 d out in
    slope, as computed    forward 2 out in                          both  6 out in
    slope, needed         forward 2 p out in                        both  (4 p + 2 q) out in

(composed builds W = B A + S once per forward and again in backward, and forms dB and dA from dW;
factorized counts x A^T again in backward, as it is where it is not kept; needed is what no implementation can do without;
p = N/M, and q is what the second pruning leaves, expected of random weights: 0.406 for 2:4. Long and thin matrices stay dense.)
Attention adds 4 T H Dh in forward and twice that in backward for T tokens per sample; kernels that
recompute the scores in backward do 2 T H Dh more, which is not counted. The head adds 6 D V.
"""

import collections
from dataclasses import dataclass, replace
from typing import Literal

from sltrain_dist.config import Checkpointing, MethodConfig, ModelConfig
from sltrain_dist.params.slope import layer_pattern, stays_dense

Path = Literal["composed", "factorized", "needed"]


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: float) -> "Flops":
        """The cost of ``count`` such things."""
        return Flops(count * self.forward, count * self.backward)


def linear_flops(
    out_features: int, in_features: int, method: MethodConfig, path: Path, tokens: float
) -> Flops:
    """One linear, per token; ``tokens`` is n, over which composing W is spread."""
    dense = 2.0 * out_features * in_features
    factors = 2.0 * method.rank * (out_features + in_features)
    if method.method == "full":
        return Flops(dense, 2 * dense)
    if method.method == "slope":
        if path != "needed" or stays_dense(out_features, in_features):
            return Flops(dense, 2 * dense)
        pattern = layer_pattern(method.pattern, None)
        return Flops(pattern.density * dense, (pattern.density + pattern.density_twice) * dense)
    if method.method == "low_rank":
        return Flops(factors, 2 * factors)
    if path != "composed":
        sampled = factors + method.density * dense
        again = 2.0 * method.rank * in_features if path == "factorized" else 0.0
        return Flops(sampled, 2 * sampled + again)
    compose = method.rank * dense / tokens
    return Flops(dense + compose, 2 * dense + 3 * compose)


def flops_per_token(
    config: ModelConfig,
    method: MethodConfig,
    sequence_length: int,
    *,
    tokens: int,
    path: Path = "composed",
    checkpointing: Checkpointing = "none",
) -> Flops:
    """What the machine does per token, at physical (padded) widths, recomputation included.

    Args:
        sequence_length: tokens per sample.
        tokens: tokens per pass of one rank (batch size times sequence length).
        path: how sltrain linears are computed.
        checkpointing: "block" runs the forward of all blocks a second time in backward; "selective" no product.
    """
    width = config.padded_intermediate_size
    blocks = _all_blocks(config, method, width, sequence_length, path, tokens)
    if checkpointing == "block":
        blocks += Flops(0.0, blocks.forward)
    return blocks + _head_flops(config)


def model_flops_per_token(config: ModelConfig, method: MethodConfig, sequence_length: int) -> Flops:
    """What the method needs per token whatever computes it: the numerator of MFU.

    Logical widths, nothing recomputed, only the causal half of attention, and for sltrain the two
    products apart (composed linears do more, and their MFU is lower for it). The dense
    model's count is not used: it would credit sltrain with work that it does not need.
    """
    pairs = (sequence_length + 1) / 2
    blocks = _all_blocks(config, method, config.intermediate_size, pairs, "needed", 1)
    return blocks + _head_flops(config)


def _all_blocks(
    config: ModelConfig,
    method: MethodConfig,
    width: int,
    attended: float,
    path: Path,
    tokens: float,
) -> Flops:
    """All decoder blocks, whose patterns may differ under slope; arguments as of `_block_flops`."""
    layers = range(config.num_hidden_layers)
    alike = collections.Counter(str(layer_pattern(method.pattern, layer)) for layer in layers)
    total = Flops(0.0, 0.0)
    for pattern, count in alike.items():
        of_layer = replace(method, pattern=pattern)
        total += _block_flops(config, of_layer, width, attended, path, tokens).times(count)
    return total


def _block_flops(
    config: ModelConfig,
    method: MethodConfig,
    width: int,
    attended: float,
    path: Path,
    tokens: float,
) -> Flops:
    """One decoder block, ``width`` its MLP's, ``attended`` the mean number of keys per query."""
    hidden = config.hidden_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    shapes = [(query, hidden), (key, hidden), (key, hidden), (hidden, query)]
    shapes += [(width, hidden), (width, hidden), (hidden, width)]
    scores = 4.0 * attended * query
    total = Flops(scores, 2 * scores)
    for out_features, in_features in shapes:
        total += linear_flops(out_features, in_features, method, path, tokens)
    return total


def _head_flops(config: ModelConfig) -> Flops:
    dense = 2.0 * config.hidden_size * config.vocab_size
    return Flops(dense, 2 * dense)
