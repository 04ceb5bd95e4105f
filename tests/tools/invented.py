"""Invented run folders for the report's tests: what a run of any length, with any accident, leaves behind."""

import json
import math
import random
from pathlib import Path

START = 1_790_000_000.0  # Unix seconds
CONFIG = {"name": None, "tags": [], "command": ["--model", "llama_60m"], "model": {"name": "llama_60m", "hidden_size": 512},
          "optimizer": {"name": "adamw", "lr": 0.003, "total_steps": 1000}}  # fmt: skip


def write_lines(path: Path, lines: list) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def update(step: int, time: float, noise: random.Random) -> dict:
    """A line as the trainer writes it."""
    seconds = 0.8 + 0.1 * noise.random()
    line = {
        "step": step,
        "loss": 3.2 + 7.0 * math.exp(-step / 150) + 0.12 * noise.gauss(0, 1),
        "lr": 0.003 * min(1.0, step / 100),
        "grad_norm": 0.5 + noise.random() ** 4,
        "tokens_seen": 4096 * step,
        "tokens_per_second": 4096 / seconds,
        "peak_memory_bytes": 3 * 2**30 + (step > 200) * 2**28,
        "time": time,
        "seconds": seconds,
        "seconds_data": 0.02,
        "seconds_forward": 0.3 * seconds,
        "seconds_backward": 0.55 * seconds,
        "seconds_optimizer": 0.08 * seconds,
        "goodput": 0.93,
        "mfu": 0.41 + 0.02 * noise.random(),
    }
    if step % 100 == 0:
        line |= {"seconds_communication": 0.05, "slowest_rank": 3, "slowest_seconds": 0.9}
    if step % 500 == 1 and step > 1:
        line["seconds_save"] = 4.0
    return line


def run(
    folder: Path, updates: int, seed: int = 0, accidents: bool = True, **config: object
) -> Path:
    """A run of ``updates``, with two interruptions, a spike and a failed save where ``accidents``."""
    folder.mkdir(parents=True)
    noise, clock = random.Random(seed), START
    stops = (updates // 3, 2 * updates // 3) if accidents else ()
    start = {"event": "start", "world_size": 8, "tensor_parallel": 2, "engine": "fsdp", "hosts": ["node1", "node2"], "restarts": 0}  # fmt: skip
    lines, events = [], [{"time": clock, "step": 0, **start}]
    for step in range(1, updates + 1):
        line = update(step, clock, noise)
        clock += line["seconds"]
        lines.append(line | {"time": clock})
        if step % 500 == 0:
            events.append({"time": clock, "event": "saved", "step": step, "seconds": 4.0, "folder": f"step_{step}"})  # fmt: skip
            lines.append({"step": step, "eval_loss": line["loss"], "eval_perplexity": math.exp(line["loss"]), "eval_tokens": 10**7, "time": clock})  # fmt: skip
        if step in stops:
            how = {"event": "interrupted", "signal": "SIGUSR1"} if step == stops[0] else {"event": "stalled", "rank": 5, "host": "node2", "reason": "no collective within 600 s"}  # fmt: skip
            events.append({"time": clock, "step": step, **how})
            clock += 0.1 * updates
            events.append({"time": clock, "step": step, **start, "restarts": stops.index(step) + 1, "continued_from": f"step_{step}", "job": "4711"})  # fmt: skip
    if accidents:
        events += [
            {"time": START + 0.2 * updates, "event": "spike", "step": updates // 4, "loss": 9.1, "mean": 4.0, "sigma": 12.0, "skipped": True},
            {"time": START + 0.25 * updates, "event": "save_failed", "step": updates // 4, "reason": "No space left on device"},
        ]  # fmt: skip
    events.append({"time": clock, "event": "finished", "step": updates})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "events.jsonl", events)
    heartbeat = {"time": clock, "state": "finished", "step": updates, "total_steps": updates, "goodput": 0.93, "restarts": len(stops), "alarms": [], "host": "node1", "pid": 7, "job": "4711", "last_checkpoint": updates}  # fmt: skip
    (folder / "heartbeat.json").write_text(json.dumps(heartbeat))
    summary = {"final_eval_perplexity": 24.5, "final_eval_loss": 3.2, "step": updates, "tokens_seen": 4096 * updates,
               "parameters": {"total": 43_500_000}, "tokens_per_second": 4800.0, "peak_memory_bytes": 3 * 2**30, "wall_seconds": clock - START}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
