"""Statistics against statsmodels, scipy and closed forms; coverage over simulated experiments."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import statsmodels.api as sm
import statsmodels.formula.api as smf
from comfyui_pcpo.pcpo.statistics import (
    Factor,
    bootstrap,
    design_of,
    fit_mixed_model,
    holm,
    two_way_interval,
    win_rate,
)
from comfyui_pcpo.pcpo.statistics.bootstrap import resample_crossed
from comfyui_pcpo.pcpo.statistics.two_way import student_quantile
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

METHODS = ("baseline", "pcpo", "other")
EFFECTS = {  # of the simulated experiments, with the names of the design's columns
    "intercept": 5.0,
    "method[pcpo]": 0.4,
    "method[other]": -0.2,
    "batch[256]": 0.3,
    "method[pcpo]:batch[256]": -0.25,
    "method[other]:batch[256]": 0.0,
}
THEIRS = {
    "intercept": "Intercept",
    "method[pcpo]": "C(method, levels=order)[T.pcpo]",
    "method[other]": "C(method, levels=order)[T.other]",
    "batch[256]": "C(batch)[T.256]",
    "method[pcpo]:batch[256]": "C(method, levels=order)[T.pcpo]:C(batch)[T.256]",
    "method[other]:batch[256]": "C(method, levels=order)[T.other]:C(batch)[T.256]",
}


def experiment(random, prompts=45, seeds=2, group_deviation=0.8, deviation=0.5, drop=0.0):
    """Observations of known effects, prompts drawn at random; some may be missing."""
    rows = pd.MultiIndex.from_product(
        [range(prompts), METHODS, (128, 256), range(seeds)],
        names=["prompt", "method", "batch", "seed"],
    ).to_frame(index=False)
    design = design_of_rows(rows)
    rows["y"] = design.columns @ np.array([EFFECTS[name] for name in design.names])
    rows["y"] += random.normal(0, group_deviation, prompts)[rows["prompt"]]
    rows["y"] += random.normal(0, deviation, len(rows))
    return rows[random.random(len(rows)) >= drop].reset_index(drop=True)


def design_of_rows(rows):
    return design_of(
        Factor("method", rows["method"].tolist(), METHODS),
        Factor("batch", rows["batch"].tolist()),
    )


def fitted(rows):
    return fit_mixed_model(rows["y"].tolist(), design_of_rows(rows), rows["prompt"].tolist())


def fitted_by_statsmodels(rows):
    formula = "y ~ C(method, levels=order) * C(batch)"
    order = list(METHODS)  # noqa: F841 (the formula reads it)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a variance at its bound
        return smf.mixedlm(formula, rows, groups=rows["prompt"]).fit(method="powell")


# the mixed model


@pytest.mark.parametrize(
    ("prompts", "seeds", "group_deviation", "drop"),
    [(45, 2, 0.8, 0.0), (45, 2, 0.8, 0.3), (12, 4, 0.2, 0.1), (20, 1, 5.0, 0.0)],
)
def test_mixed_model_equals_statsmodels(prompts, seeds, group_deviation, drop):
    random = np.random.default_rng(prompts)
    rows = experiment(random, prompts, seeds, group_deviation, drop=drop)
    ours, theirs = fitted(rows), fitted_by_statsmodels(rows)
    assert [c.name for c in ours.coefficients] == list(THEIRS)
    ends = theirs.conf_int()
    for name, their_name in THEIRS.items():
        one = ours[name]
        assert one.value == pytest.approx(theirs.fe_params[their_name], abs=1e-6)
        # their errors are those of the observed information, also of the variances: not quite
        # the generalised least squares' where observations are missing
        assert one.error == pytest.approx(theirs.bse_fe[their_name], rel=3e-4 if drop else 1e-6)
        assert one.z == pytest.approx(theirs.tvalues[their_name], rel=1e-3, abs=1e-5)
        assert one.p == pytest.approx(theirs.pvalues[their_name], rel=1e-2, abs=1e-12)
        assert (one.low, one.high) == pytest.approx(tuple(ends.loc[their_name]), abs=1e-4)
    assert ours.residual_variance == pytest.approx(theirs.scale, rel=1e-4)
    assert ours.group_variance == pytest.approx(theirs.cov_re.iloc[0, 0], rel=1e-3)
    assert ours.log_likelihood >= theirs.llf - 1e-6  # at least as good a maximum
    assert ours.log_likelihood == pytest.approx(theirs.llf, abs=1e-4)
    assert (ours.observations, ours.groups) == (len(rows), prompts)


def test_mixed_model_finds_known_effects_and_its_intervals_cover_them():
    """Of 200 experiments at least 93% of the 95% intervals hold the true effect."""
    random = np.random.default_rng(0)
    models = [fitted(experiment(random)) for _ in range(200)]
    for name, true in EFFECTS.items():
        found = [model[name] for model in models]
        assert np.mean([one.low <= true <= one.high for one in found]) >= 0.93, name
        assert abs(np.mean([one.value for one in found]) - true) < 4 * found[0].error / 200**0.5
        spread = np.std([one.value for one in found], ddof=1)
        assert spread == pytest.approx(np.mean([one.error for one in found]), rel=0.15)
    assert np.mean([m.group_variance for m in models]) == pytest.approx(0.64, rel=0.05)
    assert np.mean([m.residual_variance for m in models]) == pytest.approx(0.25, rel=0.03)


def test_mixed_model_of_an_absent_effect_is_called_one_in_twenty():
    random = np.random.default_rng(3)
    name = "method[other]:batch[256]"
    called = [fitted(experiment(random, prompts=20))[name].p < 0.05 for _ in range(200)]
    assert 0.02 <= np.mean(called) <= 0.09


def test_mixed_model_of_balanced_pairs_has_the_closed_form():
    """The effect is the mean difference, its error sqrt(2 s_e^2 / (prompts x images))."""
    random = np.random.default_rng(1)
    prompts, images = 30, 4
    values = random.normal(0, 1, (prompts, 2, images)) + random.normal(0, 2, (prompts, 1, 1))
    method = Factor("method", ["a"] * images + ["b"] * images)
    design = design_of(Factor("method", list(method.values) * prompts))
    model = fit_mixed_model(values.reshape(-1), design, np.repeat(range(prompts), 2 * images))
    one = model["method[b]"]
    assert one.value == pytest.approx((values[:, 1] - values[:, 0]).mean())
    assert one.error == pytest.approx((2 * model.residual_variance / (prompts * images)) ** 0.5)


def test_mixed_model_where_groups_do_not_differ_is_least_squares():
    random = np.random.default_rng(2)
    count = 400
    method = ["a", "b"] * (count // 2)
    values = random.normal(0, 1, count)
    values -= np.repeat(values.reshape(-1, 4).mean(1), 4)  # more alike than chance would make them
    model = fit_mixed_model(values, design_of(Factor("method", method)), np.arange(count) // 4)
    assert model.group_variance == 0
    assert "do not differ by more than chance" in str(model.note)
    test = scipy.stats.ttest_ind(values[1::2], values[::2])
    assert model["method[b]"].z == pytest.approx(test.statistic)
    assert model.residual_variance == pytest.approx(values.var(ddof=2) * (1 - 0), rel=1e-2)


def test_mixed_model_keeps_its_digits_at_a_large_mean():
    rows = experiment(np.random.default_rng(5), prompts=20)
    near = fitted(rows)
    far = fitted(rows.assign(y=rows["y"] + 1e8))
    for name in list(EFFECTS)[1:]:
        assert far[name].value == pytest.approx(near[name].value, abs=1e-6)
        assert far[name].error == pytest.approx(near[name].error, rel=1e-5)
    assert far["intercept"].value == pytest.approx(near["intercept"].value + 1e8, abs=1e-6)


def test_mixed_model_says_that_few_prompts_are_few():
    random = np.random.default_rng(6)
    assert "with 12 groups" in str(fitted(experiment(random, prompts=12)).note)
    assert fitted(experiment(random, prompts=20)).note is None


TWO = design_of(Factor("method", ["a", "b"] * 4))
REFUSED = {
    "nan": ([1.0, float("nan")] * 4, TWO, "aabbccdd", "4 of 8 values are not finite"),
    "lengths": ([1.0] * 7, TWO, "aabbccdd", "7 values, 8 groups and 8 rows"),
    "one group": ([1.0, 2.0] * 4, TWO, "aaaaaaaa", "two groups and more than 3"),
    "exact": ([1.0, 2.0] * 4, TWO, "aabbccdd", "explain the values exactly"),
    "constant": ([1.0] * 8, TWO, "aabbccdd", "explain the values exactly"),
    "too few": ([1.0, 2.0, 4.0], design_of(Factor("m", ["a", "b", "a"])), "abc", "more than 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mixed_model_refuses_what_it_cannot_fit(case):
    values, design, groups, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        fit_mixed_model(values, design, groups)


def test_effects_that_cannot_be_told_apart_are_refused():
    method, batch = Factor("method", list("aabb") * 3), Factor("batch", [1, 1, 2, 2] * 3)
    with pytest.raises(ValueError, match=r"the effect batch\[2\] cannot be told from those before"):
        fit_mixed_model(range(12), design_of(method, batch, interactions=False), "abc" * 4)


# the design


def test_design_is_that_of_treatment_coding():
    rows = experiment(np.random.default_rng(0), prompts=2, seeds=1)
    import formulaic

    theirs = formulaic.model_matrix(
        "C(method, contr.treatment('baseline')) * C(batch)", rows, output="numpy"
    )
    ours = design_of_rows(rows).columns
    assert sorted(map(tuple, ours.T)) == sorted(map(tuple, np.asarray(theirs, dtype=float).T))


def test_design_without_interactions():
    design = design_of(Factor("a", [1, 2, 1]), Factor("b", [1, 1, 2]), interactions=False)
    assert design.names == ("intercept", "a[2]", "b[2]")
    assert design.columns.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("factors", "told"),
    [
        ([Factor("m", ["a", "a"])], "no observation of a second level"),
        ([Factor("m", ["a", "b"], ["a", "b", "c"])], r"no observation of \['c'\]"),
        ([Factor("m", ["a", "x"], ["a", "b"])], "'x' is no level of 'm'"),
        ([Factor("m", ["a", "b"]), Factor("n", ["a", "b", "b"])], "different numbers"),
        ([Factor("m", ["a", "b"]), Factor("m", ["a", "b"])], "one name"),
    ],
)
def test_design_refuses_what_is_none(factors, told):
    with pytest.raises(ValueError, match=told):
        design_of(*factors)


# bootstrap, Holm, Wilson


def test_bootstrap_equals_scipys_percentile_interval():
    values = np.random.default_rng(1).normal(3, 2, 60)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    assert bootstrap(values) == pytest.approx(tuple(theirs), abs=0.02)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")]])
def test_bootstrap_refuses_what_has_no_interval(values):
    with pytest.raises(ValueError, match="an interval needs two values"):
        bootstrap(values)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_holm_equals_statsmodels(count):
    p = np.random.default_rng(count).random(count) ** 3
    p[0] = p[-1]  # ties
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1].tolist())


def test_holm_of_none_and_of_no_p_value():
    assert holm([]) == []
    for bad in (float("nan"), -0.1, 1.1):
        with pytest.raises(ValueError, match="is no p-value"):
            holm([0.5, bad])


@pytest.mark.parametrize(("wins", "losses"), [(8, 2), (0, 7), (7, 0), (1, 0), (500, 499)])
def test_win_rate_equals_statsmodels(wins, losses):
    rate = win_rate(wins, losses)
    theirs = proportion_confint(wins, wins + losses, method="wilson")
    assert (rate.low, rate.high) == pytest.approx(theirs, abs=1e-12)
    assert rate.value == wins / (wins + losses)


def test_win_rate_counts_a_tie_as_half():
    rate = win_rate(3, 1, 4)
    assert (rate.value, rate.count) == (0.625, 8)
    assert rate.low < 0.625 < rate.high
    narrow = win_rate(3, 1, 4, confidence=0.5)
    assert rate.low < narrow.low < narrow.high < rate.high


@pytest.mark.parametrize(("counts", "confidence"), [((0, 0), 0.95), ((-1, 2), 0.95), ((1, 2), 1.0)])
def test_win_rate_refuses_what_is_none(counts, confidence):
    with pytest.raises(ValueError, match=r"no choices to count|between 0 and 1"):
        win_rate(*counts, confidence=confidence)


# --- seeds and prompts ---------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 1.7, 4, 12.5, 127, 1e4])
@pytest.mark.parametrize("share", [0.6, 0.975, 0.999])
def test_student_quantile(share, freedom):
    expected = scipy.stats.t.ppf(share, freedom)
    assert student_quantile(share, freedom) == pytest.approx(expected, rel=2e-6)


def test_one_column_is_students_interval():
    values = np.random.default_rng(0).normal(3, 2, (7, 1))
    expected = scipy.stats.t.interval(0.95, 6, values.mean(), scipy.stats.sem(values[:, 0]))
    assert two_way_interval(values) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="there are 1"):
        two_way_interval(values[:1])


def test_two_way_variance_is_that_of_the_analysis_of_variance():
    values = np.random.default_rng(1).normal(size=(4, 6))
    values += 3 * np.arange(4)[:, None] + 2 * np.arange(6)
    table = pd.DataFrame(values).stack().rename_axis(["seed", "prompt"]).reset_index(name="y")
    fit = smf.ols("y ~ C(seed) + C(prompt)", table).fit()
    seeds, prompts, rest = sm.stats.anova_lm(fit)[["sum_sq", "df"]].to_numpy()
    squares = [part[0] / part[1] for part in (seeds, prompts, rest)]
    variance = (squares[0] + squares[1] - squares[2]) / 24
    spread = sum(
        square**2 / part[1] for square, part in zip(squares, (seeds, prompts, rest), strict=True)
    )
    freedom = (variance * 24) ** 2 / spread
    half = scipy.stats.t.ppf(0.975, freedom) * variance**0.5
    expected = (values.mean() - half, values.mean() + half)
    assert two_way_interval(values) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spreads", [(1, 1, 1), (0, 0, 1), (1, 0, 3), (0.2, 0.5, 2)])
def test_two_way_interval_covers_as_often_as_it_says(spreads):
    of_seeds, of_prompts, rest = spreads
    random, count = np.random.default_rng(2), 400
    covered = 0
    for _ in range(count):
        values = (
            5 + random.normal(size=(5, 1)) * of_seeds + random.normal(size=(1, 40)) * of_prompts
        )
        low, high = two_way_interval(values + random.normal(size=(5, 40)) * rest)
        covered += low < 5 < high
    assert covered / count >= 0.92


def test_crossed_resamples_draw_both_factors():
    rows, columns = np.array([0.0, 10.0, 20.0]), np.array([0.0, 1.0, 5.0])
    found = resample_crossed(rows[:, None] + columns)
    assert found.shape == (10_000, 3)
    means = sorted(
        (sum(r) + sum(c)) / 3
        for r in itertools.product(rows, repeat=3)
        for c in itertools.product(columns, repeat=3)
    )
    for share in (0.1, 0.5, 0.9):
        exact = means[int(share * len(means))]
        assert np.quantile(found.mean(1), share) == pytest.approx(exact, abs=0.5)
    # all rows of a resample have the same columns
    within = found - 10 * np.round(found / 10 - 0.2)
    assert np.ptp(within, axis=1).max() < 1e-9
