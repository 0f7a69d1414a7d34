/**
 * Hides the advanced widgets of PCPO Training Settings on ComfyUI's canvas until they are asked for
 * (right click, Show Advanced). Its other way to draw nodes, Nodes 2.0, does so by itself. Opens
 * workflows that call its presets by former names.
 */

import { app } from "../../scripts/app.js";
import { renamePresets } from "./former_names.js";

const NODE = "PCPOTrainingSettings";
let names = {};

app.registerExtension({
  name: "PCPO.advanced",
  beforeRegisterNodeDef(type, { name, input }) {
    if (name === NODE) names = input.required.preset[1].former_names ?? {};
  },
  beforeConfigureGraph(graph) {
    renamePresets(graph, names);
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const { computeSize } = node;
    node.computeSize = function (...given) { // called whenever a preset has brought its widgets
      for (const widget of this.widgets) {
        widget.advanced = Boolean(widget.options.advanced);
        widget.hidden = widget.advanced && !this.showAdvanced;
      }
      return computeSize.apply(this, given);
    };
    node.setSize(node.computeSize());
  },
});
