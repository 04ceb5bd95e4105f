"""Activation checkpointing "selective": outputs that are cheap to have again are forgotten between forward and backward.

A norm's output is kept by the linears that take it, silu(gate) * up by the linear after it: 2 D + F
numbers a token and block that are a few operations each away from what is kept anyway. Their
memory is given back once their users have run, and filled again when the gradient of the users' result
arrives, as Megatron-LM does it (core/tensor_parallel/random.py, CheckpointWithoutOutput).

Not torch's selective checkpointing, a policy over the operators of a recomputed block: that runs the whole block
a second time, collectives of tensor parallelism included, with Python between all of its operators; it keeps
down's output, which nobody needs, and on a CPU the float32 results of bfloat16 products.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


def forget(output: Tensor, again: Callable[[], Tensor], until: Tensor) -> None:
    """Free the memory of ``output``, whose users have run, until the gradient of ``until`` is there.

    Every alias of ``output`` that was saved for backward is empty meanwhile, and is filled with it.

    Args:
        output: owns its memory, all of it.
        again: computes the same values, without gradient.
        until: what was made of ``output``: its gradient comes before that of any user.
    """
    if not (torch.is_grad_enabled() and until.requires_grad):
        return
    until.register_hook(_Forgotten(output.detach(), again).fill)
    output.untyped_storage().resize_(0)


class _Forgotten:
    """One forgotten tensor; filled once, and then not held here: its memory ends with the last user."""

    def __init__(self, output: Tensor, again: Callable[[], Tensor]) -> None:
        self._source: tuple[Tensor, Callable[[], Tensor]] | None = (output, again)
        self._bytes = output.untyped_storage().nbytes()

    def fill(self, _: Tensor) -> None:
        """A hook of a gradient, which stays as it is."""
        if self._source is None:  # backward runs a second time over a kept graph
            return
        output, again = self._source
        self._source = None
        with torch.no_grad():
            values = again()
            output.untyped_storage().resize_(self._bytes)
            # the same values as before: what was saved of it has not been changed
            with _unsafe_preserve_version_counter(output):
                output.copy_(values)
