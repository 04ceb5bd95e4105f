"use strict";
/* Numbers, durations and elements. Every text becomes a text node: nothing that a run wrote is ever read as markup. */

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const node = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || (value === false && !key.startsWith("aria-"))) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true && !key.startsWith("aria-") ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const known = (value) => value !== null && value !== undefined;
const trimmed = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);

/* Four digits: 0.003, 3.142, 2048, 1.2e-6. */
function plain(value) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return trimmed(value.toPrecision(3)).replace(/\.?0*e/, "e").replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return trimmed(value.toPrecision(4));
}

/* 4 digits that always stand, so that numbers in a read-out do not dance. */
const steady = (value) => (!known(value) ? "–" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1000 ? value.toPrecision(4) : plain(value));

function counted(value) {
  if (!known(value)) return "–";
  for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6]]) if (Math.abs(value) >= size) return trimmed((value / size).toPrecision(4)) + unit;
  return value >= 1e5 ? trimmed((value / 1e3).toPrecision(4)) + "K" : Math.round(value).toLocaleString("en-US");
}

function bytes(value) {
  if (!known(value)) return "–";
  return value >= 2 ** 30 ? (value / 2 ** 30).toFixed(2) + " GiB" : (value / 2 ** 20).toFixed(0) + " MiB";
}

const percent = (value) => trimmed((100 * value).toPrecision(3)) + "%";
const share = (value) => (known(value) ? (100 * value).toFixed(1) + "%" : "–");

function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds === 0) return "0";
  if (seconds < 1) return plain(seconds * 1e3) + " ms";
  if (seconds < 60) return trimmed(seconds.toPrecision(3)) + " s";
  let whole = Math.round(seconds);
  const parts = [];
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]]) {
    const count = Math.floor(whole / size);
    if (count || parts.length) parts.push(`${count} ${unit}`);
    whole -= count * size;
  }
  return parts.slice(0, 2).filter((part) => !part.startsWith("0 ")).join(" ");
}

function moment(time) {
  if (!known(time)) return "–";
  const date = new Date(time * 1000);
  if (isNaN(date)) return "–";
  const two = (value) => String(value).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

const AXES = {
  step: { label: "updates", one: "update", format: counted },
  tokens: { label: "tokens", one: "token", format: counted },
  wall: { label: "wall time", one: "wall time", format: duration },
  trained: { label: "trained time", one: "trained time", format: duration },
};

/* Round positions inside [low, high]; of seconds in minutes, hours or days. */
function ticks(low, high, count, axis = "") {
  const time = axis === "wall" || axis === "trained";
  const span = high - low;
  if (!(span > 0)) return [low];
  const unit = !time ? 1 : [86400, 3600, 60].find((size) => span >= 2 * size) || 1;
  const rough = span / unit / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const stride = (axis === "step" || axis === "tokens" ? Math.max(1, pick()) : pick()) * unit;
  function pick() { return [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough) || 10 * power; }
  const found = [];
  for (let i = Math.ceil(low / stride - 1e-9); i * stride <= high + 1e-9 * span; i++) found.push(i * stride || 0); // no -0
  return found;
}

function logTicks(low, high, count) {
  if (high / low < 8) return ticks(low, high, count).filter((value) => value > 0);
  const decades = Math.log10(high / low);
  const stride = Math.max(1, Math.ceil(decades / count));
  const factors = decades < 1.5 ? [1, 2, 3, 5] : decades < 3 ? [1, 3] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += stride)
    for (const factor of factors) if (factor * 10 ** power >= low * 0.999 && factor * 10 ** power <= high * 1.001) found.push(factor * 10 ** power);
  return found;
}
