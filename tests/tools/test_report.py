"""The report's data: nothing lost in thinning, nothing needed that older runs lack, nothing a run wrote taken for markup."""

import itertools
import json
import math
import os
import re
import subprocess
import sys

import pytest

from launcher.report import main
from sltrain_dist.tools.report import embedded, make_report
from sltrain_dist.tools.report_life import smooth
from sltrain_dist.tools.report_read import clean, number, read_run
from sltrain_dist.tools.report_shape import BUCKETS, POINTS, shape_run, thin
from tests.launcher.tiny import REPOSITORY
from tests.tools import invented
from tests.tools.invented import START, write_lines


def data(text):
    """What a page carries."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])  # fmt: skip


def shape(folder, now=START + 1e6):
    return shape_run(read_run(folder), now)


@pytest.fixture
def bare(tmp_path):
    """A run of an earlier version: six updates, one evaluation, none of the newer fields and files."""
    folder = tmp_path / "old"
    folder.mkdir()
    lines = [
        {"step": i, "loss": 7.0 - i, "lr": 0.1, "grad_norm": None, "tokens_seen": 100 * i, "tokens_per_second": 50.0}
        for i in range(1, 7)
    ]  # fmt: skip
    write_lines(folder / "metrics.jsonl", [*lines, {"step": 6, "eval_loss": 1.5, "eval_perplexity": math.exp(1.5)}])  # fmt: skip
    (folder / "config.json").write_text(json.dumps(invented.CONFIG | {"name": "old"}))
    return folder


def test_thinning_keeps_extremes_and_ends():
    values = [math.sin(i / 1000) for i in range(100_000)]
    values[31_234], values[77_777], values[50] = 99.0, -99.0, None
    kept = thin(values, POINTS)
    assert len(kept) <= POINTS
    assert kept == sorted(set(kept))
    assert {0, 31_234, 77_777, 99_999} <= set(kept)
    assert 50 not in kept


def test_thinning_of_little():
    assert thin([], POINTS) == []
    assert thin([None, None], POINTS) == []
    assert thin([1.0], POINTS) == [0]
    assert thin([None, 2.0, 1.0], POINTS) == [1, 2]
    assert thin([5.0] * 1000 + [6.0] * 1000, POINTS) == [0, 999, 1000, 1999], "flat stretches"


def test_means():
    assert smooth([], 10) == []
    assert smooth([1.0, 2.0, 6.0, 2.0, 4.0], 2) == [1.0, 3.0, 10 / 3, 4.0, 3.0]
    assert smooth([None, 4.0, None, 8.0], 2) == [None, 4.0, None, 8.0]


def test_curves(tmp_path):
    run = shape(invented.run(tmp_path / "a", 5000))
    losses = invented_losses(tmp_path / "a")
    shown = run["curves"]["loss"]
    steps = [run["rows"]["step"][row] for row in shown["rows"]]
    assert (steps[0], steps[-1]) == (1, 5000)
    assert min(shown["values"]) == pytest.approx(min(losses.values()), rel=1e-4)
    assert max(shown["values"]) == pytest.approx(max(losses.values()), rel=1e-4)
    for step, value in zip(steps, shown["values"], strict=True):
        assert value == pytest.approx(losses[step], rel=1e-4)
    assert all(a <= b for axis in run["rows"].values() for a, b in itertools.pairwise(axis))
    assert run["evaluations"]["step"] == list(range(500, 5001, 500))
    assert len(run["evaluations"]["wall"]) == 10


def invented_losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_wall_time_holds_interruptions_and_trained_time_does_not(tmp_path):
    run = shape(invented.run(tmp_path / "a", 900))
    wall, trained = run["rows"]["wall"][-1], run["rows"]["trained"][-1]
    assert wall - trained == pytest.approx(2 * 90, abs=1)
    ends = [how for _, _, how in run["events"]["sessions"]]
    assert ends == ["interrupted", "killed", "finished"]
    gap = run["events"]["sessions"][1][0] - run["events"]["sessions"][0][1]
    assert gap == pytest.approx(90, abs=1)


def test_timing(tmp_path):
    timing = shape(invented.run(tmp_path / "a", 1000))["timing"]
    assert len(timing["rows"]) == BUCKETS
    assert timing["mean"]["data"] == pytest.approx(0.02)
    assert timing["mean"]["communication"] == pytest.approx(0.05), "over the sampled updates alone"
    assert timing["mean"]["save"] == pytest.approx(4.0 / 1000), "over all updates"


def test_events(tmp_path):
    run = shape(invented.run(tmp_path / "a", 1000))
    assert run["events"]["counts"]["start"] == 3
    texts = {event["kind"]: event["text"] for event in run["events"]["shown"]}
    assert texts["start"] == "8 ranks, tensor parallel 2, fsdp, on node1, node2, restart 2, continued from step_666, job 4711"  # fmt: skip
    assert texts["interrupted"] == "SIGUSR1"
    assert "No space left" in texts["save_failed"]
    assert run["figures"]["restarts"] == 2


def test_very_many_events_leave_the_rare_ones(tmp_path):
    folder = invented.run(tmp_path / "a", 10)
    write_lines(folder / "events.jsonl", [
        *({"time": START + i, "event": "skipped", "step": i, "reason": "loss"} for i in range(3000)),
        {"time": START + 5000, "event": "rewind", "step": 9, "to": 4, "reason": "20 in a row"},
    ])  # fmt: skip
    events = shape(folder)["events"]
    assert len(events["shown"]) == 400
    assert events["counts"] == {"skipped": 3000, "rewind": 1}
    assert events["shown"][-1]["kind"] == "rewind"
    assert "back to update 4" in events["shown"][-1]["text"]


def test_old_run(bare):
    run = shape(bare)
    assert run["rows"]["wall"] == [None] * len(run["rows"]["step"])
    assert run["rows"]["trained"][-1] == pytest.approx(12.0), "600 tokens at 50 a second"
    assert run["timing"] == {"rows": [], "parts": {}, "mean": {}}
    assert run["events"] == {"counts": {}, "shown": [], "sessions": []}
    assert "grad_norm" not in run["curves"]
    assert run["life"]["state"] == "no end recorded"
    assert run["figures"]["perplexity"] == pytest.approx(math.exp(1.5))
    assert run["figures"]["restarts"] is None


def test_run_that_goes_on(bare):
    heartbeat = {"time": START, "state": "training", "alarms": ["disk full", 7], "eta_seconds": 90, "total_steps": 50}  # fmt: skip
    (bare / "heartbeat.json").write_text(json.dumps(heartbeat))
    life = shape(bare, now=START + 20)["life"]
    assert (life["state"], life["age"], life["silent"], life["eta"]) == ("training", 20, False, 90)
    assert life["alarms"] == ["disk full", "7"]
    assert shape(bare, now=START + 3600)["life"]["silent"]
    assert shape(bare)["figures"]["total_steps"] == 50


def test_summary_of_an_earlier_end_is_not_the_outcome(bare):
    (bare / "summary.json").write_text(json.dumps({"step": 3, "final_eval_perplexity": 1e9}))
    assert shape(bare)["figures"]["perplexity"] == pytest.approx(math.exp(1.5))


def test_torn_and_bad_lines(bare):
    with open(bare / "metrics.jsonl", "a") as file:
        file.write('not json\n[1, 2]\n{"loss": 3}\n{"step": 7, "loss": 0.5}\n{"step": 8, "lo')
    run = shape(bare)
    assert run["unread"] == {"metrics.jsonl": 3}
    assert run["figures"]["step"] == 7
    (bare / "events.jsonl").write_text('{"event": "start"}\n{"time": 1, "event": "start", "step": 0}\n{"ti')  # fmt: skip
    (bare / "heartbeat.json").write_text('{"state"')
    unread = shape(bare)["unread"]
    assert unread == {"metrics.jsonl": 3, "events.jsonl": 1, "heartbeat.json": 1}


def test_values_that_are_no_numbers(bare):
    wild = '{"step": 7, "loss": NaN, "lr": "fast", "grad_norm": [1], "tokens_seen": true, "peak_memory_bytes": 1' + "0" * 400 + '}\n{"step": 1e999}\n'  # fmt: skip
    with open(bare / "metrics.jsonl", "a") as file:
        file.write(wild + "[" * 100_000 + "\n")
    run = shape(bare)
    assert run["figures"]["step"] == 7
    assert run["unread"] == {"metrics.jsonl": 2}
    embedded(run)
    assert [number(value) for value in (True, "1", None, math.inf, 10**400, 3)] == [None] * 5 + [3.0]  # fmt: skip


def test_no_updates_yet(bare):
    (bare / "metrics.jsonl").write_text("")
    run = shape(bare)
    assert run["rows"] == {"step": [], "tokens": [], "wall": [], "trained": []}
    embedded(run)


HOSTILE = "</script><script>alert(1)</script><!--\u2028\u2029{{script}}\u202e\x00\ud800&'\""


def test_hostile_texts(bare):
    config = json.loads((bare / "config.json").read_text()) | {"name": HOSTILE, "tags": [HOSTILE], HOSTILE: 1, "command": [HOSTILE]}  # fmt: skip
    (bare / "config.json").write_text(json.dumps(config))
    write_lines(bare / "events.jsonl", [{"time": START, "event": HOSTILE, "step": 1, "reason": HOSTILE, HOSTILE: {}}])  # fmt: skip
    text, _ = make_report([str(bare)])
    text.encode()
    assert text.count("<script") == text.count("</script") == 2
    assert "alert(1)</" not in text
    assert not set(text) & set("\u2028\u2029\u202e\x00")
    run = data(text)["runs"][0]
    assert run["name"].startswith("</script><script>alert(1)"), "shown as it is, as text"
    assert "{{script}}" in run["name"]
    assert clean("a\tb\n" + "x" * 5000).startswith("a b xxx")
    assert len(clean("x" * 5000)) == 2000


def test_page_is_self_contained(bare):
    text, _ = make_report([str(bare)])
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\((?!#)|@import|https?://(?!www\.w3\.org/2000/svg)""", text)  # fmt: skip
    assert "default-src 'none'" in text


