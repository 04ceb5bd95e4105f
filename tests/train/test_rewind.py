"""Going back inside a live engine: after `load` it trains what it trained after the save, bit for bit."""

import dataclasses
from pathlib import Path

import pytest

from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.train.checkpoint import Progress, load, save
from tests.parallel import tiny
from tests.ranks import run_ranks
from tests.train.test_checkpoint_engines import config

KINDS = ["fsdp", "zero0", "zero1", "zero2", "zero3", "adam8bit_per_layer"]


def back(mesh: Mesh, kind: str, folder: str) -> tuple[list[tuple[float, float]], ...]:
    """Three updates, a save, three more, back; losses and norms of the three after the save, both times."""
    settings, changes = config(mesh, "fsdp" if "8bit" in kind else kind, folder), {}
    if "8bit" in kind:
        optimizer = dataclasses.replace(tiny.OPTIMIZER, name="adamw8bit", grad_clipping=0.0)
        settings = dataclasses.replace(settings, optimizer=optimizer)
        changes = {"optimizer": optimizer, "per_layer": True}
    engine = tiny.build(mesh, "fsdp" if changes else kind, **changes)
    tiny.train(engine, 0, 3)
    saved = save(engine, Progress(3, 0), settings)
    assert saved.folder is not None, saved.warnings
    first = tiny.train(engine, 3, 3)
    assert load(Path(saved.folder), engine, settings).progress.step == 3
    return first, tiny.train(engine, 3, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_load_into_a_live_engine_forgets_what_came_after_the_save(kind, tmp_path):
    for first, second in run_ranks(back, 2, kind, str(tmp_path)):
        assert first == second
        assert first[0] != first[1]
