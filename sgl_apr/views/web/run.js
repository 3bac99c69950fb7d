// A running trajectory: its spans and calls so far, and text that is in no span yet. The events are those of
// `sgl_apr.runtime.event_json`, in the order that `sgl_apr.runtime.events` documents.

function startRun(prompt) {
  return {
    prompt,
    entry: null,
    started: performance.now(),
    ended: "", // how it ended without being complete: stopped, interrupted
    seconds: 0, // when it ended so
    skew: Infinity,
    stopping: new AbortController(),
    done: null,
    spans: [],
    calls: [],
    tools: new Map(),
    writing: new Map(),
    forks: new Map(),
    joined: new Set(),
  };
}

/** Returns the seconds since the trajectory began, by the clock of the server once a request has reported it. */
const clock = (run) =>
  run.ended ? run.seconds : (performance.now() - run.started) / 1000 - (Number.isFinite(run.skew) ? run.skew : 0);

/** Ends a run that is not complete. Nothing of it runs any more. */
function endRun(run, how) {
  run.seconds = clock(run);
  run.ended = how;
}

const inside = (path, outer) => path.length >= outer.length && outer.every((p, k) => path[k] === p);

/** Apply an event to a run, by the kind of the event. */
const EVENT_HANDLERS = {
  delta(run, { path, text }) {
    const key = nameOf(path);
    if (!run.writing.has(key)) {
      const own = run.spans.filter((span) => span && nameOf(span.path) === key);
      if (own.length === 1 && own[0].role === "header" && own[0].text === text) return; // a retry repeats the header, which already has a span
      run.writing.set(key, { path, text: "", since: clock(run) });
    }
    run.writing.get(key).text += text;
  },
  text_retracted(run, { path, chars }) {
    const key = nameOf(path),
      written = [...(run.writing.get(key)?.text ?? "")]; // counts code points, as Python does
    if (chars === null) resetBranch(run, path);
    else if (written.length > chars) run.writing.get(key).text = written.slice(0, written.length - chars).join("");
    else run.writing.delete(key);
  },
  span_finished(run, { index, span }) {
    const key = nameOf(span.path),
      writing = run.writing.get(key),
      { token_ids, ...rest } = span;
    run.spans[index] = { ...rest, tokens: token_ids.length };
    if (!writing) return;
    writing.text = writing.text.slice(span.text.length);
    if (writing.text) writing.since = clock(run);
    else run.writing.delete(key);
  },
  request_finished(run, { index, call }) {
    run.calls[index] = call;
    run.skew = Math.min(run.skew, (performance.now() - run.started) / 1000 - call.ended);
  },
  tool_called(run, { path, id, name, arguments: text }) {
    run.tools.set(id, { id, path, name, arguments: text, result: "", outcome: null, started: clock(run), ended: null });
  },
  tool_returned(run, { call }) {
    run.tools.delete(call.id); // calls are in the order in which they end
    run.tools.set(call.id, call);
    run.skew = Math.min(run.skew, (performance.now() - run.started) / 1000 - call.ended);
  },
  forked(run, { path, branches, first_branch }) {
    branches.forEach(([number, outline], k) => {
      const branch = [...path, first_branch + k];
      run.forks.set(nameOf(branch), { path: branch, outline: outline || number, outcome: null });
    });
  },
  branch_ended(run, { path, outcome }) {
    run.forks.get(nameOf(path)).outcome = outcome;
  },
  joined(run, { path, branches }) {
    branches.forEach((k) => run.joined.add(nameOf([...path, k])));
  },
  done(run, event) {
    run.done = event;
  },
};

/** Resets a branch that is retried: it keeps only its header, and loses its own branches. */
function resetBranch(run, path) {
  const isOwn = (other) => nameOf(other) === nameOf(path);
  run.spans.forEach((span, i) => {
    if (span && inside(span.path, path) && !(isOwn(span.path) && span.role === "header")) delete run.spans[i];
  });
  for (const [key, { path: other }] of run.writing) if (inside(other, path)) run.writing.delete(key);
  for (const [key, { path: other }] of run.forks) if (inside(other, path) && !isOwn(other)) run.forks.delete(key);
  for (const [id, tool] of run.tools) if (inside(tool.path, path) && !tool.outcome) run.tools.delete(id);
  if (run.forks.has(nameOf(path))) run.forks.get(nameOf(path)).outcome = null;
}

