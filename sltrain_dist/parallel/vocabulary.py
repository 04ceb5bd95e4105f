"""Embedding, output projection and loss with the vocabulary cut over tensor-parallel ranks.

Every rank holds P / t rows of the (padded) vocabulary matrix. An embedding is the sum of what the
ranks find, one of which has the row. The loss needs three numbers a token from every rank (the
largest of its logits, the sum of exponentials above it, the logit of the label): one gather of
3 x tokens numbers a chunk, never of logits.

Shapes: N tokens, D model width, V vocabulary, P >= V rows (a multiple of 128), t ranks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain_dist.ops.cross_entropy import IGNORED, chunk_size, scale_gradients
from sltrain_dist.ops.precision import compute_dtype, linear
from sltrain_dist.parallel.tensor import TensorParallel, all_gather


class ParallelVocabulary:
    """What a vocabulary matrix does on one rank.

    vocab_size: V; rows from there on are padding, wherever they are.
    """

    def __init__(self, tp: TensorParallel, vocab_size: int) -> None:
        self.tp, self.vocab_size = tp, vocab_size

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Tokens [B, T] and the rank's rows [P/t, D] -> activations between regions, [B, T or T/t, D]."""
        local = tokens - self.tp.rank * weight.shape[0]
        mine = (local >= 0) & (local < weight.shape[0])
        found = torch.nn.functional.embedding(local.where(mine, 0), weight)
        return self.tp.exit(found * mine.unsqueeze(-1).to(found.dtype))

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Activations between regions -> logits [B, T, V] on every rank; without gradient."""
        whole = self.tp.gather_features(linear(self.tp.enter(hidden), weight))
        return whole[..., : self.vocab_size]

    def loss(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """The sum of token losses (fp32 scalar, the same on every rank); labels [B, T], -100: ignored.

        As ops.cross_entropy.linear_cross_entropy, of the whole vocabulary.
        """
        flat = self.tp.enter(hidden).flatten(0, 1)
        needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        total: Tensor = _Loss.apply(flat, weight, labels.flatten(), self, needed)
        return total

    def own_rows(self, weight: Tensor) -> tuple[int, int]:
        """(first row, number of rows that are no padding) of this rank's part."""
        first = self.tp.rank * weight.shape[0]
        return first, max(0, min(self.vocab_size - first, weight.shape[0]))


class _Loss(torch.autograd.Function):
    """Loss and, for an incoming gradient of one, both gradients, chunk by chunk; see ops.cross_entropy.

    The gradient of ``hidden`` is this rank's part of a sum, which `TensorParallel.enter` adds up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocabulary: ParallelVocabulary,
        needed: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        compute = compute_dtype(hidden)
        first, rows = vocabulary.own_rows(weight)
        used = weight[:rows].to(compute)
        dhidden = torch.empty_like(hidden) if needed else None
        dweight = torch.zeros_like(weight, dtype=wide) if needed else None
        loss = hidden.new_zeros((), dtype=wide)
        size = chunk_size(hidden.shape[0], hidden.shape[1], vocabulary.vocab_size)
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            chunk = hidden[part].to(compute)
            logits = (chunk @ used.t()).to(wide)
            loss += _loss_and_gradient_in_place(logits, labels[part], first, vocabulary.tp)
            if dhidden is not None and dweight is not None:
                gradient = logits.to(compute)
                dhidden[part] = gradient @ used
                dweight[:rows] += gradient.t() @ chunk
                del gradient
            del logits
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        return *scale_gradients(hidden, weight, upstream, ctx.weight_dtype), None, None, None


def _loss_and_gradient_in_place(
    logits: Tensor, labels: Tensor, first: int, tp: TensorParallel
) -> Tensor:
    """Turn this rank's ``logits`` [n, rows] into d(sum of losses)/d(logits); return the sum over all ranks."""
    tokens, rows = logits.shape
    valid = labels != IGNORED
    local = labels - first
    mine = valid & (local >= 0) & (local < rows)
    if rows:
        target = local.where(mine, 0).unsqueeze(1)
        largest = logits.amax(dim=1)
        at_target = logits.gather(1, target).squeeze(1).where(mine, 0)
        logits.sub_(largest.unsqueeze(1)).exp_()
        above = logits.sum(dim=1)
    else:
        largest = logits.new_full((tokens,), -torch.inf)
        above = at_target = logits.new_zeros(tokens)
    parts = all_gather(torch.stack([largest, above, at_target]), tp.group).wait()
    top = parts[:, 0].amax(dim=0)
    total = (parts[:, 1] * (parts[:, 0] - top).exp()).sum(dim=0)
    loss = (total.log() + top - parts[:, 2].sum(dim=0)).where(valid, 0).sum()
    if rows:
        share = (largest - top).exp() / total
        logits.mul_((share * valid).unsqueeze(1))
        logits.scatter_add_(1, target, -mine.to(logits.dtype).unsqueeze(1))
    return loss
