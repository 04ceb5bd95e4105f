"""launcher/report.py on what the trainer itself writes: every field that the page looks for is there under its name."""

from launcher.report import main
from tests.tools.test_report import data


def test_report_of_a_real_run(trained, tmp_path, capsys):
    target = tmp_path / "report.html"
    assert main([str(trained), "--output", str(target)]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    assert str(target) in captured.out
    run = data(target.read_text(encoding="utf-8"))["runs"][0]
    assert run["unread"] == {}
    assert {"loss", "loss_mean", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "goodput"} <= set(run["curves"])  # fmt: skip
    assert {"data", "forward", "backward", "optimizer", "all"} <= set(run["timing"]["mean"])
    assert all(None not in run["rows"][axis] for axis in ("step", "tokens", "wall", "trained"))
    assert {"start", "finished"} <= set(run["events"]["counts"])
    assert [how for _, _, how in run["events"]["sessions"]] == ["finished"]
    assert run["life"]["state"] == "finished"
    figures = run["figures"]
    assert (figures["step"], figures["total_steps"], figures["restarts"]) == (6, 6, 0)
    assert None not in [figures[name] for name in ("perplexity", "tokens", "parameters", "rate", "memory", "wall", "trained", "goodput")]  # fmt: skip
