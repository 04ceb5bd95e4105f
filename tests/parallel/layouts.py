"""Every layout a model can be trained in, and its curve: the matrix behind "one curve" (DESIGN section 6).

    tensor parallel x data parallel  x  engine  x  sequence parallel  x  method

The suite takes a pairwise cover of it (test_layouts.py); all of it is a slow test, and

    python -m tests.parallel.layouts --output docs/layouts.txt

writes the table that is committed.
"""

import argparse
import itertools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sltrain_dist.parallel.mesh import Mesh
from tests.parallel import tiny
from tests.ranks import run_ranks

Curve = list[tuple[float, float]]
UPDATES = 20
LR = {
    "fan_in": 1e-2,
    "block": 1e-2,
    "low_rank": 5e-3,
    "full": 1e-2,
    "slope": 1e-2,
}  # with which the loss falls by 1 nat
SHAPES = {"1x1": (1, 1), "2x1": (2, 1), "4x1": (4, 1), "2x2": (2, 2), "1x4": (1, 4)}
ENGINES = ("fsdp", "zero1", "zero2", "zero3")
METHODS = tuple(tiny.SHARED_METHODS)


@dataclass(frozen=True)
class Layout:
    """One cell. shape: tensor parallel x data parallel; hybrid: two replicas (HSDP)."""

    method: str
    engine: str
    shape: str
    sequence: bool
    hybrid: bool = False

    @property
    def ranks(self) -> int:
        tensor, data = SHAPES[self.shape]
        return tensor * data

    @property
    def text(self) -> str:
        sequence = "SP" if self.sequence else "--"
        return f"{self.method:<9} {self.engine:<6} {self.shape} {sequence}" + " HSDP" * self.hybrid


def matrix() -> list[Layout]:
    """All cells that exist: without tensor parallelism there is no sequence parallelism."""
    cells = itertools.product(METHODS, ENGINES, SHAPES, (False, True))
    return [Layout(*cell) for cell in cells if SHAPES[cell[2]][0] > 1 or not cell[3]]


def cover(layouts: Sequence[Layout]) -> list[Layout]:
    """Few of ``layouts`` that have every pair of values together which any of them has; greedy, always the same."""
    names = ("method", "engine", "shape", "sequence")

    def pairs(layout: Layout) -> set[Any]:
        values = [(name, getattr(layout, name)) for name in names]
        return set(itertools.combinations(values, 2))

    missing = set().union(*(pairs(layout) for layout in layouts))
    chosen = []
    while missing:
        best = max(layouts, key=lambda layout: len(pairs(layout) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def curve(layout: Layout, updates: int = UPDATES) -> tuple[Curve, int]:
    """Losses and norms of a training in this layout, and its support's hash; collective over its ranks."""
    tensor, _ = SHAPES[layout.shape]
    mesh = tiny.arranged(tensor, 2 if layout.hybrid else 1)
    engine = tiny.build(
        mesh,
        layout.engine,
        method=tiny.SHARED_METHODS[layout.method],
        model=tiny.SHARED,
        sequence_parallel=layout.sequence,
    )
    losses = [tiny.update(engine, number, LR[layout.method]) for number in range(updates)]
    return losses, engine.support_hash()


def curves(_: Mesh, layouts: list[Layout]) -> list[tuple[Curve, int]]:
    """Body of the ranks: one layout after the other in the same processes, for starting them is what costs.

    ZeRO-3 comes last: DeepSpeed replaces torch.nn.functional.linear in its process.
    """
    return [curve(layout) for layout in layouts]


def run(layouts: Sequence[Layout], timeout: float = 1200) -> dict[Layout, tuple[Curve, int]]:
    """Curves of ``layouts``; all ranks of one must agree."""
    found = {}
    for ranks in sorted({layout.ranks for layout in layouts}):
        chosen = sorted(
            (layout for layout in layouts if layout.ranks == ranks),
            key=lambda layout: layout.engine == "zero3",
        )
        per_rank = run_ranks(curves, ranks, chosen, timeout=timeout)
        assert all(result == per_rank[0] for result in per_rank), "ranks disagree"
        found.update(zip(chosen, per_rank[0], strict=True))
    return found


def reference(method: str) -> Layout:
    """What a method's layouts are compared with: one process."""
    return Layout(method, "fsdp", "1x1", False)


def difference(one: Curve, other: Curve) -> tuple[float, float]:
    """(largest difference in loss, nats; in gradient norm, relative)."""
    pairs = list(zip(one, other, strict=True))
    return max(abs(a[0] - b[0]) for a, b in pairs), max(abs(a[1] - b[1]) / a[1] for a, b in pairs)


def main(arguments: list[str], write: Callable[[str], Any] = print) -> None:
    """Run the whole matrix, the pairwise cover first; the file is written anew after every part, so that a run
    that is cut short leaves what it had.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", required=True)
    output = parser.parse_args(arguments).output
    began = time.perf_counter()
    wanted = [*matrix(), Layout("fan_in", "fsdp", "1x4", False, hybrid=True)]
    alone = [layout for layout in wanted if layout.ranks == 1]  # what the others are compared with
    parts = [alone, [layout for layout in cover(matrix()) if layout.ranks > 1]]
    for ranks, engine in itertools.product((2, 4), ENGINES):
        parts.append([at for at in wanted if (at.ranks, at.engine) == (ranks, engine)])
    found: dict[Layout, tuple[Curve, int]] = {}
    for part in parts:
        found |= run([layout for layout in part if layout not in found], timeout=7200)
        text = table(found, len(wanted), time.perf_counter() - began)
        with open(output, "w", encoding="utf-8") as file:
            file.write(text)
    write(text)


def table(found: dict[Layout, tuple[Curve, int]], of: int, seconds: float) -> str:
    """What was found, a line a layout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    lines = [
        f"{UPDATES} updates in float32, against one process: largest difference in loss (nats) and gradient norm (relative).",
        f"{len(found)} of {of} layouts. commit {commit}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"gloo ranks on a CPU, {seconds:.0f} s",
        "",
        "method    engine TPxDP SP        loss     norm     loss from -> to  support hash",
    ]
    for layout, (losses, support) in found.items():
        base, base_support = found[reference(layout.method)]
        loss, norm = difference(base, losses)
        same = "same" if support == base_support else "DIFFERS"
        lines.append(
            f"{layout.text:<30} {loss:.1e}  {norm:.1e}  {losses[0][0]:.3f} -> {losses[-1][0]:.3f}   {same}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
