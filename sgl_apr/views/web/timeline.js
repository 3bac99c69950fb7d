// The timeline of a trajectory: its lanes, their selection, and the tooltip.

const LEGEND = [
  ["decoded", "decoded"],
  ["injected", "injected by the runtime"],
  ["cached", "read from the cache"],
  ["prefilled", "prefilled"],
  ["fork", "fork"],
  ["join", "join"],
  ["critical", "critical path"],
];
const TOOL_LEGEND = [
  ["call", "call of a tool"],
  ["observation", "its result"],
];
const TOOL_CAPTION = {
  tokens: "Framed bars are calls of tools, striped bars their results.",
  time: "Framed bars are calls of tools. Striped bars are tools while they ran.",
};
const CAPTION = {
  tokens:
    "Thick bars are what was written; each begins at the end of the longest chain before it. Thin bars are what each request read first.",
  time: "Thick bars are requests while they decoded. Thin bars are the share of each prompt that was cached.",
};
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
        [...LEGEND, ...(view.t.tools?.length ? TOOL_LEGEND : [])].map(([key, name]) => el("li", { class: key }, name)),
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
        "aria-label": "Branches: select with the arrow keys, read with Enter, go back with Escape",
        onkeydown: onLaneKey,
        onclick: onLaneClick,
      }),
      el("div", { id: "tip", hidden: true, "aria-hidden": "true" }),
    ),
    el("p", { id: "caption" }),
  );
}

function drawTimeline() {
  if (!$("lanes")) return;
  const l = (view.layout = layout());
  $("lanes").style.setProperty("--label", `${l.label}px`);
  $("lanes").style.setProperty("--row", `${l.row}px`);
  const chain = chainOf(l.t.spans, l.ends),
    on = new Set(chain);
  $("lanes-head").replaceChildren(drawHead(l));
  $("caption").textContent = [CAPTION[l.axis], l.t.tools?.length && TOOL_CAPTION[l.axis], exceptionOf(l, on)].filter(Boolean).join(" ");
  $("lanes").replaceChildren(drawing(l, chain, on), ...l.lanes.map((lane) => laneRow(lane, on)));
  chooseLane(view.lane);
}

/** Returns a sentence if the longest branch is not on the critical path, which is then no mistake of the drawing. */
function exceptionOf(l, on) {
  const { spans } = l.t,
    length = (lane) => sum(lane.spans.map((i) => l.ends[i] - l.starts[i])),
    isOn = (lane) => lane.spans.some((i) => on.has(i) && !isPrompt(spans[i])),
    branches = l.lanes.filter((lane) => lane.path.length && lane.spans.length);
  const longest = branches.reduce((best, lane) => (!best || length(lane) > length(best) ? lane : best), null);
  if (!longest || isOn(longest)) return "";
  const own = new Set(longest.spans),
    isFollowed = spans.some((span, i) => !own.has(i) && predecessors(span).some((p) => own.has(p)));
  const why = isFollowed ? "what follows it had to wait longer for others" : "nothing that follows had to wait for it";
  return `Branch ${longest.key} is the longest, but not on the critical path: ${why}.`;
}

function laneRow(lane, on) {
  const critical = lane.spans.some((i) => on.has(i) && !isPrompt(view.t.spans[i]));
  const description = [
    lane.path.length ? `Branch ${lane.key}` : "Trunk",
    lane.outline && short(lane.outline, 120),
    plural(lane.tokens, "token"),
    FINISH[lane.finish],
    critical && "on the critical path",
  ].filter(Boolean);
  const name = el(
    "span",
    { class: "lane-name" },
    el("b", {}, nameOf(lane.path)),
    el("bdi", { class: "outline" }, short(lane.outline, 80)),
    SHORT_FINISH[lane.finish] && el("span", { class: `end ${lane.finish}` }, SHORT_FINISH[lane.finish]),
    el("span", { class: "tokens" }, count(lane.tokens)),
  );
  name.style.paddingInlineStart = `${8 + Math.max(0, lane.depth - 1) * (isWide() ? 14 : 5)}px`;
  return el(
    "div",
    { role: "option", class: "lane", id: `lane-${lane.key}`, "data-lane": lane.key, "aria-label": description.join(", ") },
    name,
  );
}

function onPoint(event) {
  const l = view.layout,
    box = $("lanes").getBoundingClientRect(),
    at = event.clientX - box.left - l.label;
  const lane = l.lanes[Math.floor((event.clientY - box.top) / l.row)];
  if (!lane || at < 0 || at > l.width) return unpoint();
  $("lanes").querySelector(".crosshair").setAttribute("d", `M${at} 0V${l.height}`);
  const value = at < l.stub ? null : ((at - l.stub) / (l.width - l.stub)) * l.max;
  $("tip").replaceChildren(...tooltipLines(l, lane, value).map((line) => el("span", {}, line)));
  $("tip").hidden = false;
  const outer = $("tip").parentElement.getBoundingClientRect(),
    wide = $("tip").offsetWidth;
  $("tip").style.left = `${Math.min(event.clientX - outer.left + 14, outer.width - wide - 4)}px`;
  $("tip").style.top = `${event.clientY - outer.top + $("tip").parentElement.scrollTop + 18}px`;
}

function unpoint() {
  $("tip").hidden = true;
  $("lanes").querySelector(".crosshair")?.setAttribute("d", "");
}

/** Returns the lines of the tooltip at a place of a lane. */
function tooltipLines(l, lane, value) {
  if (value === null) return [`prompt: ${plural(l.prompt, "token")}`];
  const i = lane.spans.findLast((s) => l.starts[s] <= value && value < l.ends[s]),
    span = l.t.spans[i];
  const step = concurrency(l.lanes, l.t.spans, l).findLast(([x]) => x <= value);
  const lines = [`${l.axis === "time" ? `at ${seconds(value)}` : `token ${count(value)}`}: ${step?.[1] ?? 0} in parallel`];
  if (!span) return [...lines, `${nameOf(lane.path)} waits or does not exist`];
  lines.push(
    `${nameOf(lane.path)}: ${span.role}, ${span.open ? "about " : ""}${plural(span.tokens, "token")} ${span.origin}`,
  );
  lines.push(...toolLines(l.t, span));
  const call = l.t.calls[span.call];
  if (call?.prompt_tokens)
    lines.push(
      `read ${plural(call.prompt_tokens, "token")}, ${call.cached_tokens === null ? "unknown number" : count(call.cached_tokens)} cached`,
    );
  if (call)
    lines.push(
      `${seconds(call.started)} to ${seconds(call.ended)}${call.retries ? `, after ${plural(call.retries, "failure")}` : ""}`,
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
