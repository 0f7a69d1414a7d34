/**
 * Lists the pack's workflows by their names, and opens them at the view that they were saved with:
 * note and first group, large enough to read. ComfyUI lists them as the disk does, leaves a
 * template's view aside and fits all of it into the window.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(".", import.meta.url).pathname.split("/").at(-2));

function sortTemplates() {
  const { getWorkflowTemplates } = api;
  api.getWorkflowTemplates = async (...given) => {
    const all = await getWorkflowTemplates.apply(api, given);
    all?.[PACK]?.sort();
    return all;
  };
}

app.registerExtension({
  name: "PCPO.view",
  setup: sortTemplates,
  afterConfigureGraph() {
    const saved = app.graph.extra?.ds;
    if (!saved?.pcpo) return; // ComfyUI replaces it by its own when a user saves the workflow
    app.canvas.ds.scale = saved.scale;
    app.canvas.ds.offset = [...saved.offset];
    app.canvas.setDirty(true, true);
  },
});
