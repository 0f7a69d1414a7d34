/** The page of one job: what can be asked of it, its curves, samples, settings, files and log. */

import { lineChart } from "./charts.js";
import { createConfirm, isUsable, setUsable } from "./panel_confirm.js";
import { curves } from "./panel_curves.js";
import { button, createPart, keyed, make, setAttributes, setLine, setText } from "./panel_dom.js";
import { createHead } from "./panel_head.js";
import { createSamples } from "./panel_samples.js";
import { attempt } from "./panel_state.js";
import { allSettings, can, fileName, guardLine, isLive, leftOut, rewardLine, settings } from "./panel_text.js";
import { foldersOf, tasteOf } from "./taste_control.js";
import { createLack } from "./weights_page.js";
import { mark, plural, t } from "./words.js";

const STOP = mark("Stop after this iteration");

/** What can be asked for, in the order of the buttons, and why it may not be possible now. */
const ACTIONS = [
  ["pause", mark("Pause"), mark("Only a job that is training can be paused.")],
  ["continue", mark("Continue"), mark("Only a paused job can be continued.")],
  ["resume", mark("Resume training"),
    mark("Only a job that stopped, failed or was lost can be resumed.")],
  ["stop", STOP, mark("This job is not training.")],
  ["stop_now", mark("Stop now"), mark("Only a job that is training has an iteration to break off.")],
  ["sample", mark("Sample now"), mark("Samples are made while a job is training.")],
];
const INSTEAD = ["pause", "continue", "resume"]; // of these one is shown

/**
 * @param {object} control of panel_control.js.
 * @param {object} tastes of taste_control.js.
 * @param {object} weights of weights_control.js.
 */
export function createJobView(control, tastes, weights) {
  let job;
  const name = make("h2", { tabindex: -1 });
  const back = button(t("← All jobs"), control.close, { class: "pcpo-small pcpo-back" });
  const head = createHead(name);
  const lora = createLora(control);
  const reward = make("p", { class: "pcpo-reward" });
  const guard = make("p", { class: "pcpo-soft" });
  const actions = createActions(control, () => job);
  const votes = createVotes(tastes, () => job);
  const lack = createLack(weights);
  const parts = [createCurves(), createSamples(control), createSettings(), createFiles(control),
    createLog()];
  const element = make("div", { class: "pcpo-job", hidden: "" }, back, lora.element, head.element,
    reward, actions.element, lack.element, votes.element, guard, ...parts.map((part) => part.element));
  let drawn = null;
  return {
    element,
    focus() {
      name.focus({ preventScroll: true });
      back.scrollIntoView({ block: "nearest" });
    },
    update(now, { jobs: state, taste, weights: known }) {
      if (job && job.id !== now.id) actions.reset();
      job = now;
      setText(name, job.name ?? "");
      head.update(job);
      lora.update(job);
      setLine(reward, job.state === "done" && job.message ? "" : rewardLine(job));
      actions.update(state);
      attempt(() => votes.update(taste));
      attempt(() => lack.update(job, known));
      element.classList.toggle("pcpo-waiting", !state.detail);
      if (!state.detail || state.detail === drawn) return; // the rest is as it was
      drawn = state.detail;
      setLine(guard, guardLine(job));
      for (const part of parts) attempt(() => part.update(job));
    },
  };
}

/** The name of a finished job's LoRA, as loaders list it. */
function createLora(control) {
  const name = make("strong");
  const copy = button(t("Copy name"), () => control.copy(name.textContent,
    t("The name was copied.")), { class: "pcpo-small" });
  const element = make("p", { class: "pcpo-lora", hidden: "" }, "LoRA ", name, " ", copy);
  const update = ({ state, publish }) => {
    setText(name, state === "done" && publish ? fileName(publish) : "");
    element.hidden = !name.textContent;
  };
  return { element, update };
}

// ---- actions ------------------------------------------------------------------------------------

function createActions(control, job) {
  const buttons = ACTIONS.map(([action, text, why]) => {
    const made = button(t(text), (event) => event.detail < 2 && isUsable(made)
      && control.ask(job().id, action)); // not what a double click finds in the place of the first
    if (INSTEAD.includes(action)) made.classList.add("pcpo-main");
    return [action, made, t(why)];
  });
  const stop = buttons.find(([action]) => action === "stop")[1];
  const loader = button(t("Add Load Job LoRA to graph"), () => control.addLoader(job()));
  const remove = button(t("Delete …"), () => isUsable(remove) && confirm.open());
  const confirm = createConfirm(remove, () => control.ask(job().id, "delete"));
  const row = make("div", { class: "pcpo-actions", role: "group", "aria-label": t("actions") },
    ...buttons.map(([, made]) => made), loader, remove);
  row.addEventListener("keydown", (event) => event.repeat && event.preventDefault());
  const update = ({ pending }) => {
    const now = job();
    const busy = pending.some((name) => name.startsWith(`${now.id} `));
    const usable = (action) => can(now, action) && !busy;
    const main = INSTEAD.find((action) => can(now, action));
    const focused = document.activeElement;
    for (const [action, made, why] of buttons) {
      made.hidden = INSTEAD.includes(action) ? action !== (main ?? (isLive(now) && "pause"))
        : !isLive(now) && !can(now, action);
      setUsable(made, usable(action), why);
      setAttributes(made, { "aria-busy": pending.includes(`${now.id} ${action}`) || null });
    }
    setText(stop, now.state === "queued" ? t("Take out of the queue") : t(STOP));
    if (row.contains(focused) && focused.hidden) row.querySelector(":not([hidden])").focus();
    setUsable(remove, usable("delete"), t("Stop the job first, then delete it."));
    setAttributes(remove, { "aria-busy": pending.includes(`${now.id} delete`) || null });
    confirm.update(t("Delete “{job}” with its samples, checkpoints and log? Its LoRA in models/loras is kept.",
      { job: now.name }), can(now, "delete"));
  };
  return { element: make("div", {}, row, confirm.element), update, reset: confirm.close };
}

