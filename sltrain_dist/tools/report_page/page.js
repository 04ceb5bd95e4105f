/* The page: what is chosen (axis, range, runs, place), kept in the address after #, and everything drawn from it. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs.map((run, number) => ({ ...run, number }));
const place = (id) => document.getElementById(id);
const GIB = 2 ** 30;
const CHARTS = [
  { id: "loss", title: "Loss", unit: "nats a token", evaluations: "loss", format: steady },
  { id: "perplexity", title: "Perplexity", unit: "exp of the mean loss", curve: "loss_mean", map: Math.exp, evaluations: "perplexity", format: steady },
  { id: "tokens_per_second", title: "Throughput", unit: "tokens a second", zero: true, format: counted },
  { id: "peak_memory_bytes", title: "Peak memory", unit: "GiB, of the rank with most", zero: true, map: (value) => value / GIB, format: (value) => (known(value) ? value.toFixed(3) : "–") },
  { id: "lr", title: "Learning rate", unit: "", zero: true, format: plain },
  { id: "grad_norm", title: "Gradient norm", unit: "before clipping", format: steady },
  { id: "goodput", title: "Goodput", unit: "share of wall time that trained", zero: true, format: share },
  { id: "mfu", title: "MFU", unit: "model FLOPs utilisation", zero: true, format: share },
];
const SCALES = ["loss", "perplexity", "grad_norm"]; // that a log scale suits
const state = { axis: "step", log: new Set(["loss", "perplexity", "grad_norm"]), hidden: new Set(), at: null, range: null, saves: false };
const frames = new Map();
const readouts = new Map();

const visible = () => RUNS.filter((run) => !state.hidden.has(run.number));
const hasAxis = (axis) => RUNS.some((run) => run.rows[axis].some(known));

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (Object.hasOwn(AXES, given.get("x")) && hasAxis(given.get("x"))) state.axis = given.get("x");
  if (given.has("log")) state.log = new Set(given.get("log").split(",").filter((id) => SCALES.includes(id)));
  if (given.has("hide")) state.hidden = new Set(given.get("hide").split(",").map(Number).filter((number) => number < RUNS.length));
  const numbers = (text) => (text || "").split(",").map(parseFloat);
  if (isFinite(numbers(given.get("at"))[0])) state.at = numbers(given.get("at"))[0];
  const [from, to] = numbers(given.get("range"));
  if (to > from) state.range = [from, to];
}

function writeAddress() {
  const text = new URLSearchParams({ x: state.axis, log: [...state.log].join(","), ...(state.hidden.size ? { hide: [...state.hidden].join(",") } : {}), ...(state.range ? { range: state.range.join(",") } : {}) });
  try { history.replaceState(null, "", `#${text}`); } catch { /* some browsers forbid it to local files */ }
}

function domain() {
  if (state.range) return state.range;
  let high = 0;
  for (const run of visible()) {
    for (const value of run.rows[state.axis]) if (value > high) high = value;
    if (state.axis === "wall") for (const [, to] of run.events.sessions) if (to > high) high = to;
  }
  return [0, high || 1];
}

/* ---- what the frames ask for */

const act = {
  look(at) { state.at = at; requestAnimationFrame(showPlace); },
  zoom(range) { state.range = range; redraw(); },
  key(name) {
    const [low, high] = domain();
    const at = known(state.at) ? state.at : high;
    const stride = state.axis === "step" ? Math.max(1, Math.round((high - low) / 100)) : (high - low) / 100;
    const middle = (part) => { const half = ((high - low) * part) / 2, from = Math.max(0, at - half); return [from, from + 2 * half]; };
    const moves = { ArrowRight: at + stride, ArrowLeft: at - stride, Home: low, End: high };
    if (name in moves) {
      state.at = Math.min(high, Math.max(low, moves[name]));
      showPlace();
      place("spoken").textContent = `${AXES[state.axis].one} ${AXES[state.axis].format(state.at)}: ` + (document.activeElement.closest(".chart") || document.body).querySelector(".readout")?.innerText.replace(/\s+/g, " ");
    } else if (name === "+") act.zoom(middle(0.5));
    else if (name === "-") { const wide = middle(2); state.range = null; const [, end] = domain(); act.zoom(wide[1] - wide[0] >= end ? null : wide); }
    else if (name === "0") act.zoom(null);
    else if (name === "Escape") act.look(null);
    else return false;
    return true;
  },
};

/* ---- curves */

function linesOf(chart, run) {
  const thick = run.curves[chart.curve || `${chart.id}_mean`];
  const thin = chart.curve ? null : run.curves[chart.id];
  return {
    thin: points(run, thin, state.axis, chart.map),
    thick: points(run, thick, state.axis, chart.map),
    marks: chart.evaluations ? marks(run, chart.evaluations, state.axis) : [],
  };
}

