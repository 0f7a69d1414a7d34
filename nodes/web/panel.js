/** Registers the panel with ComfyUI's page. The only module here that knows ComfyUI. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { ask, badge, canAsk, createNotices, notify } from "./notices.js";
import { createControl } from "./panel_control.js";
import { attempt } from "./panel_state.js";
import { nodeLine } from "./panel_text.js";
import { createView } from "./panel_view.js";
import { createTasteControl } from "./taste_control.js";
import { createWeightsControl } from "./weights_control.js";
import { setWords, t } from "./words.js";

const LOADER = "PCPOLoadJobLora";
const TAB = "pcpo";
const MISSING = /press Download on the page Weights/; // in the error of a node
const WEIGHTS = "weights"; // the page, where jobs have their ids
const WELCOMED = "pcpo.welcomed"; // in the browser's storage: the panel has opened by itself once

/** Put a node into the graph that is looked at, in the middle of what is seen. */
function addLoader(choice) {
  const node = globalThis.LiteGraph?.createNode(LOADER);
  if (!node) throw new Error(t("This ComfyUI has no node PCPO Load Job LoRA; restart it."));
  const graph = app.canvas?.graph ?? app.graph;
  const seen = app.canvas?.ds?.visible_area;
  if (seen) node.pos = [seen[0] + (seen[2] - node.size[0]) / 2, seen[1] + seen[3] / 3];
  graph.beforeChange?.();
  graph.add(node);
  chooseJob(node.widgets?.find(({ name }) => name === "job"), choice);
  graph.afterChange?.();
  app.canvas?.selectNode?.(node);
  graph.setDirtyCanvas?.(true, true);
}

/** The list of choices may be older than the job. */
function chooseJob(widget, choice) {
  if (!widget) return;
  const choices = widget.options?.values;
  if (Array.isArray(choices) && !choices.includes(choice)) choices.push(choice);
  widget.value = choice;
  widget.callback?.(choice);
}

/** Needs a secure page (https or localhost); elsewhere the reader copies by hand. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    throw new Error(t("The browser does not let this page copy; select the text and press Ctrl+C (Cmd+C on a Mac)."));
  }
}

/** Images are asked for without ComfyUI's header that says which of its users asks. */
const ofUser = () => (api.user ? `?user=${encodeURIComponent(api.user)}` : "");

function addStyles() {
  const href = new URL("./panel.css", import.meta.url).href;
  const link = Object.assign(document.createElement("link"), { rel: "stylesheet", href });
  document.head.append(link);
}

const tabs = () => app.extensionManager;
const showTab = () => tabs().command.execute(`Workspace.ToggleSidebarTab.${TAB}`);

/** The badge of the panel's tab, which ComfyUI's page watches. */
function setBadge(text) {
  const tab = tabs().getSidebarTabs?.().find(({ id }) => id === TAB);
  if (tab) tab.iconBadge = text;
}

/** The nodes of this page that have started jobs, by the jobs' ids; they say how the jobs go. */
function createNodeTexts() {
  const nodes = new Map();
  api.addEventListener("executed", ({ detail }) => {
    const { pcpo_job: job, text } = detail?.output ?? {};
    if (job) nodes.set(job[0], { node: detail.display_node ?? detail.node, text: text?.[0] ?? "" });
  });
  return (jobs) => {
    for (const job of jobs) {
      const known = nodes.get(job.id);
      const line = known && nodeLine(job);
      if (!known || known.line === line) continue;
      known.line = line;
      const notes = known.text.split("\n").slice(1); // the first line is the state at the start
      api.dispatchCustomEvent?.("progress_text",
        { nodeId: String(known.node), text: [line, ...notes].join("  \n") }); // Markdown's line end
    }
  };
}

