"""Twenty losses that no refactoring may change: one process, fp32, every method and support.

After a change that means to alter the mathematics: python -m tests.train.test_golden
"""

import dataclasses
import json
from pathlib import Path

import pytest

from sltrain_dist.config import MethodConfig
from sltrain_dist.parallel.mesh import Mesh
from tests.parallel import tiny
from tests.ranks import run_ranks

FILE = Path(__file__).with_name("golden.json")
METHODS = {
    "full": MethodConfig(method="full", seed=3),
    "low_rank": dataclasses.replace(tiny.METHOD, method="low_rank"),
    "fan_in": tiny.METHOD,
    "uniform": dataclasses.replace(tiny.METHOD, support="uniform"),
    "block": dataclasses.replace(tiny.METHOD, support="block", block_size=4, density=0.13),
    "trained scale": dataclasses.replace(tiny.METHOD, train_scaling=True),
}


def curves(mesh: Mesh) -> dict[str, list[float]]:
    result = {}
    for name, method in METHODS.items():
        engine = tiny.build(mesh, "fsdp", method=method)
        result[name] = [loss for loss, _ in tiny.train(engine, 0, 20)]
    return result


@pytest.fixture(scope="module")
def measured():
    return run_ranks(curves, 1)[0]


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_the_golden_ones(measured, name):
    golden = json.loads(FILE.read_text())[name]
    assert measured[name] == pytest.approx(golden, abs=1e-4)
    assert golden[0] - golden[-1] > 0.3, "nothing was learnt: the curve would prove nothing"


if __name__ == "__main__":
    FILE.write_text(json.dumps(run_ranks(curves, 1)[0], indent=1) + "\n")
