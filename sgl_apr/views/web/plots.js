// Plots of methods.

const PLOT = { width: 460, height: 280, left: 52, right: 14, top: 14, bottom: 44 };

/** A plot with its axes. `draw` gets the scales and returns what is drawn in it; `said` says the same in words. */
function plot(title, x, y, said, draw) {
  const { width, height, left, right, top, bottom } = PLOT,
    floor = height - bottom;
  const sx = (v) => left + x.place(v) * (width - left - right),
    sy = (v) => floor - (v / y.most) * (floor - top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${said}` });
  root.append(
    svg("path", { class: "grid", d: y.ticks.map((v) => `M${left} ${sy(v)}H${width - right}`).join("") }),
    svg("path", { class: "axis", d: `M${left} ${floor}H${width - right}` }),
    ...y.ticks.map((v) => svg("text", { class: "tick", x: left - 8, y: sy(v) + 4, "text-anchor": "end" }, y.format(v))),
    ...x.ticks.map((v) =>
      svg("text", { class: "tick", x: sx(v), y: floor + 18, "text-anchor": "middle" }, x.format(v)),
    ),
    svg("text", { class: "label", x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, x.label),
    svg(
      "text",
      { class: "label", transform: `translate(13 ${(top + floor) / 2}) rotate(-90)`, "text-anchor": "middle" },
      y.label,
    ),
    ...draw(sx, sy),
  );
  return el("figure", { class: "card" }, el("figcaption", {}, title), root);
}

const linear = (most, label, about = 5, format = WHOLE.format) => ({
  most,
  label,
  format,
  place: (v) => v / most,
  ticks: ticks(most, about),
});
const shares = (label, most = 1) => ({ ...linear(most, label, 5, percent) });

/** By orders of magnitude, which is what it takes to see methods that spend so differently. */
function logarithmic(least, most, label) {
  const found = [];
  for (let power = 10 ** Math.floor(Math.log10(least)); power <= most; power *= 10)
    found.push(...[1, 2, 5].map((k) => k * power));
  return {
    label,
    format: WHOLE.format,
    place: (v) => Math.max(0, Math.log(v / least) / Math.log(most / least)),
    ticks: found.filter((v) => v >= least && v <= most),
  };
}

/** 95% bounds of a share, k of n: Wilson's score interval. */
function bounds(k, n) {
  const z2 = 1.96 ** 2,
    middle = k + z2 / 2,
    off = 1.96 * Math.sqrt((k * (n - k)) / n + z2 / 4);
  return [Math.max(0, (middle - off) / (n + z2)), Math.min(1, (middle + off) / (n + z2))];
}

/** Such a share with its bounds, in words. */
function within(k, n) {
  if (!n) return "none";
  const [low, high] = bounds(k, n).map(percent);
  return `${percent(k / n)} (${low} to ${high})`;
}

/** The share of all attempts of a method that are right and cost no more than so much, with its bounds. */
function solvedPlot(groups, of, title, label, format = WHOLE.format) {
  const curves = groups.map((g) => ({
    ...g,
    limits: g.own
      .filter((e) => e.correct)
      .map((e) => e[of])
      .sort((a, b) => a - b),
  }));
  const all = curves.flatMap((c) => c.limits).sort((a, b) => a - b),
    most = all.at(-1) || 1,
    least = Math.max(1, all[0] ?? 1);
  const far = most / (all[Math.floor(all.length / 10)] || 1) > 12 && most > 12 * least;
  const said = curves
    .map((c) => `${plain(c.method)}: ${within(c.limits.length, c.own.length)} in all`)
    .join("; ");
  return plot(
    title,
    far ? logarithmic(least, most * 1.05, label) : linear(most * 1.02, label, 5, format),
    shares("solved"),
    said,
    (sx, sy) => {
      const end = PLOT.width - PLOT.right;
      const steps = (c, height) =>
        c.limits.map((limit, k) => `H${sx(limit).toFixed(1)}V${sy(height(k + 1)).toFixed(1)}`).join("") + `H${end}`;
      const back = (c) =>
        c.limits
          .map((limit, k) => `V${sy(bounds(k + 1, c.own.length)[0]).toFixed(1)}H${sx(limit).toFixed(1)}`)
          .reverse()
          .join("");
      const from = sx(far ? least : 0);
      const band = (c) =>
        `M${from} ${sy(0)}V${sy(bounds(0, c.own.length)[1])}${steps(c, (k) => bounds(k, c.own.length)[1])}${back(c)}V${sy(0)}Z`;
      return [
        ...curves
          .filter((c) => c.own.length)
          .map((c) => svg("path", { d: band(c), ...drawn(c.k, curves.length > 4 ? "area crowded" : "area") })),
        ...curves.map((c) => lineOf(c, `M${from} ${sy(0)}${steps(c, (k) => k / c.own.length)}`)),
      ];
    },
  );
}

function widthPlot(groups) {
  const sizes = [...new Set(known.entries.map((e) => e.size).filter((s) => s !== null))].sort((a, b) => a - b);
  const lines = groups.map((g) => ({
    ...g,
    points: sizes
      .map((s) => [s, g.own.filter((e) => e.size === s)])
      .filter(([, own]) => own.length)
      .map(([s, own]) => [s, mean(own.map((e) => e.branches))]),
  }));
  const most =
    largest(
      lines.flatMap((l) => l.points.map((p) => p[1])),
      1,
    ) * 1.08;
  const x = {
    label: "size of the problem",
    format: String,
    ticks: sizes,
    place: (s) => (sizes.indexOf(s) + 0.5) / sizes.length,
  };
  const said = lines
    .map((l) => `${plain(l.method)}: ${l.points.map(([s, n]) => `${n.toFixed(1)} at size ${s}`).join(", ")}`)
    .join("; ");
  return plot("Width against size", x, linear(most, "branches, mean"), said, (sx, sy) =>
    lines.flatMap((l) => [
      lineOf(l, l.points.map(([s, n], k) => `${k ? "L" : "M"}${sx(s)} ${sy(n)}`).join("")),
      ...l.points.map(([s, n]) => svg("circle", { cx: sx(s), cy: sy(n), r: 4, ...drawn(l.k, "point") })),
    ]),
  );
}

function parallelismPlot(groups) {
  const most = Math.ceil(
      largest(
        known.entries.map((e) => e.parallelism),
        2,
      ),
    ),
    bins = 24,
    wide = (most - 1) / bins;
  const filled = groups.map((g) => {
    const counts = Array(bins).fill(0);
    for (const e of g.own) counts[Math.min(bins - 1, Math.floor((e.parallelism - 1) / wide))]++;
    return { ...g, counts: counts.map((n) => n / Math.max(1, g.own.length)) };
  });
  const high = largest(
    filled.flatMap((f) => f.counts),
    0.1,
  );
  const x = {
    label: "parallelism: tokens by critical path",
    format: (v) => `${v}×`,
    ticks: ticks(most - 1, 5).map((v) => v + 1),
    place: (v) => (v - 1) / (most - 1),
  };
  const said = filled
    .map((f) => `${plain(f.method)}: ${times(mean(f.own.map((e) => e.parallelism)))} on average`)
    .join("; ");
  return plot("Distribution of parallelism", x, shares("of trajectories", Math.min(1, high * 1.08)), said, (sx, sy) =>
    filled.flatMap((f) => {
      let d = `M${sx(1)} ${sy(0)}`;
      f.counts.forEach((share, b) => (d += `V${sy(share)}H${sx(1 + (b + 1) * wide)}`));
      return [svg("path", { d: `${d}V${sy(0)}Z`, ...drawn(f.k, "area") }), lineOf(f, `${d}V${sy(0)}`)];
    }),
  );
}

function scatterPlot(groups) {
  const most =
      largest(
        known.entries.map((e) => e.tokens),
        1,
      ) * 1.04,
    every = Math.ceil(known.entries.length / 3000);
  const said = groups
    .map(
      (g) =>
        `${plain(g.method)}: ${count(mean(g.own.map((e) => e.tokens)))} tokens, critical path ${count(mean(g.own.map((e) => e.critical)))} on average`,
    )
    .join("; ");
  return plot(
    "Critical path against tokens",
    linear(most, "tokens"),
    linear(most, "tokens of the critical path"),
    said,
    (sx, sy) => [
      svg("path", { class: "axis", d: `M${sx(0)} ${sy(0)}L${sx(most)} ${sy(most)}` }),
      ...known.entries
        .filter((e) => e.id % every === 0)
        .map((e) =>
          svg("circle", {
            cx: sx(e.tokens),
            cy: sy(e.critical),
            r: 3.2,
            ...drawn(known.methods.indexOf(e.method), "point"),
          }),
        ),
    ],
  );
}
