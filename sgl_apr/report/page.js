// The page of trajectories: a list, what they come to in all, and the timeline and texts of the one that is selected.
// Nothing here asks a network for anything. What a model wrote is set as text and as nothing else (`el`, `plain`).
"use strict";

/* ---- Elements and words ------------------------------------------------------------------------------------- */

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

/* ---- Data --------------------------------------------------------------------------------------------------- */

const known = { entries: [], methods: [] };

function readIndex() {
  const { columns, rows } = JSON.parse($("index").textContent);
  rows.forEach((row) => addEntry(Object.fromEntries(columns.map((column, k) => [column, row[k]]))));
}

/** A row of the list; `loaded` is its trajectory where it is not packed in this page. */
function addEntry(row, loaded = null) {
  const entry = { ...row, id: known.entries.length, loaded, parallelism: row.critical ? row.tokens / row.critical : 1 };
  if (!known.methods.includes(entry.method)) known.methods.push(entry.method);
  entry.hue = known.methods.indexOf(entry.method) % 8;
  entry.text = `${row.name}\n${row.answer}\n${row.label}`.toLowerCase();
  known.entries.push(entry);
  return entry;
}

async function trajectoryOf(entry) {
  return entry.loaded ?? JSON.parse(await inflated($(`t${entry.id}`).textContent));
}

function inflated(packed) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
}

/* ---- The graph: strands, where spans begin and end, the longest chain ------------------------------------------ */

const nameOf = (path) => path.join(".") || "trunk";
const before = (span) => [...span.parents, ...span.after];
const isPrompt = (span) => span.origin === "prompt";

/** The path of the strand in whose text a span stands: what a branch returned is in that of who forked it. */
const laneOf = (span) => (span.role === "result" ? span.path.slice(0, -2) : span.path);

function byPath(a, b) {
  for (let k = 0; k < Math.min(a.path.length, b.path.length); k++)
    if (a.path[k] !== b.path[k]) return a.path[k] - b.path[k];
  return a.path.length - b.path.length;
}

/** Strands in the order of the text: path, the indices of their spans and calls, outline, finish, tokens. */
function lanesOf(t) {
  const lanes = new Map();
  const lane = (path) => {
    const key = nameOf(path);
    if (!lanes.has(key)) {
      if (path.length) lane(path.slice(0, -2));
      lanes.set(key, { key, path, depth: path.length / 2, spans: [], calls: [], outline: "", finish: null, tokens: 0 });
    }
    return lanes.get(key);
  };
  lane([]);
  t.spans.forEach((span, i) => {
    const own = lane(laneOf(span));
    own.spans.push(i);
    own.tokens += isPrompt(span) ? 0 : span.tokens;
    const goesOn = span.finish === "stop" && (span.role === "fork" || span.role === "wait");
    if (!goesOn) own.finish = span.finish ?? own.finish;
    if (span.role === "header" || span.role === "result") {
      const branch = lane(span.path);
      branch.outline ||= span.outline || span.label;
    }
  });
  t.calls.forEach((call, c) => lane(call.path).calls.push(c));
  t.forks?.forEach(({ path, outline }) => (lane(path).outline ||= outline)); // of what has written nothing yet
  return [...lanes.values()].sort(byPath);
}

/** Where each span begins and ends in tokens: behind the longest chain of what it follows. */
function placedByTokens({ spans }) {
  const starts = [],
    ends = [];
  spans.forEach((span, i) => {
    starts[i] = largest(
      before(span).map((p) => ends[p]),
      0,
    );
    ends[i] = starts[i] + (isPrompt(span) ? 0 : span.tokens);
  });
  return { starts, ends };
}

/** Where each span begins and ends in seconds: decoded ones share the time of their request by their tokens. */
function placedByTime({ spans, calls }) {
  const starts = [],
    ends = [],
    own = calls.map(() => []);
  spans.forEach((span, i) => span.call !== null && own[span.call]?.push(i));
  own.forEach((indices, c) => {
    const all = sum(indices.map((i) => spans[i].tokens)) || 1;
    let at = calls[c].started;
    for (const i of indices) {
      starts[i] = at;
      ends[i] = at += ((calls[c].ended - calls[c].started) * spans[i].tokens) / all;
    }
  });
  spans.forEach((span, i) => {
    if (starts[i] === undefined)
      starts[i] = ends[i] = largest(
        before(span).map((p) => ends[p]),
        0,
      );
  });
  return { starts, ends };
}

/** The longest chain, from its end to its beginning. */
function chainOf(spans, ends) {
  const chain = [];
  let at = ends.reduce((best, end, i) => (best < 0 || end >= ends[best] ? i : best), -1);
  while (at >= 0) {
    chain.push(at);
    at = before(spans[at]).reduce((best, p) => (best < 0 || ends[p] > ends[best] ? p : best), -1);
  }
  return chain;
}

/** How many strands decode at once, as steps [from, how many]. */
function widths(lanes, spans, { starts, ends }) {
  const changes = [];
  for (const lane of lanes) {
    for (const i of lane.spans) {
      if (spans[i].origin === "decoded" && ends[i] > starts[i]) changes.push([starts[i], 1], [ends[i], -1]);
    }
  }
  changes.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const steps = [];
  let at = 0;
  for (const [x, change] of changes) {
    at += change;
    if (steps.length && steps.at(-1)[0] === x) steps.at(-1)[1] = at;
    else steps.push([x, at]);
  }
  return steps;
}

/** What a trajectory comes to, by its graph, as `Trajectory.metrics()` has it: of those that no index has a row of. */
function figures(t) {
  const lanes = lanesOf(t),
    { ends } = placedByTokens(t);
  const critical = largest(ends, 0),
    reply = t.spans.filter((span) => !isPrompt(span));
  return {
    tokens: sum(reply.map((span) => span.tokens)),
    critical,
    inside: sum(reply.filter((s) => s.path.length).map((s) => s.tokens)),
    blocks: new Set(lanes.slice(1).map((lane) => nameOf(lane.path.slice(0, -1)))).size,
    branches: lanes.length - 1,
    wall: t.wall,
    calls: sum(t.calls.map((call) => 1 + call.retries)),
    prompt: sum(t.calls.map((call) => call.prompt_tokens)),
    cached: sum(t.calls.map((call) => call.cached_tokens ?? 0)),
    again: sum(t.calls.map(again)),
  };
}

/** Prompt tokens of a call that were computed once more, as far as known. */
const again = (call) =>
  call.cached_tokens === null ? 0 : Math.max(0, call.prompt_tokens - call.new_tokens - call.cached_tokens);

/* ---- The list ------------------------------------------------------------------------------------------------- */

