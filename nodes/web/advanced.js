/**
 * Hides the advanced widgets of PCPO Training Settings on ComfyUI's canvas until they are asked for
 * (right click, Show Advanced). Its other way to draw nodes, Nodes 2.0, does so by itself. Opens
 * workflows of before, whose presets have former names and whose numbers stand for words.
 */

import { app } from "../../scripts/app.js";
import { numbersToWords, renamePresets, wordsOf } from "./former_names.js";
import { isTranslated } from "./words.js";

const NODE = "PCPOTrainingSettings";
let names = {};
const words = {}; // by a node's class: its widgets that take a number or a word

app.registerExtension({
  name: "PCPO.advanced",
  beforeRegisterNodeDef(type, { name, input }) {
    if (!name.startsWith("PCPO")) return;
    if (name === NODE) names = input.required.preset[1].former_names ?? {};
    words[name] = wordsOf(input);
  },
  beforeConfigureGraph(graph) {
    renamePresets(graph, names);
  },
  nodeCreated(node) {
    if (Object.keys(words[node.comfyClass] ?? {}).length) {
      const { onConfigure } = node;
      node.onConfigure = function (...given) {
        onConfigure?.apply(this, given);
        numbersToWords(this.widgets, words[this.comfyClass]);
      };
    }
    if (node.comfyClass !== NODE) return;
    const { computeSize } = node;
    node.computeSize = function (...given) { // called whenever a preset has brought its widgets
      for (const widget of this.widgets) {
        widget.advanced = Boolean(widget.options.advanced);
        widget.hidden = widget.advanced && !this.showAdvanced;
        translateTooltip(widget);
      }
      return computeSize.apply(this, given);
    };
    node.setSize(node.computeSize());
  },
});

/** Lets ComfyUI show a tooltip of its locale: it shows a preset's own, in English, before that. */
function translateTooltip(widget) {
  const english = widget.tooltip;
  const get = () => (isTranslated() ? undefined : english);
  if (english) Object.defineProperty(widget, "tooltip", { get, set() {}, configurable: true });
}
