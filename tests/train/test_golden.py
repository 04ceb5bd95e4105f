"""Twenty losses that no refactoring may change: one process, fp32, every method and support.

After a change that means to alter the mathematics: python -m tests.train.test_golden
"""

import dataclasses
import json
from pathlib import Path as FilePath

import pytest

from sltrain_dist.config import MethodConfig
from sltrain_dist.ops.linear import Path
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.params.paths import linears
from tests.parallel import tiny
from tests.ranks import run_ranks

FILE = FilePath(__file__).with_name("golden.json")
METHODS = {
    "full": MethodConfig(method="full", seed=3),
    "low_rank": dataclasses.replace(tiny.METHOD, method="low_rank"),
    "fan_in": tiny.METHOD,
    "uniform": dataclasses.replace(tiny.METHOD, support="uniform"),
    "block": dataclasses.replace(tiny.METHOD, support="block", block_size=4, density=0.13),
    "trained scale": dataclasses.replace(tiny.METHOD, train_scaling=True),
    "slope": dataclasses.replace(tiny.METHOD, method="slope", mask_change_freq=5),
}


SPARSE = [name for name, method in METHODS.items() if method.method == "sltrain"]
PATHS: tuple[Path, ...] = ("composed", "factorized")


def curves(mesh: Mesh) -> dict[str, list[float]]:
    """Losses by method, and by method and path where the method has one."""
    result = {}
    for name, method in METHODS.items():
        for path in PATHS if name in SPARSE else PATHS[:1]:
            engine = tiny.build(mesh, "fsdp", method=method)
            for linear in linears(engine.module):
                linear.path = path
            losses = [loss for loss, _ in tiny.train(engine, 0, 20)]
            result[name if path == "composed" else f"{name}, {path}"] = losses
    return result


@pytest.fixture(scope="module")
def measured():
    return run_ranks(curves, 1)[0]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("path", PATHS)
def test_losses_are_the_golden_ones(measured, name, path):
    """The golden file is of the composed path; the other one computes the same."""
    if path == "factorized" and name not in SPARSE:
        pytest.skip("has no path")
    golden = json.loads(FILE.read_text())[name]
    losses = measured[name if path == "composed" else f"{name}, {path}"]
    assert losses == pytest.approx(golden, abs=1e-4)
    assert golden[0] - golden[-1] > 0.3, "nothing was learnt: the curve would prove nothing"


if __name__ == "__main__":
    found = run_ranks(curves, 1)[0]
    FILE.write_text(json.dumps({name: found[name] for name in METHODS}, indent=1) + "\n")
