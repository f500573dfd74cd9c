// The page of a report: filters, figures, sorting, and what stands behind a point or a row.
// Everything is drawn from the JSON in the page; means and spreads are taken over the runs that the
// filters leave, with the same rules as in the tables.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (selector, inside = document) => inside.querySelector(selector);
  const $$ = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  // ---- elements ----

  const SVG = "http://www.w3.org/2000/svg";
  const SHAPES = new Set(["svg", "g", "path", "line", "text", "polygon", "circle", "rect"]);

  /** An element with attributes and children; a function as `on…` listens, null leaves out. */
  function element(name, attributes = {}, ...children) {
    const node = SHAPES.has(name) ? document.createElementNS(SVG, name) : document.createElement(name);
    fill(node, attributes, children);
    return node;
  }

  /** A link inside a drawing. */
  function link(attributes, ...children) {
    const node = document.createElementNS(SVG, "a");
    fill(node, attributes, children);
    return node;
  }

  function fill(node, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null));
  }

  // ---- numbers ----

  const percent = (share, digits = 2) => `${(100 * share).toFixed(digits)} %`;

  /** 0.3, 25, 12.5k. */
  function short(x) {
    const units = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
    const [size, unit] = units.find(([size]) => Math.abs(x) >= size) ?? [1, ""];
    return `${Number((x / size).toPrecision(3))}${unit}`;
  }

  /** 23, 2.30k, 154k: with three digits, as in the tables. */
  function count(x) {
    const text = short(x);
    return /[A-Z]$/i.test(text) ? Number(text.slice(0, -1)).toPrecision(3) + text.slice(-1) : String(Math.round(x));
  }

  function seconds(s) {
    if (s < 100) return `${s.toFixed(1)} s`;
    return s < 5400 ? `${(s / 60).toFixed(1)} min` : `${(s / 3600).toFixed(1)} h`;
  }

  /** Mean, standard deviation, half the 95 % interval, n; null of nothing. */
  function statistics(values) {
    const n = values.length;
    if (n === 0) return null;
    const mean = values.reduce((sum, x) => sum + x, 0) / n;
    if (n === 1) return { n, mean, sd: null, half: null };
    const sd = Math.sqrt(values.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (n - 1));
    const student = data.student[Math.min(n - 1, data.student.length) - 1];
    return { n, mean, sd, half: (student * sd) / Math.sqrt(n) };
  }

  const spread = ({ mean, sd, n }) =>
    sd === null ? `${percent(mean)} (one seed)` : `${percent(mean)} ± ${(100 * sd).toFixed(2)} (sd, n = ${n})`;

  // ---- filters ----

  const filter = { models: new Set(data.models.keys()), task: "", width: "", seed: "", text: "" };
  const varying = [...new Set(data.runs.flatMap((run) => Object.keys(run.config)))];
  const haystack = data.runs.map((run) => {
    const differs = varying.map((key) => `${key}=${run.config[key] ?? data.config[key]}`);
    return [run.name, data.models[run.model].name, data.tasks[run.task], ...differs].join(" ").toLowerCase();
  });
  let visible = [];

  function apply() {
    const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean);
    visible = data.runs.map((run, i) =>
      filter.models.has(run.model) &&
      (filter.task === "" || run.task === Number(filter.task)) &&
      (filter.width === "" || run.width === Number(filter.width)) &&
      (filter.seed === "" || run.seed === filter.seed) &&
      words.every((word) => haystack[i].includes(word)));
    const count = visible.filter(Boolean).length;
    $("#shown").textContent = count === visible.length ? `all ${count} runs` : `${count} of ${visible.length} runs`;
    showCards();
    showTables();
    drawFigures();
  }

  /** What an address leads to must not stand behind the filters. */
  function keepClear() {
    document.documentElement.style.scrollPaddingTop = `${$("#filters").offsetHeight + 12}px`;
  }

  /** Controls for what takes more than one value. */
  function makeFilters() {
    const box = $("#filters");
    const form = $("form", box);
    const chips = data.models.map((model, i) =>
      element("button", {
        type: "button", class: "chip", "aria-pressed": "true",
        onclick: (event) => {
          const on = !filter.models.delete(i);
          if (on) filter.models.add(i);
          event.currentTarget.setAttribute("aria-pressed", on);
          apply();
        },
      }, marker(i), model.name));
    if (chips.length > 1) form.append(element("fieldset", {}, element("legend", {}, "Models"), chips));
    const choice = (key, label, options) => {
      if (options.length < 2) return;
      const select = element("select", { name: key, onchange: (event) => { filter[key] = event.target.value; apply(); } },
        element("option", { value: "" }, "all"),
        options.map(([value, text]) => element("option", { value }, text)));
      form.append(element("label", {}, label, select));
    };
    const values = (of) => [...new Set(data.runs.map(of))].sort((a, b) => a - b).map((x) => [x, x]);
    choice("task", "Task", data.tasks.map((task, i) => [i, task]));
    choice("width", "Width", values((run) => run.width));
    choice("seed", "Seed", values((run) => run.seed));
    let timer;
    const text = element("input", {
      type: "search", name: "text", placeholder: "run, model or key=value",
      oninput: (event) => {
        clearTimeout(timer);
        timer = setTimeout(() => { filter.text = event.target.value; apply(); }, 120);
      },
    });
    form.append(element("label", { class: "wide" }, "Text", text));
    form.append(element("button", {
      type: "reset", class: "button",
      onclick: () => {
        clearTimeout(timer);
        Object.assign(filter, { models: new Set(data.models.keys()), task: "", width: "", seed: "", text: "" });
        chips.forEach((chip) => chip.setAttribute("aria-pressed", "true"));
        setTimeout(apply);
      },
    }, "Reset"));
    form.addEventListener("submit", (event) => event.preventDefault());
    box.hidden = false;
    box.open = matchMedia("(min-width: 700px)").matches;
    new ResizeObserver(keepClear).observe(box);
    $$(".js").forEach((node) => { node.hidden = false; });
  }

  // ---- summary ----

  const shownSetting = (setting) => data.settings[setting].groups.some((group) => data.groups[group].runs.some((run) => visible[run]));

  function showCards() {
    const some = (is) => data.runs.some((run, i) => visible[i] && is(run));
    const cells = data.tasks.map((_, task) => some((run) => run.task === task));
    for (const row of $$(".overview tr")) {
      if (row.dataset.model) row.hidden = !some((run) => data.models[run.model].name === row.dataset.model);
      cells.forEach((on, task) => { row.cells[task + 1].hidden = !on; });
    }
    for (const card of $$(".card")) {
      const rows = $$("li", card);
      rows.forEach((row) => { row.hidden = !shownSetting(Number(row.dataset.setting)); });
      card.hidden = rows.every((row) => row.hidden);
    }
  }

  // ---- tables ----

  function makeSortable(table) {
    $$("thead th", table).forEach((head, column) => {
      const button = element("button", { type: "button", onclick: () => sort(table, head, column) }, ...head.childNodes);
      head.replaceChildren(button);
    });
  }

  function sort(table, head, column) {
    const numbers = head.classList.contains("num");
    // Numbers: the largest first, words: from A on; then the other way round.
    const first = numbers ? "descending" : "ascending";
    const other = numbers ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    $$("thead th", table).forEach((cell) => cell.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const compare = (a, b) => {
      // What has no value stays at the end.
      if ((a === "") !== (b === "")) return a === "" ? 1 : -1;
      const [x, y] = [Number(a), Number(b)];
      if (numbers && !Number.isNaN(x) && !Number.isNaN(y)) return sign * (x - y);
      return sign * a.localeCompare(b, "en", { numeric: true });
    };
    const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
    rows.sort((a, b) => compare(a[0], b[0]));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }

  function showTables() {
    for (const row of $$("#runs tbody tr")) row.hidden = !visible[row.dataset.about];
    for (const row of $$("#choice tbody tr")) row.hidden = !data.groups[row.dataset.about].runs.some((run) => visible[run]);
    const table = $("#settings table");
    const columns = Object.fromEntries($$("thead th", table).map((head, i) => [head.dataset.key, i]));
    for (const row of $$("tbody tr", table)) {
      const setting = data.settings[row.dataset.about];
      const runs = data.groups[setting.chosen].runs.filter((run) => visible[run]).map((run) => data.runs[run]);
      row.hidden = runs.length === 0;
      if (row.hidden) continue;
      const set = (key, value, text) => {
        if (!(key in columns)) return;
        const cell = row.cells[columns[key]];
        cell.dataset.v = value ?? "";
        cell.textContent = value === null ? "" : text(value);
      };
      const accuracy = statistics(runs.map((run) => run.accuracy));
      const mean = (of) => statistics(runs.map(of).filter((x) => x !== null))?.mean ?? null;
      set("n", runs.length, String);
      set("accuracy", accuracy.mean, percent);
      set("sd", accuracy.sd, percent);
      set("ci95", accuracy.half, percent);
      set("validation", mean((run) => run.validation), percent);
      set("ceiling", mean((run) => run.ceiling), percent);
      set("share", mean((run) => run.accuracy / run.ceiling), percent);
      set("loss", mean((run) => run.loss), (x) => x.toFixed(4));
      set("seconds", mean((run) => run.seconds), seconds);
      set("tokens_per_s", mean((run) => run.speed), count);
    }
  }

  // ---- drawing ----

  const DASHES = [null, "7 4", "2 3", "12 3"];
  const colour = (model) => `var(--m${data.models[model].colour})`;

  /** The outline of a model's marker around x, y. */
  const outline = (model, x, y, radius) =>
    data.models[model].marker.map(([dx, dy]) => `${(x + radius * dx).toFixed(1)},${(y + radius * dy).toFixed(1)}`).join(" ");

  function symbol(model, variant, x, y, radius = 5) {
    const hollow = variant % 2 === 1;
    return element("polygon", {
      points: outline(model, x, y, radius), "stroke-width": hollow ? 1.5 : 1,
      style: `fill:${hollow ? "var(--card)" : colour(model)};stroke:${hollow ? colour(model) : "var(--card)"}`,
    });
  }

  const marker = (model) =>
    element("svg", { class: "mark", viewBox: "-8 -8 16 16", "aria-hidden": "true" }, symbol(model, 0, 0, 0));

  /** Round values to name between low and high. */
  function ticks(low, high, log, most) {
    if (!log) {
      const raw = (high - low) / most;
      const power = 10 ** Math.floor(Math.log10(raw));
      const step = power * [1, 2, 2.5, 5, 10].find((step) => step * power >= raw * (1 - 1e-9));
      const all = [];
      for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) all.push(i * step);
      return all;
    }
    const within = (steps) => {
      const all = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
        for (const step of steps) all.push(step * 10 ** power);
      return all.filter((x) => x >= low * (1 - 1e-9) && x <= high * (1 + 1e-9));
    };
    const all = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8]].map(within);
    return all.find((ticks) => ticks.length >= 3) ?? all[3];
  }

  /** Points of a line over the visible runs: x, statistics of y, where they lead. */
  function pointsOf(line) {
    const given = line.runs ? curvePoints(line.runs) : line.points;
    return given.flatMap(([setting, values]) => {
      const shown = values.filter(([run]) => visible[run]);
      const y = statistics(shown.map(([, , y]) => y));
      if (y === null) return [];
      const x = shown.reduce((sum, [, x]) => sum + x, 0) / shown.length;
      const target = shown.length === 1 ? `#run-${shown[0][0]}` : `#setting-${setting}`;
      return [{ x, y, target }];
    });
  }

  /** Samples and accuracies of a run's validations. */
  const curve = (run) => data.runs[run].curve.map((y, i) => [data.grids[data.runs[run].grid][i], y / 1e4]);

  /** The curves of runs as points where they were validated together. */
  function curvePoints(runs) {
    const by = new Map();
    for (const run of runs)
      for (const [x, y] of curve(run)) by.set(x, [...(by.get(x) ?? []), [run, x, y]]);
    const setting = data.groups[data.runs[runs[0]].group].setting;
    return [...by].sort(([a], [b]) => a - b).map(([, values]) => [setting, values]);
  }

  /**
   * Draws axes and lines into `box`. A plot has: name, x and y (ranges), log, few, label (of x), ceiling,
   * observers, and lines of { model, variant, label, curve, points }.
   */
  function draw(box, plot) {
    const width = Math.max(260, box.clientWidth);
    const narrow = width < 480;
    const height = Math.round(Math.min(430, Math.max(250, width * 0.56)));
    const [x0, x1] = plot.x;
    const [y0, y1] = plot.y;
    const digits = y1 - y0 < 0.05 ? 1 : 0;
    const room = { left: 44 + 8 * digits, right: 54, top: 12, bottom: 44 };
    const inner = { width: width - room.left - room.right, height: height - room.top - room.bottom };
    const sx = (x) => room.left + inner.width * (plot.log ? Math.log(x / x0) / Math.log(x1 / x0) : (x - x0) / (x1 - x0));
    const sy = (y) => room.top + (inner.height * (y1 - Math.min(y1, Math.max(y0, y)))) / (y1 - y0);
    const right = room.left + inner.width;
    const bottom = room.top + inner.height;
    const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": plot.name });
    for (const y of ticks(y0, y1, false, 5)) {
      svg.append(
        element("line", { class: "grid", x1: room.left, x2: right, y1: sy(y), y2: sy(y) }),
        element("text", { x: room.left - 6, y: sy(y) + 4, "text-anchor": "end" }, percent(y, digits).replace(" %", "%")));
    }
    svg.append(element("line", { class: "axis", x1: room.left, x2: right, y1: bottom, y2: bottom }));
    const found = [...new Set(plot.lines.flatMap((line) => line.points.map((point) => Number(point.x.toPrecision(6)))))];
    const few = plot.few && found.length <= 10 && found.length > 0;
    let end = -Infinity;
    for (const x of (few ? found.sort((a, b) => a - b) : ticks(x0, x1, plot.log, narrow ? 4 : 6))) {
      svg.append(element("line", { class: "axis", x1: sx(x), x2: sx(x), y1: bottom, y2: bottom + 4 }));
      const text = short(x);
      const half = text.length * 3.6;
      if (sx(x) - half < end + 4) continue;
      end = sx(x) + half;
      svg.append(element("text", { x: sx(x), y: bottom + 17, "text-anchor": "middle" }, text));
    }
    svg.append(element("text", { x: room.left + inner.width / 2, y: height - 8, "text-anchor": "middle" }, plot.label));

    const reference = (points, kind, text) => {
      const at = points.length === 1 ? [[x0, points[0][1]], [x1, points[0][1]]] : points;
      const path = at.map(([x, y], i) => `${i ? "L" : "M"}${sx(x).toFixed(1)} ${sy(y).toFixed(1)}`).join("");
      svg.append(
        element("path", { class: kind, d: path }),
        element("text", { x: right + 5, y: sy(at[at.length - 1][1]) + 4, style: "font-size:11px" }, text));
    };
    for (const [k, points] of plot.observers) reference(points, "observer", `last ${k}`);
    if (plot.ceiling.length > 0) reference(plot.ceiling, "ceiling", "ceiling");
    for (const line of plot.lines) svg.append(...drawLine(line, plot, sx, sy));
    keys(svg);
    box.append(svg);
  }

  function drawLine(line, plot, sx, sy) {
    const points = line.points.filter((point) => !plot.log || point.x > 0);
    if (points.length === 0) return [];
    const at = points.map(({ x, y }) => [sx(x), sy(y.mean)]);
    const stroke = `stroke:${colour(line.model)}`;
    const path = at.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
    const series = () => element("path", { class: "series", d: path, style: stroke, "stroke-dasharray": DASHES[line.variant % 4] });
    if (line.curve) {
      const edge = (sign) => points.map(({ x, y }) => `${sx(x).toFixed(1)},${sy(y.mean + sign * (y.sd ?? 0)).toFixed(1)}`);
      const last = points[points.length - 1];
      const say = `${line.label}\nends at ${spread(last.y)}`;
      return [
        element("polygon", { points: [...edge(1), ...edge(-1).reverse()].join(" "), style: `fill:${colour(line.model)};opacity:.13` }),
        hot(link({ href: last.target, "aria-label": say.replace("\n", ", ") }, series(), element("path", { class: "hit", d: path })), say),
      ];
    }
    const bars = points.filter(({ y }) => y.sd !== null && y.sd > 0).map(({ x, y }) => {
      const [px, top, low] = [sx(x), sy(y.mean + y.sd), sy(y.mean - y.sd)];
      return element("path", { d: `M${px - 3} ${top}h6M${px - 3} ${low}h6M${px} ${top}V${low}`, style: `${stroke};opacity:.7`, fill: "none" });
    });
    const marks = points.map((point, i) => {
      const [x, y] = at[i];
      const say = `${line.label}\n${spread(point.y)}\n${plot.label} ${short(point.x)}`;
      const halo = element("circle", { class: "halo", cx: x, cy: y, r: 12, style: `fill:${colour(line.model)}` });
      return hot(link({ href: point.target, "aria-label": say.replaceAll("\n", ", ") }, halo, symbol(line.model, line.variant, x, y)), say);
    });
    return [series(), ...bars, ...marks];
  }

  // ---- tips and keys ----

  const tip = $("#tip");

  /** Says `text` while a pointer or the focus is on `node`. */
  function hot(node, text) {
    const show = (x, y) => {
      tip.textContent = text;
      tip.hidden = false;
      const { width, height } = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - width - 4))}px`;
      tip.style.top = `${y + 16 + height > innerHeight ? y - height - 10 : y + 16}px`;
    };
    const hide = () => { tip.hidden = true; };
    node.addEventListener("pointermove", (event) => show(event.clientX, event.clientY));
    node.addEventListener("pointerleave", hide);
    node.addEventListener("focus", () => {
      if (!node.matches(":focus-visible")) return;
      const { right, top } = node.getBoundingClientRect();
      show(right, top);
    });
    node.addEventListener("blur", hide);
    node.addEventListener("click", hide);
    return node;
  }

  /** One stop of the tab key for a drawing; the arrows go from one link to the next. */
  function keys(svg) {
    const links = $$("a", svg);
    links.forEach((node, i) => node.setAttribute("tabindex", i === 0 ? 0 : -1));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const now = links.indexOf(document.activeElement);
      if (!step || now < 0) return;
      event.preventDefault();
      const next = links[(now + step + links.length) % links.length];
      links[now].setAttribute("tabindex", -1);
      next.setAttribute("tabindex", 0);
      next.focus();
    });
  }

  // ---- figures ----

  function legend(lines) {
    return element("div", { class: "legend" }, lines.map((line) =>
      element("span", {},
        element("svg", { viewBox: "0 0 30 12", "aria-hidden": "true" },
          element("path", { class: "series", d: "M0 6H30", style: `stroke:${colour(line.model)}`, "stroke-dasharray": DASHES[line.variant % 4] }),
          line.curve ? null : symbol(line.model, line.variant, 15, 6, 4)),
        line.label)));
  }

  /** Most panels of a figure that are drawn before one is asked for more. */
  const PANELS = 8;
  const open = new Set();

  function drawFigure(box, index) {
    const figure = data.figures[index];
    box.replaceChildren();
    const plots = figure.panels.map((panel) => {
      const lines = panel.lines.map((line) => ({ ...line, curve: Boolean(line.runs), points: pointsOf(line) }));
      return { ...panel, ...figure.x, x: panel.x, lines: lines.filter((line) => line.points.length > 0) };
    }).filter((plot) => plot.lines.length > 0);
    if (plots.length === 0) box.append(element("p", { class: "empty" }, "No run is left by the filters."));
    const shown = open.has(index) ? plots : plots.slice(0, PANELS);
    const panels = element("div", { class: "panels" });
    box.append(panels);
    const places = shown.map((plot) => {
      const place = element("div", {}, figure.panels.length > 1 ? element("h4", {}, plot.name) : null);
      panels.append(place);
      return place;
    });
    const names = (plot) => plot.lines.map((line) => line.label).join();
    const alike = shown.length > 0 && shown.every((plot) => names(plot) === names(shown[0]));
    // When all have their places their widths are known.
    places.forEach((place, i) => {
      draw(place, { ...shown[i], name: `${figure.title}, ${shown[i].name}` });
      if (!alike) place.append(legend(shown[i].lines));
    });
    if (alike) box.append(legend(shown[0].lines));
    if (shown.length < plots.length) {
      const more = () => { open.add(index); drawFigure(box, index); };
      box.append(element("button", { class: "button", type: "button", onclick: more }, `Show all ${plots.length} panels`));
    }
  }

  // A figure is drawn when it comes near the window.
  const waiting = new Set();
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && waiting.delete(target)) drawFigure(target, Number(target.dataset.figure));
    }
  }, { rootMargin: "600px" });

  function drawFigures() {
    for (const box of $$(".plots")) {
      waiting.add(box);
      near.unobserve(box);
      near.observe(box);
    }
  }

  function drawAll() {
    for (const box of [...waiting]) {
      waiting.delete(box);
      drawFigure(box, Number(box.dataset.figure));
    }
  }

  // ---- details ----

  const dialog = $("#detail");

  const facts = (pairs) => element("dl", { class: "facts" },
    pairs.filter(([, value]) => value !== null && value !== "").map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value))));

  function tableOf(heads, rows) {
    const cell = (name) => (value, i) => element(name, { class: heads[i].number ? "num" : null }, value);
    return element("div", { class: "scroll" }, element("table", {},
      element("thead", {}, element("tr", {}, heads.map((head, i) => cell("th")(head.text, i)))),
      element("tbody", {}, rows.map(({ cells, chosen }) => element("tr", { class: chosen ? "chosen" : null }, cells.map(cell("td")))))));
  }

  const word = (text) => ({ text });
  const number = (text) => ({ text, number: true });

  /** A drawing of the learning curves of some runs, one line each. */
  function curves(runs) {
    const place = element("div");
    const lines = runs.filter((run) => data.runs[run].curve.length > 0).map((run, i) => ({
      model: data.runs[run].model, variant: i, curve: true, label: `seed ${data.runs[run].seed}`,
      points: curve(run).map(([x, y]) => ({ x, y: { mean: y, sd: null, n: 1 }, target: `#run-${run}` })),
    }));
    if (lines.length === 0) return element("p", { class: "muted" }, "No validation was recorded.");
    const xs = lines.flatMap((line) => line.points.map((point) => point.x));
    const ceilings = runs.map((run) => data.runs[run].ceiling);
    const ceiling = statistics(ceilings).mean;
    const plot = {
      name: "Learning curve", x: [0, Math.max(...xs)], y: [0, 1], log: false, few: false, label: "training samples",
      ceiling: [[0, ceiling]], observers: [], lines,
    };
    // It has a width only when the dialog is open.
    requestAnimationFrame(() => {
      draw(place, plot);
      if (lines.length > 1) place.append(legend(lines));
    });
    return place;
  }

  function showSetting(index) {
    const setting = data.settings[index];
    const runs = data.groups[setting.chosen].runs;
    const of = (key) => statistics(runs.map((run) => data.runs[run][key]).filter((x) => x !== null));
    const [accuracy, validation, ceiling] = [of("accuracy"), of("validation"), of("ceiling")];
    const { parameters, state } = data.runs[runs[0]];
    const candidates = setting.groups.map((group) => {
      const { tuned, runs, validation, incomplete } = data.groups[group];
      return {
        chosen: group === setting.chosen,
        cells: [
          group === setting.chosen ? "chosen" : "", ...tuned, String(runs.length) + (incomplete ? " (incomplete)" : ""),
          validation ? percent(validation[0]) : "", validation?.[1] != null ? percent(validation[1]) : "",
        ],
      };
    });
    present(setting.model, setting.label, [
      element("p", { class: "muted" }, data.tasks[setting.task]),
      facts([
        ["test accuracy", spread(accuracy)],
        ["95 % interval", accuracy.half === null ? null : `± ${(100 * accuracy.half).toFixed(2)}`],
        ["Bayes ceiling", percent(ceiling.mean)],
        ["validation", validation && percent(validation.mean)],
        ["parameters", count(parameters)],
        ["state size", state === null ? "grows with the sequence" : count(state)],
        ["time", seconds(of("seconds").mean)],
      ]),
      element("h3", {}, "Candidates"),
      element("p", { class: "small muted" }, `${setting.reason[0].toUpperCase()}${setting.reason.slice(1)}. The test had no say.`),
      tableOf([word(""), ...data.tuned.map(number), number("n"), number("validation"), number("sd")], candidates),
      element("h3", {}, "Learning curves"),
      curves(runs),
      element("h3", {}, "Runs"),
      tableOf([word("run"), number("seed"), number("validation"), number("accuracy"), number("ceiling")], setting.groups.flatMap((group) =>
        data.groups[group].runs.map((run) => {
          const { name, seed, validation, accuracy, ceiling } = data.runs[run];
          const value = validation === null ? "" : percent(validation);
          return { chosen: group === setting.chosen, cells: [element("a", { href: `#run-${run}` }, name), seed, value, percent(accuracy), percent(ceiling)] };
        }))),
    ]);
  }

  function showRun(index) {
    const run = data.runs[index];
    const config = { ...data.config, ...run.config };
    const provenance = { ...data.provenance, ...run.provenance };
    const rows = (all, differs) => element("table", { class: "config" }, element("tbody", {}, Object.entries(all)
      .filter(([, value]) => value !== null)
      .map(([key, value]) => element("tr", { class: key in differs ? "differs" : null }, element("th", { scope: "row" }, key), element("td", {}, value)))));
    const setting = data.groups[run.group].setting;
    const chosen = data.settings[setting].chosen === run.group;
    const again = `selectivbench train ${run.folder}/config.yaml --out again`;
    present(run.model, run.name, [
      element("p", { class: "muted" }, data.tasks[run.task], " · ", element("a", { href: `#setting-${setting}` }, data.settings[setting].label),
        chosen ? "" : " (a candidate that was not chosen)"),
      facts([
        ["test accuracy", percent(run.accuracy)],
        ["of the ceiling", percent(run.accuracy / run.ceiling)],
        ["Bayes ceiling", percent(run.ceiling)],
        ["validation", run.validation === null ? null : percent(run.validation)],
        ["loss", run.loss.toFixed(4)],
        ["seed", run.seed],
        ["parameters", count(run.parameters)],
        ["state size", run.state === null ? "grows with the sequence" : count(run.state)],
        ["time", seconds(run.seconds)],
        ["tokens/s", count(run.speed)],
      ]),
      element("h3", {}, "Learning curve"),
      curves([index]),
      element("h3", {}, "Tests"),
      tableOf([number("gap"), number("accuracy"), number("ceiling"), number("of ceiling"), number("loss")], run.tests.map(([gap, accuracy, ceiling, loss]) => (
        { cells: [gap, percent(accuracy), percent(ceiling), percent(accuracy / ceiling), loss.toFixed(4)] }))),
      element("h3", {}, "Configuration"),
      element("p", { class: "small muted" }, "What is not as in most runs is bold."),
      rows(config, run.config),
      element("h3", {}, "Where it comes from"),
      rows({ folder: run.folder, ...provenance }, {}),
      element("p", { class: "small" }, "Again: ", element("code", {}, again)),
    ]);
  }

  function present(model, title, content) {
    const close = element("button", { class: "button", type: "button", "aria-label": "Close", onclick: () => dialog.close() }, "✕");
    dialog.replaceChildren(
      element("header", {}, element("h2", { id: "detail-title" }, marker(model), " ", title), close),
      element("div", {}, content));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    // For keys the content is what matters, not the button that ends it.
    dialog.focus();
  }

  /** Shows what the address asks for. */
  function follow() {
    const [, kind, index] = location.hash.match(/^#(run|setting)-(\d+)$/) ?? [];
    if (kind === "run" && data.runs[index]) showRun(Number(index));
    else if (kind === "setting" && data.settings[index]) showSetting(Number(index));
    else if (dialog.open) dialog.close();
  }

  dialog.tabIndex = -1;
  dialog.addEventListener("close", () => {
    if (/^#(run|setting)-/.test(location.hash)) history.replaceState(null, "", location.pathname + location.search);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  addEventListener("hashchange", follow);

  // ---- begin ----

  makeFilters();
  $$("table.sortable").forEach(makeSortable);
  apply();
  follow();
  // An address within the page: figures above it must have their heights first.
  const part = document.getElementById(location.hash.slice(1));
  if (part) {
    drawAll();
    part.scrollIntoView();
  }
  let width = innerWidth;
  let timer;
  addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (width !== innerWidth) { width = innerWidth; drawFigures(); }
    }, 150);
  });
  // On paper all figures are needed.
  addEventListener("beforeprint", drawAll);
})();
