"""Every mistake of a user: one clear line on one rank, exit code 2, and nothing lost."""

import json
import os
import shutil
import sys
import time

import pytest

from tests.launcher.tiny import CONFIG, REPOSITORY, deepspeed, flags, launch, losses


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A finished run with three checkpoints, to be copied by tests that damage it."""
    from launcher import pretrain

    folder = tmp_path_factory.mktemp("finished") / "run"
    saved = dict(os.environ)
    assert pretrain.main(flags(inputs, folder, save_every=2)) == 0
    os.environ.clear()
    os.environ.update(saved)
    return folder


def refused(bare, capsys, line, *parts):
    """Run, expect exit code 2 within ten seconds and one line that holds ``parts``."""
    capsys.readouterr()
    began = time.monotonic()
    assert bare(line) == 2
    # Generous against a busy machine; the limit users are promised is 10 s.
    assert time.monotonic() - began < 60
    error = capsys.readouterr().err
    messages = [text for text in error.splitlines() if text.startswith("error: ")]
    assert len(messages) == 1, error
    for part in parts:
        assert part in messages[0]
    assert "Traceback" not in error


def test_flags(bare, capsys, inputs, tmp_path):
    run = tmp_path / "run"
    refused(bare, capsys, flags(inputs, run, model="nothing"), "--model nothing", "llama_60m")
    refused(bare, capsys, flags(inputs, run, rank=65), "--rank 65", "64 x 64")
    refused(bare, capsys, flags(inputs, run, sp_ratio=0.001), "--sp_ratio 0.001", "nearest density")
    refused(bare, capsys, flags(inputs, run, attention="flash_attn"), "--attention flash_attn")
    refused(bare, capsys, flags(inputs, run, norm="apex"), "--norm apex")
    assert not (run / "config.json").exists()


def test_corpus(bare, capsys, inputs, tmp_path):
    def wrong(content, *parts, name="corpus.txt"):
        (tmp_path / name).write_bytes(content)
        line = flags(inputs, tmp_path / "run", corpus=tmp_path / name)
        refused(bare, capsys, line, f"--corpus {tmp_path / name}", *parts)

    refused(bare, capsys, flags(inputs, tmp_path / "run", corpus="/no/such"), "--corpus /no/such")
    wrong(b"")
    wrong(bytes(range(256)) * 40, "text")
    wrong(b"a few words\n" * 3)
    wrong(b'{"body": "no text field"}\n' * 50, "text", name="corpus.jsonl")
    small = tmp_path / "small.json"
    small.write_text(json.dumps(CONFIG | {"vocab_size": 300}))
    line = flags(inputs, tmp_path / "run", model=small, tokenizer=inputs / "cache")
    refused(bare, capsys, line, "--tokenizer")


def test_save_dir(bare, capsys, inputs, tmp_path, finished):
    refused(bare, capsys, flags(inputs, finished), f"--save_dir {finished}", "--continue_from auto")
    (tmp_path / "file").write_text("")
    refused(bare, capsys, flags(inputs, tmp_path / "file" / "run"), "--save_dir", "not writable")


def test_continue_from(bare, capsys, inputs, tmp_path, finished):
    def wrong(source, *parts, **changes):
        line = flags(inputs, tmp_path / "new", continue_from=source, **changes)
        refused(bare, capsys, line, "--continue_from", *parts)

    wrong("/no/such", "no such folder")
    (tmp_path / "empty").mkdir()
    wrong(tmp_path / "empty", "no")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))
    wrong(finished, model=other)
    wrong(finished, method="full")
    wrong(finished, seed=7)
    wrong(finished, support="uniform")
    assert losses(finished).keys() == set(range(1, 7))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_checkpoint(bare, capsys, inputs, tmp_path, finished, damage):
    """The newest checkpoint is named and the previous one used; the losses come out the same."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    victim = max((run / "step_6").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        del content[-100:]
    else:
        content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert bare(flags(inputs, run, save_every=2, continue_from="auto")) == 0
    output = capsys.readouterr().out
    assert "step_6 is damaged" in output
    assert victim.name in output
    assert "continuing from" in output
    assert "step_4" in output
    assert losses(run) == losses(finished)


def test_one_line_from_two_ranks(inputs, tmp_path):
    """Before and after the process group exists: the first rank speaks, all exit with an error."""
    for changes, part in (
        ({"rank": 0}, "--rank 0"),
        ({"corpus": "/no/such"}, "--corpus /no/such"),
        ({"rank": 65}, "--rank 65"),
    ):
        command = ["torchrun", "--standalone", "--nproc_per_node", "2", "launcher/pretrain.py"]
        done = launch(command + flags(inputs, tmp_path / "run", **changes))
        assert done.returncode != 0
        messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1, done.stderr
        assert part in messages[0]


def test_deepspeed_contradiction(inputs, tmp_path):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"train_batch_size": 64, "zero_optimization": {"stage": 2}}))
    command = deepspeed(2, "--ds_config", str(config), *flags(inputs, tmp_path / "run"))
    done = launch(command)
    assert done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, done.stderr
    assert "train_batch_size" in messages[0]
    assert "--total_batch_size" in messages[0]


def test_full_disk(inputs, tmp_path):
    """No checkpoint can be written: training goes on to its end, says so, and exits with an error."""
    line = flags(inputs, tmp_path / "run", num_training_steps=4, save_every=2, timeout=6)
    limited = f"ulimit -f 300; exec {sys.executable} launcher/pretrain.py {' '.join(line)}"
    done = launch(["bash", "-c", limited])
    assert done.returncode == 2, done.stdout + done.stderr
    assert "step_2 was not saved" in done.stdout
    assert "final perplexity" in done.stdout
    assert "the final checkpoint could not be saved" in done.stderr
    assert losses(tmp_path / "run").keys() == {1, 2, 3, 4}


def test_nodes_with_other_texts(inputs, tmp_path):
    """Two 'nodes' that see different text behind one name are refused, not trained apart."""
    script = tmp_path / "node.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "rank = int(os.environ['RANK'])\n"
        "os.environ['LOCAL_RANK'] = '0'\n"
        f"os.chdir({str(tmp_path)!r} + '/node' + str(rank))\n"
        "from launcher.pretrain import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    for rank in (0, 1):
        node = tmp_path / f"node{rank}"
        node.mkdir()
        text = (inputs / "text.txt").read_text()
        (node / "text.txt").write_text(text if rank == 0 else text[: len(text) // 2])
    line = flags(inputs, tmp_path / "run", corpus="text.txt", cache_dir="cache")
    done = launch(["torchrun", "--standalone", "--nproc_per_node", "2", str(script), *line])
    assert done.returncode != 0
    assert "rank 1 has other text" in done.stderr
