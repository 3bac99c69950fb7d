// What a server adds: trajectories that it is asked for here, followed as they are written.

const OFTEN = 120; // milliseconds between two pictures
const TAIL = 420; // characters of a branch that can be read while it runs
const CARDS = 12; // branches whose text is shown while they run
const live = { run: null };

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
