"""Every kind of corpus gives its documents; every bad one gives one clear line."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sltrain_dist.data import open_data, prepare_data
from sltrain_dist.data.corpora import open_corpus
from sltrain_dist.data.documents import FileCorpus, StreamCorpus
from sltrain_dist.data.split import survey
from sltrain_dist.utils.errors import UserError
from tests.data.conftest import document

ROWS = [{"text": document(n), "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for n in range(9)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def files_of(corpus: str | Path) -> FileCorpus:
    opened, _ = open_corpus(str(corpus))
    assert isinstance(opened, FileCorpus)
    return opened


def test_stdlib_is_about_eleven_megabytes_of_this_python_and_has_no_tests() -> None:
    corpus = files_of("stdlib")
    names = [path.relative_to(corpus.root).as_posix() for path in corpus.files]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert not [name for name in names if "site-packages" in name or "test" in name.split("/")]
    size = sum(map(len, corpus.documents()))
    assert 6e6 < size < 16e6
    assert corpus.identity() == files_of("stdlib").identity()


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"])
def test_rows_of_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"part{ending}"
    if ending == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif ending.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES.encode()))
    elif ending == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_text(LINES)
    assert list(files_of(path).documents()) == [row["text"] for row in ROWS]


def test_a_folder_mixes_kinds_in_order_of_names_and_skips_others(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(LINES)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("first\n")
    (tmp_path / "picture.png").write_bytes(b"\0\1")
    texts = list(files_of(tmp_path).documents())
    assert texts[0] == "first\n"
    assert len(texts) == 1 + len(ROWS)


def test_a_big_text_file_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path) -> None:
    text = "".join(f"line {n} of a long file\n" for n in range(30_000)) + "x" * 200_000
    path = tmp_path / "big.txt"
    path.write_text(text)
    pieces = list(files_of(path).documents())
    assert "".join(pieces) == text
    assert len(pieces) >= 10
    assert pieces[0].endswith("\n")
    assert survey(pieces, "big").documents == len(pieces)


def test_identity_follows_content_and_names_not_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("text")
    first = files_of(tmp_path / "one").identity()
    assert first == files_of(tmp_path / "two").identity()
    (tmp_path / "two" / "a.txt").write_text("tex2")
    assert first != files_of(tmp_path / "two").identity()


def test_split_has_both_sides_and_keeps_equal_documents_together() -> None:
    documents = [document(n % 50) for n in range(200)]
    split = survey(documents, "x")
    sides = {text: {split.side(text) for _ in range(2)} for text in documents}
    assert all(len(side) == 1 for side in sides.values())
    assert {side for found in sides.values() for side in found} == {"train", "held_out"}
    for few in range(2, 30):
        split = survey(documents[:few], "x")
        assert {split.side(text) for text in documents[:few]} == {"train", "held_out"}
    many = [str(n) for n in range(20_000)]
    split = survey(many, "x")
    assert 0.02 < sum(split.side(text) == "held_out" for text in many) / len(many) < 0.05


def test_c4_row_streams_a_mirror(c4_folder: Path) -> None:
    corpus, row = open_corpus(f"c4:{c4_folder}")
    assert isinstance(corpus, StreamCorpus)
    assert row.tokenizer == "t5-base"
    assert list(corpus.documents("train")) == [document(n) for n in range(390)]
    assert next(corpus.documents("validation")) == document(390)


def bad_corpora(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name of the fault -> (corpus, a word of the message)."""
    contents: dict[str, bytes] = {
        "empty.txt": b"",
        "empty.jsonl": b"",
        "blank.txt": b" \n\n \t\n",
        "binary.txt": bytes(range(256)) * 50,
        "nul.txt": b"text\0text" * 1000,
        "latin1.txt": "Stra\xdfe ".encode("latin-1") * 3000,
        "tiny.txt": b"one two three",
        "no_field.jsonl": b'{"body": "x"}\n' * 20,
        "number.jsonl": b'{"text": 17}\n' * 20,
        "broken.jsonl": b'{"text": "a"}\n{"text": \n',
        "broken.json.gz": gzip.compress(LINES.encode())[:-30],
        "broken.parquet": b"PAR1 is not enough",
        "model.bin": b"x" * 100,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "nothing_known").mkdir()
    (folder / "nothing_known" / "a.csv").write_text("a,b")
    words = {
        "empty.txt": "empty", "empty.jsonl": "empty", "blank.txt": "empty",
        "binary.txt": "UTF-8", "nul.txt": "UTF-8", "latin1.txt": "UTF-8", "tiny.txt": "too small",
        "no_field.jsonl": "`text`", "number.jsonl": "`text`", "broken.jsonl": "cannot be read",
        "broken.json.gz": "cannot be read", "broken.parquet": "cannot be read",
        "model.bin": "unknown kind", "nothing_known": "no file of a known kind",
        "missing.txt": "no such file",
    }  # fmt: skip
    return {name: (folder / name, word) for name, word in words.items()}


