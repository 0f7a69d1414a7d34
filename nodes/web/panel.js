/** Registers the panel with ComfyUI's page. The only module here that knows ComfyUI. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { createControl } from "./panel_control.js";
import { createView } from "./panel_view.js";

const LOADER = "PCPOLoadJobLora";

/** Put a node into the graph that is looked at, in the middle of what is seen. */
function addLoader(choice) {
  const node = globalThis.LiteGraph?.createNode(LOADER);
  if (!node) throw new Error("This ComfyUI has no node PCPO Load Job LoRA; restart it.");
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
    throw new Error("The browser does not let this page copy; click the path and press Ctrl+C "
      + "(Cmd+C on a Mac).");
  }
}

/** Images are asked for without ComfyUI's header that says which of its users asks. */
const ofUser = () => (api.user ? `?user=${encodeURIComponent(api.user)}` : "");

function addStyles() {
  const href = new URL("./panel.css", import.meta.url).href;
  const link = Object.assign(document.createElement("link"), { rel: "stylesheet", href });
  document.head.append(link);
}

function setup() {
  addStyles();
  const view = createView();
  const control = createControl({
    fetchApi: (route, options) => api.fetchApi(route, options),
    imageURL: (route) => api.apiURL(route) + ofUser(),
    addLoader,
    copy,
    browseTemplates: () => app.extensionManager.command.execute("Comfy.BrowseTemplates"),
    get storage() { return sessionStorage; }, // which a browser may forbid
    isShown: () => view.element.isConnected,
  }, view.update);
  view.start(control);
  api.addEventListener("pcpo.jobs", ({ detail }) => control.receive(detail));
  api.addEventListener("reconnecting", control.disconnected);
  api.addEventListener("reconnected", control.reconnected);
  app.extensionManager.registerSidebarTab({
    id: "pcpo",
    icon: "pi pi-chart-line",
    title: "PCPO",
    tooltip: "PCPO training",
    type: "custom",
    render(element) { // called each time that the tab is shown, and more often
      if (view.element.parentElement === element) return;
      element.replaceChildren(view.element);
      control.refresh();
    },
  });
}

app.registerExtension({ name: "PCPO.panel", setup });
