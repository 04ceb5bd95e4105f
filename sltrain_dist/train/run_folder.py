"""The folder of a run: who may write there, and its records (config, metrics, summary, loss picture).

    config.json     the resolved configuration       metrics.jsonl  one line per update or evaluation
    summary.json    the outcome, at the end          loss.png       the curve, at the end
    sample.txt      text the trained model wrote     step_N/ latest checkpoints (train.checkpoint)

A disk that fills up must not end a training: records that cannot be written are reported once.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from sltrain_dist.config import TrainConfig
from sltrain_dist.utils.errors import UserError

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"


def choose_folder(config: TrainConfig) -> Path:
    """The folder this run saves in: --save_dir, else the run continued from, else a new name by time.

    Raises:
        UserError: --continue_from auto without --save_dir.
    """
    if config.save_dir:
        return Path(config.save_dir)
    if config.continue_from == "auto":
        raise UserError("--continue_from auto: looks in --save_dir, which is not given; add it")
    if config.continue_from:
        source = Path(config.continue_from)
        is_step = source.resolve().name.startswith("step_")
        return source.resolve().parent if is_step else source
    stamp = time.strftime("%Y-%m-%d-%H-%M-%S")
    return Path("runs") / f"{config.model.name}-{config.method.method}-{stamp}"


def claim_folder(folder: Path, continue_from: str | None) -> None:
    """Make the folder, prove that it can be written, and refuse one that holds another run.

    Raises:
        UserError: not a folder, not writable, or another run's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--save_dir {folder}: not writable ({error.strerror})") from None
    taken = (folder / CONFIG).exists() or any(folder.glob("step_*"))
    own = continue_from == "auto" or (
        continue_from is not None
        and folder.resolve()
        in (Path(continue_from).resolve(), Path(continue_from).resolve().parent)
    )
    if taken and not own:
        raise UserError(
            f"--save_dir {folder}: holds another run; continue it with --continue_from auto, "
            "or give another folder"
        )


class Records:
    """Writes the records of a run; on ranks other than the first every call does nothing."""

    def __init__(self, folder: Path, active: bool) -> None:
        self.folder = folder
        self._active = active
        self._failed = False

    def _write(self, name: str, text: str, mode: str = "w") -> None:
        if not self._active:
            return
        try:
            with open(self.folder / name, mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            if not self._failed:
                print(
                    f"warning: {self.folder / name}: {error.strerror}; training goes on",
                    file=sys.stderr,
                )
            self._failed = True

    def config(self, config: TrainConfig) -> None:
        self._write(CONFIG, json.dumps(config.to_json(), indent=2) + "\n")

    def metrics(self, line: dict[str, Any]) -> None:
        """Append one line; numbers that JSON has no name for become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        self._write(METRICS, json.dumps(finite) + "\n", "a")

    def summary(self, summary: dict[str, Any]) -> None:
        self._write(SUMMARY, json.dumps(summary, indent=2) + "\n")

    def sample(self, text: str) -> None:
        self._write("sample.txt", text + "\n")

    def position(self) -> dict[str, Any]:
        """What a checkpoint stores so that the metrics file continues without gap or repetition."""
        path = self.folder / METRICS
        return {"bytes": path.stat().st_size if path.exists() else 0}

    def rewind(self, position: dict[str, Any]) -> None:
        """Cut off lines written after the checkpoint that is resumed; a torn last line goes with them."""
        path = self.folder / METRICS
        if self._active and path.exists() and path.stat().st_size > position.get("bytes", 0):
            with open(path, "r+b") as file:
                file.truncate(position.get("bytes", 0))

    def picture(self) -> str | None:
        """Draw loss.png from metrics.jsonl; returns why not, where it could not be drawn."""
        if not self._active:
            return None
        try:
            _draw(self.folder / METRICS, self.folder / "loss.png")
        except ImportError:
            return "loss.png not drawn: matplotlib is not installed"
        except OSError as error:
            return f"loss.png not drawn: {error}"
        return None


def _draw(metrics: Path, target: Path) -> None:
    """Loss above; gradient norm and learning rate below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    training = [line for line in lines if line.get("loss") is not None]
    held_out = [line for line in lines if line.get("eval_loss") is not None]
    figure, (top, bottom) = pyplot.subplots(
        2, sharex=True, figsize=(8, 6), dpi=120, height_ratios=(3, 1)
    )
    steps = [line["step"] for line in training]
    width = max(1, len(training) // 50)
    losses = [line["loss"] for line in training]
    top.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, each update")
    smooth = _running_mean(losses, width)
    top.plot(steps, smooth, color="#08519c", label=f"training, mean of {width + 1}")
    if held_out:
        points = [(line["step"], line["eval_loss"]) for line in held_out]
        top.plot(*zip(*points, strict=True), "o-", color="#d94801", label="held out")
        note = f"held-out perplexity {held_out[-1]['eval_perplexity']:.1f}"
        top.annotate(note, points[-1], xytext=(0, -22), textcoords="offset points", ha="right")
    top.set(ylabel="loss (nats per token)", title=metrics.parent.name)
    top.margins(y=0.12)
    top.legend()
    norms = [line["grad_norm"] or math.nan for line in training]
    bottom.semilogy(steps, norms, color="#636363", linewidth=1)
    bottom.set(xlabel="update", ylabel="gradient norm")
    rate = bottom.twinx()
    rate.plot(steps, [line["lr"] for line in training], color="#31a354")
    rate.set_ylabel("learning rate", color="#31a354")
    rate.set_ylim(bottom=0)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target)
    pyplot.close(figure)


def _running_mean(values: list[float], width: int) -> list[float]:
    """Mean of each value and up to ``width`` before it."""
    windows = (values[max(0, i - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
