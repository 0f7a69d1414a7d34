"""The head of a taste: against closed forms and other programs; its region and its honesty."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from comfyui_pcpo.pcpo.errors import RewardUnavailable
from comfyui_pcpo.pcpo.rewards import load_reward, taste
from comfyui_pcpo.pcpo.rewards.taste import Choices, Davidson, Head
from scipy import optimize, stats

DOUBLE = torch.float64


def simulated(m=80, n=200, d=5, log_nu=-1.0, seed=0):
    """Pictures' features, choices between them, and the weight that they follow."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(m, d, generator=draw, dtype=DOUBLE)
    weight = torch.linspace(2, -1, d, dtype=DOUBLE)
    pairs = torch.stack([torch.randperm(m, generator=draw)[:2] for _ in range(n)])
    gap = (z[pairs[:, 0]] - z[pairs[:, 1]]) @ weight
    p = taste.log_probabilities(gap, log_nu).exp()
    outcomes = 1.0 - torch.multinomial(p, 1, generator=draw)[:, 0].double()
    return z, Choices(pairs, outcomes, torch.ones(n, dtype=torch.bool)), weight


# --- Davidson's model ----------------------------------------------------------------------------


def test_choices_follow_davidsons_formula():
    s, nu = np.array([0.7, -0.4]), 0.3  # Davidson 1970, (2.2) and (2.3)
    strengths = np.exp(s)
    total = strengths.sum() + nu * math.sqrt(strengths.prod())
    expected = [strengths[0] / total, nu * math.sqrt(strengths.prod()) / total]
    found = taste.log_probabilities(torch.tensor([s[0] - s[1]], dtype=DOUBLE), math.log(nu)).exp()
    assert found[0, :2].tolist() == pytest.approx(expected, rel=1e-12)
    assert found.sum().item() == pytest.approx(1, rel=1e-12)


def test_the_mode_is_that_of_a_general_optimiser():
    z, choices, _ = simulated()
    x, y = choices.differences(z).numpy(), choices.outcomes.numpy()

    def loss(at):
        gap, tie = x @ at[:-1], math.exp(at[-1])
        total = np.exp(gap / 2) + np.exp(-gap / 2) + tie
        chosen = np.where(y == 0, tie, np.exp(y * gap / 2)) / total
        return -np.log(chosen).sum() + at[:-1] @ at[:-1] * 1.5 - stats.norm(-1, 2).logpdf(at[-1])

    expected = optimize.minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-8}).x
    found = Davidson.fit(choices.differences(z), choices.outcomes, 3.0)
    assert found.weight.tolist() == pytest.approx(expected[:-1].tolist(), abs=1e-5)
    assert found.log_nu == pytest.approx(expected[-1], abs=1e-5)


def test_the_curvature_is_that_of_the_loss():
    z, choices, _ = simulated()
    x, y = choices.differences(z), choices.outcomes
    found = Davidson.fit(x, y, 3.0)
    at = torch.cat([found.weight, torch.tensor([found.log_nu], dtype=DOUBLE)])

    def loss(point):
        logs = taste.log_probabilities(x @ point[:-1], point[-1])
        chosen = logs.gather(1, (1 - y).long()[:, None]).sum()
        return 1.5 * point[:-1].square().sum() + ((point[-1] + 1) / 2) ** 2 / 2 - chosen

    expected = torch.autograd.functional.hessian(loss, at)
    covariance = found.covariance(x, y, 3.0)
    assert torch.allclose(covariance, expected.inverse()[:-1, :-1], atol=1e-9)


def test_without_ties_and_ridge_it_is_logistic_regression():
    z, choices, _ = simulated(n=400, log_nu=-30.0)
    x = choices.differences(z)
    found = Davidson.fit(x, choices.outcomes, 1e-9)
    model = sm.GLM((choices.outcomes.numpy() + 1) / 2, x.numpy(), family=sm.families.Binomial())
    expected = model.fit()
    # ties that never come keep a prior of their own, which moves the rest by less than a tenth of
    # a standard error
    errors = torch.tensor(expected.bse)
    assert ((found.weight - torch.tensor(expected.params)).abs() / errors).max() < 0.1
    ratio = found.covariance(x, choices.outcomes, 1e-9).diagonal().sqrt() / errors
    assert (ratio - 1).abs().max() < 0.05


