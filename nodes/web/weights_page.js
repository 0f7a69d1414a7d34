/** The page Weights: which weights of rewards are there, and the download of those that are not. */

import { isUsable, setUsable } from "./panel_confirm.js";
import { button, createPart, keyed, make, setAttributes, setLine, setText } from "./panel_dom.js";
import { duration } from "./panel_text.js";
import { isLoading, lackOf } from "./weights_control.js";
import { told } from "./words_of_server.js";
import { mark, numeral, t } from "./words.js";

const STATES = {
  there: { label: mark("there"), tone: "good" },
  missing: { label: mark("missing"), tone: "wait" },
  waiting: { label: mark("waiting"), tone: "wait" },
  loading: { label: mark("downloading"), tone: "run" },
  checking: { label: mark("verifying"), tone: "run" },
  failed: { label: mark("not downloaded"), tone: "bad" },
  wrong: { label: mark("another file"), tone: "bad" },
};
const UNITS = [[1e9, "gigabyte"], [1e6, "megabyte"], [1e3, "kilobyte"], [0, "byte"]];

/** A size in bytes, for people. */
export function size(bytes) {
  const [least, unit] = UNITS.find(([from]) => bytes >= from);
  return numeral(bytes / (least || 1), { style: "unit", unit, unitDisplay: "short",
    maximumSignificantDigits: 3 });
}

/** @param {object} control of weights_control.js. */
export function createWeightsPage(control) {
  const title = make("h2", { tabindex: -1 }, t("Weights of rewards"));
  const about = make("p", {}, t("Some rewards are networks, whose weights have to be in ComfyUI's models folder. Every download is checked against the checksum that this pack knows."));
  const off = make("p", { class: "pcpo-message" });
  const loading = make("p", { class: "pcpo-soft" }, t("Loading …"));
  const missing = make("ul", { class: "pcpo-jobs" });
  const present = make("ul", { class: "pcpo-jobs" });
  const there = createPart(t("Already there"), [present], false);
  return {
    element: make("div", { class: "pcpo-job" }, title, about, off, loading, missing, there),
    focus: () => title.focus(),
    update(state) {
      loading.hidden = state.files !== null || Boolean(state.loadError);
      setLine(off, told(state.off));
      const isThere = ({ state: name }) => name === "there";
      draw(missing, state, (state.files ?? []).filter((file) => !isThere(file)), control);
      draw(present, state, (state.files ?? []).filter(isThere), control);
      there.hidden = !present.children.length;
    },
  };
}

/** What a job that failed lacks, on its own page. */
export function createLack(control) {
  const list = make("ul", { class: "pcpo-jobs" });
  const off = make("p", { class: "pcpo-soft" });
  const element = createPart(t("Missing weights"), [off, list]);
  const update = (job, state) => {
    const isFailed = job.state === "failed";
    if (isFailed) control.know();
    const files = isFailed ? lackOf(job, state.files) : [];
    element.hidden = !files.length;
    setLine(off, told(state.off));
    draw(list, state, files, control);
  };
  return { element, update };
}

const draw = (list, state, files, control) =>
  keyed(list, files.map((file) => ({ ...file, off: state.off, isBusy: state.busy.includes(file.key) })),
    ({ key }) => key, () => createFile(control));

/** One file: what it is for, how far its download is, and what can be done. */
function createFile(control) {
  let file;
  const name = make("strong");
  const badge = make("span", { class: "pcpo-badge" });
  const fill = make("span");
  const bar = make("div", { class: "pcpo-bar", role: "progressbar", "aria-label": t("progress"),
    "aria-valuemin": 0, "aria-valuemax": 100 }, fill);
  const [facts, place, progress] = ["", "", ""].map(() => make("p", { class: "pcpo-soft" }));
  const message = make("p", { class: "pcpo-message" });
  const load = button("", () => isUsable(load) && control.download(file.key), { class: "pcpo-main" });
  const cancel = button(t("Cancel"), () => control.cancel(file.key));
  const page = make("a", { target: "_blank", rel: "noreferrer" }, t("About these weights"));
  const head = make("div", { class: "pcpo-head" }, make("div", { class: "pcpo-row" }, name, badge), bar,
    progress, facts, place, message);
  const element = make("li", { class: "pcpo-file" }, head,
    make("div", { class: "pcpo-row" }, load, cancel, page));
  function update(now) {
    file = now;
    const { label, tone } = STATES[file.state] ?? { label: file.state, tone: "wait" };
    const share = file.size ? Math.min(100, (100 * file.done) / file.size) : 0;
    setText(name, file.name);
    setText(badge, t(label));
    setAttributes(head, { "data-tone": tone });
    bar.hidden = !isLoading(file);
    fill.style.width = `${share}%`;
    setAttributes(bar, { "aria-valuenow": Math.round(share) });
    setLine(progress, isLoading(file) || (file.done && file.state !== "there") ? progressOf(file) : "");
    const licence = file.unverified ? t("{licence} (unverified)", file) : file.licence;
    setLine(facts, t("{size}, licence {licence}, for {rewards}",
      { size: size(file.size), licence, rewards: file.rewards.join(", ") }));
    setLine(place, file.state === "there" ? "" : t("Goes into models/{folder} as {name}.", file));
    setLine(message, told(file.message || file.refusal || ""));
    load.hidden = file.state === "there" || isLoading(file) || Boolean(file.refusal);
    setText(load, file.done ? t("Go on downloading") : t("Download {size}", { size: size(file.size) }));
    setUsable(load, !file.off && !file.isBusy, file.off ? told(file.off) : null);
    cancel.hidden = !isLoading(file);
    setAttributes(page, { href: file.page });
  }
  return { element, update };
}

/** How much of a file has arrived, and how long the rest takes. */
function progressOf({ done, size: all, speed, state }) {
  const known = { done: size(done), all: size(all) };
  const left = state === "loading" && speed > 0 ? duration((all - done) / speed) : "";
  return left ? t("{done} of {all}, about {time} left", { ...known, time: left })
    : t("{done} of {all}", known);
}
