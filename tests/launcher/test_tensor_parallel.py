"""Tensor parallelism through the real commands: the curve of one process, and a resume in another layout."""

import pytest

from tests.launcher.tiny import deepspeed, flags, launch, losses

SPARSE = {"sp_ratio": 0.125}  # 8 windows, which two ranks can share


def torchrun(ranks: int, *arguments: str) -> list[str]:
    return ["torchrun", "--standalone", "--nproc_per_node", str(ranks), "launcher/pretrain.py", *arguments]  # fmt: skip


def test_two_ranks_train_the_curve_of_one_and_another_layout_goes_on(inputs, tmp_path):
    alone = launch(["python", "launcher/pretrain.py", *flags(inputs, tmp_path / "one", **SPARSE)])
    assert alone.returncode == 0, alone.stderr
    cut = flags(inputs, tmp_path / "cut", **SPARSE, num_training_steps=3, warmup_steps=2)
    parallel = ("--tensor_parallel", "2", "--sequence_parallel", "--min_lr_ratio", "1")
    done = launch(deepspeed(2, "--ds_config", "ds_configs/zero1.json", *cut, *parallel))
    assert done.returncode == 0, done.stderr
    assert "zero-1 on 2 x cpu: tensor parallel 2 with sequence parallel x data parallel 1" in (
        done.stdout
    )
    expected = losses(tmp_path / "one")
    found = losses(tmp_path / "cut")
    assert [found[step] for step in (1, 2, 3)] == pytest.approx(
        [expected[step] for step in (1, 2, 3)], abs=1e-4
    )
    more = flags(inputs, tmp_path / "cut", **SPARSE, num_training_steps=5, warmup_steps=2)
    done = launch(torchrun(2, *more, "--continue_from", "auto", "--min_lr_ratio", "1"))
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout
    assert "random states start anew" in done.stdout
    assert sorted(losses(tmp_path / "cut")) == [1, 2, 3, 4, 5]
