"""Benchmarks run whole on a small scale, so that a GPU's minutes are spent on measuring, not on mending them.

No test looks at a time; what they check is that rows are complete and sane, and that what is measured is right:
the reference formula computes what ours computes, and transient memory counts what it says.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sltrain_dist.ops.linear import sltrain_linear
from sltrain_dist.params.support import Support

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run(name, *arguments, out=None):
    """Run a benchmark; its printed text, and the content of its JSON file."""
    more = [] if out is None else ["--out", out]
    command = [sys.executable, ROOT / "benchmarks" / name, *arguments, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text()) if out else None


def is_spread(value):
    """[median, lowest, highest] of something positive."""
    return len(value) == 3 and 0 < value[1] <= value[0] <= value[2]


def check_about(about):
    assert about["device"]
    assert about["torch"] == torch.__version__
    assert isinstance(about["kernels"], list)
    assert about["threads"] >= 1
    assert os.uname().nodename not in json.dumps(about)


def test_linear(tmp_path):
    out = tmp_path / "results" / "linear.json"
    shape = ("--shapes", "128x64r8d.0625", "--supports", "fan_in", "uniform", "block")
    text, content = run("linear.py", "--quick", "--device", "cpu", *shape, out=out)
    check_about(content["about"])
    assert out.with_suffix(".png").read_bytes()[:4] == PNG
    keys = [tuple(row[n] for n in ("dtype", "support", "mode", "path")) for row in content["rows"]]
    assert sorted(keys) == sorted(
        (dtype, support, mode, path)
        for dtype in ("float32", "bfloat16")
        for support in ("fan_in", "uniform")
        for mode in ("fwd", "fwd_bwd")
        for path in ("composed", "factorized", "auto")
    )
    for row in content["rows"]:
        assert (row["out"], row["in"], row["rank"], row["tokens"]) == (128, 64, 8, 96)
        assert min(row["ours_ms"], row["dense_ms"], row["reference_ms"]) > 0
        assert is_spread(row["faster_than_dense"])
        assert is_spread(row["faster_than_reference"])
        if row["mode"] == "fwd_bwd":  # W and dW at once
            assert row["reference_transient_bytes"] >= 2 * 4 * 128 * 64
        if row["path"] == "auto":
            assert row["choice"] in ("composed", "factorized")
            assert row["behind_best"] > -1
    assert "left out: 128x64" in text  # blocks cannot reach this density here


def test_presets_are_physical_shapes_with_their_recipe(benchmarks):
    import candidates
    import linear

    assert linear.preset_shapes("1b") == [
        (2048, 2048, 512, 0.03, False),
        (2048, 2048, 512, 0.03, True),
        (5472, 2048, 512, 0.03, False),
        (2048, 5472, 512, 0.03, True),
    ]
    for case in ((2048, 2048), (5472, 2048)):
        support = candidates.plan(candidates.Case(*case, 512, 0.03, 1, "float32", "cpu"), "block")
        assert support.tiles.block > 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_reference_formula_computes_what_ours_does(benchmarks, dtype):
    from reference import reference_linear

    support = Support.plan("uniform", (48, 32), 0.1)
    offsets = support.offsets(3, "layer", 0, support.k)
    shapes = [(2, 7, 32), (48, 5), (5, 32), (support.k,)]
    x, b, a, v = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    y = sltrain_linear(x, (b, a), v, offsets, None, None, 0.5, support.tiles)
    dy = torch.randn_like(y)
    theirs = reference_linear(x, b, a, 0.5, v, offsets.long())
    wide = dtype == torch.bfloat16
    tolerance = {"rtol": 0.05, "atol": 0.1} if wide else {}
    torch.testing.assert_close(theirs, y, **tolerance)
    found = torch.autograd.grad(theirs, [x, b, a, v], dy)
    torch.testing.assert_close(found, torch.autograd.grad(y, [x, b, a, v], dy), **tolerance)


def test_transient_memory_counts_what_is_neither_input_nor_result(benchmarks):
    from measure import transient_bytes

    x = torch.randn(1000, 64)

    def call():
        wide = torch.cat([x, x])  # 512,000 bytes
        part = wide * 2  # as many again, while ``wide`` lives
        del wide
        return [part[:10].clone(), x]

    assert 0 <= transient_bytes(call, "cpu") - 2 * 512_000 < 64  # the factor 2 is a tensor too


def test_step(tmp_path):
    out = tmp_path / "step.json"
    _, content = run("step.py", "--quick", "--device", "cpu", "--dtype", "float32", out=out)
    check_about(content["about"])
    assert out.with_suffix(".png").read_bytes()[:4] == PNG
    rows = {row["method"]: row for row in content["rows"]}
    assert list(rows) == ["full", "reference", "ours"]
    for row in rows.values():
        assert row["tokens_per_second"] > 0
        assert row["paired"]
        assert is_spread(row["faster_than_full"])
        assert row["peak_bytes"] > row["bytes_before"] > 0
        assert set(row["shares"]) == {
            "linears",
            "head and loss",
            "attention",
            "optimizer",
            "rest",
        }
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert min(row["shares"].values()) > 0
    assert rows["full"]["parameters"] > rows["ours"]["parameters"]
    assert re.search("composed|factorized", rows["ours"]["paths"])
    assert not rows["reference"]["paths"]


def test_support(tmp_path):
    out = tmp_path / "support.json"
    text, content = run("support.py", "--quick", "--device", "cpu", out=out)
    check_about(content["about"])
    assert [row["support"] for row in content["rows"]] == ["fan_in", "uniform", "block"]
    assert all(is_spread(row["generate_seconds"]) for row in content["rows"])
    assert "one thread" in text


def test_data(tmp_path):
    out = tmp_path / "data.json"
    _, content = run("data.py", "--quick", "--device", "cpu", out=out)
    assert [row["workers"] for row in content["rows"]] == [0, 1]
    for row in content["rows"]:
        assert row["delivered_tokens_per_second"] > 0
        assert 0 <= row["wait_share"] < 1
        assert row["wait_ms"][0] <= row["step_ms"]


def test_gpu_suite(tmp_path):
    out = tmp_path / "suite.json"
    sections = (
        "correctness",
        "activations",
        "per_layer",
        "linear",
    )  # steps have their own test, the build its own below
    text, content = run("gpu_suite.py", "--device", "cpu", "--tiny", "--only", *sections, out=out)
    check_about(content["about"])
    assert tuple(content["sections"]) == sections
    assert all(section["passed"] for section in content["sections"].values())
    checked = content["sections"]["correctness"]["rows"]
    assert {row["support"] for row in checked} == {"fan_in", "uniform", "block", "block transposed"}
    assert {row["operator"] for row in checked} >= {
        "composed",
        "factorized",
        "add_support",
        "sparse",
    }
    assert content["sections"]["linear"]["rows"]
    ways = content["sections"]["activations"]["rows"]
    assert len(ways) == 5
    assert all(row["error"] == 0 for row in ways)  # on a CPU nothing is out of order
    inside = content["sections"]["per_layer"]["rows"]
    assert len(inside) == 4
    assert all(row["inside"] <= 1e-6 and row["loss"][1] < row["loss"][0] for row in inside)
    assert text.endswith("all sections passed\n")


@pytest.mark.slow
def test_gpu_suite_whole(tmp_path):
    """The training steps too, and the build unless there are kernels already."""
    out = tmp_path / "suite.json"
    _, content = run("gpu_suite.py", "--device", "cpu", "--tiny", out=out)
    assert all(section["passed"] for section in content["sections"].values())
    assert content["about"]["kernels"] == ["cpu"]


def test_a_failed_section_is_recorded_and_the_others_run(benchmarks, tmp_path, monkeypatch):
    import gpu_suite

    table = {
        "correctness": ["linear.py", "--shapes", "nonsense"],
        "linear": ["parameters.py", "--help"],
    }
    monkeypatch.setattr(gpu_suite, "commands", lambda _: table)
    out = tmp_path / "suite.json"
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--device", "cpu", "--out", str(out)])
    assert gpu_suite.main() == 1
    sections = json.loads(out.read_text())["sections"]
    assert not sections["correctness"]["passed"]
    assert "--shapes nonsense: must be" in sections["correctness"]["log"]
    assert sections["linear"]["passed"]


def test_parameters():
    text, _ = run("parameters.py")
    assert "43.5M" in text
    assert "3144.7M" in text