const SORTS = {
  number: "order",
  tokens: "tokens",
  critical: "critical path",
  parallelism: "parallelism",
  branches: "branches",
  wall: "wall time",
  size: "size",
};
const list = { shown: [], at: 0, height: 64 }; // a row is as high as the style has it

function setUpList() {
  for (const [value, name] of Object.entries(SORTS)) $("sort").append(el("option", { value }, name));
  for (const id of ["find", "method", "verdict", "forked", "sort"]) $(id).addEventListener("input", refilter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("direction").addEventListener("click", () => {
    $("direction").setAttribute("aria-pressed", String($("direction").getAttribute("aria-pressed") !== "true"));
    refilter();
  });
  $("rows").addEventListener("scroll", drawRows, { passive: true });
  $("rows").addEventListener("keydown", onListKey);
  $("rows").addEventListener("click", onListClick);
  new ResizeObserver(drawRows).observe($("rows"));
}

/** Choices that only make sense for what is there. */
function offerChoices() {
  const { entries, methods } = known,
    chosen = $("method").value;
  $("method").replaceChildren(
    el("option", { value: "" }, "any"),
    ...methods.map((m) => el("option", { value: m }, plain(m))),
  );
  $("method").value = methods.includes(chosen) ? chosen : "";
  $("method").parentElement.hidden = methods.length < 2;
  $("filters").hidden = !entries.length;
  $("verdict").parentElement.hidden = !entries.some((e) => e.correct !== null);
  for (const option of $("sort").options)
    if (option.value === "size") option.hidden = !entries.some((e) => e.size !== null);
}

function refilter() {
  const words = $("find").value.toLowerCase(),
    method = $("method").value,
    verdict = $("verdict").value;
  const forked = $("forked").value,
    key = $("sort").value,
    descending = $("direction").getAttribute("aria-pressed") === "true";
  const chosen = list.shown[list.at];
  list.shown = known.entries.filter(
    (e) =>
      e.text.includes(words) &&
      (!method || e.method === method) &&
      (!forked || (forked === "yes") === e.blocks > 0) &&
      (!verdict || (e.correct !== null && (verdict === "right") === e.correct)),
  );
  if (key !== "number") list.shown.sort((a, b) => (a[key] ?? 0) - (b[key] ?? 0) || a.id - b.id);
  if (descending) list.shown.reverse();
  list.at = Math.max(0, list.shown.indexOf(chosen));
  const all = known.entries.length;
  $("found").textContent =
    list.shown.length === all
      ? many(all, "trajectory", "trajectories")
      : `${count(list.shown.length)} of ${count(all)}`;
  $("rows").scrollTop = 0;
  reveal(list.at);
  drawRows();
}

/** Only the rows that can be seen are there. */
function drawRows() {
  const box = $("rows"),
    { shown, height } = list;
  $("pad").style.height = `${shown.length * height}px`;
  const first = Math.max(0, Math.floor(box.scrollTop / height) - 4);
  const last = Math.min(shown.length, Math.ceil((box.scrollTop + box.clientHeight) / height) + 4);
  const rows = [];
  for (let k = first; k < last; k++) rows.push(rowOf(shown[k], k));
  $("pad").replaceChildren(...rows);
  if (list.at >= first && list.at < last) box.setAttribute("aria-activedescendant", `row-${shown[list.at].id}`);
  else box.removeAttribute("aria-activedescendant");
}

function rowOf(entry, k) {
  const chosen = k === list.at;
  const row = el(
    "div",
    {
      role: "option",
      id: `row-${entry.id}`,
      class: `item hue-${entry.hue}`,
      "data-k": k,
      "aria-selected": String(chosen),
      "aria-setsize": list.shown.length,
      "aria-posinset": k + 1,
    },
    silhouette(entry.shape),
    el("span", { class: "name" }, el("bdi", {}, short(entry.name, 90) || "(no name)")),
    verdictOf(entry),
    el(
      "span",
      { class: "figures" },
      known.methods.length > 1 && el("span", { class: "method" }, el("bdi", {}, short(entry.method, 40))),
      el("span", {}, `${count(entry.tokens)} tokens`),
      el("span", {}, entry.blocks ? times(entry.parallelism) : "no fork"),
    ),
  );
  row.style.top = `${k * list.height}px`;
  return row;
}

function verdictOf(entry) {
  if (entry.correct === null) return null;
  return el("span", { class: `verdict ${entry.correct ? "right" : "wrong"}` }, entry.correct ? "✓ right" : "✗ wrong");
}

/** A trajectory in a few strokes: its trunk, and its branches below one another. */
function silhouette(shape) {
  const rows = shape.length / 2,
    step = Math.min(7, 34 / Math.max(1, rows));
  const top = 20 - ((rows - 1) * step) / 2;
  const strokes = Array.from(
    { length: rows },
    (_, r) => `M${2 + 0.6 * shape[2 * r]} ${top + r * step}H${2 + 0.6 * Math.max(shape[2 * r] + 2, shape[2 * r + 1])}`,
  );
  return svg(
    "svg",
    { class: "silhouette", viewBox: "0 0 64 40", "aria-hidden": "true" },
    svg("path", { class: "trunk", d: strokes[0] ?? "" }),
    svg("path", { d: strokes.slice(1).join("") }),
  );
}

/** Scroll so that row `k` can be seen. */
function reveal(k) {
  const box = $("rows"),
    top = k * list.height;
  if (top < box.scrollTop) box.scrollTop = top;
  else if (top + list.height > box.scrollTop + box.clientHeight) box.scrollTop = top + list.height - box.clientHeight;
}

function onListClick(event) {
  const row = event.target.closest("[data-k]");
  if (!row) return;
  moveTo(Number(row.dataset.k));
  open(list.shown[list.at]);
}

function onListKey(event) {
  const page = Math.max(1, Math.floor($("rows").clientHeight / list.height) - 1);
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key in steps) {
    moveTo(list.at + steps[event.key]);
    if (isWide() && list.shown.length) open(list.shown[list.at], { quietly: true });
  } else if (event.key === "Enter" || event.key === " ") {
    if (list.shown.length) open(list.shown[list.at], { focus: true });
  } else return;
  event.preventDefault();
}

function moveTo(k) {
  list.at = Math.min(list.shown.length - 1, Math.max(0, k));
  reveal(list.at);
  drawRows();
}

/* ---- One trajectory ------------------------------------------------------------------------------------------- */

const view = { entry: null, t: null, lanes: [], lane: "trunk", axis: "tokens" };

/** Show a trajectory, and with `focus` go to its timeline. */
async function open(entry, { focus = false, quietly = false, lane = "trunk" } = {}) {
  const asked = (open.asked = entry);
  const t = await trajectoryOf(entry);
  if (open.asked !== asked) return; // another one was selected meanwhile
  goTo("detail", `#t${entry.id}`, quietly);
  show(entry, t, lane);
  if (focus) $("lanes").focus();
}

