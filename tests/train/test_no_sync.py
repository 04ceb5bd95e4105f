"""An update reads the device a fixed number of times: a read per micro-batch would stall a GPU each time.

The reference calls ``.item()`` on every micro-batch and copies every gradient to the host for the norm.
"""

from types import SimpleNamespace

from torch.utils._python_dispatch import TorchDispatchMode

from sltrain_dist.train import update as updates
from tests.parallel import tiny
from tests.ranks import run_ranks

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal")


class HostReads(TorchDispatchMode):
    """Counts the operators for which the host waits until the device has computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().split(".")[0] in READS
        return function(*args, **(kwargs or {}))


def reads(mesh, path):
    engine = tiny.build(mesh, "fsdp")
    for module in engine.module.modules():
        if hasattr(module, "path"):
            module.path = path
    run = SimpleNamespace(engine=engine, mesh=mesh, config=SimpleNamespace(loss_average="tokens"))
    counts = []
    for micro_batches in (1, 2, 5):
        tokens, labels = tiny.batch(0)
        batches = [{"tokens": tokens, "labels": labels}] * micro_batches
        with HostReads() as mode:
            updates.update(run, batches, 1e-3)
        counts.append(mode.count)
    return counts


def test_reads_do_not_grow_with_micro_batches():
    for path in ("composed", "factorized"):
        (counts,) = run_ranks(reads, 1, path)
        assert counts[0] == counts[1] == counts[2] <= 4, (path, counts)
        assert counts[0] > 0, "the loss is read once, or this test counts nothing"
