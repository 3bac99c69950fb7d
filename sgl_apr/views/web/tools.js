// Calls of tools: which spans are about them, their seconds, and how they are drawn and described.

const TOOL_OUTCOME = {
  ok: "returned",
  error: "failed",
  timeout: "timed out",
  cancelled: "cancelled",
  refused: "refused",
  length: "cut off by a token limit",
};

/** Returns the calls that a span is about: what it calls, or what it has the results of. */
function toolsOf(t, span) {
  if (!t.tools?.length || (span.role !== "call" && span.role !== "observation")) return [];
  const ids = span.label.split(/\s+/);
  return t.tools.filter((tool) => ids.includes(tool.id));
}

/** Returns how long a call has taken. One that runs has taken the time so far. */
const toolSeconds = (tool) => tool.ended - tool.started;

/** Returns the seconds in which at least one of these calls ran. */
function unionSeconds(tools) {
  let total = 0,
    edge = -Infinity;
  for (const { started, ended } of [...tools].sort((a, b) => a.started - b.started)) {
    total += Math.max(0, ended - Math.max(started, edge));
    edge = Math.max(edge, ended);
  }
  return total;
}

/** Computes the figures of tools, as `Trajectory.metrics()` does. */
function toolFigures(t) {
  const ends = [];
  t.spans.forEach((span, i) => {
    const own = span.role === "call" ? unionSeconds(toolsOf(t, span)) : 0;
    ends[i] =
      own +
      largest(
        predecessors(span).map((p) => ends[p]),
        0,
      );
  });
  const tools = t.tools ?? [];
  return { tools: tools.length, tool_s: sum(tools.map(toolSeconds)), critical_tool_s: largest(ends, 0) };
}

/** Returns how a call ended and how long it took. */
const describeOutcome = (tool) =>
  tool.outcome === "length"
    ? TOOL_OUTCOME.length
    : `${TOOL_OUTCOME[tool.outcome] ?? (tool.open ? "running" : "did not return")}, ${seconds(toolSeconds(tool))}`;

/** Returns the lines of a tooltip about the calls of a span. */
function toolLines(t, span) {
  return toolsOf(t, span)
    .slice(0, 4)
    .flatMap((tool) => [
      `${short(tool.name, 40)} ${short(tool.arguments, 90)}`,
      `${describeOutcome(tool)}${tool.result ? `: ${short(tool.result, 90)}` : ""}`,
    ]);
}

/** Draws marks that do not depend on colours: a frame around calls, stripes over results, a line where a call failed. */
function toolMarks(l) {
  const marks = [];
  l.t.spans.forEach((span, i) => {
    if (span.role !== "call" && span.role !== "observation") return;
    const left = l.x(l.starts[i]),
      right = Math.max(left + 1.6, l.x(l.ends[i]) - 0.6),
      top = l.y(i) - l.bar / 2;
    if (span.role === "call") marks.push(svg("path", { class: "call-frame", d: `M${left} ${top}H${right}v${l.bar}H${left}Z` }));
    else {
      const stripes = Array.from({ length: Math.min(400, Math.floor((right - left) / 5)) }, (_, k) => `M${left + 3 + 5 * k} ${top}v${l.bar}`);
      marks.push(svg("path", { class: "stripes", d: stripes.join("") }));
      if (toolsOf(l.t, span).some((tool) => tool.outcome && tool.outcome !== "ok"))
        marks.push(svg("path", { class: "cut failed", d: `M${right + 1} ${top - 2}v${l.bar + 4}` }));
    }
  });
  return marks;
}

/** Returns what stands before the text of a call: for each call its tool, its outcome and its seconds. */
const toolChips = (t, span) =>
  span.role !== "call"
    ? []
    : toolsOf(t, span).map((tool) =>
        el(
          "span",
          { class: `tool${tool.outcome && tool.outcome !== "ok" ? " wrong" : ""}` },
          el("b", {}, el("bdi", {}, short(tool.name, 40) || "(no name)")),
          describeOutcome(tool),
        ),
      );
