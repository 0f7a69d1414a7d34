/** Presets of PCPO Training Settings that a saved workflow calls by a former name. */

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
