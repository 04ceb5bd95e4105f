"""Sum of token losses straight from hidden states: the logits of all tokens never exist at once.

For a vocabulary of 32000 the logits [N, V] and their gradient are by far the largest tensors of a
small model. Here the tokens are cut into chunks; each chunk's logits are turned into its loss and
its gradients on the spot and their memory is reused. Because the loss is a plain sum, the gradients
are known up to the incoming scalar, so they are formed in forward (no logits are computed twice)
and backward only scales them.

Shapes: N tokens, D model width, V vocabulary, P >= V rows of the weight (padded vocabulary).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain_dist.ops.precision import compute_dtype

IGNORED = -100  # label of a token that takes no part in the loss
MINIMUM_CHUNK = 256  # tokens; fewer starve the matrix product


def chunk_size(tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Tokens per chunk: one chunk's logits take about the memory of the hidden states [N, D]."""
    balanced = -(-tokens * hidden_size // vocab_size)
    return max(1, min(tokens, max(MINIMUM_CHUNK, -(-balanced // 128) * 128)))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Sum over tokens of the cross entropy of ``hidden @ weight[:vocab_size].T``.

    torch's own chunked operator is used where it computes the same thing: float32 (it returns the
    loss in the input's dtype, and a bfloat16 sum has three digits), no padded rows, eager mode.
    Neither implementation keeps the weight, or a view of it, for backward: under ZeRO-3 a saved
    view would pin the gathered weight, and the weight's storage is gone by then.

    Args:
        hidden: [N, D], float32, bfloat16 or float64.
        weight: [P, D], same dtype; rows from ``vocab_size`` on are padding and get zero gradient.
        labels: [N] int64 in [0, vocab_size), or -100 for a token that is ignored.
        vocab_size: V, at most P.

    Returns:
        Scalar, float32 (float64 for float64 input).
    """
    if _torch_operator_fits(hidden, weight, vocab_size):
        return torch_linear_cross_entropy(hidden, weight, labels)
    return chunked_linear_cross_entropy(hidden, weight, labels, vocab_size)


def _torch_operator_fits(hidden: Tensor, weight: Tensor, vocab_size: int) -> bool:
    return (
        hasattr(torch.nn.functional, "linear_cross_entropy")
        and hasattr(torch.nn, "LinearCrossEntropyOptions")
        and hidden.dtype == weight.dtype == torch.float32
        and weight.shape[0] == vocab_size
        and hidden.shape[0] > 0
        and not torch.compiler.is_compiling()
    )


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's chunked operator (torch 2.13 and later), float32, unpadded vocabulary.

    The chunk is ours: torch's own choice ([N, D] / 2) is 32 tokens for a narrow model, five times
    slower on CPU. Policy "accurate" adds one [V, D] workspace and is the fast one on CPU; "compact"
    has none and is what torch recommends on CUDA.
    """
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=chunk_size(hidden.shape[0], hidden.shape[1], weight.shape[0]),
        acc_policy="accurate" if hidden.device.type == "cpu" else "compact",
    )
    loss: Tensor = torch.nn.functional.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", ignore_index=IGNORED, options=options
    )
    return loss


def chunked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int
) -> Tensor:
    """Our implementation: any dtype, padded vocabulary, weight gradient summed in float32.

    Arguments and result as ``linear_cross_entropy``.
    """
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _ChunkedLinearCrossEntropy.apply(
        hidden, weight, labels, vocab_size, with_gradient
    )
    return loss


def workspace_bytes(
    tokens: int, hidden_size: int, padded_vocab_size: int, dtype: torch.dtype, device_type: str
) -> int:
    """Bytes that one call allocates at its peak beyond its arguments, gradients included.

    An upper bound that fits both implementations; tested against the allocator.
    """
    chunk = chunk_size(tokens, hidden_size, padded_vocab_size)
    weight_numel = padded_vocab_size * hidden_size
    # gradients of weight and hidden, and a few numbers per token
    needed = 4 * weight_numel + tokens * (hidden_size * dtype.itemsize + 32)
    if device_type == "cpu" or dtype == torch.float32:
        # a second [P, D]: torch's workspace, or the bfloat16 weight widened, or the scaled gradient
        return needed + 4 * weight_numel + 4 * chunk * (padded_vocab_size + 3 * hidden_size)
    logits = chunk * padded_vocab_size * (4 + dtype.itemsize)
    return needed + weight_numel * dtype.itemsize + logits


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Loss and, for an incoming gradient of one, both gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        with_gradient: bool,
    ) -> Tensor:
        hidden_gradient = (
            torch.empty_like(hidden) if with_gradient and ctx.needs_input_grad[0] else None
        )
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        weight_gradient = (
            torch.zeros_like(weight, dtype=accumulate)
            if with_gradient and ctx.needs_input_grad[1]
            else None
        )
        loss = hidden.new_zeros((), dtype=accumulate)
        compute = compute_dtype(hidden)
        used = weight[:vocab_size].to(compute)
        size = chunk_size(hidden.shape[0], hidden.shape[1], vocab_size)
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            chunk = hidden[part].to(compute)
            logits = (chunk @ used.t()).to(accumulate)
            loss += _loss_and_gradient_in_place(logits, labels[part])
            if with_gradient:
                gradient = logits.to(compute)
                if hidden_gradient is not None:
                    hidden_gradient[part] = gradient @ used
                if weight_gradient is not None:
                    total = weight_gradient[:vocab_size]
                    if compute == accumulate:  # not addmm_: torch's flop counter misses it
                        torch.addmm(total, gradient.t(), chunk, out=total)
                    else:
                        total += gradient.t() @ chunk
                del gradient
            del logits  # else two chunks' logits live while the next one is computed
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        return *scale_gradients(hidden, weight, upstream, ctx.weight_dtype), None, None, None


def scale_gradients(
    hidden: Tensor | None, weight: Tensor | None, upstream: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients found in forward, times the incoming scalar; the weight's in the weight's dtype."""
    if hidden is not None:
        hidden = hidden * upstream.to(hidden.dtype)
    if weight is not None:
        # written straight in the weight's dtype: no second float32 copy of [P, D]
        weight = torch.mul(weight, upstream, out=torch.empty_like(weight, dtype=weight_dtype))
    return hidden, weight


def _loss_and_gradient_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """Turn ``logits`` [n, V] into d(sum of losses)/d(logits) = softmax - onehot; return the sum."""
    valid = (labels != IGNORED).unsqueeze(1)
    target = labels.unsqueeze(1).where(valid, 0)
    logits -= logits.amax(dim=1, keepdim=True)
    at_target = logits.gather(1, target)
    normalizer = logits.exp_().sum(dim=1, keepdim=True)
    loss = (normalizer.log() - at_target).where(valid, 0).sum()
    logits *= valid / normalizer
    logits.scatter_(1, target, logits.gather(1, target) - valid.to(logits.dtype))
    return loss
