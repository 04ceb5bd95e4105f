"""The doctor on two real ranks: a healthy launch passes, and each planted problem is found, named and given its mend."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sltrain_dist.parallel.mesh import free_port
from sltrain_dist.params import count_parameters
from sltrain_dist.tools.plan import blank_model
from sltrain_dist.train.checkpoint_room import available_memory
from sltrain_dist.train.memory import checkpoint_bytes
from sltrain_dist.train.settings import resolve
from tests.launcher.doctors import Examined, Pair
from tests.launcher.tiny import REPOSITORY, flags, launch


@pytest.fixture(scope="module")
def pair():
    both = Pair()
    yield both
    both.close()


def found(examined: Examined, name: str, *parts: str) -> None:
    """Exactly this check failed, on both ranks' exit codes, and says these things; what needs it was skipped."""
    text = examined.texts[0]
    assert examined.codes == [2] * len(examined.codes), text
    assert examined.failed() == [name], text
    _, what, mend = examined.row(name)
    assert mend, text
    for part in parts:
        assert part in f"{what} {mend}", (part, text)
    assert all("passed" not in other for other in examined.texts[1:]), "said once"


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".doctor")]


def test_healthy(pair, inputs, tmp_path):
    """All pass, the trial trains, is killed, resumes and reshards; nothing is left but the JSON."""
    report = tmp_path / "doctor.json"
    line = [*flags(inputs, tmp_path / "run"), "--json", str(report)]
    examined = pair.examine(line, trial=True)
    assert examined.codes == [0, 0], examined.texts
    assert examined.texts[1] == ""
    status, text, _ = examined.row("trial")
    assert status == "passed"
    assert "resumed: losses equal to the bit" in text
    assert "resharded (--replicate 2)" in text
    for name in ("meet", "versions", "settings", "clock", "kernels", "memory", "save_dir", "disk", "data", "links",
                 "support"):  # fmt: skip
        assert examined.row(name)[0] == "passed", examined.texts[0]
    assert examined.row("checkpoint")[0] == "skipped"
    document = json.loads(report.read_text())
    assert document["passed"]
    assert [row["name"] for row in document["checks"]][-1] == "trial"
    assert len(document["hosts"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doctor.json"]


def test_wrong_tokenizer(pair, inputs, tmp_path):
    line = flags(inputs, tmp_path / "run", tokenizer="/no/such/tokenizer", tokenizer_vocab=None)
    found(pair.examine(line), "data", "--tokenizer /no/such/tokenizer")


def mounted(folder: Path, *options: str) -> Path:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    folder = mounted(tmp_path / "small", "size=1m")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def sealed_disk(tmp_path):
    folder = mounted(tmp_path / "sealed", "size=4m", "ro")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_no_space(pair, inputs, small_disk):
    examined = pair.examine(flags(inputs, small_disk / "run"))
    found(examined, "disk", "1.0 MiB free", "do not fit", "lower --keep_last")
    assert left_behind(small_disk) == []


def test_read_only(pair, inputs, sealed_disk):
    """Root may write where permissions forbid it, but not on a disk that is mounted read-only."""
    examined = pair.examine(flags(inputs, sealed_disk / "run"))
    found(examined, "save_dir", "Read-only file system", "mounted read-write")
    assert examined.row("disk") == ("skipped", "needs save_dir", "")


def test_another_support(pair, inputs, tmp_path):
    """One rank with another seed: its flags differ, and so does the pattern it would train."""
    line = flags(inputs, tmp_path / "run")
    examined = pair.examine(line, second=[*line, "--seed", "7"])
    assert examined.codes == [2, 2]
    assert examined.failed() == [
        "settings",
        "data",
        "support",
    ]  # the order of samples is another, too
    _, text, mend = examined.row("support")
    assert "rank 1 makes another sparse support than rank 0" in text
    assert "same seed" in mend
    assert "seed 7" in examined.row("settings")[1]


def test_kernels_missing(pair, inputs, tmp_path):
    asked = {"SLT_KERNELS": "compiled", "SLT_KERNELS_DIR": str(tmp_path)}
    examined = pair.examine(flags(inputs, tmp_path / "run"), **asked)
    found(examined, "kernels", "SLT_KERNELS=compiled", "SLT_BUILD=cpu pip install")


def test_plan_above_memory(pair, inputs, tmp_path):
    """Against what this host really has: more than twice that, in activations of half a MiB a sample."""
    batch = available_memory() // 2**19
    line = flags(inputs, tmp_path / "run", batch_size=batch, total_batch_size=2 * batch)
    found(pair.examine(line), "memory", "activations", "share of the host", "lower --batch_size")


def test_plan_above_given_memory(pair, inputs, tmp_path):
    line = [*flags(inputs, tmp_path / "run"), "--gpu_memory", "1MiB"]
    found(pair.examine(line), "memory", "--gpu_memory 1.0 MiB")


def test_rank_that_never_comes(pair, inputs, tmp_path):
    """Named within the time limit with its host, which SLURM knows."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    scontrol.chmod(0o755)
    examined = pair.examine(
        [*flags(inputs, tmp_path / "run"), "--meet_timeout", "1.5"],
        ranks=(0,),
        LOCAL_WORLD_SIZE="1",
        SLURM_JOB_NODELIST="node[1-2]",
        PATH=f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}",
    )
    found(examined, "meet", "rank 1 on node2 did not come", "--meet_timeout")
    assert examined.row("versions") == ("skipped", "needs meet", "")


def test_corrupt_checkpoint(pair, inputs, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    victim = max((run / "step_6").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    line = flags(inputs, run, continue_from="auto", save_every=0, eval_every=0)
    found(pair.examine(line), "checkpoint", "step_6", victim.name, "checksum differs", "move")
    assert left_behind(run) == []


def test_whole_checkpoint(pair, inputs, trained, tmp_path):
    line = flags(inputs, tmp_path / "run", continue_from=trained)
    examined = pair.examine(line)
    assert examined.codes == [0, 0], examined.texts[0]
    assert "whole" in examined.row("checkpoint")[1]


def start(rank: int, line: list[str], port: int, root: Path) -> "subprocess.Popen[str]":
    """A rank of its own, of the checkout ``root``."""
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(root),
    }  # fmt: skip
    command = [sys.executable, str(root / "launcher" / "doctor.py"), *line, "--skip", "trial"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=root, stdout=pipe, stderr=pipe, text=True)


def test_port_taken(inputs, tmp_path):
    """The first rank names the port and who has it; the other one does not wait for the stranger for ever."""
    line = [*flags(inputs, tmp_path / "run"), "--meet_timeout", "3"]
    with socket.socket() as stranger:
        stranger.bind(("0.0.0.0", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        ranks = [start(rank, line, port, REPOSITORY) for rank in range(2)]
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    examined = Examined([2], [outputs[0][0]])
    found(
        examined, "meet", f"127.0.0.1:{port}", "port is taken", f"pid {os.getpid()}", "MASTER_PORT"
    )
    assert "something listens there that is no rank 0" in outputs[1][1]


def test_other_version(inputs, tmp_path):
    """One rank runs another checkout of the same version."""
    other = tmp_path / "checkout"
    for name in ("sltrain_dist", "launcher"):
        shutil.copytree(REPOSITORY / name, other / name)
    with (other / "sltrain_dist" / "__init__.py").open("a") as source:
        source.write("# mended here alone\n")
    port = free_port()
    skip = "devices,clock,kernels,memory,save_dir,disk,data,links,support,checkpoint,trial"
    line = [*flags(inputs, tmp_path / "run"), "--skip", skip]
    ranks = [start(rank, line, port, root) for rank, root in enumerate((REPOSITORY, other))]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    examined = Examined([2], [outputs[0][0]])
    found(examined, "versions", "rank 1 on", "has sltrain_dist", "one environment and one checkout")


def test_bad_flags(bare, inputs, tmp_path, capsys):
    """The line of pretrain, exit code 2; and the doctor's own."""
    from launcher import doctor, pretrain

    for flag, value in (("rank", 65), ("lr", -1), ("attention", "flash_attn")):
        line = flags(inputs, tmp_path / "run", **{flag: value})
        codes = [program.main(line) for program in (pretrain, doctor)]
        theirs, ours = capsys.readouterr().err.splitlines()
        assert codes == [2, 2]
        assert theirs == ours
        assert f"--{flag} {value}" in ours
    for more, part in (
        (["--nonsense"], "--nonsense"),
        (["--skip", "meet"], "--skip meet"),
        (["--skip", "teeth"], "--skip teeth"),
        (["--meet_timeout", "0"], "--meet_timeout 0"),
        (["--gpu_memory", "much"], "--gpu_memory much"),
        (["--json", str(tmp_path)], "--json"),
        (["--dry_run", "-1"], "--dry_run -1"),
    ):
        assert doctor.main([*flags(inputs, tmp_path / "run"), *more]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert part in lines[0]


def test_dry_run(bare, inputs, tmp_path, capsys):
    """The planner on the job's ranks, by either launcher; nothing is written."""
    from launcher import doctor, pretrain

    line = flags(inputs, tmp_path / "run")
    for program in (pretrain, doctor):
        assert program.main([*line, "--dry_run", "4"]) == 0
        assert "fsdp on 4 x cuda" in capsys.readouterr().out
    assert doctor.main([*line, "--dry_run=2", "--gpu_memory", "1MiB", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "on 2 x cpu" in captured.out
    assert "the plan takes" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_size(trained):
    """The planned bytes are those of a checkpoint that was written."""
    command = json.loads((trained / "config.json").read_text())["command"]
    config = resolve(command, 1)
    planned = checkpoint_bytes(config, count_parameters(blank_model(config)))
    written = sum(path.stat().st_size for path in (trained / "step_6").iterdir())
    assert planned == pytest.approx(written, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "more", "words"),
    [
        (["torchrun", "--standalone", "--nproc_per_node", "2"], [], "--replicate 2"),
        (
            ["deepspeed", "--num_gpus", "2", "--master_port", "PORT"],
            ["--ds_config", "ds_configs/zero2.json"],
            "FSDP2",
        ),
        ([sys.executable], [], "converter"),
        ([sys.executable], ["--optimizer", "adamw8bit", "--dtype", "bfloat16"], "converter"),
    ],
    ids=["torchrun", "deepspeed", "python", "8bit"],
)
def test_launchers(inputs, tmp_path, command, more, words):
    """Under each launcher and in one process, with another layout each."""
    command = [str(free_port()) if word == "PORT" else word for word in command]
    line = [*command, "launcher/doctor.py", *flags(inputs, tmp_path / "run"), *more]
    done = launch(line, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
    assert words in done.stdout


@pytest.mark.slow
def test_failure_under_torchrun(inputs, tmp_path):
    """The table is printed once, though torchrun ends all ranks as soon as one has ended."""
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", "launcher/doctor.py"]
    done = launch([*command, *flags(inputs, tmp_path / "run", tokenizer="/no/such")])
    assert done.returncode != 0
    assert done.stdout.count("failed   data") == 1
    assert "skipped  trial       needs data" in done.stdout
