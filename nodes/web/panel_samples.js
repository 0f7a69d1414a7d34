/** The samples of a job: all prompts at an iteration, one prompt over the iterations, and a slider
 * between before and after. */

import { button, createPart, keyed, make, setAttributes, setLine, setText } from "./panel_dom.js";
import { thin } from "./panel_state.js";
import { ARROWS, leftOut, score, trend } from "./panel_text.js";
import { plural, t } from "./words.js";

const FEW = 12; // images before "show all"; also the length of the strip
const SMALL = 200; // px; smaller images are shown with sharp pixels

const named = ({ iteration }) => (iteration
  ? t("iteration {number}", { number: iteration }) : t("base model"));

/** @param {object} control of panel_control.js. */
export function createSamples(control) {
  const view = { job: null, iteration: null, prompt: 0, all: false }; // iteration null: the newest
  const choose = (sample) => {
    view.iteration = sample.iteration === sampled(view.job).at(-1).iteration ? null
      : sample.iteration;
    draw(view.job);
  };
  const redraw = () => draw(view.job);
  const none = make("p", { class: "pcpo-soft" });
  const when = createWhen(choose);
  const grid = make("ul", { class: "pcpo-grid", "aria-label": t("samples, one a prompt") });
  const fewer = make("p", { class: "pcpo-soft" });
  const more = button("", () => {
    view.all = !view.all;
    redraw();
  }, { class: "pcpo-small" });
  const compare = createCompare();
  const strip = make("ul", { class: "pcpo-strip", "aria-label": t("this prompt by iteration") });
  const body = make("div", {}, when.element, fewer, grid, more, compare.element, strip);

  function draw(job) {
    const samples = sampled(job);
    none.hidden = samples.length > 0;
    setLine(none, samples.length ? "" : emptyText(job));
    body.hidden = !samples.length;
    if (!samples.length) return;
    const now = samples.find(({ iteration }) => iteration === view.iteration) ?? samples.at(-1);
    view.prompt = Math.min(view.prompt, now.count - 1);
    const item = (sample, index) => describe(control, job.id, samples[0], sample, index);
    const count = view.all ? now.count : Math.min(FEW, now.count);
    when.update(samples, now);
    setLine(fewer, leftOut(job).images);
    const cells = Array.from({ length: count }, (_, index) => item(now, index));
    keyed(grid, cells.map((cell) => ({ ...cell, isOn: cell.index === view.prompt,
      name: cell.prompt, text: cell.score })), ({ index }) => index, () => createThumb((cell) => {
      view.prompt = cell.index;
      redraw();
    }));
    more.hidden = now.count <= FEW;
    setText(more, view.all ? t("Show fewer")
      : plural("Show {count} prompt", "Show all {count} prompts", now.count));
    const chosen = thin(samples, FEW, (sample) => sample === now)
      .filter((sample) => view.prompt < sample.count);
    keyed(strip, chosen.map((sample) => ({ ...item(sample, view.prompt), isOn: sample === now,
      name: named(sample), text: named(sample) })), ({ iteration }) => iteration,
    () => createThumb(choose));
    compare.update(item(samples[0], view.prompt), item(now, view.prompt));
  }

  const update = (job) => {
    if (view.job?.id !== job.id) Object.assign(view, { iteration: null, prompt: 0, all: false });
    view.job = job;
    redraw();
  };
  return { element: createPart(t("Samples"), [none, body]), update };
}

const sampled = (job) => (job.samples ?? []).filter(({ count }) => count > 0)
  .sort((a, b) => a.iteration - b.iteration);

const emptyText = ({ config }) => (config?.run?.eval_prompts === 0
  ? t("This job keeps no samples: its number of held-out images is 0.") : t("No samples yet."));

/** All that is shown of one image. */
function describe(control, id, first, sample, index) {
  const { prompt = "", reward = null } = sample.scores?.[index] ?? {};
  const before = first.scores?.[index]?.reward ?? null;
  const change = sample === first ? "" : trend(before, reward);
  return { index, iteration: sample.iteration, prompt, change, title: named(sample),
    score: score(reward) + ARROWS[change], missing: index >= sample.count,
    src: control.sampleURL(id, sample.iteration, index) };
}

/** Which iteration is looked at. */
function createWhen(choose) {
  let samples = [];
  const text = make("label", { for: "pcpo-when" });
  const slider = make("input", { type: "range", id: "pcpo-when", min: 0, step: 1 });
  slider.addEventListener("input", () => choose(samples[Number(slider.value)]));
  const update = (all, now) => {
    samples = all;
    setAttributes(slider, { max: all.length - 1 });
    const at = String(all.indexOf(now));
    if (slider.value !== at) slider.value = at;
    const rewards = (now.scores ?? []).map(({ reward }) => reward).filter(Number.isFinite);
    const mean = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
    const words = rewards.length ? t("{when}, mean reward {reward}",
      { when: named(now), reward: score(mean) }) : named(now);
    setText(text, t("Fixed prompts and seeds: {what}", { what: words }));
    setAttributes(slider, { "aria-valuetext": words });
    slider.hidden = all.length < 2;
  };
  return { element: make("div", { class: "pcpo-when" }, text, slider), update };
}

/** An image to press, with a line below it. */
function createThumb(choose) {
  let cell;
  const picture = createImage();
  const text = make("span");
  const made = button("", () => choose(cell), { class: "pcpo-thumb" });
  made.append(picture, text);
  const update = (now) => {
    cell = now;
    setImage(picture, now);
    setText(text, now.text);
    setAttributes(text, { class: now.text === now.score ? now.change : "" });
    setAttributes(made, { "aria-pressed": String(now.isOn), title: now.name });
  };
  return { element: make("li", {}, made), update };
}

/** The prompt at the first kept iteration and at the chosen one, over each other. */
function createCompare() {
  const prompt = make("p", { class: "pcpo-prompt" });
  const before = createImage();
  const after = createImage();
  const edge = make("i");
  const stage = make("div", { class: "pcpo-stage" }, before, after, edge);
  const slider = make("input", { type: "range", min: 0, max: 100, value: 50,
    "aria-label": t("how much of the earlier image is shown, in percent") });
  const left = make("span");
  const right = make("span");
  const move = () => {
    after.style.clipPath = `inset(0 0 0 ${slider.value}%)`;
    edge.style.left = `${slider.value}%`;
  };
  const drag = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    const box = stage.getBoundingClientRect();
    slider.value = Math.round((100 * (event.clientX - box.left)) / box.width);
    move();
  };
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    drag(event);
  });
  stage.addEventListener("pointermove", drag);
  slider.addEventListener("input", move);
  move();
  const update = (first, now) => {
    const single = first.iteration === now.iteration;
    setText(prompt, now.prompt);
    setImage(before, first);
    setImage(after, now);
    after.hidden = edge.hidden = slider.hidden = single || now.missing;
    setText(left, `${first.title}: ${first.score}`);
    setText(right, single ? "" : `${now.title}: ${now.score}`);
    setAttributes(right, { class: now.change });
  };
  const element = make("div", { class: "pcpo-compare" }, prompt, stage, slider,
    make("div", { class: "pcpo-ends" }, left, right));
  return { element, update };
}

function createImage() {
  const made = make("img", { draggable: "false", loading: "lazy" });
  made.addEventListener("load", () => {
    made.classList.toggle("pcpo-pixels", made.naturalWidth < SMALL);
  });
  return made;
}

function setImage(image, { src, prompt, title }) {
  setAttributes(image, { src, alt: `${prompt}, ${title}` });
}
