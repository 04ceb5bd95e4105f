"""launcher/convert_checkpoint.py: what it tells of a checkpoint, what it finds wrong, and what it writes."""

import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.convert_checkpoint import main
from sltrain_dist.config import DataConfig, TrainConfig
from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.tools.checkpoint_report import faults
from sltrain_dist.train.checkpoint import Progress, find, load, save
from sltrain_dist.train.checkpoint_folder import (
    Manifest,
    read_manifest,
    record,
    write_json,
    write_manifest,
)
from sltrain_dist.train.checkpoint_shards import Piece, read_headers, read_rows, write_file
from sltrain_dist.utils.errors import UserError
from tests.parallel import tiny
from tests.ranks import run_ranks

AFTER = 3


def config(kind: str, dp_size: int, folder: str, **changes: Any) -> TrainConfig:
    return TrainConfig(
        model=tiny.SMALL,
        method=tiny.METHOD,
        data=DataConfig(),
        optimizer=tiny.OPTIMIZER,
        engine=tiny.config(kind, dp_size),
        save_dir=folder,
        keep_last=0,
        **changes,
    )


def make_run(mesh: Mesh, folder: str) -> None:
    engine = tiny.build(mesh, "fsdp")
    settings = config("fsdp", mesh.dp_size, folder)
    for step in (1, 2):
        tiny.train(engine, step - 1, 1)
        assert save(engine, Progress(step, 7 * step, {"sample": step}), settings).folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with checkpoints step_1 and step_2."""
    folder = tmp_path_factory.mktemp("convert") / "run"
    run_ranks(make_run, 2, str(folder))
    return folder


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    yield initialise(device="cpu")
    close()


def go_on(mesh: Mesh, folder: Path) -> tuple[dict[str, torch.Tensor], list[float], Any]:
    """Resume as one rank: the state that is loaded, the next losses, and the outcome of the load."""
    assert find(str(folder), Path("unused"), mesh).folder == folder
    engine = tiny.build(mesh, "fsdp")
    resumed = load(folder, engine, config("fsdp", 1, "unused"))
    state = {name: tensor.full_tensor().clone() for name, tensor in engine.state().items()}
    losses = [loss for loss, _ in tiny.train(engine, resumed.progress.step, AFTER)]
    return state, losses, resumed


def test_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--list"]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert re.match(r"step_1 +1 +\d+ s +[\d.]+ MiB +whole$", first)
    assert re.match(r"step_2 \(latest\) +2 +\d+ s +[\d.]+ MiB +whole$", second)
    assert main([str(run / "step_2"), "--list"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^model\.\S*lm_head\S* +256 x 64 +float32 +65,536 +2$", text, re.MULTILINE)
    assert "2 updates, 14 tokens" in text
    assert "2 ranks of engine fsdp, tensor parallel 1" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert main([str(run / "step_2"), "--list", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["data"] == {"sample": 2}
    weights = sum(t["bytes"] for t in report["tensors"] if t["name"].startswith("model."))
    assert report["totals"]["weights"]["bytes"] == weights
    assert report["totals"]["optimizer exp_avg"] == report["totals"]["weights"]
    assert len(report["support_hash"]) == 16


def reseal(folder: Path, change: Callable[[Path], object]) -> None:
    """A change that the checksums know about, as an editing user or a bug would make it."""
    manifest = read_manifest(folder)
    change(folder)
    files = {path.name: record(path) for path in folder.iterdir() if path.name != "manifest.json"}
    write_manifest(folder, Manifest(manifest.step, manifest.serial, files))


def shard(folder: Path, number: int = 1) -> Path:
    return folder / f"shard-{number:05d}-model-00001-of-00001.safetensors"


def flip(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[-1] ^= 1
    shard(folder).write_bytes(data)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "state.json"
    document = json.loads(path.read_text())
    change(document)
    write_json(path, document)


def double(folder: Path) -> None:
    """Rows that another file holds, once more."""
    name, stored = next(iter(read_headers(folder).items()))
    chunk = stored.chunks[0]
    values = read_rows(stored, chunk.offsets[0], chunk.offsets[0] + 1)
    offsets, sizes = chunk.offsets, tuple(values.shape)
    write_file(folder / "shard-00009.safetensors", [Piece(name, stored.dtype, offsets, sizes, lambda: values)])  # fmt: skip


def cut_header(folder: Path) -> None:
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(struct.pack("<Q", len(data)) + data[8:])


def change_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the first entry of a tensor file's header; its data stay where they were."""
    data = shard(folder).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    change(next(entry for name, entry in header.items() if name != "__metadata__"))
    text = json.dumps(header).encode()
    shard(folder).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def before_the_data(entry: dict[str, Any]) -> None:
    first, last = entry["data_offsets"]
    entry["data_offsets"] = [-16, last - first - 16]


