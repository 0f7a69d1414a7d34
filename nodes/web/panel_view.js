/** The panel: the list of jobs, or the one that is open. */

import { button, keyed, make, setAttributes, setLine, setText } from "./panel_dom.js";
import { createHead } from "./panel_head.js";
import { createJobView } from "./panel_job.js";
import { openJob } from "./panel_state.js";
import { rewardLine } from "./panel_text.js";
import { createTastePage } from "./taste_page.js";
import { createStage } from "./taste_stage.js";
import { createWeightsPage } from "./weights_page.js";
import { t } from "./words.js";

const DEMO = "03 Train a LoRA";

/**
 * The panel's element, made once for the page. Whoever shows it puts it where it belongs.
 *
 * @returns {{element: HTMLElement, start: (control: object, tastes: object, weights: object) => void,
 *   update: (part: "jobs" | "taste" | "weights", state: object) => void}}
 */
export function createView() {
  const element = make("section", { class: "pcpo", "aria-label": t("PCPO training") });
  let control;
  let pages; // by name
  let nav;
  let stage;
  let shown = null; // the page that is shown: its name, or the id of a job
  const states = { jobs: null, taste: null, weights: null };
  const error = createError(() => control.refresh());
  const note = make("p", { class: "pcpo-note", role: "status" });
  const spoken = make("p", { class: "pcpo-unseen", role: "status" });

  function draw() {
    const { jobs: state, taste, weights } = states;
    if (!state || !taste || !weights) return;
    const job = openJob(state);
    const name = job ? "job" : weights.isOpen ? "weights" : taste.isOpen ? "taste" : "list";
    const now = job?.id ?? name;
    const isMoved = shown !== null && shown !== now && element.contains(document.activeElement);
    error.update({ actionError: state.actionError || taste.actionError || weights.actionError,
      loadError: state.loadError || (name === "list" || name === "job" ? "" : states[name].loadError) });
    setLine(note, state.note || taste.note || weights.note);
    setText(spoken, state.spoken);
    nav.update(name);
    for (const each of ["list", "job"]) pages[each].element.hidden = each !== name;
    for (const each of ["taste", "weights"]) {
      if (each !== name) pages[each].element.remove();
      else if (!pages[each].element.isConnected) element.append(pages[each].element);
    }
    if (job) pages.job.update(job, states);
    else pages[name].update(states[name] ?? state);
    stage.update(taste);
    if (isMoved) pages[name].focus(shown);
    shown = now;
  }

  return {
    element,
    start(given, tastes, weights) {
      control = given;
      stage = createStage(tastes);
      pages = { list: createList(control), job: createJobView(control, tastes, weights),
        taste: createTastePage(tastes), weights: createWeightsPage(weights) };
      nav = createNav({ taste: tastes, weights });
      element.append(error.element, note, spoken, nav.element,
        pages.list.element, pages.job.element);
    },
    update(part, now) {
      states[part] = now;
      draw();
    },
  };
}

/** The pages beside that of a job. */
function createNav(controls) {
  const show = (name) => () => Object.entries(controls).forEach(([each, control]) =>
    (each === name ? control.open() : control.close()));
  const entries = [["list", t("Training jobs")], ["taste", t("Taste")], ["weights", t("Weights")]]
    .map(([name, text]) => [name, button(text, show(name))]);
  const element = make("nav", { class: "pcpo-nav", "aria-label": t("pages") },
    ...entries.map(([, made]) => made));
  const update = (name) => {
    element.hidden = name === "job";
    for (const [each, made] of entries) {
      setAttributes(made, { "aria-current": each === name ? "page" : null });
    }
  };
  return { element, update };
}

/** One line on what went wrong; a way to try again where the jobs could not be read. */
function createError(retry) {
  const text = make("span");
  const again = button(t("Try again"), retry, { class: "pcpo-small" });
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
  const title = make("h2", { tabindex: -1 }, t("Training jobs"));
  const loading = make("p", { class: "pcpo-soft" }, t("Loading …"));
  const empty = createEmpty(control);
  const jobs = make("ul", { class: "pcpo-jobs" });
  const notify = button(t("Tell me when a training ends"), async () => {
    await control.askForNotifications();
    notify.hidden = !control.canAskForNotifications();
  }, { class: "pcpo-small pcpo-notify",
    title: t("By the browser's own notifications, also while you are in another tab") });
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
    t("Open the workflow “{workflow}”: Templates, then ComfyUI-PCPO.", { workflow: DEMO }),
    t("Queue it. Nothing needs to be downloaded, and it takes a few minutes without a graphics card."),
    t("Watch it here: the reward rises while you go on working in the graph. The LoRA is then among your LoRAs."),
  ];
  return make("div", { class: "pcpo-empty", hidden: "" },
    make("p", {}, t("Nothing is being trained yet. To see how it works:")),
    make("ol", {}, ...steps.map((step) => make("li", {}, step))),
    button(t("Browse templates"), control.browseTemplates, { class: "pcpo-main" }),
    make("p", { class: "pcpo-soft" },
      t("Your own model: connect MODEL, CLIP and VAE of a checkpoint loader to the node PCPO Train in Background.")));
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
