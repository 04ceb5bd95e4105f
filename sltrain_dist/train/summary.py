"""What a user reads before training: the run in a screenful, with an estimate of its memory (train.memory)."""

import contextlib
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sltrain_dist.config import TrainConfig
from sltrain_dist.model.flops import model_flops_per_token
from sltrain_dist.optim.table import describe
from sltrain_dist.parallel.mesh import Mesh, max_over_ranks
from sltrain_dist.train.optimization import warnings

if TYPE_CHECKING:
    from sltrain_dist.train.run import Run

# Dense bf16 FLOP/s without sparsity, from the vendors' data sheets.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def say(mesh: Mesh, text: str) -> None:
    """Print on the first rank alone; a terminal or pipe that is gone stops nothing."""
    if mesh.is_first:
        with contextlib.suppress(OSError):
            print(text, flush=True)


def peak_flops() -> float | None:
    """FLOP/s of this GPU in bf16, None where unknown (so no MFU is printed)."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for key, flops in _PEAK_FLOPS.items() if key in name), None)


def throughput(run: "Run", tokens_per_second: float) -> float | None:
    """Model FLOPs utilisation over all ranks' GPUs, or None where the peak is unknown."""
    peak = peak_flops()
    if peak is None:
        return None
    config = run.config
    flops = model_flops_per_token(config.model, config.method, config.data.sequence_length)
    return tokens_per_second * flops.total / (peak * run.mesh.world_size)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"


def human_bytes(size: int) -> str:
    """ "1.25 GiB" or "312 MiB"."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def own_peak(mesh: Mesh) -> int:
    """Bytes: the most this rank has used so far, of GPU memory or else resident in RAM."""
    return torch.cuda.max_memory_allocated() if mesh.device.type == "cuda" else peak_resident()


def peak_memory(mesh: Mesh) -> int:
    """`own_peak` of the rank that has used most."""
    return int(max_over_ranks(mesh, torch.tensor(own_peak(mesh))))


def peak_resident() -> int:
    """Bytes of RAM at this program's peak; getrusage also counts the process that started it, before its exec."""
    status = Path("/proc/self/status")
    if status.exists() and "VmHWM:" in (
        text := status.read_text()
    ):  # some containers' kernels have none
        return int(text.partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_summary(run: "Run", attention: str, norm: str) -> None:
    """Print what is about to be trained, on the first rank."""
    config, counts, engine = run.config, run.parameters, run.config.engine
    kinds = ", ".join(
        f"{kind} {_millions(counts[kind])}" for kind in ("low_rank", "sparse", "dense")
    )
    left = config.optimizer.total_steps - run.step
    parts = ", ".join(
        f"{name} {human_bytes(size)}"
        for name, size in run.estimate.items()
        if size and name != "total"
    )
    held = run.engine.held_bytes()
    rows = {
        "run": f"{run.records.folder}",
        "model": f"{config.model.name}{' (transformers)' if config.use_hf_model else ''}",
        "method": _method(run),
        "parameters": f"{_millions(counts['total'])} trained: {kinds}; "
        f"indices {counts['indices_bytes'] / 1e6:.2f} MB",
        "data": run.data.description,
        "optimizer": _optimizer(run),
        "engine": f"{run.engine.name} on {run.mesh.world_size} x {run.mesh.device.type}{_axes(run)}, {_formats(config)}",
        "linear paths": run.linear_paths.describe(run.engine.module),
        "back ends": f"attention {attention}, norm {norm}, compile {config.compile}, tracker {run.tracker.description}",
        "batch": f"{config.total_batch_size} sequences x {config.data.sequence_length} tokens = "
        f"{engine.batch_size} x {run.mesh.dp_size} {'data-parallel ' * (run.mesh.tp_size > 1)}ranks x {engine.gradient_accumulation} micro-batches",
        "training": f"{left:,} updates, {left * config.tokens_per_update:,} tokens planned",
        "held": "a rank holds " + ", ".join(f"{name} {human_bytes(n)}" for name, n in held.items()),
        "memory": f"about {human_bytes(run.estimate['total'])} a rank: {parts}",
    }
    for name, text in rows.items():
        if text:
            say(run.mesh, f"{name:<12} {text}")
    for warning in warnings(config):
        say(run.mesh, f"warning: {warning}")


def _method(run: "Run") -> str:
    method = run.config.method
    if method.method == "full":
        return "full"
    if method.method == "slope":
        every = f"every {method.mask_change_freq} updates" if method.mask_change_freq else "never"
        return f"slope, {method.pattern} of neighbouring weights, second mask chosen anew {every}"
    scale = "tanh(scaling), trained" if method.train_scaling else f"{method.scale:g}"
    text = f"{method.method}, rank {method.rank}, scale {scale}"
    if method.method == "sltrain":
        reached = f"density {_density(run):.4f} (asked {method.density:g})"
        text += f", support {method.support}, {reached}"
    return text


def _optimizer(run: "Run") -> str:
    """The optimizer that is live in the engine, not the one asked for."""
    config, per_layer = run.config.optimizer, run.config.engine.per_layer
    live = describe(run.engine.optimizer)
    how = f" by {config.per_layer_clip}" if per_layer and config.grad_clipping else ""
    return (
        f"{live['class']}{_moments(live['groups'])}{', inside backward' * per_layer}, lr {config.lr:g}, {config.scheduler}, "
        f"{config.warmup_steps} warm-up updates, weight decay {config.weight_decay:g}, "
        f"clip {config.grad_clipping or 'off'}{how}"
    )


def _moments(groups: list[dict[str, Any]]) -> str:
    """ " (moments of 8 bits 178.20M, 32 bits 0.05M elements a rank)", where some have 8."""
    counts = {group["bits"]: group["elements"] for group in groups}
    if 8 not in counts:
        return ""
    return f" (moments of {', '.join(f'{bits} bits {_millions(count)}' for bits, count in sorted(counts.items()))} elements a rank)"


def _axes(run: "Run") -> str:
    """What the ranks do, where they do not all hold other samples and other shards."""
    mesh, text = run.mesh, ""
    if mesh.tp_size > 1:
        sequence = " with sequence parallel" if run.config.engine.sequence_parallel else ""
        text = f": tensor parallel {mesh.tp_size}{sequence} x data parallel {mesh.dp_size}"
    if mesh.replicate_size > 1:
        text += f", {mesh.replicate_size} replicas of {mesh.shard_size} shards"
    return text


def _formats(config: TrainConfig) -> str:
    if config.engine.dtype == "float32":
        return "float32"
    master = "fp32 master weights" if config.engine.master_weights else "no master weights"
    return f"bfloat16, {master}"


def _density(run: "Run") -> float:
    """The density really reached: entries of S over entries of the matrices that have one."""
    from sltrain_dist.params.linears import SLTrain

    entries = elements = 0.0
    for module in run.engine.module.modules():
        if isinstance(module, SLTrain):
            size = module.shape.logical_out * module.shape.logical_in
            entries += module.support.density * size
            elements += size
    return entries / elements if elements else 0.0
