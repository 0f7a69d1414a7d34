/** The curves of a job as options of `lineChart`. Pure: no DOM, no ComfyUI. */

import { guardCurves } from "./guard_curves.js";
import { tasteCurves } from "./taste_curves.js";
import { t } from "./words.js";

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
  /** A KL that is 0 throughout was not asked for, and no group without a spread is as it should be. */
  const dull = (...given) => ({ ...series(...given), isDull: true });
  const limit = config?.method?.clip_high;
  const range = { name: t("clip range"), x, y: x.map(() => limit), style: { dash: "3 3" } };
  const charts = [
    { title: t("Reward"), yLabel: t("reward"), series: reward(metrics, x, column, before) },
    ...parts(config?.rewards).map((label) => ({ title: t("Reward {name}", { name: label }),
      yLabel: t("its own scale"), series: [series(t("mean"), `reward_${label}`)] })),
    ...tasteCurves(metrics),
    ...guardCurves(guard, metrics),
  ];
  const more = [
    { title: t("Clip fraction"), yLabel: t("share"), yRange: [0, 1], series: [
      series(t("first update"), "clip_fraction_on_policy"),
      series(t("all updates"), "clip_fraction"),
      series(t("|ratio − 1| beyond the range"), "outside_fraction", { dash: "3 3" }),
    ] },
    { title: t("Log ratio, mean over latent elements"), yLabel: t("nats"), log: true, series: [
      series(t("largest |log ratio|"), "log_ratio_max"),
      series(t("deviation"), "log_ratio_std"),
      ...(limit ? [range] : []),
    ] },
    { title: t("Gradient norm before clipping"), yLabel: t("norm"), log: true,
      series: [series(t("mean of the updates"), "grad_norm")] },
    { title: t("Prompts whose images have equal rewards"), yLabel: t("share"), yRange: [0, 1],
      series: [dull(t("nothing to learn from"), "frac_reward_zero_std")] },
    { title: t("KL to the reference"), yLabel: t("nats"), series: [dull("KL", "kl")] },
    { title: t("Speed"), yLabel: t("images/s"),
      series: [series(t("images/s"), "images_per_second")] },
  ];
  return [...charts, ...more.map((chart) => ({ ...chart, more: true }))]
    .map((chart) => ({ xLabel: t("iteration"), height: HEIGHT, ...chart,
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
    { name: t("mean ± deviation"), x, y: mean, low: bound(-1), high: bound(1) },
    { name: t("held-out prompts"), x: points.map(([at]) => at), y: points.map(([, v]) => v),
      style: { points: true } },
  ];
}

/** The rewards whose own curves say more than their sum: several, or one that is rescaled. */
function parts(rewards) {
  const entries = Object.entries(rewards ?? {});
  const isScaled = ([, given]) => given?.normalise != null && given.normalise !== "raw";
  return entries.length > 1 || entries.some(isScaled) ? entries.map(([label]) => label) : [];
}

const isMeasured = ({ y, isDull }) => y.some((v) => v != null && (!isDull || v !== 0));
