// Shows one trajectory: its figures, and the limits, joins and pacing that affected it.

const view = { entry: null, t: null, lanes: [], lane: "trunk", axis: "tokens" };

/** Shows a trajectory. With `focus`, the focus moves to its timeline. */
async function openEntry(entry, { focus = false, quietly = false, lane = "trunk" } = {}) {
  openEntry.requested = entry;
  const t = await trajectoryOf(entry);
  if (openEntry.requested !== entry) return; // another one was selected meanwhile
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
    openEntry(list.shown[list.at]);
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
    el("div", { class: "steps" }, step(-1, "Previous", "M3 10l5-5 5 5"), step(1, "Next", "M3 6l5 5 5-5")),
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
      entry.tokens && `${percent(1 - entry.critical / entry.tokens)} fewer than all tokens`,
    ),
    tile("parallelism", times(entry.parallelism), "parallelism", "tokens / critical path"),
    tile("branches", count(entry.branches), entry.branches === 1 ? "branch" : "branches", plural(entry.blocks, "fork")),
    tile("wall", seconds(entry.wall), "wall time", plural(entry.calls, "request")),
    tile(
      "cached",
      entry.prompt ? percent(entry.cached / entry.prompt) : "–",
      "of prompts cached",
      entry.prompt &&
        `${count(entry.prompt - entry.cached)} prefilled${entry.again ? `, ${count(entry.again)} again` : ""}`,
    ),
    entry.tools
      ? tile(
          "tools",
          seconds(entry.tool_s),
          plural(entry.tools, "call of tools", "calls of tools"),
          `${seconds(entry.critical_tool_s)} on the longest chain`,
        )
      : null,
  );
}

/** Lists the limits that applied, how blocks were joined, which are groups of workers, and where pacing reduced the parallelism. */
function notesOf(t) {
  const by = new Map();
  const note = (what, path) => by.set(what, [...(by.get(what) ?? []), nameOf(path)]);
  t.limits.forEach(({ limit, path }) => note(`limit reached: ${limit}`, path));
  t.joins.forEach(({ path, by: kind, why }) =>
    note(kind === "kv" ? "joined in the KV cache" : `joined as text${why ? `: ${why}` : ""}`, path),
  );
  t.groups?.forEach(({ path, kind }) =>
    note(`its branches saw one another's tokens as they were written (${kind})`, path),
  );
  t.decisions
    .filter((d) => d.parallelism < d.branches)
    .forEach((d) => note(`${d.parallelism} of ${d.branches} branches in parallel: ${d.reason}`, d.path));
  if (!by.size) return [];
  const items = [...by].map(([what, paths]) =>
    el(
      "li",
      {},
      el("bdi", {}, short(what, 200)),
      el("span", { class: "soft" }, ` at ${paths.slice(0, 8).join(", ")}${paths.length > 8 ? " …" : ""}`),
    ),
  );
  return [el("ul", { class: "notes", "aria-label": "Limits, joins, groups and pacing" }, items)];
}

function otherAttempts(entry) {
  const others = known.entries.filter((e) => e !== entry && e.name === entry.name).slice(0, 24);
  if (!others.length) return [];
  const links = others.map((e) =>
    el(
      "button",
      { type: "button", class: `chip hue-${e.hue}`, onclick: () => openEntry(e) },
      el("span", { class: "method" }, el("bdi", {}, short(e.method, 40))),
      e.correct === null ? "" : e.correct ? "✓" : "✗",
      ` ${count(e.tokens)} tokens`,
    ),
  );
  return [el("p", { class: "others" }, el("span", { class: "soft" }, "Same problem:"), ...links)];
}
