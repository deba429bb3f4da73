"use strict";
// The read-out of a chart follows the pointer, or the arrow keys when the chart has the focus.
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const area = figure.querySelector(".area"), rule = figure.querySelector(".rule"), readout = figure.querySelector(".readout");
  const steps = [...new Set(data.series.flatMap((s) => s.x))].sort((a, b) => a - b);
  const [low, high] = data.x;
  let current = steps.length - 1;

  const nearest = (xs, x) => {
    let best = 0;
    xs.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = i; });
    return best;
  };
  const show = (index) => {
    current = Math.min(Math.max(index, 0), steps.length - 1);
    const step = steps[current], share = (step - low) / (high - low);
    readout.replaceChildren();
    const head = document.createElement("strong");
    head.textContent = "step " + step.toLocaleString("en");
    readout.append(head);
    for (const series of data.series) {
      const i = nearest(series.x, step);
      if (series.x[i] !== step) continue;
      const line = document.createElement("div"), key = document.createElement("i");
      key.className = "key " + series.style;
      line.append(key, series.name + " " + series.text[i]);
      readout.append(line);
    }
    rule.hidden = readout.hidden = false;
    rule.style.left = 100 * share + "%";
    const width = area.clientWidth, own = readout.offsetWidth, at = share * width;
    readout.style.left = (at + 12 + own <= width ? at + 12 : Math.max(0, at - 12 - own)) + "px";
  };
  const hide = () => { rule.hidden = readout.hidden = true; };

  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    show(nearest(steps, low + (high - low) * (event.clientX - box.left) / box.width));
  });
  area.addEventListener("pointerleave", hide);
  area.addEventListener("focus", () => { if (area.matches(":focus-visible")) show(current); });
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: steps.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}
