/* Figures, timing bars, events and configuration: everything that is no curve. Tables turn into cards on a narrow screen. */

const FIGURES = [
  ["state", "State", (run) => run.life.state],
  ["perplexity", "Held-out perplexity", (run) => plain(run.figures.perplexity)],
  ["loss", "Training loss", (run) => plain(run.figures.loss)],
  ["step", "Updates", (run) => counted(run.figures.step) + (run.figures.total_steps > run.figures.step ? ` of ${counted(run.figures.total_steps)}` : "")],
  ["tokens", "Tokens", (run) => counted(run.figures.tokens)],
  ["parameters", "Parameters trained", (run) => counted(run.figures.parameters)],
  ["rate", "Tokens/s", (run) => counted(run.figures.rate)],
  ["memory", "Peak memory", (run) => bytes(run.figures.memory)],
  ["wall", "Wall time", (run) => duration(run.figures.wall)],
  ["goodput", "Goodput", (run) => share(run.figures.goodput)],
  ["mfu", "MFU", (run) => share(run.figures.mfu)],
  ["restarts", "Restarts", (run) => plain(run.figures.restarts)],
];
const BEST = { perplexity: Math.min, loss: Math.min, rate: Math.max, memory: Math.min };

function nameOf(run) {
  return element("span", { class: "run" }, swatch(run.number), element("span", {}, run.name));
}

function badge(run) {
  const { state, silent, age, eta } = run.life;
  const tone = silent || state === "failed" ? "bad" : state === "interrupted" || state === "no end recorded" ? "warn" : "good";
  const ago = known(age) && state !== "finished" ? `${duration(age)} before this page` : "";
  const text = silent ? `${state}, silent for ${duration(age)}` : state;
  return element("span", {}, element("span", { class: `badge ${tone}` }, text),
    !silent && ago ? element("small", {}, ` heartbeat ${ago}`) : null,
    known(eta) && !silent ? element("small", {}, `, ${duration(eta)} left`) : null);
}

/* Rows of runs by columns of figures; the best of a column, where runs differ, is marked by weight and by a word. */
function figureTable(runs) {
  const shown = FIGURES.filter(([key, , text]) => key === "state" || runs.some((run) => text(run) !== "–"));
  const best = {};
  for (const key of Object.keys(BEST)) {
    const values = runs.map((run) => run.figures[key]).filter(known);
    if (values.length > 1 && Math.min(...values) !== Math.max(...values)) best[key] = BEST[key](...values);
  }
  const rows = runs.map((run) => element("tr", {},
    element("th", { scope: "row" }, nameOf(run), element("small", { class: "folder" }, run.folder)),
    ...shown.map(([key, label, text]) => {
      const top = key in best && run.figures[key] === best[key];
      return element("td", { "data-label": label, class: top ? "best" : null },
        key === "state" ? badge(run) : text(run), top ? element("span", { class: "hidden" }, " (best)") : null);
    })));
  return element("table", { class: "cards figures" },
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Run"), ...shown.map(([, label]) => element("th", { scope: "col" }, label)))),
    element("tbody", {}, ...rows));
}

function alarms(runs) {
  const found = [];
  const add = (run, text) => found.push(element("p", { class: "alarm" }, element("strong", {}, run.name), `: ${text}`));
  for (const run of runs) {
    for (const text of run.life.alarms) add(run, text);
    if (run.life.silent) add(run, `says it is ${run.life.state}, but its heartbeat stopped ${duration(run.life.age)} before this page was written`);
    for (const [file, count] of Object.entries(run.unread)) add(run, `${count} ${count === 1 ? "line" : "lines"} of ${file} could not be read and ${count === 1 ? "is" : "are"} left out`);
    if (!run.rows.step.length) add(run, "no updates yet");
  }
  return found;
}

/* ---- timing: mean seconds of an update as one bar a run, and how they changed as areas */

const PARTS = ["data", "forward", "backward", "optimizer", "communication", "save", "rest"];

/* Mean seconds by part, with what no part accounts for as "rest". Saves lie between updates. Communication runs within
   other parts, partly beside computing: it is taken out of them, so that nothing counts twice. */
function split(values) {
  const parts = { ...values };
  delete parts.all;
  if (!known(values.all)) return parts;
  const inside = ["forward", "backward", "optimizer"];
  const sum = (names) => names.reduce((total, part) => total + (parts[part] || 0), 0);
  if (parts.communication > sum(inside)) parts.communication = sum(inside);
  const spare = values.all - sum(["data", "communication", ...inside]);
  if (spare > 0.005 * values.all) parts.rest = spare;
  const twice = Math.min(-spare, parts.communication || 0);
  if (twice > 0 && sum(inside) > twice) {
    const kept = 1 - twice / sum(inside);
    for (const part of inside) if (known(parts[part])) parts[part] *= kept;
  }
  return parts;
}