function show(entry, t, lane) {
  Object.assign(view, { entry, t, lanes: lanesOf(t) });
  view.lane = view.lanes.some((l) => l.key === lane) ? lane : "trunk";
  if (!hasTimes(t)) view.axis = "tokens";
  const k = list.shown.indexOf(entry);
  if (k >= 0 && k !== list.at) moveTo(k);
  $("detail").replaceChildren(
    headOf(entry),
    tilesOf(entry),
    ...notesOf(t),
    ...otherAttempts(entry),
    timelineCard(),
    el("section", { id: "reader", class: "card", tabindex: "-1" }),
  );
  $("detail").hidden = false;
  drawTimeline();
  drawReader();
}

const hasTimes = (t) => t.calls.length > 0 || t.running === true;

function headOf(entry) {
  const go = (by) => {
    if (!list.shown[list.at + by]) return;
    moveTo(list.at + by);
    open(list.shown[list.at]);
  };
  const step = (by, label, d) => el("button", { type: "button", "aria-label": label, onclick: () => go(by) }, icon(d));
  return el(
    "header",
    { class: "head" },
    el(
      "button",
      { type: "button", class: "back", onclick: () => goTo("list", "#"), "aria-label": "Back to the list" },
      icon("M10 3 5 8l5 5"),
    ),
    el("h2", {}, el("bdi", {}, short(entry.name, 300) || "(no name)")),
    el("div", { class: "steps" }, step(-1, "The one before", "M3 10l5-5 5 5"), step(1, "The next one", "M3 6l5 5 5-5")),
    el(
      "p",
      { class: "answer" },
      verdictOf(entry),
      el("span", { class: `method hue-${entry.hue}` }, el("bdi", {}, short(entry.method, 60))),
      entry.label && entry.label !== "exact" && el("span", { class: "soft" }, el("bdi", {}, short(entry.label, 200))),
      el("span", {}, el("span", { class: "soft" }, "answer "), el("bdi", {}, short(entry.answer, 400) || "(none)")),
    ),
  );
}