/** The way from a job to votes on its pictures. */
function createVotes(tastes, job) {
  let name;
  const rate = button(t("Rate this job’s samples"), () => isUsable(rate) && tastes.rate(job()),
    { title: t("Choose between its sample pictures, so that a taste learns what you like") });
  const wait = button("", () => tastes.voteOn(name), { class: "pcpo-main" });
  const element = make("div", { class: "pcpo-actions" }, rate, wait);
  const update = (taste) => {
    const own = tasteOf(job(), taste.tastes);
    const isAsking = foldersOf(job()).length && (isLive(job()) || taste.tastes === null);
    if (isAsking) tastes.listen(); // its pairs come while it trains
    name = own?.name;
    wait.hidden = !own?.waiting;
    setText(wait, own ? plural("{count} pair to vote on", "{count} pairs to vote on", own.waiting) : "");
    rate.hidden = !(job().samples ?? []).some(({ count }) => count > 0);
    setUsable(rate, !taste.busy, null);
    setAttributes(rate, { "aria-busy": taste.busy === `rate ${job().id}` || null });
    element.hidden = rate.hidden && wait.hidden;
  };
  return { element, update };
}

// ---- parts --------------------------------------------------------------------------------------

function createCurves() {
  const none = make("p", { class: "pcpo-soft" }, t("No iteration is finished yet."));
  const thinned = make("p", { class: "pcpo-soft" });
  const charts = make("div", { class: "pcpo-charts" });
  const others = make("div", { class: "pcpo-charts" });
  const more = make("details", { class: "pcpo-all" }, make("summary", {}, t("More curves")), others);
  const element = createPart(t("Curves"), [none, thinned, charts, more]);
  const create = () => {
    const place = make("div");
    return { element: place, update: (options) => lineChart(place, options) };
  };
  const update = (job) => {
    const all = curves(job);
    none.hidden = all.length > 0;
    setLine(thinned, leftOut(job).curves);
    const hidden = all.filter((chart) => chart.more);
    more.hidden = !hidden.length;
    keyed(charts, all.filter((chart) => !chart.more), ({ title }) => title, create);
    keyed(others, hidden, ({ title }) => title, create);
  };
  return { element, update };
}

function createSettings() {
  const few = make("dl", { class: "pcpo-facts" });
  const all = make("div");
  const whole = make("details", { class: "pcpo-all" }, make("summary", {}, t("All settings")), all);
  let written = "";
  const update = (job) => {
    const json = JSON.stringify([job.config, job.settings]);
    if (json === written) return;
    written = json;
    few.replaceChildren(...settings(job).flatMap(pair));
    all.replaceChildren(...allSettings(job.config).flatMap(([name, rows]) =>
      [make("h4", {}, name), make("dl", { class: "pcpo-facts" }, ...rows.flatMap(pair))]));
  };
  return { element: createPart(t("Settings"), [few, whole], false), update };
}

const pair = ([name, value]) => [make("dt", {}, name), make("dd", {}, value)];

function createFiles(control) {
  const path = make("input", { type: "text", readonly: "", "aria-label": t("folder of the job") });
  const copy = button(t("Copy folder path"), async () => {
    if (!(await control.copy(path.value))) path.select();
  });
  path.addEventListener("focus", () => path.select());
  const row = make("div", { class: "pcpo-row" }, path, copy);
  const exports = make("ul", { class: "pcpo-exports" });
  const none = make("p", { class: "pcpo-soft" }, t("No LoRA is exported yet."));
  const title = make("p", {}, t("LoRA files in the job's folder lora, newest first:"));
  const create = () => {
    const element = make("li");
    return { element, update: (name) => setText(element, name) };
  };
  const update = (job) => {
    row.hidden = !job.folder; // which is told where ComfyUI has one user alone
    if (path.value !== job.folder) path.value = job.folder ?? "";
    const names = [...(job.exports ?? [])].sort().reverse();
    none.hidden = names.length > 0;
    title.hidden = !names.length;
    keyed(exports, names, (name) => name, create);
  };
  return { element: createPart(t("Files"), [row, none, title, exports]), update };
}

/** Follows the end of the log, unless the reader has scrolled up. */
function createLog() {
  const text = make("pre", { tabindex: 0, role: "region", "aria-label": t("log") });
  const update = ({ log = [] }) => {
    const isAtEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 4;
    setText(text, log.length ? log.join("\n") : t("The log is empty."));
    if (isAtEnd) text.scrollTop = text.scrollHeight;
  };
  const element = createPart(t("Log"), [text], false);
  element.addEventListener("toggle", () => (text.scrollTop = text.scrollHeight));
  return { element, update };
}
