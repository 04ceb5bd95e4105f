"""Choice of attention and norm: "auto" never fails, a missing named one is one clear line.

flash_attn and apex need CUDA and are not installed here; stand-ins with their published signatures
(flash_attn.flash_attn_func, apex.normalization.fused_layer_norm.fused_rms_norm_affine) check that
we call them as they are.
"""

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from sltrain_dist.model import backends
from sltrain_dist.model.backends import resolve_attention, resolve_norm
from sltrain_dist.utils.errors import UserError
from tests.model.small import SMALL, batch, filled, small

CPU = torch.device("cpu")


def test_auto_on_cpu_is_torch() -> None:
    assert resolve_attention("auto", CPU, torch.float32, 64) == "sdpa"
    assert resolve_attention("sdpa", CPU, torch.float32, 64) == "sdpa"
    assert resolve_norm("auto", CPU, torch.float32, 64) == "torch"
    assert resolve_norm("torch", CPU, torch.float32, 64) == "torch"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: resolve_attention("flash_attn", CPU, torch.bfloat16, 64),
            "--attention flash_attn: needs a CUDA GPU, this run is on cpu; or use --attention sdpa",
        ),
        (
            lambda: resolve_norm("apex", CPU, torch.float32, 64),
            "--norm apex: needs a CUDA GPU, this run is on cpu; or use --norm torch",
        ),
        (
            lambda: resolve_attention("xformers", CPU, torch.float32, 64),
            "--attention xformers: unknown; choose one of auto, sdpa, flash_attn",
        ),
        (
            lambda: resolve_attention("flash_attn", torch.device("cuda"), torch.float32, 64),
            "add --dtype bfloat16; or use --attention sdpa",
        ),
        (
            lambda: resolve_attention("flash_attn", torch.device("cuda"), torch.bfloat16, 288),
            "heads are at most 256 wide, the model's are 288",
        ),
    ],
)
def test_named_one_that_cannot_run_is_a_user_error(call: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_package_names_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    fault = backends._fault_of("flash_attn", "pip install flash-attn", _import_flash_attn)
    assert fault is not None
    assert "flash_attn" in fault
    assert "pip install flash-attn" in fault


def _import_flash_attn() -> torch.Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(None, None, None)


@pytest.fixture
def flash_attn_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    calls: list[dict[str, Any]] = []

    def flash_attn_func(  # signature of flash-attn 2.4.1 and later
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> torch.Tensor:
        """q [batch, seqlen, heads, width], k and v with fewer heads; written out, not SDPA."""
        calls.append({"causal": causal, "deterministic": deterministic, "shape": q.shape})
        groups = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -1e9).softmax(-1), v)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    backends._flash_attn_func.cache_clear()
    yield calls
    backends._flash_attn_func.cache_clear()


def test_flash_attn_is_called_with_its_own_layout(
    flash_attn_stand_in: list[dict[str, Any]],
) -> None:
    config = small(num_key_value_heads=2)
    tokens, _ = batch(config)
    logits = filled(config, attention="flash_attn")(tokens)
    torch.testing.assert_close(logits, filled(config, attention="sdpa")(tokens))
    assert len(flash_attn_stand_in) == config.num_hidden_layers
    call = flash_attn_stand_in[0]
    assert (call["causal"], call["deterministic"]) == (True, False)
    assert call["shape"] == (*tokens.shape, config.num_attention_heads, config.head_dim)


def test_apex_is_called_with_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Any] = []

    def fused_rms_norm_affine(
        input: torch.Tensor,
        weight: torch.Tensor,
        normalized_shape: torch.Size,
        eps: float = 1e-6,
        memory_efficient: bool = False,
    ) -> torch.Tensor:
        shapes.append(normalized_shape)
        return functional.rms_norm(input, normalized_shape, weight, eps)

    names = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm")
    modules = [types.ModuleType(name) for name in names]
    modules[2].fused_rms_norm_affine = fused_rms_norm_affine  # type: ignore[attr-defined]
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    backends._fused_rms_norm_affine.cache_clear()
    tokens, _ = batch(SMALL)
    logits = filled(SMALL, norm="apex")(tokens)
    backends._fused_rms_norm_affine.cache_clear()
    torch.testing.assert_close(logits, filled(SMALL)(tokens))
    assert shapes == [torch.Size([64])] * (2 * SMALL.num_hidden_layers + 1)
