// Tables that sort, filter and open the details of a row; and the differences to a configuration of the reader's choice.

const valueOf = (cell) => cell.dataset.v ?? cell.textContent.trim();
const compare = (a, b) => {
  // what is missing comes last in both directions
  if (a === "" || b === "") return a === b ? 0 : null;
  const difference = Number(a) - Number(b);
  return Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference;
};

for (const table of document.querySelectorAll("table.data")) {
  const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0], rows = [...body.rows];
  const sort = (column, descending) => {
    const keyed = rows.map((row) => [valueOf(row.cells[column]), row]);
    const missing = (key) => key === "" ? 1 : 0;
    keyed.sort(([a], [b]) => missing(a) - missing(b) || (descending ? -1 : 1) * (compare(a, b) ?? 0));
    headings.forEach((heading, i) => i === column
      ? heading.setAttribute("aria-sort", descending ? "descending" : "ascending") : heading.removeAttribute("aria-sort"));
    body.append(...keyed.map(([, row]) => row));
  };
  headings.forEach((heading, column) => {
    const button = make("button", { type: "button" }, ...heading.childNodes);
    heading.append(button);
    // the better end first: large scores, small costs
    button.addEventListener("click", () => sort(column, heading.hasAttribute("aria-sort")
      ? heading.getAttribute("aria-sort") === "ascending" : heading.dataset.first === "descending"));
  });
  table.resort = () => {
    const column = headings.findIndex((heading) => heading.hasAttribute("aria-sort"));
    if (column >= 0) sort(column, headings[column].getAttribute("aria-sort") === "descending");
  };

  const wanted = new Map(), search = make("input", { type: "search", placeholder: "Filter by words", ariaLabel: "Filter rows by words" });
  const count = make("output", { className: "count" });
  const filter = () => {
    const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const row of rows) {
      const text = terms.length ? row.textContent.toLowerCase() : "";
      row.hidden = !(terms.every((term) => text.includes(term)) && [...wanted].every(([column, value]) => row.cells[column].textContent === value));
      left += !row.hidden;
    }
    count.textContent = left === rows.length ? `${rows.length.toLocaleString("en")} rows` : `${left.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    rove();
  };
  search.addEventListener("input", filter);
  const selects = headings.flatMap((heading, column) => {
    if (!("filter" in heading.dataset)) return [];
    const values = [...new Map(rows.map((row) => [row.cells[column].textContent, valueOf(row.cells[column])]))];
    if (values.length < 2) return [];
    values.sort(([, a], [, b]) => compare(a, b) ?? 0);
    return [choice(heading.textContent, [["*", "all"], ...values.map(([text]) => ["=" + text, text || "–"])], "*", (value) => {
      if (value === "*") wanted.delete(column); else wanted.set(column, value.slice(1));
      filter();
    })];
  });

  // One row's button is in the tab order; the arrow keys go from row to row.
  const rove = () => {
    const shown = rows.filter((row) => !row.hidden && row.button);
    if (shown.some((row) => row.button.tabIndex === 0)) return;
    rows.forEach((row) => { if (row.button) row.button.tabIndex = -1; });
    const first = [...body.rows].find((row) => !row.hidden && row.button);
    if (first) first.button.tabIndex = 0;
  };
  for (const row of rows) {
    if (!("cell" in row.dataset || "configuration" in row.dataset)) continue;
    const head = row.cells[0];
    row.button = make("button", { type: "button", tabIndex: -1 }, ...head.childNodes);
    head.append(row.button);
    row.addEventListener("click", () => open({ row }));
    row.button.addEventListener("focus", () => {
      rows.forEach((other) => { if (other.button) other.button.tabIndex = other === row ? 0 : -1; });
    });
    row.button.addEventListener("keydown", (event) => {
      const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
      if (!step) return;
      event.preventDefault();
      let other = row[step];
      while (other?.hidden) other = other[step];
      other?.button.focus();
    });
  }
  table.closest(".scroll").before(make("div", { className: "controls" }, ...(rows.length > 8 ? [...selects, search] : []), count));
  filter();
}

// The details of a cell or a configuration, over the page.
const dialog = make("dialog", { className: "details" });
document.body.append(dialog);
const facts = (row) => [...row.cells].flatMap((cell, i) => {
  const text = (cell.querySelector(".said") ?? cell).textContent.trim();
  const name = row.closest("table").tHead.rows[0].cells[i].textContent;
  return text ? [make("div", {}, make("dt", {}, name), make("dd", {}, text))] : [];
});
const open = ({ row, cell, configuration }) => {
  row ??= document.querySelector(cell != null ? `tr[data-cell="${cell}"]` : `.results tr[data-configuration="${configuration}"]`);
  const charts = "cell" in row.dataset ? cellCharts(Number(row.dataset.cell)) : configurationCharts(Number(row.dataset.configuration));
  const title = row.dataset.label, figures = charts.map((spec) => [make("figure", { className: "chart small" }), spec]);
  const costs = "cell" in row.dataset ? null : document.querySelector(`.costs tr[data-configuration="${row.dataset.configuration}"]`);
  const members = "cell" in row.dataset ? [] : [...document.querySelectorAll(`.cells tr[data-of="${row.dataset.configuration}"]`)];
  const links = members.map((member) => {
    const link = make("button", { type: "button" }, member.dataset.label);
    link.addEventListener("click", () => open({ row: member }));
    return link;
  });
  const shown = [...row.parentElement.rows].filter((other) => !other.hidden), place = shown.indexOf(row);
  const step = (text, to) => {
    const button = make("button", { type: "button", disabled: !shown[to] }, text);
    button.addEventListener("click", () => open({ row: shown[to] }));
    return button;
  };
  const close = make("button", { type: "button", className: "close", ariaLabel: "Close" }, "×");
  close.addEventListener("click", () => dialog.close());
  dialog.setAttribute("aria-label", title);
  dialog.replaceChildren(
    make("div", { className: "bar" }, make("h3", { tabIndex: -1, autofocus: true }, title), step("Previous", place - 1), step("Next", place + 1), close),
    make("dl", {}, ...facts(row), ...(costs ? facts(costs).filter((fact) => !facts(row).some((own) => own.textContent === fact.textContent)) : [])),
    make("div", { className: "charts" }, ...figures.map(([figure]) => figure)),
    ...(links.length ? [make("h3", {}, "Its cells"), make("div", { className: "links" }, ...links)] : []));
  if (!dialog.open) dialog.showModal();
  figures.forEach(([figure, spec]) => draw(figure, spec));
  dialog.scrollTop = 0;
};
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

const cellCharts = (index) => {
  const curve = study.cells[index];
  if (!curve) return [];
  const x = { label: "step" }, one = (name, x, y, points) => [{ name, colour: "var(--c0)", x, y, points }];
  const train = study.grids[curve.train], evaluated = study.grids[curve.validation];
  return [
    { title: "Training loss", x, y: {}, series: one("loss", train, curve.loss) },
    { title: `Validation ${score.name}`, x, y: { form: score.form }, series: one(score.name, evaluated, curve.validation_score, true) },
    { title: "Validation loss", x, y: {}, series: one("loss", evaluated, curve.validation_loss, true) },
    { title: "Gradient norm", unit: "before clipping", x, y: { from: 0 }, series: one("norm", train, curve.gradient_norm) },
  ].filter(({ series: [{ y }] }) => y?.some((value) => value != null));
};
const configurationCharts = (index) => Object.values(study.lines).filter(({ own }) => own).flatMap(({ lines, ...how }) => {
  const line = lines.find(({ c }) => c === index);
  return line ? [{ ...how, series: [{ ...line, name: how.title, colour: "var(--c0)", points: how.points }] }] : [];
});

for (const square of document.querySelectorAll("td[data-configuration]")) {
  const button = make("button", { type: "button", title: square.title }, ...square.childNodes);
  button.addEventListener("click", () => open({ configuration: square.dataset.configuration }));
  square.append(button);
}

// Differences to a configuration of the reader's choice; the page starts with the one best on validation.
const results = document.querySelector(".results");
if (results && study.pairs) {
  const { members, rows: pairs, reference } = study.pairs, column = Number(results.dataset.difference);
  const between = (a, b) => {
    const [i, j] = [Math.min(a, b), Math.max(a, b)];
    const [value, low, high, said] = pairs[i * members.length - i * (i + 1) / 2 + j - i - 1];
    return i === a ? { value, low, high, said } : { value: -value, low: -high, high: -low, said };
  };
  const refer = (to) => {
    const found = members.map((_, own) => own === to ? null : between(own, to));
    const least = Math.min(0, ...found.map((pair) => pair?.low ?? 0)), span = Math.max(0, ...found.map((pair) => pair?.high ?? 0)) - least || 1;
    const mark = (kind, from, to) => {
      const node = make("i", { className: kind });
      node.style.left = 100 * (from - least) / span + "%";
      if (to != null) node.style.width = 100 * (to - from) / span + "%";
      return node;
    };
    for (const row of results.tBodies[0].rows) {
      const cell = row.cells[column], own = members.indexOf(Number(row.dataset.configuration));
      const pair = found[own];
      cell.dataset.v = own === to ? 0 : pair?.value ?? "";
      row.classList.toggle("reference", own === to);
      if (!pair) { cell.replaceChildren(own === to ? "the reference" : "not compared"); if (own !== to) cell.dataset.v = ""; continue; }
      const form = FORMS[score.difference], text = `${form(pair.value)} (${form(pair.low)} to ${form(pair.high)})`;
      const verdict = study.pairs.verdicts[pair.said];
      cell.replaceChildren(
        make("span", { className: "forest " + (pair.said ? "open" : "separated"), ariaHidden: "true" },
          mark("zero", 0), mark("whisker", pair.low, pair.high), mark("dot", pair.value)),
        make("span", { className: "said" }, text, ...(verdict ? [" ", make("small", {}, verdict)] : [])));
    }
    results.resort();
  };
  const options = members.map((c, i) => [String(i), study.configurations[c].label]);
  results.closest(".scroll").previousElementSibling.prepend(choice("Differences to", options, String(reference), (value) => refer(Number(value))));
  refer(reference);
}
