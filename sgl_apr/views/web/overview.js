// The overview of all trajectories: a table of methods, and plots.

function drawOverview() {
  if (!known.entries.length) return $("overview").replaceChildren(el("p", { class: "nothing" }, "No trajectories yet."));
  PLOT_SIZE.width = isWide() ? 460 : 340;
  const groups = known.methods.map((method, k) => ({
    method,
    k,
    own: known.entries.filter((e) => e.method === method),
  }));
  const judged = known.entries.some((e) => e.correct !== null),
    sized = known.entries.some((e) => e.size !== null),
    limits = [...new Set(known.entries.map((e) => e.limit ?? null))].filter((limit) => limit !== null);
  $("overview").replaceChildren(
    el("h2", {}, "Overview"),
    ...(limits.length ? [el("p", { class: "soft" }, "Each method ran under several limits. The table has means over all of them.")] : []),
    methodTable(groups, judged),
    el(
      "div",
      { class: "plots" },
      judged && limits.map((limit) => limitPlot(groups, limit)),
      judged && solvedPlot(groups, "tokens", "Accuracy against tokens", "tokens, at most"),
      judged &&
        solvedPlot(groups, "critical", "Accuracy against the critical path", "tokens of the critical path, at most"),
      judged && solvedPlot(groups, "wall", "Accuracy against wall time", "seconds, at most", String),
      !judged && scatterPlot(groups),
      sized && widthPlot(groups),
      parallelismPlot(groups),
    ),
  );
}

function methodTable(groups, judged) {
  const hasTools = groups.some(({ own }) => own.some((e) => e.tools));
  const columns = [
    ["attempts", ({ own }) => count(own.length)],
    judged && ["accuracy, 95% interval", ({ own }) => within(own.filter((e) => e.correct).length, own.length)],
    ["tokens", ({ own }) => count(mean(own.map((e) => e.tokens)))],
    ["critical path", ({ own }) => count(mean(own.map((e) => e.critical)))],
    ["parallelism", ({ own }) => times(mean(own.map((e) => e.parallelism)))],
    ["forked", ({ own }) => percent(mean(own.map((e) => Number(e.blocks > 0))))],
    ["branches", ({ own }) => mean(own.map((e) => e.branches)).toFixed(1)],
    hasTools && ["tool calls", ({ own }) => mean(own.map((e) => e.tools ?? 0)).toFixed(1)],
    hasTools && ["tool time", ({ own }) => seconds(mean(own.map((e) => e.tool_s ?? 0)))],
    ["wall time", ({ own }) => seconds(mean(own.map((e) => e.wall)))],
    ["cached", ({ own }) => percent(sum(own.map((e) => e.cached)) / Math.max(1, sum(own.map((e) => e.prompt))))],
  ].filter(Boolean);
  const line = (group) =>
    el(
      "tr",
      {
        onpointerenter: () => highlight(group.k),
        onpointerleave: () => highlight(null),
        onfocusin: () => highlight(group.k),
        onfocusout: () => highlight(null),
      },
      el("th", { scope: "row" }, methodButton(group)),
      columns.map(([name, value]) => el("td", { "data-name": name }, value(group))),
    );
  return el(
    "div",
    { class: "card table" },
    el(
      "table",
      {},
      el("caption", { class: "unseen" }, "Methods: means over their attempts"),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          el("th", { scope: "col" }, "method"),
          columns.map(([name]) => el("th", { scope: "col" }, name)),
        ),
      ),
      el("tbody", {}, groups.map(line)),
    ),
  );
}

/** Returns a button with the name of a method. It lists the attempts of the method. */
function methodButton(group) {
  const choose = () => {
    $("method").value = group.method;
    refilter();
    if (!isWide()) goTo("list", "#");
    $("rows").focus();
  };
  const key = svg(
    "svg",
    { viewBox: "0 0 26 8", "aria-hidden": "true", ...drawn(group.k, "key") },
    svg("path", { d: "M1 4H25" }),
  );
  return el("button", { type: "button", class: "bare", onclick: choose }, key, el("bdi", {}, short(group.method, 60)));
}

/** Returns the attributes of what is drawn for a method. */
const drawn = (k, kind) => ({ class: `${kind} hue-${k % 8}${k >= 8 ? " dashed" : ""}`, "data-method": k });
const lineOf = ({ k, method }, d) => svg("path", { d, ...drawn(k, "line") }, svg("title", {}, plain(method)));

/** Highlights one method in the plots, or none with null. With many methods, only the highlighted one shows bounds. */
function highlight(k) {
  for (const node of document.querySelectorAll("#overview figure [data-method]"))
    for (const [name, is] of [
      ["faint", k !== null && node.dataset.method !== String(k)],
      ["lit", node.dataset.method === String(k)],
    ])
      node.classList.toggle(name, is);
}
