/** What the panel says: states, progress, settings. Pure: no DOM, no ComfyUI. */

import { format } from "./charts.js";
import { told } from "./words_of_server.js";
import { dated, mark, numeral, plural, span, t } from "./words.js";

/**
 * What a state is called, how it looks, what is said where the worker says nothing, and what can be
 * asked for in it.
 */
export const STATES = {
  queued: { label: mark("waiting"), tone: "wait", can: ["stop", "delete"],
    sentence: mark("Waits for the job before it to finish.") },
  preparing: { label: mark("preparing"), tone: "run", can: ["pause", "stop"],
    sentence: mark("Loads the model; training starts by itself.") },
  running: { label: mark("training"), tone: "run", can: ["pause", "stop", "stop_now", "sample"],
    sentence: "" },
  pausing: { label: mark("pausing"), tone: "pause", can: ["continue", "stop", "stop_now"],
    sentence: mark("Pauses when this iteration is finished.") },
  paused: { label: mark("paused"), tone: "pause", can: ["continue", "stop"],
    sentence: mark("Paused; nothing is computed until you continue.") },
  stopping: { label: mark("stopping"), tone: "pause", can: ["stop_now"],
    sentence: mark("Stops as soon as it can; every finished iteration is saved.") },
  stopped: { label: mark("stopped"), tone: "wait", can: ["resume", "delete"],
    sentence: mark("Stopped; resume to go on from there.") },
  done: { label: mark("finished"), tone: "good", can: ["delete"], sentence: "" },
  failed: { label: mark("failed"), tone: "bad", can: ["resume", "delete"],
    sentence: mark("Failed; the log says why.") },
  lost: { label: mark("lost"), tone: "bad", can: ["resume", "delete"],
    sentence: mark("The training process is gone; resume to go on from the last checkpoint.") },
  unreadable: { label: mark("cannot be read"), tone: "bad", can: ["resume", "delete"],
    sentence: mark("A file of this job cannot be read.") },
};

const UNKNOWN = { tone: "wait", can: [], sentence: "" };
const AHEAD = ["pausing", "stopping"]; // what was said before is out of date
const LIVE = ["preparing", "running", "pausing", "paused", "stopping"];

/** The entry of a state, also of one that this page does not know, in the user's language. */
export function stateOf(job) {
  const found = STATES[job.state] ?? { ...UNKNOWN, label: String(job.state) };
  return { ...found, label: t(found.label), sentence: t(found.sentence) };
}

/** Whether a request makes sense in a job's state. */
export const can = (job, action) => stateOf(job).can.includes(action);

/** Whether a process works on a job. */
export const isLive = (job) => LIVE.includes(job.state);

/** One sentence on a job. */
export function sentence(job) {
  const usual = stateOf(job).sentence;
  return AHEAD.includes(job.state) ? usual : told(job.message) || usual;
}

/** What a finished job has come to: its reward, and the LoRA's name. */
export function ending(job) {
  const file = job.publish && fileName(job.publish);
  return [told(job.message) || rewardLine(job),
    file && t("LoRA: {file} (press R, then load it)", { file })].filter(Boolean).join(". ");
}

/** A span of time for people. */
export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds) || seconds < 0) return "";
  const s = Math.round(seconds);
  if (s < 90) return span(s, "second");
  const m = Math.round(s / 60);
  if (m < 90) return span(m, "minute");
  const h = Math.floor(m / 60);
  return h < 48 ? `${span(h, "hour")} ${span(m % 60, "minute")}` : span(Math.round(h / 24), "day");
}

/** Whether nothing is known yet of how far a job is. */
const isBefore = (job) => !job.of || job.iteration == null
  || (job.iteration === 0 && ["queued", "preparing"].includes(job.state));

/** How far a job is, in words. */
export function progress(job) {
  if (isBefore(job)) return job.of ? plural("{count} iteration", "{count} iterations", job.of) : "";
  const left = isLive(job) && job.state !== "paused" ? duration(job.eta_seconds) : "";
  const known = { now: numeral(job.iteration), all: numeral(job.of), time: left };
  return left ? t("Iteration {now} of {all}, about {time} left", known)
    : t("Iteration {now} of {all}", known);
}

/** How far a job is, in percent; null where it is not known. */
export function percent(job) {
  if (isBefore(job)) return null;
  return Math.max(0, Math.min(100, (100 * job.iteration) / job.of));
}

/** What is left out of a long job's curves and samples; "" where nothing is. */
export function leftOut({ metrics = [], measured, samples = [], sampled }) {
  const curves = measured?.count > metrics.length
    ? t("Thinned: {some} of {all} iterations are drawn; of every {width}, each curve keeps its lowest and its highest.",
      { some: metrics.length, all: measured.count, width: measured.width }) : "";
  const images = sampled > samples.length
    ? t("{some} of {all} sampled iterations are shown, with the first, the best and the last; the job's folder has them all.",
      { some: samples.length, all: sampled }) : "";
  return { curves, images };
}

/** The last part of a path of any system. */
export const fileName = (path) => String(path).split(/[\\/]/).at(-1);

