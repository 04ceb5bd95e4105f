"""The job scripts as texts, and planned on a machine without SLURM."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.launcher import tiny

SCRIPTS = sorted((tiny.REPOSITORY / "slurm").glob("*.s*"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_agree(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        command = ["shellcheck", "-x", f"--source-path={tiny.REPOSITORY}", str(script)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "engine", "said"),
    [
        ("pretrain_1b", "fsdp", "fsdp on 8 x cpu"),
        ("pretrain_7b", "zero2", "zero-2 on 32 x cpu"),
        ("pretrain_sizes", "fsdp", "fsdp on 8 x cpu"),
    ],
)
def test_dry_run_plans_the_job_on_a_login_node(tmp_path, script, engine, said):
    tiny.write_inputs(tmp_path)
    model = str(tmp_path / "model.json")
    given = {"DRY_RUN": "1", "MODEL": model, "MODELS": model, "ENGINE": engine}
    flags = tiny.flags(tmp_path, None, model=None, total_batch_size=64, device="cpu")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", f"slurm/{script}.sbatch", *flags],
        cwd=tiny.REPOSITORY,
        env=environment | given | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout.splitlines()[0], done.stdout


def test_unknown_engine_is_named():
    done = subprocess.run(
        ["bash", "slurm/pretrain_1b.sbatch"],
        cwd=tiny.REPOSITORY,
        env=os.environ | {"ENGINE": "zero9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "ENGINE=zero9" in done.stderr
