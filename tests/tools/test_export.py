"""Exports are proven by logits: transformers computes the same as the engine that trained, and so do we."""

import dataclasses
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sltrain_dist.config import ModelConfig
from sltrain_dist.model.llama import Llama
from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.tools.export import export_factored, export_hf
from sltrain_dist.tools.weights import load_model, open_pretrained
from sltrain_dist.utils.errors import UserError
from tests.tools.saved import CASES, checkpoint, configs, tokens

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield initialise(device="cpu")
    close()


@pytest.fixture(scope="module")
def saved(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """case -> (run folder, the engine's logits)."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        case: (folder / case, checkpoint(mesh, folder / case, *configs(case))) for case in CASES
    }


def greedy(model: Llama, prompt: Tensor, count: int) -> Tensor:
    """``count`` tokens after ``prompt`` [B, T], each by a plain forward pass over all before it."""
    for _ in range(count):
        prompt = torch.cat((prompt, model(prompt)[:, -1:].argmax(-1)), dim=1)
    return prompt


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_hf_has_equal_logits_and_text(
    case: str, saved: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    run, expected = saved[case]
    pretrained = open_pretrained(run, "--model")
    done = export_hf(pretrained, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", attn_implementation="eager"
    )
    assert expected.std() > 0.3  # else 1e-5 would say nothing
    assert theirs.dtype == torch.float32
    logits = theirs(tokens()).logits
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 1e-5
    assert done.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "out").iterdir())

    prompt = tokens(2, 7)
    ours = greedy(load_model(pretrained), prompt, 12)
    text = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(text, ours)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_every_way_to_load_has_equal_logits(
    case: str, saved: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    """The checkpoint, merged; a factored export, as it is and merged; the HF export read back, and its factored."""
    run, expected = saved[case]
    pretrained = open_pretrained(run, "--model")
    export_factored(pretrained, tmp_path / "factored")
    export_hf(pretrained, tmp_path / "hf")
    factored, dense = (open_pretrained(tmp_path / name, "--model") for name in ("factored", "hf"))
    assert (factored.kind, dense.kind) == ("factored", "hf")
    assert factored.support_hash == pretrained.support_hash
    for source in (pretrained, factored, dense):
        for merged in (False, True):
            logits = load_model(source, merged=merged)(tokens())
            assert (logits - expected).abs().max() < 1e-5, (source.kind, merged)
    for name in pretrained.names():
        assert torch.equal(pretrained.tensor(name), factored.tensor(name))


def test_names_and_shapes_are_the_models_own(saved: dict[str, tuple[Path, Tensor]]) -> None:
    for case, (run, _) in saved.items():
        pretrained = open_pretrained(run / "step_3", "--model")
        model = Llama(*configs(case))
        assert pretrained.shapes == {
            name: tuple(parameter.shape) for name, parameter in model.named_parameters()
        }
        for name in pretrained.names():
            assert tuple(pretrained.tensor(name).shape) == pretrained.shapes[name]


def test_shards(saved: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    """Small shards: as many files as the index names, none above the limit, and the same logits."""
    run, expected = saved["fan_in"]
    for export in (export_hf, export_factored):
        out = tmp_path / export.__name__
        done = export(open_pretrained(run, "--model"), out, max_shard_size="100KB")
        index = json.loads((out / "model.safetensors.index.json").read_text())
        files = sorted(out.glob("*.safetensors"))
        assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
        assert done.shards == len(files) > 2
        assert sum(path.stat().st_size for path in files) > done.bytes
        assert max(path.stat().st_size for path in files) < 110_000
        with torch.no_grad():
            logits = load_model(open_pretrained(out, "--model"))(tokens())
        assert (logits - expected).abs().max() < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export_hf", dtype="auto")
    with torch.no_grad():
        assert (theirs(tokens()).logits - expected).abs().max() < 1e-5


def test_bfloat16_rounds_w_once(saved: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    run, _ = saved["uniform_trained_scale"]
    pretrained = open_pretrained(run, "--model")
    export_hf(pretrained, tmp_path / "out", "bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    ours = load_model(pretrained, merged=True)
    for name, parameter in theirs.named_parameters():
        inside = tuple(slice(0, size) for size in parameter.shape)
        assert torch.equal(ours.get_parameter(name)[inside].bfloat16(), parameter)
    small = export_factored(pretrained, tmp_path / "factored", "bfloat16")
    reopened = open_pretrained(tmp_path / "factored", "--model")
    assert reopened.tensor("model.layers.0.mlp.down_proj.offsets").dtype == torch.int32
    assert reopened.tensor("model.layers.0.mlp.down_proj.b").dtype == torch.bfloat16
    entries = int(0.1 * 64 * 173)
    assert small.density == pytest.approx(0.1, abs=2e-3)
    assert reopened.shapes["model.layers.0.mlp.down_proj.values"] == (entries,)


def test_config_round_trip(saved: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    """What an export says of its architecture is what was trained, rope included."""
    for case, (run, _) in saved.items():
        export_hf(open_pretrained(run, "--model"), tmp_path / case)
        config = ModelConfig.load(str(tmp_path / case))
        assert dataclasses.replace(config, name="tiny") == configs(case)[0]


def test_refusals_name_what_is_wrong(saved: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    pretrained = open_pretrained(saved["fan_in"][0], "--model")
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept.txt").write_text("mine")
    for target in (full, full / "kept.txt"):
        with pytest.raises(UserError, match=r"^--output .*exists.*give a new"):
            export_hf(pretrained, target)
    with pytest.raises(UserError, match="--max_shard_size many"):
        export_hf(pretrained, tmp_path / "out", max_shard_size="many")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert (full / "kept.txt").read_text() == "mine"


@pytest.fixture
def small_disk() -> Iterator[None]:
    """A limit on the size of files stands in for a full disk: writing fails in the same way."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_is_one_line_and_leaves_nothing(
    saved: dict[str, tuple[Path, Tensor]], tmp_path: Path, small_disk: None
) -> None:
    pretrained = open_pretrained(saved["fan_in"][0], "--model")
    for export in (export_hf, export_factored):
        with pytest.raises(UserError, match=r"--output .*cannot be written") as caught:
            export(pretrained, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []
