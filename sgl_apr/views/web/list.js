// The list of trajectories: filters, order, and the visible rows.

const SORTS = {
  number: "order",
  tokens: "tokens",
  critical: "critical path",
  parallelism: "parallelism",
  branches: "branches",
  wall: "wall time",
  size: "size",
};
const list = { shown: [], at: 0, height: 64 }; // the height of a row, as in the style

function setUpList() {
  for (const [value, name] of Object.entries(SORTS)) $("sort").append(el("option", { value }, name));
  for (const id of ["find", "method", "verdict", "forked", "sort"]) $(id).addEventListener("input", refilter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("direction").addEventListener("click", () => {
    $("direction").setAttribute("aria-pressed", String($("direction").getAttribute("aria-pressed") !== "true"));
    refilter();
  });
  $("rows").addEventListener("scroll", drawRows, { passive: true });
  for (const kind of ["focus", "blur"]) $("rows").addEventListener(kind, markRow);
  $("rows").addEventListener("keydown", onListKey);
  $("rows").addEventListener("click", onListClick);
  new ResizeObserver(drawRows).observe($("rows"));
}

/** Shows only those filters that apply to the trajectories of the page. */
function offerChoices() {
  const { entries, methods } = known,
    chosen = $("method").value;
  $("method").replaceChildren(
    el("option", { value: "" }, "any"),
    ...methods.map((m) => el("option", { value: m }, plain(m))),
  );
  $("method").value = methods.includes(chosen) ? chosen : "";
  $("method").parentElement.hidden = methods.length < 2;
  $("filters").hidden = !entries.length;
  $("verdict").parentElement.hidden = !entries.some((e) => e.correct !== null);
  for (const option of $("sort").options)
    if (option.value === "size") option.hidden = !entries.some((e) => e.size !== null);
}

function refilter() {
  const words = $("find").value.toLowerCase(),
    method = $("method").value,
    verdict = $("verdict").value;
  const forked = $("forked").value,
    key = $("sort").value,
    descending = $("direction").getAttribute("aria-pressed") === "true";
  const chosen = list.shown[list.at];
  list.shown = known.entries.filter(
    (e) =>
      e.text.includes(words) &&
      (!method || e.method === method) &&
      (!forked || (forked === "yes") === e.blocks > 0) &&
      (!verdict || (e.correct !== null && (verdict === "right") === e.correct)),
  );
  if (key !== "number") list.shown.sort((a, b) => (a[key] ?? 0) - (b[key] ?? 0) || a.id - b.id);
  if (descending) list.shown.reverse();
  list.at = Math.max(0, list.shown.indexOf(chosen));
  const all = known.entries.length;
  $("found").textContent =
    list.shown.length === all
      ? plural(all, "trajectory", "trajectories")
      : `${count(list.shown.length)} of ${count(all)}`;
  $("rows").scrollTop = 0;
  reveal(list.at);
  drawRows();
}

/** Draws the visible rows only. */
function drawRows() {
  const box = $("rows"),
    { shown, height } = list;
  $("pad").style.height = `${shown.length * height}px`;
  const first = Math.max(0, Math.floor(box.scrollTop / height) - 4);
  const last = Math.min(shown.length, Math.ceil((box.scrollTop + box.clientHeight) / height) + 4);
  const rows = [];
  for (let k = first; k < last; k++) rows.push(rowOf(shown[k], k));
  $("pad").replaceChildren(...rows);
  markRow();
}

/** Marks the current row while its trajectory is shown, or the list has the focus. The overview is of all rows. */
function markRow() {
  const isShown = document.body.dataset.view === "detail" || document.activeElement === $("rows"),
    row = isShown && $("pad").querySelector(`[data-k="${list.at}"]`);
  for (const other of $("pad").children) other.setAttribute("aria-selected", String(other === row));
  if (row) $("rows").setAttribute("aria-activedescendant", row.id);
  else $("rows").removeAttribute("aria-activedescendant");
}

function rowOf(entry, k) {
  const row = el(
    "div",
    {
      role: "option",
      id: `row-${entry.id}`,
      class: `item hue-${entry.hue}`,
      "data-k": k,
      "aria-selected": "false",
      "aria-setsize": list.shown.length,
      "aria-posinset": k + 1,
    },
    thumbnail(entry.shape),
    el("span", { class: "name" }, el("bdi", {}, short(entry.name, 90) || "(no name)")),
    verdictOf(entry),
    el(
      "span",
      { class: "figures" },
      known.methods.length > 1 && el("span", { class: "method" }, el("bdi", {}, short(entry.method, 40))),
      el("span", {}, `${count(entry.tokens)} tokens`),
      el("span", {}, entry.blocks ? times(entry.parallelism) : "no fork"),
    ),
  );
  row.style.top = `${k * list.height}px`;
  return row;
}

function verdictOf(entry) {
  if (entry.correct === null) return null;
  return el("span", { class: `verdict ${entry.correct ? "right" : "wrong"}` }, entry.correct ? "✓ right" : "✗ wrong");
}

/** Draws a small picture of a trajectory: its trunk, and its branches below it. */
function thumbnail(shape) {
  const rows = shape.length / 2,
    step = Math.min(7, 34 / Math.max(1, rows));
  const top = 20 - ((rows - 1) * step) / 2;
  const strokes = Array.from(
    { length: rows },
    (_, r) => `M${2 + 0.6 * shape[2 * r]} ${top + r * step}H${2 + 0.6 * Math.max(shape[2 * r] + 2, shape[2 * r + 1])}`,
  );
  return svg(
    "svg",
    { class: "thumbnail", viewBox: "0 0 64 40", "aria-hidden": "true" },
    svg("path", { class: "trunk", d: strokes[0] ?? "" }),
    svg("path", { d: strokes.slice(1).join("") }),
  );
}

/** Scrolls until row `k` is visible. */
function reveal(k) {
  const box = $("rows"),
    top = k * list.height;
  if (top < box.scrollTop) box.scrollTop = top;
  else if (top + list.height > box.scrollTop + box.clientHeight) box.scrollTop = top + list.height - box.clientHeight;
}

function onListClick(event) {
  const row = event.target.closest("[data-k]");
  if (!row) return;
  moveTo(Number(row.dataset.k));
  openEntry(list.shown[list.at]);
}

function onListKey(event) {
  const page = Math.max(1, Math.floor($("rows").clientHeight / list.height) - 1);
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key in steps) {
    moveTo(list.at + steps[event.key]);
    if (isWide() && list.shown.length) openEntry(list.shown[list.at], { quietly: true });
  } else if (event.key === "Enter" || event.key === " ") {
    if (list.shown.length) openEntry(list.shown[list.at], { focus: true });
  } else return;
  event.preventDefault();
}

function moveTo(k) {
  list.at = Math.min(list.shown.length - 1, Math.max(0, k));
  reveal(list.at);
  drawRows();
}
