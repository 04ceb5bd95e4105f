"""What a run left in its folder, read with patience: a report is wanted most when a run went wrong.

Only config.json and metrics.jsonl must be there. Runs of earlier versions have no events.jsonl, no heartbeat.json and
fewer fields; a run that goes on has no summary.json; a killed one may have torn the last line of a file, which is
passed over. Any other line that cannot be read is counted, and the page says so. Needs no torch: it runs on a login node.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sltrain_dist.utils.errors import UserError

Line = dict[str, Any]
LONGEST_TEXT = 2000  # characters of any one text that reach the page
# Writing direction, line separators, lone surrogates: they could make one text look like another.
_TRICKS = {0x2028, 0x2029, 0xFEFF, 0x061C, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # fmt: skip


@dataclass(frozen=True)
class RunFiles:
    """The readable part of a run folder. unread: file -> lines (or 1 for a whole JSON file) that could not be read."""

    folder: Path
    name: str
    config: Line
    updates: list[Line]  # by step, each once
    evaluations: list[Line]  # the same
    events: list[Line]  # by time
    heartbeat: Line | None
    summary: Line | None
    unread: dict[str, int] = field(default_factory=dict)


def read_runs(folders: Sequence[str]) -> list[RunFiles]:
    """Every run once, in the order given, under names that differ.

    Raises:
        UserError: a folder that is none, or no run's.
    """
    places: dict[Path, Path] = {}
    for text in folders:
        try:
            places.setdefault(Path(text).resolve(), Path(text))
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"RUN {clean(text)}: cannot be opened ({error})") from None
    runs = [read_run(folder) for folder in places.values()]
    names = distinct_names([(run.name, run.folder.resolve()) for run in runs])
    return [RunFiles(**{**vars(run), "name": name}) for run, name in zip(runs, names, strict=True)]


def read_run(folder: Path) -> RunFiles:
    """One run.

    Raises:
        UserError: no such folder, no config.json or metrics.jsonl in it, or one that cannot be read.
    """
    _check_folder(folder)
    unread: dict[str, int] = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8", errors="replace"))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except OSError as error:
        raise UserError(f"RUN {folder}: config.json: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"RUN {folder}: config.json is not the one of a run ({error})") from None
    lines = _lines(folder / "metrics.jsonl", unread)
    numbered = [line for line in lines if number(line.get("step")) is not None]
    if len(numbered) < len(lines):
        unread["metrics.jsonl"] = unread.get("metrics.jsonl", 0) + len(lines) - len(numbered)
    events = _lines(folder / "events.jsonl", unread) if (folder / "events.jsonl").exists() else []
    timed = [event for event in events if number(event.get("time")) is not None]
    if len(timed) < len(events):
        unread["events.jsonl"] = unread.get("events.jsonl", 0) + len(events) - len(timed)
    return RunFiles(
        folder=folder,
        name=clean(config.get("name") or folder.resolve().name, 80),
        config=config,
        updates=_by_step([line for line in numbered if "eval_loss" not in line]),
        evaluations=_by_step([line for line in numbered if "eval_loss" in line]),
        events=sorted(timed, key=lambda event: float(event["time"])),
        heartbeat=_document(folder / "heartbeat.json", unread),
        summary=_document(folder / "summary.json", unread),
        unread=unread,
    )


def _check_folder(folder: Path) -> None:
    try:
        if not folder.is_dir():
            problem = "is no folder" if folder.exists() else "no such folder"
            raise UserError(f"RUN {folder}: {problem}; give the folder of a run")
        for name in ("config.json", "metrics.jsonl"):
            if not (folder / name).is_file():
                inside = [path.parent.name for path in folder.glob("*/metrics.jsonl")]
                hint = f"; did you mean {folder / min(inside)}?" if inside else ""
                what = "has no" if name == "config.json" else "has no updates yet, there is no"
                raise UserError(
                    f"RUN {folder}: {what} {name}{hint or '; give the folder of a run'}"
                )
    except OSError as error:
        raise UserError(f"RUN {folder}: cannot be read ({error.strerror})") from None


def _lines(path: Path, unread: dict[str, int]) -> list[Line]:
    """The objects of a JSON-lines file; a last line without its newline may be torn, and is then no fault."""
    found: list[Line] = []
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                if isinstance(line, dict):
                    found.append(line)
                elif text.strip() and text.endswith("\n"):
                    unread[path.name] = unread.get(path.name, 0) + 1
    except OSError as error:
        raise UserError(f"RUN {path.parent}: {path.name}: {error.strerror}") from None
    return found


def _document(path: Path, unread: dict[str, int]) -> Line | None:
    """A JSON object, None where there is none; one that cannot be read is counted."""
    try:
        document = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        unread[path.name] = 1
        return None
    return document


def _by_step(lines: list[Line]) -> list[Line]:
    """In the order of steps; the later one of two of the same step stands."""
    return [line for _, line in sorted({int(line["step"]): line for line in lines}.items())]


def number(value: object) -> float | None:
    """A finite number, or None for everything else that a file may hold in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def clean(value: object, longest: int = LONGEST_TEXT) -> str:
    """A text for people: one line, without signs that change how the rest is shown, and not endless."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = "".join(
        "\ufffd" if ord(sign) in _TRICKS or 0xD800 <= ord(sign) < 0xE000 or not (sign.isprintable() or sign in " \n\t")
        else sign
        for sign in text[: longest + 1]
    )  # fmt: skip
    shown = " ".join(shown.split())
    return shown if len(text) <= longest else shown[: longest - 1] + "…"


def distinct_names(named: Sequence[tuple[str, Path]]) -> list[str]:
    """Each run's own name where no other has it, else with as much of its folder as tells it apart."""
    names = []
    for name, folder in named:
        others = [path for other, path in named if other == name and path != folder]
        depth = 1
        while depth < len(folder.parts) and any(
            path.parts[-depth:] == folder.parts[-depth:] for path in others
        ):
            depth += 1
        tail = clean(os.sep.join(folder.parts[-depth:]), 200)
        names.append(f"{name} ({tail})" if others else name)
    return names
