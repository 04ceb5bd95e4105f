"""Samples, their order, and who gets which: all against references written out here."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sltrain_dist.config import DataConfig
from sltrain_dist.data import Data, open_data
from sltrain_dist.data.cache import Cache
from sltrain_dist.data.index import open_split
from sltrain_dist.data.loader import Layout, sample_numbers
from sltrain_dist.data.samples import IGNORED, Batch, make_samples
from sltrain_dist.utils.errors import UserError
from tests.data.conftest import joined, same

T = 16
MakeConfig = Callable[..., DataConfig]


def global_updates(config: DataConfig, start: int, count: int, shape: tuple[int, int, int]):
    """Updates [start, start + count) put together from all ranks; shape: ranks, accumulation, micro."""
    ranks, accumulation, micro = shape
    parts: list[list[Batch]] = [[] for _ in range(count)]
    for rank in range(ranks):
        data = open_data(
            config,
            global_batch=ranks * accumulation * micro,
            micro_batch=micro,
            gradient_accumulation=accumulation,
            dp_rank=rank,
            dp_size=ranks,
        )
        for part, update in zip(parts, data.updates(start), strict=False):
            assert len(update) == accumulation
            assert all(batch["tokens"].shape == (micro, T) for batch in update)
            part.extend(update)
    return [joined(part) for part in parts]


def documents_of(config: DataConfig, split: str) -> tuple[list[list[int]], int, int]:
    cache = Cache(config, None)
    tokenizer = cache.prepare_tokenizer()
    cache.prepare_index(tokenizer)
    file = open_split(cache.index_folder(tokenizer), split)
    rows = np.split(file.tokens.astype(np.int64), file.offsets[1:-1].astype(np.int64))
    return [row.tolist() for row in rows], tokenizer.eos_id, tokenizer.pad_id


def test_packed_samples_against_the_definition(make_config: MakeConfig, text_folder: Path) -> None:
    config = make_config(text_folder)
    rows, _, _ = documents_of(config, "train")
    flat = list(itertools.chain.from_iterable(rows))
    data = open_data(config, global_batch=1, micro_batch=1)
    assert data.train_samples == (len(flat) - 1) // T
    assert data.train_tokens == data.train_samples * T
    seen = global_updates(config, 0, data.train_samples, (1, 1, 1))
    order = sample_numbers(config.seed, 0, data.train_samples, data.train_samples)
    for number, batch in zip(order, seen, strict=True):
        window = flat[number * T : number * T + T + 1]
        assert batch["tokens"].tolist() == [window[:-1]]
        assert batch["labels"].tolist() == [window[1:]]
        assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64


def test_padded_samples_against_the_reference_implementation(
    make_config: MakeConfig, text_folder: Path
) -> None:
    """Truncate to T - 1, add end of text, pad, shift; padding is never a target."""
    config = make_config(text_folder, pack="padded", sequence_length=40)
    rows, eos, pad = documents_of(config, "train")
    assert {len(row) > 40 for row in rows} == {True, False}  # both kinds are there
    samples = make_samples(
        open_split(Cache(config, None).open_index(Cache(config, None).open_tokenizer()), "train"),
        "padded",
        40,
    )
    batch = samples.gather(np.arange(len(rows)))
    for row, tokens, labels in zip(rows, batch["tokens"], batch["labels"], strict=True):
        ids = [*row[:-1][:39], eos]
        padded = ids + [pad] * (40 - len(ids))
        targets = ids[1:] + [IGNORED] * (41 - len(ids))
        assert tokens.tolist() == padded
        assert labels.tolist() == targets
    assert samples.targets().tolist() == (batch["labels"] != IGNORED).sum(1).tolist()


@pytest.mark.parametrize("pack", ["packed", "padded"])
def test_the_global_batch_is_the_same_for_every_world_and_micro_batch(
    make_config: MakeConfig, text_folder: Path, pack: str
) -> None:
    config = make_config(text_folder, pack=pack)
    expected = global_updates(config, 0, 5, (1, 1, 8))
    for shape in ((1, 8, 1), (1, 2, 4), (2, 1, 4), (2, 4, 1), (4, 1, 2), (4, 2, 1), (8, 1, 1)):
        found = global_updates(config, 0, 5, shape)
        assert all(same(left, right) for left, right in zip(expected, found, strict=True)), shape


def test_every_epoch_is_another_permutation_and_batches_cross_its_end() -> None:
    size = 37
    order = sample_numbers(7, 0, 4 * size, size).reshape(4, size)
    assert (np.sort(order, axis=1) == np.arange(size)).all()
    assert len({tuple(row) for row in order}) == 4
    assert (sample_numbers(7, 30, 50, size) == order.reshape(-1)[30:50]).all()
    assert (sample_numbers(8, 0, size, size) != order[0]).any()
    # A batch larger than the corpus simply takes several epochs.
    assert (sample_numbers(7, 0, 3 * size + 5, size) == order.reshape(-1)[: 3 * size + 5]).all()


def test_resume_is_a_number(make_config: MakeConfig, text_folder: Path) -> None:
    config = make_config(text_folder)
    whole = global_updates(config, 0, 9, (2, 2, 2))
    tail = global_updates(config, 4, 5, (1, 2, 4))
    assert all(same(left, right) for left, right in zip(whole[4:], tail, strict=True))


def test_workers_give_the_same_batches_and_leave_random_numbers_alone(
    make_config: MakeConfig, text_folder: Path
) -> None:
    def take(data: Data) -> list[list[Batch]]:
        return list(itertools.islice(data.updates(3), 6))

    plain = open_data(
        make_config(text_folder), global_batch=4, micro_batch=2, gradient_accumulation=2
    )
    threaded = open_data(
        make_config(text_folder, workers=2), global_batch=4, micro_batch=2, gradient_accumulation=2
    )
    before = torch.get_rng_state()
    for left, right in zip(take(plain), take(threaded), strict=True):
        assert all(same(one, other) for one, other in zip(left, right, strict=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("pack", ["packed", "padded"])
@pytest.mark.parametrize("eval_tokens", [1, 37, 10_000_000])
def test_evaluation_counts_every_target_once_on_any_number_of_ranks(
    make_config: MakeConfig, text_folder: Path, pack: str, eval_tokens: int
) -> None:
    config = make_config(text_folder, pack=pack, eval_tokens=eval_tokens)
    rows, eos, _ = documents_of(config, "held_out")
    if pack == "packed":
        everything = list(itertools.chain.from_iterable(rows))[1:]
    else:
        cut = [[*row[:-1][: T - 1], eos] for row in rows]
        everything = list(itertools.chain.from_iterable(row[1:] for row in cut))
    for ranks, micro in ((1, 1), (1, 3), (2, 1), (3, 2), (4, 64)):
        lengths, batches = set(), []
        for rank in range(ranks):
            data = open_data(
                config,
                global_batch=ranks,
                micro_batch=1,
                dp_rank=rank,
                dp_size=ranks,
                prepare=False,
            )
            evaluation = data.evaluation(micro)
            lengths.add(len(evaluation))
            batches.append(list(evaluation))
            assert evaluation.tokens == min(eval_tokens, len(everything))
        assert len(lengths) == 1
        in_order = [batch for group in zip(*batches, strict=True) for batch in group]
        assert all(batch["tokens"].shape == (micro, T) for batch in in_order)
        labels = joined(in_order)["labels"]
        assert labels[labels != IGNORED].tolist() == everything[:eval_tokens]


def test_a_state_of_another_run_is_refused(make_config: MakeConfig, text_folder: Path) -> None:
    data = open_data(make_config(text_folder), global_batch=4, micro_batch=4)
    data.load_state(data.state(5))
    for other in (
        open_data(make_config(text_folder, seed=1), global_batch=4, micro_batch=4),
        open_data(make_config(text_folder, sequence_length=8), global_batch=4, micro_batch=4),
        open_data(make_config(text_folder), global_batch=2, micro_batch=2),
    ):
        with pytest.raises(UserError, match=r"--corpus .*checkpoint"):
            other.load_state(data.state(5))


def test_inconsistent_batch_sizes_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="inconsistent layout"):
        Layout(8, 2, 2, 0, 1)
