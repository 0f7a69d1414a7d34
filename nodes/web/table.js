/** The table of PCPO Score Images, in columns, on the node itself; both ways to draw nodes have it. */

import { app } from "../../scripts/app.js";
import { t } from "./words.js";

const NODE = "PCPOScoreImages";
const NAME = "pcpo_table";
const HEIGHT = 120; // px

/**
 * The element of a node's table. It is there from the start: Nodes 2.0 does not draw a widget that
 * comes later.
 */
function addTable(node) {
  const element = document.createElement("pre");
  element.style.cssText = "margin:0;overflow:auto;font:11px ui-monospace,monospace;"
    + `white-space:pre;user-select:text;min-height:${HEIGHT}px;color:var(--fg-color);`
    + "background:var(--comfy-input-bg);padding:.3rem .5rem;border-radius:.3rem";
  element.tabIndex = 0;
  element.setAttribute("aria-label", t("scores"));
  const widget = node.addDOMWidget(NAME, "pcpo_table", element, { serialize: false,
    getMinHeight: () => HEIGHT, hideOnZoom: false });
  widget.serialize = false; // a workflow says values by their place
  return element;
}

app.registerExtension({
  name: "PCPO.table",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const element = addTable(node);
    const { onExecuted } = node;
    node.onExecuted = function (output, ...more) {
      onExecuted?.call(this, output, ...more);
      const text = output?.pcpo_table?.[0];
      if (text) element.textContent = text;
    };
  },
});
