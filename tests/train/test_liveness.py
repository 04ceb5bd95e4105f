"""Who is named when a collective has failed: here the store and the signs in it; on real ranks in tests/launcher."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from sltrain_dist.train import liveness
from sltrain_dist.train.liveness import Liveness
from sltrain_dist.utils.errors import FaultError

TIMEOUT = 1.0


def rank_of(number, local_rank=0, world_size=3):
    device = torch.device("cpu")
    return SimpleNamespace(rank=number, local_rank=local_rank, world_size=world_size, device=device)


def sign(store, rank, count):
    place = {"count": count, "phase": "training", "step": 6, "host": f"node{rank}"}
    store.set(f"alive/{rank}", json.dumps(place))


@pytest.fixture
def store(monkeypatch):
    shared = HashStore()
    monkeypatch.setattr(liveness, "group_store", lambda: shared)
    return shared


def test_a_rank_that_never_began_is_named(store, tmp_path):
    watch = Liveness(rank_of(0), tmp_path, TIMEOUT)
    sign(store, 0, 0)
    sign(store, 1, 0)
    assert watch.blame() == "rank 2 never began to train"


def test_a_rank_whose_signs_have_stopped_is_named(store, tmp_path):
    watch, ended = Liveness(rank_of(0), tmp_path, TIMEOUT), threading.Event()
    for rank in range(3):
        sign(store, rank, 0)

    def live():
        count = 0
        while not ended.wait(0.01):
            count += 1
            sign(store, 1, count)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        text = watch.blame()
    finally:
        ended.set()
        thread.join()
    assert text == "rank 2 (node2) gives no sign of life; it stood in training of update 7"


class Frozen:
    """A store whose process is stopped: whoever asks waits."""

    def __init__(self):
        self.thaw = threading.Event()

    def set(self, *_):
        self.thaw.wait(60)

    check = multi_get = set


@pytest.mark.parametrize(("local_rank", "speaks"), [(0, True), (2, False)])
def test_a_store_that_stands_still_keeps_nobody_waiting(monkeypatch, tmp_path, local_rank, speaks):
    frozen = Frozen()
    monkeypatch.setattr(liveness, "group_store", lambda: frozen)
    monkeypatch.setattr(liveness, "_GRACE", 0.1)
    began = time.monotonic()
    with pytest.raises(FaultError, match="is gone or stands still") as caught:
        with Liveness(rank_of(6, local_rank, 8), tmp_path, TIMEOUT):
            raise RuntimeError("gloo: timed out")
    assert time.monotonic() - began < 20
    assert caught.value.speaks == speaks
    assert sum(thread.name == "store" for thread in threading.enumerate()) == 1, (
        "one waits, no more"
    )
    frozen.thaw.set()
    assert "timed out" in (tmp_path / "faults" / "rank-00006-stacks.txt").read_text()