# --- what cross-validation sees ------------------------------------------------------------------


def test_no_picture_is_on_both_sides_of_a_fold():
    _, choices, _ = simulated(m=120)
    tested = []
    for fitted, held_out in taste.folds(choices):
        seen = {*choices.pairs[fitted].flatten().tolist()}
        assert not seen & {*choices.pairs[held_out].flatten().tolist()}
        assert len(fitted) > len(choices) / 3
        tested += held_out.tolist()
    assert len({*tested}) == len(tested) == len(choices)


def test_only_random_pairs_are_tested():
    _, choices, _ = simulated(m=120)
    chosen = Choices(choices.pairs, choices.outcomes, torch.arange(200) % 2 == 0)
    tested = torch.cat([held_out for _, held_out in taste.folds(chosen)])
    assert sorted(tested.tolist()) == list(range(0, 200, 2))


def test_the_agreement_is_that_on_pictures_never_seen():
    z, choices, weight = simulated(m=400, n=400)
    found = taste.fit(z, choices)
    new = torch.randn(4000, 2, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(9))
    gap, said = (
        (new[:, 0] - new[:, 1]) @ weight,
        found.head.z(new.flatten(0, 1)) @ found.head.weight,
    )
    p = taste.log_probabilities(gap, -1.0).exp()
    truth = ((said[::2] > said[1::2]).double() * p[:, 0] + (said[::2] < said[1::2]) * p[:, 2]).sum()
    truth = truth / (p[:, 0] + p[:, 2]).sum()
    error = math.sqrt(truth * (1 - truth) / found.tested)
    assert abs(found.head.agreement - truth) < 3 * error
    assert found.head.doubt == ""


def test_choices_at_random_are_not_agreed_with():
    found = []
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        z, choices, _ = simulated(m=80, d=20, seed=seed)
        noise = torch.randint(0, 2, (200,), generator=draw) * 2.0 - 1
        found.append(taste.fit(z, Choices(choices.pairs, noise.double(), choices.is_random)))
    # of 30 seeds the mean is 51%, and the deviation of one 3%
    assert sum(one.head.agreement for one in found) / 8 == pytest.approx(0.5, abs=0.05)
    assert sum(one.strength >= 100 for one in found) >= 5
    assert all("does not know you yet" in f.head.doubt for f in found if f.head.agreement < 0.6)


