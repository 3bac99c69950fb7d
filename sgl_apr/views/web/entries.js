// The trajectories of the page: a row for each, and the trajectory itself, which is unpacked when it is selected.

const known = { entries: [], methods: [] };

function readIndex() {
  const { columns, rows } = JSON.parse($("index").textContent);
  rows.forEach((row) => addEntry(Object.fromEntries(columns.map((column, k) => [column, row[k]]))));
}

/** Adds a row to the list. `loaded` is its trajectory, if it is not packed in this page. */
function addEntry(row, loaded = null) {
  const entry = { ...row, id: known.entries.length, loaded, parallelism: row.critical ? row.tokens / row.critical : 1 };
  if (!known.methods.includes(entry.method)) known.methods.push(entry.method);
  entry.hue = known.methods.indexOf(entry.method) % 8;
  entry.text = `${row.name}\n${row.answer}\n${row.label}`.toLowerCase();
  known.entries.push(entry);
  return entry;
}

async function trajectoryOf(entry) {
  return entry.loaded ?? JSON.parse(await inflated($(`t${entry.id}`).textContent));
}

function inflated(packed) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
}
