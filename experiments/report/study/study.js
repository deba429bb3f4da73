// Fills the study's charts from the numbers embedded in the page, and links tables, squares and points to details.

const study = JSON.parse(document.getElementById("study").textContent);
const score = study.score;

// Colours: steps of one ramp for an ordered axis, else those of a palette that colour-blind readers can tell apart.
const colour = (axis, index) => {
  const { values, ordered } = study.axes[axis] ?? { values: [0] };
  if (!ordered) return index < 8 ? `var(--c${index})` : `hsl(${(index * 137.5) % 360} 55% 55%)`;
  const at = values.length > 1 ? 4 * index / (values.length - 1) : 2, stop = Math.min(3, Math.floor(at));
  return `color-mix(in oklab, var(--r${stop}), var(--r${stop + 1}) ${Math.round(100 * (at - stop))}%)`;
};
const words = (axis, index) => study.axes[axis].values[index]; // empty where the axis means nothing
const without = (axis) => `no ${study.axes[axis].name}`;
const choice = (name, options, selected, change) => {
  const select = make("select", {}, ...options.map(([value, text]) => make("option", { value, selected: value === selected }, text)));
  select.addEventListener("change", () => change(select.value));
  return make("label", {}, name + " ", select);
};
const lazily = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    lazily.unobserve(target);
    target.render();
  }
}, { rootMargin: "400px" });
addEventListener("beforeprint", () => document.querySelectorAll("figure.chart:empty").forEach((figure) => figure.render?.()));

const { lineAxis } = study;
const byAxis = (what, selected, change) => study.axes.length > 1
  ? [choice(what, study.axes.map(({ name }, i) => [String(i), `by ${name}`]), String(selected), (value) => change(Number(value)))] : [];

// Small multiples: a chart for each combination of the other axes, a line for each value of one.
const FACETS = 12;
const facets = (container) => {
  const names = container.dataset.lines.split(" ").filter((name) => study.lines[name]);
  let shown = names[0], by = lineAxis, most = FACETS, part;
  const render = () => {
    const { lines: every, title, parts, ...how } = study.lines[shown];
    const kinds = parts ? [...new Set(every.map(({ part }) => part))] : [];
    if (!kinds.includes(part)) part = kinds[0];
    const lines = parts ? every.filter((line) => line.part === part) : every;
    const charts = new Map();
    for (const line of lines) {
      const { at, label } = study.configurations[line.c];
      const others = at.map((value, axis) => axis === by ? "" : words(axis, value)).filter(Boolean);
      const key = others.join(", ") || title;
      if (!charts.has(key)) charts.set(key, []);
      charts.get(key).push({ ...line, name: (study.axes.length && words(by, at[by])) || label, label, colour: colour(by, at[by] ?? 0) });
    }
    const [least, largest] = bounds(lines.flatMap((line) => [...line.y, ...(line.low ?? []), ...(line.high ?? [])]).filter((value) => value != null));
    const y = { ...how.y, from: Math.min(how.y.from ?? Infinity, least), to: Math.max(how.y.to ?? -Infinity, largest) };
    const figures = [...charts].slice(0, most).map(([key, series]) => {
      const figure = make("figure", { className: "chart small" });
      figure.render = () => draw(figure, { ...how, y, title: key, series: series.map((one) => ({
        points: how.points, dashed: one.dashed, ...one,
        names: how.scatter && one.x.map((_, i) => `${one.label}, ${how.each} ${one.names[i]}`),
        opens: how.scatter && (() => open({ configuration: one.c })),
      })) });
      lazily.observe(figure);
      return figure;
    });
    const values = study.axes[by]?.values ?? [];
    const used = new Set(lines.map(({ c }) => study.configurations[c].at[by]));
    const keys = values.map((name, i) => ({ name: name || without(by), colour: colour(by, i), i })).filter(({ i }) => used.has(i));
    const controls = [
      ...(names.length > 1 ? [choice("Show", names.map((name) => [name, study.lines[name].title]), shown, (value) => { shown = value; render(); })] : []),
      ...(kinds.length > 1 ? [choice(parts, kinds.map((name) => [name, name]), part, (value) => { part = value; render(); })] : []),
      ...byAxis("Lines", by, (value) => { by = value; render(); }),
    ];
    const rest = charts.size - figures.length;
    const all = make("button", { type: "button", className: "more" }, `Show the other ${rest} charts`);
    all.addEventListener("click", () => { most = Infinity; render(); });
    container.replaceChildren(
      make("div", { className: "controls" }, ...controls, ...(keys.length > 1 ? [legend(keys)] : [])),
      make("div", { className: "charts" }, ...figures), ...(rest > 0 ? [all] : []));
  };
  render();
};
const bounds = (values) => [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), -Infinity)];

