"""The project's job scripts on a real SLURM of two nodes: whatever ends a job, the run goes on where it may."""

import pytest

from tests.launcher import tiny
from tests.slurm.conftest import UPDATES

PACE = {"PACE": "0.15"}  # two micro-batches an update: 12 seconds of training


@pytest.fixture(scope="session")
def undisturbed(submit):
    """The curve of a job that nobody disturbs."""
    with submit("pretrain_7b") as job:
        assert job.ended() == "COMPLETED 0:0"
        assert job.restarts == 0
        logs = sorted(path.parts[-5].split("-")[-1] for path in job.run.glob("logs/*/*/*/*/*.log"))
        assert logs == ["node1"] * 2 + ["node2"] * 2  # stdout and stderr of a rank on each
        curve = tiny.losses(job.run)
        assert list(curve) == list(range(1, UPDATES + 1))
        return curve


def test_two_nodes_train_to_the_end(undisturbed):
    assert undisturbed[UPDATES] < undisturbed[1] - 1


def test_node_failure(submit, cluster, undisturbed):
    with submit("pretrain_7b", **PACE) as job:
        job.trained(UPDATES // 2)
        cluster.switch_off("node2")
        cluster.until(lambda: cluster.nodes()["node2"].startswith("down"), 60, "node2 down")
        cluster.switch_on("node2")
        assert job.ended() == "COMPLETED 0:0"
        assert job.restarts == 1
        assert tiny.losses(job.run) == undisturbed


def test_error_of_the_user_is_handed_on(submit):
    with submit("pretrain_7b", "--rank", "0", MAX_RESTARTS="0") as job:
        assert job.ended() == "FAILED 1:0"
        assert job.restarts == 0
        assert "--rank 0" in job.log.read_text()
