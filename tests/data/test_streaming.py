"""Streamed C4 on local shards of its schema: order, ranks, and resuming more than once."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.config import DataConfig
from sltrain_dist.data import Data, open_data, streaming
from sltrain_dist.data.corpora import open_corpus
from sltrain_dist.data.samples import Batch
from sltrain_dist.data.streaming import Cursor, DocumentStream
from sltrain_dist.utils.errors import UserError
from tests.data.conftest import document, joined, same

LENGTH = 96  # so that packed and padded updates take about as many documents
PACKS = pytest.mark.parametrize("pack", ["packed", "padded"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 20)


@pytest.fixture
def config(make_config: Callable[..., DataConfig], c4_folder: Path) -> Callable[..., DataConfig]:
    def make(**changes: Any) -> DataConfig:
        return make_config(
            f"c4:{c4_folder}", tokenizer="trained", sequence_length=LENGTH, **changes
        )

    return make


def open_stream(config: DataConfig, rank: int = 0, ranks: int = 1, micro: int = 8) -> Data:
    return open_data(
        config,
        global_batch=16,
        micro_batch=micro,
        gradient_accumulation=16 // micro // ranks,
        dp_rank=rank,
        dp_size=ranks,
    )


def run(data: Data, start: int, count: int) -> list[Batch]:
    """Updates [start, start + count) of a rank; the stream is left just after the last of them."""
    return [joined(update) for update in itertools.islice(data.updates(start), count)]


def all_same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(map(same, left, right))


def test_order_is_a_shuffle_of_each_block_and_another_one_every_epoch(c4_folder: Path) -> None:
    corpus, _ = open_corpus(f"c4:{c4_folder}")
    stream = DocumentStream(lambda: corpus.open("train"), "c4", seed=1)  # type: ignore[union-attr]
    seen = [text for _, text in itertools.islice(stream.read(Cursor()), 780)]
    source = [document(n) for n in range(390)]
    for epoch in (0, 1):
        for start in range(0, 390, 20):
            block = seen[epoch * 390 + start : epoch * 390 + min(start + 20, 390)]
            assert sorted(block) == sorted(source[start : start + 20])
            assert block != source[start : start + 20]
    assert seen[:390] != seen[390:]


@PACKS
def test_global_batches_are_the_same_for_every_world(config, pack: str) -> None:
    expected = run(open_stream(config(pack=pack)), 0, 30)  # more than one epoch when padded
    for ranks, micro in ((2, 8), (4, 2), (2, 1)):
        parts = [
            run(open_stream(config(pack=pack), rank, ranks, micro), 0, 30) for rank in range(ranks)
        ]
        assert all_same(expected, [joined(list(group)) for group in zip(*parts, strict=True)])


@PACKS
@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_again_and_again_equals_never_interrupted(config, pack: str, workers: int) -> None:
    """`datasets` #8308: the state written after a resume was stale, the next resume began anew."""
    whole = run(open_stream(config(pack=pack)), 0, 33)
    seen: list[Batch] = []
    state = None
    for count, ranks in ((7, 1), (5, 2), (1, 1), (12, 4), (8, 1)):
        parts = []
        for rank in range(ranks):
            data = open_stream(config(pack=pack, workers=workers), rank, ranks, 16 // ranks)
            if state is not None:
                data.load_state(state)
            parts.append(run(data, len(seen), count))
        seen += [joined(list(group)) for group in zip(*parts, strict=True)]
        state = json.loads(json.dumps(data.state(len(seen))))
    assert all_same(whole, seen)


@PACKS
def test_a_stale_or_unreadable_state_is_found_out_and_skipped_over(config, pack: str) -> None:
    whole = run(open_stream(config(pack=pack)), 0, 14)
    data = open_stream(config(pack=pack))
    run(data, 0, 11)
    good = data.state(11)
    assert good["cursor"]["state"] is not None
    start = json.loads(json.dumps(good))

    def zero(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: zero(item) for name, item in value.items()}
        return 0 if isinstance(value, int) else value

    for state in (zero(start["cursor"]["state"]), {"nonsense": [1]}, None):
        broken = copy.deepcopy(start)
        broken["cursor"]["state"] = state
        resumed = open_stream(config(pack=pack))
        resumed.load_state(broken)
        assert all_same(whole[11:], run(resumed, 11, 3))


@PACKS
def test_without_a_state_the_number_of_the_update_is_enough(config, pack: str) -> None:
    whole = run(open_stream(config(pack=pack)), 0, 30)
    assert all_same(whole[27:], run(open_stream(config(pack=pack)), 27, 3))


def test_state_belongs_to_the_update_trained_not_to_the_one_read_ahead(config) -> None:
    data = open_stream(config(workers=3))
    updates = data.updates(0)
    before = data.state(0)
    for number in range(4):
        next(updates)
        after = data.state(number + 1)
        assert data.state(number) == before
        assert after["update"] == number + 1
        assert after["cursor"]["document"] > before["cursor"]["document"]
        before = after
    with pytest.raises(ValueError, match="update 9"):
        data.state(9)
    updates.close()  # type: ignore[attr-defined]


def test_another_stream_is_refused(config, c4_folder: Path) -> None:
    data = open_stream(config())
    run(data, 0, 9)
    state = data.state(9)
    lines = json.dumps({"text": "other", "timestamp": "", "url": ""}) + "\n"
    import gzip

    for path in sorted((c4_folder / "en").glob("c4-train*")):
        path.write_bytes(gzip.compress((lines * 130).encode()))
    resumed = open_stream(config())
    resumed.load_state(state)
    with pytest.raises(UserError, match="not the one the checkpoint saw"):
        run(resumed, 9, 1)


def test_evaluation_takes_the_head_of_the_validation_split(config, c4_folder: Path) -> None:
    for pack in ("packed", "padded"):
        data = open_stream(config(pack=pack, eval_tokens=100))
        batches = joined(list(data.evaluation(4)))
        labels = batches["labels"]
        assert (labels != -100).sum() == 100
        text = data.tokenizer.decode(batches["tokens"][0].tolist())
        assert text.startswith(document(390)[:60])


def test_a_stream_that_breaks_is_one_line(config, c4_folder: Path) -> None:
    data = open_stream(config())
    path = sorted((c4_folder / "en").glob("c4-train*"))[1]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"--corpus c4:.*cannot be read") as caught:
        run(data, 0, 30)
    assert "\n" not in str(caught.value)
