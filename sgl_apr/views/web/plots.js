// Plots of methods.

const PLOT_SIZE = { width: 460, height: 280, left: 52, right: 14, top: 14, bottom: 44 };

/** Returns a plot with axes. `draw` gets the scales and returns the contents. `description` has the contents in words. */
function plot(title, x, y, description, draw) {
  const { width, height, right, top, bottom } = PLOT_SIZE,
    floor = height - bottom,
    left = Math.max(PLOT_SIZE.left, 34 + widest(y)); // right of the label of the axis
  const sx = (v) => left + x.place(v) * (width - left - right),
    sy = (v) => floor - (v / y.max) * (floor - top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${description}` });
  root.append(
    svg("path", { class: "grid", d: y.ticks.map((v) => `M${left} ${sy(v)}H${width - right}`).join("") }),
    svg("path", { class: "axis", d: `M${left} ${floor}H${width - right}` }),
    ...y.ticks.map((v) => svg("text", { class: "tick", x: left - 8, y: sy(v) + 4, "text-anchor": "end" }, y.format(v))),
    ...separate(x.ticks, sx, widest(x)).map((v) =>
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

const DIGIT_WIDTH = 7; // of a tick's text, in pixels
const widest = ({ ticks, format }) => DIGIT_WIDTH * largest(ticks.map((v) => String(format(v)).length), 1);

/** Returns the ticks that have room for their texts. */
function separate(all, place, wide) {
  let free = -Infinity;
  return all.filter((v) => {
    if (place(v) < free) return false;
    free = place(v) + wide + 8;
    return true;
  });
}

const linear = (max, label, about = 5, format = WHOLE.format) => ({
  max,
  label,
  format,
  place: (v) => v / max,
  ticks: ticks(max, about),
});
const shares = (label, max = 1) => ({ ...linear(max, label, 5, percent) });

/** Returns a logarithmic scale, for methods whose costs differ by orders of magnitude. */
function logarithmic(min, max, label) {
  const marks = [];
  for (let power = 10 ** Math.floor(Math.log10(min)); power <= max; power *= 10)
    marks.push(...[1, 2, 5].map((k) => k * power));
  return {
    label,
    format: WHOLE.format,
    place: (v) => Math.max(0, Math.log(v / min) / Math.log(max / min)),
    ticks: marks.filter((v) => v >= min && v <= max),
  };
}

/** Returns the 95% bounds of a share, k of n: Wilson's score interval. */
function bounds(k, n) {
  const z2 = 1.96 ** 2,
    middle = k + z2 / 2,
    off = 1.96 * Math.sqrt((k * (n - k)) / n + z2 / 4);
  return [Math.max(0, (middle - off) / (n + z2)), Math.min(1, (middle + off) / (n + z2))];
}

/** Returns such a share with its bounds, as text. */
function within(k, n) {
  if (!n) return "none";
  const [low, high] = bounds(k, n).map(percent);
  return `${percent(k / n)} (${low} to ${high})`;
}

/** Plots the share of a method's attempts that are correct at a given cost or less, with its bounds. */
function solvedPlot(groups, of, title, label, format = WHOLE.format) {
  const curves = groups.map((g) => ({
    ...g,
    limits: g.own
      .filter((e) => e.correct)
      .map((e) => e[of])
      .sort((a, b) => a - b),
  }));
  const all = curves.flatMap((c) => c.limits).sort((a, b) => a - b),
    max = all.at(-1) || 1,
    min = Math.max(1, all[0] ?? 1);
  const wideRange = max / (all[Math.floor(all.length / 10)] || 1) > 12 && max > 12 * min;
  const description = curves
    .map((c) => `${plain(c.method)}: ${within(c.limits.length, c.own.length)} in all`)
    .join("; ");
  return plot(
    title,
    wideRange ? logarithmic(min, max * 1.05, label) : linear(max * 1.02, label, 5, format),
    shares("accuracy"),
    description,
    (sx, sy) => {
      const end = PLOT_SIZE.width - PLOT_SIZE.right;
      const steps = (c, height) =>
        c.limits.map((limit, k) => `H${sx(limit).toFixed(1)}V${sy(height(k + 1)).toFixed(1)}`).join("") + `H${end}`;
      const back = (c) =>
        c.limits
          .map((limit, k) => `V${sy(bounds(k + 1, c.own.length)[0]).toFixed(1)}H${sx(limit).toFixed(1)}`)
          .reverse()
          .join("");
      const from = sx(wideRange ? min : 0);
      const band = (c) =>
        `M${from} ${sy(0)}V${sy(bounds(0, c.own.length)[1])}${steps(c, (k) => bounds(k, c.own.length)[1])}${back(c)}V${sy(0)}Z`;
      // Methods without any solution have the same line and bounds: lines next to one another, and no bounds.
      const unsolved = curves.filter((c) => !c.limits.length);
      const raised = (c) => 3 * Math.max(0, unsolved.indexOf(c));
      return [
        ...curves
          .filter((c) => c.limits.length)
          .map((c) => svg("path", { d: band(c), ...drawn(c.k, curves.length > 4 ? "area crowded" : "area") })),
        ...curves.map((c) => lineOf(c, `M${from} ${sy(0) - raised(c)}${steps(c, (k) => k / c.own.length)}`)),
      ];
    },
  );
}

/** Plots accuracy over the values of a limit that was swept, with the bounds of each. */
function limitPlot(groups, limit) {
  const swept = known.entries.filter((e) => e.limit === limit && e.correct !== null);
  const values = [...new Set(swept.map((e) => e.limit_value))].sort((a, b) => a - b);
  const lines = groups.map((g) => ({
    ...g,
    points: values
      .map((v) => [v, g.own.filter((e) => e.limit === limit && e.limit_value === v)])
      .filter(([, own]) => own.length)
      .map(([v, own]) => [v, own.filter((e) => e.correct).length, own.length]),
  }));
  const name = LIMIT_NAMES[limit] ?? limit;
  const x = {
    label: `${name}, at most`,
    format: String,
    ticks: values,
    place: (v) => (values.indexOf(v) + 0.5) / values.length,
  };
  const description = lines
    .map((l) => `${plain(l.method)}: ${l.points.map(([v, k, n]) => `${within(k, n)} at ${v}`).join(", ")}`)
    .join("; ");
  return plot(`Accuracy under a limit of ${name}`, x, shares("accuracy"), description, (sx, sy) => {
    const band = (points) =>
      points.map(([v, k, n], i) => `${i ? "L" : "M"}${sx(v)} ${sy(bounds(k, n)[1])}`).join("") +
      [...points].reverse().map(([v, k, n]) => `L${sx(v)} ${sy(bounds(k, n)[0])}`).join("") + "Z";
    const ran = lines.filter((l) => l.points.length);
    return [
      ...ran.map((l) => svg("path", { d: band(l.points), ...drawn(l.k, ran.length > 4 ? "area crowded" : "area") })),
      ...ran.map((l) => lineOf(l, l.points.map(([v, k, n], i) => `${i ? "L" : "M"}${sx(v)} ${sy(k / n)}`).join(""))),
      ...ran.flatMap((l) =>
        l.points.map(([v, k, n]) => svg("circle", { cx: sx(v), cy: sy(k / n), r: 3.2, ...drawn(l.k, "point") })),
      ),
    ];
  });
}

const LIMIT_NAMES = { critical_tokens: "tokens of the critical path" };

function widthPlot(groups) {
  const sizes = [...new Set(known.entries.map((e) => e.size).filter((s) => s !== null))].sort((a, b) => a - b);
  const lines = groups.map((g) => ({
    ...g,
    points: sizes
      .map((s) => [s, g.own.filter((e) => e.size === s)])
      .filter(([, own]) => own.length)
      .map(([s, own]) => [s, mean(own.map((e) => e.branches))]),
  }));
  const max =
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
  const description = lines
    .map((l) => `${plain(l.method)}: ${l.points.map(([s, n]) => `${n.toFixed(1)} at size ${s}`).join(", ")}`)
    .join("; ");
  return plot("Width against size", x, linear(max, "branches, mean"), description, (sx, sy) =>
    lines.flatMap((l) => [
      lineOf(l, l.points.map(([s, n], k) => `${k ? "L" : "M"}${sx(s)} ${sy(n)}`).join("")),
      ...l.points.map(([s, n]) => svg("circle", { cx: sx(s), cy: sy(n), r: 4, ...drawn(l.k, "point") })),
    ]),
  );
}

function parallelismPlot(groups) {
  const max = Math.ceil(
      largest(
        known.entries.map((e) => e.parallelism),
        2,
      ),
    ),
    bins = 24,
    wide = (max - 1) / bins;
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
    label: "parallelism: tokens / critical path",
    format: (v) => `${v}×`,
    ticks: ticks(max - 1, 5).map((v) => v + 1),
    place: (v) => (v - 1) / (max - 1),
  };
  const description = filled
    .map((f) => `${plain(f.method)}: ${times(mean(f.own.map((e) => e.parallelism)))} on average`)
    .join("; ");
  return plot("Distribution of parallelism", x, shares("of trajectories", Math.min(1, high * 1.08)), description, (sx, sy) =>
    filled.flatMap((f) => {
      let d = `M${sx(1)} ${sy(0)}`;
      f.counts.forEach((share, b) => (d += `V${sy(share)}H${sx(1 + (b + 1) * wide)}`));
      return [svg("path", { d: `${d}V${sy(0)}Z`, ...drawn(f.k, "area") }), lineOf(f, `${d}V${sy(0)}`)];
    }),
  );
}

function scatterPlot(groups) {
  const max =
      largest(
        known.entries.map((e) => e.tokens),
        1,
      ) * 1.04,
    every = Math.ceil(known.entries.length / 3000);
  const description = groups
    .map(
      (g) =>
        `${plain(g.method)}: ${count(mean(g.own.map((e) => e.tokens)))} tokens, critical path ${count(mean(g.own.map((e) => e.critical)))} on average`,
    )
    .join("; ");
  return plot(
    "Critical path against tokens",
    linear(max, "tokens"),
    linear(max, "tokens of the critical path"),
    description,
    (sx, sy) => [
      svg("path", { class: "axis", d: `M${sx(0)} ${sy(0)}L${sx(max)} ${sy(max)}` }),
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
