/**
 * Line and bar charts as inline SVG, for the report page and the panel in ComfyUI.
 *
 * No dependency and no state of its own: `lineChart` and `barChart` replace what the element holds,
 * so calling one again with new values is how a chart is updated. A chart fills the width of its
 * element and follows it. Colours come from `currentColor` and the CSS variables --chart-1 to
 * --chart-5, so that a theme is a matter of the page.
 *
 * Values that are null, missing or not finite leave a gap; so do values <= 0 on a log axis.
 * With the pointer over a chart, or with it focused and the arrow keys, Home and End, the legend
 * reads out the values at that place; Escape goes back to the last one. Focus and the place pointed
 * at survive an update.
 */

import { numeral, t } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const FALLBACK = ["#1f5fbf", "#c0392b", "#7a7f87", "#1d7a3c", "#8a5a00"];
const HEIGHT = 230;
const TOP = 10;
const BOTTOM = 40;
const CHARACTER = 6.6; // width of one in a tick label, px

/** Colour of the i-th series; the page may set --chart-1, --chart-2, ... */
export function colour(i) {
  const n = i % FALLBACK.length;
  return `var(--chart-${n + 1}, ${FALLBACK[n]})`;
}

/** A number for people: four digits, powers of ten where it is very large or small. */
export function format(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return numeral(value, { maximumSignificantDigits: 4 });
}

/**
 * Lines, points and bands over a common x.
 *
 * @param {HTMLElement} element what the chart is put into; its contents are replaced.
 * @param {object} options
 * @param {string} [options.title] above the chart, and its name for screen readers.
 * @param {Array<{name: string, x: number[], y: number[], low?: number[], high?: number[],
 *   style?: {color?: string, dash?: string, width?: number, points?: boolean}}>} options.series
 *   low and high bound a band; `dash` as in stroke-dasharray; width 0 draws points alone.
 * @param {string} [options.xLabel]
 * @param {string} [options.yLabel]
 * @param {[number, number]} [options.yRange] else from the values.
 * @param {boolean} [options.log] logarithmic y; linear all the same where nothing is positive.
 * @param {number} [options.height] of the drawing, px.
 */
export function lineChart(element, options) {
  show(element, (width) => drawLines(element, width, options));
}

/**
 * Bars side by side, from 0 upwards.
 *
 * @param {HTMLElement} element what the chart is put into; its contents are replaced.
 * @param {object} options
 * @param {string} [options.title] above the chart, and its name for screen readers.
 * @param {Array<{label: string, value: number, color?: string}>} options.bars
 * @param {string[]} [options.edges] labels of the borders between bars, one more than bars, "" for
 *   none; without them each bar has its label beneath.
 * @param {string} [options.name] of the values, in the legend.
 * @param {string} [options.xLabel]
 * @param {string} [options.yLabel]
 * @param {[number, number]} [options.yRange] else from 0 to the largest value.
 * @param {number} [options.height] of the drawing, px.
 */
export function barChart(element, options) {
  show(element, (width) => drawBars(element, width, options));
}

// ---- drawing ------------------------------------------------------------------------------------

function drawLines(element, width, options) {
  const log = options.log && options.series.some((s) => s.y.some((v) => v > 0));
  const usable = (v) => v != null && Number.isFinite(v) && (!log || v > 0);
  const shown = options.series.map((s, i) => ({
    ...s,
    style: { color: colour(i), width: 1.8, ...s.style },
    at: new Map(s.x.map((x, k) => [x, k]).filter(([, k]) => usable(s.y[k]))),
  }));
  const xs = [...new Set(shown.flatMap((s) => [...s.at.keys()]))].sort((a, b) => a - b);
  if (!xs.length) return empty(element, options.title);
  const bounds = shown.flatMap((s) => [s.y, s.low ?? [], s.high ?? []]).flat().filter(usable);
  const yAxis = axis(bounds, { range: options.yRange, log });
  const xAxis = axis(xs, { integer: xs.every(Number.isInteger), tight: true, count: width / 70 });
  const plot = frame(element, width, options, xAxis, yAxis);
  for (const s of shown) {
    drawBand(plot, s, yAxis.low, usable);
    drawSeries(plot, s, usable);
  }
  const items = shown.map((s) => ({ name: s.name, style: s.style }));
  const readOut = legend(plot.figure, items, options.xLabel ?? "x");
  const cursor = group(plot.svg, { "pointer-events": "none" });
  const pointAt = (i, marked) => {
    const values = shown.map((s) => describe(s, xs[i]));
    readOut(format(xs[i]), values);
    cursor.replaceChildren();
    if (!marked) return;
    const x = plot.x(xs[i]);
    add(cursor, "line", { x1: x, x2: x, y1: TOP, y2: plot.bottom, stroke: "currentColor",
      "stroke-opacity": 0.5 });
    for (const s of shown.filter((s) => s.at.has(xs[i]))) {
      add(cursor, "circle", { cx: x, cy: plot.y(s.y[s.at.get(xs[i])]), r: 4 }, s.style.color);
    }
  };
  interact(plot, xs.map(plot.x), pointAt);
  const ends = shown.filter((s) => s.at.size).map((s) => {
    const k = [...s.at.values()];
    return t("{name} from {first} to {last}", { name: s.name, first: format(s.y[k[0]]),
      last: format(s.y[k.at(-1)]) });
  });
  plot.svg.setAttribute("aria-label", t("{title}, {axis} {first} to {last}: {lines}", {
    title: options.title ?? t("chart"), axis: options.xLabel ?? "x", first: format(xs[0]),
    last: format(xs.at(-1)), lines: ends.join("; ") }));
}

