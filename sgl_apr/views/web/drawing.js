// Draws the lanes of a trajectory, and the axis above them.

const HEAD = 62; // height of the part above the lanes
const STUB = 26; // width of the prompt, which is not part of any chain

/** Returns the positions of everything that is drawn of a trajectory, in pixels. */
function layout() {
  const { t, lanes, axis } = view,
    placed = axis === "time" ? placedByTime(t) : placedByTokens(t);
  const box = $("lanes"),
    label = isWide() ? 208 : 88,
    width = Math.max(120, box.clientWidth - label - 18);
  const row = lanes.length <= 12 ? 32 : lanes.length <= 48 ? 26 : 20;
  const max = axis === "time" ? Math.max(t.wall, largest(placed.ends, 0), 1e-3) : Math.max(1, largest(placed.ends, 0));
  const prompt = sum(t.spans.filter(isPrompt).map((span) => span.tokens)),
    stub = axis === "tokens" && prompt ? STUB : 0;
  const x = (value) => (value < 0 ? stub * (1 + Math.max(-1, value / prompt)) : stub + (value / max) * (width - stub));
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
    max,
    prompt,
    stub,
    x,
    y,
    lines,
    height: lanes.length * row,
    bar: Math.round(row * 0.4),
  };
}

/** Draws the lanes, from back to front: grid, critical path, edges, prompts that were read, spans that were written. */
function drawing(l, chain, on) {
  const root = svg("svg", { class: "drawing", width: l.width + 10, height: l.height, "aria-hidden": "true" });
  root.append(
    svg("path", {
      class: "grid",
      d: ticks(l.max, l.width / 90)
        .map((v) => `M${l.x(v)} 0V${l.height}`)
        .join(""),
    }),
    markOf(l, chain),
    ...baselines(l),
    ...edges(l, chain),
    ...l.t.calls.flatMap((call, c) => strip(l, call, c)),
    ...bars(l, on),
    ...toolMarks(l),
    ...dots(l),
    svg("path", { class: "crosshair", d: "" }),
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

/** Draws a line where a sequence waits. */
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

/** Returns the path between two sequences: down to a branch at its fork, up from it at its join. */
function curve(x0, y0, x1, y1) {
  const bend = Math.min(6, x1 - x0, Math.abs(y1 - y0)),
    turn = y1 > y0 ? bend : -bend;
  if (y0 === y1) return `M${x0} ${y0}H${x1}`;
  if (y1 > y0) return `M${x0} ${y0}V${y1 - turn}Q${x0} ${y1} ${x0 + bend} ${y1}H${x1}`;
  return `M${x0} ${y0}H${x1 - bend}Q${x1} ${y0} ${x1} ${y0 + turn}V${y1}`;
}

/** Draws forks and joins between sequences, dashed if only a message is joined. */
function edges(l, chain) {
  const critical = new Set(chain.slice(0, -1).map((i, k) => `${chain[k + 1]} ${i}`)),
    drawn = [[], []]; // off and on the critical path
  l.t.spans.forEach((span, i) => {
    for (const p of predecessors(span)) {
      if (l.y(p) === l.y(i)) continue;
      const on = critical.has(`${p} ${i}`),
        kind = span.waits_for.includes(p) ? "message" : "seen";
      drawn[Number(on)].push(
        svg("path", {
          class: `edge ${kind}${on ? " on" : ""}`,
          d: curve(l.x(isPrompt(l.t.spans[p]) ? 0 : l.ends[p]), l.y(p), l.x(l.starts[i]), l.y(i)),
        }),
      );
    }
  });
  return drawn.flat();
}

/** Draws what a request read: by tokens, the context before its output; by time, the cached share of its prompt. */
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
  if (first === undefined) return [0, 0, 0]; // it wrote nothing: a commit
  const end = l.starts[first],
    earlier = own.filter((i) => i < first && l.t.spans[i].call !== null).map((i) => l.ends[i]);
  const left = Math.max(end - call.prompt_tokens, -l.prompt, largest(earlier));
  return [left, Math.max(left, end - (call.prompt_tokens - (call.cached_tokens ?? 0))), end].map(l.x);
}

/** Draws the spans. Decoded spans come last, so that they cover others at the same place. */
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

/** Draws forks and joins, and marks sequences that were stopped. */
function dots(l) {
  const at = new Map();
  l.t.spans.forEach((span, i) => {
    for (const p of predecessors(span)) {
      if (l.y(p) === l.y(i) || isPrompt(l.t.spans[p])) continue;
      const forks = laneOf(span).length > laneOf(l.t.spans[p]).length;
      const spot = forks ? [l.x(l.ends[p]), l.y(p)] : [l.x(l.starts[i]), l.y(i)];
      at.set(spot.map(Math.round).join(), { spot, forks });
    }
  });
  const ends = l.lanes
    .filter((lane) => SHORT_FINISH[lane.finish] && lane.spans.length)
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

/** Draws how many sequences decode in parallel, and the axis. */
function drawHead(l) {
  const root = svg("svg", { width: l.label + l.width + 18, height: HEAD }),
    steps = concurrency(l.lanes, l.t.spans, l);
  const max = largest(
      steps.map((s) => s[1]),
      1,
    ),
    floor = 34,
    y = (n) => floor - (n / max) * 24,
    left = l.label;
  let d = `M${left + l.x(0)} ${floor}`;
  for (const [at, n] of steps) d += `H${left + l.x(at)}V${y(n)}`;
  root.append(
    svg("path", { class: "profile", d: `${d}V${floor}Z` }),
    svg("text", { class: "soft", x: 8, y: floor - 10 }, isWide() ? `in parallel, up to ${max}` : `up to ${max}`),
    svg("path", { class: "axis", d: `M${left} ${floor}H${left + l.width}` }),
    svg("text", { class: "soft", x: 8, y: floor + 18 }, l.axis === "time" ? "seconds" : "tokens"),
    ...ticks(l.max, l.width / 90).map((v) =>
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
