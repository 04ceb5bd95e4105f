"""The model: LLaMA as a pure module, its choice of back ends, and its arithmetic cost."""

from sltrain_dist.model.backends import resolve_attention, resolve_norm
from sltrain_dist.model.flops import Flops, flops_per_token, model_flops_per_token
from sltrain_dist.model.llama import Llama

__all__ = [
    "Flops",
    "Llama",
    "flops_per_token",
    "model_flops_per_token",
    "resolve_attention",
    "resolve_norm",
]
