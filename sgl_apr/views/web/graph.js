// A trajectory as a graph: its sequences, where spans begin and end, and the critical path.

const nameOf = (path) => path.join(".") || "trunk";
const predecessors = (span) => [...span.parents, ...span.waits_for];
const isPrompt = (span) => span.origin === "prompt";

/** Returns the path of the sequence whose text contains a span: the result of a branch is in its parent's text. */
const laneOf = (span) => (span.role === "result" ? span.path.slice(0, -2) : span.path);

function byPath(a, b) {
  for (let k = 0; k < Math.min(a.path.length, b.path.length); k++)
    if (a.path[k] !== b.path[k]) return a.path[k] - b.path[k];
  return a.path.length - b.path.length;
}

/** Returns the sequences in the order of the text: path, indices of their spans and calls, outline, finish, tokens. */
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
    const continues = span.finish === "stop" && ["fork", "wait", "call"].includes(span.role);
    if (!continues) own.finish = span.finish ?? own.finish;
    if (span.role === "header" || span.role === "result") {
      const branch = lane(span.path);
      branch.outline ||= span.outline || span.label;
    }
  });
  t.calls.forEach((call, c) => lane(call.path).calls.push(c));
  t.forks?.forEach(({ path, outline }) => (lane(path).outline ||= outline)); // branches without text so far
  return [...lanes.values()].sort(byPath);
}

/** Returns where each span begins and ends in tokens: it begins at the end of the longest chain before it. */
function placedByTokens({ spans }) {
  const starts = [],
    ends = [];
  spans.forEach((span, i) => {
    starts[i] = largest(
      predecessors(span).map((p) => ends[p]),
      0,
    );
    ends[i] = starts[i] + (isPrompt(span) ? 0 : span.tokens);
  });
  return { starts, ends };
}

/**
 * Returns where each span begins and ends in seconds. Decoded spans share the time of their request by tokens, and the result
 * of a tool takes the time in which the tool ran.
 */
function placedByTime(t) {
  const { spans, calls } = t;
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
    const tools = span.role === "observation" ? toolsOf(t, span) : [];
    if (!tools.length) return;
    starts[i] = Math.min(...tools.map((tool) => tool.started));
    ends[i] = largest(tools.map((tool) => tool.ended));
  });
  spans.forEach((span, i) => {
    if (starts[i] === undefined)
      starts[i] = ends[i] = largest(
        predecessors(span).map((p) => ends[p]),
        0,
      );
  });
  return { starts, ends };
}

/** Returns the longest chain of spans, the critical path, from its end to its beginning. */
function chainOf(spans, ends) {
  const chain = [];
  let at = ends.reduce((best, end, i) => (best < 0 || end >= ends[best] ? i : best), -1);
  while (at >= 0) {
    chain.push(at);
    at = predecessors(spans[at]).reduce((best, p) => (best < 0 || ends[p] > ends[best] ? p : best), -1);
  }
  return chain;
}

/** Returns how many sequences decode in parallel, as steps [from, number]. */
function concurrency(lanes, spans, { starts, ends }) {
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

/** Computes the metrics of a trajectory that has no row in the index, as `Trajectory.metrics()` does. */
function computeFigures(t) {
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
    ...toolFigures(t),
  };
}

/** Returns how many prompt tokens of a call were prefilled again, 0 if that is unknown. */
const again = (call) =>
  call.cached_tokens === null ? 0 : Math.max(0, call.prompt_tokens - call.new_tokens - call.cached_tokens);
