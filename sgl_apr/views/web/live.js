// The live page of a server: sends prompts and shows trajectories while they are written.

const REDRAW_MS = 120;
const TAIL_CHARS = 420; // characters of a branch that are shown while it runs
const MAX_CARDS = 12; // branches whose text is shown while they run
const NO_KEY = "This server needs an API key.";
const live = { run: null, server: null, last: null };

/** Returns the body of a request, with text in `prompt`. What is undefined is left to the server. */
function requestBody() {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const budget = { width: number("width"), tokens: number("tokens") };
  return {
    format: $("format").value,
    prompt: $("prompt").value,
    stream: true,
    mode: $("mode").value,
    dialect: $("dialect").value || undefined,
    temperature: number("temperature"),
    seed: number("seed"),
    budget: Object.values(budget).some((n) => n !== undefined) ? budget : undefined,
  };
}

/** Sends a request to the server of this page. The API key is stored in its input field only. */
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
    $("with-key").hidden = false;
    throw new Error(NO_KEY);
  }
  const { error } = await response.json().catch(() => ({}));
  throw new Error(error?.message ?? error ?? `The server answered with status ${response.status}.`);
}

/** Yields the events of a stream. */
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

function submitPrompt(event) {
  event.preventDefault();
  if (!live.run && $("prompt").value) sendPrompt(requestBody());
}

/** Sends a request and shows its trajectory. What has arrived is kept, however the request ends. */
async function sendPrompt(body) {
  const run = (live.run = startRun(body.prompt));
  const drawing = setInterval(() => run.entry && drawRun(run), REDRAW_MS);
  live.last = body;
  showStatus("Sent …");
  try {
    await loadServer();
    const response = await request("generate", {
      method: "POST",
      body: JSON.stringify(await encodedBody(body, run.stopping.signal)),
      signal: run.stopping.signal,
    });
    for await (const data of eventsOf(response)) {
      if (data.error) throw new Error(data.error.message);
      EVENT_HANDLERS[data.event]?.(run, data);
      if (!run.entry) drawRun(run);
    }
    if (!run.done) throw new TypeError("The stream ended before the trajectory was complete.");
    live.last = null;
    keepRun(run);
    showStatus(`Done in ${seconds(run.done.wall_s)}.`);
  } catch (error) {
    const stopped = run.stopping.signal.aborted;
    endRun(run, stopped ? "stopped" : "interrupted");
    if (run.entry) keepRun(run);
    showStatus(stopped ? "Stopped." : messageOf(error, run), !stopped);
    if (error.message === NO_KEY) $("key").focus();
  } finally {
    clearInterval(drawing);
    live.run = null;
    $("now")?.remove();
    showButtons();
  }
}

/** Returns what went wrong. A browser reports a lost connection as a TypeError, in words of its own. */
function messageOf(error, run) {
  if (!(error instanceof TypeError)) return plain(String(error.message));
  return run.entry
    ? "The connection to the server was lost. What had arrived is kept."
    : "The server cannot be reached. Is it running?";
}

/** Returns a body whose prompt is a chat message, rendered by the model's template, if that was chosen. */
async function encodedBody({ format, prompt, ...body }, signal) {
  if (format !== "chat" || !live.server.chat_template) return { ...body, prompt };
  const messages = [{ role: "user", content: prompt }];
  const response = await request("../tokenize", { method: "POST", body: JSON.stringify({ messages }), signal });
  return { ...body, input_ids: (await response.json()).tokens };
}

function showStatus(text, wrong = false) {
  $("state").textContent = text;
  $("state").classList.toggle("wrong", wrong);
  showButtons();
}

function showButtons() {
  const running = Boolean(live.run);
  $("run").disabled = running;
  $("stop").hidden = !running;
  $("retry").hidden = running || !live.last;
  $("follow").hidden = !running || !live.run.entry || view.entry === live.run.entry;
}

/** Adds a run that has ended to the list, complete or not. */
function keepRun(run) {
  const t = currentTrajectory(run),
    seen = view.entry === run.entry,
    { lane } = view,
    entry = addEntry(rowFor(run, t), t);
  $("overview").replaceChildren();
  offerChoices();
  refilter();
  saveTab();
  if (seen) openEntry(entry, { quietly: true, lane });
}

