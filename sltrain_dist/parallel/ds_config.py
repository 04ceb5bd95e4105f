"""The DeepSpeed JSON: read, filled in from our flags, and checked against them before anything is built.

The file stays pure DeepSpeed. A value written "auto", or left out, is filled from the flag that owns
it; a value that contradicts its flag is an error naming both, never a silent winner. Pure functions on
dictionaries: nothing here imports DeepSpeed.
"""

import copy
import json
from pathlib import Path
from typing import Any

from sltrain_dist.config import (
    BOOLEAN,
    NOT_NEGATIVE_NUMBER,
    OBJECT,
    POSITIVE_INTEGER,
    POSITIVE_NUMBER,
    TEXT,
    EngineConfig,
    Kind,
    OptimizerConfig,
)
from sltrain_dist.utils.errors import UserError

FLAG = "--ds_config"
AUTO = "auto"

# Blocks that would give DeepSpeed a job this package does itself, or that change what is computed.
_REFUSED = {
    "scheduler": "the learning rate follows --scheduler; delete the block",
    "amp": "--dtype chooses the number format; delete the block",
    "torch_autocast": "--dtype chooses the number format; delete the block",
    "managed_gradient_accumulation": "--gradient_accumulation owns it; delete the key",
    "gradient_allreduce_op": "gradients are summed over tokens here; delete the key",
    "prescale_gradients": "gradients are summed over tokens here; delete the key",
    "gradient_predivide_factor": "gradients are summed over tokens here; delete the key",
    "expert_parallel": "models here have no experts; delete the block",
    "moe": "models here have no experts; delete the block",
    "pipeline": "pipeline parallelism is not supported; delete the block",
    "tensor_parallel": "DeepSpeed's own tensor parallelism is not supported; delete the block",
    "compression_training": "it would change the model; delete the block",
    "curriculum_learning": "the order of samples is --seed's; delete the block",
    "data_efficiency": "the order of samples is --seed's; delete the block",
    "elasticity": "batch sizes are flags here; delete the block",
    "autotuning": "it restarts the run; delete the block",
    "hybrid_engine": "it is for inference; delete the block",
    "weight_quantization": "it would change the model; delete the block",
    "sparse_attention": "it would change the model; delete the block",
}
_ZERO_REFUSED = (
    "zenflow",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "legacy_stage1",
    "cpu_offload",
    "cpu_offload_param",
)
_PASSED_ON = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    optimizer fp16 bf16 bfloat16 data_types communication_data_type zero_optimization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown
    memory_breakdown dump_state log_level comms_logger flops_profiler activation_checkpointing aio
    compile timers tensorboard csv_monitor wandb comet disable_allgather disable_python_gc
    sparse_gradients seq_parallel_communication_data_type dataloader_drop_last checkpoint
    vocabulary_size""".split()
)


def _whole(value: Any) -> bool:
    """DeepSpeed's own examples write sizes as 5e8, which JSON reads as a float."""
    return NOT_NEGATIVE_NUMBER.holds(value) and float(value).is_integer()


def _pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(NOT_NEGATIVE_NUMBER.holds(item) and item < 1 for item in value)
    )


