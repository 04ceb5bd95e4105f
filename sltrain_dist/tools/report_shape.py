"""Curves, figures and events of a run in the shape that the page draws: small, rounded, with every extreme kept.

A run of 100,000 updates has more lines than a screen has columns. Each curve is cut into equal buckets of updates and
of each bucket its smallest and largest value stay, so no spike is lost; means (thick lines, the timing split) are taken
of all values before. Positions on the x axis are kept once a run, for the updates that any curve still shows.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from sltrain_dist.tools.report_life import (
    Column,
    at_step,
    began,
    column,
    events,
    figures,
    life,
    listed,
    smooth,
)
from sltrain_dist.tools.report_read import Line, RunFiles, clean, number

POINTS, SMOOTH_POINTS, BUCKETS = 2000, 600, 240
CURVES = ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "goodput", "mfu")
SMOOTHED = ("loss", "grad_norm", "tokens_per_second", "mfu")
PARTS = ("data", "forward", "backward", "optimizer", "communication", "save")
AXES = ("step", "tokens", "wall", "trained")


def shape_run(run: RunFiles, now: float) -> dict[str, Any]:
    """Everything the page shows of one run, as plain JSON."""
    axes = _axes(run)
    steps = [int(line["step"]) for line in run.updates]
    curves: dict[str, tuple[list[int], Column]] = {}
    for name in CURVES:
        values = column(run.updates, name)
        if any(value is not None for value in values):
            curves[name] = (thin(values, POINTS), values)
            if name in SMOOTHED:
                mean = smooth(values, len(values) // 30)
                curves[f"{name}_mean"] = (thin(mean, SMOOTH_POINTS), mean)
    timing = _timing(run.updates)
    wanted = set(itertools.chain(timing["rows"], *(rows for rows, _ in curves.values())))
    kept = sorted(wanted | ({0, len(steps) - 1} if steps else set()))
    place = {row: position for position, row in enumerate(kept)}
    timing["rows"] = [place[row] for row in timing["rows"]]
    return {
        "name": run.name,
        "folder": clean(str(run.folder), 500),
        "rows": {name: [_short(axes[name][row]) for row in kept] for name in AXES},
        "curves": {
            name: {"rows": [place[row] for row in rows], "values": [_round(values[row]) for row in rows]}
            for name, (rows, values) in curves.items()
        },
        "evaluations": _evaluations(run, axes, steps),
        "timing": timing,
        "events": events(run, axes, steps),
        "figures": figures(run, axes),
        "life": life(run, now),
        "config": dict(_flat(run.config)),
        "command": clean(" ".join(map(str, listed(run.config.get("command"))))),
        "unread": run.unread,
    }  # fmt: skip


def thin(values: Sequence[float | None], limit: int) -> list[int]:
    """Positions of at most ``limit`` values: of every bucket the smallest and the largest, the first and the last.

    Of stretches that stay the same only the ends are kept.
    """
    known = [place for place, value in enumerate(values) if value is not None]
    last = len(known) - 1
    turning = [
        place for i, place in enumerate(known)
        if i in (0, last) or not values[known[i - 1]] == values[place] == values[known[i + 1]]
    ]  # fmt: skip
    if len(turning) <= limit:
        return turning
    buckets = max(1, (limit - 2) // 2)
    kept = {turning[0], turning[-1]}
    for b in range(buckets):
        inside = turning[len(turning) * b // buckets : len(turning) * (b + 1) // buckets]
        kept |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}  # type: ignore[arg-type]
    return sorted(kept)


def _axes(run: RunFiles) -> dict[str, Column]:
    """x of every update by each axis; wall time counts from the first start, trained time only updates that stand."""
    times, tokens = column(run.updates, "time"), column(run.updates, "tokens_seen")
    rates, seconds = column(run.updates, "tokens_per_second"), column(run.updates, "seconds")
    zero = began(run)
    wall: Column = []
    trained: Column = []
    total, latest, before = 0.0, 0.0, 0.0
    for time, seen, rate, spent in zip(times, tokens, rates, seconds, strict=True):
        if spent is None and seen is not None and rate:
            spent = (seen - before) / rate
        before = before if seen is None else seen
        total += max(0.0, spent or 0.0)
        trained.append(round(total, 3))
        if time is not None and zero is not None:
            latest = max(
                latest, time - zero
            )  # clocks of two nodes may differ; a curve never runs back
        wall.append(None if time is None else round(latest, 3))
    known = total > 0.0
    steps: Column = [int(line["step"]) for line in run.updates]
    return {"step": steps, "tokens": tokens, "wall": wall, "trained": trained if known else [None] * len(trained)}  # fmt: skip


def _evaluations(run: RunFiles, axes: dict[str, Column], steps: list[int]) -> dict[str, list[Any]]:
    zero = began(run)
    result: dict[str, list[Any]] = {name: [] for name in (*AXES, "loss", "perplexity")}
    for line in run.evaluations:
        loss, time = number(line.get("eval_loss")), number(line.get("time"))
        if loss is None:
            continue
        place = at_step(axes, steps, number(line["step"]))
        if time is not None and zero is not None:
            place["wall"] = round(max(0.0, time - zero), 3)
        for name in AXES:
            result[name].append(place.get(name))
        result["loss"].append(_round(loss))
        result["perplexity"].append(_round(number(line.get("eval_perplexity"))))
    return result


def _timing(updates: list[Line]) -> dict[str, Any]:
    """Mean seconds of an update by part, in at most BUCKETS stretches, and over all.

    Communication is sampled: its mean is over the updates that have it. Saves are spread over all updates.
    """
    parts: dict[str, Column] = {part: column(updates, f"seconds_{part}") for part in PARTS}
    parts["all"] = column(updates, "seconds")
    present = [part for part in parts if any(value is not None for value in parts[part])]
    count = min(BUCKETS, len(updates))
    result: dict[str, Any] = {"rows": [], "parts": {part: [] for part in present}, "mean": {}}
    if not set(present) - {"all", "save", "communication"}:
        return {"rows": [], "parts": {}, "mean": {}}
    for b in range(count):
        low, high = len(updates) * b // count, len(updates) * (b + 1) // count
        result["rows"].append((low + high - 1) // 2)
        for part in present:
            result["parts"][part].append(_round(_mean(parts[part][low:high], part == "save")))
    result["mean"] = {part: _round(_mean(parts[part], part == "save")) for part in present}
    return result


def _mean(values: Column, spread: bool) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return 0.0 if spread else None
    return sum(known) / (len(values) if spread else len(known))


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as (a.b, text)."""
    for key, inner in value.items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, path)
        elif path != "command":
            yield clean(path, 120), clean(inner)


def _round(value: float | None) -> float | None:
    """Five digits: more than any screen shows."""
    return None if value is None else float(f"{value:.5g}")


def _short(value: float | None) -> float | int | None:
    """A place on an axis: whole where it is, else to a hundred-thousandth of itself or better."""
    if value is None or value == int(value):
        return None if value is None else int(value)
    return float(f"{value:.7g}")
