/** What the panel knows, and how messages and answers change it. Pure: no DOM, no ComfyUI. */

import { stateOf } from "./panel_text.js";
import { t } from "./words.js";

/**
 * Answers and messages come by connections of their own and overtake one another. The server numbers
 * them ("at"): of two the larger was made later, and what is older never replaces what is newer.
 *
 * @typedef {object} State
 * @property {object[] | null} jobs summaries, newest first; null before the first answer.
 * @property {number} at when the list was made.
 * @property {Object<string, number>} since jobs of which something later is known, and when.
 * @property {string | null} open id of the job that is looked at.
 * @property {object | null} detail the open job with its metrics, samples and log.
 * @property {string} loadError why the jobs could not be read.
 * @property {string} actionError why something that was asked for did not happen.
 * @property {string} note what just happened, for the eye.
 * @property {string} spoken what just happened, for a screen reader.
 * @property {string[]} pending requests under way, as "id action".
 */

/** @returns {State} */
export const initial = () => ({ jobs: null, at: -Infinity, since: {}, open: null, detail: null,
  loadError: "", actionError: "", note: "", spoken: "", pending: [] });

/** When the newest that is known of a job was made. */
const seen = (state, id) => Math.max(state.at, state.since[id] ?? -Infinity);

/** The state after the list of jobs arrived; what is known from later stays as it is. */
export function withJobs(state, listed, at = state.at) {
  if (at < state.at) return { ...state, loadError: "" };
  const later = Object.entries(state.since).filter(([, when]) => when > at);
  const since = Object.fromEntries(later);
  const known = new Map((state.jobs ?? []).map((job) => [job.id, job]));
  const jobs = listed.map((job) => (job.id in since ? known.get(job.id) : job)).filter(Boolean);
  const spoken = announcement(state.jobs, jobs) || state.spoken;
  const next = { ...state, jobs, at, since, loadError: "", spoken };
  if (!state.open || jobs.some(({ id }) => id === state.open)) return next;
  return { ...closed(next), note: t("The open job is no longer there.") };
}

/** The state after one summary arrived, as the answer to a request. */
export function withSummary(state, summary, at = seen(state, summary.id)) {
  if (at < seen(state, summary.id)) return state;
  const jobs = (state.jobs ?? []).map((job) => (job.id === summary.id ? summary : job));
  const spoken = announcement(state.jobs, jobs) || state.spoken;
  return { ...state, jobs: state.jobs && jobs, spoken, since: { ...state.since, [summary.id]: at } };
}

/** The state after a job was deleted. */
export function without(state, id, at = Infinity) {
  const jobs = state.jobs?.filter((job) => job.id !== id) ?? null;
  const since = { ...state.since, [id]: at };
  return { ...(state.open === id ? closed(state) : state), jobs, since };
}

/** The state after the details of a job arrived; ignored where another one is open by now. */
export function withDetail(state, detail) {
  if (state.open !== detail.id || detail.at < state.detail?.at) return state;
  return { ...state, detail, loadError: "" };
}

/** The state once the connection is there again: another server may count from below. */
export const reconnected = (state) => ({ ...state, at: -Infinity, since: {},
  detail: state.detail && { ...state.detail, at: -Infinity } });

/** The state with a job opened. */
export const opened = (state, id) => ({ ...state, open: id, actionError: "", note: "",
  detail: state.detail?.id === id ? state.detail : null });

/** The state with no job opened. */
export const closed = (state) => ({ ...state, open: null, detail: null, actionError: "",
  note: "" });

/** The state with a request under way. */
export const asking = (state, id, action) => ({ ...state, actionError: "", note: "",
  pending: [...state.pending, `${id} ${action}`] });

/** The state with a request answered. */
export const answered = (state, id, action) => ({ ...state,
  pending: state.pending.filter((name) => name !== `${id} ${action}`) });

/** The open job: its details and its summary, the newer above; null where none is open. */
export function openJob(state) {
  const { open, detail } = state;
  const summary = open && state.jobs?.find(({ id }) => id === open);
  if (!open || !(summary || detail)) return null;
  return detail?.at > seen(state, open) ? { ...summary, ...detail } : { ...detail, ...summary };
}

/** Whether the summary of the open job has moved on from its details. */
export function isStale({ jobs, open, detail }) {
  const summary = jobs?.find(({ id }) => id === open);
  if (!summary) return false;
  return !detail || ["state", "iteration", "message", "held_out"]
    .some((name) => (summary[name] ?? null) !== (detail[name] ?? null));
}

/** The changes of state between two lists, to be read out; "" where there is none. */
export function announcement(before, after) {
  if (!before) return "";
  const old = new Map(before.map((job) => [job.id, job.state]));
  return after.filter((job) => old.has(job.id) && old.get(job.id) !== job.state)
    .map((job) => `${job.name}: ${stateOf(job).label}`).join("; ");
}

/** One sentence for an answer that is no success. */
export function failure(status, body) {
  if (typeof body?.error === "string" && body.error) return body.error;
  if (status === 404 || status === 405) {
    return t("This ComfyUI does not answer for PCPO's training jobs; restart it and look for PCPO in its console.");
  }
  return t("ComfyUI answered with error {status}; its console says more.", { status });
}

/**
 * At most so many items, evenly, the first and the last among them, and all that must be kept.
 *
 * @param {Array} items
 * @param {number} limit at least 2.
 * @param {(item: any) => boolean} [isKept] for items that stay beyond the limit.
 */
export function thin(items, limit, isKept = () => false) {
  if (items.length <= limit) return items;
  const places = Array.from({ length: limit }, (_, i) =>
    Math.round((i * (items.length - 1)) / (limit - 1)));
  const chosen = new Set(places);
  return items.filter((item, i) => chosen.has(i) || isKept(item));
}

/**
 * A task that runs at once and then at most once in a while, the last call never lost.
 *
 * @param {() => void} task
 * @param {number} gap ms between two runs, at least.
 * @returns {() => void}
 */
export function paced(task, gap) {
  let last = -Infinity;
  let timer = null;
  const run = () => {
    timer = null;
    last = performance.now();
    task();
  };
  return () => {
    if (timer !== null) return;
    const wait = last + gap - performance.now();
    if (wait <= 0) run();
    else timer = setTimeout(run, wait);
  };
}

/** What a task gives; undefined where it fails, which the browser's console tells. */
export function attempt(task) {
  try {
    return task();
  } catch (error) {
    console.error(error);
    return undefined;
  }
}

/** What a node's choice of jobs calls a job: its name, or its id where others have it too. */
export function jobChoice(job, jobs) {
  return jobs.some(({ id, name }) => name === job.name && id !== job.id) ? job.id : job.name;
}
