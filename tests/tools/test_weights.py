"""What `open_pretrained` refuses, and how it says so: one line, naming the flag, the folder and the fault."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sltrain_dist.data.tokenizer import train_tokenizer
from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.tools.export import export_factored, export_hf
from sltrain_dist.tools.weights import load_model, open_pretrained
from sltrain_dist.train.pretrained import file_records, seal
from sltrain_dist.utils.errors import UserError
from tests.tools.saved import checkpoint, configs, tokens


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield initialise(device="cpu")
    close()


@pytest.fixture(scope="module")
def folders(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run, factored (uniform support), hf: of one model."""
    folder = tmp_path_factory.mktemp("weights")
    checkpoint(mesh, folder / "run", *configs("uniform_trained_scale"))
    train_tokenizer(["text"], 258).save(folder / "run")
    pretrained = open_pretrained(folder / "run", "--model")
    export_factored(pretrained, folder / "factored")
    export_hf(pretrained, folder / "hf")
    return folder


def flip(path: Path, place: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


OFFSETS = "model.layers.0.mlp.down_proj.offsets"


def shard(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a factored configuration and seal it again, as someone who knows the format could."""
    path = folder / "config.json"
    document = json.loads(path.read_text())
    change(document)
    document["files"] = {k: v for k, v in file_records(folder).items() if k != "config.json"}
    path.write_text(json.dumps({**document, "seal": seal(document)}))


def far_offset(folder: Path) -> None:
    tensors = load_file(shard(folder))
    tensors[OFFSETS][-1] = 64 * 192
    save_file(tensors, shard(folder))
    rewrite(folder, lambda document: None)


def own_support(folder: Path, leaf: str, change: Callable[[Tensor], Tensor]) -> None:
    """A folder that says its support is none of our generator's, and changed in one tensor."""
    tensors = load_file(shard(folder))
    name = OFFSETS.replace("offsets", leaf)
    tensors[name] = change(tensors[name])
    save_file(tensors, shard(folder))
    rewrite(folder, lambda document: document.update(generated=False))


def other_offset(folder: Path) -> None:
    tensors = load_file(shard(folder))
    offsets = tensors[OFFSETS]
    taken = set(offsets.tolist())
    offsets[0] = next(place for place in range(64 * 192) if place not in taken)
    save_file(tensors, shard(folder))
    rewrite(folder, lambda document: None)


def listed_elsewhere(folder: Path) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    document["files"]["../run/model.safetensors"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps({**document, "seal": seal(document)}))


CASES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    # name: (folder, what is done to it, what the line says)
    "flipped_weight": ("run", lambda f: flip(shard(f / "step_3")), "step_3: damaged (shard-"),
    "flipped_state": ("run", lambda f: flip(f / "step_3/state.json", 99), "state.json: checksum differs"),
    "flipped_manifest": ("run", lambda f: flip(f / "step_3/manifest.json", 50), "damaged (manifest.json"),
    "missing_shard": ("run", lambda f: shard(f / "step_3").unlink(), "missing); give an older step_N"),
    "missing_state": ("run", lambda f: (f / "step_3/state.json").unlink(), "state.json: missing"),
    "missing_manifest": ("run", lambda f: (f / "step_3/manifest.json").unlink(), "manifest.json: missing"),
    "unfinished": ("run", lambda f: (f / "step_3").rename(f / "step_3.tmp"), "holds no"),
    "stranger": (
        "run", lambda f: shutil.copy(shard(f / "step_3"), f / "step_3/more.safetensors"), "more.safetensors: not in",
    ),
    "factored_weight": ("factored", lambda f: flip(shard(f)), "damaged (model.safetensors: checksum differs)"),
    "factored_missing": ("factored", lambda f: shard(f).unlink(), "damaged (model.safetensors: missing)"),
    "factored_config": (
        "factored",
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"rank": 8', '"rank": 4')),
        "damaged (config.json: checksum differs)",
    ),
    "factored_rank": (
        "factored", lambda f: rewrite(f, lambda d: d["method"].update(rank=4)), "q_proj.b is [96, 8]; by config.json [96, 4]",
    ),
    "factored_newer": (
        "factored", lambda f: rewrite(f, lambda d: d["method"].update(waves=3)), "method: of another version of this format",
    ),
    "factored_older": (
        "factored", lambda f: rewrite(f, lambda d: d.pop("generated")), "config.json: of another version of this format",
    ),
    "factored_format": (
        "factored", lambda f: rewrite(f, lambda d: d.update(format="sltrain_dist factored 9")), "format 'sltrain_dist factored 9', this",
    ),
    "factored_support": (
        "factored", lambda f: rewrite(f, lambda d: d.update(support_hash="1")), "of another support: hash 0000000000000001",
    ),
    "factored_seed": ("factored", lambda f: rewrite(f, lambda d: d["method"].update(seed=9)), "of another support: hash"),
    "factored_offset": ("factored", other_offset, "of another support: hash"),
    "factored_far_offset": ("factored", far_offset, "down_proj.offsets holds offsets outside its tiles"),
    "factored_own_twice": (
        "factored", lambda f: own_support(f, "offsets", lambda o: torch.cat((o[:1], o[:-1]))), "holds an offset twice",
    ),
    "factored_own_values": (
        "factored", lambda f: own_support(f, "values", lambda v: v[:-1].clone()), "down_proj.values is [",
    ),
    "factored_unlisted": (
        "factored", lambda f: shutil.copy(shard(f), f / "pytorch_model.bin"), "pytorch_model.bin: not listed in config.json",
    ),
    "factored_elsewhere": ("factored", listed_elsewhere, "'../run/model.safetensors', which is no file of this folder"),
    "hf_cut_off": ("hf", lambda f: shard(f).write_bytes(shard(f).read_bytes()[:1000]), "model.safetensors: not readable"),
    "hf_config": ("hf", lambda f: (f / "config.json").write_text("{"), "config.json is not readable"),
    "empty": ("hf", lambda f: [path.unlink() for path in f.iterdir()], "holds no config.json and no step_N"),
    "absent": ("hf", shutil.rmtree, "no such folder; give a run"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, folders: Path, tmp_path: Path) -> None:
    kind, spoil, message = CASES[case]
    folder = tmp_path / kind
    shutil.copytree(folders / kind, folder)
    spoil(folder)
    with pytest.raises(UserError) as caught:
        open_pretrained(folder, "--model")
    line = str(caught.value)
    assert line.startswith(f"--model {folder}")
    assert message in line
    assert "\n" not in line


def test_offsets_outside_their_matrix_never_reach_a_kernel(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "factored", tmp_path / "factored")
    far_offset(tmp_path / "factored")
    pretrained = open_pretrained(tmp_path / "factored", "--model", verify=False)
    with pytest.raises(UserError, match=r"down_proj\.offsets holds offsets outside its tiles"):
        load_model(pretrained)


def test_a_checkpoint_of_another_architecture(mesh: Mesh, folders: Path, tmp_path: Path) -> None:
    """Sealed anew, so that checksums agree: the names and shapes are compared all the same."""
    from sltrain_dist.train.checkpoint_folder import (
        Manifest,
        read_manifest,
        record,
        write_json,
        write_manifest,
    )

    shutil.copytree(folders / "run", tmp_path / "run")
    step = tmp_path / "run" / "step_3"
    document = json.loads((step / "state.json").read_text())
    for change, message in (
        ({"model": {**document["model"], "hidden_size": 96}}, "step_3: tensor"),
        ({"model": {**document["model"], "num_hidden_layers": 1}}, "left over, by state.json"),
        ({"method": {**document["method"], "seed": 9}}, "of another support: hash"),
        ({"model": {**document["model"], "experts": 8}}, "model: of another version"),
        ({"format": "sltrain_dist checkpoint 7"}, "format 'sltrain_dist checkpoint 7', this"),
    ):
        write_json(step / "state.json", {**document, **change})
        old = read_manifest(step)
        files = {**old.files, "state.json": record(step / "state.json")}
        write_manifest(step, Manifest(old.step, old.serial, files))
        with pytest.raises(UserError) as caught:
            open_pretrained(step, "--model")
        assert message in str(caught.value)


def test_which_step_a_run_means(mesh: Mesh, folders: Path, tmp_path: Path) -> None:
    """``latest``, or without it the newest; tokenizers lie in the run and in every export."""
    run = tmp_path / "run"
    shutil.copytree(folders / "run", run)
    shutil.copytree(run / "step_3", run / "step_10")
    assert open_pretrained(run, "--model").path == run / "step_3"
    (run / "latest").unlink()
    assert open_pretrained(run, "--model").path == run / "step_10"
    prints = set()
    for folder in (run, run / "step_3", folders / "factored", folders / "hf"):
        tokenizer = open_pretrained(folder, "--model").tokenizer
        assert tokenizer is not None
        prints.add(tokenizer.fingerprint)
    assert len(prints) == 1
    (run / "tokenizer.json").write_text("{")
    assert open_pretrained(run, "--model").tokenizer is None


def test_models_do_not_share_memory_with_files(folders: Path, tmp_path: Path) -> None:
    """A loaded model outlives its folder, and may be written to."""
    shutil.copytree(folders / "factored", tmp_path / "factored")
    model = load_model(open_pretrained(tmp_path / "factored", "--model"))
    before = model(tokens())
    shard(tmp_path / "factored").write_bytes(b"")
    shutil.rmtree(tmp_path / "factored")
    assert torch.equal(model(tokens()), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
