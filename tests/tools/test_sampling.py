"""Which tokens may follow and how often each does; the text of a continuation, with and without cache."""

import math
from typing import Any

import pytest
import torch

from sltrain_dist.data.tokenizer import Tokenizer, train_tokenizer
from sltrain_dist.tools.sampling import (
    Sampling,
    TextStream,
    candidates,
    continuation,
    draw,
    make_sampling,
)
from sltrain_dist.utils.errors import UserError
from tests.model.small import filled, small
from tests.model.test_hf_equality import LONGROPE

# probabilities 1/16, 1/2, 1/8, 1/4, 1/16 at temperature 1: sums of them are exact
LOGITS = torch.tensor([0.0625, 0.5, 0.125, 0.25, 0.0625]).log()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 3, 2, 0, 4]),
        ({"temperature": 0.0}, [1]),
        ({"temperature": 1e-300}, [1, 3, 2, 0, 4]),  # nothing overflows
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 2]),
        ({"top_k": 4}, [1, 3, 2, 0]),  # of two equal ones the first
        ({"top_k": 99}, [1, 3, 2, 0, 4]),
        ({"top_p": 1e-9}, [1]),  # never none
        ({"top_p": 0.49}, [1]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.76}, [1, 3, 2]),
        ({"top_p": 0.9}, [1, 3, 2, 0]),
        ({"top_p": 0.99}, [1, 3, 2, 0, 4]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),  # 4/7 + 2/7 of the three that top_k left
        ({"temperature": 2.0, "top_p": 0.6}, [1, 3, 2]),  # flatter: 0.34 + 0.24 is not enough
    ],
)
def test_candidates(settings: dict[str, Any], expected: list[int]) -> None:
    sampling = Sampling(**({"temperature": 1.0} | settings))
    ids, probabilities = candidates(LOGITS, sampling)
    assert ids.tolist() == expected
    assert probabilities.dtype == torch.float64
    assert probabilities.sum() == pytest.approx(1)
    if sampling.temperature > 1e-3:
        wanted = (LOGITS.double()[ids] / sampling.temperature).softmax(0)
        torch.testing.assert_close(probabilities, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 20, "top_p": 0.9}])
def test_draws_have_the_probabilities(settings: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, generator=generator)
    ids, probabilities = candidates(logits, Sampling(**({"temperature": 1.0} | settings)))  # type: ignore[arg-type]
    count = 20_000
    drawn = torch.tensor([draw(ids, probabilities, generator) for _ in range(count)])
    frequencies = torch.bincount(drawn, minlength=40).double() / count
    assert set(drawn.tolist()) <= set(ids.tolist())
    deviation = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((frequencies[ids] - probabilities).abs() < 5 * deviation + 1e-12).all()


def test_what_has_no_probability_is_never_drawn() -> None:
    ids, probabilities = torch.tensor([3, 5, 8]), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    assert {draw(ids, probabilities, generator) for _ in range(500)} == {5}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((False, -1.0, None, None), "--temperature -1.0"),
        ((False, math.nan, None, None), "--temperature nan"),
        ((False, math.inf, None, None), "--temperature inf"),
        ((False, None, -1, None), "--top_k -1"),
        ((False, None, None, 0.0), "--top_p 0.0"),
        ((False, None, None, 1.5), "--top_p 1.5"),
        ((False, None, None, math.nan), "--top_p nan"),
        ((True, 0.5, None, None), "--temperature 0.5: contradicts --greedy"),
        ((True, None, 4, None), "--top_k 4: contradicts --greedy"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_sampling(*arguments)


def texts(model: Any, sampling: Sampling, seed: int, count: int = 20) -> list[int]:
    return list(continuation(model, [5, 9, 2], sampling, count=count, seed=seed))


def test_text_depends_on_the_seed_alone() -> None:
    model = filled(small(initializer_range=0.1)).eval()
    state = torch.get_rng_state()
    first, again, other = (texts(model, Sampling(1.0), seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())
    assert texts(model, Sampling(1.0, top_k=1), 7) == texts(model, Sampling(0.0), 3)


@pytest.mark.parametrize("case", ["plain", "longrope"])
def test_text_equals_the_one_without_cache(case: str) -> None:
    """Under longrope the angles change at position 17: keys from before it must not be used after it."""
    scaling = {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 16}}
    model = filled(small(initializer_range=0.1, **(scaling if case == "longrope" else {}))).eval()
    expected = [5, 9, 2]
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _ in range(40):
            logits = model(torch.tensor([expected]))[0, -1]
            expected.append(draw(*candidates(logits, Sampling(1.0)), generator))
    assert texts(model, Sampling(1.0), 4, count=40) == expected[3:]


def test_text_ends_where_the_positions_do() -> None:
    model = filled(small(max_position_embeddings=16)).eval()
    assert len(texts(model, Sampling(1.0), 0, count=99)) == 13
    assert len(texts(model, Sampling(1.0), 0, count=2)) == 2


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = filled(small())
    with torch.no_grad():
        model.lm_head.weight[3] = math.inf
    with pytest.raises(UserError, match="not finite"):
        texts(model, Sampling(), 0)


PROSE = "Größe, naïve café, 数学は楽しい, 🙂👩‍🚀 and plain words, 1234.\n\tindented\n" * 3


def byte_level() -> Tokenizer:
    return train_tokenizer(["plain words and indented lines"] * 20, 300)


def metaspace() -> Tokenizer:
    """As T5's and LLaMA 2's: a blank is part of the word after it, and gone at the start of a text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(PROSE.splitlines(), trainer)
    return Tokenizer(backend, "</s>", None)


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("prompt", ["", "plain", "Größe, 数"])
def test_stream_gives_the_whole_text_in_whole_characters(make: Any, prompt: str) -> None:
    tokenizer = make()
    tokens = tokenizer.encode_batch([PROSE])[0]
    before = tokenizer.encode_batch([prompt])[0]
    stream = TextStream(tokenizer, before)
    pieces = [stream.push(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in pieces)
    whole = tokenizer.decode(before + tokens)
    assert tokenizer.decode(before) + "".join(pieces) + stream.rest() == whole
    assert sum(bool(piece) for piece in pieces) > len(tokens) / 3  # as it comes, not at the end


def test_stream_of_bytes_that_are_no_text() -> None:
    tokenizer = byte_level()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, tokenizer.vocab_size, (400,), generator=generator).tolist()
    stream = TextStream(tokenizer, [])
    text = "".join(stream.push(token) for token in tokens) + stream.rest()
    assert text == tokenizer.decode(tokens)
    assert "\ufffd" in text