function timingBars(runs) {
  const all = runs.map((run) => [run, split(run.timing.mean)]);
  const total = (parts) => Object.values(parts).reduce((sum, value) => sum + (value || 0), 0);
  const longest = Math.max(...all.map(([, parts]) => total(parts)));
  const used = PARTS.filter((part) => all.some(([, parts]) => parts[part] > 0));
  const legend = element("ul", { class: "legend", "aria-label": "Parts of an update" },
    ...used.map((part) => element("li", {}, element("i", { style: `background:var(--part-${part})` }), part)));
  const rows = all.map(([run, parts]) => {
    const sum = total(parts);
    const said = used.filter((part) => parts[part] > 0).map((part) => `${part} ${duration(parts[part])} (${share(parts[part] / sum)})`);
    return element("div", { class: "bar-row" },
      element("div", { class: "bar-name" }, nameOf(run), element("span", { class: "number" }, `${duration(sum)} an update`)),
      element("div", { class: "bar", role: "img", style: `width:${((100 * sum) / longest).toFixed(2)}%`, "aria-label": `${run.name}: ${said.join(", ")}` },
        ...used.filter((part) => parts[part] > 0).map((part) => element("span", {
          style: `flex-grow:${((100 * parts[part]) / sum).toFixed(3)};background:var(--part-${part})`, title: `${part} ${duration(parts[part])}, ${share(parts[part] / sum)}`,
        }, parts[part] / longest > 0.1 ? share(parts[part] / sum) : ""))),
      element("p", { class: "said" }, said.join(" · ")));
  });
  return [legend, ...rows];
}

/* Areas of a run's parts, laid on each other from the bottom. */
function drawAreas(frame, run, axis, domain) {
  const x = run.timing.rows.map((row) => run.rows[axis][row]);
  let sampled = run.timing.mean.communication; // a stretch without a sample shows the one before it
  const parts = x.map((_, i) => {
    const values = Object.fromEntries(Object.entries(run.timing.parts).map(([part, all]) => [part, all[i]]));
    if ("communication" in values) values.communication = sampled = known(values.communication) ? values.communication : sampled;
    return split(values);
  });
  const used = PARTS.filter((part) => parts.some((one) => one[part] > 0));
  let floor = x.map(() => 0);
  const layers = used.map((part) => {
    const top = floor.map((base, i) => base + (parts[i][part] || 0));
    const layer = { part, floor, top };
    floor = top;
    return layer;
  });
  const high = Math.max(...floor.filter((_, i) => known(x[i]) && x[i] >= domain[0] && x[i] <= domain[1]));
  if (!(high > 0)) return;
  const { x: toX, y: toY, inside } = frame.begin(domain, [0, high * 1.04], false, axis, duration);
  for (const { part, floor: low, top } of layers) {
    const upper = [], lower = [];
    x.forEach((value, i) => { if (known(value)) { upper.push([value, top[i]]); lower.unshift([value, low[i]]); } });
    inside.append(element("svg:path", { class: "area", d: path(upper, toX, toY) + path(lower, toX, toY).replace("M", "L") + "Z", fill: `var(--part-${part})` }));
  }
}

/* ---- events */

const KINDS = {
  start: ["M-4,-5L5,0L-4,5z", "good"], finished: ["M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", "good"],
  interrupted: ["M-4,-5h3v10h-3zM1,-5h3v10h-3z", "warn"], failed: ["M-5,-3L-3,-5L0,-2L3,-5L5,-3L2,0L5,3L3,5L0,2L-3,5L-5,3L-2,0z", "bad"],
  rewind: ["M5,-5L-1,0L5,5zM-1,-5L-7,0L-1,5z", "warn"], skipped: ["M-1,-5h2v10h-2zM-5,-1h10v2h-10z", "warn"],
  spike: ["M0,-6L5,5H-5z", "warn"], saved: ["M-1,1h2v6h-2z", "muted"], save_failed: ["M-5,-5h10v10h-10zM-2,-2v4h4v-4z", "bad"],
  stalled: ["M-5,-5h10v10h-10z", "bad"], straggler: ["M0,-6L6,0L0,6L-6,0z", "warn"],
};
const kindOf = (kind) => (Object.hasOwn(KINDS, kind) ? KINDS[kind] : ["M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0", "muted"]);
const sign = (kind) => element("svg:svg", { class: `sign ${kindOf(kind)[1]}`, viewBox: "-8 -8 16 16", width: 16, height: 16, "aria-hidden": "true" }, element("svg:path", { d: kindOf(kind)[0] }));

