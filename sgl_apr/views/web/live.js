// The live page of a server: sends prompts and shows trajectories while they are written.

const REDRAW_MS = 120;
const TAIL_CHARS = 420; // characters of a branch that are shown while it runs
const MAX_CARDS = 12; // branches whose text is shown while they run
const live = { run: null };

/** Returns the body of a request. What is undefined is left to the server. */
function requestBody() {
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
    $("key").focus();
    throw new Error("This server needs an API key.");
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

async function submitPrompt(event) {
  event.preventDefault();
  if (live.run || !$("prompt").value) return;
  const run = (live.run = startRun($("prompt").value));
  const drawing = setInterval(() => run.entry && drawRun(run), REDRAW_MS);
  showStatus("Sent …");
  try {
    const response = await request("generate", {
      method: "POST",
      body: JSON.stringify(requestBody()),
      signal: run.stopping.signal,
    });
    for await (const data of eventsOf(response)) {
      if (data.error) throw new Error(data.error.message);
      EVENT_HANDLERS[data.event]?.(run, data);
      if (!run.entry) drawRun(run);
    }
    finish(run);
  } catch (error) {
    if (run.entry) drawRun(run);
    showStatus(run.stopping.signal.aborted ? "Stopped." : plain(String(error.message)), !run.stopping.signal.aborted);
  } finally {
    clearInterval(drawing);
    live.run = null;
    $("now")?.remove();
    showButtons();
  }
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
  $("follow").hidden = !running || !live.run.entry || view.entry === live.run.entry;
}

function finish(run) {
  if (!run.done) throw new Error("The stream ended before the trajectory was complete.");
  const t = currentTrajectory(run),
    seen = view.entry === run.entry,
    { lane } = view,
    entry = addEntry(rowFor(run, t), t);
  $("overview").replaceChildren();
  offerChoices();
  refilter();
  showStatus(`Done in ${seconds(t.wall)}.`);
  if (seen) openEntry(entry, { quietly: true, lane });
}

function drawRun(run) {
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
          el("span", { class: "soft" }, outcome ? FINISH[outcome === "ok" ? "stop" : outcome] : "running"),
        ),
        el("div", { class: "tail" }, el("bdi", {}, plain(text(key).slice(-TAIL_CHARS)))),
      ),
    );
  if (unjoined.length > MAX_CARDS)
    cards.push(el("p", { class: "soft" }, `and ${plural(unjoined.length - MAX_CARDS, "branch", "branches")} more`));
  $("now").replaceChildren(...cards);
}

/** Loads the dialects of the server when the options are opened. */
async function offerDialects() {
  try {
    const { default: fallback, dialects } = await (await request("dialects")).json();
    const options = dialects.map(({ name }) => el("option", { value: name }, name));
    $("dialect").replaceChildren(el("option", { value: "" }, `the model's own: ${fallback}`), ...options);
  } catch (error) {
    $("options").addEventListener("toggle", offerDialects, { once: true });
    showStatus(plain(String(error.message)), true);
  }
}

$("ask").addEventListener("submit", submitPrompt);
$("prompt").addEventListener(
  "keydown",
  (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && $("ask").requestSubmit(),
);
$("stop").addEventListener("click", () => live.run?.stopping.abort());
$("follow").addEventListener("click", () => showRun(live.run, currentTrajectory(live.run)));
$("options").addEventListener("toggle", offerDialects, { once: true });
