"""Trained and loaded tokenizers: ids, special tokens, cache, errors."""

import json
from pathlib import Path

import pytest

from sltrain_dist.data import open_data, prepare_data
from sltrain_dist.data.tokenizer import (
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    train_tokenizer,
)
from sltrain_dist.utils.errors import UserError
from tests.data.conftest import document

DOCUMENTS = [document(n) for n in range(60)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 400)


def test_trained_tokenizer_is_lossless_and_knows_no_special_text(trained: Tokenizer) -> None:
    texts = ["plain", "  tabs\t\n\n\x01 ünïcode 日本 🎉", "ends <|endoftext|> here <|pad|>", ""]
    rows = trained.encode_batch(texts)
    assert [trained.decode(row) for row in rows] == texts
    assert all(trained.eos_id not in row and trained.pad_id not in row for row in rows)
    assert trained.eos_id != trained.pad_id
    assert trained.vocab_size <= 400
    assert trained.decode([*rows[0], trained.eos_id, 10**6]) == "plain"


def test_training_is_deterministic(trained: Tokenizer) -> None:
    assert train_tokenizer(DOCUMENTS, 400).fingerprint == trained.fingerprint
    assert train_tokenizer(DOCUMENTS, 270).fingerprint != trained.fingerprint


def test_saved_tokenizer_is_read_back_by_us_and_by_transformers(
    trained: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    ours = load_tokenizer(str(tmp_path))
    assert ours.fingerprint == trained.fingerprint
    assert (ours.eos_id, ours.pad_id) == (trained.eos_id, trained.pad_id)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.eos_token_id, theirs.pad_token_id) == (trained.eos_id, trained.pad_id)
    assert theirs(DOCUMENTS[3])["input_ids"] == trained.encode_batch(DOCUMENTS[3:4])[0]
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).eos_id == trained.eos_id


@pytest.fixture
def t5_like(tmp_path: Path) -> Path:
    """A folder with a T5 tokenizer of 64 pieces and 100 extra ids, as `t5-base` has 32000 and 100."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    letters = list("abcdefghijklmnopqrstuvwxyz:.<>_0123456789")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -4.0) for letter in letters]
    pieces += [(f"<extra_id_{n}>", 0.0) for n in range(99, -1, -1)]
    backend = Backend(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    names = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in range(99, -1, -1))]
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    folder = tmp_path / "t5"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_reserved_ids_of_t5_ask_for_no_rows_and_never_come_out_of_text(t5_like: Path) -> None:
    tokenizer = load_tokenizer(str(t5_like))
    size = tokenizer.vocab_size
    assert size == 4 + 41
    assert (tokenizer.eos_id, tokenizer.pad_id) == (1, 0)
    check_vocabulary(tokenizer, "t5", size)
    rows = tokenizer.encode_batch(["a plain text", "<extra_id_0> and </s> written out"])
    assert all(index < size for row in rows for index in row)
    assert not any(index in (0, 1) for index in rows[0])


def test_tokenizer_larger_than_the_model_names_both_numbers(
    make_config, text_folder: Path, t5_like: Path
) -> None:
    with pytest.raises(UserError, match=r"--tokenizer .*: 45 tokens.* has 44;"):
        prepare_data(make_config(text_folder, tokenizer=str(t5_like)), 44)
    assert prepare_data(make_config(text_folder, tokenizer=str(t5_like)), 45).vocab_size == 45


def test_trained_size_is_capped_by_the_model(make_config, text_folder: Path) -> None:
    assert prepare_data(make_config(text_folder, vocab_size=8192), 270).vocab_size <= 270
    with pytest.raises(UserError, match=r"--tokenizer_vocab 100: .*at least 258"):
        prepare_data(make_config(text_folder), 100)


def test_tokenizer_cache_is_used_and_mended(make_config, text_folder: Path, tmp_path: Path) -> None:
    config = make_config(text_folder)
    assert prepare_data(config).built
    (file,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.json")
    content, written = file.read_bytes(), file.stat().st_mtime_ns
    assert not prepare_data(config).built
    assert file.stat().st_mtime_ns == written
    file.write_bytes(content[: len(content) // 2])
    assert not prepare_data(config).built  # the same tokenizer again, so the index still fits
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("/nowhere/tokenizer.json", "no such file"),
        ("./nowhere", "no such file"),
        ("some-name-that-is-nowhere", "cannot be reached"),
    ],
)
def test_tokenizer_not_found(
    make_config, text_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, word: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match=f"--tokenizer {name}: .*{word}") as caught:
        open_data(make_config(text_folder, tokenizer=name), global_batch=1, micro_batch=1)
    assert "\n" not in str(caught.value)


def test_damaged_or_endless_tokenizer_files(tmp_path: Path, t5_like: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"not a readable tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "empty"))
    (t5_like / "tokenizer_config.json").unlink()
    content = json.loads((t5_like / "tokenizer.json").read_text())
    content["model"]["vocab"][1][0] = "other"
    content["added_tokens"] = []
    (t5_like / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(t5_like))


def test_sentencepiece_folder_goes_through_transformers(tmp_path: Path) -> None:
    """A folder as old T5 checkpoints have it: spiece.model and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_prefix=str(tmp_path / "spiece"), vocab_size=60,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spiece.vocab").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 0, 60)
    (row,) = tokenizer.encode_batch(["the quick brown fox"])
    assert tokenizer.decode(row) == "the quick brown fox"