def test_every_bad_corpus_is_one_line_that_names_flag_and_value(make_config, tmp_path) -> None:
    for name, (path, word) in bad_corpora(tmp_path).items():
        with pytest.raises(UserError) as caught:
            prepare_data(make_config(path))
        message = str(caught.value)
        assert message.startswith(f"--corpus {path}: "), message
        assert word in message, (name, message)
        assert "\n" not in message
        assert ";" in message, message  # what is wrong; the mend
    assert not list((tmp_path / "cache").glob("index-*[0-9a-f]/"))


@pytest.mark.parametrize("pack", ["packed", "padded"])
def test_shorter_than_one_sequence(make_config, text_folder: Path, pack: str) -> None:
    config = make_config(text_folder, sequence_length=100_000, pack=pack)
    if pack == "padded":  # every document is one sample, whatever its length
        assert prepare_data(config).train_samples
        return
    with pytest.raises(UserError, match=r"--corpus .*too short.*--max_length 100000"):
        open_data(config, global_batch=1, micro_batch=1)


def test_c4_without_network_fails_within_ten_seconds(tmp_path: Path) -> None:
    """The launcher's whole path: message, exit status 2, no minutes of retries, no traceback."""
    environment = {**os.environ, "HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "launcher" / "prepare_data.py")]
    began = time.monotonic()
    result = subprocess.run(
        [*command, "--corpus", "c4", "--cache_dir", str(tmp_path)],
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert time.monotonic() - began < 30  # imports included, on a machine that does other work
    assert result.stderr.startswith("error: --corpus c4: https://hub.invalid cannot be reached")
    assert result.stderr.count("\n") == 1


def test_an_empty_name_is_not_the_current_folder(make_config) -> None:
    with pytest.raises(UserError, match=r"--corpus : no such file"):
        prepare_data(make_config(""))
    with pytest.raises(UserError, match=r"--corpus x+: cannot be read"):
        prepare_data(make_config("x" * 5000))


def test_unwritable_cache_is_named(make_config, text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache_dir .*cannot be written"):
        prepare_data(make_config(text_folder, cache_dir=str(tmp_path / "file" / "cache")))


def test_text_trains_without_the_package_datasets(make_config, text_folder: Path) -> None:
    """And a kind of file that needs it says so."""
    (text_folder.parent / "rows.jsonl").write_text(LINES)
    program = (
        "import sys; sys.modules['datasets'] = sys.modules['transformers'] = None\n"
        "from sltrain_dist.config import DataConfig\n"
        "from sltrain_dist.data import prepare_data\n"
        "config = lambda corpus: DataConfig(corpus=corpus, vocab_size=300, sequence_length=16,\n"
        "    cache_dir=sys.argv[1])\n"
        "assert prepare_data(config(sys.argv[2])).train_samples\n"
        "try: prepare_data(config(sys.argv[3]))\n"
        "except Exception as error: print(error)\n"
    )
    cache = make_config("x").cache_dir
    arguments = [cache, str(text_folder), str(text_folder.parent / "rows.jsonl")]
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert "pip install datasets" in result.stdout