// Quality against each cost: a point for each configuration, and the front that none is better and cheaper than.
const fronts = (container) => {
  let by = lineAxis;
  const { charts, y, low, high } = study.fronts, labels = study.configurations.map(({ label }) => label);
  const render = () => {
    const names = study.axes[by]?.values ?? ["configurations"];
    const figures = charts.map(({ values: x, front, ...how }) => {
      const points = names.map((name, index) => {
        const own = labels.map((_, c) => c).filter((c) => (study.configurations[c].at[by] ?? 0) === index && x[c] != null && y[c] != null);
        const pick = (of) => own.map((c) => of[c]);
        return { name, colour: colour(by, index), x: pick(x), y: pick(y), low: pick(low), high: pick(high), line: false, points: true,
          names: pick(labels), opens: (i) => open({ configuration: own[i] }) };
      }).filter(({ x }) => x.length);
      const edge = { name: "front", colour: "var(--soft)", silent: true, dashed: true, x: front.flatMap((c, i) => i ? [x[c], x[c]] : [x[c]]),
        y: front.flatMap((c, i) => i ? [y[front[i - 1]], y[c]] : [y[c]]) };
      const figure = make("figure", { className: "chart" });
      figure.render = () => draw(figure, { ...how, note: "On the front: " + front.map((c) => labels[c]).join("; "), scatter: true, y: { form: score.form, label: score.name }, series: [edge, ...points] });
      lazily.observe(figure);
      return figure;
    });
    const keys = names.map((name, i) => ({ name: name || without(by), colour: colour(by, i) }));
    container.replaceChildren(
      make("div", { className: "controls" }, ...byAxis("Colours", by, (value) => { by = value; render(); }), ...(keys.length > 1 ? [legend(keys)] : [])),
      make("div", { className: "charts" }, ...figures));
  };
  render();
};

// Heat maps: one pair of axes is shown at a time.
for (const box of document.querySelectorAll(".heat")) {
  const pairs = [...box.querySelectorAll(".maps")];
  const show = (name) => pairs.forEach((pair) => { pair.hidden = pair.dataset.pair !== name; });
  if (pairs.length < 2) continue;
  const select = choice("Axes", pairs.map(({ dataset }) => [dataset.pair, dataset.pair]), pairs[0].dataset.pair, show);
  box.prepend(make("div", { className: "controls" }, select));
  show(pairs[0].dataset.pair);
}

// Subspace similarities: a square of pixels for each pair of bases, φ in hundredths, two digits a square.
for (const canvas of document.querySelectorAll("canvas[data-phi]")) {
  const { phi, width, colours } = canvas.dataset, columns = Number(width), ramp = colours.split(" ");
  const values = phi.match(/../g).map(Number), context = canvas.getContext("2d");
  canvas.width = columns;
  canvas.height = values.length / columns;
  values.forEach((value, i) => {
    context.fillStyle = ramp[Math.round(value / 99 * (ramp.length - 1))];
    context.fillRect(i % columns, Math.floor(i / columns), 1, 1);
  });
  const said = canvas.closest("figure").querySelector("output");
  canvas.addEventListener("pointermove", (event) => {
    const frame = canvas.getBoundingClientRect();
    const column = Math.min(columns - 1, Math.floor((event.clientX - frame.left) / frame.width * columns));
    const row = Math.min(canvas.height - 1, Math.floor((event.clientY - frame.top) / frame.height * canvas.height));
    said.textContent = `i = ${row + 1}, j = ${column + 1}: φ = ${(values[row * columns + column] / 99).toFixed(2)}`;
  });
}

document.querySelectorAll(".facets[data-lines]").forEach(facets);
document.querySelectorAll(".fronts").forEach(fronts);
