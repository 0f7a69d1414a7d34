/**
 * The text on nodes of the pack. What a node says has the height that it needs, where ComfyUI's page
 * shows two lines; an empty box for text shows its label, where the page shows its key.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NAME = "$$node-text-preview"; // of ComfyUI's widget
const LEAST = 58; // px, ComfyUI's own
const LINE = 16; // px
const FONT = "12px"; // its size there
const MARGIN = 58; // px, left and right together
const PADDING = 26; // px, above and below

/** A node by its id; "12:3" is node 3 in the subgraph that node 12 stands for. */
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById?.(part);
    graph = node?.subgraph;
  }
  return node;
}

function heightOf(text, width) {
  const ruler = document.createElement("canvas").getContext("2d");
  ruler.font = `${FONT} ${getComputedStyle(document.body).fontFamily}`;
  const rows = (line) => Math.ceil(ruler.measureText(line).width / Math.max(60, width - MARGIN));
  const all = text.split("\n").reduce((sum, line) => sum + Math.max(1, rows(line)), 0);
  return Math.max(LEAST, PADDING + LINE * all);
}

function makeRoom({ detail }) {
  const node = nodeOf(detail.nodeId ?? detail.node);
  const widget = node?.comfyClass?.startsWith("PCPO")
    && node.widgets?.find(({ name }) => name === NAME);
  if (!widget?.options) return;
  widget.options.getMinHeight = () => heightOf(detail.text, node.size[0]);
  const [width, height] = node.size;
  const least = node.computeSize?.()[1] ?? height;
  if (least > height) node.setSize?.([width, least]);
}

app.registerExtension({
  name: "PCPO.node_text",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("PCPO")) return;
    for (const { element, label } of node.widgets ?? []) {
      if (element?.tagName === "TEXTAREA" && label) element.placeholder = label;
    }
  },
  setup: () => api.addEventListener("progress_text", (event) => setTimeout(makeRoom, 0, event)),
});
