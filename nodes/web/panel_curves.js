/** The curves of a job as options of `lineChart`. Pure: no DOM, no ComfyUI. */

import { guardCurves } from "./guard_curves.js";
import { tasteCurves } from "./taste_curves.js";

const HEIGHT = 180;

/**
 * Charts of what a job measured; empty before its first iteration.
 *
 * @param {object} job details: metrics, config, before, guard.
 * @returns {object[]} options of `lineChart`, each with its own title; those that say how training
 *   works, and not what it achieves, are marked as "more".
 */
export function curves({ metrics = [], config, before = null, guard }) {
  if (!metrics.length) return [];
  const x = metrics.map((line) => line.iteration);
  const column = (name) => metrics.map((line) => line[name] ?? null);
  const series = (name, key, style = {}) => ({ name, x, y: column(key), style });
  const limit = config?.method?.clip_high;
  const range = { name: "clip range", x, y: x.map(() => limit), style: { dash: "3 3" } };
  const charts = [
    { title: "Reward", yLabel: "reward", series: reward(metrics, x, column, before) },
    ...parts(config?.rewards).map((label) => ({ title: `Reward ${label}`, yLabel: "its own scale",
      series: [series("mean", `reward_${label}`)] })),
    ...tasteCurves(metrics),
    ...guardCurves(guard, metrics),
  ];
  const more = [
    { title: "Clip fraction", yLabel: "share", yRange: [0, 1], series: [
      series("first update", "clip_fraction_on_policy"),
      series("all updates", "clip_fraction"),
      series("|ratio − 1| beyond the range", "outside_fraction", { dash: "3 3" }),
    ] },
    { title: "Log ratio, mean over latent elements", yLabel: "nats", log: true, series: [
      series("largest |log ratio|", "log_ratio_max"),
      series("deviation", "log_ratio_std"),
      ...(limit ? [range] : []),
    ] },
    { title: "Gradient norm before clipping", yLabel: "norm", log: true,
      series: [series("mean of the updates", "grad_norm")] },
    { title: "Prompts whose images have equal rewards", yLabel: "share", yRange: [0, 1],
      series: [series("nothing to learn from", "frac_reward_zero_std")] },
    { title: "KL to the reference", yLabel: "nats", series: [series("KL", "kl")] },
    { title: "Speed", yLabel: "images/s", series: [series("images/s", "images_per_second")] },
  ];
  return [...charts, ...more.map((chart) => ({ ...chart, more: true }))]
    .map((chart) => ({ xLabel: "iteration", height: HEIGHT, ...chart,
      series: chart.series.filter(isMeasured) })).filter(({ series }) => series.length);
}

/** The mean with its spread, and the held-out prompts with the base model at iteration 0. */
function reward(metrics, x, column, before) {
  const mean = column("reward");
  const spread = column("reward_std");
  const bound = (sign) => mean.map((v, i) =>
    (v == null || spread[i] == null ? null : v + sign * spread[i]));
  const held = metrics.filter((line) => line.held_out != null);
  const points = held.map((line) => [line.iteration, line.held_out]);
  if (before != null) points.unshift([0, before]);
  return [
    { name: "mean ± deviation", x, y: mean, low: bound(-1), high: bound(1) },
    { name: "held-out prompts", x: points.map(([at]) => at), y: points.map(([, v]) => v),
      style: { points: true } },
  ];
}

/** The rewards whose own curves say more than their sum: several, or one that is rescaled. */
function parts(rewards) {
  const entries = Object.entries(rewards ?? {});
  const isScaled = ([, given]) => given?.normalise != null && given.normalise !== "raw";
  return entries.length > 1 || entries.some(isScaled) ? entries.map(([label]) => label) : [];
}

/** A KL that is 0 throughout was not asked for, and no group without a spread is as it should be. */
const DULL = ["KL", "nothing to learn from"];

function isMeasured({ name, y }) {
  return y.some((v) => v != null && (!DULL.includes(name) || v !== 0));
}
