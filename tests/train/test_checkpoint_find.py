"""Which checkpoint is meant, and which is believed: every kind of damage is named and passed over."""

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.train.checkpoint import find, verify
from sltrain_dist.train.checkpoint_folder import Manifest, write_manifest
from sltrain_dist.utils.errors import UserError
from tests.train.fake_engine import SHARD, holds, names, write


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield initialise(device="cpu")
    close()


def test_newer_is_what_was_saved_later(mesh: Mesh, tmp_path: Path) -> None:
    """After going back from step 30 to step 10, the new step 20 is newest and step 30 goes first."""
    for step in (10, 30, 20):
        write(mesh, tmp_path, step)
    assert find("auto", tmp_path, mesh).folder == tmp_path / "step_20"
    write(mesh, tmp_path, 25, keep_last=2)
    assert names(tmp_path) == ["latest", "step_20", "step_25"]


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, 100)


def flip_tensor(folder: Path) -> None:
    flip(folder / SHARD, -3)


def flip_state(folder: Path) -> None:
    flip(folder / "state.json", 40)


def flip_manifest(folder: Path) -> None:
    flip(folder / "manifest.json", 60)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, f"{SHARD}: truncated, 100 bytes where"),
    "grown": (lambda f: (f / SHARD).open("ab").write(b"x"), f"{SHARD}: too long"),
    "flipped byte": (flip_tensor, f"{SHARD}: checksum differs"),
    "flipped state": (flip_state, "state.json: checksum differs"),
    "missing": (lambda f: (f / SHARD).unlink(), f"{SHARD}: missing"),
    "empty": (lambda f: (f / "rng-00000.json").write_text(""), "rng-00000.json: truncated"),
    "garbage manifest": (
        lambda f: (f / "manifest.json").write_bytes(b"\xff\x00{["),
        "manifest.json: not readable",
    ),
    "foreign manifest": (
        lambda f: (f / "manifest.json").write_text("[1]"),
        "manifest.json: checksum differs",
    ),
    "flipped manifest": (flip_manifest, "manifest.json: "),
    "manifest of a path": (
        lambda f: write_manifest(f, Manifest(10, 2, {"../step_9/state.json": (1, "")})),
        "manifest.json: '../step_9/state.json' is no name of a file",
    ),
    "manifest of a folder": (
        lambda f: write_manifest(f, Manifest(10, 2, {"..": (1, "")})),
        "manifest.json: '..' is no name of a file",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
    "stranger": (
        lambda f: shutil.copy(f / SHARD, f / "extra.safetensors"),
        "extra.safetensors: not in manifest.json",
    ),
    "directory": (
        lambda f: [(f / SHARD).unlink(), (f / SHARD).mkdir()],
        f"{SHARD}: ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_named_and_the_previous_used(
    mesh: Mesh, tmp_path: Path, damage: str
) -> None:
    action, complaint = DAMAGES[damage]
    write(mesh, tmp_path, 9)
    write(mesh, tmp_path, 10)
    assert verify(tmp_path / "step_10", mesh) == []
    action(tmp_path / "step_10")
    for target in ("auto", str(tmp_path), str(tmp_path / "step_10")):
        found = find(target, tmp_path, mesh)
        assert found.folder is not None
        assert found.folder.name == "step_9"
        (warning,) = found.warnings
        assert complaint in warning
        assert str(tmp_path / "step_10") in warning
        assert "using step_9 instead" in warning
    assert holds(mesh, found.folder, 9)


def test_none_whole(mesh: Mesh, tmp_path: Path) -> None:
    write(mesh, tmp_path, 1)
    write(mesh, tmp_path, 2)
    for step in (1, 2):
        truncate(tmp_path / f"step_{step}")
    for target in ("auto", str(tmp_path), str(tmp_path / "step_2")):
        with pytest.raises(UserError, match=r"no whole checkpoint: .*step_2 is damaged") as error:
            find(target, tmp_path, mesh)
        assert "\n" not in str(error.value)
        assert "move the folder away or give another --save_dir" in str(error.value)
        assert "unreadable" not in str(error.value)


def fail_reading(monkeypatch: pytest.MonkeyPatch, victims: tuple[str, ...]) -> None:
    """The disk answers EIO for all content of the folders of these names."""
    real = io.open

    def fail(file: Any, *arguments: Any, **keywords: Any) -> Any:
        if Path(str(file)).parent.name in victims:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return real(file, *arguments, **keywords)

    monkeypatch.setattr(io, "open", fail)


def test_passing_failure_to_read_costs_nothing(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreadable is not damaged, no reason to start fresh, and no reason to prune."""
    for step in (1, 2):
        write(mesh, tmp_path, step)
    with monkeypatch.context() as broken:
        fail_reading(broken, ("step_1", "step_2"))
        for target in ("auto", str(tmp_path)):
            with pytest.raises(UserError, match=r"step_2 is unreadable .*run again") as error:
                find(target, tmp_path, mesh)
            assert "damaged" not in str(error.value)
        write(mesh, tmp_path, 3, keep_last=1)
    assert names(tmp_path) == ["latest", "step_1", "step_2", "step_3"]
    assert find("auto", tmp_path, mesh).folder == tmp_path / "step_3"
    write(mesh, tmp_path, 4, keep_last=1)
    assert names(tmp_path) == ["latest", "step_4"]


def test_unreadable_newest_is_passed_over(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write(mesh, tmp_path, step)
    fail_reading(monkeypatch, ("step_2",))
    found = find("auto", tmp_path, mesh)
    assert found.folder == tmp_path / "step_1"
    assert "step_2 is unreadable (manifest.json: unreadable (Input/output error))" in str(found)


def test_run_folder_that_cannot_be_listed_is_not_an_empty_one(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(mesh, tmp_path, 1)

    def fail(path: Path) -> list[str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(UserError, match="not readable"):
        find("auto", tmp_path, mesh)


def test_prune_leaves_what_has_no_readable_manifest(mesh: Mesh, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(mesh, tmp_path, step)
    (tmp_path / "step_2" / "manifest.json").unlink()
    write(mesh, tmp_path, 4, keep_last=2)
    assert names(tmp_path) == ["latest", "step_2", "step_3", "step_4"]


@pytest.mark.parametrize("content", [None, b"", b"step_99", b"\xff\xfe", b"../step_1", b"."])
def test_latest_damaged(mesh: Mesh, tmp_path: Path, content: bytes | None) -> None:
    write(mesh, tmp_path, 1)
    write(mesh, tmp_path, 2)
    if content is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_bytes(content)
    assert find("auto", tmp_path, mesh).folder == tmp_path / "step_2"
    found = find(str(tmp_path), tmp_path, mesh)
    assert found.folder == tmp_path / "step_2"
    assert "latest is missing or names no checkpoint" in found.warnings[0]


def test_which_folder_is_meant(mesh: Mesh, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert find(None, run, mesh).folder is None
    assert find("auto", run, mesh) == find(None, run, mesh)  # a fresh start, nothing to warn of
    for step in (1, 2, 3):
        write(mesh, run, step)
    assert find(str(run / "step_2"), tmp_path, mesh).folder == run / "step_2"
    (run / "latest").write_text("step_1")  # a user going back by hand
    assert find(str(run), tmp_path, mesh).folder == run / "step_1"
    shutil.copytree(run / "step_3", tmp_path / "best")
    assert find(str(tmp_path / "best"), run, mesh).folder == tmp_path / "best"


def test_no_checkpoint_there(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "step_3.tmp").mkdir()
    (tmp_path / "file").touch()
    for target, complaint in (
        ("nowhere", "no such folder"),
        ("file", "is a file"),
        ("", "holds no checkpoint"),
        ("step_3.tmp", "never finished"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            find(str(tmp_path / target), tmp_path, mesh)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith("--continue_from ")