def test_equal_names(tmp_path):
    for place in ("x/run", "y/run", "x/other"):
        invented.run(tmp_path / place, 20)
    folders = [str(tmp_path / place) for place in ("x/run", "y/run", "x/other")]
    names = [run["name"] for run in data(make_report([*folders, folders[0]])[0])["runs"]]
    assert names == ["run (x/run)", "run (y/run)", "other"]


def test_small_page_of_a_long_run(tmp_path):
    """100,000 updates: the page does not grow with the run."""
    text, _ = make_report([str(invented.run(tmp_path / "long", 100_000))])
    run = data(text)["runs"][0]
    assert max(len(curve["rows"]) for curve in run["curves"].values()) <= POINTS
    assert len(text) < 700_000


def refused(capsys, line, *parts):
    assert main([str(word) for word in line]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("error: ")
    for part in parts:
        assert part in error[0]


def test_bad_input(capsys, tmp_path, bare, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, [], "RUN")
    refused(capsys, ["/no/such"], "/no/such", "no such folder")
    refused(capsys, ["x" * 5000], "RUN")
    refused(capsys, [bare / "config.json"], "is no folder")
    refused(capsys, [tmp_path], "config.json", f"did you mean {bare}")
    (tmp_path / "empty").mkdir()
    refused(capsys, [tmp_path / "empty"], "config.json")
    (tmp_path / "empty" / "config.json").write_text("[]")
    refused(capsys, [tmp_path / "empty"], "metrics.jsonl")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    refused(capsys, [tmp_path / "empty"], "config.json")
    (tmp_path / "empty" / "config.json").write_text('{"a')
    refused(capsys, [tmp_path / "empty"], "config.json")
    assert not list(tmp_path.glob("*.html"))


def test_bad_output(capsys, tmp_path, bare):
    (tmp_path / "folder.html").mkdir()
    refused(capsys, ["/no/such", "--output", tmp_path / "folder.html"], "--output", "is a folder")
    refused(capsys, [bare, "--output", bare / "metrics.jsonl"], "--output", ".html")
    refused(capsys, [bare, "--output", tmp_path / "none" / "r.html"], "--output", "no folder")
    refused(capsys, [bare, "--output", "/proc/r.html"], "--output", "cannot be written")
    assert main([str(bare), "--output", str(tmp_path / "r.html")]) == 0
    first = (tmp_path / "r.html").read_text()
    assert main([str(bare), "--output", str(tmp_path / "r.html")]) == 0
    assert first[:200] == (tmp_path / "r.html").read_text()[:200]
    assert sorted(path.name for path in tmp_path.glob("*html*")) == ["folder.html", "r.html"]


def test_says_what_it_left_out(capsys, tmp_path, bare):
    with open(bare / "metrics.jsonl", "a") as file:
        file.write("junk\n")
    assert main([str(bare), "--output", str(tmp_path / "r.html")]) == 0
    captured = capsys.readouterr()
    assert "metrics.jsonl: 1 line could not be read" in captured.err
    assert "r.html" in captured.out


def test_needs_no_torch(tmp_path, bare):
    """A login node with Python alone makes reports."""
    code = f"import sys; sys.modules['torch'] = None; from launcher.report import main; sys.exit(main([{str(bare)!r}, '--output', {str(tmp_path / 'r.html')!r}]))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
