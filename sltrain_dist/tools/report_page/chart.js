/* One chart: thin lines of every update, thick ones of means, marks of evaluations; a cross-hair shared with all others. */

const MARGIN = { left: 56, right: 14, top: 10, bottom: 30 };
const MARKS = ["M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-4.8L4.6,3.6H-4.6z", "M0,-5L5,0L0,5L-5,0z"];

const colourOf = (number) => `var(--run-${number % 8})`;
const dashOf = (number) => ["", "7 3", "2 3", "9 3 2 3"][Math.floor(number / 8) % 4];

/* A run's sign in legends and tables: its line and its mark. */
function swatch(number) {
  return element("svg:svg", { class: "swatch", viewBox: "0 0 26 12", width: 26, height: 12, "aria-hidden": "true", style: `color:${colourOf(number)}` },
    element("svg:path", { d: "M1,6H25", stroke: "currentColor", "stroke-width": 2.5, "stroke-dasharray": dashOf(number) }),
    element("svg:path", { d: MARKS[number % 4], transform: "translate(13,6)", fill: "currentColor" }));
}

/* [[x, y], ...] of a curve of a run by the axis chosen; points without x or y are left out. */
function points(run, curve, axis, map = (value) => value) {
  if (!curve) return [];
  const x = run.rows[axis];
  const found = [];
  curve.rows.forEach((row, i) => {
    const y = map(curve.values[i]);
    if (known(x[row]) && known(curve.values[i]) && isFinite(y)) found.push([x[row], y]);
  });
  return found;
}

function marks(run, name, axis) {
  const x = run.evaluations[axis];
  return x.map((value, i) => [value, run.evaluations[name][i]]).filter(([a, b]) => known(a) && known(b));
}

/* The last place whose x is not beyond the one given; -1 before the first. */
function placeAt(line, x) {
  let low = 0, high = line.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (line[middle][0] <= x) low = middle + 1; else high = middle;
  }
  return low - 1;
}

function nearest(line, x) {
  if (!line.length || x > line[line.length - 1][0] * (1 + 1e-9)) return null;
  const i = Math.max(0, placeAt(line, x));
  const next = Math.min(line.length - 1, i + 1);
  return Math.abs(line[next][0] - x) < Math.abs(line[i][0] - x) ? line[next][1] : line[i][1];
}

function between(line, x) {
  if (!line.length || x > line[line.length - 1][0] * (1 + 1e-9)) return null;
  const i = placeAt(line, x);
  if (i < 0) return line[0][1];
  if (i === line.length - 1) return line[i][1];
  const [[x0, y0], [x1, y1]] = [line[i], line[i + 1]];
  return x1 > x0 ? y0 + ((x - x0) / (x1 - x0)) * (y1 - y0) : y1;
}

/* Low and high of what is in view; a log scale sees positive values alone. */
function extent(lines, domain, log, zero) {
  let low = Infinity, high = -Infinity;
  for (const line of lines) {
    const first = Math.max(0, placeAt(line, domain[0]));
    for (let i = first; i < line.length && (line[i][0] <= domain[1] || i === first); i++) {
      const y = line[i][1];
      if (log && y <= 0) continue;
      if (y < low) low = y;
      if (y > high) high = y;
    }
  }
  if (low > high) return null;
  if (log) {
    const room = (high / low) ** 0.04;
    return low === high ? [low / 1.5, high * 1.5] : [low / room, high * room];
  }
  if (zero) low = Math.min(0, low);
  const room = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.05;
  return [zero && low === 0 ? 0 : low - room, high + room];
}

const path = (line, x, y) => line.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("");

/* Left in place where they can be used again: domain, width and the scale that reads a pointer. */
class Frame {
  constructor(holder, height, label, act) {
    this.holder = holder;
    this.height = height;
    this.svg = element("svg:svg", { class: "frame", tabindex: 0, role: "img", "aria-label": label, "aria-describedby": "keys" });
    holder.append(this.svg);
    this.follow(act);
  }