const icon = (d) => svg("svg", { viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true" }, svg("path", { d }));

function tilesOf(entry) {
  const tile = (key, value, name, more) =>
    el(
      "div",
      { "data-figure": key },
      el("dt", {}, name),
      el("dd", {}, el("b", {}, value), more ? el("small", {}, more) : null),
    );
  return el(
    "dl",
    { class: "tiles" },
    tile(
      "tokens",
      count(entry.tokens),
      "tokens",
      entry.inside && `${percent(entry.inside / entry.tokens)} in branches`,
    ),
    tile(
      "critical",
      count(entry.critical),
      "critical path",
      entry.tokens && `${percent(1 - entry.critical / entry.tokens)} less than all`,
    ),
    tile("parallelism", times(entry.parallelism), "parallelism", "tokens by critical path"),
    tile("branches", count(entry.branches), entry.branches === 1 ? "branch" : "branches", many(entry.blocks, "fork")),
    tile("wall", seconds(entry.wall), "wall time", many(entry.calls, "request")),
    tile(
      "cached",
      entry.prompt ? percent(entry.cached / entry.prompt) : "–",
      "of prompts cached",
      entry.prompt &&
        `${count(entry.prompt - entry.cached)} prefilled${entry.again ? `, ${count(entry.again)} again` : ""}`,
    ),
  );
}

/** Where a limit acted, and what became of the joins in the cache. */
function notesOf(t) {
  const by = new Map();
  const note = (what, path) => by.set(what, [...(by.get(what) ?? []), nameOf(path)]);
  t.limits.forEach(({ limit, path }) => note(`limit that acted: ${limit}`, path));
  t.joins.forEach(({ path, by: way, why }) =>
    note(way === "kv" ? "joined in the KV cache" : `read in a line${why ? `: ${why}` : ""}`, path),
  );
  t.decisions
    .filter((d) => d.at_once < d.branches)
    .forEach((d) => note(`${d.at_once} of ${d.branches} branches at once: ${d.reason}`, d.path));
  if (!by.size) return [];
  const items = [...by].map(([what, paths]) =>
    el(
      "li",
      {},
      el("bdi", {}, short(what, 200)),
      el("span", { class: "soft" }, ` at ${paths.slice(0, 8).join(", ")}${paths.length > 8 ? " …" : ""}`),
    ),
  );
  return [el("ul", { class: "notes", "aria-label": "What acted on it" }, items)];
}

function otherAttempts(entry) {
  const others = known.entries.filter((e) => e !== entry && e.name === entry.name).slice(0, 24);
  if (!others.length) return [];
  const links = others.map((e) =>
    el(
      "button",
      { type: "button", class: `chip hue-${e.hue}`, onclick: () => open(e) },
      el("span", { class: "method" }, el("bdi", {}, short(e.method, 40))),
      e.correct === null ? "" : e.correct ? "✓" : "✗",
      ` ${count(e.tokens)} tokens`,
    ),
  );
  return [el("p", { class: "others" }, el("span", { class: "soft" }, "Same problem:"), ...links)];
}

/* ---- The timeline --------------------------------------------------------------------------------------------- */

const LEGEND = [
  ["decoded", "decoded"],
  ["injected", "injected by the runtime"],
  ["cached", "read from the cache"],
  ["prefilled", "prefilled"],
  ["fork", "fork"],
  ["join", "join"],
  ["critical", "critical path"],
];
const CAPTION = {
  tokens:
    "Thick: what was written, behind the longest chain of what it follows. Thin: what each request had read before it wrote.",
  time: "Thick: requests while they decoded. Thin: which share of its prompt each of them had from the cache.",
};
const HEAD = 62; // height of what stands above the lanes
const STUB = 26; // width of the prompt, which is not part of any chain

function timelineCard() {
  const radio = (value, name) =>
    el(
      "label",
      {},
      el("input", {
        type: "radio",
        name: "axis",
        value,
        checked: view.axis === value,
        disabled: value === "time" && !hasTimes(view.t),
        onchange: () => ((view.axis = value), drawTimeline()),
      }),
      el("span", {}, name),
    );
  return el(
    "section",
    { class: "card timeline", "aria-label": "Timeline" },
    el(
      "div",
      { class: "timeline-head" },
      el(
        "ul",
        { class: "legend", "aria-label": "Legend" },
        LEGEND.map(([key, name]) => el("li", { class: key }, name)),
      ),
      el(
        "fieldset",
        { class: "switch" },
        el("legend", { class: "unseen" }, "Axis"),
        radio("tokens", "Tokens"),
        radio("time", "Time"),
      ),
    ),
    el(
      "div",
      { class: "lanes-box", onpointermove: onPoint, onpointerleave: unpoint },
      el("div", { id: "lanes-head", "aria-hidden": "true" }),
      el("div", {
        id: "lanes",
        role: "listbox",
        tabindex: "0",
        "aria-label": "Branches: arrows to choose, Enter to read, Escape to go back",
        onkeydown: onLaneKey,
        onclick: onLaneClick,
      }),
      el("div", { id: "tip", hidden: true, "aria-hidden": "true" }),
    ),
    el("p", { id: "caption" }),
  );
}

/** Everything that is drawn of a trajectory, in pixels. */
function layout() {
  const { t, lanes, axis } = view,
    placed = axis === "time" ? placedByTime(t) : placedByTokens(t);
  const box = $("lanes"),
    label = isWide() ? 208 : 88,
    width = Math.max(120, box.clientWidth - label - 18);
  const row = lanes.length <= 12 ? 32 : lanes.length <= 48 ? 26 : 20;
  const most = axis === "time" ? Math.max(t.wall, largest(placed.ends, 0), 1e-3) : Math.max(1, largest(placed.ends, 0));
  const prompt = sum(t.spans.filter(isPrompt).map((span) => span.tokens)),
    stub = axis === "tokens" && prompt ? STUB : 0;
  const x = (value) => (value < 0 ? stub * (1 + Math.max(-1, value / prompt)) : stub + (value / most) * (width - stub));
  const lines = new Map(lanes.map((lane, k) => [lane.key, k * row + row / 2]));
  const y = (i) => lines.get(nameOf(laneOf(t.spans[i])));
  return {
    ...placed,
    t,
    lanes,
    axis,
    label,
    width,
    row,
    most,
    prompt,
    stub,
    x,
    y,
    lines,
    height: lanes.length * row,
    bar: Math.round(row * 0.4),
  };
}

function drawTimeline() {
  if (!$("lanes")) return;
  const l = (view.layout = layout());
  $("lanes").style.setProperty("--label", `${l.label}px`);
  $("lanes").style.setProperty("--row", `${l.row}px`);
  const chain = chainOf(l.t.spans, l.ends),
    on = new Set(chain);
  $("lanes-head").replaceChildren(drawHead(l));
  $("caption").textContent = CAPTION[l.axis];
  $("lanes").replaceChildren(drawing(l, chain, on), ...l.lanes.map((lane) => laneRow(lane, on)));
  chooseLane(view.lane);
}

function laneRow(lane, on) {
  const critical = lane.spans.some((i) => on.has(i) && !isPrompt(view.t.spans[i]));
  const said = [
    lane.path.length ? `Branch ${lane.key}` : "Trunk",
    lane.outline && short(lane.outline, 120),
    many(lane.tokens, "token"),
    FINISH[lane.finish],
    critical && "on the critical path",
  ].filter(Boolean);
  const name = el(
    "span",
    { class: "lane-name" },
    el("b", {}, nameOf(lane.path)),
    el("bdi", { class: "outline" }, short(lane.outline, 80)),
    BRIEF[lane.finish] && el("span", { class: `end ${lane.finish}` }, BRIEF[lane.finish]),
    el("span", { class: "tokens" }, count(lane.tokens)),
  );
  name.style.paddingInlineStart = `${8 + Math.max(0, lane.depth - 1) * (isWide() ? 14 : 5)}px`;
  return el(
    "div",
    { role: "option", class: "lane", id: `lane-${lane.key}`, "data-lane": lane.key, "aria-label": said.join(", ") },
    name,
  );
}

/** The lanes, from back to front: grid, the critical path as if marked with a pen, edges, what was read, what was written. */
function drawing(l, chain, on) {
  const root = svg("svg", { class: "drawing", width: l.width + 10, height: l.height, "aria-hidden": "true" });
  root.append(
    svg("path", {
      class: "grid",
      d: ticks(l.most, l.width / 90)
        .map((v) => `M${l.x(v)} 0V${l.height}`)
        .join(""),
    }),
    markOf(l, chain),
    ...baselines(l),
    ...edges(l, chain),
    ...l.t.calls.flatMap((call, c) => strip(l, call, c)),
    ...bars(l, on),
    ...dots(l),
    svg("path", { class: "hair", d: "" }),
  );
  return root;
}

function markOf(l, chain) {
  const thick = l.bar + 10,
    group = svg("g", { class: "mark" });
  chain.forEach((i, k) => {
    const from = chain[k + 1];
    if (!isPrompt(l.t.spans[i]))
      group.append(
        svg("rect", {
          x: l.x(l.starts[i]) - 1,
          y: l.y(i) - thick / 2,
          width: Math.max(2, l.x(l.ends[i]) - l.x(l.starts[i]) + 2),
          height: thick,
          rx: 3,
        }),
      );
    if (from !== undefined && !isPrompt(l.t.spans[from]))
      group.append(
        svg("path", { d: curve(l.x(l.ends[from]), l.y(from), l.x(l.starts[i]), l.y(i)), "stroke-width": thick * 0.62 }),
      );
  });
  return group;
}

/** Where a strand waits. */
function baselines(l) {
  return l.lanes
    .map((lane) => {
      const own = lane.spans.filter((i) => !isPrompt(l.t.spans[i])),
        y = l.lines.get(lane.key);
      if (!own.length) return null;
      return svg("path", {
        class: "waits",
        d: `M${l.x(own.reduce((a, i) => Math.min(a, l.starts[i]), Infinity))} ${y}H${l.x(largest(own.map((i) => l.ends[i])))}`,
      });
    })
    .filter(Boolean);
}

/** From strand to strand: down to a branch where it is forked, up from it where it is joined. */
function curve(x0, y0, x1, y1) {
  const bend = Math.min(6, x1 - x0, Math.abs(y1 - y0)),
    turn = y1 > y0 ? bend : -bend;
  if (y0 === y1) return `M${x0} ${y0}H${x1}`;
  if (y1 > y0) return `M${x0} ${y0}V${y1 - turn}Q${x0} ${y1} ${x0 + bend} ${y1}H${x1}`;
  return `M${x0} ${y0}H${x1 - bend}Q${x1} ${y0} ${x1} ${y0 + turn}V${y1}`;
}

/** From strand to strand: forks and joins; dashed where nothing but a message goes. */
function edges(l, chain) {
  const critical = new Set(chain.slice(0, -1).map((i, k) => `${chain[k + 1]} ${i}`)),
    found = [[], []];
  l.t.spans.forEach((span, i) => {
    for (const p of before(span)) {
      if (l.y(p) === l.y(i)) continue;
      const on = critical.has(`${p} ${i}`),
        kind = span.after.includes(p) ? "message" : "seen";
      found[Number(on)].push(
        svg("path", {
          class: `edge ${kind}${on ? " on" : ""}`,
          d: curve(l.x(isPrompt(l.t.spans[p]) ? 0 : l.ends[p]), l.y(p), l.x(l.starts[i]), l.y(i)),
        }),
      );
    }
  });
  return found.flat();
}

/** What a request read: by tokens the context before what it wrote; by time the shares of its prompt. */
function strip(l, call, c) {
  const y = l.lines.get(nameOf(call.path)) + l.bar / 2 + 2.5,
    high = Math.max(2.5, l.row * 0.11);
  const [left, middle, right] = l.axis === "time" ? readByTime(l, call) : readByTokens(l, call, c);
  const rect = (kind, from, to, thick) =>
    to - from > 0.2 && svg("rect", { class: kind, x: from, y, width: to - from, height: thick, rx: 1 });
  if (!call.prompt_tokens) return [];
  if (call.cached_tokens === null) return [rect("unknown", left, right, high)].filter(Boolean);
  return [rect("cached", left, middle, high), rect("prefilled", middle, right, high * 1.6)].filter(Boolean);
}

function readByTime(l, call) {
  const left = l.x(call.started),
    right = Math.max(left + 3, l.x(call.ended));
  return [left, left + ((right - left) * (call.cached_tokens ?? 0)) / Math.max(1, call.prompt_tokens), right];
}

function readByTokens(l, call, c) {
  const own = view.lanes.find((lane) => lane.key === nameOf(call.path)).spans,
    first = own.find((i) => l.t.spans[i].call === c);
  if (first === undefined) return [0, 0, 0]; // it wrote nothing, as a commit does
  const end = l.starts[first],
    earlier = own.filter((i) => i < first && l.t.spans[i].call !== null).map((i) => l.ends[i]);
  const left = Math.max(end - call.prompt_tokens, -l.prompt, largest(earlier));
  return [left, Math.max(left, end - (call.prompt_tokens - (call.cached_tokens ?? 0))), end].map(l.x);
}

/** What stands in the text. Decoded spans come last: they are over what takes their place in the chain. */
function bars(l, on) {
  const order = l.t.spans
    .map((_, i) => i)
    .sort((a, b) => (l.t.spans[a].origin === "decoded") - (l.t.spans[b].origin === "decoded") || a - b);
  return order
    .map((i) => {
      const span = l.t.spans[i],
        from = isPrompt(span) ? l.x(-l.prompt) : l.x(l.starts[i]);
      if (isPrompt(span) && !l.stub) return null;
      const width = Math.max(isPrompt(span) ? l.stub - 3 : 1.6, l.x(l.ends[i]) - from - (isPrompt(span) ? 3 : 0.6));
      return svg("rect", {
        class: `bar ${span.origin}${on.has(i) ? " on" : ""}${span.open ? " open" : ""}`,
        x: from,
        y: l.y(i) - l.bar / 2,
        width,
        height: l.bar,
        rx: Math.min(2.5, width / 2),
      });
    })
    .filter(Boolean);
}

/** Where strands part and meet, and how they ended if not by themselves. */
function dots(l) {
  const at = new Map();
  l.t.spans.forEach((span, i) => {
    for (const p of before(span)) {
      if (l.y(p) === l.y(i) || isPrompt(l.t.spans[p])) continue;
      const forks = laneOf(span).length > laneOf(l.t.spans[p]).length;
      const spot = forks ? [l.x(l.ends[p]), l.y(p)] : [l.x(l.starts[i]), l.y(i)];
      at.set(spot.map(Math.round).join(), { spot, forks });
    }
  });
  const ends = l.lanes
    .filter((lane) => BRIEF[lane.finish] && lane.spans.length)
    .map((lane) => {
      const x = l.x(largest(lane.spans.map((i) => l.ends[i]))) + 2,
        y = l.lines.get(lane.key);
      return svg("path", { class: `cut ${lane.finish}`, d: `M${x} ${y - l.bar / 2 - 2}V${y + l.bar / 2 + 2}` });
    });
  return [
    ...ends,
    ...[...at.values()].map(({ spot: [cx, cy], forks }) =>
      svg("circle", { class: forks ? "fork" : "join", cx, cy, r: Math.min(4, l.bar / 3) }),
    ),
  ];
}

/** How many strands decode at once, and the axis. */
function drawHead(l) {
  const root = svg("svg", { width: l.label + l.width + 18, height: HEAD }),
    steps = widths(l.lanes, l.t.spans, l);
  const most = largest(
      steps.map((s) => s[1]),
      1,
    ),
    floor = 34,
    y = (n) => floor - (n / most) * 24,
    left = l.label;
  let d = `M${left + l.x(0)} ${floor}`;
  for (const [at, n] of steps) d += `H${left + l.x(at)}V${y(n)}`;
  root.append(
    svg("path", { class: "profile", d: `${d}V${floor}Z` }),
    svg("text", { class: "soft", x: 8, y: floor - 10 }, isWide() ? `at once, up to ${most}` : `up to ${most}`),
    svg("path", { class: "axis", d: `M${left} ${floor}H${left + l.width}` }),
    svg("text", { class: "soft", x: 8, y: floor + 18 }, l.axis === "time" ? "seconds" : "tokens"),
    ...ticks(l.most, l.width / 90).map((v) =>
      svg("text", { class: "tick", x: left + l.x(v), y: floor + 18, "text-anchor": "middle" }, WHOLE.format(v)),
    ),
  );
  if (l.stub)
    root.append(
      svg(
        "text",
        { class: "tick", x: left + l.stub / 2 - 2, y: floor - 5, "text-anchor": "middle" },
        short(count(l.prompt), 6),
      ),
    );
  return root;
}

/** Round numbers up to `most`, about so many. */
function ticks(most, about) {
  const raw = most / Math.max(2, about),
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw);
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, k) => Number((k * step).toPrecision(12)));
}

