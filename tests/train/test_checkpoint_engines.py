"""Real engines through real checkpoint files: ZeRO to FSDP2 and back, on other numbers of ranks, ten losses each."""

from pathlib import Path

import pytest

from sltrain_dist.config import DataConfig, TrainConfig
from sltrain_dist.parallel.mesh import Mesh
from sltrain_dist.train.checkpoint import Progress, find, load, save
from tests.parallel import tiny
from tests.ranks import run_ranks

BEFORE, AFTER = 3, 10


def config(mesh: Mesh, kind: str, folder: str) -> TrainConfig:
    return TrainConfig(
        model=tiny.SMALL,
        method=tiny.METHOD,
        data=DataConfig(),
        optimizer=tiny.OPTIMIZER,
        engine=tiny.config(kind, mesh.dp_size),
        save_dir=folder,
        keep_last=0,
    )


def leg(mesh: Mesh, kind: str, folder: str, resumes: bool) -> list[float]:
    """Resume where asked, train three updates, save, train ten more; their losses."""
    engine = tiny.build(mesh, kind)
    settings = config(mesh, kind, folder)
    first = 0
    if resumes:
        found = find("auto", Path(folder), mesh)
        assert found.folder is not None
        first = load(found.folder, engine, settings).progress.step
    tiny.train(engine, first, BEFORE)
    saved = save(engine, Progress(first + BEFORE, 0), settings)
    assert saved.folder is not None, saved.warnings
    return [loss for loss, _ in tiny.train(engine, first + BEFORE, AFTER)]


def test_any_engine_and_number_of_ranks_goes_on_from_the_files(tmp_path):
    legs = [("zero2", 2), ("fsdp", 1), ("zero3", 2), ("fsdp", 2), ("zero1", 1)]
    curves = [
        run_ranks(leg, ranks, kind, str(tmp_path), number > 0)[0]
        for number, (kind, ranks) in enumerate(legs)
    ]
    for number in range(1, len(legs)):
        # Leg n went on from the file of leg n - 1: its losses after three updates are that leg's 4th to 10th.
        assert curves[number][: AFTER - BEFORE] == pytest.approx(
            curves[number - 1][BEFORE:], abs=1e-4
        ), f"{legs[number - 1]} to {legs[number]}"
    assert curves[0][0] - curves[-1][-1] > 0.5
