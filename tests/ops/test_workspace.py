"""The memory that the composed path takes while it runs: what the planner counts on."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sltrain_dist.ops import composed
from tests.ops.problem import KINDS, problem


class PeakBytes(TorchDispatchMode):
    """Counts bytes of live storages that operators make, as a memory profiler would."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor.untyped_storage())
        return result

    def follow(self, storage):
        pointer, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or pointer in self.known:
            return
        self.known.add(pointer)
        self.live += size
        self.peak = max(self.peak, self.live)

        def released():
            self.live -= size
            self.known.discard(pointer)

        weakref.finalize(storage, released)


@pytest.mark.parametrize("kind", KINDS)
def test_workspace_is_as_declared(kind):
    """W is released before dW is made, and dW is made in panels: the planner relies on the declared bytes."""
    out, in_, rank = 2048, 512, 32
    support, offsets, leaves = problem(kind, out, in_, rank, tokens=(16,), dtype=torch.float32)
    plain = {name: leaf.detach() for name, leaf in leaves.items()}
    tiles = support.tiles
    declared = composed.workspace_bytes(out, in_, offsets.numel(), tiles, 4, rank)
    arguments = (plain["b"], plain["a"], plain["values"], offsets)
    constants = (0.5, tiles.tile_out, tiles.tile_in, tiles.block)
    before = {t.untyped_storage().data_ptr() for t in [*plain.values(), offsets]}
    with PeakBytes() as forward:
        forward.known |= before
        composed.composed_linear._init_fn(plain["x"], *arguments, None, None, *constants)
    with PeakBytes() as backward:
        backward.known |= before
        composed.composed_linear_backward._init_fn(
            torch.randn(16, out), plain["x"], *arguments, None, *constants, [True] * 4 + [False]
        )
    results = 4 * (16 * in_ + out * rank + rank * in_ + plain["values"].numel()) + 2 * 4 * 16 * out
    w = out * in_ * 4
    assert w < forward.peak <= declared["forward"] + results
    assert w < backward.peak <= declared["backward"] + results
    assert backward.peak < 1.9 * w, "W and dW were alive together"
