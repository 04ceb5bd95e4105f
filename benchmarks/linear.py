#!/usr/bin/env python
"""Time and transient memory of one SLTrain linear by either path, against dense and the reference formula.

    python benchmarks/linear.py                                         the shapes and formats of the README's table
    python benchmarks/linear.py --presets 60m 7b --tokens 1024 8192     every linear of a preset, with its recipe
    python benchmarks/linear.py --shapes 512x512r128 --supports block --dtypes bfloat16

fwd is a forward without gradients, fwd_bwd forward and backward with all gradients. "auto" is the path that
--linear_path auto takes for the key (params.paths); its row says how far it is behind the better of the two.
On a CPU without bf16 units torch's own bf16 products are 20 to 200 times slower than float32's. There two dense
baselines are timed, torch's and ops.precision.linear, which widens, and the reference formula widens too: ratios
are to the faster dense. Memory: see measure.transient_bytes.
"""

import argparse
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from candidates import Case, Problem, plan
from measure import (
    chart,
    finish,
    flags,
    milliseconds,
    paired,
    ratio,
    seconds_of,
    table,
    transient_bytes,
    write,
)

from sltrain_dist.config import ModelConfig
from sltrain_dist.ops.linear import PATHS
from sltrain_dist.params import paths
from sltrain_dist.params.support import Support
from sltrain_dist.train.settings import resolve
from sltrain_dist.utils.errors import UserError

MODES = ("fwd", "fwd_bwd")
_SLOW = 3.0  # times slower than widened: torch's own bf16 is then timed apart, once
_PROBE_TOKENS = 64
_SLOW_SECONDS = 15.0  # at most, of such a timing; then fewer tokens, scaled


def preset_shapes(name: str) -> list[tuple[int, int, int, float, bool]]:
    """(out, in, rank, density, row_parallel) of the distinct linears of a preset, with its recipe."""
    name = name if name.startswith("llama_") else f"llama_{name}"
    method, model = resolve([f"--model={name}"], 1).method, ModelConfig.load(name)
    hidden, ff = model.hidden_size, model.padded_intermediate_size
    query = model.num_attention_heads * model.head_dim
    shapes = [(query, hidden, False), (hidden, query, True), (ff, hidden, False), (hidden, ff, True)]  # fmt: skip
    return [(out, in_, method.rank, method.density, row) for out, in_, row in shapes]