# (what a value may be, what else may stand in its place, dotted keys); blocks come before what is in them.
_TYPES: tuple[tuple[Kind, tuple[str | None, ...], str], ...] = (
    (OBJECT, (), """fp16 bf16 bfloat16 data_types zero_optimization optimizer optimizer.params
        comms_logger flops_profiler activation_checkpointing aio compile timers tensorboard
        csv_monitor wandb comet checkpoint"""),
    (OBJECT, (None,), "zero_optimization.offload_optimizer zero_optimization.offload_param"),
    (POSITIVE_INTEGER, (AUTO,), """train_batch_size train_micro_batch_size_per_gpu
        gradient_accumulation_steps"""),
    (POSITIVE_INTEGER, (AUTO, None), "steps_per_print"),
    (NOT_NEGATIVE_NUMBER, (AUTO,), """gradient_clipping optimizer.params.weight_decay
        optimizer.params.momentum"""),
    (POSITIVE_NUMBER, (AUTO,), "optimizer.params.lr optimizer.params.eps"),
    (Kind("a list of two numbers in [0, 1)", _pair), (AUTO,), "optimizer.params.betas"),
    (TEXT, (), """optimizer.type communication_data_type seq_parallel_communication_data_type
        data_types.grad_accum_dtype log_level zero_optimization.offload_optimizer.device
        zero_optimization.offload_param.device"""),
    (BOOLEAN, (AUTO,), """fp16.enabled bf16.enabled bfloat16.enabled bf16.bf16_optimizer_states
        bf16.bf16_master_weights_and_grads wall_clock_breakdown memory_breakdown dump_state
        disable_allgather disable_python_gc sparse_gradients dataloader_drop_last
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
        zero_optimization.contiguous_gradients zero_optimization.reduce_scatter
        zero_optimization.overlap_comm zero_optimization.allgather_partitions
        zero_optimization.round_robin_gradients zero_optimization.offload_optimizer.pin_memory
        zero_optimization.offload_param.pin_memory
        zero_optimization.stage3_gather_16bit_weights_on_model_save"""),
    (Kind("0, 1, 2 or 3", lambda value: _whole(value) and value <= 3), (AUTO,),
        "zero_optimization.stage"),
    (Kind("a whole number that is not negative", _whole), (AUTO,), """vocabulary_size
        zero_optimization.reduce_bucket_size zero_optimization.allgather_bucket_size
        zero_optimization.stage3_prefetch_bucket_size zero_optimization.sub_group_size
        zero_optimization.stage3_param_persistence_threshold
        zero_optimization.stage3_model_persistence_threshold
        zero_optimization.stage3_max_live_parameters
        zero_optimization.stage3_max_reuse_distance"""),
)  # fmt: skip
# DeepSpeed's default of 5e8 elements reserves 2 GB whatever the model's size.
_BUCKET = 50_000_000


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        UserError: the file is missing, is not JSON, holds no object, names a key twice, or gives one a
            value of the wrong type.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f'{FLAG} {path}: key "{twice}" stands there twice; delete one')
        return result

    try:
        content = json.loads(Path(path).read_text(), object_pairs_hook=once)
    except FileNotFoundError:
        raise UserError(f"{FLAG} {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{FLAG} {path}: not a readable JSON file ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{FLAG} {path}: must hold one JSON object, not {type(content).__name__}")
    _check_types(content, path)
    return content


def _check_types(content: dict[str, Any], path: str | Path) -> None:
    """Refuse what the rest of this package, or DeepSpeed, would stumble over with a traceback."""
    for kind, others, names in _TYPES:
        for name in names.split():
            *blocks, key = name.split(".")
            block: Any = content
            for outer in blocks:
                block = block.get(outer) or {}
            if key not in block or kind.holds(block[key]) or block[key] in others:
                continue
            words = "".join(f" or {json.dumps(other)}" for other in others)
            raise UserError(
                f'{FLAG} {path}: "{name}" is {json.dumps(block[key])[:60]};'
                f" it must be {kind.words}{words}"
            )


def resolve_ds_config(
    ds_config: dict[str, Any] | None,
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    dp_size: int,
) -> dict[str, Any]:
    """Fill "auto" and absent values from the flags and return a new dictionary DeepSpeed can take as it is.

    Args:
        ds_config: content of the user's file; None means a file with nothing in it but the stage.
        dp_size: data-parallel ranks.

    Raises:
        UserError: a value contradicts a flag, or asks for what is not supported; the message names the mend.
    """
    stage_only: dict[str, Any] = {"zero_optimization": {"stage": AUTO}}
    config = copy.deepcopy(ds_config) if ds_config is not None else stage_only
    _refuse_unknown(config)
    _resolve_batch(config, engine, dp_size)
    _fill(config, "gradient_clipping", float(optimizer.grad_clipping), "--grad_clipping")
    _check_optimizer(config.pop("optimizer", None), optimizer)
    stage = _resolve_zero(config, engine)
    _resolve_precision(config, engine, stage)
    if config.get("steps_per_print", AUTO) == AUTO:
        config.pop("steps_per_print", None)
    config["zero_allow_untested_optimizer"] = True  # the optimizer is ours (optim/table.py)
    config["zero_force_ds_cpu_optimizer"] = False
    _refuse_leftover_auto(config, "")
    return config