function drawChart(chart) {
  const frame = frames.get(chart.id);
  const log = state.log.has(chart.id);
  chart.lines = visible().map((run) => ({ run, ...linesOf(chart, run) }));
  const range = extent(chart.lines.flatMap(({ thin, thick, marks: some }) => [thin, thick, some]), domain(), log, chart.zero && !log);
  if (!range) { frame.svg.replaceChildren(); frame.cross = null; return; }
  const { x, y, inside } = frame.begin(domain(), range, log, state.axis, chart.format === share ? percent : plain);
  const fits = (line) => (log ? line.filter(([, value]) => value > 0) : line);
  const draw = (run, line, kind) => line.length && inside.append(element("svg:path", { class: kind, opacity: kind === "thin" ? (line.length > 500 ? 0.22 : 0.4) : null, d: path(fits(line), x, y), style: `color:${colourOf(run.number)}`, "stroke-dasharray": kind === "thin" ? null : dashOf(run.number) }));
  for (const { run, thin, thick } of chart.lines) if (thick.length) draw(run, thin, "thin");
  for (const { run, thin, thick } of chart.lines) draw(run, thick.length ? thick : thin, "thick");
  for (const { run, marks: some } of chart.lines) for (const [a, b] of some) if (a >= frame.domain[0] && a <= frame.domain[1]) inside.append(
    element("svg:path", { class: "mark", d: MARKS[run.number % 4], transform: `translate(${x(a).toFixed(1)},${y(b).toFixed(1)})`, style: `color:${colourOf(run.number)}` }));
}

/* Numbers of one run of one chart: at the cross-hair, else at its end. */
function numbers(chart, { run, thin, thick, marks: some }) {
  const main = thin.length ? thin : thick;
  const end = main.length ? main[main.length - 1][0] : some.length ? some[some.length - 1][0] : 0;
  const at = known(state.at) ? state.at : end;
  const beyond = at > end * (1 + 1e-9);
  const mean = between(thick, at), each = nearest(thin, at), last = known(state.at) ? placeAt(some, at) : some.length - 1; // the last one may follow the last update
  const small = [];
  if (thin.length && thick.length) small.push(`mean ${chart.format(mean)}`);
  if (some.length) small.push(`held out ${chart.format(last < 0 || beyond ? null : some[last][1])}`);
  return [chart.format(beyond ? null : thin.length ? each : mean), small.join(" · ")];
}

function showPlace() {
  for (const frame of frames.values()) frame.point(state.at);
  for (const chart of CHARTS) {
    const rows = readouts.get(chart.id);
    for (const line of rows ? chart.lines : []) {
      const [value, small] = numbers(chart, line);
      const row = rows.get(line.run.number);
      row.value.textContent = value;
      row.small.textContent = small;
    }
  }
  const at = state.axis === "step" && known(state.at) ? Math.round(state.at) : state.at;
  place("at").textContent = known(at) ? `at ${AXES[state.axis].one} ${AXES[state.axis].format(at)}` : "at the end of each run";
}

function frameOf(id, holder, height, label) {
  const frame = new Frame(holder, height, label, act);
  frames.set(id, frame);
  return frame;
}

const tall = () => (innerWidth < 600 ? 220 : 270);

function layCharts() {
  for (const chart of CHARTS.filter(({ id, curve, evaluations }) => RUNS.some((run) => run.curves[curve || id] || (evaluations && run.evaluations.loss.length)))) {
    const holder = element("div", { class: "holder" });
    const scale = SCALES.includes(chart.id) ? element("button", { type: "button", "aria-pressed": state.log.has(chart.id), "aria-label": `log scale of ${chart.title}`, onclick: (event) => {
      if (!state.log.delete(chart.id)) state.log.add(chart.id);
      event.currentTarget.setAttribute("aria-pressed", state.log.has(chart.id));
      redraw();
    } }, "log") : null;
    place("charts").append(element("figure", { class: "chart", id: `chart-${chart.id}` },
      element("figcaption", {}, element("h2", {}, chart.title), element("span", { class: "unit" }, chart.unit), scale),
      element("div", { class: "readout" }), holder));
    frameOf(chart.id, holder, tall, `${chart.title} of ${RUNS.map((run) => run.name).join(", ")}`);
  }
}

/* A line a run under every title: name, value, mean, held out; filled by showPlace. */
function layReadouts() {
  for (const chart of CHARTS) {
    const holder = document.querySelector(`#chart-${chart.id} .readout`);
    if (!holder) continue;
    const rows = new Map();
    holder.replaceChildren(...visible().map((run) => {
      const value = element("b", {}), small = element("small", {});
      rows.set(run.number, { value, small });
      return element("div", { class: `entry${RUNS.length > 1 ? "" : " alone"}` }, RUNS.length > 1 ? nameOf(run) : null, value, small);
    }));
    readouts.set(chart.id, rows);
  }
}

/* ---- sections */