function onPoint(event) {
  const l = view.layout,
    box = $("lanes").getBoundingClientRect(),
    at = event.clientX - box.left - l.label;
  const lane = l.lanes[Math.floor((event.clientY - box.top) / l.row)];
  if (!lane || at < 0 || at > l.width) return unpoint();
  $("lanes").querySelector(".hair").setAttribute("d", `M${at} 0V${l.height}`);
  const value = at < l.stub ? null : ((at - l.stub) / (l.width - l.stub)) * l.most;
  $("tip").replaceChildren(...told(l, lane, value).map((line) => el("span", {}, line)));
  $("tip").hidden = false;
  const outer = $("tip").parentElement.getBoundingClientRect(),
    wide = $("tip").offsetWidth;
  $("tip").style.left = `${Math.min(event.clientX - outer.left + 14, outer.width - wide - 4)}px`;
  $("tip").style.top = `${event.clientY - outer.top + $("tip").parentElement.scrollTop + 18}px`;
}

function unpoint() {
  $("tip").hidden = true;
  $("lanes").querySelector(".hair")?.setAttribute("d", "");
}

/** What there is at a place of a lane. */
function told(l, lane, value) {
  if (value === null) return [`prompt: ${many(l.prompt, "token")}`];
  const i = lane.spans.findLast((s) => l.starts[s] <= value && value < l.ends[s]),
    span = l.t.spans[i];
  const step = widths(l.lanes, l.t.spans, l).findLast(([x]) => x <= value);
  const lines = [`${l.axis === "time" ? `at ${seconds(value)}` : `token ${count(value)}`}: ${step?.[1] ?? 0} at once`];
  if (!span) return [...lines, `${nameOf(lane.path)} waits, or is not there`];
  lines.push(
    `${nameOf(lane.path)}: ${span.role}, ${span.open ? "about " : ""}${many(span.tokens, "token")} ${span.origin}`,
  );
  const call = l.t.calls[span.call];
  if (call?.prompt_tokens)
    lines.push(
      `read ${many(call.prompt_tokens, "token")}, ${call.cached_tokens === null ? "unknown how many" : count(call.cached_tokens)} from the cache`,
    );
  if (call)
    lines.push(
      `${seconds(call.started)} to ${seconds(call.ended)}${call.retries ? `, after ${many(call.retries, "failure")}` : ""}`,
    );
  return lines;
}