def stage_of(config: dict[str, Any], automatic: int = EngineConfig.stage) -> int:
    """The ZeRO stage a configuration asks for, resolved or not; ``automatic`` where it says "auto".

    Raises:
        UserError: the stage is not one of 0, 1, 2, 3.
    """
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f'{FLAG}: "zero_optimization" must be an object, not {zero!r}')
    stage = zero.get("stage", 0)  # DeepSpeed's default
    stage = automatic if stage == AUTO else stage
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f'{FLAG}: "zero_optimization.stage" is {stage!r}; it must be 0, 1, 2 or 3')
    return int(stage)


def _refuse_unknown(config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key in _REFUSED and value is not None:
            raise UserError(f'{FLAG}: "{key}" is not supported: {_REFUSED[key]}')
        if key not in _PASSED_ON and key not in _REFUSED:
            raise UserError(f'{FLAG}: unknown key "{key}"; DeepSpeed would ignore it silently')
    for key in ("fp16", "bf16", "bfloat16", "data_types", "zero_optimization", "optimizer"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f'{FLAG}: "{key}" must be an object, not {config[key]!r}')


def _fill(block: dict[str, Any], key: str, value: Any, flag: str, path: str = "") -> None:
    """Set ``block[key]`` to the flag's value; an explicit other value is a contradiction."""
    given = block.get(key, AUTO)
    if given is not None and given != AUTO and given != value:
        raise UserError(
            f'{FLAG}: "{path}{key}" is {given!r} but {flag} makes it {value!r};'
            f' write "auto" in the file or change the flag'
        )
    block[key] = value


def _resolve_batch(config: dict[str, Any], engine: EngineConfig, dp_size: int) -> None:
    _fill(config, "train_micro_batch_size_per_gpu", engine.batch_size, "--batch_size")
    accumulation = engine.gradient_accumulation
    _fill(config, "gradient_accumulation_steps", accumulation, "--gradient_accumulation")
    total = engine.batch_size * accumulation * dp_size
    _fill(config, "train_batch_size", total, f"--total_batch_size (on {dp_size} ranks)")


def _check_optimizer(block: dict[str, Any] | None, optimizer: OptimizerConfig) -> None:
    """Compare the optimizer block with the flags; the optimizer itself is built by optim/table.py."""
    if block is None:
        return
    name = block.get("type", AUTO)
    _fill({"type": str(name).lower()}, "type", optimizer.name, "--optimizer", path="optimizer.")
    flags = {
        "lr": (optimizer.lr, "--lr"),
        "betas": (list(optimizer.betas), "the optimizer"),
        "eps": (optimizer.eps, "the optimizer"),
        "weight_decay": (optimizer.weight_decay, "--weight_decay"),
        "momentum": (optimizer.momentum, "--beta1"),
    }
    params = dict(block.get("params") or {})
    for key in params:
        if key not in flags:
            raise UserError(
                f'{FLAG}: "optimizer.params.{key}" has no flag here; delete it'
                f" (known: {', '.join(flags)})"
            )
        value, flag = flags[key]
        _fill(params, key, value, flag, path="optimizer.params.")


def _resolve_zero(config: dict[str, Any], engine: EngineConfig) -> int:
    """Settle the stage and the automatic sizes of ``zero_optimization``."""
    zero = config.setdefault("zero_optimization", {"stage": 0})
    for key in _ZERO_REFUSED:
        if zero.get(key):
            raise UserError(f'{FLAG}: "zero_optimization.{key}" is not supported; delete it')
    zero["stage"] = stage = stage_of(config, engine.stage)
    if engine.grad_sync == "last" and stage >= 2:
        raise UserError(
            f"--grad_sync last: ZeRO stage {stage} partitions gradients, so it must reduce every micro-batch;"
            " use --grad_sync each, stage 0 or 1 (which reduce once anyway), or --engine fsdp"
        )
    for key in ("offload_optimizer", "offload_param"):
        _check_offload(zero, key, stage)
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(key, AUTO) == AUTO:
            zero[key] = _BUCKET
    for key in [key for key, value in zero.items() if value == AUTO]:
        del zero[key]  # DeepSpeed's own default
    return stage


def _check_offload(zero: dict[str, Any], key: str, stage: int) -> None:
    """Offloading goes to the CPU, and only from the stages that partition what is offloaded."""
    block = zero.get(key)
    if block is None:
        return
    if not isinstance(block, dict) or block.get("device", "none") not in ("none", "cpu"):
        raise UserError(f'{FLAG}: "zero_optimization.{key}" can go to device "cpu" only')
    if block.get("device", "none") == "none":
        del zero[key]
        return
    lowest = 3 if key == "offload_param" else 1
    if stage < lowest:
        raise UserError(
            f'{FLAG}: "zero_optimization.{key}" needs stage {lowest} or more, not {stage}'
        )
    if block.get("pin_memory") == AUTO:
        del block["pin_memory"]


def _resolve_precision(config: dict[str, Any], engine: EngineConfig, stage: int) -> None:
    """Settle number formats: compute in --dtype, accumulate and reduce gradients in float32."""
    if config.get("fp16", {}).get("enabled", False) not in (False, AUTO):
        raise UserError(
            f'{FLAG}: "fp16.enabled": float16 is not supported; use --dtype bfloat16 and "bf16"'
        )
    config.pop("fp16", None)
    bf16 = config.pop("bfloat16", None) or config.get("bf16", {})
    wanted = engine.dtype == "bfloat16"
    _fill(bf16, "enabled", wanted, f"--dtype {engine.dtype}", path="bf16.")
    config["bf16"] = bf16
    types = config.setdefault("data_types", {})
    if not wanted:
        _fill(types, "grad_accum_dtype", "fp32", "--dtype float32", path="data_types.")
        return
    if stage == 0:
        if engine.gradient_accumulation > 1:
            raise UserError(
                f"--gradient_accumulation {engine.gradient_accumulation}: with --dtype bfloat16 DeepSpeed"
                ' stage 0 adds gradients up in bfloat16; use "zero_optimization.stage" 1, 2 or 3, or --engine fsdp'
            )
        _fill(types, "grad_accum_dtype", "bf16", "ZeRO stage 0", path="data_types.")
    else:
        _fill(types, "grad_accum_dtype", "fp32", "--dtype bfloat16", path="data_types.")
    if config.get("communication_data_type", AUTO) == AUTO:
        config["communication_data_type"] = "fp32"
    _resolve_master(config, bf16, engine, stage)


def _resolve_master(
    config: dict[str, Any], bf16: dict[str, Any], engine: EngineConfig, stage: int
) -> None:
    """Pure bfloat16 (no float32 master weights) exists in DeepSpeed for stages 2 and 3 without offloading."""
    pure = not engine.master_weights
    offloaded = any(key.startswith("offload_") for key in config["zero_optimization"])
    if pure and (stage < 2 or offloaded):
        where = "offloading" if offloaded else f"ZeRO stage {stage}"
        raise UserError(
            f"--dtype bfloat16 without float32 master weights: DeepSpeed cannot do it with {where};"
            " use --master_weights fp32, --engine fsdp, or stage 2 or 3 without offloading"
        )
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if pure or key in bf16:
            wanted = "none" if pure else "fp32"
            _fill(bf16, key, pure, f"--master_weights {wanted}", path="bf16.")


def _refuse_leftover_auto(value: Any, path: str) -> None:
    if value == AUTO:
        raise UserError(f'{FLAG}: "{path}" is "auto", but no flag gives it a value; write one')
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_leftover_auto(inner, f"{path}.{key}" if path else key)
