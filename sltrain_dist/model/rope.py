"""Rotary position embedding and the scaling rules of HF's LLaMA config.

Angles are recomputed from the config in every forward, in float32, on the device of the tokens: a
dozen tiny kernels a step. No buffer and no cache, so there is nothing that meta initialisation,
a cast to bfloat16, FSDP2 or DeepSpeed (which broadcasts parameters but no buffers) could spoil.

Shapes: T positions, Dh width of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.config import ModelConfig
from sltrain_dist.utils.errors import UserError

# rope_type -> settings that must be present in rope_scaling
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def validate_rope(config: ModelConfig) -> None:
    """Refuse a rope scaling that this model cannot compute.

    Raises:
        UserError: unknown rope_type, a setting missing, a partial rotation, an odd head_dim.
    """
    scaling = config.rope_scaling or {}
    kind = _kind(scaling)
    if kind not in SCALINGS:
        known = ", ".join(SCALINGS)
        raise UserError(
            f"--model_config {config.name}: rope_type {kind!r} is not supported; known: {known}"
        )
    missing = [key for key in SCALINGS[kind] if scaling.get(key) is None]
    if missing:
        raise UserError(
            f"--model_config {config.name}: rope_type {kind!r} lacks {', '.join(missing)}; "
            "add it to rope_scaling"
        )
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"--model_config {config.name}: partial_rotary_factor is not supported; remove it"
        )
    if config.head_dim % 2:
        raise UserError(
            f"--model_config {config.name}: head_dim {config.head_dim} is odd; rotation needs pairs"
        )
    for key in ("short_factor", "long_factor"):
        if kind == "longrope" and len(scaling[key]) != config.head_dim // 2:
            raise UserError(
                f"--model_config {config.name}: rope_scaling {key} has {len(scaling[key])} "
                f"entries; it needs head_dim / 2 = {config.head_dim // 2}"
            )


def same_angles(config: ModelConfig, length: int, other: int) -> bool:
    """Whether texts of the two lengths rotate by the same angles, so that keys of one serve the other.

    False where "dynamic" grows its base (beyond max_position_embeddings) and where "longrope" goes
    over to its long factors (beyond the original length).
    """
    kind = _kind(config.rope_scaling or {})
    if kind == "dynamic":
        limit = config.max_position_embeddings
        return max(length, limit) == max(other, limit)
    if kind == "longrope":
        original = _original_length(config)
        return (length > original) == (other > original)
    return True


def cos_sin(
    config: ModelConfig,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of positions start .. length - 1 of a text of ``length``.

    Returns:
        Two tensors [T, 1, Dh] (to broadcast over heads) in ``dtype``, computed in float32;
        the second half of Dh repeats the first, as HF's layout of rotated pairs wants it.
    """
    frequencies, magnitude = _inverse_frequencies(config, length, device)
    positions = torch.arange(start, length, device=device, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + Dh/2]) of ``x`` [B, T, H, Dh] by their position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _kind(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _inverse_frequencies(
    config: ModelConfig, length: int, device: torch.device
) -> tuple[Tensor, float]:
    """Inverse frequencies [Dh/2], float32, and the factor on cosine and sine."""
    scaling = config.rope_scaling or {}
    kind = _kind(scaling)
    base = config.rope_theta
    exponents = (
        torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    )
    if kind == "dynamic" and length > config.max_position_embeddings:
        # neural tangent kernel scaling: a larger base beyond the trained length
        factor = scaling["factor"]
        stretch = factor * length / config.max_position_embeddings - (factor - 1)
        base *= stretch ** (config.head_dim / (config.head_dim - 2))
    if kind == "longrope":
        return _longrope(config, base, exponents, length)
    frequencies = 1.0 / base**exponents
    if kind == "linear":
        return frequencies / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(scaling, frequencies, _original_length(config)), 1.0
    if kind == "yarn":
        return _yarn(config, frequencies)
    return frequencies, 1.0


def _original_length(config: ModelConfig) -> int:
    """Length the model was trained on before its context was extended."""
    scaling = config.rope_scaling or {}
    return int(scaling.get("original_max_position_embeddings") or config.max_position_embeddings)


def _llama3(scaling: dict[str, Any], frequencies: Tensor, original: int) -> Tensor:
    """LLaMA 3.1: long waves divided by ``factor``, short ones kept, a linear blend between."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = original * frequencies / (2 * math.pi)  # full turns within the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / float(scaling["factor"]) + kept * frequencies


def _yarn(config: ModelConfig, frequencies: Tensor) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071), section 3: "NTK-by-parts" blend and attention temperature."""
    scaling = config.rope_scaling or {}
    factor = float(scaling["factor"])
    half = config.head_dim // 2

    def dimension_of(turns: float) -> float:
        """Index of the pair that makes ``turns`` full turns within the original length."""
        wave = _original_length(config) / (turns * 2 * math.pi)
        return config.head_dim * math.log(wave) / (2 * math.log(config.rope_theta))

    low = dimension_of(scaling.get("beta_fast") or 32)
    high = dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    high = high + 0.001 if low == high else high
    index = torch.arange(half, device=frequencies.device, dtype=torch.float32)
    interpolated = ((index - low) / (high - low)).clamp(0, 1)
    blended = frequencies / factor * interpolated + frequencies * (1 - interpolated)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        numerator, denominator = scaling.get("mscale"), scaling.get("mscale_all_dim")
        magnitude = temperature(1)
        if numerator and denominator:
            magnitude = temperature(numerator) / temperature(denominator)
    return blended, float(magnitude)


def _longrope(
    config: ModelConfig, base: float, exponents: Tensor, length: int
) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): one searched factor per pair, another set for long inputs."""
    scaling = config.rope_scaling or {}
    original = _original_length(config)
    factors = scaling["long_factor" if length > original else "short_factor"]
    per_pair = torch.tensor(factors, device=exponents.device, dtype=torch.float32)
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        factor = scaling.get("factor") or config.max_position_embeddings / original
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0 / (per_pair * base**exponents), float(magnitude)