function onLaneClick(event) {
  const row = event.target.closest("[data-lane]");
  if (!row) return;
  chooseLane(row.dataset.lane);
  if (!isWide()) $("reader").scrollIntoView({ block: "start", behavior: calm() ? "auto" : "smooth" });
}

function onLaneKey(event) {
  const k = view.lanes.findIndex((lane) => lane.key === view.lane),
    { path } = view.lanes[k];
  const to = {
    ArrowDown: k + 1,
    ArrowUp: k - 1,
    Home: 0,
    End: view.lanes.length - 1,
    ArrowLeft: view.lanes.findIndex((lane) => path.length && lane.key === nameOf(path.slice(0, -2))),
    ArrowRight: view.lanes.findIndex(
      (lane) => lane.path.length === path.length + 2 && path.every((p, j) => lane.path[j] === p),
    ),
  }[event.key];
  if (to !== undefined) chooseLane(view.lanes[to]?.key ?? view.lane);
  else if (event.key === "Enter" || event.key === " ") $("reader").focus();
  else return;
  event.preventDefault();
}

function chooseLane(key) {
  const changed = view.lane !== key;
  view.lane = key;
  for (const row of $("lanes").querySelectorAll("[data-lane]"))
    row.setAttribute("aria-selected", String(row.dataset.lane === key));
  $("lanes").setAttribute("aria-activedescendant", `lane-${key}`);
  if (changed) {
    document.getElementById(`lane-${key}`).scrollIntoView({ block: "nearest" });
    drawReader();
  }
}

/* ---- What a branch wrote ---------------------------------------------------------------------------------------- */

const MOST_TEXT = 60_000; // characters that are shown at first

function drawReader() {
  const lane = view.lanes.find((l) => l.key === view.lane),
    reader = $("reader");
  if (!lane || !reader) return;
  reader.setAttribute("aria-label", lane.path.length ? `Text of branch ${lane.key}` : "Text of the trunk");
  reader.replaceChildren(
    el(
      "header",
      {},
      el(
        "h3",
        {},
        lane.path.length ? `Branch ${lane.key}` : "Trunk",
        lane.outline && el("bdi", { class: "outline" }, short(lane.outline, 300)),
      ),
      factsOf(lane),
    ),
    textOf(lane, MOST_TEXT),
  );
}

function factsOf(lane) {
  const { spans, calls } = view.t,
    own = lane.spans.map((i) => spans[i]),
    asked = lane.calls.map((c) => calls[c]);
  const tokens = (origin) => sum(own.filter((span) => span.origin === origin).map((span) => span.tokens));
  const facts = [
    ["decoded", count(tokens("decoded"))],
    ["injected", count(tokens("injected"))],
  ];
  if (tokens("prompt")) facts.unshift(["prompt", count(tokens("prompt"))]);
  if (asked.length) {
    const known = asked.filter((call) => call.cached_tokens !== null),
      cached = sum(known.map((call) => call.cached_tokens));
    facts.push(
      ["cached", count(cached)],
      ["prefilled", count(sum(known.map((call) => call.prompt_tokens)) - cached)],
      ["requests", count(asked.length)],
    );
    facts.push(
      ["from", seconds(Math.min(...asked.map((call) => call.started)))],
      ["to", seconds(largest(asked.map((call) => call.ended)))],
    );
  }
  const retries = sum(asked.map((call) => call.retries));
  if (retries) facts.push(["repeated", count(retries)]);
  if (lane.finish) facts.push(["finish", FINISH[lane.finish]]);
  return el(
    "dl",
    { class: "facts" },
    facts.map(([name, value]) => el("div", { class: name }, el("dt", {}, name), el("dd", {}, value))),
  );
}

/** The text of a strand with links to its branches where they were forked; `most` characters of it. */
function textOf(lane, most) {
  const { spans } = view.t,
    text = el("div", { class: "text", dir: "auto" }),
    seen = new Set();
  let left = most,
    rest = 0;
  spans.forEach((span, i) => {
    const own = laneOf(span);
    if (nameOf(own) === lane.key) {
      const piece = span.text.slice(0, left);
      rest += span.text.length - piece.length;
      left -= piece.length;
      if (piece) text.append(el("span", { class: span.origin, "data-span": i }, plain(piece)));
      return;
    }
    const block = own.slice(0, lane.path.length + 1),
      key = block.join(".");
    if (own.length <= lane.path.length || !lane.path.every((p, k) => own[k] === p) || seen.has(key)) return;
    seen.add(key);
    text.append(branchLinks(block));
  });
  if (rest)
    text.append(
      el(
        "button",
        { type: "button", class: "more", onclick: () => text.replaceWith(textOf(lane, Infinity)) },
        `Show ${count(rest)} more characters`,
      ),
    );
  return text;
}

