"""The doctor's measures and judgements apart from ranks: clocks, links, losses, sizes, job scripts, and SLURM's answers."""

import json
import os
import threading

import psutil
import pytest
from torch._C._distributed_c10d import HashStore

from launcher import doctor
from sltrain_dist.parallel.links import Link, Speeds
from sltrain_dist.parallel.reach import LeftError, Meeting, ReachError, clock_skew
from sltrain_dist.tools import doctor_slurm, doctor_trial
from sltrain_dist.tools.doctor_machine import OLDEST, judge
from sltrain_dist.tools.doctor_slurm import Job, read_job
from sltrain_dist.tools.doctor_trial import Layout, command_line, compare
from sltrain_dist.tools.doctor_visit import Options, Visit, failed, merge, passed
from sltrain_dist.train.flags import explicit
from sltrain_dist.train.settings import resolve
from tests.launcher.tiny import CONFIG, REPOSITORY, flags


def meetings(count):
    store = HashStore()
    return [Meeting(store, rank, count) for rank in range(count)]


def together(count, action):
    """What ``action(meeting)`` gives on ranks that are threads around one store."""
    answers = [None] * count

    def body(meeting):
        try:
            answers[meeting.rank] = action(meeting)
        except Exception as error:
            answers[meeting.rank] = error

    threads = [threading.Thread(target=body, args=(one,)) for one in meetings(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return answers


def test_gather():
    def action(meeting):
        meeting.begin("topic", 20)
        return [meeting.gather(meeting.rank), meeting.gather([meeting.rank * 2])]

    assert together(3, action) == [[[0, 1, 2], [[0], [2], [4]]]] * 3


def test_gather_without_one():
    """A rank that leaves a check early does not leave the others waiting; a silent one is named."""

    def leaves(meeting):
        meeting.begin("topic", 20)
        if meeting.rank == 1:
            meeting.leave()
            return None
        return meeting.gather(0)

    left = together(3, leaves)
    assert isinstance(left[0], LeftError)
    assert isinstance(left[2], LeftError)

    def silent(meeting):
        meeting.begin("topic", 0.5)
        return None if meeting.rank == 1 else meeting.gather(0)

    answers = together(2, silent)
    assert isinstance(answers[0], ReachError)
    assert "rank 1 on" in answers[0].found


def test_clock_skew():
    """A clock that is 5 s ahead, and one behind, are seen so."""
    import time

    ahead = (0.0, 5.0, -3.0)
    skews = together(3, lambda m: clock_skew(m, lambda: time.time() + ahead[m.rank]))
    for (found, error), expected in zip(skews, ahead, strict=True):
        assert found == pytest.approx(expected, abs=error + 0.01)


def test_links():
    """The slowest is named; one far below the others of its kind is a failure, a network slower than memory is none."""
    hosts = ["a", "a", "b", "b"]
    rates = {(0, 1): 9e9, (2, 3): 8e9, (0, 2): 1e8, (0, 3): 1.1e8, (1, 2): 1.2e8, (1, 3): 1.2e8}

    def outcome(changes):
        links = [Link(*pair, rate) for pair, rate in (rates | changes).items()]
        return judge(Speeds(1e9, tuple(sorted(links, key=lambda link: link.rate))), hosts)

    fine = outcome({})
    assert fine.status == "passed"
    assert "ranks 0 and 2 (a, b) 0.10 GB/s" in fine.found
    sick = outcome({(1, 3): 1e6})
    assert sick.status == "failed"
    assert "ranks 1 and 3 (a, b)" in sick.found


def test_losses(tmp_path):
    """Resumed losses that differ, or are not there, are seen."""

    def write(name, values):
        (tmp_path / name).mkdir(exist_ok=True)
        lines = [json.dumps({"step": n, "loss": loss}) for n, loss in enumerate(values, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))

    write("first", [6.0, 5.0, 4.0, 3.0, 2.0])
    write("resumed", [0.0, 0.0, 0.0, 3.0, 2.0])
    assert compare(tmp_path, "resumed", 0.0)[0]
    write("resumed", [0.0, 0.0, 0.0, 3.0, 2.00005])
    assert not compare(tmp_path, "resumed", 0.0)[0]
    assert compare(tmp_path, "resumed", 1e-4)[0]
    write("resumed", [0.0, 0.0, 0.0, 3.1, 2.0])
    assert not compare(tmp_path, "resumed", 1e-4)[0]
    write("resumed", [0.0, 0.0, 0.0, 3.0])
    assert not compare(tmp_path, "resumed", 1e-4)[0]


PRETRAIN = """
import json, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(flags["--save_dir"])
mode = (pathlib.Path(__file__).parent / "mode").read_text()
if mode == "refuses":
    sys.exit("error: --rank 0: must be positive")
folder.mkdir()
with (folder / "metrics.jsonl").open("w") as records:
    for step in range(1, 10 if mode != "hangs" else 3):
        wrong = mode == folder.name and step == 5
        print(json.dumps({"step": step, "loss": 9.0 - step + wrong}), file=records, flush=True)
        if step == 3:
            (folder / "step_3").mkdir()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("well", "resumed: losses equal to the bit; resharded (another): losses equal"),
        ("refuses", "the first run ended on rank 0 on"),
        ("hangs", "the first run had not done 5 updates after 2 s"),
        ("resumed", "resumed from the checkpoint of update 3, losses differ by 1 nats"),
        ("resharded", "resharded (another) from the checkpoint of update 3, losses differ"),
    ],
)
def test_trial(tmp_path, monkeypatch, mode, words):
    """What a run does wrong, on a script that plays pretrain; and no process is left."""
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    (tmp_path / "mode").write_text(mode)
    script = tmp_path / "pretrain.py"
    script.write_text(PRETRAIN)
    line = tuple(flags(tmp_path, tmp_path / "run"))
    options = Options(5.0, 2.0 if mode == "hangs" else 60.0, None, script)
    visit = Visit(line, resolve(line, 1), options, meetings(1)[0])
    visit.folder = tmp_path / "trial"
    visit.folder.mkdir()
    visit.meeting.begin("trial", 60)
    monkeypatch.setattr(doctor_trial, "_another", lambda *_: Layout("another", {"seed": 42}))
    outcome = doctor_trial.trial(visit)
    assert words in outcome.found
    assert outcome.status == ("passed" if mode == "well" else "failed")
    assert ("--rank 0: must be positive" in outcome.found) == (mode == "refuses")
    running = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if str(script) in (process.info["cmdline"] or [])
    ]
    assert running == []


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        ({}, 4, "--replicate 2"),
        ({"replicate": 2}, 4, "--replicate 1"),
        ({"tensor_parallel": 2}, 2, "the checkpoint rewritten by the converter"),
        ({"optimizer": "muon", "replicate": 4}, 4, "the checkpoint rewritten by the converter"),
        ({"ds_config": REPOSITORY / "ds_configs" / "zero2.json"}, 2, "FSDP2"),
    ],
)
def test_other_layouts(tmp_path, changes, ranks, words):
    """A layout that pretrain takes, and that is another one."""
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    line = tuple(flags(tmp_path, tmp_path / "run", **changes))
    visit = Visit(line, resolve(line, ranks), Options(5.0, 5.0, None, tmp_path), meetings(ranks)[0])
    layout = doctor_trial._another(visit, explicit(line))
    assert layout.words == words
    visit.limit = 1  # byte
    assert "converter" in doctor_trial._another(visit, explicit(line)).words


def test_verdict():
    """Failed where one rank failed, with its name; once where all say the same."""
    two = meetings(2)[0]
    assert merge([passed("x"), passed("y")], two) == passed("x")
    assert merge([passed("x"), None], two) == passed("x")
    assert merge([failed("x", "m")] * 2, two) == failed("x", "m")
    assert merge([None, failed("x", "m")], two) == failed(f"{two.place(1)}: x", "m")


def test_flags_again():
    given = {"rank": 8, "per_layer": True, "single_gpu": False, "lr": 1e-3}
    assert command_line(given) == ["--per_layer", "--rank", "8", "--lr", "0.001"]


def test_oldest_versions():
    """What the doctor takes for new enough is what the package asks for."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    for name, version in OLDEST.items():
        if name != "python":
            assert f'"{name}>={".".join(map(str, version))}' in text
    assert 'requires-python = ">={}.{}"'.format(*OLDEST["python"]) in text


SCRIPT = """#!/bin/bash
# a comment
#SBATCH --nodes=2 --ntasks-per-node=1
#SBATCH -J tiny --gres=gpu:h100:4  # eight would be more
#SBATCH --cpus-per-task 8

set -e
#SBATCH --nodes=7
echo "$SLURM_JOB_NUM_NODES $SLURM_JOB_NODELIST $SLURM_GPUS_ON_NODE $DRY_RUN $*"
exit 5
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text(SCRIPT)
    return path


def test_job_script(script):
    assert read_job(script) == Job("tiny", 2, 1, 4, 8)
    for path in (REPOSITORY / "slurm").glob("*.sbatch"):
        assert read_job(path).nodes >= 1


def test_dry_job(script, capfd):
    """The script itself runs, knows what SLURM would have said, and its exit status is handed on."""
    assert doctor.main(["--slurm", str(script), "--dry_run", "--rank", "8"]) == 5
    assert "2 node[1-2] 4 1 --rank 8" in capfd.readouterr().out


def fake_slurm(folder, state, code):
    """sbatch that runs nothing but leaves a job behind, of which scontrol tells a first and a last state."""
    output = folder / "job.log"
    (folder / "sbatch").write_text(
        f'#!/bin/sh\necho "$@" > {folder}/arguments\necho doctor says > {output}\necho "77;cluster"\n'
    )
    (folder / "scontrol").write_text(
        "#!/bin/sh\n"
        f'if [ -e {folder}/seen ]; then echo "   JobState={state} ExitCode={code} StdOut={output}"; echo more >> {output}\n'
        f'else echo "   JobState=PENDING Reason=Resources ExitCode=0:0 StdOut={output}"; touch {folder}/seen; fi\n'
    )
    for name in ("sbatch", "scontrol"):
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("COMPLETED", "0:0", 0),
        ("FAILED", "2:0", 2),
        ("CANCELLED", "0:15", 143),
        ("TIMEOUT", "0:0", 1),
    ],
)
def test_submitted(script, tmp_path, monkeypatch, capsys, state, code, expected):
    monkeypatch.setattr(doctor_slurm, "_POLL", 0.01)
    fake_slurm(tmp_path, state, code)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert doctor.main(["--slurm", str(script), "--rank", "8", "--skip", "trial"]) == expected
    output = capsys.readouterr().out
    assert "pending (Resources)" in output
    assert output.index("doctor says") < output.index("more") < output.index(state.lower())
    asked = (tmp_path / "arguments").read_text().split()
    assert asked[1:] == [
        "--export=ALL,PROGRAM=launcher/doctor.py", str(script), "--rank", "8", "--skip", "trial",
    ]  # fmt: skip


def test_sbatch_flags_are_handed_on_and_cannot_start_the_training(script, tmp_path, monkeypatch):
    """Of two --export sbatch takes the last: the doctor's has to be it, with the user's variables."""
    monkeypatch.setattr(doctor_slurm, "_POLL", 0.01)
    fake_slurm(tmp_path, "COMPLETED", "0:0")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert doctor.main(["--slurm", f"--nodes=2 --export=ALL,ENGINE=zero2 {script}"]) == 0
    assert (tmp_path / "arguments").read_text().split() == [
        "--nodes=2", "--parsable", "--export=ALL,ENGINE=zero2,PROGRAM=launcher/doctor.py", str(script),
    ]  # fmt: skip
    assert doctor.main(["--slurm", f"--nodes=2 '{script}"]) == 2


def test_no_slurm(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert doctor.main(["--slurm", str(script)]) == 2
    assert "sbatch is not on the PATH" in capsys.readouterr().err
    assert doctor.main(["--slurm", str(tmp_path / "no.sbatch")]) == 2
    assert "no file" in capsys.readouterr().err
