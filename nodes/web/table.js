/** The table of PCPO Score Images, in columns, on the node itself; both ways to draw nodes have it. */

import { app } from "../../scripts/app.js";
import { t } from "./words.js";

const NODE = "PCPOScoreImages";
const NAME = "pcpo_table";
const HEIGHT = 120; // px

/** The element of a node's table, made at the first result. */
function tableOf(node) {
  const known = node.widgets?.find(({ name }) => name === NAME);
  if (known) return known.element;
  const element = document.createElement("pre");
  element.style.cssText = "margin:0;overflow:auto;font:11px ui-monospace,monospace;"
    + "white-space:pre;user-select:text;color:var(--fg-color);background:var(--comfy-input-bg);"
    + "padding:.3rem .5rem;border-radius:.3rem";
  element.tabIndex = 0;
  element.setAttribute("aria-label", t("scores"));
  const widget = node.addDOMWidget(NAME, "pcpo_table", element, { serialize: false,
    getMinHeight: () => HEIGHT, hideOnZoom: false });
  widget.serialize = false; // a workflow says values by their place
  node.setSize?.([node.size[0], node.size[1] + HEIGHT]);
  return element;
}

app.registerExtension({
  name: "PCPO.table",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const { onExecuted } = node;
    node.onExecuted = function (output, ...more) {
      onExecuted?.call(this, output, ...more);
      const text = output?.pcpo_table?.[0];
      if (text) tableOf(this).textContent = text;
    };
  },
});
