"use strict";
// Curves on SVG. One view (a range of steps) and one cursor (a step) hold for all charts.
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const runs = JSON.parse($("#logged").textContent);
  const margin = { left: 58, right: 24, top: 10, bottom: 24 };
  const tip = $("#tip"), hidden = new Set();
  const steps = [...new Set(runs.flatMap((run) => [...run.line.step, ...run.points.step]))].sort((a, b) => a - b);
  const whole = [steps[0], steps[steps.length - 1]];
  let view = whole, cursor = null, log = false;

  function svg(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // The first index whose step is not below `step`.
  function at(list, step) {
    let low = 0, high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] < step) low = middle + 1; else high = middle;
    }
    return low;
  }

  function nearest(list, step) {
    const i = at(list, step);
    return i > 0 && (i === list.length || step - list[i - 1] <= list[i] - step) ? i - 1 : i;
  }

  function shown(value, digits = 5) {
    if (value === null || value === undefined) return "no number";
    const size = Math.abs(value);
    if (size && (size < 1e-2 || size >= 1e7)) return (+value.toPrecision(digits)).toExponential();
    return Number(value.toPrecision(Math.max(digits, Math.ceil(Math.log10(size + 1))))).toLocaleString("en", { maximumFractionDigits: 9 });
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((m) => m * size >= 0.7 * raw) * size, found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(+(i * step).toPrecision(12));
    return found;
  }

  function logTicks(low, high) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      for (const m of high / low > 1e3 ? [1] : [1, 2, 5]) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(+(m * 10 ** e).toPrecision(3));
    return found.length > 1 ? found : ticks(low, high, 4);
  }

  // Of a long run each value is the mean of a stretch, which also has its lowest and highest value.
  function columns(logged, key) {
    return { x: logged.step, y: logged[key], low: logged[key + "_low"], high: logged[key + "_high"] };
  }

  const charts = $$("figure[data-line]").map((figure) => {
    const plot = $(".plot", figure), { line, points } = figure.dataset;
    const series = runs.flatMap((run, number) => [
      { run: number, name: run.name, ...columns(run.line, line), dots: false },
      ...(points ? [{ run: number, name: run.name + ", held out", ...columns(run.points, points), dots: true }] : []),
    ]).filter((one) => one.y.some((value) => value !== null));
    const chart = { plot, title: $("h3", figure).textContent };
    let width, height, x, y, over;

    const visible = () => series.filter((one) => !hidden.has(one.run));
    // The points in view and one more on each side, so that lines run to the edge.
    const range = (one) => [Math.max(0, at(one.x, view[0]) - 1), Math.min(one.x.length, at(one.x, view[1] + 1e-9) + 1)];

    // More points than pixels are drawn as the mean of each bucket within a band from lowest to highest.
    function trace(one, useLog) {
      const [from, to] = range(one), buckets = Math.floor(width / 2), many = to - from > 2 * buckets, banded = many || one.low;
      const size = many ? (to - from) / buckets : 1, path = [], upper = [], lower = [], dots = [];
      let pen = "M";
      for (let start = from; Math.round(start) < to; start += size) {
        const part = [], ends = [];
        for (let i = Math.round(start); i < Math.min(to, Math.round(start + size)); i++) if (one.y[i] !== null && (!useLog || one.y[i] > 0)) {
          part.push(one.y[i]);
          if (one.low) ends.push(...[one.low[i], one.high[i]].filter((value) => !useLog || value > 0));
        }
        if (!part.length) { pen = "M"; continue; }
        const px = x(one.x[Math.min(to - 1, Math.round(start + (size - 1) / 2))]).toFixed(1);
        const mean = y(part.reduce((a, b) => a + b) / part.length).toFixed(1);
        path.push(pen + px + " " + mean);
        dots.push([px, mean]);
        pen = "L";
        if (banded) { upper.push(px + " " + y(Math.max(...part, ...ends)).toFixed(1)); lower.push(px + " " + y(Math.min(...part, ...ends)).toFixed(1)); }
      }
      return { path: path.join(""), band: banded ? "M" + upper.concat(lower.reverse()).join("L") + "Z" : "", dots: many ? [] : dots };
    }

    chart.draw = () => {
      const useLog = log && "log" in figure.dataset;
      width = plot.clientWidth - margin.left - margin.right;
      height = plot.clientHeight - margin.top - margin.bottom;
      let low = Infinity, high = -Infinity;
      for (const one of visible()) for (let [i, to] = range(one); i < to; i++) for (const value of [one.y[i], one.low?.[i], one.high?.[i]]) {
        if (value === null || value === undefined || (useLog && value <= 0)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
      if (low > high) [low, high] = useLog ? [0.1, 1] : [0, 1];
      const rim = useLog ? 1.08 : (high - low || Math.abs(high) || 1) * 0.06;
      if (useLog) { low /= rim; high *= rim; } else { low = low >= 0 ? Math.max(0, low - rim) : low - rim; high += rim; }
      const scale = useLog ? Math.log : (value) => value;
      x = (step) => margin.left + (step - view[0]) / (view[1] - view[0] || 1) * width;
      y = (value) => margin.top + height - (scale(value) - scale(low)) / (scale(high) - scale(low)) * height;
      const id = "clip-" + line, root = svg("svg", { viewBox: `0 0 ${plot.clientWidth} ${plot.clientHeight}`, "aria-hidden": "true" });
      const clip = svg("clipPath", { id });
      clip.append(svg("rect", { x: margin.left - 5, y: 0, width: width + 10, height: margin.top + height + 5 }));
      root.append(clip);
      const marks = (useLog ? logTicks : ticks)(low, high, Math.max(3, Math.floor(height / 45)));
      const digits = Math.min(9, Math.max(2, Math.ceil(Math.log10(Math.max(Math.abs(low), Math.abs(high)) / (high - low || 1))) + 2));
      for (const value of marks) {
        root.append(svg("line", { class: "grid", x1: margin.left, x2: margin.left + width, y1: y(value), y2: y(value) }));
        root.append(svg("text", { x: margin.left - 8, y: y(value) + 4, "text-anchor": "end" }, shown(value, digits)));
      }
      for (const step of ticks(view[0], view[1] > view[0] ? view[1] : view[0] + 1, Math.max(3, Math.floor(width / 90)))) {
        if (Number.isInteger(step)) root.append(svg("text", { x: x(step), y: margin.top + height + 18, "text-anchor": "middle" }, step.toLocaleString("en")));
      }
      const drawn = svg("g", { "clip-path": `url(#${id})` });
      for (const one of visible()) {
        const look = `s${one.run % 6} d${one.run % 5}`, { path, band, dots } = trace(one, useLog);
        if (band) drawn.append(svg("path", { class: "band " + look, d: band }));
        drawn.append(svg("path", { class: `curve ${look}${one.dots ? " thin" : ""}`, d: path }));
        if (one.dots || dots.length === 1) for (const [cx, cy] of dots) drawn.append(svg("circle", { class: look, cx, cy, r: 3.2 }));
      }
      // Where a run was best and where early stopping ended it; a label per row, on the side that has room.
      const marked = points ? runs.flatMap((run, number) => hidden.has(number) ? [] : run.marks.map(([step, label]) => [step, runs.length > 1 ? `${run.name}, ${label}` : label])) : [];
      for (const [row, [step, label]] of marked.entries()) {
        if (step < view[0] || step > view[1]) continue;
        const end = x(step) > margin.left + width / 2;
        drawn.append(svg("line", { class: "event", x1: x(step), x2: x(step), y1: margin.top, y2: margin.top + height }));
        drawn.append(svg("text", { x: x(step) + (end ? -6 : 6), y: margin.top + 10 + 14 * row, "text-anchor": end ? "end" : "start" }, label));
      }
      over = svg("g", {});
      root.append(drawn, over);
      plot.replaceChildren(root);
      if (plot === tip.parentNode) tip.hidden = true;
      chart.point();
    };

    chart.values = () => visible().map((one) => ({ ...one, i: nearest(one.x, cursor) }))
      .filter((one) => one.i < one.x.length && (one.dots ? one.x[one.i] === cursor : true));

    chart.point = () => {
      over.replaceChildren();
      if (cursor === null || cursor < view[0] || cursor > view[1]) return;
      over.append(svg("line", { class: "cursor", x1: x(cursor), x2: x(cursor), y1: margin.top, y2: margin.top + height }));
      for (const one of chart.values()) if (one.y[one.i] !== null && !(log && one.y[one.i] <= 0))
        over.append(svg("circle", { class: `at s${one.run % 6}`, cx: x(one.x[one.i]), cy: y(one.y[one.i]), r: 3 }));
    };

    chart.tell = () => {
      const table = document.createElement("table"), head = document.createElement("div");
      head.textContent = "step " + cursor.toLocaleString("en");
      for (const one of chart.values()) {
        const row = table.insertRow(), mark = svg("svg", { class: `swatch s${one.run % 6} d${one.run % 5}`, viewBox: "0 0 28 8" });
        mark.append(one.dots ? svg("circle", { cx: 14, cy: 4, r: 3 }) : svg("path", { d: "M1 4H27" }));
        row.insertCell().append(mark);
        row.insertCell().textContent = runs.length > 1 ? one.name : one.dots ? "held out" : points ? "training" : chart.title.toLowerCase();
        row.insertCell().textContent = shown(one.y[one.i], 6) + (one.x[one.i] === cursor ? "" : ` at ${one.x[one.i]}`);
      }
      tip.replaceChildren(head, table);
      plot.append(tip);
      tip.hidden = false;
      const left = x(cursor) + 14, room = plot.clientWidth - tip.offsetWidth;
      tip.style.left = Math.max(0, left > room ? Math.min(room, x(cursor) - 14 - tip.offsetWidth) : left) + "px";
      tip.style.top = margin.top + "px";
    };

    chart.inWords = () => `Step ${cursor}: ` + chart.values().map((one) => `${runs.length > 1 || one.dots ? one.name + " " : ""}${shown(one.y[one.i], 6)}`).join(", ");
    const stepAt = (event) => view[0] + (event.clientX - plot.getBoundingClientRect().left - margin.left) / width * (view[1] - view[0]);

    // A mouse hovers and drags out a range; a finger moves the cursor.
    let began = null, selection = null;
    plot.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse") return move(stepAt(event), chart);
      if (event.button === 0) { began = event.clientX; plot.setPointerCapture(event.pointerId); }
    });
    plot.addEventListener("pointermove", (event) => {
      if (began !== null) {
        const edge = plot.getBoundingClientRect().left, [from, to] = [began, event.clientX].sort((a, b) => a - b);
        selection?.remove();
        selection = svg("rect", { class: "selection", x: from - edge, width: to - from, y: margin.top, height });
        over.parentNode.append(selection);
      }
      move(stepAt(event), chart);
    });
    plot.addEventListener("pointerup", (event) => {
      if (began === null) return;
      const edge = plot.getBoundingClientRect().left, far = Math.abs(event.clientX - began) > 8;
      const range = [began, event.clientX].sort((a, b) => a - b).map((px) => view[0] + (px - edge - margin.left) / width * (view[1] - view[0]));
      began = null;
      selection?.remove();
      if (far) zoom(...range);
    });
    plot.addEventListener("pointerleave", () => { if (began === null) clear(); });
    plot.addEventListener("dblclick", () => zoom(...whole));
    plot.addEventListener("blur", clear);
    plot.addEventListener("keydown", (event) => {
      const here = nearest(steps, cursor ?? view[0]), far = event.shiftKey ? 10 : 1;
      const target = { ArrowLeft: here - far, ArrowRight: cursor === null ? here : here + far, Home: at(steps, view[0]), End: at(steps, view[1] + 1e-9) - 1 }[event.key];
      if (target !== undefined) {
        const step = steps[Math.min(steps.length - 1, Math.max(0, target))];
        if (step < view[0] || step > view[1]) zoom(view[0] + step - Math.min(Math.max(step, view[0]), view[1]), view[1] + step - Math.min(Math.max(step, view[0]), view[1]));
        move(step, chart);
        $("#spoken").textContent = chart.inWords();
      } else if (event.key === "+" || event.key === "=") by(0.5);
      else if (event.key === "-") by(2);
      else if (event.key === "Escape") zoom(...whole);
      else return;
      event.preventDefault();
    });
    return chart;
  });

  function draw() {
    for (const chart of charts) chart.draw();
  }

  function move(step, active) {
    const seen = steps.slice(at(steps, view[0]), at(steps, view[1] + 1e-9));
    if (!seen.length) return;
    cursor = seen[nearest(seen, step)];
    for (const chart of charts) chart.point();
    active.tell();
  }

  function clear() {
    cursor = null;
    tip.hidden = true;
    for (const chart of charts) chart.point();
  }

  function zoom(from, to) {
    const least = Math.min(2, whole[1] - whole[0]), middle = (from + to) / 2;
    if (to - from < least) [from, to] = [middle - least / 2, middle + least / 2];
    view = [Math.max(whole[0], from), Math.min(whole[1], to)];
    $("#whole").disabled = view[0] === whole[0] && view[1] === whole[1];
    draw();
    $("#spoken").textContent = `Steps ${Math.ceil(view[0])} to ${Math.floor(view[1])}`;
  }

  function by(factor) {
    const middle = cursor ?? (view[0] + view[1]) / 2;
    zoom(middle - (middle - view[0]) * factor, middle + (view[1] - middle) * factor);
  }

  function press(button, on) {
    button.setAttribute("aria-pressed", on);
  }

  for (const button of $$(".run")) button.addEventListener("click", () => {
    const run = +button.dataset.run, on = hidden.delete(run);
    if (!on) hidden.add(run);
    press(button, on);
    draw();
  });
  $("#closer")?.addEventListener("click", () => by(0.5));
  $("#farther")?.addEventListener("click", () => by(2));
  $("#whole")?.addEventListener("click", () => zoom(...whole));
  $("#log")?.addEventListener("click", (event) => { log = !log; press(event.currentTarget, log); draw(); });

  const system = matchMedia("(prefers-color-scheme: dark)"), theme = $("#theme");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = isDark() ? "Light page" : "Dark page"; };
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; label(); });
  system.addEventListener("change", label);
  label();
  let width = 0;
  new ResizeObserver(() => { if (charts.length && charts[0].plot.clientWidth !== width) { width = charts[0].plot.clientWidth; draw(); } }).observe(document.body);
})();