def move_chunk(folder: Path, offset: Any) -> None:
    """Say of every chunk in a file that it begins at ``offset`` along its first dimension."""
    data = shard(folder).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    sharding = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    for entry in sharding.values():
        entry["saved_offsets"][0] = offset
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(sharding)
    text = json.dumps(header).encode()
    shard(folder).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def nothing_more(folder: Path) -> None:
    """A tensor without elements, of which state.json knows nothing."""
    values = torch.empty(0, 3)
    write_file(folder / "shard-00009.safetensors", [Piece("model.nothing", values.dtype, (0, 0), (0, 3), lambda: values)])  # fmt: skip


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, r"shard-00001-model-00001-of-00001.safetensors: checksum differs"),
    "missing": (lambda f: shard(f).unlink(), "shard-00001-model-00001-of-00001.safetensors: missing"),
    "truncated": (lambda f: os.truncate(shard(f), 999), "truncated, 999 bytes where"),
    "stranger": (lambda f: shutil.copy(shard(f), f / "x.safetensors"), "x.safetensors: not in manifest.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
    "no state": (lambda f: reseal(f, lambda g: (g / "state.json").unlink()), "state.json: no such file"),
    "a shard never listed": (lambda f: reseal(f, lambda g: shard(g).unlink()), r"elements are missing \(files shard-00002"),
    "twice": (lambda f: reseal(f, double), "elements are there twice"),
    "a header": (lambda f: reseal(f, cut_header), "not a whole safetensors file"),
    "data before the file": (lambda f: reseal(f, lambda g: change_header(g, before_the_data)), r"shard-00001.*: not of this format \(ValueError\)"),
    "a size that is text": (lambda f: reseal(f, lambda g: change_header(g, lambda e: e.update(shape=[str(s) for s in e["shape"]]))), r"not of this format \(ValueError\)"),
    "a negative place": (lambda f: reseal(f, lambda g: move_chunk(g, -1)), r"shard-00001.*: not of this format \(ValueError\)"),
    "half a place": (lambda f: reseal(f, lambda g: move_chunk(g, 0.5)), r"shard-00001.*: not of this format \(ValueError\)"),
    "another place": (lambda f: reseal(f, lambda g: move_chunk(g, 10**6)), "elements are out of bounds"),
    "nothing more": (lambda f: reseal(f, nothing_more), "shard-00009.safetensors: model.nothing is not in state.json"),
    "support": (lambda f: reseal(f, lambda g: edit(g, lambda d: d["method"].update(seed=4))), "support hash .* made again from seed 4"),
    "another model": (lambda f: reseal(f, lambda g: edit(g, lambda d: d["model"].update(num_hidden_layers=2))), "None in state.json, .* in the model it describes"),
    "another shape": (lambda f: reseal(f, lambda g: edit(g, lambda d: d["model"].update(vocab_size=10))), r"\[256, 64\] in state.json, \[128, 64\] in the model"),
    "random states": (lambda f: reseal(f, lambda g: (g / "rng-00001.json").unlink()), "rng-00001.json: not in manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_verify(run: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every fault by its name, exit code 2, nothing converted; the checkpoint beside it stays whole."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    change, complaint = FAULTS[fault]
    change(folder / "step_2")
    assert main([str(folder), "--verify"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}/step_1: whole"
    assert all(line.startswith(f"{folder}/step_2: ") for line in lines[1:])
    assert re.search(complaint, "\n".join(lines[1:])), lines
    assert main([str(folder / "step_2"), "--output", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "nothing was converted" in error
    assert not (tmp_path / "new").exists()


def test_list_of_a_damaged_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shard(tmp_path / "run" / "step_2").unlink()
    assert main([str(tmp_path / "run"), "--list"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"damaged: {shard(run).name}: no such file or directory")


def test_other_files_hold_the_same(run: Path, tmp_path: Path, mesh: Mesh) -> None:
    """One file and five: bit for bit what two ranks wrote, continued with the same losses."""
    state, losses, resumed = go_on(mesh, run / "step_2")
    for count in (1, 5):
        new = tmp_path / f"step_{count}"
        assert main([str(run / "step_2"), "--output", str(new), "--shards", str(count)]) == 0
        assert len(list(new.glob("*.safetensors"))) == count
        assert faults(new) == []
        found, curve, again = go_on(mesh, new)
        assert all(torch.equal(found[name], state[name]) for name in state)
        assert (curve, again) == (losses, resumed)
    restored = json.loads((new / "rng-00001.json").read_text())
    assert restored == json.loads((run / "step_2" / "rng-00001.json").read_text())


def test_weights_alone(
    run: Path, tmp_path: Path, mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights; the moments begin at zero, which is said, and is counted so in what is saved next."""
    new = tmp_path / "weights"
    assert main([str(run / "step_2"), "--output", str(new), "--weights_only"]) == 0
    assert "of the optimizer left out" in capsys.readouterr().out
    assert faults(new) == []
    full, *_ = go_on(mesh, run / "step_2")
    state, losses, resumed = go_on(mesh, new)
    assert (
        resumed.messages[0]
        == "the checkpoint holds weights only: the optimizer's moments start at zero"
    )
    assert not resumed.exact
    assert resumed.progress.step == 2
    for name, tensor in state.items():
        assert torch.equal(tensor, full[name]) if name.startswith("model.") else not tensor.any()
    fresh = tiny.build(mesh, "fsdp")
    load(new, fresh, config("fsdp", 1, "unused"))
    tiny.train(fresh, 2, 1)
    assert fresh.scalars() == {"updates": 1, "optimizer_steps": 1}
    assert losses[0] == pytest.approx(go_on(mesh, run / "step_2")[1][0], abs=1e-6)


def test_bfloat16(run: Path, tmp_path: Path, mesh: Mesh) -> None:
    new = tmp_path / "half"
    assert main([str(run / "step_2"), "--output", str(new), "--dtype", "bf16"]) == 0
    assert faults(new) == []
    full, losses, _ = go_on(mesh, run / "step_2")
    state, curve, resumed = go_on(mesh, new)
    assert any("are converted from bfloat16 to float32" in line for line in resumed.messages)
    for name, tensor in state.items():
        assert torch.equal(tensor, full[name].bfloat16().float()), name
    assert curve == pytest.approx(losses, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere", "--list"], "FOLDER nowhere: no such folder"),
        (["{tmp}", "--verify"], "holds no checkpoint"),
        (["{run}"], "required"),
        (["{run}", "--list", "--verify"], "not allowed with"),
        (["{run}", "--output", "{tmp}/new"], "a run; give one of its step_N"),
        (["{run}/step_2", "--output", "{tmp}"], "exists; give a new folder"),
        (["{run}/step_2", "--output", "{run}/step_2/new"], "lies inside a checkpoint"),
        ([__file__, "--list"], "is a file; give a run folder"),
        (["{run}/step_2", "--output", "{tmp}/new", "--shards", "0"], "--shards 0: must lie in"),
        (["{run}/step_2", "--output", "{tmp}/new", "--dtype", "float16"], "--dtype"),
        (["{run}/step_2", "--list", "--weights_only"], "--weights_only: goes with --output"),
        (["{run}/step_2", "--verify", "--json"], "--json: goes with --list"),
    ],
)
def test_bad_input(
    run: Path,
    tmp_path: Path,
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(run.rglob("*"))
    assert main([text.format(run=run, tmp=tmp_path) for text in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    assert complaint in captured.err
    assert list(tmp_path.iterdir()) == []
    assert sorted(run.rglob("*")) == before


def test_disk_full(run: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: nothing half-written is left."""
    script = (
        "import resource, signal, sys\n"
        "from launcher.convert_checkpoint import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, {resource.RLIM_INFINITY}))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, str(run / "step_2"), "--output", str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "--output" in done.stderr
    assert "nothing was left there" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_format(run: Path, tmp_path: Path, mesh: Mesh) -> None:
    shutil.copytree(run / "step_2", tmp_path / "step_2")
    reseal(tmp_path / "step_2", lambda f: edit(f, lambda d: d.update(format="something 2")))
    assert faults(tmp_path / "step_2") == [
        "state.json: format 'something 2', this version reads 'sltrain_dist checkpoint 1'"
    ]
    with pytest.raises(UserError, match="format 'something 2'"):
        load(tmp_path / "step_2", tiny.build(mesh, "fsdp"), config("fsdp", 1, "unused"))
