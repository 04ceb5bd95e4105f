"""How much host memory a save may take: the limits of control groups, in folders made like those of the kernel."""

from pathlib import Path

import pytest

from sltrain_dist.train.checkpoint_room import allowed_memory, available_memory

GIB = 1 << 30
NONE_V1 = 9223372036854771712  # what version 1 says where no limit is set


def version_2(folder: Path, limit: str, usage: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")


def version_1(folder: Path, limit: int, usage: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {inactive}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cgroup"
    folder.mkdir()
    return folder


def allowed(root: Path, membership: str) -> int | None:
    path = root.parent / "membership"
    path.write_text(membership)
    return allowed_memory(path, root)


def test_slurm_limits_the_job_above_the_task(root: Path) -> None:
    """Version 2: a task without a limit of its own, in a job of 8 GiB; what files left in the cache can go."""
    job = root / "system.slice" / "slurmstepd.scope" / "job_7"
    version_2(job, str(8 * GIB), 5 * GIB, inactive=GIB)
    version_2(job / "step_0" / "task_0", "max", 2 * GIB)
    group = "/system.slice/slurmstepd.scope/job_7/step_0/task_0"
    assert allowed(root, f"0::{group}\n") == 4 * GIB


def test_the_nearest_limit_counts(root: Path) -> None:
    version_2(root / "job", str(8 * GIB), 2 * GIB)
    version_2(root / "job" / "task", str(3 * GIB), GIB)
    version_2(root / "job" / "other", str(GIB), GIB)
    assert allowed(root, "0::/job/task\n") == 2 * GIB
    assert allowed(root, "0::/job/other\n") == 0
    assert allowed(root, "0::/\n") is None


def test_version_1_and_both_at_once(root: Path) -> None:
    version_1(root / "memory", NONE_V1, 50 * GIB)
    version_1(root / "memory" / "slurm" / "job_7", 6 * GIB, 3 * GIB, inactive=GIB)
    (root / "unified" / "slurm" / "job_7").mkdir(parents=True)
    membership = "4:cpu,memory:/slurm/job_7\n1:name=systemd:/slurm\n0::/slurm/job_7\n"
    assert allowed(root, membership) == 4 * GIB
    assert allowed(root, "4:memory:/\n") > 1 << 60


def test_container_sees_its_group_as_the_root(root: Path) -> None:
    """Its membership may name the host's folders, which are not mounted in it."""
    version_1(root / "memory", 2 * GIB, GIB)
    assert allowed(root, "4:memory:/docker/0123\n") == GIB
    (root / "memory").rename(root / "unused")
    version_2(root, str(3 * GIB), GIB)
    assert allowed(root, "0::/\n") == allowed(root, "0::/../job\n") == 2 * GIB


def test_without_groups(root: Path) -> None:
    assert allowed_memory(root / "none", root) is None
    assert allowed(root, "0::/job\n") is None
    assert allowed(root, "no such line\n\n") is None


def test_this_machine() -> None:
    found = available_memory()
    assert found is None or found > 0
