/** How far a run's images are from what its tastes know, for the report page and the panel. Pure: no
 * DOM. */

import { t } from "./words.js";

/**
 * A chart of each taste, and one of its votes where more came while the run trained.
 *
 * @param {object[]} metrics lines of metrics.jsonl.
 * @returns {object[]} options of `lineChart`, each with its own title.
 */
export function tasteCurves(metrics) {
  const x = metrics.map((line) => line.iteration);
  const column = (key) => metrics.map((line) => line[key] ?? null);
  const keys = new Set(metrics.flatMap(Object.keys));
  const labels = [...keys].filter((key) => key.startsWith("distance_") && keys.has(
    key.replace("distance_", "outside_"))).map((key) => key.replace("distance_", ""));
  return labels.flatMap((label) => {
    const votes = column(`votes_${label}`);
    const distance = { title: t("Distance from the pictures voted on ({taste})", { taste: label }),
      yLabel: t("1: the edge of what it knows"), series: [
        { name: t("mean distance"), x, y: column(`distance_${label}`), style: {} },
        { name: t("share of images beyond 1"), x, y: column(`outside_${label}`), style: {} },
        { name: t("edge"), x, y: x.map(() => 1), style: { dash: "3 3" } },
      ] };
    const fitted = { title: t("Votes ({taste})", { taste: label }), yLabel: t("votes"),
      series: [{ name: t("that the head is fitted to"), x, y: votes, style: {} }] };
    return new Set(votes).size > 1 ? [distance, fitted] : [distance];
  });
}
