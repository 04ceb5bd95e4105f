"""From flags to a validated TrainConfig: layers of defaults, the DeepSpeed JSON, and the cross-checks.

A value comes from the first of: the flag given, the ds JSON, the reference's defaults (where its
flags are used), the model's recipe, the table of flags. All errors are raised here, before a
process group, a tokenizer or a model exists.
"""

import json
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch

from sltrain_dist.config import (
    PRESETS,
    DataConfig,
    Dtype,
    EngineConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from sltrain_dist.model.llama import Llama
from sltrain_dist.model.tensor_parallel import check_tensor_parallel
from sltrain_dist.optim.schedule import check_schedule
from sltrain_dist.optim.table import OptimizerFactory
from sltrain_dist.parallel.ds_config import load_ds_config, resolve_ds_config, stage_of
from sltrain_dist.train.contradictions import (
    check_activations,
    check_cpu_offload,
    check_hf_model,
    check_linear_path,
    check_slope,
    check_start,
)
from sltrain_dist.train.flags import DTYPES, FLAGS, REFERENCE_DEFAULTS, explicit, token_count
from sltrain_dist.train.layout import finish_axes, finish_batches
from sltrain_dist.train.optimization import check_per_layer, finish_optimizer, finish_projection
from sltrain_dist.train.watch import watch_config
from sltrain_dist.utils.errors import UserError

_LONGEST = 7 * 24 * 3600.0  # seconds that a collective may take
_SEEDS = 2**31  # fits every generator that a seed goes to
POSITIVE = ("rank", "block_size", "max_length", "batch_size", "total_batch_size", "timeout",
            "gradient_accumulation", "num_training_steps", "max_train_tokens", "lr", "eps",
            "lora_alpha", "tokenizer_vocab", "cycle_length", "eval_tokens",
            "tensor_parallel", "replicate", "shard", "proj_rank", "update_proj_gap", "proj_scale",
            "max_skips")  # fmt: skip
NOT_NEGATIVE = ("warmup_steps", "weight_decay", "grad_clipping", "save_every", "eval_every",
                "keep_last", "workers", "lora_dropout", "beta1", "min_lr_ratio", "max_rewinds",
                "spike_sigma", "watch_every", "mask_change_freq")  # fmt: skip
BELOW_ONE = ("lora_dropout", "beta1")


def resolve(arguments: Sequence[str], world_size: int) -> TrainConfig:
    """Parse and validate a command line for a run on ``world_size`` ranks.

    Raises:
        UserError: anything a user can mend, in one line.
    """
    given = explicit(arguments)
    ds_config = load_ds_config(given["ds_config"]) if "ds_config" in given else None
    reference = "model_config" in given or "peft_model" in given
    _merge_names(given)
    model = ModelConfig.load(
        given.get("model", FLAGS["model"].default),
        "--model_config" if reference else "--model",
    )
    settings = {name: flag.default for name, flag in FLAGS.items()}
    settings["model"] = model.name
    settings |= _recipe(model) if not reference else REFERENCE_DEFAULTS
    if reference:
        settings |= _reference_data(given)
        if given.get("engine") == "zero" or ds_config is not None:
            settings["master_weights"] = None
        settings["workers"] = min(settings["workers"], os.cpu_count() or 1)
    settings |= _from_ds_config(ds_config) | given
    settings["dtype"] = _dtype(settings)
    finish_optimizer(settings, given)
    _check_ranges(settings)
    finish_projection(settings)
    dp_size = finish_axes(settings, world_size)
    finish_batches(settings, given, dp_size)
    _finish_steps(settings, given, model)
    return _build(settings, model, ds_config, arguments, dp_size)


def _merge_names(given: dict[str, Any]) -> None:
    """Fold the reference's names into ours; both at once must agree."""
    for theirs, ours in (("model_config", "model"), ("peft_model", "method")):
        if theirs not in given:
            continue
        value = given.pop(theirs)
        if given.setdefault(ours, value) != value:
            raise UserError(
                f"--{theirs} {value}: contradicts --{ours} {given[ours]}; give one of the two"
            )


def _recipe(model: ModelConfig) -> dict[str, Any]:
    """The paper's recipe of a preset (presets/recipes.json); other models get rank = hidden / 4."""
    recipes: dict[str, dict[str, Any]] = json.loads((PRESETS / "recipes.json").read_text())
    return {"rank": max(1, model.hidden_size // 4), "total_batch_size": 512} | recipes.get(
        model.name, {}
    )


def _reference_data(given: dict[str, Any]) -> dict[str, Any]:
    if "batch_size" not in given:
        raise UserError("--batch_size is required beside --model_config, as in the reference")
    if "corpus" in given:
        return {}
    return {"corpus": "c4", "tokenizer": "t5-base", "pack": "padded"}


def _from_ds_config(ds_config: dict[str, Any] | None) -> dict[str, Any]:
    """What a ds JSON fixes by number; "auto" leaves it to flags and defaults."""
    if ds_config is None:
        return {}
    found: dict[str, Any] = {}
    names = {
        "train_micro_batch_size_per_gpu": "batch_size",
        "gradient_accumulation_steps": "gradient_accumulation",
        "train_batch_size": "total_batch_size",
        "gradient_clipping": "grad_clipping",
    }
    for theirs, ours in names.items():
        if ds_config.get(theirs, "auto") != "auto":
            found[ours] = ds_config[theirs]
    bf16 = ds_config.get("bfloat16") or ds_config.get("bf16", {})
    enabled = bf16.get("enabled", "auto")
    if enabled != "auto":
        found["dtype"] = "bfloat16" if enabled else "float32"
    pure = bf16.get("bf16_master_weights_and_grads", "auto")
    if pure != "auto":
        found["master_weights"] = "none" if pure else "fp32"
    block = ds_config.get("optimizer", {})
    if isinstance(block.get("type"), str) and block["type"] != "auto":
        found["optimizer"] = block["type"].lower()
    parameters = block.get("params", {})
    for name in ("lr", "eps", "weight_decay"):
        if parameters.get(name, "auto") != "auto":
            found[name] = parameters[name]
    if parameters.get("betas", "auto") != "auto":
        found["betas"] = ",".join(str(beta) for beta in parameters["betas"])
    return found


def _check_ranges(settings: dict[str, Any]) -> None:
    for name, value in settings.items():  # first, as NaN passes every comparison below
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be a finite number")
    for name in POSITIVE:
        if (
            settings[name] is not None
            and not isinstance(settings[name], str)
            and settings[name] <= 0
        ):
            raise UserError(f"--{name} {settings[name]}: must be positive")
    if settings["timeout"] > _LONGEST:
        raise UserError(f"--timeout {settings['timeout']:g}: at most {_LONGEST:g} seconds, a week")
    for name in NOT_NEGATIVE:
        if settings[name] is not None and settings[name] < 0:
            raise UserError(f"--{name} {settings[name]}: must not be negative")
    for name in BELOW_ONE:
        if settings[name] >= 1:
            raise UserError(f"--{name} {settings[name]}: must be below 1")
    if not 0 <= settings["seed"] < _SEEDS:
        raise UserError(f"--seed {settings['seed']}: must lie in [0, {_SEEDS})")
    if settings["max_length"] < 2:
        raise UserError(f"--max_length {settings['max_length']}: a sample needs at least 2 tokens")
    if not 0 <= settings["min_lr_ratio"] <= 1:
        raise UserError(f"--min_lr_ratio {settings['min_lr_ratio']}: must lie in [0, 1]")
    if not 0 < settings["sp_ratio"] < 1:
        raise UserError(f"--sp_ratio {settings['sp_ratio']}: the density must lie in (0, 1)")


def _finish_steps(settings: dict[str, Any], given: dict[str, Any], model: ModelConfig) -> None:
    """Updates from tokens, warm-up from updates, and the two against each other."""
    if settings["max_train_tokens"] is not None:
        per_update = settings["total_batch_size"] * settings["max_length"]
        settings["num_training_steps"] = settings["max_train_tokens"] // per_update
        if settings["num_training_steps"] < 1:
            raise UserError(
                f"--max_train_tokens {settings['max_train_tokens']}: less than one update of {per_update} tokens"
            )
    steps = settings["num_training_steps"]
    if settings["warmup_steps"] is None or (
        "warmup_steps" not in given and settings["warmup_steps"] >= steps
    ):
        settings["warmup_steps"] = steps // 10
    if settings["max_length"] > model.max_position_embeddings:
        raise UserError(
            f"--max_length {settings['max_length']}: the model has {model.max_position_embeddings} positions "
            "(max_position_embeddings)"
        )


def _dtype(settings: dict[str, Any]) -> Dtype:
    name = settings["dtype"]
    if name is None:
        return (
            "bfloat16"
            if torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            else "float32"
        )
    if name not in DTYPES:
        raise UserError(
            f"--dtype {name}: train in {', '.join(DTYPES)}; float16 needs loss scaling and is refused"
        )
    return DTYPES[name]


def _betas(text: str) -> tuple[float, float]:
    try:
        first, second = (float(part) for part in str(text).split(","))
    except ValueError:
        raise UserError(f"--betas {text}: two numbers are needed, as 0.9,0.999") from None
    if not (0 <= first < 1 and 0 <= second < 1):
        raise UserError(f"--betas {text}: both must lie in [0, 1)")
    return first, second


def _engine(settings: dict[str, Any], ds_config: dict[str, Any] | None) -> EngineConfig:
    engine: Literal["fsdp", "zero"] = settings["engine"] or (
        "zero" if ds_config is not None else "fsdp"
    )
    if engine == "zero" and ds_config is None:
        raise UserError(
            "--engine zero: needs a DeepSpeed JSON; add --ds_config ds_configs/zero2.json"
        )
    if engine == "fsdp" and ds_config is not None:
        raise UserError(
            f"--engine fsdp: contradicts --ds_config {settings['ds_config']}; drop one of them"
        )
    if engine == "zero" and settings["replicate"] > 1:
        raise UserError(
            f"--replicate {settings['replicate']}: is for --engine fsdp; a DeepSpeed JSON has"
            ' "zero_optimization.zero_hpz_partition_size"'
        )
    if settings["cpu_offload"]:
        check_cpu_offload(settings, engine)
    dtype: Dtype = settings["dtype"]
    if settings["master_weights"] == "stochastic" and (engine == "zero" or dtype == "float32"):
        other = (
            "--engine zero steps on float32" if engine == "zero" else "--dtype float32 rounds no"
        )
        raise UserError(
            f"--master_weights stochastic: {other} weights; take --engine fsdp with --dtype bfloat16, or fp32"
        )
    stage = stage_of(ds_config) if ds_config is not None else 0
    return EngineConfig(
        engine=engine,
        stage=stage,
        ds_config=ds_config,
        dtype=dtype,
        master_weights=settings["master_weights"] == "fp32" or dtype == "float32",
        grad_sync=settings["grad_sync"],
        tensor_parallel=settings["tensor_parallel"],
        sequence_parallel=settings["sequence_parallel"],
        per_layer=settings["per_layer"],
        replicate=settings["replicate"],
        cpu_offload=settings["cpu_offload"],
        batch_size=settings["batch_size"],
        gradient_accumulation=settings["gradient_accumulation"],
        seed=settings["seed"],
    )


def _build(
    settings: dict[str, Any],
    model: ModelConfig,
    ds_config: dict[str, Any] | None,
    arguments: Sequence[str],
    dp_size: int,
) -> TrainConfig:
    """Assemble the dataclasses from finished settings."""
    method = MethodConfig(
        method=settings["method"],
        rank=settings["rank"],
        density=settings["sp_ratio"],
        alpha=float(settings["lora_alpha"]),
        dropout=settings["lora_dropout"],
        train_scaling=settings["train_scaling"],
        support=settings["support"],
        block_size=settings["block_size"],
        seed=settings["seed"],
        pattern=settings["slope_pattern"],
        mask_change_freq=settings["mask_change_freq"],
    )
    eval_tokens = settings["eval_tokens"]
    data = DataConfig(
        corpus=settings["corpus"],
        tokenizer=settings["tokenizer"],
        pack=settings["pack"],
        sequence_length=settings["max_length"],
        cache_dir=settings["cache_dir"],
        eval_tokens=token_count(eval_tokens) if isinstance(eval_tokens, str) else eval_tokens,
        workers=settings["workers"],
        seed=settings["seed"],
        vocab_size=min(settings["tokenizer_vocab"], model.vocab_size),
    )
    optimizer = OptimizerConfig(
        name=settings["optimizer"].lower(),
        lr=settings["lr"],
        betas=_betas(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        momentum=settings["beta1"],
        scheduler=settings["scheduler"],
        warmup_steps=settings["warmup_steps"],
        total_steps=settings["num_training_steps"],
        min_lr_ratio=settings["min_lr_ratio"],
        cycle_length=settings["cycle_length"],
        grad_clipping=settings["grad_clipping"],
        embedding_state_bits=settings["embedding_state_bits"],
        per_layer_clip=settings["per_layer_clip"] or "error",
        proj_rank=settings["proj_rank"],
        update_proj_gap=settings["update_proj_gap"],
        proj_scale=settings["proj_scale"],
        rounding="stochastic" if settings["master_weights"] == "stochastic" else "nearest",
        seed=settings["seed"],
    )
    engine = _engine(settings, ds_config)
    if engine.per_layer:
        check_per_layer(settings, engine)
    description = "--engine fsdp" if engine.engine == "fsdp" else f"ZeRO stage {engine.stage}"
    shards = dp_size // engine.replicate if engine.engine == "fsdp" else engine.stage + 1
    OptimizerFactory(optimizer).check(description, shards * engine.tensor_parallel > 1)
    check_schedule(optimizer)
    if ds_config is not None:
        resolve_ds_config(ds_config, engine, optimizer, dp_size)
    check_linear_path(settings)
    check_slope(settings, model)
    check_activations(settings, engine.stage if engine.engine == "zero" else 0)
    check_start(settings)
    if settings["use_hf_model"]:
        check_hf_model(settings)
    if engine.tensor_parallel > 1:
        check_tensor_parallel(Llama(model, method), engine.tensor_parallel)
    return TrainConfig(
        model=model,
        method=method,
        data=data,
        optimizer=optimizer,
        engine=engine,
        total_batch_size=settings["total_batch_size"],
        eval_every=settings["eval_every"],
        save_every=settings["save_every"],
        keep_last=settings["keep_last"],
        async_save=settings["async_save"],
        eval_mode=settings["eval_mode"],
        save_dir=settings["save_dir"] or "",
        continue_from=settings["continue_from"],
        init_from=settings["init_from"],
        attention=settings["attention"],
        norm=settings["norm"],
        linear_path=settings["linear_path"],
        keep_hidden=settings["keep_hidden"],
        activation_checkpointing=settings["activation_checkpointing"],
        offload_activations=settings["offload_activations"],
        compile=settings["compile"],
        use_hf_model=settings["use_hf_model"],
        loss_average=settings["loss_average"],
        tracker=settings["tracker"],
        name=settings["name"] or "",
        tags=tuple(settings["tags"].split(",")) if settings["tags"] else (),
        timeout=settings["timeout"],
        watch=watch_config(settings, optimizer.total_steps),
        command=tuple(arguments),
    )
