/** What the panel says: states, progress, settings. Pure: no DOM, no ComfyUI. */

import { format } from "./charts.js";

/**
 * What a state is called, how it looks, what is said where the worker says nothing, and what can be
 * asked for in it.
 */
export const STATES = {
  queued: { label: "waiting", tone: "wait", can: ["stop", "delete"],
    sentence: "Waits for the job before it to finish." },
  preparing: { label: "preparing", tone: "run", can: ["pause", "stop"],
    sentence: "Loads the model; training starts by itself." },
  running: { label: "training", tone: "run", can: ["pause", "stop", "stop_now", "sample"],
    sentence: "" },
  pausing: { label: "pausing", tone: "pause", can: ["continue", "stop", "stop_now"],
    sentence: "Pauses when this iteration is finished." },
  paused: { label: "paused", tone: "pause", can: ["continue", "stop"],
    sentence: "Paused; nothing is computed until you continue." },
  stopping: { label: "stopping", tone: "pause", can: ["stop_now"],
    sentence: "Stops as soon as it can; every finished iteration is saved." },
  stopped: { label: "stopped", tone: "wait", can: ["resume", "delete"],
    sentence: "Stopped; resume to go on from there." },
  done: { label: "finished", tone: "good", can: ["delete"], sentence: "" },
  failed: { label: "failed", tone: "bad", can: ["resume", "delete"],
    sentence: "Failed; the log says why." },
  lost: { label: "lost", tone: "bad", can: ["resume", "delete"],
    sentence: "The training process is gone; resume to go on from the last checkpoint." },
  unreadable: { label: "cannot be read", tone: "bad", can: ["resume", "delete"],
    sentence: "A file of this job cannot be read." },
};

const UNKNOWN = { tone: "wait", can: [], sentence: "" };
const AHEAD = ["pausing", "stopping"]; // what was said before is out of date
const LIVE = ["preparing", "running", "pausing", "paused", "stopping"];

/** The entry of a state, also of one that this page does not know. */
export const stateOf = (job) => STATES[job.state] ?? { ...UNKNOWN, label: String(job.state) };

/** Whether a request makes sense in a job's state. */
export const can = (job, action) => stateOf(job).can.includes(action);

/** Whether a process works on a job. */
export const isLive = (job) => LIVE.includes(job.state);

/** One sentence on a job. */
export function sentence(job) {
  const usual = stateOf(job).sentence;
  return AHEAD.includes(job.state) ? usual : job.message || usual;
}

/** A span of time for people. */
export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds) || seconds < 0) return "";
  const s = Math.round(seconds);
  if (s < 90) return `${s} s`;
  const m = Math.round(s / 60);
  if (m < 90) return `${m} min`;
  const h = Math.floor(m / 60);
  return h < 48 ? `${h} h ${m % 60} min` : `${Math.round(h / 24)} days`;
}

/** Whether nothing is known yet of how far a job is. */
const isBefore = (job) => !job.of || job.iteration == null
  || (job.iteration === 0 && ["queued", "preparing"].includes(job.state));

/** How far a job is, in words. */
export function progress(job) {
  if (isBefore(job)) return job.of ? `${job.of} iterations` : "";
  const left = isLive(job) && job.state !== "paused" ? duration(job.eta_seconds) : "";
  return `Iteration ${job.iteration} of ${job.of}${left ? `, about ${left} left` : ""}`;
}

/** How far a job is, in percent; null where it is not known. */
export function percent(job) {
  if (isBefore(job)) return null;
  return Math.max(0, Math.min(100, (100 * job.iteration) / job.of));
}

/** What is left out of a long job's curves and samples; "" where nothing is. */
export function leftOut({ metrics = [], measured, samples = [], sampled }) {
  const curves = measured?.count > metrics.length
    ? `Thinned: ${metrics.length} of ${measured.count} iterations are drawn; of every `
      + `${measured.width}, each curve keeps its lowest and its highest.` : "";
  const images = sampled > samples.length
    ? `${samples.length} of ${sampled} sampled iterations are shown, with the first, the best and `
      + "the last; the job's folder has them all." : "";
  return { curves, images };
}

/** The last part of a path of any system. */
export const fileName = (path) => String(path).split(/[\\/]/).at(-1);

/** A reward, or a dash. */
export const score = (v) => (v == null || !Number.isFinite(v) ? "–" : v.toFixed(3));

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
    return `Held-out reward ${score(job.before)} → ${score(job.held_out)}${arrow}`;
  }
  return job.reward == null ? "" : `Reward ${score(job.reward)}`;
}

/** The rule of a job's guard, and what its last look said; a job's message says how it ended. */
export function guardLine({ guard }) {
  if (!guard?.rule) return "";
  return guard.said && !guard.ended ? `${guard.rule} Now: ${guard.said}.` : guard.rule;
}

/** When a unix time was, in the reader's zone. */
export function moment(seconds) {
  if (!seconds) return "";
  return new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

const plain = (v) => (v == null ? "none" : Array.isArray(v) ? v.map(plain).join(", ")
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
  const scaled = { z_score: "z-score", affine: `${plain(scale)} × score${moved}` }[normalise];
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
    ["Started", moment(job.created)],
    ["Model", model.source],
    ["Method", list(method.credit, method.ratio, method.objective)],
    ["Sampler", list(sampler.transition, sampler.steps && `${sampler.steps} steps`)],
    ["Rewards", Object.entries(rewards).map(reward).join(", ")],
    ["Prompts", list(prompts.source, images > 0 && `${images} images per iteration`)],
    ["LoRA", trainable.kind === "full" ? "none: all weights are trained"
      : trainable.rank && `rank ${trainable.rank}, alpha ${trainable.alpha}`],
    ["Learning rate", optimizer.lr && plain(optimizer.lr)],
    ["Seed", run.seed == null ? "" : String(run.seed)],
    ["Device", run.device],
    ["Saved as", run.publish],
    ["When ComfyUI closes", { continue: "goes on training", save_and_stop: "saves and stops" }[end]],
    ["While ComfyUI is busy", pauses == null ? "" : pauses ? "pauses" : "goes on training"],
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
  return job.state === "failed" ? `failed: ${sentence(job)}` : words;
}
