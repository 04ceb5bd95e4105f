"""The doctor in a job's place on a real SLURM: the same script, nodes and launcher."""

import subprocess
import sys

import pytest

from tests.launcher import tiny


def examine(cluster, inputs, folder, *flags, **settings):
    """Submit the 7b script with the doctor in it, as a user does; (exit code, all that was printed)."""
    variables = {
        "MODEL": str(inputs / "model.json"),
        "SAVE_DIR": str(folder / "run"),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PROCESSES_PER_NODE": "1",
        "MAX_RESTARTS": "1",
        "TIMEOUT": "60",
    }
    script = f"--nodes=2 --gpus-per-node=1 --output={folder}/job.log slurm/pretrain_7b.sbatch"
    line = tiny.flags(inputs, None, model=None, save_every=3, **settings)
    done = subprocess.run(
        [sys.executable, "launcher/doctor.py", "--slurm", script, *flags, *line],
        cwd=tiny.REPOSITORY,
        env=cluster.environment | variables,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("trial", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_healthy_job_passes(cluster, inputs, tmp_path, trial):
    code, output = examine(cluster, inputs, tmp_path, *([] if trial else ["--skip", "trial"]))
    assert code == 0, output
    assert "2 ranks on node1, node2" in output, output
    assert ("resumed: losses equal to the bit" in output) == trial, output
    assert " 0 failed" in output
    assert "completed, exit code 0" in output
    assert not list((tmp_path / "run").glob("step_*")), "nothing of the trial is left behind"


@pytest.mark.slow
def test_a_planted_problem_fails_the_job(cluster, inputs, tmp_path):
    code, output = examine(
        cluster,
        inputs,
        tmp_path,
        "--skip",
        "trial",
        tokenizer="/no/such/tokenizer",
        tokenizer_vocab=None,
    )
    assert code == 1, output  # torchrun makes 1 of every code
    assert "failed   data" in output, output
    assert "--tokenizer /no/such/tokenizer" in output
    assert output.count("1 failed (data)") == 1, output


def test_a_dry_run_plans_what_sbatch_would_give(cluster, inputs, tmp_path):
    code, output = examine(cluster, inputs, tmp_path, "--dry_run", "--device", "cpu")
    assert code == 0, output
    assert "slurm/pretrain_7b.sbatch: 2 nodes, 1 GPUs each" in output
    assert "fsdp on 2 x cpu" in output
    code, output = examine(cluster, inputs, tmp_path, "--dry_run", "--device", "cpu", rank=0)
    assert code == 2, output
    assert "--rank 0" in output


def test_what_sbatch_refuses_is_named(cluster):
    script = "--partition=nowhere slurm/pretrain_7b.sbatch"
    done = subprocess.run(
        [sys.executable, "launcher/doctor.py", "--slurm", script],
        cwd=tiny.REPOSITORY,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert "sbatch refused it (sbatch: error:" in done.stderr
    assert "invalid partition" in done.stderr.lower()
    assert '--slurm "--nodes=1 slurm/pretrain_7b.sbatch"' in done.stderr
    assert len(done.stderr.splitlines()) == 1