def test_a_thousand_votes_are_fitted_in_a_second():
    for d, most in ((104, 2.5), (768, 6.0)):  # 0.25 s and 0.6 s of one idle core
        z = torch.randn(600, d, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        _, choices, _ = simulated(m=600, n=1000)
        began = time.process_time()
        taste.fit(z, choices)
        assert time.process_time() - began < most


# --- asking --------------------------------------------------------------------------------------


def test_informative_pairs_are_those_of_the_largest_determinant():
    z, choices, _ = simulated(m=12)
    head = taste.fit(z, choices).head
    z = head.z(z)
    pairs = torch.combinations(torch.arange(12))
    taken = taste.informative(z, head, pairs, 3)
    assert len({*pairs[taken].flatten().tolist()}) == 6  # no picture twice

    def gain(rows):
        x = z[pairs[rows, 0]] - z[pairs[rows, 1]]
        p = taste.log_probabilities(x @ head.weight, head.log_nu).exp()
        information = (p[:, 0] + p[:, 2] - (p[:, 0] - p[:, 2]) ** 2) / 4
        return torch.logdet(head.covariance.inverse() + x.T @ (information[:, None] * x))

    for count in (1, 2, 3):  # each is the best one after those before it
        used = pairs[taken[: count - 1]].flatten()
        free = [i for i, pair in enumerate(pairs) if not torch.isin(pair, used).any()]
        best = max(free, key=lambda row: gain([*taken[: count - 1], row]))
        assert taken[count - 1] == best


# --- the region ----------------------------------------------------------------------------------


def test_the_covariance_is_ledoit_and_wolfs():
    z = torch.randn(30, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    z -= z.mean(0)
    sample, d, m = z.T @ z / 30, 6, 30
    mu = sample.trace() / d
    delta = (sample - mu * torch.eye(d)).square().sum() / d
    beta = sum((torch.outer(row, row) - sample).square().sum() for row in z) / d / m**2
    share = min(1.0, (beta / delta).item())
    expected = (1 - share) * sample + share * mu * torch.eye(d)
    assert 0 < share < 1
    assert torch.allclose(taste.shrunk_covariance(z), expected, atol=1e-12)


def test_there_is_nothing_to_gain_from_leaving_the_region():
    z, choices, _ = simulated(m=200)
    head = taste.fit(z, choices).head
    known = head.z(z)
    assert (head.distance(known) <= 1).double().mean() > 0.9
    direction = head.weight / head.weight.norm()
    walk = torch.arange(1, 100, dtype=DOUBLE)[:, None] * direction
    scores, distances = head.score(walk), head.distance(walk)
    outside = distances > 1
    assert outside.sum() > 50
    assert (scores[outside].diff().abs() < 1e-9).all()  # level beyond the edge
    disliked = head.score(-walk)
    assert (disliked[outside].diff() < 0).all()  # nor is what is disliked worth leaving it
    assert (scores[~outside].diff() > 0).all()


# --- features, file and reward -------------------------------------------------------------------


def test_the_grid_describes_what_it_says():
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[:, 0, :4, :4] = 255  # one red cell, above on the left
    found = taste.grid_features(image)[0]
    light, red, yellow, saturation, contrast = (found[i * 16 : i * 16 + 16] for i in range(5))
    assert found.shape == (104,)
    assert light.tolist() == pytest.approx([0.299] + [0] * 15)
    assert red.tolist() == pytest.approx([1] + [0] * 15)
    assert yellow.tolist() == pytest.approx([0.5] + [0] * 15)
    assert saturation.tolist() == pytest.approx([1] + [0] * 15)
    assert contrast.tolist() == pytest.approx([0] * 16, abs=1e-6)
    assert found[96:].tolist() == pytest.approx([1 / 3] + [0] * 7)
    sharpness = found[80:96]
    assert sharpness[0] > sharpness[15] == pytest.approx(math.log(0.01))


def test_features_do_not_depend_on_the_size():
    small = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    small = small.to(torch.uint8)
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.allclose(taste.grid_features(small), taste.grid_features(large))


@pytest.fixture
def head_file(tmp_path):
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    features = taste.grid_features(images.to(torch.uint8))
    _, choices, _ = simulated(m=40, n=60)
    taste.fit(features, choices).head.save(tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


def test_the_reward_is_the_head_on_the_features(head_file):
    head, reward = Head.load(head_file), load_reward("taste", folder=str(head_file.parent))
    images = torch.randint(0, 256, (3, 3, 24, 20), dtype=torch.uint8)
    scores = reward.score(images, ["", "a", "b"])
    z = head.z(taste.grid_features(images))
    assert scores.values.tolist() == pytest.approx(head.score(z).tolist(), rel=1e-6)
    assert [d["distance"] for d in scores.details] == head.distance(z).tolist()
    assert reward.fingerprint()["head"] == head.digest
    assert load_reward("taste", head=str(head_file)).fitted.digest == head.digest
    small = reward.score(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [""])
    assert "4x4" in small.errors[0]


def test_a_damaged_head_is_refused(head_file):
    head_file.write_bytes(head_file.read_bytes()[:-100])
    with pytest.raises(RewardUnavailable, match=r"is no head of a taste .* taste fit"):
        load_reward("taste", head=str(head_file))


def test_a_head_of_other_features_is_refused(head_file, monkeypatch):
    monkeypatch.setattr(taste, "FEATURES", {"clip_l": taste.ClipL})
    with pytest.raises(RewardUnavailable, match="of the features 'grid', which are not known here"):
        load_reward("taste", head=str(head_file))


def test_without_a_head_it_says_how_to_get_one(tmp_path):
    with pytest.raises(RewardUnavailable, match=r"after its first fit; vote, then run .*taste fit"):
        load_reward("taste", folder=str(tmp_path))
    with pytest.raises(RewardUnavailable, match="needs the option folder"):
        load_reward("taste")