function branchLinks(block) {
  const inside = view.lanes.filter(
    (lane) => lane.path.length === block.length + 1 && block.every((p, k) => lane.path[k] === p),
  );
  const link = (lane) =>
    el(
      "button",
      { type: "button", class: "chip", onclick: () => chooseLane(lane.key) },
      el("b", {}, lane.key),
      el("bdi", {}, short(lane.outline, 48)),
    );
  return el("span", { class: "branches", role: "group", "aria-label": `Fork into ${inside.length}` }, inside.map(link));
}

/* ---- All of them in plots --------------------------------------------------------------------------------------- */

const PLOT = { width: 460, height: 280, left: 52, right: 14, top: 14, bottom: 44 };

function drawOverview() {
  if (!known.entries.length) return $("overview").replaceChildren(el("p", { class: "nothing" }, "Nothing here yet."));
  PLOT.width = isWide() ? 460 : 340;
  const groups = known.methods.map((method, k) => ({
    method,
    k,
    own: known.entries.filter((e) => e.method === method),
  }));
  const judged = known.entries.some((e) => e.correct !== null),
    sized = known.entries.some((e) => e.size !== null);
  $("overview").replaceChildren(
    el("h2", {}, "Overview"),
    methodTable(groups, judged),
    el(
      "div",
      { class: "plots" },
      judged && solvedPlot(groups, "tokens", "Accuracy against tokens", "tokens, at most"),
      judged &&
        solvedPlot(groups, "critical", "Accuracy against the critical path", "tokens of the critical path, at most"),
      !judged && scatterPlot(groups),
      sized && widthPlot(groups),
      parallelismPlot(groups),
    ),
  );
}

function methodTable(groups, judged) {
  const columns = [
    ["attempts", ({ own }) => count(own.length)],
    judged && ["right", ({ own }) => percent(mean(own.map((e) => Number(e.correct))))],
    ["tokens", ({ own }) => count(mean(own.map((e) => e.tokens)))],
    ["critical path", ({ own }) => count(mean(own.map((e) => e.critical)))],
    ["parallelism", ({ own }) => times(mean(own.map((e) => e.parallelism)))],
    ["forked", ({ own }) => percent(mean(own.map((e) => Number(e.blocks > 0))))],
    ["branches", ({ own }) => mean(own.map((e) => e.branches)).toFixed(1)],
    ["wall time", ({ own }) => seconds(mean(own.map((e) => e.wall)))],
    ["cached", ({ own }) => percent(sum(own.map((e) => e.cached)) / Math.max(1, sum(own.map((e) => e.prompt))))],
  ].filter(Boolean);
  const line = (group) =>
    el(
      "tr",
      {
        onpointerenter: () => single(group.k),
        onpointerleave: () => single(null),
        onfocusin: () => single(group.k),
        onfocusout: () => single(null),
      },
      el("th", { scope: "row" }, methodButton(group)),
      columns.map(([, value]) => el("td", {}, value(group))),
    );
  return el(
    "div",
    { class: "card table" },
    el(
      "table",
      {},
      el("caption", { class: "unseen" }, "Methods, means over their attempts"),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          el("th", { scope: "col" }, "method"),
          columns.map(([name]) => el("th", { scope: "col" }, name)),
        ),
      ),
      el("tbody", {}, groups.map(line)),
    ),
  );
}

/** The name of a method, which lists its attempts. */
function methodButton(group) {
  const choose = () => {
    $("method").value = group.method;
    refilter();
    if (!isWide()) goTo("list", "#");
    $("rows").focus();
  };
  const key = svg(
    "svg",
    { viewBox: "0 0 26 8", "aria-hidden": "true", ...drawn(group.k, "key") },
    svg("path", { d: "M1 4H25" }),
  );
  return el("button", { type: "button", class: "bare", onclick: choose }, key, el("bdi", {}, short(group.method, 60)));
}

/** How a method is drawn. */
const drawn = (k, kind) => ({ class: `${kind} hue-${k % 8}${k >= 8 ? " dashed" : ""}`, "data-method": k });
const lineOf = ({ k, method }, d) => svg("path", { d, ...drawn(k, "line") }, svg("title", {}, plain(method)));

/** Let all methods but one step back in the plots; none with null. */
function single(k) {
  for (const node of document.querySelectorAll("#overview figure [data-method]"))
    node.classList.toggle("faint", k !== null && node.dataset.method !== String(k));
}

