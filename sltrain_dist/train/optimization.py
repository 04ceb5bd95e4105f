"""Flags of the optimizer: its name, updates inside backward, projections, and what follows from them.

Steps of train.settings: they work on its dictionary of settings, by names of flags.
"""

from typing import Any

from sltrain_dist.config import EngineConfig, TrainConfig
from sltrain_dist.optim.packages import PROJECTED
from sltrain_dist.utils.errors import UserError

PER_LAYER = "_per_layer"  # ending of an optimizer's name


def finish_optimizer(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """NAME_per_layer is NAME with --per_layer, and what follows from that."""
    name = settings["optimizer"].lower()
    settings["optimizer"] = name.removesuffix(PER_LAYER)
    settings["asked"] = f"--optimizer {name}" if name.endswith(PER_LAYER) else "--per_layer"
    settings["per_layer"] = settings["per_layer"] or name.endswith(PER_LAYER)
    bits = settings["embedding_state_bits"]
    if bits not in (8, 32):
        raise UserError(f"--embedding_state_bits {bits}: 8 or 32")
    if bits == 8 and "8bit" not in settings["optimizer"]:
        raise UserError(
            f"--embedding_state_bits 8: --optimizer {settings['optimizer']} keeps 32 bits everywhere; leave it out, or take "
            "--optimizer adamw8bit"
        )
    if not settings["per_layer"]:
        if settings["per_layer_clip"] is not None:
            raise UserError(
                f"--per_layer_clip {settings['per_layer_clip']}: is for --per_layer; leave it out, or add that"
            )
        settings["master_weights"] = settings["master_weights"] or "fp32"
        return
    wide = settings["dtype"] == "bfloat16" and settings["optimizer"] in ("adam", "adamw")
    settings["master_weights"] = settings["master_weights"] or ("stochastic" if wide else "none")
    clips, what = settings["grad_clipping"], settings["per_layer_clip"]
    settings["per_layer_clip"] = what or ("error" if "grad_clipping" in given else "block")
    if what in ("block", "lagged") and not clips:
        raise UserError(f"--per_layer_clip {what}: of what? add --grad_clipping 1, or leave it out")
    if clips and settings["per_layer_clip"] == "error":
        raise UserError(
            f"--grad_clipping {clips:g}: the global norm is not known when the first block is updated; give --per_layer_clip block "
            "or lagged, or --grad_clipping 0"
        )


def check_per_layer(settings: dict[str, Any], engine: EngineConfig) -> None:
    """Refuse what cannot be done inside backward."""
    asked = settings["asked"]
    if engine.engine == "zero":
        raise UserError(
            f"{asked}: DeepSpeed steps after backward; take FSDP2: --engine fsdp without --ds_config, or --optimizer {settings['optimizer']} "
            "without --per_layer"
        )
    if settings["optimizer"].startswith("apex_"):
        raise UserError(
            f"{asked}: apex counts updates of all layers together; use --optimizer "
            f"{settings['optimizer'].removeprefix('apex_')} with it"
        )
    if engine.grad_sync == "last":
        raise UserError(
            f"--grad_sync last: keeps whole gradients of all layers until the end, {asked} is there to avoid that; leave one out"
        )


def finish_projection(settings: dict[str, Any]) -> None:
    """--proj_rank, --update_proj_gap and --proj_scale, which only some optimizers have."""
    names = ("proj_rank", "update_proj_gap", "proj_scale")
    if settings["optimizer"] not in PROJECTED:
        for name in names:
            if settings[name] is not None:
                raise UserError(
                    f"--{name} {settings[name]}: --optimizer {settings['optimizer']} projects nothing; leave it out, or take "
                    f"--optimizer {' or '.join(PROJECTED)}"
                )
    settings["proj_rank"] = settings["proj_rank"] or settings["rank"]
    settings["update_proj_gap"] = settings["update_proj_gap"] or 200


def warnings(config: TrainConfig) -> list[str]:
    """What works and is known to train badly, to be printed before training."""
    name, method, engine = config.optimizer.name, config.method.method, config.engine
    found = []
    nearest = config.optimizer.rounding == "nearest"
    if (
        name in ("adam", "adamw")
        and engine.dtype == "bfloat16"
        and not engine.master_weights
        and nearest
    ):
        found.append(
            f"--master_weights none: --optimizer {name} keeps its moments in bfloat16, where the second hardly decays; take "
            f"--master_weights stochastic (float32 moments) or --optimizer {name}8bit"
        )
    if name in PROJECTED and method in ("low_rank", "sltrain"):
        found.append(
            f"--optimizer {name}: projects gradients of whole weights; factors of --method {method} are low-rank already, and "
            "known to train worse so; take --method full with it, or --optimizer adamw"
        )
    return found
