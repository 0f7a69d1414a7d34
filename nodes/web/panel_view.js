/** The panel: the list of jobs, or the one that is open. */

import { button, keyed, make, setAttributes, setLine, setText } from "./panel_dom.js";
import { createHead } from "./panel_head.js";
import { createJobView } from "./panel_job.js";
import { openJob } from "./panel_state.js";
import { rewardLine } from "./panel_text.js";
import { createTastePage } from "./taste_page.js";
import { createStage } from "./taste_stage.js";

const DEMO = "demo_train_in_background";

/**
 * The panel's element, made once for the page. Whoever shows it puts it where it belongs.
 *
 * @returns {{element: HTMLElement, start: (control: object, tastes: object) => void,
 *   update: (state: object) => void, updateTaste: (state: object) => void}}
 */
export function createView() {
  const element = make("section", { class: "pcpo", "aria-label": "PCPO training" });
  let control;
  let pages; // by name
  let nav;
  let stage;
  let shown = null; // the page that is shown: its name, or the id of a job
  let state = null;
  let taste = null;
  const error = createError(() => control.refresh());
  const note = make("p", { class: "pcpo-note", role: "status" });
  const spoken = make("p", { class: "pcpo-unseen", role: "status" });

  function draw() {
    if (!state || !taste) return;
    const job = openJob(state);
    const name = job ? "job" : taste.isOpen ? "taste" : "list";
    const now = job?.id ?? name;
    const isMoved = shown !== null && shown !== now && element.contains(document.activeElement);
    error.update({ actionError: state.actionError || taste.actionError,
      loadError: state.loadError || (name === "taste" ? taste.loadError : "") });
    setLine(note, state.note || taste.note);
    setText(spoken, state.spoken);
    nav.update(name);
    for (const each of ["list", "job"]) pages[each].element.hidden = each !== name;
    if (name !== "taste") pages.taste.element.remove();
    else if (!pages.taste.element.isConnected) element.append(pages.taste.element);
    if (job) pages.job.update(job, state, taste);
    else pages[name].update(name === "taste" ? taste : state);
    stage.update(taste);
    if (isMoved) pages[name].focus(shown);
    shown = now;
  }

  return {
    element,
    start(given, tastes) {
      control = given;
      stage = createStage(tastes);
      pages = { list: createList(control), job: createJobView(control, tastes),
        taste: createTastePage(tastes) };
      nav = createNav(tastes);
      element.append(error.element, note, spoken, nav.element,
        pages.list.element, pages.job.element);
    },
    update(now) {
      state = now;
      draw();
    },
    updateTaste(now) {
      taste = now;
      draw();
    },
  };
}

/** The two pages beside those of jobs. */
function createNav(tastes) {
  const entries = [["list", button("Training jobs", () => tastes.close())],
    ["taste", button("Taste", () => tastes.open())]];
  const element = make("nav", { class: "pcpo-nav", "aria-label": "pages" },
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
