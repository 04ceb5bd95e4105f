"""Bytes that one rank sends for one micro-batch, in closed form: for planning, and for docs/parallelism.md.

Ring algorithms: of a tensor of M bytes over g ranks an all-gather or a reduce-scatter sends (g-1)/g M a
rank, an all-reduce twice that. With n tokens a micro-batch, D model width, r rank, z bytes an element,
over t tensor-parallel ranks and d that shard, one decoder layer sends, forward and backward:

    activations      4 all-reduces of n D            8 (t-1)/t n D z
      with SP        4 all-gathers, 4 reduce-scatters, and 2 all-gathers where backward has the
                     input of a region again         10 (t-1)/t n D z
    factors          of each linear the one that is cut along r is gathered twice, and its gradient
                     reduce-scattered: 5 x r in + 2 x r out = 7 r D     21 (t-1)/t r D z
    norms, with SP   2 all-reduces of D              4 (t-1)/t D z
    FSDP2, ZeRO-3    2 all-gathers and a reduce-scatter of P trained elements, 2 all-gathers of the offsets
                                                     (d-1)/d (2 P z + P g + 2 offsets), divided by t

Where a block's forward runs again (checkpointing "block"), all of it but its last reduction: activations 2 (t-1)/t n D z
more, 3 with SP, factors 7 (t-1)/t r D z.

Under --method slope offsets include the second masks; every --mask_change_freq updates a rank gathers, once more, the
values and their positions.

(g: bytes of a gradient as it is reduced). What a tensor-parallel layer costs in activations does not
depend on the method; dense and pruned linears have no factors. Apart from layers: embedding, head and loss.
"""

from dataclasses import dataclass

from sltrain_dist.config import MethodConfig, ModelConfig


@dataclass(frozen=True)
class Situation:
    """What is sent depends on it.

    tokens: n of a micro-batch of one data-parallel rank. tensor: t. element: z, 2 in bfloat16.
    again: whether blocks' forward runs once more in backward.
    """

    tokens: int
    tensor: int
    sequence: bool
    element: int
    again: bool = False


@dataclass(frozen=True)
class LayerBytes:
    """Bytes a rank sends for one decoder layer and micro-batch, over the tensor-parallel group."""

    activations: float
    factors: float
    norms: float

    @property
    def total(self) -> float:
        return self.activations + self.factors + self.norms


def layer_bytes(config: ModelConfig, method: MethodConfig, situation: Situation) -> LayerBytes:
    """See the top of this file. Trained scales (4 bytes each) and biases are left out."""
    t, z, hidden = situation.tensor, situation.element, config.hidden_size
    share = (t - 1) / t
    passes = 10 if situation.sequence else 8
    gathers = 21
    if situation.again:
        passes += 3 if situation.sequence else 2
        gathers += 7
    factors = 0 if method.method in ("full", "slope") else gathers * method.rank * hidden
    norms = 4 * hidden if situation.sequence else 0
    return LayerBytes(
        passes * share * situation.tokens * hidden * z, share * factors * z, share * norms * z
    )


def ends_bytes(config: ModelConfig, situation: Situation) -> float:
    """Bytes a rank sends for embedding, final norm, head and loss of one micro-batch.

    Without sequence parallelism an all-reduce of n D after the embedding and one, in backward, before the
    head; with it an all-gather and a reduce-scatter in place of each; 3 fp32 numbers a token for the loss.
    """
    t, z, n = situation.tensor, situation.element, situation.tokens
    share = (t - 1) / t
    activations = 4 * n * config.hidden_size * z
    norm = 2 * config.hidden_size * z if situation.sequence else 0
    return share * (activations + norm) + (t - 1) * 3 * n * 4


def sharding_bytes(
    elements: float, indices: float, shards: int, tensor: int, element: int, gradient: int
) -> float:
    """Bytes a rank sends for a micro-batch where FSDP2 or ZeRO-3 shards the parameters.

    Args:
        elements: trained elements of what is counted (a layer, the model), over all ranks.
        indices: bytes of its offsets. shards: d. tensor: t.
        element, gradient: bytes of an element as it is gathered, and as its gradient is reduced.
    """
    gathered = 2 * (elements * element + indices)
    return (shards - 1) / shards * (gathered + elements * gradient) / tensor


def masks_bytes(values: float, positions: float, shards: int, tensor: int, element: int) -> float:
    """Bytes a rank sends where slope's second masks are chosen anew under FSDP2 or ZeRO-3 (parallel.masks).

    Args:
        values: kept weights of the model. positions: bytes of their packed offsets.
        shards: d. tensor: t. element: bytes of a weight as it is computed with.
    """
    return (shards - 1) / shards * (values * element + positions) / tensor