  /* Empties the frame and lays axes; returns {x, y, inside} to draw with, or null where nothing is to be shown. */
  begin(domain, range, log, axis, formatY) {
    this.width = Math.max(240, Math.floor(this.holder.clientWidth));
    const height = typeof this.height === "function" ? this.height() : this.height;
    const [left, right, top, bottom] = [MARGIN.left, this.width - MARGIN.right, MARGIN.top, height - MARGIN.bottom];
    this.domain = domain;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
    this.svg.setAttribute("height", height);
    const x = (value) => left + ((value - domain[0]) / (domain[1] - domain[0] || 1)) * (right - left);
    const lift = log ? Math.log : (value) => value;
    const [low, high] = range.map(lift);
    const y = (value) => bottom - ((lift(value) - low) / (high - low || 1)) * (bottom - top);
    this.x = x;
    const grid = element("svg:g", { class: "grid", "aria-hidden": "true" });
    const [spanX, spanY] = [Math.max(3, Math.floor((right - left) / 90)), Math.max(2, Math.floor((bottom - top) / 42))];
    for (const value of ticks(domain[0], domain[1], spanX, axis)) grid.append(
      element("svg:path", { d: `M${x(value)},${top}V${bottom}` }),
      element("svg:text", { x: x(value), y: bottom + 18, "text-anchor": x(value) > right - 12 ? "end" : "middle" }, AXES[axis].format(value)));
    if (formatY) for (const value of log ? logTicks(range[0], range[1], spanY) : ticks(range[0], range[1], spanY)) grid.append(
      element("svg:path", { d: `M${left},${y(value)}H${right}` }),
      element("svg:text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, formatY(value)));
    const clip = `clip-${this.svg.getAttribute("aria-label").replace(/\W+/g, "-")}-${(Frame.count = (Frame.count || 0) + 1)}`;
    const inside = element("svg:g", { "clip-path": `url(#${clip})` });
    this.cross = element("svg:path", { class: "cross", "aria-hidden": "true" });
    this.brush = element("svg:rect", { class: "brush", y: top, height: bottom - top, width: 0 });
    this.svg.append(
      element("svg:clipPath", { id: clip }, element("svg:rect", { x: left - 6, y: top - 6, width: right - left + 12, height: bottom - top + 7 })),
      grid, inside, this.brush, this.cross);
    this.span = [left, right, top, bottom];
    return { x, y, inside };
  }

  point(at) {
    if (!this.cross) return;
    const [left, right, top, bottom] = this.span;
    const place = known(at) ? this.x(at) : -1;
    this.cross.setAttribute("d", place >= left - 0.5 && place <= right + 0.5 ? `M${place.toFixed(1)},${top}V${bottom}` : "");
  }

  valueAt(event) {
    const box = this.svg.getBoundingClientRect();
    const [left, right] = this.span;
    const part = ((event.clientX - box.left) * (this.width / box.width) - left) / (right - left);
    return this.domain[0] + Math.min(1, Math.max(0, part)) * (this.domain[1] - this.domain[0]);
  }

  /* Pointer: look, drag to enlarge, twice to see all. Keys: arrows, Home, End, + - 0, Escape. */
  follow(act) {
    let from = null;
    this.svg.addEventListener("pointerdown", (event) => {
      if (!this.span) return;
      act.look(this.valueAt(event));
      if (event.pointerType === "mouse" && event.button === 0) from = this.valueAt(event);
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (!this.span) return;
      const value = this.valueAt(event);
      act.look(value);
      if (from === null) return;
      const [a, b] = [this.x(Math.min(from, value)), this.x(Math.max(from, value))];
      this.brush.setAttribute("x", a);
      this.brush.setAttribute("width", b - a);
    });
    addEventListener("pointerup", (event) => {
      if (from === null) return;
      const to = this.valueAt(event);
      if (Math.abs(this.x(to) - this.x(from)) > 8) act.zoom([Math.min(from, to), Math.max(from, to)]);
      this.brush.setAttribute("width", 0);
      from = null;
    });
    this.svg.addEventListener("pointerleave", () => { if (from === null) act.look(null); });
    this.svg.addEventListener("dblclick", () => act.zoom(null));
    this.svg.addEventListener("keydown", (event) => { if (this.span && act.key(event.key)) event.preventDefault(); });
  }
}
