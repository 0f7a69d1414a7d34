/**
 * What the user is told wherever they look: notices at the edge of the page, the badge of the tab,
 * the browser's own notifications. `news` and `badge` are pure.
 */

import { button, make, setText } from "./panel_dom.js";
import { ending, isLive, sentence } from "./panel_text.js";
import { mark, t } from "./words.js";

const STARTED = ["queued", "preparing", "running"];
const BAD = { failed: mark("{job} has failed"), lost: mark("{job} is lost") };
const BRIEF = 10_000; // ms that a notice stays which asks for nothing
const MOST = 4; // at once

/**
 * What is new of the jobs.
 *
 * @param {object[] | null} before the summaries that were known; null before the first answer.
 * @param {object[]} after
 * @returns {{id: string, kind: "started" | "finished" | "failed", title: string, text: string}[]}
 */
export function news(before, after) {
  if (!before) return [];
  const old = new Map(before.map((job) => [job.id, job.state]));
  return after.flatMap((job) => {
    const was = old.get(job.id);
    if (was === job.state) return [];
    const of = (kind, title, text) => [{ id: job.id, kind, title: t(title, { job: job.name }),
      text: sentenced(text) }];
    if (was === undefined && STARTED.includes(job.state)) {
      const isQueued = job.state === "queued";
      return of("started", isQueued ? mark("{job} waits for its turn")
        : mark("{job} has started training"),
      t("You can go on working; the PCPO tab shows how it goes."));
    }
    if (was === undefined) return [];
    if (job.state === "done") return of("finished", mark("{job} has finished"), ending(job));
    return BAD[job.state] ? of("failed", BAD[job.state], sentence(job)) : [];
  });
}

/** A first word that is a file's or a setting's name stays as it is. */
export const sentenced = (text) =>
  /^\p{L}+[ ,;:]/u.test(text) ? text.charAt(0).toUpperCase() + text.slice(1) : text;

/**
 * The badge of the tab.
 *
 * @param {object[] | null} jobs
 * @param {string[]} unseen kinds of the news since the panel was last looked at.
 */
export function badge(jobs, unseen) {
  if (unseen.includes("failed")) return "!";
  if (unseen.includes("finished")) return "✓";
  const live = (jobs ?? []).filter(isLive).length;
  return live ? String(live) : "";
}

/**
 * Notices at the edge of the page.
 *
 * @param {(id: string | null) => void} open shows a job in the panel.
 */
export function createNotices(open) {
  const element = make("div", { class: "pcpo pcpo-notices", role: "region",
    "aria-label": t("PCPO notices") });
  /** @param {{id: string | null, kind: string, title: string, text: string}} notice */
  const show = ({ id, kind, title, text }) => {
    const tone = { finished: "good", failed: "bad" }[kind] ?? "run";
    const leave = () => notice.remove();
    const actions = make("div", { class: "pcpo-row" });
    if (id !== null) {
      actions.append(button(t("Open panel"), () => {
        leave();
        open(id);
      }, { class: "pcpo-main" }));
    }
    actions.append(button(t("Close"), leave));
    const words = make("p", {});
    setText(words, sentenced(text));
    const notice = make("div", { class: "pcpo-notice", "data-tone": tone,
      role: kind === "failed" ? "alert" : "status" }, make("h2", {}, title), words, actions);
    element.append(notice);
    while (element.children.length > MOST) element.firstElementChild.remove();
    if (kind === "started") setTimeout(leave, BRIEF);
  };
  return { element, show };
}

// ---- the browser's own notifications ------------------------------------------------------------

const Browser = () => globalThis.Notification;

/** Whether the user can still be asked for them. */
export const canAsk = () => globalThis.isSecureContext && Browser()?.permission === "default";

export const ask = async () => (await Browser()?.requestPermission()) === "granted";

/** Tell of news by the browser where that is allowed and nobody looks at the page. */
export function notify({ kind, title, text }) {
  if (kind === "started" || !document.hidden || Browser()?.permission !== "granted") return;
  const shown = new (Browser())(title, { body: text, tag: title });
  shown.onclick = () => globalThis.focus();
}
