// Elements and words: what a model wrote is set as text and as nothing else (`el`, `plain`).
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

/** An element. Children are elements or text; an attribute that is null, undefined or false is left out. */
function el(name, attributes = {}, ...children) {
  return dressed(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return dressed(document.createElementNS(SVG, name), attributes, children);
}

function dressed(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// What would change how other text is read, or cannot be seen: controls, marks of direction, halves of characters.
const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]" +
    "|[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]",
  "g",
);

/** Text of a model as it is, but with signs for what is hidden in it. */
function plain(text) {
  return text.replace(HIDDEN, (c) => {
    const code = c.charCodeAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code) : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

/** The same in one line, and no longer than that. */
function short(text, most) {
  const line = plain(text.slice(0, 4 * most))
    .replace(/\s+/g, " ")
    .trim();
  return line.length > most ? `${line.slice(0, most - 1)}…` : line;
}

const WHOLE = new Intl.NumberFormat("en");
const count = (n) => WHOLE.format(Math.round(n));
const seconds = (s) => `${s >= 100 ? s.toFixed(0) : s >= 10 ? s.toFixed(1) : s.toFixed(2)} s`;
const times = (x) => `${x.toFixed(x < 10 ? 2 : 1)}×`;
const percent = (x) => `${(100 * x).toFixed(x > 0.095 && x < 0.995 ? 0 : 1).replace(/\.0$/, "")}%`;
const many = (n, one, more = `${one}s`) => `${count(n)} ${n === 1 ? one : more}`;
const sum = (values) => values.reduce((a, b) => a + b, 0);
const mean = (values) => (values.length ? sum(values) / values.length : 0);
const largest = (values, least = -Infinity) => values.reduce((a, b) => (b > a ? b : a), least);

/** Round numbers up to `most`, about so many. */
function ticks(most, about) {
  const raw = most / Math.max(2, about),
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw);
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, k) => Number((k * step).toPrecision(12)));
}

const FINISH = {
  stop: "ended itself",
  eos: "ended",
  length: "cut at its limit",
  aborted: "cut when enough had ended",
  timeout: "cut at its deadline",
  failed: "failed",
  malformed: "left the dialect",
};
const BRIEF = { length: "cut", aborted: "aborted", timeout: "timeout", failed: "failed", malformed: "malformed" };

const WIDE = matchMedia("(min-width: 900px)"); // as the style has it
const isWide = () => WIDE.matches;
const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
