"""transformers' own generate and ours agree token for token, whatever the linears are made of."""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain_dist.data.tokenizer import train_tokenizer
from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.params.paths import linears
from sltrain_dist.tools.export import export_factored, export_hf
from sltrain_dist.tools.generate import Request, generate
from sltrain_dist.tools.inference import choose_paths
from sltrain_dist.tools.sampling import Sampling, continuation
from sltrain_dist.tools.weights import load_model, open_pretrained
from sltrain_dist.utils.errors import UserError
from tests.tools.saved import CASES, checkpoint, configs

transformers = pytest.importorskip("transformers")

PROMPT, COUNT = [17, 4, 250, 99, 3], 24
OTHERS = [[200, 30], [41, 41, 42, 7], [120, 77, 180, 5, 66, 243, 12, 19]]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield initialise(device="cpu")
    close()


@pytest.fixture(scope="module")
def runs(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every case in it."""
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES:
        checkpoint(mesh, folder / case, *configs(case))
    return folder


def written(model: Any, sampling: Sampling, seed: int = 0, prompt: list[int] = PROMPT) -> list[int]:
    return list(continuation(model, prompt, sampling, count=COUNT, seed=seed))


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_that_of_transformers(case: str, runs: Path, tmp_path: Path) -> None:
    pretrained = open_pretrained(runs / case, "MODEL")
    export_hf(pretrained, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    expected = [
        theirs.generate(
            torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        for prompt in (PROMPT, *OTHERS)
    ]
    assert len({token for text in expected for token in text}) > 2  # else any model would do
    sources = {
        "factored": load_model(pretrained),
        "merged": load_model(pretrained, merged=True),
        "exported": load_model(open_pretrained(tmp_path / "hf", "MODEL")),
    }
    for name, model in sources.items():
        choose_paths(model, 1)
        texts = [written(model, Sampling(0.0), prompt=prompt) for prompt in (PROMPT, *OTHERS)]
        assert texts == expected, name


@pytest.mark.parametrize("case", ["fan_in", "block", "low_rank_trained_scale"])
def test_drawn_text_is_the_same_merged_and_by_either_path(case: str, runs: Path) -> None:
    pretrained = open_pretrained(runs / case, "MODEL")
    sampling = Sampling(1.0, top_k=100, top_p=0.95)
    expected = written(load_model(pretrained, merged=True), sampling, seed=3)
    factored = load_model(pretrained)
    for path in ("composed", "factorized"):
        for linear in linears(factored):
            linear.path = path
        assert written(factored, sampling, seed=3) == expected
    assert written(factored, sampling, seed=4) != expected


def test_one_token_goes_factorized(runs: Path) -> None:
    model = load_model(open_pretrained(runs / "fan_in", "MODEL"))
    choose_paths(model, 1)
    assert {linear.path for linear in linears(model)} == {"factorized"}


@pytest.fixture(scope="module")
def with_tokenizer(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factored export with a tokenizer, as launcher/export.py makes it of a run that has one."""
    folder = tmp_path_factory.mktemp("exports")
    model, method = configs("fan_in")
    checkpoint(mesh, folder / "run", dataclasses.replace(model, vocab_size=300), method)
    train_tokenizer(["def words(of, a): text\n"] * 50, 280).save(folder / "run")
    export_factored(open_pretrained(folder / "run", "MODEL"), folder / "factored")
    return folder / "factored"


def run(request: Request) -> tuple[str, str]:
    out, notes = io.StringIO(), io.StringIO()
    generate(request, out, notes)
    return out.getvalue(), notes.getvalue()


def test_text_and_notes(with_tokenizer: Path) -> None:
    request = Request(str(with_tokenizer), ("def ", "", "a text"), Sampling(), 8, device="cpu")
    text, notes = run(request)
    assert text.startswith("def ")
    assert "\n\na text" in text
    assert notes.count("8 written") == 3
    assert run(request)[0] == text
    streamed = Request(**{**vars(request), "stream": True})
    assert run(streamed)[0] == text
    merged = Request(**{**vars(request), "merged": True})
    assert run(merged)[0] == text
    # every next prompt has the next seed
    second = Request(**{**vars(request), "prompts": ("a text",), "seed": 2})
    assert text.endswith(run(second)[0])


def test_it_ends_at_the_last_position_and_at_the_end_of_text(with_tokenizer: Path) -> None:
    request = Request(str(with_tokenizer), ("def ",), Sampling(), 1000, device="cpu")
    text, notes = run(request)
    assert "the model has 64 positions" in notes
    # a temperature so high that end of text, one token of 300, comes soon for some seed
    for seed in range(60):
        hot = Request(**{**vars(request), "sampling": Sampling(1e6), "seed": seed})
        text, notes = run(hot)
        if "end of text" in notes:
            assert "<|endoftext|>" not in text
            break
    else:
        pytest.fail("no text of 60 came to its end")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"seed": -1}, "--seed -1"),
        ({"device": "tpu"}, "--device tpu"),
        ({"device": "meta"}, "--device meta"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"model": "/no/such"}, "MODEL /no/such: no such folder"),
        ({"tokenizer": "/no/such"}, "--tokenizer /no/such"),
        ({"prompts": ("fine", "word " * 64)}, "--prompt: has .* 64 positions"),
        ({"prompts": ("\udcff",)}, "not UTF-8"),
    ],
)
def test_refusals(with_tokenizer: Path, changes: dict[str, Any], words: str) -> None:
    settings = {"model": str(with_tokenizer), "prompts": ("a",), "sampling": Sampling()}
    out = io.StringIO()
    with pytest.raises(UserError, match=words) as caught:
        generate(Request(**{**settings, "device": "cpu", **changes}), out, io.StringIO())
    assert "\n" not in str(caught.value)
    assert out.getvalue() == ""


def test_models_that_cannot_serve(with_tokenizer: Path, runs: Path, tmp_path: Path) -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=words):
            run(Request(**{"prompts": ("a",), "sampling": Sampling(), "device": "cpu", **changes}))

    refused("--tokenizer is not given.*has none", model=str(runs / "full"))
    export_hf(open_pretrained(with_tokenizer, "MODEL"), tmp_path / "hf")
    refused("--factored: .* dense already", model=str(tmp_path / "hf"), merged=False)
    larger = tmp_path / "larger"
    train_tokenizer([" ".join(f"word{n}" for n in range(900))] * 5, 400).save(larger)
    refused("400 tokens, but the model", model=str(with_tokenizer), tokenizer=str(larger))
    weights = next((tmp_path / "hf").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("MODEL .*hf", model=str(tmp_path / "hf"))
