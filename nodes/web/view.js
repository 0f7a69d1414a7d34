/**
 * Opens the pack's workflows at the view that they were saved with: note and first group, large
 * enough to read. ComfyUI leaves a template's view aside and fits all of it into the window.
 */

import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "PCPO.view",
  afterConfigureGraph() {
    const saved = app.graph.extra?.ds;
    if (!saved?.pcpo) return; // ComfyUI replaces it by its own when a user saves the workflow
    app.canvas.ds.scale = saved.scale;
    app.canvas.ds.offset = [...saved.offset];
    app.canvas.setDirty(true, true);
  },
});