function describe(series, x) {
  const k = series.at.get(x);
  if (k === undefined) return "–";
  const low = series.low?.[k];
  const high = series.high?.[k];
  if (low == null || high == null) return format(series.y[k]);
  return t("{value} ({low} to {high})",
    { value: format(series.y[k]), low: format(low), high: format(high) });
}

function drawBand(plot, series, floor, usable) {
  if (!series.low || !series.high) return;
  const whole = (k) => usable(series.y[k]) && usable(series.high[k]) && series.low[k] != null;
  for (const run of runs(series.x, whole)) {
    const upper = run.map((k) => [plot.x(series.x[k]), plot.y(series.high[k])]);
    const lower = run.map((k) => [plot.x(series.x[k]), plot.y(Math.max(series.low[k], floor))]);
    const d = `M${[...upper, ...lower.reverse()].map((p) => p.join(" ")).join("L")}Z`;
    add(plot.marks, "path", { d, "fill-opacity": 0.15 }, series.style.color);
  }
}

function drawSeries(plot, series, usable) {
  const { color, dash, width, points } = series.style;
  for (const run of runs(series.x, (k) => usable(series.y[k]))) {
    const places = run.map((k) => [plot.x(series.x[k]), plot.y(series.y[k])]);
    if (width && places.length > 1) {
      const line = add(plot.marks, "path", { d: `M${places.map((p) => p.join(" ")).join("L")}`,
        fill: "none", "stroke-width": width, "stroke-linejoin": "round" });
      line.style.stroke = color;
      if (dash) line.setAttribute("stroke-dasharray", dash);
    }
    if (points || places.length === 1) {
      for (const [cx, cy] of places) add(plot.marks, "circle", { cx, cy, r: 3.2 }, color);
    }
  }
}

/** Indices of the stretches without a gap. */
function runs(x, usable) {
  const found = [[]];
  x.forEach((_, k) => (usable(k) ? found.at(-1).push(k) : found.push([])));
  return found.filter((run) => run.length);
}

function drawBars(element, width, options) {
  const { bars, edges } = options;
  const values = bars.map((b) => (Number.isFinite(b.value) ? b.value : 0));
  if (!bars.length) return empty(element, options.title);
  const yAxis = axis([0, ...values], { range: options.yRange, floor: 0 });
  const labels = edges ?? bars.map((b) => b.label);
  const shift = edges ? 0 : 0.5;
  const wanted = labels.map((label, i) => [i + shift, label]).filter(([, label]) => label !== "");
  const widest = Math.max(...wanted.map(([, label]) => label.length)) * CHARACTER + 10;
  const room = Math.max(1, Math.floor((width - 70) / widest));
  const every = Math.ceil(wanted.length / room);
  const ticks = wanted.filter((_, i) => i % every === 0);
  const xAxis = { low: 0, high: bars.length, ticks: ticks.map(([at]) => at), log: false,
    label: (at) => ticks.find(([place]) => place === at)[1] };
  const plot = frame(element, width, options, xAxis, yAxis);
  const drawn = bars.map((bar, i) => {
    const x = plot.x(i) + 0.5;
    const y = plot.y(Math.min(values[i], yAxis.high));
    const size = { width: Math.max(1, plot.x(i + 1) - x - 0.5), height: plot.bottom - y };
    return add(plot.marks, "rect", { x, y, ...size }, bar.color ?? colour(0));
  });
  const name = options.name ?? options.yLabel ?? t("value");
  const readOut = legend(plot.figure, [{ name, style: { color: colour(0) } }], options.xLabel);
  const pointAt = (i, marked) => {
    drawn.forEach((bar, k) => bar.setAttribute("fill-opacity", marked && k !== i ? 0.55 : 1));
    readOut(bars[i].label, [format(bars[i].value)]);
  };
  const largest = values.indexOf(Math.max(...values));
  interact(plot, bars.map((_, i) => plot.x(i + 0.5)), pointAt, largest);
  plot.svg.setAttribute("aria-label", t("{title}, {count} bars; largest {name}: {value}", {
    title: options.title ?? t("chart"), count: bars.length, name: bars[largest].label,
    value: format(values[largest]) }));
}

