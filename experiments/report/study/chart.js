"use strict";
// Numbers as text by kind, and charts: the lines are an SVG that stretches with the page, the words around it are HTML.

const trim = (text) => text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text;
const significant = (value, digits = 3) => {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const magnitude = Math.floor(Math.log10(Math.abs(value)));
  if (magnitude < -4) return value.toExponential(digits - 1);
  const decimals = Math.max(0, digits - 1 - magnitude);
  return trim(value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals }));
};
const prefixed = (value, units, digits = 3) => {
  const [size, unit] = units.find(([size]) => value >= size) ?? [1, units.at(-1)[1].replace(/^./, "")];
  return significant(value / size, digits) + " " + unit;
};
const FORMS = {
  number: (value) => significant(value),
  percent: (value) => trim((100 * value).toFixed(1)) + " %",
  points: (value) => (value < 0 ? "−" : "+") + Math.abs(100 * value).toFixed(1),
  signed: (value) => (value < 0 ? "−" : "+") + significant(Math.abs(value)),
  rate: (value) => value >= 0.01 ? significant(value) : value.toExponential(2).replace(/\.?0+e/, "e"),
  count: (value) => value < 1e3 ? significant(value) : prefixed(value, [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]),
  size: (value) => prefixed(value, [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]]),
  seconds: (value) => value < 1e-3 ? significant(value * 1e6) + " µs" : value < 1 ? significant(value * 1e3) + " ms" : significant(value) + " s",
};

const make = (tag, properties = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value; else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};

// Round numbers from below `low` to above `high`: 1, 2, 2.5 or 5 times a power of ten apart.
const ticks = (low, high, wanted = 4) => {
  if (!(high > low)) { const margin = Math.abs(low) / 3 || 1; low -= margin; high += margin; }
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => power * factor >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
};

// The decades between two numbers, or 1, 2 and 5 in each where there are few.
const decades = (low, high) => {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const powers = Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
  return last - first > 2 ? powers : powers.flatMap((power) => [power, 2 * power, 5 * power]);
};

// One direction of a chart: where a value is, as a share of the way, and which values are written beside it.
const axis = (values, { log = false, from = Infinity, to = -Infinity, few = false, round = false, margin = 0 }) => {
  const scale = log ? Math.log10 : (value) => value;
  const there = [...new Set(values.filter((value) => Number.isFinite(value) && (!log || value > 0)))].sort((a, b) => a - b);
  const low = Math.min(from, there[0]), high = Math.max(to, there.at(-1));
  let marks = few && there.length <= 8 ? there : log ? decades(low, high) : ticks(low, high);
  let [start, end] = round && !log ? [marks[0], marks.at(-1)] : [scale(low), scale(high)];
  const room = start === end ? 0.5 : margin * (end - start);
  [start, end] = [start - room, end + room];
  marks = marks.filter((mark) => scale(mark) >= start && scale(mark) <= end);
  return { at: (value) => (scale(value) - start) / (end - start), marks };
};

// Draws `spec` into `figure`: {title, note, x: {label, form, log}, y: {form, from, to, log}, scatter, series: [{name, colour,
// x, y, low, high, line, points, open, names, opens}]}; null or undefined is a missing value.
const draw = (figure, spec) => {
  const series = spec.series.map((one) => ({ line: true, ...one }));
  const finite = (one, i) => one.y[i] != null && Number.isFinite(one.y[i]) && (!spec.x.log || one.x[i] > 0);
  const xs = series.flatMap((one) => one.x.filter((_, i) => finite(one, i)));
  if (!xs.length) { figure.remove(); return; }
  const ys = series.flatMap((one) => [...one.y, ...(one.low ?? []), ...(one.high ?? [])]).filter((value) => value != null);
  const across = axis(xs, { margin: spec.scatter || spec.x.few ? 0.04 : 0, ...spec.x }), up = axis(ys, { round: true, ...spec.y });
  const left = (x) => (100 * across.at(x)).toFixed(2), top = (y) => (100 * (1 - up.at(y))).toFixed(2);
  const xForm = FORMS[spec.x.form ?? "number"], yForm = FORMS[spec.y.form ?? "number"];

  const drawn = up.marks.map((y) => `<line class="grid" x1="0" x2="100" y1="${top(y)}" y2="${top(y)}"/>`);
  for (const one of series) {
    const there = one.x.map((_, i) => i).filter((i) => finite(one, i));
    const at = (values) => there.map((i) => `${left(one.x[i])},${top(values[i] ?? one.y[i])}`);
    const style = `style="--c:${one.colour}"`;
    if (one.low && one.line) drawn.push(`<polygon ${style} points="${[...at(one.high), ...at(one.low).reverse()].join(" ")}"/>`);
    if (one.low && !one.line) drawn.push(`<path class="whisker" ${style} d="${there.map((i) => `M${left(one.x[i])} ${top(one.low[i])}V${top(one.high[i])}`).join("")}"/>`);
    if (one.line) drawn.push(`<polyline ${style} class="${one.dashed ? "dashed" : ""}" points="${at(one.y).join(" ")}"/>`);
    const dots = there.filter((i) => one.points || there.length === 1 || one.marked === i);
    // a line of no length with round ends stays a round dot however the picture is stretched
    const dot = (kind, which) => which.length && drawn.push(`<path class="${kind}" ${style} d="${which.map((i) => `M${left(one.x[i])} ${top(one.y[i])}h0`).join("")}"/>`);
    dot("dots", dots.filter((i) => i !== one.marked));
    if (one.marked != null && finite(one, one.marked)) { dot("dots large", [one.marked]); dot("dots inner", [one.marked]); }
  }
  const lead = [];
  if (spec.title) lead.push(make("h3", {}, spec.title, ...(spec.unit ? [" ", make("small", {}, spec.unit)] : [])));
  if (spec.note) lead.push(make("p", {}, spec.note));
  if (spec.legend && spec.legend.length > 1) lead.push(legend(spec.legend));
  const area = make("div", { className: "area", tabIndex: 0, role: "img" });
  area.innerHTML = `<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">${drawn.join("")}</svg>`; // numbers and colours only
  area.setAttribute("aria-label", `${spec.title ?? "chart"}: ${series.map((one) => one.name).join("; ")}. Arrow keys read values out.`);
  const written = (node, side, text, at) => { node.style[side] = at + "%"; node.textContent = text; return node; };
  const label = (side, text, at) => written(make("span"), side, text, at);
  const plot = make("div", { className: "plot" },
    make("div", { className: "y-labels", ariaHidden: "true" }, ...up.marks.map((y) => label("top", yForm(y), top(y)))), area,
    make("div", { className: "x-labels", ariaHidden: "true" },
      ...across.marks.map((x) => label("left", xForm(x), left(x))), make("b", {}, spec.x.label)));
  figure.replaceChildren(...(lead.length ? [make("figcaption", {}, ...lead)] : []), plot);
  readout(area, spec, series, { left, top, xForm, yForm, finite });
};