/** A plot with its axes. `draw` gets the scales and returns what is drawn in it; `said` says the same in words. */
function plot(title, x, y, said, draw) {
  const { width, height, left, right, top, bottom } = PLOT,
    floor = height - bottom;
  const sx = (v) => left + x.place(v) * (width - left - right),
    sy = (v) => floor - (v / y.most) * (floor - top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${said}` });
  root.append(
    svg("path", { class: "grid", d: y.ticks.map((v) => `M${left} ${sy(v)}H${width - right}`).join("") }),
    svg("path", { class: "axis", d: `M${left} ${floor}H${width - right}` }),
    ...y.ticks.map((v) => svg("text", { class: "tick", x: left - 8, y: sy(v) + 4, "text-anchor": "end" }, y.format(v))),
    ...x.ticks.map((v) =>
      svg("text", { class: "tick", x: sx(v), y: floor + 18, "text-anchor": "middle" }, x.format(v)),
    ),
    svg("text", { class: "label", x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, x.label),
    svg(
      "text",
      { class: "label", transform: `translate(13 ${(top + floor) / 2}) rotate(-90)`, "text-anchor": "middle" },
      y.label,
    ),
    ...draw(sx, sy),
  );
  return el("figure", { class: "card" }, el("figcaption", {}, title), root);
}

const linear = (most, label, about = 5, format = WHOLE.format) => ({
  most,
  label,
  format,
  place: (v) => v / most,
  ticks: ticks(most, about),
});
const shares = (label, most = 1) => ({ ...linear(most, label, 5, percent) });

/** By orders of magnitude, which is what it takes to see methods that spend so differently. */
function logarithmic(least, most, label) {
  const found = [];
  for (let power = 10 ** Math.floor(Math.log10(least)); power <= most; power *= 10)
    found.push(...[1, 2, 5].map((k) => k * power));
  return {
    label,
    format: WHOLE.format,
    place: (v) => Math.max(0, Math.log(v / least) / Math.log(most / least)),
    ticks: found.filter((v) => v >= least && v <= most),
  };
}

/** The share of all problems that a method solves within so many tokens. */
function solvedPlot(groups, of, title, label) {
  const curves = groups.map((g) => ({
    ...g,
    limits: g.own
      .filter((e) => e.correct)
      .map((e) => e[of])
      .sort((a, b) => a - b),
  }));
  const all = curves.flatMap((c) => c.limits).sort((a, b) => a - b),
    most = all.at(-1) ?? 1,
    least = Math.max(1, all[0] ?? 1);
  const far = most / (all[Math.floor(all.length / 10)] || 1) > 12;
  const said = curves
    .map((c) => `${plain(c.method)}: ${percent(c.limits.length / Math.max(1, c.own.length))} in all`)
    .join("; ");
  return plot(
    title,
    far ? logarithmic(least, most * 1.05, label) : linear(most * 1.02, label),
    shares("solved"),
    said,
    (sx, sy) =>
      curves.map((c) => {
        let d = `M${sx(far ? least : 0)} ${sy(0)}`;
        c.limits.forEach((limit, k) => (d += `H${sx(limit).toFixed(1)}V${sy((k + 1) / c.own.length).toFixed(1)}`));
        return lineOf(c, `${d}H${PLOT.width - PLOT.right}`);
      }),
  );
}

function widthPlot(groups) {
  const sizes = [...new Set(known.entries.map((e) => e.size).filter((s) => s !== null))].sort((a, b) => a - b);
  const lines = groups.map((g) => ({
    ...g,
    points: sizes
      .map((s) => [s, g.own.filter((e) => e.size === s)])
      .filter(([, own]) => own.length)
      .map(([s, own]) => [s, mean(own.map((e) => e.branches))]),
  }));
  const most =
    largest(
      lines.flatMap((l) => l.points.map((p) => p[1])),
      1,
    ) * 1.08;
  const x = {
    label: "size of the problem",
    format: String,
    ticks: sizes,
    place: (s) => (sizes.indexOf(s) + 0.5) / sizes.length,
  };
  const said = lines
    .map((l) => `${plain(l.method)}: ${l.points.map(([s, n]) => `${n.toFixed(1)} at size ${s}`).join(", ")}`)
    .join("; ");
  return plot("Width against size", x, linear(most, "branches, mean"), said, (sx, sy) =>
    lines.flatMap((l) => [
      lineOf(l, l.points.map(([s, n], k) => `${k ? "L" : "M"}${sx(s)} ${sy(n)}`).join("")),
      ...l.points.map(([s, n]) => svg("circle", { cx: sx(s), cy: sy(n), r: 4, ...drawn(l.k, "point") })),
    ]),
  );
}

function parallelismPlot(groups) {
  const most = Math.ceil(
      largest(
        known.entries.map((e) => e.parallelism),
        2,
      ),
    ),
    bins = 24,
    wide = (most - 1) / bins;
  const filled = groups.map((g) => {
    const counts = Array(bins).fill(0);
    for (const e of g.own) counts[Math.min(bins - 1, Math.floor((e.parallelism - 1) / wide))]++;
    return { ...g, counts: counts.map((n) => n / Math.max(1, g.own.length)) };
  });
  const high = largest(
    filled.flatMap((f) => f.counts),
    0.1,
  );
  const x = {
    label: "parallelism: tokens by critical path",
    format: (v) => `${v}×`,
    ticks: ticks(most - 1, 5).map((v) => v + 1),
    place: (v) => (v - 1) / (most - 1),
  };
  const said = filled
    .map((f) => `${plain(f.method)}: ${times(mean(f.own.map((e) => e.parallelism)))} on average`)
    .join("; ");
  return plot("Distribution of parallelism", x, shares("of trajectories", Math.min(1, high * 1.08)), said, (sx, sy) =>
    filled.flatMap((f) => {
      let d = `M${sx(1)} ${sy(0)}`;
      f.counts.forEach((share, b) => (d += `V${sy(share)}H${sx(1 + (b + 1) * wide)}`));
      return [svg("path", { d: `${d}V${sy(0)}Z`, ...drawn(f.k, "area") }), lineOf(f, `${d}V${sy(0)}`)];
    }),
  );
}

function scatterPlot(groups) {
  const most =
      largest(
        known.entries.map((e) => e.tokens),
        1,
      ) * 1.04,
    every = Math.ceil(known.entries.length / 3000);
  const said = groups
    .map(
      (g) =>
        `${plain(g.method)}: ${count(mean(g.own.map((e) => e.tokens)))} tokens, critical path ${count(mean(g.own.map((e) => e.critical)))} on average`,
    )
    .join("; ");
  return plot(
    "Critical path against tokens",
    linear(most, "tokens"),
    linear(most, "tokens of the critical path"),
    said,
    (sx, sy) => [
      svg("path", { class: "axis", d: `M${sx(0)} ${sy(0)}L${sx(most)} ${sy(most)}` }),
      ...known.entries
        .filter((e) => e.id % every === 0)
        .map((e) =>
          svg("circle", {
            cx: sx(e.tokens),
            cy: sy(e.critical),
            r: 3.2,
            ...drawn(known.methods.indexOf(e.method), "point"),
          }),
        ),
    ],
  );
}

/* ---- Where one is ------------------------------------------------------------------------------------------------ */

const WIDE = matchMedia("(min-width: 900px)"); // as the style has it
const isWide = () => WIDE.matches;
const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Show the list (on its own where there is no room beside it), the overview, or a trajectory. */
function goTo(name, hash, quietly = false) {
  document.body.dataset.view = name;
  $("detail").hidden = name !== "detail";
  if (location.hash !== hash && !(hash === "#" && !location.hash))
    history[quietly ? "replaceState" : "pushState"](null, "", hash);
  if (name !== "detail") open.asked = view.entry = null;
  if (name === "overview" && !$("overview").childElementCount) drawOverview();
  if (!isWide() && !quietly) scrollTo(0, 0);
}

function route() {
  const entry = known.entries[/^#t(\d+)$/.exec(location.hash)?.[1]];
  if (entry) open(entry, { quietly: true });
  else goTo(location.hash === "#all" || isWide() ? "overview" : "list", location.hash || "#", true);
}

/** Escape goes back one step: from a text to its lane, from there to the list, from a trajectory to the overview. */
function onEscape(event) {
  if (event.key !== "Escape") return;
  if (event.target.closest("#reader")) $("lanes").focus();
  else if (event.target.closest("#lanes") && isWide()) $("rows").focus();
  else if (document.body.dataset.view === "detail") {
    goTo(isWide() ? "overview" : "list", isWide() ? "#all" : "#");
    $("rows").focus();
  } else return;
  event.preventDefault();
}

function start() {
  readIndex();
  setUpList();
  offerChoices();
  $("to-overview").addEventListener("click", () => goTo("overview", "#all"));
  $("to-list").addEventListener("click", () => goTo("list", "#"));
  addEventListener("popstate", route);
  addEventListener("keydown", onEscape);
  new ResizeObserver(() => requestAnimationFrame(drawTimeline)).observe($("detail"));
  WIDE.addEventListener("change", () => drawOverview());
  refilter();
  route();
  document.body.dataset.ready = "";
}

start();
