"""The low-memory head: exact against torch, small, and keeping no hold on the weight."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from sltrain_dist.ops import cross_entropy
from sltrain_dist.ops.cross_entropy import (
    chunk_size,
    chunked_linear_cross_entropy,
    linear_cross_entropy,
    torch_linear_cross_entropy,
    workspace_bytes,
)

HAS_TORCH_OPERATOR = hasattr(functional, "linear_cross_entropy")


def problem(
    tokens: int, width: int, vocab: int, padded: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(padded, width, generator=generator) * 0.3
    weight[vocab:] = 0
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::7] = -100
    return hidden, weight.to(dtype).requires_grad_(), labels


def expected(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, upstream: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients by the plain formula in float64."""
    h = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    loss = functional.cross_entropy(h @ w[:vocab].t(), labels, reduction="sum")
    (loss * upstream).backward()
    assert h.grad is not None
    assert w.grad is not None
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("tokens", [1, 255, 700])
@pytest.mark.parametrize(("vocab", "padded"), [(128, 128), (1000, 1024)])
def test_equals_the_plain_formula(tokens: int, vocab: int, padded: int) -> None:
    hidden, weight, labels = problem(tokens, 24, vocab, padded)
    implementations: list[Callable[[], Tensor]] = [
        lambda: linear_cross_entropy(hidden, weight, labels, vocab),
        lambda: chunked_linear_cross_entropy(hidden, weight, labels, vocab),
    ]
    if HAS_TORCH_OPERATOR and vocab == padded:
        implementations.append(lambda: torch_linear_cross_entropy(hidden, weight, labels))
    loss, hidden_gradient, weight_gradient = expected(hidden, weight, labels, vocab, 0.125)
    for implementation in implementations:
        hidden.grad = weight.grad = None
        result = implementation()
        assert result.dtype == torch.float32
        (result * 0.125).backward()
        torch.testing.assert_close(result.detach().double(), loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden.grad.double(), hidden_gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weight.grad.double(), weight_gradient, rtol=1e-4, atol=1e-5)
        assert not weight.grad[vocab:].any()


def test_gradcheck_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MINIMUM_CHUNK", 2)
    monkeypatch.setattr(cross_entropy, "chunk_size", lambda *_: 2)
    hidden, weight, labels = problem(5, 3, 6, 8, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_linear_cross_entropy(h, w, labels, 6), (hidden, weight)
    )


def test_bfloat16_sums_in_float32() -> None:
    """A bfloat16 sum of 2000 losses could be wrong by a percent, gradients of 8 chunks likewise."""
    hidden, weight, labels = problem(2048, 32, 256, 256, torch.bfloat16)
    loss, hidden_gradient, weight_gradient = expected(hidden, weight, labels, 256, 1.0)
    result = linear_cross_entropy(hidden, weight, labels, 256)
    result.backward()
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.detach().double(), loss, rtol=1e-3, atol=0)
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    for found, exact in ((hidden.grad, hidden_gradient), (weight.grad, weight_gradient)):
        assert (found.double() - exact).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize("padded", [128, 256])
@pytest.mark.parametrize(("hidden_wants", "weight_wants"), [(True, False), (False, True)])
def test_only_the_gradients_asked_for(padded: int, hidden_wants: bool, weight_wants: bool) -> None:
    hidden, weight, labels = problem(40, 8, 128, padded)
    hidden.requires_grad_(hidden_wants)
    weight.requires_grad_(weight_wants)
    linear_cross_entropy(hidden, weight, labels, 128).backward()
    assert (hidden.grad is not None) == hidden_wants
    assert (weight.grad is not None) == weight_wants


@pytest.mark.parametrize("padded", [128, 256])
def test_without_gradient_none_is_formed(padded: int) -> None:
    hidden, weight, labels = problem(2000, 64, 128, padded)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels, 128).requires_grad
        peak = peak_bytes(lambda: linear_cross_entropy(hidden, weight, labels, 128))
    assert peak < 3 * chunk_size(2000, 64, 128) * padded * 4 + 2 * weight.numel() * 4


def test_nothing_valid_is_zero() -> None:
    hidden, weight, labels = problem(10, 8, 128, 128)
    labels.fill_(-100)
    for vocab in (128, 100):
        hidden.grad = weight.grad = None
        loss = linear_cross_entropy(hidden, weight, labels, vocab)
        loss.backward()
        assert loss == 0
        assert not hidden.grad.any()
        assert not weight.grad.any()


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that ``call`` holds at once, by the allocator's own events."""
    call()  # first-use allocations of libraries do not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    del kept
    events = recorded.profiler.kineto_results.events()
    sizes = [
        event.nbytes()
        for event in sorted(events, key=lambda event: event.start_ns())
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("dtype", "padded"),
    [(torch.float32, 8192), (torch.float32, 8320), (torch.bfloat16, 8192)],
    ids=["torch_operator", "ours_padded", "ours_bfloat16"],
)
def test_full_logits_never_exist(dtype: torch.dtype, padded: int) -> None:
    """Peak memory stays under the declared workspace, itself a fraction of the logits."""
    tokens, width, vocab = 2048, 64, 8192
    hidden, weight, labels = problem(tokens, width, vocab, padded, dtype)

    def step() -> None:
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, labels, vocab).backward()

    peak = peak_bytes(step)
    declared = workspace_bytes(tokens, width, padded, dtype, "cpu")
    logits = tokens * vocab * 4
    assert declared < logits / 4
    assert peak <= declared
    assert peak > declared / 3  # an estimate that is far too high would be useless for planning


@pytest.mark.parametrize("padded", [128, 256])
def test_no_weight_and_no_view_of_it_is_saved(padded: int) -> None:
    """Under ZeRO-3 the weight's storage is freed after forward and a saved view would pin it."""
    hidden, weight, labels = problem(300, 16, 128, padded)
    storages = []

    def pack(tensor: Tensor) -> Tensor:
        storages.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = linear_cross_entropy(hidden, weight, labels, 128)
    assert weight.untyped_storage().data_ptr() not in storages
    exact = expected(hidden, weight, labels, 128, 1.0)
    weight.data = torch.empty(0)  # what ZeRO-3 does between forward and backward ...
    weight.data = torch.full((padded, 16), torch.nan)  # ... and its hook gives it other memory
    loss.backward()
    torch.testing.assert_close(hidden.grad.double(), exact[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact[2], rtol=1e-4, atol=1e-5)


def test_retained_graph_gives_the_same_gradient_twice() -> None:
    hidden, weight, labels = problem(50, 8, 100, 128)
    loss = linear_cross_entropy(hidden, weight, labels, 100)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, second)


def test_chunks_follow_the_memory_of_the_hidden_states() -> None:
    assert chunk_size(8192, 4096, 32000) == 1152  # 8192 * 4096 / 32000, in steps of 128
    assert chunk_size(4096, 256, 32000) == 256
    assert chunk_size(100, 256, 32000) == 100
    assert chunk_size(100, 4096, 128) == 100
