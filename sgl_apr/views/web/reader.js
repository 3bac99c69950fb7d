// Shows the text of a sequence, with its figures.

const MAX_TEXT_CHARS = 60_000; // characters that are shown at first

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
    textOf(lane, MAX_TEXT_CHARS),
  );
}

function factsOf(lane) {
  const { spans, calls } = view.t,
    own = lane.spans.map((i) => spans[i]),
    requests = lane.calls.map((c) => calls[c]);
  const tokens = (origin) => sum(own.filter((span) => span.origin === origin).map((span) => span.tokens));
  const facts = [
    ["decoded", count(tokens("decoded"))],
    ["injected", count(tokens("injected"))],
  ];
  if (tokens("prompt")) facts.unshift(["prompt", count(tokens("prompt"))]);
  if (requests.length) {
    const known = requests.filter((call) => call.cached_tokens !== null),
      cached = sum(known.map((call) => call.cached_tokens));
    facts.push(
      ["cached", count(cached)],
      ["prefilled", count(sum(known.map((call) => call.prompt_tokens)) - cached)],
      ["requests", count(requests.length)],
    );
    facts.push(
      ["from", seconds(Math.min(...requests.map((call) => call.started)))],
      ["to", seconds(largest(requests.map((call) => call.ended)))],
    );
  }
  const tools = (view.t.tools ?? []).filter((tool) => nameOf(tool.path) === lane.key);
  if (tools.length) facts.push(["tools", count(tools.length)], ["tool time", seconds(sum(tools.map(toolSeconds)))]);
  const retries = sum(requests.map((call) => call.retries));
  if (retries) facts.push(["retries", count(retries)]);
  if (lane.finish) facts.push(["finish", FINISH[lane.finish]]);
  return el(
    "dl",
    { class: "facts" },
    facts.map(([name, value]) => el("div", { class: name }, el("dt", {}, name), el("dd", {}, value))),
  );
}

/** Returns the first `max` characters of the text of a sequence, with links to its branches where they were forked. */
function textOf(lane, max) {
  const { spans } = view.t,
    text = el("div", { class: "text", dir: "auto" }),
    seen = new Set();
  let left = max,
    rest = 0;
  spans.forEach((span, i) => {
    const own = laneOf(span);
    if (nameOf(own) === lane.key) {
      const piece = span.text.slice(0, left);
      rest += span.text.length - piece.length;
      left -= piece.length;
      if (piece) text.append(...toolChips(view.t, span));
      if (piece) text.append(el("span", { class: span.origin, "data-span": i, "data-role": span.role }, plain(piece)));
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
