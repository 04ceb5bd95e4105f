"""The report in a real browser: what is drawn, what the read-out says, no fault, no request, no sideways scrolling."""

import json

import pytest

from sltrain_dist.tools.report import make_report
from tests.tools import browser, invented
from tests.tools.test_report import HOSTILE, bare, data  # noqa: F401

WIDTHS = (390, 768, 1210, 1280)
# Contrast of every text with the nearest ground behind it, as WCAG 2 counts it; yields those below 4.5.
FAINT = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => { for (; node; node = node.parentElement) { const c = parse(getComputedStyle(node).backgroundColor); if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.getClientRects().length || node.closest("script,noscript,.hidden,.bar,:disabled,:disabled + span")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [parse(node.closest("svg") ? style.fill : style.color), ground(node)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${walk.currentNode.data.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Three runs: interrupted, undisturbed, and one that goes on with an alarm."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        invented.run(folder / "first", 2500, 1),
        invented.run(folder / "second", 1500, 2, accidents=False, name="second", tags=["b"]),
        invented.run(folder / "third", 600, 3),
    ]
    heartbeat = json.loads((runs[2] / "heartbeat.json").read_text())
    heartbeat |= {"state": "training", "alarms": ["disk nearly full"], "total_steps": 900}
    (runs[2] / "heartbeat.json").write_text(json.dumps(heartbeat))
    return write(folder / "report.html", *runs)


def write(target, *runs):
    target.write_text(make_report([str(run) for run in runs])[0], encoding="utf-8")
    return target


def quiet(chromium, page):
    """No fault on the console, nothing asked of anybody but the file itself."""
    assert chromium.faults == []
    assert [address.partition("#")[0] for address in chromium.requests] == [page.as_uri()]


def texts(chromium, selector):
    return chromium.ask(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.innerText)")  # fmt: skip


def count(chromium, selector):
    return chromium.ask(f"document.querySelectorAll({json.dumps(selector)}).length")


def centre(chromium, selector, part=0.5):
    """A point of an element, scrolled into view."""
    return chromium.ask(f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.scrollIntoView({{block: 'center'}}); const box = one.getBoundingClientRect(); return [box.x + {part} * box.width, box.y + box.height / 2]; }})()")  # fmt: skip


def click(chromium, selector):
    x, y = centre(chromium, selector)
    for kind in ("Pressed", "Released"):
        chromium.mouse(kind, x, y, button="left", clickCount=1)


def test_charts(chromium, page):
    chromium.open(page, 1280)
    quiet(chromium, page)
    for chart in ("loss", "tokens_per_second", "grad_norm", "mfu"):
        assert count(chromium, f"#chart-{chart} path.thin") == 3, chart
        assert count(chromium, f"#chart-{chart} path.thick") == 3, chart
    for chart in ("perplexity", "lr", "peak_memory_bytes", "goodput"):
        assert count(chromium, f"#chart-{chart} path.thick") == 3, chart
    assert count(chromium, "#chart-loss path.mark") == 5 + 3 + 1, "an evaluation every 500 updates"
    assert count(chromium, "#areas path.area") == 3 * 6
    assert count(chromium, "#events path.event") == sum(
        len(run["events"]["shown"]) for run in data(page.read_text())["runs"]
    )
    assert len(texts(chromium, "#figures tbody tr")) == 3
    assert any("disk nearly full" in text for text in texts(chromium, ".alarm"))
    assert "tags" in texts(chromium, "#configuration table")[0], "what differs comes first"


def test_read_out(chromium, page):
    """At a place named in the address: the values of all runs there, and none of a run that ended before."""
    chromium.open(page, 1280, address="#x=step&at=1000")
    quiet(chromium, page)
    shown = texts(chromium, "#chart-loss .entry b")
    for text, run in zip(shown[:2], data(page.read_text())["runs"], strict=False):
        steps = run["rows"]["step"]
        curve = run["curves"]["loss"]
        nearest = min(range(len(curve["rows"])), key=lambda i: abs(steps[curve["rows"][i]] - 1000))
        assert float(text) == pytest.approx(curve["values"][nearest], rel=1e-3)
    assert shown[2] == "\u2013", "600 updates"
    assert "at update 1,000" in texts(chromium, "#at")
    assert "held out" in texts(chromium, "#chart-loss .entry small")[0]


def test_pointer(chromium, page):
    chromium.open(page, 1280)
    before = texts(chromium, "#chart-loss .entry b")
    x, y = centre(chromium, "#chart-loss .frame", 0.3)
    chromium.mouse("Moved", x, y)
    chromium.ask("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert texts(chromium, "#chart-loss .entry b") != before
    assert count(chromium, "path.cross[d^=M]") == count(chromium, "path.cross"), "in every chart"
    chromium.mouse("Pressed", x, y, button="left", clickCount=1)
    chromium.mouse("Moved", x + 80, y, button="left", buttons=1)
    chromium.mouse("Released", x + 80, y, button="left", clickCount=1)
    assert "range=" in chromium.ask("location.hash")
    assert not chromium.ask("document.getElementById('whole').hidden")
    click(chromium, "#whole")
    assert "range=" not in chromium.ask("location.hash")
    quiet(chromium, page)


def test_keys(chromium, page):
    chromium.open(page, 1280)
    chromium.ask("document.querySelector('#chart-loss .frame').focus()")
    for key in ("End", "ArrowLeft", "ArrowLeft"):
        chromium.press(key)
    assert texts(chromium, "#at") == ["at update 2,450"], "two hundredths of 2,500 before the end"
    assert "update 2,450" in chromium.ask("document.getElementById('spoken').textContent")
    chromium.press("+")
    assert "range=" in chromium.ask("location.hash")
    chromium.press("0")
    assert "range=" not in chromium.ask("location.hash")
    quiet(chromium, page)


def test_choices(chromium, page):
    chromium.open(page, 1280)
    click(chromium, ".toggles button:nth-child(2)")
    assert count(chromium, "#chart-loss path.thick") == 2
    assert count(chromium, "#bars .bar") == 2
    for axis in ("tokens", "wall", "trained"):
        click(chromium, f"fieldset label:has(input[value={axis}])")
        assert f"x={axis}" in chromium.ask("location.hash")
        assert count(chromium, "#chart-loss path.thick") == 2
    line = "document.querySelector('#chart-loss path.thick').getAttribute('d')"
    before = chromium.ask(line)
    click(chromium, "#chart-loss figcaption button")
    assert chromium.ask(line) != before
    assert (
        chromium.ask("document.querySelector('#chart-loss figcaption button').ariaPressed")
        == "false"
    )
    quiet(chromium, page)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_fits_and_reads(chromium, page, width, dark):
    chromium.open(page, width, dark)
    chromium.ask("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert chromium.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0  # fmt: skip
    assert chromium.ask(FAINT) == []
    quiet(chromium, page)


def test_names_for_all_that_can_be_used(chromium, page):
    chromium.open(page, 390)
    nameless = "[...document.querySelectorAll('button, input, [tabindex], [role=img]')].filter((one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.[0]?.textContent.trim())).length"
    assert chromium.ask(nameless) == 0


def test_prints(chromium, page):
    chromium.open(page, 1280, dark=True)
    assert chromium.printed().startswith(b"%PDF")
    quiet(chromium, page)


def test_hostile_names_and_old_runs(chromium, tmp_path, bare):  # noqa: F811
    """Nothing runs, everything is shown as text, and an endless word does not widen the page."""
    hostile = invented.run(tmp_path / "hostile", 50, name=HOSTILE + "W" * 200, tags=["x" * 3000], **{HOSTILE: "<img src=x onerror=alert(1)>"})  # fmt: skip
    (hostile / "events.jsonl").write_text(json.dumps({"time": invented.START, "event": "constructor", "step": 1, "reason": HOSTILE}) + "\n")  # fmt: skip
    page = write(tmp_path / "report.html", hostile, bare)
    for width in (390, 1280):
        chromium.open(page, width)
        chromium.ask("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert chromium.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0  # fmt: skip
        quiet(chromium, page)
    assert count(chromium, "img") == 0
    assert "</script><script>alert(1)" in texts(chromium, "#figures")[0]
    assert chromium.ask("document.title").startswith("</script>")


def test_old_run_alone(chromium, tmp_path, bare):  # noqa: F811
    chromium.open(write(tmp_path / "report.html", bare), 390)
    quiet(chromium, tmp_path / "report.html")
    assert texts(chromium, "#title") == ["old"]
    assert chromium.ask("document.querySelector('input[value=wall]').disabled")
    assert count(chromium, "#chart-loss path.thick") == 1
    assert count(chromium, "#chart-grad_norm") == 0
    assert texts(chromium, "#timing .note, #events .note") == ["Not recorded by these runs."] * 2


def test_no_updates_yet(chromium, tmp_path, bare):  # noqa: F811
    (bare / "metrics.jsonl").write_text("")
    page = write(tmp_path / "report.html", bare)
    chromium.open(page, 390)
    quiet(chromium, page)
    assert any("no updates yet" in text for text in texts(chromium, ".alarm"))


def test_last_evaluation_follows_the_last_update(chromium, tmp_path, bare):  # noqa: F811
    """By wall time it stands behind the curve's end; at the end of a run it is the one to be shown."""
    lines = [{"step": i, "loss": 2.0, "time": invented.START + i, "seconds": 1.0} for i in (1, 2)]
    evaluations = [{"step": i, "eval_loss": loss, "time": invented.START + i + 0.5} for i, loss in ((1, 3.0), (2, 1.25))]  # fmt: skip
    invented.write_lines(bare / "metrics.jsonl", lines + evaluations)
    chromium.open(write(tmp_path / "report.html", bare), 1280, address="#x=wall")
    assert "held out 1.250" in texts(chromium, "#chart-loss .entry small")[0]
