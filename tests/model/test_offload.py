"""--offload_activations: same gradients, one block ahead, no parameter moved, nothing left behind.

Without a GPU the host is where tensors are anyway, so the tests declare the "device" to be elsewhere: then every
tensor is really copied, kept as its copy alone, and copied back. Streams alone are not seen here.
"""

import pytest
import torch

from sltrain_dist.model import offload
from tests.model.small import SLTRAIN, batch, filled, small


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every copy, in order: "out BLOCK" and "back BLOCK"."""
    log: list[str] = []
    move, fetch = offload.HostStore._move, offload.HostStore._fetch

    def logged_move(store, tensor):
        found = move(store, tensor)
        log.append(f"out {found.block}")
        return found

    def logged_fetch(store, kept):
        log.append(f"back {kept.block}")
        fetch(store, kept)

    monkeypatch.setattr(offload, "_elsewhere", lambda tensor: tensor.numel() > 48 * 16)
    monkeypatch.setattr(offload.HostStore, "_move", logged_move)
    monkeypatch.setattr(offload.HostStore, "_fetch", logged_fetch)
    return log


def gradients(**settings):
    model = filled(small(num_hidden_layers=3), SLTRAIN, **settings)
    model(*batch(small())).backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_the_same_gradients(checkpointing, moved):
    expected = gradients(checkpointing=checkpointing)
    assert not moved
    found = gradients(checkpointing=checkpointing, offload=True)
    assert moved
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_block_inputs_come_back_one_block_ahead(moved):
    gradients(checkpointing="block", offload=True)
    assert moved == ["out 0", "out 1", "out 2", "back 2", "back 1", "back 0"]
    seen, real = [], offload.HostStore._unpack

    def unpack(store, packed):
        seen.append(len([line for line in moved if line.startswith("back")]))
        return real(store, packed)

    moved.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload.HostStore, "_unpack", unpack)
        gradients(checkpointing="block", offload=True)
    # x, cos and sin of a block; when block 1 asks, its input is already on the way
    assert seen[0] == 0
    assert 2 in seen[3:6]


def test_each_storage_travels_once_and_no_parameter(moved):
    """Per token 4 D + 2 Q + 2 KV + 3 F (tests/model/test_saved.py), here in 11 tensors a block; with h 7 more."""
    gradients(offload=True)
    per_block = [moved.count(f"out {index}") for index in range(3)]
    assert per_block == [11, 11, 11]
    assert [moved.count(f"back {index}") for index in range(3)] == per_block


def test_host_memory_ends_with_backward(moved, monkeypatch):
    """Although the graph's nodes live on: the loss is still there."""
    import weakref

    alive: weakref.WeakSet = weakref.WeakSet()
    create = offload._Moved.__init__

    def watched(self, *arguments):
        alive.add(self)
        create(self, *arguments)

    monkeypatch.setattr(offload._Moved, "__init__", watched)
    model = filled(small(), SLTRAIN, offload=True)
    loss = model(*batch(small()))
    assert len(alive) == 22
    loss.backward()
    assert loss.grad_fn is not None
    assert len(alive) == 0


def test_on_a_cpu_nothing_moves():
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        gradients(offload=True)
    assert not offload._elsewhere(torch.empty(1 << 22))


def test_without_gradient_nothing_is_kept(moved):
    model = filled(small(), SLTRAIN, offload=True)
    with torch.no_grad():
        model(*batch(small()))
    assert not moved
