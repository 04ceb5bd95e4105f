"""The plan of a run before it is started: memory of a rank by kind, bytes on the wire, FLOPs, time of an update.

Memory comes from one update on fake tensors (plan_run), and beside it from the closed formula (train.memory);
the rest from model.flops and model.communication. Nothing is read or written but the model's configuration, the
ds JSON and the cache of linear paths.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from sltrain_dist.config import TrainConfig
from sltrain_dist.model.communication import (
    Situation,
    ends_bytes,
    layer_bytes,
    masks_bytes,
    sharding_bytes,
)
from sltrain_dist.model.flops import Path, flops_per_token
from sltrain_dist.parallel.ds_config import load_ds_config
from sltrain_dist.parallel.tensor import TensorParallel
from sltrain_dist.params import count_parameters
from sltrain_dist.tools.plan_run import Measured, measure
from sltrain_dist.train.build import make_model
from sltrain_dist.train.flags import explicit
from sltrain_dist.train.linear_paths import LinearPaths, decide
from sltrain_dist.train.memory import estimate_memory
from sltrain_dist.train.settings import resolve
from sltrain_dist.utils.errors import UserError

Device = Literal["cpu", "cuda"]
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    arguments: pretrain's flags. gpus: ranks. gpu_memory: bytes of one, or None.
    tflops: 10**12 FLOP/s that a rank reaches. bandwidth: 10**9 bytes/s that a rank sends.
    """

    arguments: tuple[str, ...]
    gpus: int
    device: Device
    gpu_memory: int | None
    tflops: float
    bandwidth: float


@dataclass(frozen=True)
class Setting:
    """A run that could be started, and what its shapes tell without running anything.

    parameters: params.count_parameters. formula: train.memory.estimate_memory.
    wire: bytes a rank sends in an update. flops: of a rank in an update. seconds: of an update.
    """

    config: TrainConfig
    parameters: dict[str, int]
    paths: LinearPaths
    formula: dict[str, int]
    wire: float
    flops: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.config.tokens_per_update / self.seconds


@dataclass(frozen=True)
class Plan:
    """A setting, and what the fake run said about its memory."""

    request: Request
    setting: Setting
    measured: Measured

    @property
    def total(self) -> int:
        """Bytes of a rank at the peak."""
        return sum(self.measured.peak.values())

    @property
    def fits(self) -> bool | None:
        """Whether it fits --gpu_memory; None where none was given."""
        limit = self.request.gpu_memory
        return None if limit is None else self.total <= limit

    def to_json(self) -> dict[str, Any]:
        """Everything, bytes as numbers."""
        setting = self.setting
        return {
            "model": setting.config.model.name,
            "arguments": list(self.request.arguments),
            "gpus": self.request.gpus,
            "device": self.request.device,
            "parameters": setting.parameters,
            "bytes": self.measured.peak,
            "total_bytes": self.total,
            "formula_bytes": {k: v for k, v in setting.formula.items() if k != "total"},
            "formula_total_bytes": setting.formula["total"],
            "gpu_memory_bytes": self.request.gpu_memory,
            "fits": self.fits,
            "tokens_per_update": setting.config.tokens_per_update,
            "wire_bytes_per_update": setting.wire,
            "flops_per_update": setting.flops,
            "tflops": self.request.tflops,
            "bandwidth": self.request.bandwidth,
            "seconds_per_update": setting.seconds,
            "tokens_per_second": setting.tokens_per_second,
        }


