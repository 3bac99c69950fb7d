// Makes elements and formats text. What a model wrote is only ever set as text (`el`, `plain`).
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

/** Returns an element. Children are elements or text. An attribute that is null, undefined or false is left out. */
function el(name, attributes = {}, ...children) {
  return decorate(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return decorate(document.createElementNS(SVG, name), attributes, children);
}

function decorate(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Characters that change how other text is shown, or that are invisible: controls, direction marks, lone surrogates.
const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]" +
    "|[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]",
  "g",
);

/** Returns the text of a model with visible signs in place of hidden characters. */
function plain(text) {
  return text.replace(HIDDEN, (c) => {
    const code = c.charCodeAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code) : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

/** Returns the same in one line of at most `max` characters. */
function short(text, max) {
  const line = plain(text.slice(0, 4 * max))
    .replace(/\s+/g, " ")
    .trim();
  return line.length > max ? `${line.slice(0, max - 1)}…` : line;
}

const WHOLE = new Intl.NumberFormat("en");
const count = (n) => WHOLE.format(Math.round(n));
const seconds = (s) => `${s >= 100 ? s.toFixed(0) : s >= 10 ? s.toFixed(1) : s.toFixed(2)} s`;
const times = (x) => `${x.toFixed(x < 10 ? 2 : 1)}×`;
const percent = (x) => `${(100 * x).toFixed(x > 0.095 && x < 0.995 ? 0 : 1).replace(/\.0$/, "")}%`;
const plural = (n, one, more = `${one}s`) => `${count(n)} ${n === 1 ? one : more}`;
const sum = (values) => values.reduce((a, b) => a + b, 0);
const mean = (values) => (values.length ? sum(values) / values.length : 0);
const largest = (values, min = -Infinity) => values.reduce((a, b) => (b > a ? b : a), min);

/** Returns about `about` round numbers up to `max`. */
function ticks(max, about) {
  const raw = max / Math.max(2, about),
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw);
  return Array.from({ length: Math.floor(max / step + 1e-9) + 1 }, (_, k) => Number((k * step).toPrecision(12)));
}

const FINISH = {
  stop: "complete",
  eos: "ended early",
  length: "stopped at its token limit",
  aborted: "stopped when enough branches had ended",
  timeout: "stopped at its deadline",
  failed: "failed",
  malformed: "malformed",
};
const SHORT_FINISH = { length: "limit", aborted: "aborted", timeout: "timeout", failed: "failed", malformed: "malformed" };

const WIDE = matchMedia("(min-width: 900px)"); // the same width as in the style
const isWide = () => WIDE.matches;
const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