def torch_dense_apart(problem: Problem, case: Case, mode: str) -> dict[str, Any]:
    """Torch's own bf16 dense where it is too slow to take turns: few tokens, or one call; else empty."""
    if "dense widened" not in problem.functions:
        return {}
    probe = problem.calls(mode, _PROBE_TOKENS)
    taken = {}
    for name in ("dense widened", "dense torch"):
        probe[name]()
        taken[name] = seconds_of(probe[name], case.device)
    if taken["dense torch"] < _SLOW * taken["dense widened"]:
        return {}
    share = min(1.0, _SLOW_SECONDS / (taken["dense torch"] * case.tokens / _PROBE_TOKENS))
    tokens = min(case.tokens, max(_PROBE_TOKENS, int(case.tokens * share) // 64 * 64))
    seconds = taken["dense torch"]
    if tokens > _PROBE_TOKENS:
        seconds = seconds_of(problem.calls(mode, tokens)["dense torch"], case.device)
    return {"dense_torch_ms": 1e3 * seconds * case.tokens / tokens, "dense_torch_tokens": tokens}


def auto_path(case: Case, support: Support) -> dict[str, Any]:
    """What --linear_path auto takes, and whether the cost model or timing said so (train.linear_paths)."""
    key = paths.LinearKey(support, case.rank)
    situation = paths.Situation(torch.device(case.device), getattr(torch, case.dtype), case.tokens)
    if not paths.is_close(key, situation):
        return {"choice": paths.settled(key, situation), "chosen": "predicted"}
    timed = paths.measure(key, situation, paths.budget(1))
    return {"choice": paths.faster(timed), "chosen": "timed"}


def measure(
    case: Case, kinds: list[str], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of a case; a support that the matrix cannot have is said and left out."""
    device, supports = case.device, {}
    for kind in kinds:
        try:
            supports[kind] = plan(case, kind)
        except UserError as error:
            print(f"left out: {case.text} {kind}: {error}")
    if not supports:
        return
    chosen = {kind: auto_path(case, support) for kind, support in supports.items()}
    problem = Problem(case, supports)
    for mode in arguments.modes:
        apart = torch_dense_apart(problem, case, mode)
        calls = problem.calls(mode)
        if apart:
            del calls["dense torch"]
        seconds = paired(calls, device, arguments.turns, limit=arguments.seconds)
        memory = {name: transient_bytes(call, device) for name, call in calls.items()}
        dense = min(
            (name for name in calls if name.startswith("dense")),
            key=lambda name: milliseconds(seconds[name])[0],
        )
        row = {
            "out": case.out, "in": case.in_, "rank": case.rank, "density": case.density,
            "row_parallel": case.row_parallel, "tokens": case.tokens, "dtype": case.dtype, "mode": mode,
            "turns": len(seconds[dense]), "dense": dense.removeprefix("dense "), **apart,
            "dense_ms": milliseconds(seconds[dense])[0],
            "reference_ms": milliseconds(seconds["reference"])[0],
            "reference_to_dense": ratio(seconds["reference"], seconds[dense]),
            "dense_transient_bytes": memory[dense], "reference_transient_bytes": memory["reference"],
            "weight_bytes": case.weight_bytes,
        }  # fmt: skip
        for (kind, support), path in product(supports.items(), [*PATHS, "auto"]):
            used = chosen[kind]["choice"] if path == "auto" else path
            name = f"{kind} {used}"
            both = {p: seconds[f"{kind} {p}"] for p in PATHS}
            best = min(both, key=lambda p: milliseconds(both[p])[0])
            more = {**chosen[kind], "behind_best": ratio(both[used], both[best])[0] - 1}
            if "fan_in" in supports:
                more["to_fan_in"] = ratio(
                    seconds[name], seconds[f"fan_in {chosen['fan_in']['choice']}"]
                )
            yield {
                **row, "support": kind, "block": support.tiles.block, "path": path,
                "ours_ms": milliseconds(seconds[name])[0],
                "ours_ms_spread": milliseconds(seconds[name])[1:],
                "transient_bytes": memory[name],
                "faster_than_dense": ratio(seconds[dense], seconds[name]),
                "faster_than_reference": ratio(seconds["reference"], seconds[name]),
                **(more if path == "auto" else {}),
            }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> str:
    """The table of some rows."""
    head = ["out x in", "rank", "tokens", "dtype", "support", "mode", "path", "ms", "dense", "reference",
            "faster than dense", "than reference", "transient MiB", ""]  # fmt: skip
    cells: list[list[object]] = [[*head]]
    for row in rows:
        spread = [
            f"{v[0]:.2f} [{v[1]:.2f} to {v[2]:.2f}]"
            for v in (row["faster_than_dense"], row["faster_than_reference"])
        ]
        note = f"{row['choice']} ({row['chosen']}), {row['behind_best']:+.1%}" if "choice" in row else ""  # fmt: skip
        kind = row["support"] + (f" {row['block']}" if row["block"] > 1 else "")
        times = [f"{row[name]:.2f}" for name in ("ours_ms", "dense_ms", "reference_ms")]
        cells.append([
            f"{row['out']} x {row['in']}", row["rank"], row["tokens"], row["dtype"], kind, row["mode"], row["path"],
            *times, *spread, f"{row['transient_bytes'] / 2**20:.1f} ({row['transient_bytes'] / row['weight_bytes']:.2f} W)", note,
        ])  # fmt: skip
    return table(cells)


def picture(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Times faster than dense, forward and backward, of every key."""
    groups: dict[str, dict[str, list[float]]] = {}
    mode = arguments.modes[-1]
    for row in rows:
        if row["mode"] != mode or row["path"] == "auto":
            continue
        key = f"{row['out']} x {row['in']}, r {row['rank']}, n {row['tokens']}\n{row['dtype']}, {row['support']}"
        reference = [1 / row["reference_to_dense"][i] for i in (0, 2, 1)]
        bars = groups.setdefault(key, {"reference formula": reference})
        bars[row["path"]] = row["faster_than_dense"]
    title = f"One SLTrain linear, {mode.replace('_', ' + ')}, {arguments.device}"
    chart(arguments.out, title, "times as fast as dense", groups, line=1.0)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = flags(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", default=[], help="OUTxIN[rRANK][dDENSITY], rank 128, density .03"
    )
    parser.add_argument(
        "--presets", nargs="+", default=[], help="60m ... 13b, or all: their linears and recipes"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--supports", nargs="+", choices=("fan_in", "uniform", "block"))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="for the turns of a case and mode, about"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.turns = 2
        arguments.tokens = [min(arguments.tokens[0], 96)]
    return arguments


def cases(arguments: argparse.Namespace) -> list[Case]:
    """What to measure: the asked product, or the default keys."""
    shapes = []
    for text in arguments.shapes:
        match = re.fullmatch(r"(\d+)x(\d+)(?:r(\d+))?(?:d([\d.]+))?", text)
        if match is None:
            raise UserError(
                f"--shapes {text}: must be OUTxIN[rRANK][dDENSITY], such as 1376x512r128d.03"
            )
        out, in_, rank, density = match.groups()
        shapes.append((int(out), int(in_), int(rank or 128), float(density or 0.03), False))
    presets = ModelConfig.presets() if arguments.presets == ["all"] else arguments.presets
    for name in presets:
        shapes += preset_shapes(name)
    if not shapes and arguments.quick:
        shapes = [(96, 64, 8, 0.0625, False)]
    pairs = list(product(dict.fromkeys(shapes), arguments.dtypes or ["float32", "bfloat16"]))
    if not shapes:
        small, *larger = [(512, 512, 128), (1376, 512, 128), (2048, 2048, 512)]
        default = [("float32", small), *product(["float32", "bfloat16"], larger)]
        pairs = [((*shape, 0.03, False), dtype) for dtype, shape in sorted(default, key=lambda d: d[0], reverse=True)
                 if dtype in (arguments.dtypes or (dtype,))]  # fmt: skip
    return [
        Case(*shape[:4], tokens, dtype, arguments.device, shape[4])
        for (shape, dtype), tokens in product(pairs, arguments.tokens)
    ]


def main() -> None:
    """Measure, print and write."""
    arguments = parse()
    rows: list[dict[str, Any]] = []
    supports = arguments.supports or ["fan_in", "uniform"]
    for case in cases(arguments):
        found = list(measure(case, supports, arguments))
        rows += found
        if found:
            print(show(found), flush=True)
        write(arguments.out, arguments.device, rows)
    picture(arguments, rows)


if __name__ == "__main__":
    finish(main)
