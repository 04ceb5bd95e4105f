"""Evaluation against the loss written out by hand: modes, splits, ranks, and every source of weights."""

import dataclasses
import gzip
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from sltrain_dist.config import DataConfig
from sltrain_dist.data.cache import Cache
from sltrain_dist.data.index import open_split
from sltrain_dist.data.samples import make_samples
from sltrain_dist.data.tokenizer import train_tokenizer
from sltrain_dist.parallel.mesh import Mesh, close, initialise
from sltrain_dist.tools.evaluate import Request, run
from sltrain_dist.tools.export import export_factored, export_hf
from sltrain_dist.tools.weights import load_model, open_pretrained
from sltrain_dist.utils.errors import UserError
from tests.ranks import run_ranks
from tests.tools.saved import checkpoint, configs

LENGTH = 16


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield initialise(device="cpu")
    close()


@pytest.fixture(scope="module")
def place(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/ with a tokenizer, its exports factored/ and hf/, and text.txt."""
    folder = tmp_path_factory.mktemp("place")
    text = Path(textwrap.__file__).read_text()
    (folder / "text.txt").write_text(text)
    model, method = configs("fan_in")
    checkpoint(mesh, folder / "run", dataclasses.replace(model, vocab_size=300), method)
    train_tokenizer([text] * 5, 300).save(folder / "run")
    pretrained = open_pretrained(folder / "run", "MODEL")
    export_factored(pretrained, folder / "factored")
    export_hf(pretrained, folder / "hf")
    return folder


def request(place: Path, model: str = "factored", **changes: Any) -> Request:
    settings: dict[str, Any] = {
        "corpus": str(place / "text.txt"),
        "cache_dir": str(place / "cache"),
        "max_length": LENGTH,
        "batch_size": 3,
    }
    return Request(str(place / model), **(settings | changes))


@torch.no_grad()
def by_hand(place: Path, splits: list[str], pack: str = "packed") -> tuple[torch.Tensor, list[int]]:
    """Losses of all targets in order, and how many targets every sample has."""
    pretrained = open_pretrained(place / "run", "MODEL")
    assert pretrained.tokenizer is not None
    model = load_model(pretrained)
    config = DataConfig(corpus=str(place / "text.txt"), cache_dir=str(place / "cache"))
    cache = Cache(config, 300)
    cache.prepare_index(pretrained.tokenizer)
    folder = cache.open_index(pretrained.tokenizer)
    losses, counts = [], []
    for split in splits:
        samples = make_samples(open_split(folder, split), pack, LENGTH)
        batch = samples.gather(np.arange(len(samples.targets())))
        logits = model(batch["tokens"]).double()
        each = functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), reduction="none"
        )
        losses.append(each[batch["labels"].flatten() >= 0])
        counts += (batch["labels"] >= 0).sum(1).tolist()
    return torch.cat(losses), counts


@pytest.mark.parametrize("pack", ["packed", "padded"])
@pytest.mark.parametrize("split", ["held_out", "all"])
def test_exact_is_the_mean_over_all_targets(mesh: Mesh, place: Path, pack: str, split: str) -> None:
    losses, counts = by_hand(place, ["train", "held_out"] if split == "all" else [split], pack)
    result = run(request(place, pack=pack, split=split), mesh)
    assert result["tokens"] == len(losses) == sum(counts)
    assert result["samples"] == len(counts)
    assert result["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert result["perplexity"] == pytest.approx(float(losses.mean().exp()), rel=1e-5)


def test_as_many_tokens_as_asked(mesh: Mesh, place: Path) -> None:
    """Cut inside the held-out split, and inside the second of two."""
    losses, _ = by_hand(place, ["held_out"])
    result = run(request(place, eval_tokens=100), mesh)
    assert result["tokens"] == 100
    assert result["loss"] == pytest.approx(float(losses[:100].mean()), rel=1e-6)
    both, _ = by_hand(place, ["train", "held_out"])
    count = len(both) - len(losses) + 50
    result = run(request(place, eval_tokens=count, split="all"), mesh)
    assert result["tokens"] == count
    assert result["loss"] == pytest.approx(float(both[:count].mean()), rel=1e-6)


def test_reference_mode_divides_by_one_batch_too_many(mesh: Mesh, place: Path) -> None:
    losses, counts = by_hand(place, ["held_out"])
    samples = losses.split(counts)
    batches = [torch.cat(samples[first : first + 3]) for first in range(0, len(samples), 3)]
    expected = sum(float(batch.mean()) for batch in batches) / (len(batches) + 1)
    result = run(request(place, eval_mode="reference"), mesh)
    assert result["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("model", ["run", "factored", "hf"])
@pytest.mark.parametrize("merged", [None, True])
def test_every_source_of_the_same_weights(
    mesh: Mesh, place: Path, model: str, merged: bool | None
) -> None:
    losses, _ = by_hand(place, ["held_out"])
    result = run(request(place, model, merged=merged), mesh)
    assert result["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert result["merged"] == (bool(merged) and model != "hf")
    assert result["kind"] == {"run": "checkpoint"}.get(model, model)


def test_bfloat16_is_near(mesh: Mesh, place: Path) -> None:
    losses, _ = by_hand(place, ["held_out"])
    result = run(request(place, dtype="bfloat16"), mesh)
    assert result["loss"] == pytest.approx(float(losses.mean()), rel=5e-3)
    assert result["loss"] != pytest.approx(float(losses.mean()), rel=1e-6)


def on_ranks(mesh: Mesh, requests: list[Request]) -> list[Any]:
    results: list[Any] = [run(asked, mesh) for asked in requests]
    for bad in ({"corpus": "/no/such"}, {"model": "/no/such"}, {"max_length": 1000}):
        try:
            run(dataclasses.replace(requests[0], **bad), mesh)  # type: ignore[arg-type]
        except UserError as error:
            results.append(str(error))
    return results


def test_two_ranks_give_the_numbers_of_one(mesh: Mesh, place: Path) -> None:
    """In a cache of their own: one of them writes the index."""
    changes: list[dict[str, Any]] = [
        {},
        {"eval_mode": "reference"},
        {"split": "all", "eval_tokens": 700},
        {"split": "all", "eval_mode": "reference", "pack": "padded"},
    ]
    alone = [run(request(place, **change), mesh) for change in changes]
    requests = [request(place, cache_dir=str(place / "other"), **change) for change in changes]
    first, second = run_ranks(on_ranks, 2, requests)
    assert first == second
    for one, two in zip(alone, first, strict=False):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert (two["tokens"], two["samples"]) == (one["tokens"], one["samples"])
    assert [text.split(":")[0] for text in first[4:]] == [
        "--corpus /no/such",
        "MODEL /no/such",
        "--max_length 1000",
    ]


def test_text_too_short_to_train_on(mesh: Mesh, place: Path, tmp_path: Path) -> None:
    """Two documents of a few words: less than one sample, but enough to evaluate."""
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"{number} words")
    counts = [
        run(request(place, corpus=str(tmp_path), split=split), mesh)["tokens"]
        for split in ("held_out", "all")
    ]
    assert 1 < counts[0] < counts[1] < LENGTH


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corpus": None}, "--corpus is required: MODEL .*factored"),
        ({"corpus": "/no/such"}, "--corpus /no/such"),
        ({"tokenizer": "/no/such"}, "--tokenizer /no/such"),
        ({"max_length": 65}, "--max_length 65: the model has 64 positions"),
        ({"max_length": 1}, "--max_length 1"),
        ({"eval_tokens": 0}, "--eval_tokens 0"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"model": "/no/such"}, "MODEL /no/such"),
        ({"merged": False, "model": "hf"}, "--factored"),
    ],
)
def test_refusals(mesh: Mesh, place: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        run(request(place, **changes), mesh)
    assert "\n" not in str(caught.value)


def test_a_stream_has_no_whole(mesh: Mesh, place: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for split in ("train", "validation"):
        rows = [json.dumps({"text": f"some words {number} of text"}) for number in range(30)]
        with gzip.open(tmp_path / f"c4-{split}.00000.json.gz", "wt") as file:
            file.write("\n".join(rows))
    corpus = f"c4:{tmp_path}"
    with pytest.raises(UserError, match="--split all: --corpus c4"):
        run(request(place, corpus=corpus, split="all"), mesh)
    assert run(request(place, corpus=corpus, eval_tokens=90), mesh)["tokens"] == 90