// ---- axes ---------------------------------------------------------------------------------------

/** Where an axis begins and ends, and its ticks. */
function axis(values, { range, log = false, integer = false, tight = false, count = 5, floor }) {
  let [low, high] = range ?? values.reduce(
    ([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (tight ? 1 : pad(low)),
    high + (tight ? 1 : pad(high))];
  else if (!range && !tight && log) [low, high] = [low / 1.3, high * 1.3];
  else if (!range && !tight) [low, high] = [low - (high - low) / 25, high + (high - low) / 25];
  if (floor !== undefined) low = floor;
  const ticks = log ? logTicks(low, high) : linearTicks(low, high, count, integer);
  return { low, high, log, ticks, label: format };
}

const pad = (value) => Math.abs(value) / 10 || 1;

function linearTicks(low, high, count, integer) {
  const raw = (high - low) / Math.max(2, Math.min(8, count));
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].find((m) => m * power >= raw * 0.999) * power;
  if (integer) step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) {
    ticks.push(Number((k * step).toPrecision(10)));
  }
  return ticks;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const decades = Math.log10(high / low);
  const steps = decades > 2.5 ? [1] : decades > 1.2 ? [1, 3] : [1, 2, 3, 5, 7];
  const every = Math.max(1, Math.ceil(decades / 6));
  const ticks = [];
  for (let power = first; power <= last; power += every) {
    ticks.push(...steps.map((m) => Number(`${m}e${power}`)));
  }
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  return inside.length > 2 || decades > 1 ? inside : linearTicks(low, high, 4, false);
}

function scale({ low, high, log }, from, to) {
  const f = log ? Math.log : (v) => v;
  return (v) => Number((from + ((f(v) - f(low)) / (f(high) - f(low))) * (to - from)).toFixed(2));
}

// ---- the parts around the marks -----------------------------------------------------------------

/** Title, grid, ticks and labels; gives the two scales and the group that marks are drawn into. */
function frame(element, width, options, xAxis, yAxis) {
  const height = options.height ?? HEIGHT;
  const figure = document.createElement("figure");
  figure.style.margin = "0";
  if (options.title) {
    const caption = document.createElement("figcaption");
    caption.textContent = options.title;
    caption.style.fontWeight = "600";
    figure.append(caption);
  }
  const svg = add(figure, "svg", { width, height, viewBox: `0 0 ${width} ${height}`,
    role: "img", tabindex: 0 });
  svg.style.cssText = "display:block;max-width:100%;touch-action:pan-y;font:11px system-ui,"
    + "sans-serif;fill:currentColor;overflow:visible";
  const widest = Math.max(...yAxis.ticks.map((tick) => yAxis.label(tick).length), 1);
  const left = widest * CHARACTER + (options.yLabel ? 26 : 10);
  const right = width - 10;
  const bottom = height - BOTTOM;
  const x = scale(xAxis, left, right);
  const y = scale(yAxis, bottom, TOP);
  const grid = group(svg, { stroke: "currentColor", "stroke-opacity": 0.13 });
  const text = group(svg, { "fill-opacity": 0.75 });
  for (const tick of yAxis.ticks) {
    add(grid, "line", { x1: left, x2: right, y1: y(tick), y2: y(tick) });
    say(text, yAxis.label(tick), { x: left - 6, y: y(tick) + 4, "text-anchor": "end" });
  }
  for (const tick of xAxis.ticks) {
    add(grid, "line", { x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4 });
    const anchor = x(tick) > right - 12 ? "end" : "middle";
    const at = anchor === "end" ? right + 8 : x(tick);
    say(text, xAxis.label(tick), { x: at, y: bottom + 16, "text-anchor": anchor });
  }
  const middle = (left + right) / 2;
  if (options.xLabel) {
    say(text, options.xLabel, { x: middle, y: height - 6, "text-anchor": "middle" });
  }
  if (options.yLabel) {
    const place = `translate(10 ${(TOP + bottom) / 2}) rotate(-90)`;
    say(text, options.yLabel, { transform: place, "text-anchor": "middle" });
  }
  const marks = group(svg, {});
  element.replaceChildren(figure);
  return { element, figure, svg, marks, x, y, bottom };
}

