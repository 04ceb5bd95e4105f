"""A plan as a table, as JSON and as a picture."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from sltrain_dist.config import TrainConfig
from sltrain_dist.tools.plan import Plan
from sltrain_dist.train.memory import KINDS
from sltrain_dist.train.optimization import PER_LAYER
from sltrain_dist.train.summary import human_bytes
from sltrain_dist.utils.errors import UserError

_COLOURS = ("#4c72b0", "#937860", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#ccb974", "#64b5cd")


def describe(plan: Plan) -> str:
    """The table: bytes by kind, beside them the formula's; below the rest."""
    request, setting = plan.request, plan.setting
    config, engine = setting.config, setting.config.engine
    where = f"{request.gpus} x {request.device}"
    name = engine.engine if engine.engine == "fsdp" else f"zero-{engine.stage}"
    if engine.tensor_parallel > 1:
        name += f", tensor parallel {engine.tensor_parallel}"
    lines = [
        f"{config.model.name}, {config.method.method}, {_optimizer(config)}, {name} on {where}, {_format(config)}, "
        f"{engine.batch_size} x {config.data.sequence_length} tokens x {engine.gradient_accumulation} micro-batches, "
        f"checkpointing {config.activation_checkpointing}",
        f"{'bytes of a rank at the peak':<28}{'fake run':>12}{'formula':>12}",
    ]
    rows = [(kind, plan.measured.peak[kind], setting.formula[kind]) for kind in KINDS]
    rows.append(("total", plan.total, setting.formula["total"]))
    lines += [f"  {kind:<26}{human_bytes(a):>12}{human_bytes(b):>12}" for kind, a, b in rows]
    lines += [
        f"sent by a rank    {human_bytes(int(setting.wire))} an update",
        f"computed by it    {setting.flops / 1e12:,.1f} TFLOP an update",
        f"time              {_seconds(setting.seconds)} an update, {setting.tokens_per_second:,.0f} tokens/s, at {request.tflops:g} TFLOP/s "
        f"and {request.bandwidth:g} GB/s a rank",
    ]
    if request.gpu_memory is not None and plan.fits:
        left = human_bytes(request.gpu_memory - plan.total)
        lines.append(f"fits              {human_bytes(request.gpu_memory)}, {left} left")
    return "\n".join(lines)


def _optimizer(config: TrainConfig) -> str:
    return config.optimizer.name + PER_LAYER * config.engine.per_layer


def _format(config: TrainConfig) -> str:
    if config.engine.dtype == "float32":
        return "float32"
    kept = "float32 masters" if config.engine.master_weights else "no masters"
    return f"{config.engine.dtype} with {kept}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def check_target(path: str | None, flag: str) -> None:
    """Refuse a file that cannot be written, before any work.

    Raises:
        UserError: naming the flag.
    """
    if path is None:
        return
    target = Path(path)
    if flag == "--png" and target.suffix != ".png":
        raise UserError(f"--png {path}: give a name that ends in .png")
    if flag == "--png" and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--png {path}: needs matplotlib; pip install matplotlib")
    try:
        if target.is_dir():
            raise IsADirectoryError("is a folder")
        if target.exists():
            target.open("a").close()
        else:  # tried, not left behind: what is planned may still be refused
            target.touch()
            target.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{flag} {path}: cannot be written ({reason}); give another file") from None


def write_json(path: str, content: Any) -> None:
    """Write ``content``."""
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def draw(path: str, plan: Plan) -> None:
    """Two stacked bars, fake run and formula, and a line where the memory ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    bars = {"fake run": plan.measured.peak, "formula": plan.setting.formula}
    unit = 2**30
    for place, sizes in enumerate(bars.values()):
        bottom = 0.0
        for kind, colour in zip(KINDS, _COLOURS, strict=True):
            height = sizes[kind] / unit
            axes.bar(place, height, 0.6, bottom, color=colour, label=kind if place == 0 else None)
            if height > 0.05 * sum(sizes[k] for k in KINDS) / unit:
                axes.text(place, bottom + height / 2, f"{height:.2f}", ha="center", va="center", fontsize=8, color="white")  # fmt: skip
            bottom += height
        axes.text(place, bottom, f"{bottom:.2f}", ha="center", va="bottom")
    if plan.request.gpu_memory is not None:
        limit = plan.request.gpu_memory / unit
        axes.axhline(limit, color="black", linestyle="--", linewidth=1)
        axes.text(1.75, limit, f"{limit:g} GiB", ha="right", va="bottom")
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_xlim(-0.6, 1.8)
    axes.margins(y=0.1)
    axes.set_ylabel("GiB of a rank at the peak")
    config = plan.setting.config
    axes.set_title(f"{config.model.name}, {config.method.method}, {_optimizer(config)}, {plan.request.gpus} ranks", fontsize=10)  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)
