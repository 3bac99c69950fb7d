// A trajectory under way: spans and calls by their numbers, and text that is in no span yet. The events are those of
// `sgl_apr.runtime.event_json`, in the order that `sgl_apr.runtime.events` promises.

function begin(prompt) {
  return {
    prompt,
    entry: null,
    started: performance.now(),
    skew: Infinity,
    stopping: new AbortController(),
    done: null,
    spans: [],
    calls: [],
    writing: new Map(),
    forks: new Map(),
    joined: new Set(),
  };
}

/** Seconds since the trajectory began, by the clock of the server as far as it has told it. */
const clock = (run) => (performance.now() - run.started) / 1000 - (Number.isFinite(run.skew) ? run.skew : 0);

const inside = (path, outer) => path.length >= outer.length && outer.every((p, k) => path[k] === p);

/** What each kind of event changes. */
const HEARD = {
  delta(run, { path, text }) {
    const key = nameOf(path);
    if (!run.writing.has(key)) {
      const own = run.spans.filter((span) => span && nameOf(span.path) === key);
      if (own.length === 1 && own[0].role === "header" && own[0].text === text) return; // it begins anew, its header does not
      run.writing.set(key, { path, text: "", since: clock(run) });
    }
    run.writing.get(key).text += text;
  },
  retried(run, { path, chars }) {
    const key = nameOf(path),
      written = [...(run.writing.get(key)?.text ?? "")]; // characters are counted as Python does
    if (chars === null) forget(run, path);
    else if (written.length > chars) run.writing.get(key).text = written.slice(0, written.length - chars).join("");
    else run.writing.delete(key);
  },
  wrote(run, { index, span }) {
    const key = nameOf(span.path),
      writing = run.writing.get(key),
      { token_ids, ...rest } = span;
    run.spans[index] = { ...rest, tokens: token_ids.length };
    if (!writing) return;
    writing.text = writing.text.slice(span.text.length);
    if (writing.text) writing.since = clock(run);
    else run.writing.delete(key);
  },
  called(run, { index, call }) {
    run.calls[index] = call;
    run.skew = Math.min(run.skew, (performance.now() - run.started) / 1000 - call.ended);
  },
  forked(run, { path, branches, first }) {
    branches.forEach(([number, outline], k) => {
      const branch = [...path, first + k];
      run.forks.set(nameOf(branch), { path: branch, outline: outline || number, outcome: null });
    });
  },
  ended(run, { path, outcome }) {
    run.forks.get(nameOf(path)).outcome = outcome;
  },
  joined(run, { path, branches }) {
    branches.forEach((k) => run.joined.add(nameOf([...path, k])));
  },
  done(run, event) {
    run.done = event;
  },
};

/** A branch that begins anew loses all but its header, and all that it has forked. */
function forget(run, path) {
  const isOwn = (other) => nameOf(other) === nameOf(path);
  run.spans.forEach((span, i) => {
    if (span && inside(span.path, path) && !(isOwn(span.path) && span.role === "header")) delete run.spans[i];
  });
  for (const [key, { path: other }] of run.writing) if (inside(other, path)) run.writing.delete(key);
  for (const [key, { path: other }] of run.forks) if (inside(other, path) && !isOwn(other)) run.forks.delete(key);
  if (run.forks.has(nameOf(path))) run.forks.get(nameOf(path)).outcome = null;
}

/** The trajectory as far as it is known. What is in no span yet becomes one that is open, its tokens estimated. */
function soFar(run) {
  const place = new Map(),
    calls = [...run.calls].filter(Boolean);
  const spans = [];
  const kept = (indices) => indices.filter((i) => place.has(i)).map((i) => place.get(i));
  const add = (span, i) => {
    if (i !== null) place.set(i, spans.length);
    spans.push({ ...span, parents: kept(span.parents), waits_for: kept(span.waits_for) });
  };
  (run.done ? run.done.order : [...run.spans.keys()]).forEach((i) => run.spans[i] && add(run.spans[i], i));
  if (run.done) return { ...common(run), spans, calls, forks: [] };
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
    const tip = spans.findLastIndex((span) => nameOf(laneOf(span)) === nameOf(path));
    const open = {
      role: "text",
      origin: "decoded",
      text,
      tokens: Math.ceil(text.length / chars),
      path,
      label: "",
      outline: "",
      finish: null,
      open: true,
    };
    spans.push({ ...open, parents: tip < 0 ? [] : [tip], after: [], call: calls.push(call) - 1 });
  }
  return { ...common(run), running: true, spans, calls, forks: [...run.forks.values()] };
}

function common({ done, ...run }) {
  if (!done) return { dialect: "", wall: clock(run), limits: [], decisions: [], joins: [] };
  const { dialect, wall_s: wall, limits, decisions, joins } = done;
  return { dialect, wall, limits, decisions, joins };
}

/** A row of the list for a trajectory that no file has one of. */
function rowFor(run, t) {
  return {
    name: run.prompt,
    method: t.dialect || "running",
    label: "",
    answer: answerOf(t),
    correct: null,
    size: null,
    ...figures(t),
    shape: shapeOf(t),
  };
}

/** Text of the trunk behind the last join, as `Trajectory.answer` has it. */
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
    most = Math.max(1, largest(ends, 0));
  return lanesOf(t)
    .filter((lane) => lane.spans.length)
    .slice(0, CARDS)
    .flatMap(({ spans }) =>
      [Math.min(...spans.map((i) => starts[i])), largest(spans.map((i) => ends[i]))].map((x) =>
        Math.round((100 * x) / most),
      ),
    );
}