function drawRun(run) {
  if (run.ended) return;
  const t = currentTrajectory(run),
    row = rowFor(run, t),
    first = !run.entry;
  run.entry = Object.assign(run.entry ?? { id: "running", hue: 0 }, row);
  run.entry.parallelism = row.critical ? row.tokens / row.critical : 1;
  showStatus(`${seconds(clock(run))}, about ${plural(row.tokens, "token")}, ${plural(row.branches, "branch", "branches")}`);
  if (first) showRun(run, t);
  else if (view.entry === run.entry) redraw(run, t);
}

function showRun(run, t) {
  view.axis = "time";
  openEntry.requested = run.entry;
  goTo("detail", "#running", true);
  show(run.entry, t, "trunk");
  $("reader").before(el("section", { id: "now", "aria-label": "Running branches" }));
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

/** Shows the ends of the texts of branches that are not joined yet, in parallel. */
function drawCards(run, t) {
  const unjoined = [...run.forks.entries()].filter(([key]) => !run.joined.has(key));
  const text = (key) =>
    t.spans
      .filter((span) => nameOf(span.path) === key && span.role !== "header")
      .map((span) => span.text)
      .join("");
  const runs = (key) => t.tools.filter((tool) => tool.open && nameOf(tool.path) === key);
  const state = (key, outcome) =>
    outcome
      ? FINISH[outcome === "ok" ? "stop" : outcome]
      : runs(key)
          .map((tool) => `runs ${short(tool.name, 30)}`)
          .join(", ") || "running";
  const cards = unjoined
    .slice(0, MAX_CARDS)
    .map(([key, { outline, outcome }]) =>
      el(
        "div",
        { class: `card now${outcome ? " over" : ""}`, "data-branch": key },
        el(
          "p",
          {},
          el("b", {}, key),
          el("bdi", {}, short(outline, 60)),
          el("span", { class: "soft" }, state(key, outcome)),
        ),
        el("div", { class: "tail" }, el("bdi", {}, plain(text(key).slice(-TAIL_CHARS)))),
      ),
    );
  if (unjoined.length > MAX_CARDS)
    cards.push(el("p", { class: "soft" }, `and ${plural(unjoined.length - MAX_CARDS, "branch", "branches")} more`));
  $("now").replaceChildren(...cards);
}

/** Loads the dialects of the server, and whether its model has a chat template. Does nothing the second time. */
async function loadServer() {
  if (live.server) return;
  const server = await (await request("dialects")).json();
  const { value } = $("dialect"),
    options = server.dialects.map(({ name }) => el("option", { value: name }, name));
  $("dialect").replaceChildren(el("option", { value: "" }, `the model's own: ${server.default}`), ...options);
  $("dialect").value = server.dialects.some(({ name }) => name === (live.dialect ?? value)) ? (live.dialect ?? value) : "";
  live.server = server;
  $("format").options[0].disabled = !server.chat_template;
  if (!server.chat_template) $("format").value = "plain";
  showFormat();
}

function showFormat() {
  const chat = $("format").value === "chat";
  $("prompt").placeholder = chat ? "A message, sent with the model's chat template" : "A prompt, sent without a chat template";
}

const offerServer = () => loadServer().catch((error) => showStatus(error instanceof TypeError ? "The server cannot be reached. Is it running?" : plain(String(error.message)), true));

$("ask").addEventListener("submit", submitPrompt);
$("prompt").addEventListener(
  "keydown",
  (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && $("ask").requestSubmit(),
);
$("stop").addEventListener("click", () => live.run?.stopping.abort());
$("retry").addEventListener("click", () => !live.run && sendPrompt(live.last));
$("format").addEventListener("input", showFormat);
$("follow").addEventListener("click", () => showRun(live.run, currentTrajectory(live.run)));
$("options").addEventListener("toggle", offerServer);
addEventListener("pagehide", saveTab);
restoreTab();
offerServer();
