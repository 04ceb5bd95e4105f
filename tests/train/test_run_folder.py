"""Who may write in a run folder, and records that survive a resume and a full disk."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from sltrain_dist.train import journal
from sltrain_dist.train.run_folder import Records, choose_folder, claim_folder, lock_folder
from sltrain_dist.train.settings import resolve
from sltrain_dist.utils.errors import UserError


def config(**changes):
    return replace(resolve([], 1), **changes)


def test_choice_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(choose_folder(config(save_dir="runs/x"))) == "runs/x"
    assert choose_folder(config()).name.startswith("llama_demo-sltrain-2")
    run = tmp_path / "run"
    (run / "step_5").mkdir(parents=True)
    assert choose_folder(config(continue_from=str(run))) == run
    assert choose_folder(config(continue_from=str(run / "step_5"))) == run
    with pytest.raises(UserError, match="--continue_from auto"):
        choose_folder(config(continue_from="auto"))


def test_new_folders_of_one_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    chosen = [choose_folder(config()).name for _ in range(3)]
    assert chosen == [f"llama_demo-sltrain-now{end}" for end in ("", "-2", "-3")]
    assert sorted(os.listdir("runs")) == sorted(chosen)


def test_new_folder_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"--save_dir runs/.*: not writable"):
        choose_folder(config())


def test_another_run_is_not_overwritten(tmp_path):
    new = tmp_path / "new"
    claim_folder(new, config())
    (new / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds another run"):
        claim_folder(new, config())
    with pytest.raises(UserError, match="holds another run"):
        claim_folder(new, config(continue_from=str(tmp_path / "elsewhere")))
    claim_folder(new, config(continue_from="auto"))
    claim_folder(new, config(continue_from=str(new / "step_3")))


def test_auto_goes_on_only_with_the_same_model_and_method(tmp_path):
    run = config(continue_from="auto")
    Records(tmp_path, active=True).config(run)
    claim_folder(tmp_path, run)
    claim_folder(tmp_path, replace(run, model=replace(run.model, name="renamed")))
    for other, complaint in (
        (replace(run, model=replace(run.model, rope_theta=5.0)), "another model: rope_theta"),
        (replace(run, method=replace(run.method, method="full")), "--method sltrain"),
        (replace(run, method=replace(run.method, rank=3)), "this run has --rank 3"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            claim_folder(tmp_path, other)
        assert "\n" not in str(error.value)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text[: len(text) // 2])  # killed while writing it
    claim_folder(tmp_path, run)


HOLD = """
import os, sys, time
from pathlib import Path
from sltrain_dist.train.run_folder import lock_folder
lock = lock_folder(Path(sys.argv[1]))
if os.fork() == 0:  # a data worker that outlives its parent
    os.close(1)
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def test_one_run_at_a_time(tmp_path):
    """Refused while another process holds the folder; free once it is killed, whatever its children do."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another run \(.*pid {other.pid}\) is writing there"):
            lock_folder(tmp_path)
        other.kill()
        other.wait()
        lock = lock_folder(tmp_path)
        assert lock_folder(tmp_path) is lock
        assert f"pid {os.getpid()}" in (tmp_path / ".lock").read_text()
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.wait()
        other.stdout.close()


def test_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert lock_folder(tmp_path) is not None


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(UserError, match=r"--save_dir .*: not writable"):
            claim_folder(folder, config())


def test_metrics_continue_without_gap_or_repetition(tmp_path):
    records = Records(tmp_path, active=True)
    for step in (1, 2):
        records.metrics({"step": step, "loss": 1.5})
    position = records.position()
    records.metrics({"step": 3, "loss": float("nan")})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[2] == {"step": 3, "loss": None}
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    again = Records(tmp_path, active=True)
    again.rewind(position)
    again.metrics({"step": 3, "loss": 1.25})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_fresh_start_empties_the_metrics(tmp_path):
    Records(tmp_path, active=True).metrics({"step": 1, "loss": 1.5})
    again = Records(tmp_path, active=True)
    again.rewind({})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    again.metrics({"step": 1, "loss": 1.5})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("cuttable", [True, False])
def test_a_refused_line_is_written_later_and_whole(tmp_path, cuttable):
    """A limit on file sizes stands for the full disk; real writes, cut short by the system."""
    code = f"""
import json, resource, signal
from pathlib import Path
from sltrain_dist.train import journal, run_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
records = run_folder.Records(Path({str(tmp_path)!r}), active=True)
records.metrics({{"step": 1, "loss": 1.5}})
if not {cuttable}:
    def stuck():
        raise OSError(5, "Input/output error")
    journal.os.truncate = lambda path, size: stuck()
resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
records.metrics({{"step": 2, "loss": 1.5}})
records.metrics({{"step": 2.5, "loss": 1.5}})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
records.metrics({{"step": 3, "loss": 1.5}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "training goes on" in done.stderr
    first, *torn, second, third, last = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in (first, second, third, last)] == [1, 2, 2.5, 3]
    assert len(torn) == (0 if cuttable else 1)


def test_a_checkpoint_keeps_the_lines_that_wait(tmp_path, monkeypatch):
    """Refused, saved, written after all, and resumed from there: as if the disk had never been full."""
    records = Records(tmp_path, active=True)
    records.metrics({"step": 1})
    with monkeypatch.context() as full:
        full.setattr(journal, "_add", lambda path, line: (_ for _ in ()).throw(OSError(28, "full")))
        records.metrics({"step": 2})
        position = json.loads(json.dumps(records.position()))
    records.metrics({"step": 3})
    again = Records(tmp_path, active=True)
    again.rewind(position)
    again.metrics({"step": 3})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path):
    records = Records(tmp_path, active=False)
    records.metrics({"step": 1})
    records.summary({})
    assert records.picture() is None
    assert not os.listdir(tmp_path)


def test_full_disk_is_reported_once(tmp_path, capsys):
    records = Records(tmp_path / "missing", active=True)
    records.metrics({"step": 1})
    records.metrics({"step": 2})
    assert capsys.readouterr().err.count("training goes on") == 1


def test_picture(tmp_path):
    records = Records(tmp_path, active=True)
    for step in range(1, 30):
        records.metrics({"step": step, "loss": 9 - step / 10, "grad_norm": 1.0, "lr": 1e-3})
    records.metrics({"step": 29, "eval_loss": 6.0, "eval_perplexity": 403.4, "eval_tokens": 9})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo\n3\n\0\0\n')  # torn by a crash
    assert records.picture() is None
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_strange_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    assert "not drawn" in Records(tmp_path, active=True).picture()


def test_summary_is_strict_json(tmp_path):
    Records(tmp_path, active=True).summary({"final_eval_loss": float("nan"), "step": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "final_eval_loss": None,
        "step": 3,
    }