const legend = (entries) => make("ul", { className: "legend" }, ...entries.map(({ name, colour }) => {
  const key = make("i", { className: "key" });
  key.style.background = colour;
  return make("li", {}, key, name);
}));

// What the pointer or the arrow keys are at: all lines at one x, or in a scatter one point.
const readout = (area, spec, series, { left, top, xForm, yForm, finite }) => {
  const entries = series.filter((one) => !one.silent).flatMap((one) => one.x.map((x, i) => ({ one, x, i })).filter(({ i }) => finite(one, i)));
  let stops;
  if (spec.scatter) stops = entries.map((entry) => ({ x: entry.x, y: entry.one.y[entry.i], entries: [entry] }));
  else {
    const byX = new Map();
    for (const entry of entries) byX.set(entry.x, [...(byX.get(entry.x) ?? []), entry]);
    stops = [...byX].map(([x, entries]) => ({ x, entries }));
  }
  stops.sort((a, b) => a.x - b.x || (a.y ?? 0) - (b.y ?? 0));
  const rule = make("div", { className: "rule", hidden: true }), box = make("div", { className: "readout", role: "status", hidden: true });
  area.append(rule, box);
  let current = stops.length - 1;
  const hide = () => { rule.hidden = box.hidden = true; };
  const show = (index) => {
    current = Math.min(Math.max(index, 0), stops.length - 1);
    const stop = stops[current], many = stop.entries.length > 12;
    const title = make("strong", {}, spec.scatter ? stop.entries[0].one.names[stop.entries[0].i] : `${spec.x.label} ${xForm(stop.x)}`);
    const lines = stop.entries.slice(0, 12).map(({ one, i }) => {
      const key = make("i", { className: "key" });
      key.style.background = one.colour;
      const between = one.low && one.low[i] != null ? ` (${yForm(one.low[i])} to ${yForm(one.high[i])})` : "";
      const at = spec.scatter ? `, ${spec.x.label} ${xForm(one.x[i])}` : "";
      return make("div", {}, key, `${spec.scatter ? spec.y.label ?? "" : one.name} ${yForm(one.y[i])}${between}${at}`);
    });
    box.replaceChildren(title, ...lines, ...(many ? [make("div", {}, `and ${stop.entries.length - 12} more`)] : []));
    rule.hidden = box.hidden = false;
    rule.style.left = left(stop.x) + "%";
    const width = area.clientWidth, own = box.offsetWidth, at = left(stop.x) / 100 * width;
    box.style.left = (at + 12 + own <= width ? at + 12 : Math.max(Math.min(0, width - own), at - 12 - own)) + "px";
  };
  const under = (event) => {
    const frame = area.getBoundingClientRect(), x = event.clientX - frame.left, y = event.clientY - frame.top;
    const away = (stop) => Math.hypot(left(stop.x) / 100 * frame.width - x, spec.scatter ? top(stop.y) / 100 * frame.height - y : 0);
    return stops.reduce((best, stop, i) => away(stop) < away(stops[best]) ? i : best, 0);
  };
  const open = () => { const { one, i } = stops[current].entries[0]; one.opens?.(i); };
  area.addEventListener("pointermove", (event) => show(under(event)));
  area.addEventListener("pointerleave", hide);
  area.addEventListener("click", (event) => { if (spec.scatter) { show(under(event)); open(); } });
  area.addEventListener("focus", () => { if (area.matches(":focus-visible")) show(current); });
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: stops.length - 1 };
    if (event.key === "Escape") hide();
    if (event.key === "Enter" && spec.scatter) open();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
};
