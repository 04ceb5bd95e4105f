"""launcher/generate.py as people call it: flags, pipes, a terminal, and every mistake in one line."""

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from launcher import generate
from tests.launcher.tiny import CONFIG, REPOSITORY

COMMAND = [sys.executable, "launcher/generate.py"]


def test_prompt_from_a_pipe_and_from_a_flag(trained, capsys):
    """The same text from both; the line end that echo adds is no part of the prompt."""
    done = subprocess.run(
        [*COMMAND, str(trained), "--max_new_tokens", "12"],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        input=b"def \xc3\xa9\n",
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("def é")
    assert b"12 written" in done.stderr
    assert b"tokens/s" in done.stderr
    assert generate.main([str(trained), "--prompt", "def é", "--max_new_tokens", "12"]) == 0
    assert capsys.readouterr().out == done.stdout.decode()


@contextlib.contextmanager
def piped(monkeypatch, content, *, finished=True):
    """A pipe as standard input, with ``content`` in it; unless ``finished`` its writer stays."""
    reader, writer = os.pipe()
    os.write(writer, content)
    if finished:
        os.close(writer)
    with open(reader, encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield
    if not finished:
        os.close(writer)


def test_nothing_piped_starts_a_document(trained, monkeypatch, capsys):
    with piped(monkeypatch, b""):
        assert generate.main([str(trained), "--max_new_tokens", "5"]) == 0
    notes = capsys.readouterr().err
    assert "1 tokens read" in notes
    assert "5 written" in notes


def test_both_prompts_are_refused_but_an_idle_pipe_is_not(trained, monkeypatch, capsys):
    with piped(monkeypatch, b"b"):
        assert generate.main([str(trained), "--prompt", "a"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --prompt: text is piped in as well; give one of the two, or redirect standard input from /dev/null"
    ]
    with piped(monkeypatch, b"", finished=False):  # as under a service: nobody may wait for it
        assert generate.main([str(trained), "--prompt", "a", "--max_new_tokens", "2"]) == 0


def test_bytes_that_are_no_text(trained, monkeypatch, capsys):
    with piped(monkeypatch, b"\xff\xfe"):
        assert generate.main([str(trained)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: standard input: is not UTF-8 text; convert it"
    ]


def test_a_terminal_gets_words_as_they_come(trained, capsys):
    """Seen through a pseudo-terminal: several writes, and the same text as through a pipe."""
    arguments = [str(trained), "--prompt", "def ", "--max_new_tokens", "40"]
    assert generate.main(arguments) == 0
    expected = capsys.readouterr().out
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    pieces = []
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # what Linux says when the last writer has gone
            break
        if not piece:
            break
        pieces.append(piece)
    assert process.wait(240) == 0
    os.close(ours)
    assert b"".join(pieces).decode().replace("\r\n", "\n") == expected
    assert len(pieces) > 1


def test_a_reader_that_leaves_is_no_error(trained):
    line = f"{' '.join(COMMAND)} {trained} --prompt a --prompt b --stream < /dev/null | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.stdout == b"a"
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


def test_flags_reach_the_sampler(trained, capsys):
    def text(*arguments):
        assert (
            generate.main([str(trained), "--prompt", "def ", "--max_new_tokens", "16", *arguments])
            == 0
        )
        return capsys.readouterr().out

    greedy = text("--greedy")
    assert text("--temperature", "0", "--seed", "5") == greedy
    assert text("--top_k", "1", "--seed", "9", "--merged") == greedy
    assert text("--top_p", "1e-9", "--factored") == greedy
    first, other = text("--seed", "1"), text("--seed", "2")
    assert len({greedy, first, other}) == 3
    assert text("--seed", "1", "--merged", "--no-stream") == first
    assert text("--seed", "1", "--stream") == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: MODEL"),
        (["/no/such"], "MODEL /no/such: no such folder"),
        (["RUN", "--top_p", "0"], "--top_p 0.0"),
        (["RUN", "--top_p", "much"], "--top_p"),
        (["RUN", "--top_k", "-3"], "--top_k -3"),
        (["RUN", "--temperature", "-1"], "--temperature -1.0"),
        (["RUN", "--greedy", "--top_p", "0.5"], "contradicts --greedy"),
        (["RUN", "--merged", "--factored"], "contradicts --factored"),
        (["RUN", "--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["RUN", "--seed", "-1"], "--seed -1"),
        (["RUN", "--dtype", "float16"], "--dtype float16"),
        (["RUN", "--device", "gpu"], "--device gpu"),
        (["RUN", "--prompt", "word " * 200], "128 positions"),
        (["RUN", "--tokenizer", "/no/such"], "--tokenizer /no/such"),
        (["RUN", "--prompts", "a"], "--prompts"),
    ],
)
def test_mistakes(trained, capsys, monkeypatch, arguments, words):
    monkeypatch.setenv("RANK", "0")
    line = [str(trained) if text == "RUN" else text for text in arguments]
    line += [] if "--prompt" in line else ["--prompt", "a"]
    assert generate.main(line) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (message,) = output.err.splitlines()
    assert message.startswith("error: ")
    assert words in message


def test_damaged_models(trained, tmp_path, capsys):
    def refused(folder, *words):
        assert generate.main([str(folder), "--prompt", "a"]) == 2
        (message,) = capsys.readouterr().err.splitlines()
        for word in ("error: MODEL", *words):
            assert word in message

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    victim = next((run / "step_6").glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    refused(run, "damaged", victim.name)
    victim.unlink()
    refused(run, "damaged", victim.name)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path / "bare")


def test_a_run_without_its_tokenizer(trained, tmp_path, capsys):
    """Older runs: the cache still has it; without the cache, --tokenizer."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    line = ["--prompt", "def ", "--greedy", "--max_new_tokens", "8"]
    assert generate.main([str(run), *line]) == 0
    expected = capsys.readouterr().out
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (run / name).unlink()
    assert generate.main([str(run), *line]) == 0
    assert capsys.readouterr().out == expected
    assert generate.main([str(run), *line, "--tokenizer", str(trained)]) == 0
    assert capsys.readouterr().out == expected
