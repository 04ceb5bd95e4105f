"""The index on disk: whole or rebuilt, and safe when several processes make it at once."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sltrain_dist.data import open_data, prepare_data, storage
from sltrain_dist.data.cache import Cache
from sltrain_dist.data.corpora import open_corpus
from sltrain_dist.data.index import open_split, prepare_index
from sltrain_dist.utils.errors import UserError


def test_index_holds_every_document_once_and_the_sides_are_disjoint(
    make_config, text_folder: Path
) -> None:
    config = make_config(text_folder)
    result = prepare_data(config)
    tokenizer = Cache(config, None).open_tokenizer()
    texts = {}
    for split in ("train", "held_out"):
        file = open_split(result.folder, split)
        rows = np.split(file.tokens, file.offsets[1:-1].astype(np.int64))
        assert file.tokens.dtype == np.uint16
        assert all(row[-1] == tokenizer.eos_id for row in rows)
        texts[split] = [tokenizer.decode(row.tolist()) for row in rows]
    expected = sorted(open_corpus(str(text_folder))[0].documents())  # type: ignore[call-arg]
    assert sorted(texts["train"] + texts["held_out"]) == expected
    assert not set(texts["train"]) & set(texts["held_out"])
    assert result.train_documents == len(texts["train"])
    assert result.held_out_documents == len(texts["held_out"])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "no json", "bad json"])
def test_a_damaged_index_is_rebuilt(make_config, text_folder: Path, damage: str) -> None:
    config = make_config(text_folder)
    folder = prepare_data(config).folder
    tokens, description = folder / "train.tokens", folder / "index.json"
    good = tokens.read_bytes()
    if damage == "truncated":
        tokens.write_bytes(good[:-2])
    elif damage == "flipped":
        tokens.write_bytes(good[:50] + bytes([good[50] ^ 1]) + good[51:])
    elif damage == "foreign":
        content = json.loads(description.read_text())
        description.write_text(json.dumps(content | {"fingerprint": "other"}))
    elif damage == "no json":
        description.unlink()
    else:
        description.write_text("[")
    assert prepare_data(config).built
    assert tokens.read_bytes() == good
    assert not prepare_data(config).built
    assert not list(folder.parent.glob("*.tmp-*"))


def test_changed_text_has_another_index(make_config, text_folder: Path) -> None:
    config = make_config(text_folder)
    first = prepare_data(config).folder
    (text_folder / "a" / "001.txt").write_text("something else entirely\n")
    second = prepare_data(config)
    assert second.built
    assert second.folder != first


def test_mode_and_length_share_one_index(make_config, text_folder: Path) -> None:
    first = prepare_data(make_config(text_folder))
    second = prepare_data(make_config(text_folder, pack="padded", sequence_length=32))
    assert not second.built
    assert second.folder == first.folder
    assert second.train_samples == first.train_documents


def test_ranks_that_do_not_prepare_say_when_nothing_is_there(make_config, text_folder) -> None:
    with pytest.raises(UserError, match=r"--cache_dir .* is not there"):
        open_data(make_config(text_folder), global_batch=1, micro_batch=1, prepare=False)


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_prepare_at_once_do_not_harm_each_other(
    make_config, text_folder: Path, locks: bool
) -> None:
    """Real processes on an empty cache; every one must end with the same whole index.

    Without locks (some network file systems have none) the renames alone have to keep them apart.
    """
    config = make_config(text_folder)
    program = (
        "import sys, fcntl\n"
        "def refuse(*_): raise OSError\n"
        "if sys.argv[3] == 'False': fcntl.flock = refuse\n"
        "from sltrain_dist.config import DataConfig\n"
        "from sltrain_dist.data import open_data\n"
        "config = DataConfig(corpus=sys.argv[1], cache_dir=sys.argv[2], vocab_size=300,\n"
        "    sequence_length=16)\n"
        "data = open_data(config, global_batch=2, micro_batch=2)\n"
        "print(data.order, next(data.updates(3))[0]['tokens'].tolist())\n"
    )
    root = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(text_folder), config.cache_dir, str(locks)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(3)
    ]
    outputs = {process.communicate(timeout=100)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 3
    assert len(outputs) == 1
    assert len(list(Path(config.cache_dir).glob("index-*/"))) == 1
    assert not list(Path(config.cache_dir).glob("*.tmp-*"))


def test_whoever_comes_second_keeps_the_folder_of_the_first(make_config, text_folder) -> None:
    folder = prepare_data(make_config(text_folder)).folder
    inode = folder.stat().st_ino

    def write(temporary: Path) -> None:
        (temporary / "late").write_text("")

    seen: list[Path] = []

    def is_valid(path: Path) -> bool:  # absent when asked before writing, there when published
        seen.append(path)
        return len(seen) > 2

    storage.ensure_folder(folder, is_valid, write)
    assert folder.stat().st_ino == inode
    assert not (folder / "late").exists()


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    large: Any = SimpleNamespace(vocab_size=70_000, eos_id=69_999, pad_id=0, fingerprint="x")
    pairs = [("train", [1, 69_998]), ("held_out", [65_536])]
    assert prepare_index(tmp_path / "index", "mark", large, lambda: pairs)
    file = open_split(tmp_path / "index", "train")
    assert file.tokens.dtype == np.uint32
    assert file.tokens.tolist() == [1, 69_998, 69_999]
    assert file.offsets.tolist() == [0, 3]


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def pairs() -> Iterator[tuple[str, list[int]]]:
        yield "train", [1]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    small: Any = SimpleNamespace(vocab_size=300, eos_id=0, pad_id=1, fingerprint="x")
    with pytest.raises(UserError, match=r"--cache_dir .*No space left"):
        prepare_index(tmp_path / "cache" / "index", "mark", small, pairs)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_launcher_prints_counts(make_config, text_folder: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "launcher" / "prepare_data.py")]
    options = ["--corpus", str(text_folder), "--max_length", "16", "--vocab_size", "300"]
    result = subprocess.run(
        [*command, *options, "--cache_dir", make_config("x").cache_dir],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    for word in ("train", "held out", "vocabulary", "written", "path", "samples"):
        assert word in result.stdout
