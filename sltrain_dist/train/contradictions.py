"""Flags that contradict each other, each refused in one line that names both and the mend.

Called by `train.settings` on finished settings, before anything is built; every function raises UserError.
"""

from typing import Any

from sltrain_dist.config import MethodConfig, ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.params.slope import check_patterns
from sltrain_dist.train.flags import FLAGS
from sltrain_dist.utils.errors import UserError


def check_hf_model(settings: dict[str, Any]) -> None:
    """Transformers' decoder brings its own attention; fix both back ends to what runs."""
    for name, only in (("attention", "sdpa"), ("norm", "torch")):
        if settings[name] not in ("auto", only):
            raise UserError(
                f"--{name} {settings[name]}: --use_hf_model runs with {only}; drop one of them"
            )
        settings[name] = only
    if settings["activation_checkpointing"] == "selective":
        raise UserError(
            "--activation_checkpointing selective: --use_hf_model knows none and block; take one of them"
        )


def check_linear_path(settings: dict[str, Any]) -> None:
    """--linear_path and --keep_hidden against the method."""
    if settings["linear_path"] != "auto" and settings["method"] != "sltrain":
        raise UserError(
            f"--linear_path {settings['linear_path']}: --method {settings['method']} has no choice of path; "
            "leave it out, or train with --method sltrain"
        )
    if settings["keep_hidden"] != "auto" and (
        settings["method"] != "sltrain" or settings["linear_path"] == "composed"
    ):
        raise UserError(
            f"--keep_hidden {settings['keep_hidden']}: only factorized linears of --method sltrain have x A^T to "
            "keep; leave it out, or take --linear_path factorized"
        )


def check_slope(settings: dict[str, Any], model: ModelConfig) -> None:
    """The flags of --method slope against the method and the model, whose layers' sizes its patterns must fit."""
    if settings["method"] != "slope":
        for name in ("slope_pattern", "mask_change_freq"):
            if settings[name] != FLAGS[name].default:
                raise UserError(
                    f"--{name} {settings[name]}: --method {settings['method']} prunes nothing; leave it out, or train with "
                    "--method slope"
                )
        return
    check_patterns(settings["slope_pattern"], model.num_hidden_layers)
    Llama(model, MethodConfig(method="slope", pattern=settings["slope_pattern"]))


def check_activations(settings: dict[str, Any], stage: int) -> None:
    """What is kept for backward, against what a compiled block decides for itself."""
    if settings["activation_checkpointing"] == "selective" and settings["compile"] != "none":
        raise UserError(
            f"--activation_checkpointing selective: --compile {settings['compile']} computes norms and SwiGLU again"
            " where that pays by itself; take none or block with it, or leave --compile out"
        )
    if not settings["offload_activations"]:
        return
    if settings["use_hf_model"]:
        raise UserError("--offload_activations: --use_hf_model keeps activations itself; drop one")
    others = {
        "--activation_checkpointing selective": settings["activation_checkpointing"] == "selective",
        f"--compile {settings['compile']}": settings["compile"] != "none",
        "ZeRO stage 3, whose gathered weights would wait with the activations,": stage == 3,
    }
    for other, is_so in others.items():
        if is_so and settings["activation_checkpointing"] != "block":
            raise UserError(
                f"--offload_activations: with {other} it needs --activation_checkpointing block, whose block inputs it moves"
            )


def check_start(settings: dict[str, Any]) -> None:
    """Two sources of weights."""
    source, checkpoint = settings["init_from"], settings["continue_from"]
    if source and checkpoint not in (None, "auto"):
        raise UserError(
            f"--init_from {source}: --continue_from {checkpoint} brings its own weights; drop one of the two"
        )


def check_cpu_offload(settings: dict[str, Any], engine: str) -> None:
    """--cpu_offload against the engine and an optimizer that is for GPUs."""
    if engine == "zero":
        raise UserError(
            '--cpu_offload: is for --engine fsdp; a DeepSpeed JSON has "zero_optimization.offload_optimizer" and'
            ' "zero_optimization.offload_param", as in ds_configs/zero3_offload.json'
        )
    if settings["optimizer"].startswith("apex_"):
        plain = settings["optimizer"].removeprefix("apex_")
        raise UserError(
            f"--cpu_offload: updates run on the host, --optimizer {settings['optimizer']} on a GPU; take --optimizer {plain}"
        )