/** The names of the series with their values at the cursor; gives the function that fills it. */
function legend(figure, items, xName) {
  const list = document.createElement("ul");
  list.style.cssText = "list-style:none;margin:.25rem 0 0;padding:0;display:flex;flex-wrap:wrap;"
    + "gap:.15rem 1rem;font-size:.82rem;font-variant-numeric:tabular-nums";
  const place = row(list, xName ?? "");
  const values = items.map(({ name, style }) => row(list, name, style));
  figure.append(list);
  return (x, texts) => {
    place.textContent = x;
    texts.forEach((text, i) => (values[i].textContent = text));
  };
}

function row(list, name, style) {
  const item = document.createElement("li");
  if (style) {
    const swatch = add(item, "svg", { width: 20, height: 8, "aria-hidden": "true" });
    swatch.style.cssText = "display:inline-block;margin-right:.35rem;vertical-align:middle";
    if (style.width === 0) add(swatch, "circle", { cx: 10, cy: 4, r: 3.2 }, style.color);
    else {
      const line = add(swatch, "line", { x1: 0, x2: 20, y1: 4, y2: 4, "stroke-width": 2.5,
        "stroke-dasharray": style.dash ?? "none" });
      line.style.stroke = style.color;
    }
  }
  const value = document.createElement("b");
  item.append(`${name} `, value);
  list.append(item);
  return value;
}

/** Calls `pointAt(index, marked)` for the place nearest the pointer, or chosen with the keys. */
function interact({ element, svg, figure }, places, pointAt, rest = places.length - 1) {
  const drawing = drawings.get(element);
  let now = rest;
  const go = (i, marked = true) => {
    now = Math.max(0, Math.min(places.length - 1, i));
    drawing.pointed = marked ? now : null;
    pointAt(now, marked);
  };
  const leave = () => go(rest, false);
  const follow = (event) => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    let best = 0;
    places.forEach((p, i) => (best = Math.abs(p - x) < Math.abs(places[best] - x) ? i : best));
    go(best);
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("focus", () => {
    figure.lastElementChild.setAttribute("aria-live", "polite");
    if (svg.matches(":focus-visible")) go(now);
  });
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: places.length - 1 };
    if (event.key === "Escape") leave();
    else if (event.key in moves) go(moves[event.key]);
    else return;
    event.preventDefault();
  });
  if (drawing.pointed == null) leave();
  else go(drawing.pointed);
}

function empty(element, title) {
  const note = document.createElement("p");
  note.textContent = title ? t("{title}: no values yet", { title }) : t("no values yet");
  element.replaceChildren(note);
}

function add(parent, tag, attributes, fill) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (fill) made.style.fill = fill;
  parent.append(made);
  return made;
}

const group = (parent, attributes) => add(parent, "g", attributes);
const say = (parent, text, attributes) => (add(parent, "text", attributes).textContent = text);

// ---- width --------------------------------------------------------------------------------------

const drawings = new WeakMap();
const observer = new ResizeObserver((entries) =>
  requestAnimationFrame(() => entries.forEach(({ target }) => redraw(target))));

function show(element, draw) {
  drawings.set(element, { draw, width: 0, pointed: drawings.get(element)?.pointed ?? null });
  redraw(element);
  observer.observe(element);
}

function redraw(element) {
  const drawing = { ...drawings.get(element) }; // a copy: the parts replaced keep the old one
  const width = Math.floor(element.clientWidth) || 320; // 320: not laid out yet
  if (width === drawing.width) return;
  drawing.width = width;
  drawings.set(element, drawing);
  const focused = element.contains(document.activeElement);
  drawing.draw(width);
  if (focused) element.querySelector("svg[tabindex]")?.focus({ preventScroll: true });
}