function layControls() {
  const choice = (axis) => element("label", {},
    element("input", { type: "radio", name: "axis", value: axis, checked: axis === state.axis, disabled: !hasAxis(axis), onchange: () => { state.axis = axis; state.range = null; state.at = null; redraw(); } }),
    element("span", { title: hasAxis(axis) ? null : "not recorded by these runs" }, AXES[axis].label));
  const toggle = (run) => element("button", { type: "button", class: "toggle", "aria-pressed": !state.hidden.has(run.number), onclick: (event) => {
    if (!state.hidden.delete(run.number)) state.hidden.add(run.number);
    event.currentTarget.setAttribute("aria-pressed", !state.hidden.has(run.number));
    redraw();
  } }, nameOf(run));
  place("controls").append(
    element("fieldset", {}, element("legend", { class: "hidden" }, "Horizontal axis"), ...Object.keys(AXES).map(choice)),
    RUNS.length > 1 ? element("div", { class: "toggles" }, ...RUNS.map(toggle)) : "",
    element("output", { id: "at" }),
    element("button", { type: "button", id: "whole", hidden: true, onclick: () => act.zoom(null) }, "Whole range"));
}

function layTiming() {
  const timed = RUNS.filter((run) => run.timing.rows.length);
  const holder = place("timing");
  if (!timed.length) { holder.append(element("p", { class: "note" }, "Not recorded by these runs.")); return; }
  holder.append(element("div", { id: "bars" }), element("div", { id: "areas" }));
  for (const run of timed) {
    const inside = element("div", { class: "holder" });
    place("areas").append(element("figure", { class: "chart", id: `areas-${run.number}` }, element("figcaption", {}, nameOf(run), element("span", { class: "unit" }, "seconds of an update")), inside));
    frameOf(`areas-${run.number}`, inside, () => 190, `Seconds of an update by part, ${run.name}`);
  }
}

function layEvents() {
  const holder = place("events");
  const told = RUNS.filter((run) => run.events.shown.length);
  if (!told.length) { holder.append(element("p", { class: "note" }, "Not recorded by these runs.")); return; }
  const lanes = element("div", { class: "holder" });
  const list = element("div", {});
  const fill = () => list.replaceChildren(...eventTable(told.filter((run) => visible().includes(run)), state.saves).filter(known));
  state.listEvents = fill;
  holder.append(element("figure", { class: "chart" }, eventLegend(told), lanes),
    element("details", { open: told.reduce((sum, run) => sum + run.events.shown.length, 0) <= 40 }, element("summary", {}, "List of events"),
      element("label", { class: "check" }, element("input", { type: "checkbox", onchange: (event) => { state.saves = event.target.checked; fill(); } }), " saved checkpoints too"), list));
  frameOf("lanes", lanes, () => MARGIN.top + MARGIN.bottom + LANE * Math.max(1, visible().filter((run) => told.includes(run)).length), "Events of every run along the axis");
}

function redraw() {
  layReadouts();
  for (const chart of CHARTS) if (frames.has(chart.id)) drawChart(chart);
  const timed = visible().filter((run) => run.timing.rows.length);
  if (place("bars")) place("bars").replaceChildren(...(timed.length ? timingBars(timed) : []));
  for (const run of RUNS) if (frames.has(`areas-${run.number}`)) {
    place(`areas-${run.number}`).hidden = state.hidden.has(run.number);
    if (!state.hidden.has(run.number)) drawAreas(frames.get(`areas-${run.number}`), run, state.axis, domain());
  }
  if (frames.has("lanes")) {
    drawLanes(frames.get("lanes"), visible().filter((run) => run.events.shown.length), state.axis, domain());
    state.listEvents();
  }
  place("whole").hidden = !state.range;
  showPlace();
  writeAddress();
}

function begin() {
  readAddress();
  place("title").textContent = RUNS.length <= 3 ? RUNS.map((run) => run.name).join(", ") : `${RUNS.length} runs`;
  place("written").textContent = `Training report, written ${moment(DATA.written)}`;
  place("alarms").append(...alarms(RUNS));
  place("figures").append(figureTable(RUNS));
  place("configuration").append(...configuration(RUNS));
  place("footer").append(
    element("p", { id: "keys" }, "Charts: move over them to read values, drag to enlarge, double-click to see all; with the keyboard: arrows, Home, End, + and - to enlarge, 0 for all, Escape."),
    element("p", {}, `Thin lines keep the smallest and largest value of every stretch of updates; thick lines are means over 3% of the run. Communication is sampled, runs partly beside computing, and is drawn as taken out of the parts it runs in. Trained time counts the updates that stand, wall time everything since the first start. sltrain_dist ${DATA.version}.`));
  layControls();
  layCharts();
  layTiming();
  layEvents();
  redraw();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
  addEventListener("hashchange", () => { readAddress(); redraw(); });
  addEventListener("beforeprint", () => { state.at = null; for (const one of document.querySelectorAll("details")) one.open = true; redraw(); });
}

begin();
