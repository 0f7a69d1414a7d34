/** What saved workflows hold of before: former names of presets, and numbers that stood for a word. */

const NODE = "PCPOTrainingSettings";

/**
 * Give the presets of a saved workflow, and of its subgraphs, today's names, in place.
 * @param {object} graph as it is saved
 * @param {Object<string, string>} names today's by the former ones
 */
export function renamePresets(graph, names) {
  const graphs = [graph, ...(graph.definitions?.subgraphs ?? [])];
  for (const node of graphs.flatMap((each) => each.nodes ?? [])) {
    if (node.type !== NODE) continue;
    for (const values of [node.widgets_values, node.widgets_values_named]) {
      const key = Array.isArray(values) ? 0 : "preset";
      if (Object.hasOwn(names, values?.[key])) values[key] = names[values[key]];
    }
  }
}

/**
 * The widgets of a node that take a number or a word.
 * @param {object} input the node's inputs, as ComfyUI describes them
 * @returns {Object<string, {word: string, unset: number}>} by the widgets' names
 */
export function wordsOf(input, before = "") {
  const found = {};
  for (const [name, [, about]] of Object.entries({ ...input?.required, ...input?.optional })) {
    if (about?.word) found[before + name] = { word: about.word, unset: about.unset };
    for (const option of about?.options ?? []) {
      if (option?.inputs) Object.assign(found, wordsOf(option.inputs, `${before}${name}.`));
    }
  }
  return found;
}

/** Show words where a workflow of before has put numbers into such widgets. */
export function numbersToWords(widgets, words) {
  for (const widget of widgets ?? []) {
    if (typeof widget.value !== "number" || !Object.hasOwn(words, widget.name)) continue;
    const { word, unset } = words[widget.name];
    const stands = widget.value < 0 || widget.value === unset;
    widget.value = stands ? word : String(widget.value);
  }
}
