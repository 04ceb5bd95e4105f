"""Evaluation against a written-out mean, in exact and reference mode, on one and two ranks."""

import math

import pytest
import torch

from sltrain_dist.train.evaluate import evaluate, perplexity, write_text
from tests.ranks import run_ranks


class Table(torch.nn.Module):
    """A language model that looks its logits up by the last token."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(
            torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, tokens, labels=None):
        logits = self.logits[tokens]
        if labels is None:
            return logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )


class Stand:
    def __init__(self, mesh):
        self.mesh, self.module = mesh, Table().train()


def batches():
    """Four batches with unequal numbers of valid labels; one has none."""
    generator = torch.Generator().manual_seed(1)
    for keep in (5, 2, 0, 3):
        tokens = torch.randint(7, (2, 5), generator=generator)
        labels = torch.randint(7, (2, 5), generator=generator)
        labels[:, keep:] = -100
        yield {"tokens": tokens, "labels": labels}


def shares(mesh, mode):
    engine = Stand(mesh)
    mine = list(batches())[mesh.rank :: mesh.world_size]
    result = evaluate(engine, mine, mode)
    assert engine.module.training
    return result


def losses():
    model = Table()
    with torch.no_grad():
        return [float(model(**batch)) for batch in batches()], [10, 4, 0, 6]


@pytest.mark.parametrize("world_size", [1, 2])
def test_exact(world_size):
    sums, counts = losses()
    for loss, tokens in run_ranks(shares, world_size, "exact"):
        assert tokens == sum(counts)
        assert loss == pytest.approx(sum(sums) / sum(counts))


def test_reference_mode_divides_by_one_batch_too_many():
    sums, counts = losses()
    means = [loss / max(count, 1) for loss, count in zip(sums, counts, strict=True)]
    ((loss, _),) = run_ranks(shares, 1, "reference")
    assert loss == pytest.approx(sum(means) / (len(means) + 1))


def test_perplexity_overflows_quietly():
    assert perplexity(2.0) == pytest.approx(math.exp(2))
    assert perplexity(1e6) == math.inf


def texts(mesh):
    engine = Stand(mesh)
    options = {"count": 20, "window": 4, "stop": None}
    state = torch.get_rng_state()
    written = [write_text(engine, [1, 2], seed=seed, **options) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    return written


def test_text_is_drawn_by_seed_and_equal_on_all_ranks():
    first, second = run_ranks(texts, 2)
    assert first == second
    assert first[0] == first[1] != first[2]
    assert first[0][:2] == [1, 2]
    assert len(first[0]) == 22
