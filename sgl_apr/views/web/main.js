// Navigation between the views, and the start of the page.

/** Shows the list (alone on a narrow screen), the overview, or a trajectory. */
function goTo(name, hash, quietly = false) {
  document.body.dataset.view = name;
  $("detail").hidden = name !== "detail";
  if (location.hash !== hash && !(hash === "#" && !location.hash))
    history[quietly ? "replaceState" : "pushState"](null, "", hash);
  if (name !== "detail") openEntry.requested = view.entry = null;
  if (name === "overview" && !$("overview").childElementCount) drawOverview();
  markRow();
  if (!isWide() && !quietly) scrollTo(0, 0);
}

function route() {
  const entry = known.entries[/^#t(\d+)$/.exec(location.hash)?.[1]];
  if (entry) openEntry(entry, { quietly: true });
  else goTo(location.hash === "#all" || isWide() ? "overview" : "list", location.hash || "#", true);
}

/** Escape goes back one step: from a text to its lane, then to the list, and from a trajectory to the overview. */
function onEscape(event) {
  if (event.key !== "Escape") return;
  if (event.target.closest("#reader")) $("lanes").focus();
  else if (event.target.closest("#lanes") && isWide()) $("rows").focus();
  else if (document.body.dataset.view === "detail") {
    goTo(isWide() ? "overview" : "list", isWide() ? "#all" : "#");
    $("rows").focus();
  } else return;
  event.preventDefault();
}

function start() {
  readIndex();
  setUpList();
  offerChoices();
  $("to-overview").addEventListener("click", () => goTo("overview", "#all"));
  $("to-list").addEventListener("click", () => goTo("list", "#"));
  addEventListener("popstate", route);
  addEventListener("keydown", onEscape);
  new ResizeObserver(() => requestAnimationFrame(drawTimeline)).observe($("detail"));
  WIDE.addEventListener("change", () => drawOverview());
  refilter();
  route();
  document.body.dataset.ready = "";
}

start();
