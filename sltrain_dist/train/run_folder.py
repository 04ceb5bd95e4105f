"""The folder of a run: who may write there, and its records (config, metrics, summary, loss picture).

    config.json     the resolved configuration       metrics.jsonl  one line per update or evaluation
    summary.json    the outcome, at the end          loss.png       the curve, at the end
    sample.txt      text the trained model wrote     step_N/ latest checkpoints (train.checkpoint)
    tokenizer.json  with tokenizer_config.json, at the start: exports need neither corpus nor cache
    .lock           held by the run that writes here, until its process ends

A disk that fills up must not end a training: records that cannot be written are reported once, and lines of metrics
wait until there is room.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any

from sltrain_dist.config import TrainConfig
from sltrain_dist.data.tokenizer import Tokenizer
from sltrain_dist.train.checkpoint_identity import check_configuration
from sltrain_dist.train.journal import Tolerant, finite
from sltrain_dist.utils.errors import UserError

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"


def choose_folder(config: TrainConfig) -> Path:
    """The folder this run saves in: --save_dir, else the run continued from, else a new one, made here.

    A new one is named by the time, with -2, -3, ... where another run took the name first.

    Raises:
        UserError: --continue_from auto without --save_dir; the new folder cannot be made.
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
    return _new_folder(Path("runs") / f"{config.model.name}-{config.method.method}-{stamp}")


def _new_folder(wanted: Path) -> Path:
    """Make ``wanted``, or the first of wanted-2, wanted-3, ... that does not exist yet."""
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        except OSError as error:
            raise UserError(f"--save_dir {folder}: not writable ({error.strerror})") from None
        else:
            return folder


def claim_folder(folder: Path, config: TrainConfig) -> None:
    """Make the folder, prove that it can be written, and refuse one that holds another run.

    Raises:
        UserError: not a folder, not writable, another run's, or, under ``--continue_from auto``,
            of a run of another model or method.
    """
    continue_from = config.continue_from
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
    if continue_from == "auto":
        document = _read_config(folder)
        if document is not None:
            check_configuration(document, config, folder)


def _read_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of an earlier attempt; None where there is none, or a kill left half of one."""
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict):
        return None
    whole = all(isinstance(document.get(part), dict) for part in ("model", "method"))
    return document if whole else None


class FolderLock:
    """An exclusive hold on a run folder; ends with this object or with the process, however it dies."""

    def __init__(self, descriptor: int) -> None:
        self._release = weakref.finalize(self, os.close, descriptor)
        # A forked child (a data worker) shares the hold and could outlive a killed parent.
        os.register_at_fork(after_in_child=self._release)


_held: "weakref.WeakValueDictionary[Path, FolderLock]" = weakref.WeakValueDictionary()


def lock_folder(folder: Path) -> object:
    """Take the folder for this process, for as long as the returned object lives; first rank only.

    Where the file system has no locks, nothing is locked and nothing said. A second call for the
    same folder in the same process returns the same hold.

    Raises:
        UserError: a run of another process holds the folder, or its lock file cannot be opened.
    """
    place = folder.resolve()
    held = _held.get(place)
    if held is not None:
        return held
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"--save_dir {folder}: not writable ({error.strerror})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            owner = " ".join(os.read(descriptor, 200).decode(errors="replace").split())
            os.close(descriptor)
            raise UserError(
                f"--save_dir {folder}: another run ({owner or 'unknown'}) is writing there; "
                "wait for it or give another folder"
            ) from None
    else:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{socket.gethostname()}, pid {os.getpid()}\n".encode())
    lock = _held[place] = FolderLock(descriptor)
    return lock


class Records(Tolerant):
    """Writes the records of a run."""

    def _write(self, name: str, text: str) -> None:
        self._try(name, lambda: (self.folder / name).write_text(text, encoding="utf-8"))

    def config(self, config: TrainConfig) -> None:
        self._write(CONFIG, json.dumps(config.to_json(), indent=2) + "\n")

    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._try("tokenizer.json", lambda: tokenizer.save(self.folder))

    def metrics(self, line: dict[str, Any]) -> None:
        """Append one line."""
        self._append(METRICS, line)

    def summary(self, summary: dict[str, Any]) -> None:
        self._write(SUMMARY, json.dumps(finite(summary), indent=2) + "\n")

    @property
    def summarised(self) -> bool:
        """Whether the folder has a summary."""
        return (self.folder / SUMMARY).exists()

    def sample(self, text: str) -> None:
        self._write("sample.txt", text + "\n")

    def position(self) -> dict[str, Any]:
        """What a checkpoint stores so that the metrics file continues without gap or repetition.

        With the lines that wait for room: the checkpoint may find some before they do.
        """
        self._flush()
        waiting = list(self._waiting.get(METRICS, ()))
        try:
            return {"bytes": (self.folder / METRICS).stat().st_size, "waiting": waiting}
        except OSError:
            return {"bytes": 0, "waiting": waiting}

    def rewind(self, position: dict[str, Any]) -> None:
        """Cut off lines written after the checkpoint that is resumed; a torn last line goes with them.

        ``{}``, the position of a fresh start, cuts off all.
        """
        path = self.folder / METRICS
        if self._active and path.exists() and path.stat().st_size > position.get("bytes", 0):
            self._try(METRICS, lambda: os.truncate(path, position.get("bytes", 0)))
        if self._active:
            self._waiting[METRICS] = list(position.get("waiting", ()))
            self._flush()

    def picture(self) -> str | None:
        """Draw loss.png from metrics.jsonl; returns why not, where it could not be drawn."""
        if not self._active:
            return None
        self._flush()
        try:
            _draw(self.folder / METRICS, self.folder / "loss.png")
        except ImportError:
            return "loss.png not drawn: matplotlib is not installed"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"loss.png not drawn: {error}"
        return None


def _lines(metrics: Path) -> list[dict[str, Any]]:
    """The lines that can be read; a crash of the machine may have torn one."""
    lines = []
    for text in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict):
                lines.append(line)
    return lines


def _draw(metrics: Path, target: Path) -> None:
    """Loss above; gradient norm and learning rate below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = _lines(metrics)
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
