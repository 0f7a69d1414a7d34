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

/** The lines of a text in px, measured once; ComfyUI asks for the height at every drawing. */
function widthsOf(text) {
  const ruler = document.createElement("canvas").getContext("2d");
  ruler.font = `${FONT} ${getComputedStyle(document.body).fontFamily}`;
  return text.split("\n").map((line) => ruler.measureText(line).width);
}

function heightOf(widths, width) {
  const rows = (line) => Math.max(1, Math.ceil(line / Math.max(60, width - MARGIN)));
  return Math.max(LEAST, PADDING + LINE * widths.reduce((sum, line) => sum + rows(line), 0));
}

function makeRoom({ detail }) {
  const node = nodeOf(detail.nodeId);
  const widget = node?.comfyClass?.startsWith("PCPO")
    && node.widgets?.find(({ name }) => name === NAME);
  if (!widget?.options) return;
  const widths = widthsOf(detail.text);
  widget.options.getMinHeight = () => heightOf(widths, node.size[0]);
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
