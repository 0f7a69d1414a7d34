/** Name, state and progress of a job. */

import { make, setAttributes, setLine, setText } from "./panel_dom.js";
import { percent, progress, sentence, stateOf } from "./panel_text.js";
import { t } from "./words.js";

/**
 * Name, state, progress and sentence of a job, for the list and for its own page.
 *
 * @param {HTMLElement} name shows the job's name; its owner writes it.
 */
export function createHead(name) {
  const badge = make("span", { class: "pcpo-badge" });
  const fill = make("span");
  const bar = make("div", { class: "pcpo-bar", role: "progressbar", "aria-label": t("progress"),
    "aria-valuemin": 0, "aria-valuemax": 100 }, fill);
  const text = make("p", { class: "pcpo-soft" });
  const message = make("p", { class: "pcpo-message" });
  const element = make("div", { class: "pcpo-head" },
    make("div", { class: "pcpo-row" }, name, badge), bar, text, message);
  const update = (job) => {
    const { label, tone } = stateOf(job);
    const done = percent(job);
    const words = progress(job);
    setText(badge, label);
    setAttributes(element, { "data-tone": tone });
    bar.hidden = done === null && job.state !== "preparing";
    bar.classList.toggle("pcpo-unknown", done === null);
    fill.style.width = `${done ?? 100}%`;
    setAttributes(bar, { "aria-valuenow": done === null ? null : Math.round(done),
      "aria-valuetext": words || label });
    setLine(text, words);
    setLine(message, sentence(job));
  };
  return { element, update };
}
