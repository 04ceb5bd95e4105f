"""How the benchmarks measure and what they leave: paired turns, transient memory, JSON, a table, a picture.

What is compared runs turn by turn in one process, in alternating order, after warm-ups: whatever else the
machine does meets all candidates. A ratio is the median of the turns' ratios, with [lowest to highest].
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # a bare machine: the package is not installed

Call = Callable[[], Sequence[Tensor]]  # runs a candidate once; gives back its results
_SHORTEST = 0.004  # seconds of one timing on a GPU; shorter calls are repeated inside it


def wait(device: str) -> None:
    """Until the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], device: str, inner: int = 1) -> float:
    """Seconds of one call, the mean of ``inner`` in a row."""
    wait(device)
    began = time.perf_counter()
    for _ in range(inner):
        result = call()
        del result
    wait(device)
    return (time.perf_counter() - began) / inner


def paired(
    candidates: Mapping[str, Callable[[], object]],
    device: str,
    turns: int,
    *,
    warm_ups: int = 2,
    limit: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds per turn of every candidate, all of them in every turn.

    Args:
        turns: at most so many; at least 3 (or ``turns``), however long they take.
        limit: seconds for all turns together, about.
    """
    inner = dict.fromkeys(candidates, 1)
    for _ in range(warm_ups):
        for name, call in candidates.items():
            taken = seconds_of(call, device)
            if device == "cuda":
                inner[name] = max(1, min(20, int(_SHORTEST / taken)))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    began = time.perf_counter()
    for turn in range(turns):
        if turn >= 3 and (time.perf_counter() - began) * (turn + 1) / turn > limit:
            break
        for name in list(candidates)[:: -1 if turn % 2 else 1]:
            found[name].append(seconds_of(candidates[name], device, inner[name]))
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """[median, lowest, highest] of the turns' ratios."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def milliseconds(seconds: Sequence[float]) -> list[float]:
    """[median, lowest, highest] of the turns."""
    return [1e3 * statistics.median(seconds), 1e3 * min(seconds), 1e3 * max(seconds)]


def transient_bytes(call: Call, device: str) -> int:
    """Most bytes alive at once during a call, its results (and what stood before) not counted.

    On a CPU every event of torch's allocator is followed, also inside compiled operators; what the
    BLAS library keeps for itself is not seen. On CUDA: the allocator's peak less all results.
    """
    result = call()  # caches that live on are filled here
    del result
    if device != "cuda":
        return _followed(call)
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    wait(device)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return max(0, torch.cuda.max_memory_allocated() - before - sum(sizes.values()))


def _followed(call: Call) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else two lines of its own per profile
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    results = {tensor.untyped_storage().data_ptr() for tensor in kept}
    found: list[tuple[int, int, int]] = []  # (time, address, bytes; negative where freed)
    pending: list[Any] = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    found.sort(key=lambda entry: entry[0])
    last = {address: number for number, (_, address, size) in enumerate(found) if size > 0}
    live = peak = 0
    sizes: dict[int, int] = {}
    for number, (_, address, size) in enumerate(found):
        if size < 0:
            live -= sizes.pop(address, 0)
        elif address not in results or last[address] != number:
            sizes[address] = size
            live += size
        peak = max(peak, live)
    return peak


def about(device: str) -> dict[str, Any]:
    """What a figure depends on beside the code that made it: date, commit, machine, versions, kernels."""
    from sltrain_dist.ops import kernels
    from sltrain_dist.params.paths import device_name

    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "kernels": list(kernels.loaded()),
        "cpu_kernels": kernels.cpu_capability(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def flags(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small and few: does it run at all")
    parser.add_argument("--out", type=Path, help="write FILE.json, and FILE.png beside it")
    return parser


def finish(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and end the process; a user's error is one line, and code 2."""
    from sltrain_dist.utils.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def write(path: Path | None, device: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Write what was measured so far; called after every row, so that a run cut short leaves them."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about(device), **more, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells as aligned text, the first row above a rule."""
    cells = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def chart(
    path: Path | None,
    title: str,
    axis: str,
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    line: float | None = None,
) -> None:
    """Draw FILE.png: for every group a bar per name, [median, lowest, highest], with the spread.

    Args:
        axis: what the bars measure, with its unit.
        line: a value to compare with, drawn through all groups.
    """
    if path is None or not groups:
        return
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    count = sum(map(len, groups.values()))
    size = (9, 1.6 + 0.24 * count + 0.18 * len(groups))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    place, ticks, labels, drawn = 0.0, [], [], set()
    for label, bars in groups.items():
        ticks.append(place + (len(bars) - 1) / 2)
        labels.append(label)
        for name, (value, low, high) in bars.items():
            axes.barh(
                place, value, 0.9, color=f"C{names.index(name)}",
                xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                error_kw={"ecolor": "0.35", "capsize": 2},
                label=None if name in drawn else name,
            )  # fmt: skip
            axes.text(max(value, high), place, f"  {value:.3g}", va="center", fontsize=7)
            drawn.add(name)
            place += 1
        place += 0.8
    if line is not None:
        axes.axvline(line, color="0.2", linewidth=1, linestyle="--")
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    axes.set_title(title, fontsize=10)
    axes.set_xlim(0, 1.12 * max(bar[2] for bars in groups.values() for bar in bars.values()))
    figure.legend(loc="outside lower center", ncols=min(5, len(names)), fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=130)
    pyplot.close(figure)
