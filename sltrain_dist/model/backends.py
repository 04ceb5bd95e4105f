"""Which implementation of attention and RMSNorm runs: chosen once at start, by name or "auto".

The choice is made before the model is built (which happens on the meta device), so that the summary
can print it and a named back end that cannot run stops the run at once. flash_attn and apex are
optional and imported here only when they are asked for.

Shapes: B batch, T tokens, S keys (T, or more with a cache), H heads, K key/value heads (divides H), Dh width
of a head, D model width.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sltrain_dist.ops import pointwise
from sltrain_dist.utils.errors import UserError

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
NormFunction = Callable[[Tensor, Tensor, float], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch: q [B, T, H, Dh], k and v [B, S, K, Dh] -> [B, T, H, Dh].

    Queries are the last T of S positions: each sees the keys up to its own.
    """
    new, seen = q.shape[1], k.shape[1]
    is_square = new == seen  # torch's own mask counts from the first key: right for these alone
    mask = None
    if not is_square and new > 1:
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_square,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by the flash-attn package; as ``sdpa`` (its mask counts from the last key), bfloat16 on CUDA."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    out: Tensor = _flash_attn_func()(q, k, v, causal=True, deterministic=deterministic)
    return out


@cache
def _flash_attn_func() -> Callable[..., Any]:
    from flash_attn import flash_attn_func

    function: Callable[..., Any] = flash_attn_func
    return function


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension: on CUDA torch's fused kernel, which keeps x and 1 / rms(x)
    for backward; elsewhere torch has a composition that keeps two to four times as much, and ours runs.
    """
    if x.device.type == "cuda":
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return pointwise.rms_norm(x, weight, eps)


def apex_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same by NVIDIA apex's fused kernel."""
    out: Tensor = _fused_rms_norm_affine()(x, weight, weight.shape, eps)
    return out


@cache
def _fused_rms_norm_affine() -> Callable[..., Any]:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    function: Callable[..., Any] = fused_rms_norm_affine
    return function


ATTENTION: dict[str, AttentionFunction] = {"sdpa": sdpa, "flash_attn": flash_attn}
NORM: dict[str, NormFunction] = {"torch": torch_norm, "apex": apex_norm}


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The attention back end that will run: a key of ``ATTENTION``.

    Args:
        name: "auto" (flash_attn where it works, else sdpa) or a key of ``ATTENTION``.
        device, dtype: where and in which format attention computes (not the master weights').
        head_dim: width of a head.

    Raises:
        UserError: the named back end is unknown or cannot run here.
    """
    return _resolve(
        "--attention", name, tuple(ATTENTION), lambda: _flash_attn_fault(device, dtype, head_dim)
    )


def resolve_norm(name: str, device: torch.device, dtype: torch.dtype, hidden_size: int) -> str:
    """The RMSNorm back end that will run: a key of ``NORM``; arguments as ``resolve_attention``.

    Raises:
        UserError: the named back end is unknown or cannot run here.
    """
    return _resolve("--norm", name, tuple(NORM), lambda: _apex_fault(device, dtype, hidden_size))


def _resolve(flag: str, name: str, rows: tuple[str, ...], fault: Callable[[], str | None]) -> str:
    """``rows`` is (the one that always works, the optional one); ``fault`` says why the latter fails."""
    always, optional = rows
    if name == always:
        return always
    if name not in ("auto", optional):
        raise UserError(f"{flag} {name}: unknown; choose one of auto, {', '.join(rows)}")
    problem = fault()
    if problem is None:
        return optional
    if name == "auto":
        return always
    raise UserError(f"{flag} {name}: {problem}; or use {flag} {always}")


def _flash_attn_fault(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why flash_attn cannot run here, with the mend; None when a small call went through."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, this run is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16, this run in {str(dtype).removeprefix('torch.')}: add --dtype bfloat16"
    if head_dim > 256:
        return f"heads are at most 256 wide, the model's are {head_dim}"
    probe = torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype)
    install = "pip install flash-attn --no-build-isolation"
    return _fault_of("flash_attn", install, lambda: flash_attn(probe, probe, probe))


def _apex_fault(device: torch.device, dtype: torch.dtype, hidden_size: int) -> str | None:
    """Why apex cannot run here, with the mend; None when a small call went through."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, this run is on {device.type}"
    probe = torch.ones(1, hidden_size, device=device, dtype=dtype)
    install = "build https://github.com/NVIDIA/apex with its CUDA extensions"
    return _fault_of("apex", install, lambda: apex_norm(probe, probe[0], 1e-6))


def _fault_of(package: str, install: str, call: Callable[[], Tensor]) -> str | None:
    """Import and call ``package`` once: a wheel for another torch or GPU fails only when used."""
    try:
        call()
    except ModuleNotFoundError as error:
        return f"{error.name or package} is not installed: {install}"
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"{package} is installed but does not work ({reason[0]}): {install}"
    return None