/** Returns the trajectory so far. Text that is in no span yet becomes an open span, with estimated tokens. */
function currentTrajectory(run) {
  const place = new Map(),
    calls = [...run.calls].filter(Boolean);
  const spans = [];
  const kept = (indices) => indices.filter((i) => place.has(i)).map((i) => place.get(i));
  const add = (span, i) => {
    if (i !== null) place.set(i, spans.length);
    spans.push({ ...span, parents: kept(span.parents), waits_for: kept(span.waits_for) });
  };
  (run.done ? run.done.order : [...run.spans.keys()]).forEach((i) => run.spans[i] && add(run.spans[i], i));
  const tools = [...run.tools.values()].map((tool) =>
    tool.outcome ? tool : { ...tool, started: Math.min(tool.started, clock(run)), ended: clock(run), open: !run.ended },
  );
  if (run.done) return { ...common(run), spans, calls, tools, forks: [] };
  for (const { id, path, outcome } of tools) {
    if (outcome) continue;
    const last = spans.findLastIndex((span) => nameOf(laneOf(span)) === nameOf(path));
    const running = { role: "observation", origin: "injected", text: "", tokens: 0, path, label: id, outline: "" };
    spans.push({ ...running, finish: null, open: !run.ended, call: null, parents: last < 0 ? [] : [last], waits_for: [] });
  }
  const decoded = spans.filter((span) => span.origin === "decoded");
  const chars =
    sum(decoded.map((span) => span.text.length)) / Math.max(1, sum(decoded.map((span) => span.tokens))) || 4;
  for (const { path, text, since } of run.writing.values()) {
    const call = {
      phase: "open",
      path,
      prompt_tokens: 0,
      cached_tokens: 0,
      new_tokens: 0,
      output_tokens: 0,
      started: since,
      ended: Math.max(since, clock(run)),
      retries: 0,
    };
    const last = spans.findLastIndex((span) => nameOf(laneOf(span)) === nameOf(path));
    const open = {
      role: "text",
      origin: "decoded",
      text,
      tokens: Math.ceil(text.length / chars),
      path,
      label: "",
      outline: "",
      finish: null,
      open: !run.ended,
    };
    spans.push({ ...open, parents: last < 0 ? [] : [last], waits_for: [], call: calls.push(call) - 1 });
  }
  return { ...common(run), running: !run.ended, spans, calls, tools, forks: [...run.forks.values()] };
}

function common({ done, ...run }) {
  if (!done) return { dialect: "", wall: clock(run), limits: [], decisions: [], joins: [], groups: [] };
  const { dialect, wall_s: wall, limits, decisions, joins, groups } = done;
  return { dialect, wall, limits, decisions, joins, groups };
}

/** Returns a row of the list for a trajectory of this page. */
function rowFor(run, t) {
  return {
    name: run.prompt,
    method: t.dialect || run.ended || "running",
    label: run.ended ? "not complete: what had arrived" : "",
    answer: answerOf(t),
    correct: null,
    size: null,
    ...computeFigures(t),
    shape: shapeOf(t),
  };
}

/** Returns the text of the trunk after the last join, call and result of a tool, as `Trajectory.answer` does. */
function answerOf({ spans }) {
  const reply = spans.filter((span) => !isPrompt(span)),
    last = reply.findLastIndex((span) => span.role !== "text" || span.path.length);
  return reply
    .slice(last + 1)
    .map((span) => span.text)
    .join("")
    .trimStart();
}

function shapeOf(t) {
  const { starts, ends } = placedByTokens(t),
    max = Math.max(1, largest(ends, 0));
  return lanesOf(t)
    .filter((lane) => lane.spans.length)
    .slice(0, MAX_CARDS)
    .flatMap(({ spans }) =>
      [Math.min(...spans.map((i) => starts[i])), largest(spans.map((i) => ends[i]))].map((x) =>
        Math.round((100 * x) / max),
      ),
    );
}
