/* ==== What a server adds: trajectories that it is asked for here, followed as they are written =================== */

// The events are those of `sgl_apr.server.wire`, in the order that `sgl_apr.runtime.events` promises.

const OFTEN = 120; // milliseconds between two pictures
const TAIL = 420; // characters of a branch that can be read while it runs
const CARDS = 12; // branches whose text is shown while they run
const live = { run: null };

/* ---- A trajectory under way: spans and calls by their numbers, and text that is in no span yet ----------------- */

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
    spans.push({ ...span, parents: kept(span.parents), after: kept(span.after) });
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

/* ---- Asking ------------------------------------------------------------------------------------------------------- */

/** What is asked for, without what is left to the server. */
function asked() {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const budget = { width: number("width"), tokens: number("tokens") };
  return {
    prompt: $("prompt").value,
    stream: true,
    mode: $("mode").value,
    dialect: $("dialect").value || undefined,
    temperature: number("temperature"),
    seed: number("seed"),
    budget: Object.values(budget).some((n) => n !== undefined) ? budget : undefined,
  };
}

/** A request to the server that this page is from. The key is in its field and nowhere else. */
async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const response = await fetch(path, {
    ...options,
    headers,
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
  });
  if (response.ok) return response;
  if (response.status === 401) {
    $("key").focus();
    throw new Error("This server wants an API key.");
  }
  const { error } = await response.json().catch(() => ({}));
  throw new Error(error?.message ?? error ?? `The server answered with status ${response.status}.`);
}

/** The events of a stream, one object each. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (left + value).split("\n");
    left = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function ask(event) {
  event.preventDefault();
  if (live.run || !$("prompt").value) return;
  const run = (live.run = begin($("prompt").value));
  const drawing = setInterval(() => run.entry && drawRun(run), OFTEN);
  say("Asked …");
  try {
    const response = await request("generate", {
      method: "POST",
      body: JSON.stringify(asked()),
      signal: run.stopping.signal,
    });
    for await (const heard of eventsOf(response)) {
      if (heard.error) throw new Error(heard.error.message);
      HEARD[heard.event]?.(run, heard);
      if (!run.entry) drawRun(run);
    }
    finish(run);
  } catch (error) {
    if (run.entry) drawRun(run);
    say(run.stopping.signal.aborted ? "Stopped." : plain(String(error.message)), !run.stopping.signal.aborted);
  } finally {
    clearInterval(drawing);
    live.run = null;
    $("now")?.remove();
    showButtons();
  }
}

function say(text, wrong = false) {
  $("state").textContent = text;
  $("state").classList.toggle("wrong", wrong);
  showButtons();
}

function showButtons() {
  const running = Boolean(live.run);
  $("run").disabled = running;
  $("stop").hidden = !running;
  $("follow").hidden = !running || !live.run.entry || view.entry === live.run.entry;
}

function finish(run) {
  if (!run.done) throw new Error("The stream ended before the trajectory did.");
  const t = soFar(run),
    seen = view.entry === run.entry,
    { lane } = view,
    entry = addEntry(rowFor(run, t), t);
  $("overview").replaceChildren();
  offerChoices();
  refilter();
  say(`Done in ${seconds(t.wall)}.`);
  if (seen) open(entry, { quietly: true, lane });
}

/* ---- Drawing what runs -------------------------------------------------------------------------------------------- */

function drawRun(run) {
  const t = soFar(run),
    row = rowFor(run, t),
    first = !run.entry;
  run.entry = Object.assign(run.entry ?? { id: "running", hue: 0 }, row);
  run.entry.parallelism = row.critical ? row.tokens / row.critical : 1;
  say(`${seconds(clock(run))}, about ${many(row.tokens, "token")}, ${many(row.branches, "branch", "branches")}`);
  if (first) showRun(run, t);
  else if (view.entry === run.entry) redraw(run, t);
}

function showRun(run, t) {
  view.axis = "time";
  open.asked = run.entry;
  goTo("detail", "#running", true);
  show(run.entry, t, "trunk");
  $("reader").before(el("section", { id: "now", "aria-label": "Branches under way" }));
  redraw(run, t);
}

function redraw(run, t) {
  Object.assign(view, { t, lanes: lanesOf(t) });
  document.querySelector("#detail .tiles").replaceWith(tilesOf(run.entry));
  drawTimeline();
  drawReader();
  drawCards(run, t);
  showButtons();
}

/** The ends of the texts of branches that are not joined, side by side. */
function drawCards(run, t) {
  const apart = [...run.forks.entries()].filter(([key]) => !run.joined.has(key));
  const text = (key) =>
    t.spans
      .filter((span) => nameOf(span.path) === key && span.role !== "header")
      .map((span) => span.text)
      .join("");
  const cards = apart
    .slice(0, CARDS)
    .map(([key, { outline, outcome }]) =>
      el(
        "div",
        { class: `card now${outcome ? " over" : ""}`, "data-branch": key },
        el(
          "p",
          {},
          el("b", {}, key),
          el("bdi", {}, short(outline, 60)),
          el("span", { class: "soft" }, outcome ? FINISH[outcome === "ok" ? "stop" : outcome] : "writes"),
        ),
        el("div", { class: "tail" }, el("bdi", {}, plain(text(key).slice(-TAIL)))),
      ),
    );
  if (apart.length > CARDS)
    cards.push(el("p", { class: "soft" }, `and ${many(apart.length - CARDS, "branch", "branches")} more`));
  $("now").replaceChildren(...cards);
}

/** What the server can be asked for, when that is to be seen. */
async function offerDialects() {
  try {
    const { default: usual, dialects } = await (await request("dialects")).json();
    const options = dialects.map(({ name }) => el("option", { value: name }, name));
    $("dialect").replaceChildren(el("option", { value: "" }, `as the model: ${usual}`), ...options);
  } catch (error) {
    $("options").addEventListener("toggle", offerDialects, { once: true });
    say(plain(String(error.message)), true);
  }
}

$("ask").addEventListener("submit", ask);
$("prompt").addEventListener(
  "keydown",
  (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && $("ask").requestSubmit(),
);
$("stop").addEventListener("click", () => live.run?.stopping.abort());
$("follow").addEventListener("click", () => showRun(live.run, soFar(live.run)));
$("options").addEventListener("toggle", offerDialects, { once: true });