function eventLegend(runs) {
  const counts = {};
  for (const run of runs) for (const [kind, count] of Object.entries(run.events.counts)) counts[kind] = (Object.hasOwn(counts, kind) ? counts[kind] : 0) + count;
  return element("ul", { class: "legend", "aria-label": "Events" }, ...Object.entries(counts).map(([kind, count]) => element("li", {}, sign(kind), `${kind.replace("_", " ")} ${counted(count)}`)));
}

const LANE = 46;

/* A lane a run: when its processes lived (by wall time), and every event where it happened. */
function drawLanes(frame, runs, axis, domain) {
  const { x, inside } = frame.begin(domain, [0, 1], false, axis, null);
  runs.forEach((run, lane) => {
    const middle = MARGIN.top + LANE * lane + 30;
    const last = run.rows[axis].filter(known).pop() || 0;
    const bars = axis === "wall" ? run.events.sessions : [[0, last, ""]];
    inside.append(element("svg:text", { class: "lane", x: MARGIN.left, y: middle - 14 }, run.name));
    for (const [from, to, how] of bars) inside.append(element("svg:rect", {
      class: `life ${how === "killed" || how === "failed" ? "bad" : ""}`, x: x(from), y: middle - 4, width: Math.max(1.5, x(to) - x(from)), height: 8, rx: 2, style: `color:${colourOf(run.number)}`,
    }, element("svg:title", {}, how ? `${duration(to - from)}, then ${how}` : "")));
    for (const event of run.events.shown) if (known(event.x[axis])) inside.append(element("svg:path", {
      class: `event ${kindOf(event.kind)[1]}`, d: kindOf(event.kind)[0], transform: `translate(${x(event.x[axis]).toFixed(1)},${middle})`,
    }, element("svg:title", {}, `${event.kind.replace("_", " ")} at update ${plain(event.x.step)}: ${event.text}`)));
  });
}

function eventTable(runs, all) {
  const listed = runs.flatMap((run) => run.events.shown.map((event) => ({ run, ...event }))).filter((event) => all || event.kind !== "saved");
  listed.sort((a, b) => a.time - b.time);
  const total = runs.reduce((sum, run) => sum + Object.entries(run.events.counts).reduce((inner, [kind, count]) => inner + (all || kind !== "saved" ? count : 0), 0), 0);
  const rows = listed.map((event) => element("tr", {},
    element("td", { "data-label": "Time", class: "number" }, moment(event.time)),
    runs.length > 1 ? element("td", { "data-label": "Run" }, nameOf(event.run)) : null,
    element("td", { "data-label": "Update", class: "number" }, plain(event.x.step)),
    element("td", { "data-label": "Event" }, element("span", { class: "run" }, sign(event.kind), event.kind.replace("_", " "))),
    element("td", { "data-label": "What", class: "what" }, event.text)));
  const heads = ["Time", ...(runs.length > 1 ? ["Run"] : []), "Update", "Event", "What"];
  return [element("table", { class: "cards events" }, element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))), element("tbody", {}, ...rows)),
    total > listed.length ? element("p", { class: "note" }, `${counted(total - listed.length)} more of the most frequent kinds are counted above, not listed.`) : null];
}

/* ---- configuration: what differs first */

function configuration(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].sort();
  const value = (run, name) => (Object.hasOwn(run.config, name) ? run.config[name] : "–");
  const differs = (name) => new Set(runs.map((run) => value(run, name))).size > 1;
  const table = (some) => element("table", { class: `settings${runs.length > 1 ? " several" : ""}` },
    runs.length > 1 ? element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Setting"), ...runs.map((run) => element("th", { scope: "col" }, nameOf(run))))) : null,
    element("tbody", {}, ...some.map((name) => element("tr", {}, element("th", { scope: "row" }, name), ...runs.map((run) => element("td", { "data-label": run.name }, value(run, name)))))));
  const parts = [];
  if (runs.length > 1) {
    const different = names.filter(differs);
    parts.push(element("h3", {}, `What differs (${different.length} of ${names.length} settings)`), different.length ? table(different) : element("p", {}, "Nothing: all settings are equal."));
  }
  parts.push(element("details", {}, element("summary", {}, `All ${names.length} settings`), table(names)));
  parts.push(element("details", {}, element("summary", {}, runs.length > 1 ? "Commands" : "Command"),
    ...runs.map((run) => element("div", { class: "command" }, runs.length > 1 ? nameOf(run) : null, element("code", {}, run.command || "not recorded")))));
  return parts;
}