/** Tells what happens to the jobs wherever the user looks. */
function createHerald(view, control, weights) {
  let unseen = [];
  const open = (id) => {
    if (!view().element.isConnected) showTab();
    if (id !== WEIGHTS) return control().open(id);
    control().close();
    return weights().open();
  };
  const notices = createNotices(open);
  document.body.append(notices.element);
  const showInNodes = createNodeTexts();
  const welcome = () => attempt(() => { // a browser may forbid to store
    if (localStorage.getItem(WELCOMED)) return;
    localStorage.setItem(WELCOMED, "yes");
    if (!view().element.isConnected) showTab();
  });
  const refused = (type, text) => {
    if (!type?.startsWith("PCPO")) return;
    const title = globalThis.LiteGraph?.registered_node_types?.[type]?.title;
    const id = MISSING.test(text) ? WEIGHTS : null;
    notices.show({ id, kind: "failed", title: title ?? type, text: String(text).trim() });
  };
  api.addEventListener("execution_error", ({ detail }) =>
    refused(detail?.node_type, detail?.exception_message));
  api.addEventListener("pcpo.refused", ({ detail }) => refused(detail?.node_type, detail?.text));
  let known = [];
  const redraw = () => setBadge(badge(known, unseen));
  /** Tell one thing. */
  function tell(each) {
    notices.show(each);
    notify(each);
    if (each.kind === "started") welcome();
    if (!view().element.isConnected) unseen.push(each.kind);
    redraw();
  }
  return {
    tell,
    announce(told, jobs) {
      known = jobs ?? [];
      told.forEach(tell);
      showInNodes(known);
      redraw();
    },
    seen() {
      unseen = [];
      redraw();
    },
  };
}

/** Speak a language of ComfyUI; English where there are no words of it. */
async function speak(name = "en") {
  const file = new URL(`./words/${encodeURIComponent(name)}.json`, import.meta.url);
  const answer = name === "en" ? null : await fetch(file).catch(() => null);
  const known = answer?.ok ? await answer.json().catch(() => null) : null;
  setWords(known ? name : "en", known ?? {});
}

async function setup() {
  addStyles();
  await speak(app.extensionManager.setting?.get("Comfy.Locale"));
  let view = createView();
  let control = null;
  let beside = []; // the tastes' and the weights'
  const herald = createHerald(() => view, () => control, () => beside[1]);
  const host = {
    fetchApi: (route, options) => api.fetchApi(route, options),
    imageURL: (route) => api.apiURL(route) + ofUser(),
    addLoader,
    copy,
    announce: herald.announce,
    tell: herald.tell,
    canAskForNotifications: canAsk,
    askForNotifications: ask,
    browseTemplates: () => app.extensionManager.command.execute("Comfy.BrowseTemplates"),
    get storage() { return sessionStorage; }, // which a browser may forbid
    isShown: () => view.element.isConnected,
    jobName: (id) => control.nameOf(id),
  };
  const draw = (part) => (state) => view.update(part, state);
  control = createControl(host, draw("jobs"));
  beside = [createTasteControl(host, draw("taste")), createWeightsControl(host, draw("weights"))];
  view.start(control, ...beside);
  const refresh = () => [control, ...beside].forEach((each) => each.refresh());
  app.ui?.settings?.addEventListener("Comfy.Locale.change", async ({ detail }) => {
    await speak(detail.value);
    const { element } = view;
    view = createView();
    view.start(control, ...beside);
    element.replaceWith(view.element);
    refresh();
  });
  api.addEventListener("execution_start", control.know); // its train node may start a job
  api.addEventListener("pcpo.jobs", ({ detail }) => control.receive(detail));
  api.addEventListener("reconnecting", control.disconnected);
  api.addEventListener("reconnected", control.reconnected);
  app.extensionManager.registerSidebarTab({
    id: TAB,
    icon: "pi pi-chart-line",
    title: "PCPO",
    tooltip: t("PCPO training"),
    type: "custom",
    render(element) { // called each time that the tab is shown, and more often
      herald.seen();
      if (view.element.parentElement === element) return;
      element.replaceChildren(view.element);
      refresh();
    },
  });
}

app.registerExtension({ name: "PCPO.panel", setup });
