"""launcher/plan.py: the table, the files, the search, and one line for wrong input."""

import json

import pytest

from launcher import plan
from tests.launcher.tiny import write_inputs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_inputs(folder)
    return [
        f"--model={folder / 'model.json'}", "--rank=8", "--sp_ratio=0.0625", "--max_length=64",
        f"--cache_dir={folder / 'cache'}",
    ]  # fmt: skip


def test_table_json_and_picture(model, tmp_path, capsys):
    files = [f"--json={tmp_path / 'plan.json'}", f"--png={tmp_path / 'plan.png'}"]
    flags = ["--gpus=4", "--tensor_parallel=2", "--batch_size=2", "--gpu_memory=1GiB"]
    assert plan.main([*model, *flags, *files]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "plan.json").read_text())
    assert sum(content["bytes"].values()) == content["total_bytes"]
    assert content["fits"] is True
    for kind in content["bytes"]:
        assert f"\n  {kind} " in printed
    assert "bfloat16" in printed, "what a GPU would train in"
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert content["wire_bytes_per_update"] > 0
    assert not (tmp_path / "runs").exists()


def test_search_gives_flags_that_fit(model, tmp_path, capsys):
    target = tmp_path / "fit.json"
    flags = ["--gpus=2", "--total_batch_size=8", "--gpu_memory=4MiB", "--tensor_parallel=1"]
    assert plan.main([*model, *flags, "--fit", f"--json={target}"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(target.read_text())
    assert found
    speeds = [each["tokens_per_second"] for each in found]
    assert speeds == sorted(speeds, reverse=True)
    assert all(each["total_bytes"] <= 4 * 2**20 for each in found)
    line = printed.splitlines()[2]
    best = line[line.index("--") :].split()
    assert plan.main([*model, *flags, *best[2:]]) == 0, "the flags to copy give the plan again"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu_memory=abc"], "--gpu_memory abc: give a size"),
        (["--gpus=0"], "--gpus 0: must be at least 1"),
        (["--gpus=3", "--tensor_parallel=2"], "--tensor_parallel 2: does not divide the 3 ranks"),
        (["--nonsense=1"], "--nonsense=1"),
        (["--png=/nonexistent/plan.png"], "--png /nonexistent/plan.png: cannot be written"),
        (["--png=plan.txt"], "--png plan.txt: give a name that ends in .png"),
        (["--gpu_memory=24"], "--gpu_memory 24: give a size"),
        (["--json=/tmp"], "--json /tmp: cannot be written"),
        (["--tflops=-1"], "--tflops -1: must be positive"),
        (["--fit"], "--fit: into what?"),
        (["--gpu_memory=1MiB", "--device=cpu"], "MiB more; --fit searches"),
        (["--gpu_memory=1KiB", "--fit", "--batch_size=1", "--tensor_parallel=1"], "nothing fits; the smallest takes"),
        (["--offload_activations"], "--offload_activations: the planner cannot"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(model, capsys, flags, words):
    assert plan.main([*model, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


def test_what_is_refused_leaves_no_file(model, tmp_path, capsys):
    one = tmp_path / "one.png"
    assert plan.main([*model, f"--json={one}", f"--png={one}"]) == 2
    assert "is --png's file too" in capsys.readouterr().err
    assert plan.main([*model, "--optimizer=nope", f"--json={tmp_path / 'plan.json'}"]) == 2
    assert not list(tmp_path.iterdir())
