/** The curves of a run's guard, for the report page and the panel. Pure: no DOM. */

import { t } from "./words.js";

/**
 * What the guard measured, each value with the base's at iteration 0 and its bound.
 *
 * @param {object} [guard] what the job folder keeps of the guard; charts need a run that has one.
 * @param {object[]} metrics lines of metrics.jsonl.
 * @returns {object[]} options of `lineChart`, each with its own title.
 */
export function guardCurves(guard, metrics) {
  const looks = metrics.filter((line) => line.guard_reward != null);
  return Object.entries(looks.length ? guard?.values ?? {} : {}).map(([key, value]) => {
    const x = [0, ...looks.map((line) => line.iteration)];
    const y = [value.start, ...looks.map((line) => line[key] ?? null)];
    const series = [{ name: t("held-out prompts"), x, y, style: { points: true } }];
    if (value.bound != null) {
      series.push({ name: t("bound"), x, y: x.map(() => value.bound), style: { dash: "3 3" } });
    }
    return { title: t("Guard: {value}", { value: t(value.name) }), yLabel: t(value.name), series };
  });
}