/** A reward, or a dash. */
export const score = (v) => (v == null || !Number.isFinite(v) ? "–"
  : numeral(v, { minimumFractionDigits: 3, maximumFractionDigits: 3 }));

/** Which way a value went: "better", "worse" or "". */
export function trend(before, now) {
  if (before == null || now == null || before === now) return "";
  return now > before ? "better" : "worse";
}

export const ARROWS = { better: " ▲", worse: " ▼", "": "" };

/** The reward of a job in one line: held-out prompts where they are known. */
export function rewardLine(job) {
  if (job.held_out != null && job.before != null) {
    const arrow = ARROWS[trend(job.before, job.held_out)];
    return t("Held-out reward {before} → {after}",
      { before: score(job.before), after: score(job.held_out) }) + arrow;
  }
  return job.reward == null ? "" : t("Reward {value}", { value: score(job.reward) });
}

/** The rule of a job's guard, and what its last look said; a job's message says how it ended. */
export function guardLine({ guard }) {
  if (!guard?.rule) return "";
  return guard.said && !guard.ended
    ? t("{rule} Now: {words}.", { rule: told(guard.rule), words: told(guard.said) }) : told(guard.rule);
}

/** When a unix time was, in the reader's zone. */
export function moment(seconds) {
  if (!seconds) return "";
  return dated(new Date(seconds * 1000));
}

const plain = (v) => (v == null ? t("none") : Array.isArray(v) ? v.map(plain).join(", ")
  : typeof v === "object" ? JSON.stringify(v) : typeof v === "number" ? format(v) : String(v));

const UNSAID = ["folders"]; // options that are the same for all rewards of a ComfyUI

/** An option of a reward; of a path the file alone. */
const option = ([key, v]) =>
  `${key} ${["weights", "folder"].includes(key) ? fileName(v) : plain(v)}`;

/** One reward of a job: its weight, and in brackets what is not usual of it. */
export function reward([label, given]) {
  const part = given && typeof given === "object" ? given : { weight: given };
  const { weight = 1, name, normalise, scale = 1, shift = 0, options = {} } = part;
  const moved = shift ? ` ${shift < 0 ? "−" : "+"} ${plain(Math.abs(shift))}` : "";
  const scaled = { z_score: t("z-score"),
    affine: t("{scale} × score", { scale: plain(scale) }) + moved }[normalise];
  const chosen = Object.entries(options).filter(([key, v]) => v != null && !UNSAID.includes(key));
  const more = [name !== label && name, scaled, ...chosen.map(option)].filter(Boolean);
  return (weight === 1 ? label : `${label} × ${plain(weight)}`)
    + (more.length ? ` (${more.join(", ")})` : "");
}

/** The settings that matter, as [name, value]; unknown ones are left out. */
export function settings(job) {
  const [model, trainable, sampler, method, rewards, prompts, optimizer, run] = ["model",
    "trainable", "sampler", "method", "rewards", "prompts", "optimizer", "run"]
    .map((name) => job.config?.[name] ?? {}); // a file may hold anything
  const { on_server_exit: end, pause_while_busy: pauses } = job.settings ?? {};
  const list = (...parts) => parts.filter(Boolean).join(", ");
  const images = prompts.per_iteration * prompts.images_per_prompt;
  const rows = [
    [t("Started"), moment(job.created)],
    [t("Model"), model.source],
    [t("Method"), list(method.credit, method.ratio, method.objective)],
    [t("Sampler"), list(sampler.transition, sampler.steps
      && plural("{count} step", "{count} steps", sampler.steps))],
    [t("Rewards"), Object.entries(rewards).map(reward).join(", ")],
    [t("Prompts"), list(prompts.source, images > 0
      && plural("{count} image per iteration", "{count} images per iteration", images))],
    ["LoRA", trainable.kind === "full" ? t("none: all weights are trained")
      : trainable.rank && t("rank {rank}, alpha {alpha}", trainable)],
    [t("Learning rate"), optimizer.lr && plain(optimizer.lr)],
    [t("Seed"), run.seed == null ? "" : String(run.seed)],
    [t("Device"), run.device],
    [t("Saved as"), run.publish],
    [t("When ComfyUI closes"), { continue: t("goes on training"),
      save_and_stop: t("saves and stops") }[end]],
    [t("While ComfyUI is busy"), pauses == null ? "" : pauses ? t("pauses")
      : t("goes on training")],
  ];
  return rows.filter(([, value]) => value);
}

/** Every setting, as [section, [[name, value], ...]]. */
export function allSettings(config) {
  return Object.entries(config ?? {}).map(([name, values]) => {
    const grouped = values && typeof values === "object" && !Array.isArray(values);
    const rows = grouped ? Object.entries(values) : [["", values]];
    return [name, rows.map(([key, value]) => [key, plain(value)])];
  });
}

/** How a job goes, in the one line that its node shows. */
export function nodeLine(job) {
  const words = [stateOf(job).label, progress(job), rewardLine(job)].filter(Boolean).join(" · ");
  return job.state === "failed" ? t("failed: {why}", { why: sentence(job) }) : words;
}
