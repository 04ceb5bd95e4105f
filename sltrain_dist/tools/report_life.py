"""What happened to a run: its events, the stretches in which it lived, its figures and its state."""

import bisect
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sltrain_dist.tools.report_read import Line, RunFiles, clean, number

MOST_EVENTS = 400
ENDS = ("interrupted", "failed", "finished")
ACTIVE = ("starting", "training", "evaluating", "saving")
SILENT_SECONDS = (
    600.0  # a heartbeat older than this, of a run that should be at work, is no life sign
)
Column = list[float | None]


def column(lines: Iterable[Line], name: str) -> Column:
    """The numbers of one field; None where a line has none."""
    return [number(line.get(name)) for line in lines]


def smooth(values: Sequence[float | None], width: int) -> Column:
    """Mean of ``width`` values around each, fewer at the start, where a curve falls too fast for more."""
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    result: Column = []
    for i, value in enumerate(values):
        half = min(i, width // 2)
        low, high = i - half, min(len(values), i + half + 1)
        count = counts[high] - counts[low]
        result.append(None if value is None else (sums[high] - sums[low]) / count)
    return result


def began(run: RunFiles) -> float | None:
    """The moment the run first started, in Unix seconds; None where nothing tells."""
    starts = [float(event["time"]) for event in run.events[:1]]
    for line in run.updates:
        time = number(line.get("time"))
        if time is not None:
            starts.append(time - (number(line.get("seconds")) or 0.0))
            break
    return min(starts, default=None)


def at_step(
    axes: dict[str, Column], steps: list[int], step: float | None
) -> dict[str, float | None]:
    """Where an evaluation or event after ``step`` updates stands on the axes that count updates."""
    row = -1 if step is None else bisect.bisect_right(steps, step) - 1
    if row < 0:
        zero = None if step is None else 0.0
        return {"step": step, "tokens": zero, "trained": zero}
    return {"step": step, "tokens": axes["tokens"][row], "trained": axes["trained"][row]}


def events(run: RunFiles, axes: dict[str, Column], steps: list[int]) -> dict[str, Any]:
    """Counts of all, and the events themselves; of very many, those of the rarer kinds first."""
    kinds = [clean(event.get("event", "?"), 40) for event in run.events]
    counts, zero = Counter(kinds), began(run) or 0.0
    order = sorted(range(len(kinds)), key=lambda i: (counts[kinds[i]], i))
    shown = []
    for i in sorted(order[:MOST_EVENTS]):
        event, time = run.events[i], float(run.events[i]["time"])
        place = at_step(axes, steps, number(event.get("step"))) | {"wall": round(time - zero, 3)}
        shown.append({"time": time, "kind": kinds[i], "x": place, "text": describe(event)})
    return {"counts": dict(counts), "shown": shown, "sessions": sessions(run, axes)}


def sessions(run: RunFiles, axes: dict[str, Column]) -> list[tuple[float, float, str]]:
    """(from, to, how it ended) of every process of the run, by wall time; a killed one leaves no word, only silence."""
    zero = began(run) or 0.0
    starts = [float(event["time"]) - zero for event in run.events if event.get("event") == "start"]
    signs = [value for value in axes["wall"] if value is not None]
    signs = sorted([*signs, *(float(event["time"]) - zero for event in run.events)])
    heart = run.heartbeat or {}
    result = []
    for start, until in zip(starts, [*starts, math.inf][1:], strict=True):
        ends = [
            (float(event["time"]) - zero, str(event["event"])) for event in run.events
            if event.get("event") in ENDS and start <= float(event["time"]) - zero < until
        ]  # fmt: skip
        last = signs[max(0, bisect.bisect_left(signs, until) - 1)]
        state = str(heart.get("state"))
        how = (
            state
            if math.isinf(until) and state in ACTIVE
            else "killed"
            if until < math.inf
            else "no end recorded"
        )
        to, how = ends[-1] if ends else (last, how)
        result.append((round(start, 3), round(max(start, to), 3), clean(how, 40)))
    return result


def describe(event: Line) -> str:
    """An event's own fields as one line for people."""
    words: dict[str, Callable[[Any], str]] = {
        "hosts": lambda v: f"on {', '.join(map(str, listed(v)))}",
        "world_size": lambda v: f"{v} rank{'s' * (v != 1)}",
        "tensor_parallel": lambda v: f"tensor parallel {v}" if v != 1 else "",
        "continued_from": lambda v: f"continued from {v}",
        "restarts": lambda v: f"restart {v}" if v else "",
        "job": lambda v: f"job {v}",
        "to": lambda v: f"back to update {v}",
        "position": lambda v: (
            f"data moved on to {v if isinstance(v, int | str) else 'another position'}"
        ),
        "rank": lambda v: f"rank {v}",
        "seconds": lambda v: f"{number(v):.2f} s" if number(v) is not None else "",
        "skipped": lambda v: "skipped" if v is True else "not skipped",
        "host": lambda v: f"on {v}",
    }
    words |= dict.fromkeys(("reason", "signal", "folder", "engine"), str)
    said = []
    for key, value in event.items():
        if key in ("time", "event", "step", "command") or value is None:
            continue
        if key in words:
            said.append(words[key](value))
        else:
            known = number(value)
            said.append(f"{key} {known:.5g}" if known is not None else f"{key} {value}")
    return clean(", ".join(text for text in said if text), 600)


def figures(run: RunFiles, axes: dict[str, Column]) -> dict[str, Any]:
    """The summary's numbers, or what the lines so far say in their place."""
    last = run.updates[-1] if run.updates else {}
    step = int(last.get("step", 0))
    summary = run.summary or {}
    if (number(summary.get("step")) or 0) < step:  # of an earlier end: the run was continued
        summary = {}
    losses = smooth(column(run.updates, "loss"), len(run.updates) // 30)
    evaluated = run.evaluations[-1] if run.evaluations else {}
    rates = [value for value in column(run.updates, "tokens_per_second") if value is not None]
    memory = [value for value in column(run.updates, "peak_memory_bytes") if value is not None]
    heart, parameters = run.heartbeat or {}, (run.summary or {}).get("parameters")
    wall = [value for value in axes["wall"] if value is not None]
    return {
        "perplexity": _first(summary.get("final_eval_perplexity"), evaluated.get("eval_perplexity")),
        "held_out": _first(summary.get("final_eval_loss"), evaluated.get("eval_loss")),
        "loss": next((value for value in reversed(losses) if value is not None), None),
        "step": step,
        "total_steps": _first(heart.get("total_steps"), _part(run.config, "optimizer").get("total_steps")),
        "tokens": _first(last.get("tokens_seen"), summary.get("tokens_seen")),
        "parameters": number(parameters.get("total")) if isinstance(parameters, dict) else None,
        "rate": _first(summary.get("tokens_per_second"), statistics.median(rates) if rates else None),
        "memory": max([*memory, *filter(None, [number(summary.get("peak_memory_bytes"))])], default=None),
        "wall": _first(wall[-1] if wall else None, summary.get("wall_seconds")),
        "trained": axes["trained"][-1] if run.updates else None,
        "goodput": _first(heart.get("goodput"), last.get("goodput")),
        "mfu": _median([value for value in column(run.updates, "mfu") if value is not None]),
        "restarts": _restarts(run),
    }  # fmt: skip


def life(run: RunFiles, now: float) -> dict[str, Any]:
    """State and alarms, by the heartbeat; without one, whether the run wrote its summary."""
    heart = run.heartbeat or {}
    state = clean(heart.get("state") or ("finished" if run.summary else "no end recorded"), 40)
    time = number(heart.get("time"))
    age = None if time is None else max(0.0, now - time)
    return {
        "state": state,
        "age": age,
        "silent": state in ACTIVE and age is not None and age > SILENT_SECONDS,
        "eta": number(heart.get("eta_seconds")) if state in ACTIVE else None,
        "alarms": [clean(text, 300) for text in listed(heart.get("alarms"))[:20]],
        "where": ", ".join(
            f"{label} {clean(heart[key], 80)}"
            for key, label in (("host", "host"), ("pid", "process"), ("job", "job"))
            if heart.get(key) is not None
        ),
        "checkpoint": number(heart.get("last_checkpoint")),
    }


def _restarts(run: RunFiles) -> int | None:
    told = number((run.heartbeat or {}).get("restarts"))
    starts = len([event for event in run.events if event.get("event") == "start"])
    if told is None and not starts:
        return None
    return max(int(told or 0.0), starts - 1)


def _first(*values: object) -> float | None:
    return next((known for value in values if (known := number(value)) is not None), None)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _part(document: Line, name: str) -> Line:
    part = document.get(name)
    return part if isinstance(part, dict) else {}


def listed(value: object) -> list[Any]:
    """The list, or an empty one for anything else."""
    return value if isinstance(value, list) else []
