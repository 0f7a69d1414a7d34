/** The panel: the list of jobs, or the one that is open. */

import { button, keyed, make, setLine, setText } from "./panel_dom.js";
import { createHead } from "./panel_head.js";
import { createJobView } from "./panel_job.js";
import { openJob } from "./panel_state.js";
import { rewardLine } from "./panel_text.js";

const DEMO = "demo_train_in_background";

/**
 * The panel's element, made once for the page. Whoever shows it puts it where it belongs.
 *
 * @returns {{element: HTMLElement, start: (control: object) => void, update: (state: object) =>
 *   void}}
 */
export function createView() {
  const element = make("section", { class: "pcpo", "aria-label": "PCPO training" });
  let control;
  let list;
  let page;
  let shown = null; // id of the job that is shown
  const error = createError(() => control.refresh());
  const note = make("p", { class: "pcpo-note", role: "status" });
  const spoken = make("p", { class: "pcpo-unseen", role: "status" });

  return {
    element,
    start(given) {
      control = given;
      list = createList(control);
      page = createJobView(control);
      element.append(error.element, note, spoken, list.element, page.element);
    },
    update(state) {
      const job = openJob(state);
      const moved = element.contains(document.activeElement) && shown !== (job?.id ?? null);
      error.update(state);
      setLine(note, state.note);
      setText(spoken, state.spoken);
      list.element.hidden = Boolean(job);
      page.element.hidden = !job;
      if (job) page.update(job, state);
      else list.update(state);
      if (moved && job) page.focus();
      else if (moved) list.focus(shown);
      shown = job?.id ?? null;
    },
  };
}

/** One line on what went wrong; a way to try again where the jobs could not be read. */
function createError(retry) {
  const text = make("span");
  const again = button("Try again", retry, { class: "pcpo-small" });
  const element = make("p", { class: "pcpo-error", role: "alert", hidden: "" }, text, " ", again);
  const update = ({ actionError, loadError }) => {
    setText(text, actionError || loadError);
    again.hidden = !loadError || Boolean(actionError);
    element.hidden = !actionError && !loadError;
  };
  return { element, update };
}

// ---- the list -----------------------------------------------------------------------------------

function createList(control) {
  const title = make("h2", { tabindex: -1 }, "Training jobs");
  const loading = make("p", { class: "pcpo-soft" }, "Loading …");
  const empty = createEmpty(control);
  const jobs = make("ul", { class: "pcpo-jobs" });
  const notify = button("Tell me when a training ends", async () => {
    await control.askForNotifications();
    notify.hidden = !control.canAskForNotifications();
  }, { class: "pcpo-small pcpo-notify",
    title: "By the browser's own notifications, also while you are in another tab" });
  const element = make("div", {}, title, loading, empty, jobs, notify);
  return {
    element,
    update(state) {
      notify.hidden = !state.jobs?.length || !control.canAskForNotifications();
      loading.hidden = state.jobs !== null || Boolean(state.loadError);
      empty.hidden = state.jobs?.length !== 0;
      keyed(jobs, state.jobs ?? [], ({ id }) => id, () => createCard(control));
    },
    focus(id) {
      const card = [...jobs.children].find(({ dataset }) => dataset.key === id);
      (card?.querySelector("button") ?? title).focus();
    },
  };
}

function createEmpty(control) {
  const steps = [
    `Open the workflow “${DEMO}”: Templates, then ComfyUI-PCPO.`,
    "Queue it. Nothing needs to be downloaded, and it takes a few minutes without a graphics card.",
    "Watch it here: the reward rises while you go on working in the graph. The LoRA is then "
      + "among your LoRAs.",
  ];
  return make("div", { class: "pcpo-empty", hidden: "" },
    make("p", {}, "Nothing is being trained yet. To see how it works:"),
    make("ol", {}, ...steps.map((step) => make("li", {}, step))),
    button("Browse templates", control.browseTemplates, { class: "pcpo-main" }),
    make("p", { class: "pcpo-soft" }, "Your own model: connect MODEL, CLIP and VAE of a checkpoint "
      + "loader to the node PCPO Train in Background."));
}

function createCard(control) {
  let id;
  const name = button("", () => control.open(id), { class: "pcpo-open" });
  const head = createHead(name);
  const reward = make("p", { class: "pcpo-soft" });
  return {
    element: make("li", { class: "pcpo-card" }, head.element, reward),
    update(job) {
      id = job.id;
      setText(name, job.name);
      head.update(job);
      setLine(reward, job.state === "done" && job.message ? "" : rewardLine(job));
    },
  };
}
