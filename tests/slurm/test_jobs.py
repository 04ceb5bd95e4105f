"""The project's job scripts on a real SLURM of two nodes: whatever ends a job, the run goes on where it may."""

import pytest

from tests.launcher import tiny
from tests.slurm.cluster import NODES
from tests.slurm.conftest import UPDATES

PACE = {"PACE": "0.15"}  # two micro-batches an update: 12 seconds of training in the first start


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


@pytest.fixture
def preempt(cluster):
    """Start a job of higher priority that needs both nodes, for a few seconds."""

    def run(seconds: int) -> None:
        size = ("--nodes=2", "--exclusive", "--output=/dev/null")
        cluster.command("sbatch", "-p", "high", *size, f"--wrap=sleep {seconds}")

    return run


def lose(cluster, node):
    """Switch a node off, and on again as soon as SLURM has given it up."""
    cluster.switch_off(node)
    cluster.until(lambda: cluster.nodes()[node].startswith("down"), 120, f"{node} given up")
    cluster.switch_on(node)


def test_two_nodes_train_to_the_end(undisturbed):
    assert undisturbed[UPDATES] < undisturbed[1] - 1


def test_preempted_job_continues_on_the_same_curve(submit, preempt, undisturbed):
    with submit("pretrain_7b", **PACE) as job:
        job.trained(UPDATES // 3)
        preempt(seconds=1)
        job.restarted(1)
        assert (
            job.heartbeat()["state"] == "interrupted"
        )  # left by the first run: the second is starting
        stopped = job.heartbeat()["step"]
        assert (job.run / "latest").read_text().strip() == f"step_{stopped}"
        assert stopped < UPDATES
        assert job.ended() == "COMPLETED 0:0"
        assert job.restarts == 1
        assert tiny.losses(job.run) == undisturbed


def test_cancelled_job_saves_and_stays_cancelled(submit, cluster, undisturbed):
    with submit("pretrain_7b", "--save_every", "0", **PACE) as job:
        job.trained(UPDATES // 3)
        cluster.command("scancel", job.number)
        assert job.ended().startswith("CANCELLED")
        beat = job.heartbeat()
        assert beat["state"] == "interrupted"
        assert (job.run / "latest").read_text().strip() == f"step_{beat['step']}"
        assert "requeued" not in job.log.read_text()
        assert tiny.losses(job.run).items() <= undisturbed.items()


def test_job_goes_on_beyond_its_time_limit(submit, cluster, undisturbed):
    with submit("pretrain_7b", PACE="0.5") as job:
        job.trained(1)
        cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=2")
        job.requeued(1)  # USR1 comes 120 s before the limit: now, when SLURM looks, within 30 s
        cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        assert job.ended() == "COMPLETED 0:0"
        assert job.restarts == 1
        assert "the time limit is near" in job.log.read_text()
        assert tiny.losses(job.run) == undisturbed


@pytest.mark.slow  # the longest, and a part of the last one
def test_node_failure(submit, cluster, undisturbed):
    with submit("pretrain_7b", **PACE) as job:
        job.trained(UPDATES // 3)
        lose(cluster, "node2")
        assert job.ended() == "COMPLETED 0:0"
        assert job.restarts == 1
        assert tiny.losses(job.run) == undisturbed


def test_error_of_the_user_is_handed_on(submit):
    with submit("pretrain_7b", "--rank", "0", MAX_RESTARTS="0") as job:
        assert job.ended() == "FAILED 1:0"
        assert job.restarts == 0
        assert "--rank 0" in job.log.read_text()


def test_dry_run_of_a_job(submit):
    with submit("pretrain_7b", "--device", "cpu", DRY_RUN="1", PROCESSES_PER_NODE="") as job:
        assert job.ended() == "COMPLETED 0:0"
        assert "fsdp on 2 x cpu" in job.log.read_text()


@pytest.mark.slow
def test_preempted_twice_and_a_node_lost(submit, cluster, preempt, undisturbed, capsys):
    """Preempted, a node (the one that runs the job script) lost, preempted again: nobody touches the job meanwhile."""
    with submit("pretrain_7b", PACE="0.15,0.15,0.15") as job:
        for number, strike in enumerate(
            (lambda: preempt(1), lambda: lose(cluster, NODES[0]), lambda: preempt(1)), 1
        ):
            job.trained(10 * number)
            strike()
            job.restarted(number)
        assert job.ended() == "COMPLETED 0:0"
        assert job.restarts == 3
        curve = tiny.losses(job.run)
        with capsys.disabled():
            print(
                f"\nupdate  undisturbed       preempted twice, one node lost ({job.restarts} restarts)"
            )
            for step in [1, *range(5, UPDATES + 1, 5)]:
                print(f"{step:6}  {undisturbed[step]!r:17} {curve[step]!r}")
            print(f"bit-equal over {UPDATES} updates: {curve == undisturbed}")
        assert curve == undisturbed
