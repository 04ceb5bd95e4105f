"""Updates inside the backward pass, one block at a time: the gradients of the whole model never exist.

FSDP2 reduces the gradients of a block as soon as its backward is done. When the last of them has come, in the
last micro-batch of an update, the block's weights are updated and its gradients are gone before the next
block's exist. Earlier micro-batches are added up in the sharded gradients, as ever.

What must be known before the first weight changes:

* the loss: where it is not finite on any rank, in any micro-batch, the update ends there and no weight changes;
* the gradient: a block's that is not finite on any rank leaves that block as it is, on all ranks, and is counted;
* the global norm, for clipping, cannot be known: ``error`` refuses to clip, ``block`` clips every block to the
  limit by its own norm, ``lagged`` all by the global norm of the last update that left no block alone (as ``block``
  until there is one).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sltrain_dist.parallel.mesh import Mesh, sum_over_all


class LayerUpdates:
    """When which parameters are updated.

    Args:
        units: names of trained parameters that are reduced together.
        update: updates the parameters of these names, given the norm that they are to be clipped by
            (None: by their own), and returns their norm, not finite where they were left alone.
    """

    def __init__(
        self,
        mesh: Mesh,
        units: list[list[str]],
        parameters: dict[str, DTensor],
        update: Callable[[list[str], float | None], float],
        lagged: bool,
    ) -> None:
        self._mesh, self._units, self._update, self._lagged = mesh, units, update, lagged
        self.last_norm: float | None = None  # of the update before
        self._last: bool  # this is the update's last micro-batch
        self._broken: bool  # a loss of this update was not finite
        self._reset()
        for number, names in enumerate(units):
            for name in names:
                hook = partial(self._arrived, number, name)
                parameters[name].register_post_accumulate_grad_hook(hook)

    def admit(self, loss: Tensor, last: bool) -> bool:
        """Whether to run the backward pass of this micro-batch: no more, once a loss was not finite."""
        self._last = last
        broken = sum_over_all(self._mesh, (~loss.detach().isfinite()).double())
        self._broken = self._broken or bool(broken.item())
        return not self._broken

    def finish(self) -> float:
        """The end of an update: the norm of the gradient of what was updated; NaN where nothing was."""
        broken = self._broken
        if not broken:  # what no loss has reached is updated with a zero gradient
            for number, missing in enumerate(self._missing):
                if missing:
                    self._update_unit(number)
        norm, left = math.sqrt(sum(self._squares)), len(self._units) - len(self._squares)
        self._reset()
        if broken or left == len(self._units):
            return math.nan
        if not left:  # the norm of a part would let the next update go too far
            self.last_norm = norm
        return norm

    def _reset(self) -> None:
        self._last = self._broken = False
        self._missing = [set(names) for names in self._units]
        self._squares: list[float] = []

    def _arrived(self, number: int, name: str, parameter: Tensor) -> None:
        if not self._last:
            return
        missing = self._missing[number]
        missing.discard(name)
        if not missing:
            _on_default_stream(self._mesh.device, partial(self._update_unit, number))

    def _update_unit(self, number: int) -> None:
        names = self._units[number]
        self._missing[number] = set()
        norm = self._update(names, self.last_norm if self._lagged else None)
        if math.isfinite(norm):
            self._squares.append(norm * norm)


def _on_default_stream(device: torch.device, action: Callable[[], None]) -> None:
    """Run ``action`` in order with what is queued now and with what comes after.

    FSDP2 calls hooks on its own stream; bitsandbytes' kernels, and the next forward pass, are on the default one.
    """
    if device.type != "cuda":
        action()
        return
    here, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(here)
    with torch.cuda.stream(default):
        action()
    here.wait_stream(default)
