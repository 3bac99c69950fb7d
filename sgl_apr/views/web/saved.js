// What a reload of the live page keeps: the trajectories of this tab, and the form. It is in the browser's storage of
// this tab, which ends with the tab, because prompts and replies are private. The API key is never stored.

const STORAGE_KEY = "sgl-apr";
const MAX_STORED_CHARS = 2_000_000; // of all trajectories; the oldest are dropped first
const SAVED_FIELDS = ["prompt", "format", "mode", "dialect", "width", "tokens", "temperature", "seed"];

/** Saves the trajectories and the form. A run under way is saved with what has arrived. */
function saveTab() {
  const saved = known.entries.map(({ loaded, id, hue, text, parallelism, ...row }) => ({ row, t: loaded }));
  if (live.run?.entry && !live.run.ended) {
    endRun(live.run, "interrupted");
    const t = currentTrajectory(live.run);
    saved.push({ row: rowFor(live.run, t), t });
  }
  const kept = [];
  let chars = 0;
  for (const entry of saved.reverse()) {
    const json = JSON.stringify(entry);
    if ((chars += json.length) > MAX_STORED_CHARS) break;
    kept.unshift(json);
  }
  const form = Object.fromEntries(SAVED_FIELDS.map((id) => [id, $(id).value]));
  const last = live.last && JSON.stringify(live.last).length < MAX_STORED_CHARS / 4 ? live.last : null;
  for (const entries of [kept, []]) {
    try {
      return sessionStorage.setItem(STORAGE_KEY, JSON.stringify({ form, last, entries }));
    } catch {
      // The browser stores less than that, or nothing: save the form alone, or give up.
    }
  }
}

/** Shows what the tab had before it was reloaded. */
function restoreTab() {
  let saved;
  try {
    saved = JSON.parse(sessionStorage.getItem(STORAGE_KEY));
    saved.entries = saved.entries.map(JSON.parse);
  } catch {
    return; // nothing was saved
  }
  for (const id of SAVED_FIELDS) if (saved.form[id] !== undefined) $(id).value = saved.form[id];
  live.dialect = saved.form.dialect;
  live.last = saved.last;
  for (const { row, t } of saved.entries) addEntry(row, t);
  $("overview").replaceChildren();
  offerChoices();
  refilter();
  const last = known.entries.at(-1);
  if (location.hash === "#running" && last) openEntry(last, { quietly: true });
  else route();
  if (live.last) showStatus("The page was reloaded. What had arrived is kept.", true);
}