def parse_bytes(text: str) -> int:
    """Bytes from "24GiB", "80GB" or "512MiB".

    Raises:
        UserError: it is none of that, or not positive.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?)B?\s*", text.upper())
    size = float(found[1]) * _UNITS.get(found[2], 0) if found else 0
    if not 1 <= size < 2**62:
        raise UserError(f"--gpu_memory {text}: give a size as 24GiB, 80GB or 512MiB")
    return int(size)


def configure(request: Request, changes: Sequence[str] = ()) -> TrainConfig:
    """What pretrain would make of the flags; the number format that is derived is that of ``request.device``.

    Raises:
        UserError: what pretrain refuses.
    """
    arguments = [*request.arguments, *changes]
    given = explicit(arguments)
    ds_config = load_ds_config(given["ds_config"]) if "ds_config" in given else {}
    if request.device == "cuda":
        _check_offload(given, ds_config)
    bf16 = ds_config.get("bfloat16") or ds_config.get("bf16", {})
    if "dtype" in given or bf16.get("enabled", "auto") != "auto":
        return resolve(arguments, request.gpus)
    format_ = "bfloat16" if request.device == "cuda" else "float32"
    return resolve([*arguments, "--dtype", format_], request.gpus)


def _check_offload(given: dict[str, Any], ds_config: dict[str, Any]) -> None:
    zero = ds_config.get("zero_optimization", {})
    asked = [f"--{flag}" for flag in ("offload_activations", "cpu_offload") if given.get(flag)]
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            asked.append(f"--ds_config {given['ds_config']}: {key}")
    if asked:
        raise UserError(
            f"{asked[0]}: the planner cannot tell a GPU's memory from its host's; leave it out for an upper bound, or plan "
            "--device cpu"
        )


def blank_model(config: TrainConfig) -> nn.Module:
    """The model of a rank on the meta device: its part under tensor parallelism."""
    engine = config.engine
    tp = None
    if engine.tensor_parallel > 1:
        group: Any = None  # nothing is sent
        tp = TensorParallel(group, 0, engine.tensor_parallel, engine.sequence_parallel, True)
    plain = replace(config, compile="none")
    return make_model(plain, "sdpa", "torch", None, tp, device="meta", dtype=torch.float32)


def settle(request: Request, config: TrainConfig, blank: nn.Module) -> Setting:
    """All but the fake run. ``blank`` is config's `blank_model`; micro-batch and checkpointing may differ."""
    parameters = count_parameters(blank)
    paths = decide(config, blank, torch.device(request.device), None, timing=False)
    engine = config.engine
    data = request.gpus // engine.tensor_parallel
    shards = data // engine.replicate if engine.engine == "fsdp" else data
    formula = estimate_memory(config, parameters, shards, paths, request.device)
    wire = _wire(config, parameters, data, shards)
    flops = _flops(config, paths) / request.gpus
    seconds = flops / (request.tflops * 1e12) + wire / (request.bandwidth * 1e9)
    return Setting(config, parameters, paths, formula, wire, flops, seconds)


def plan(request: Request) -> Plan:
    """Plan the run that the flags describe.

    Raises:
        UserError: what pretrain refuses.
    """
    config = configure(request)
    return confirm(request, settle(request, config, blank_model(config)))


def confirm(request: Request, setting: Setting) -> Plan:
    """Add the fake run."""
    run = measure(setting.config, request.gpus, request.device, setting.paths)
    return Plan(request, setting, run)


def _wire(config: TrainConfig, parameters: dict[str, int], data: int, shards: int) -> float:
    """Bytes that a rank sends in an update (model.communication)."""
    engine = config.engine
    t, element = engine.tensor_parallel, 2 if engine.dtype == "bfloat16" else 4
    tokens = engine.batch_size * config.data.sequence_length
    steps = engine.gradient_accumulation
    situation = Situation(
        tokens, t, engine.sequence_parallel, element, config.activation_checkpointing == "block"
    )
    layers = layer_bytes(config.model, config.method, situation).total
    sent = steps * (layers * config.model.num_hidden_layers + ends_bytes(config.model, situation))
    trained, offsets = parameters["total"], parameters["indices_bytes"]
    share, held = (data - 1) / data, trained / t
    if engine.engine == "fsdp" or engine.stage == 3:
        gathered = sharding_bytes(trained, offsets, shards, t, element, 0)
        reduced = sharding_bytes(trained, 0, shards, t, 0, 4)
        copies = engine.replicate
        sent += _masks(config, parameters, shards, element)
        reduced += 2 * (copies - 1) / copies * held * 4 / shards
        return sent + steps * gathered + (1 if engine.grad_sync == "last" else steps) * reduced
    if engine.stage == 0:
        return sent + 2 * share * held * 4
    times = steps if engine.stage == 2 else 1
    return sent + share * held * (4 * times + element)


def _masks(config: TrainConfig, parameters: dict[str, int], shards: int, element: int) -> float:
    """Of choosing slope's second masks, spread over the updates between."""
    method, values = config.method, parameters["sparse"]
    if method.method != "slope" or not method.mask_change_freq:
        return 0.0
    positions = parameters["indices_bytes"] - values / 8
    sent = masks_bytes(values, positions, shards, config.engine.tensor_parallel, element)
    return sent / method.mask_change_freq


def _flops(config: TrainConfig, paths: LinearPaths) -> float:
    """Of all ranks in an update, recomputation included."""
    chosen = list(paths.chosen.values())
    path: Path = "composed" if chosen.count("composed") * 2 >= len(chosen) else "factorized"
    each = flops_per_token(
        config.model,
        config.method,
        config.data.sequence_length,
        tokens=config.engine.batch_size * config.data.sequence_length,
        path=path,
        checkpointing=config.activation_checkpointing,
    )
    return each.total * config.tokens_per_update
