"""Distances and diversities against scipy, torch-fidelity and closed forms; bad input; memory."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from comfyui_pcpo.pcpo.metrics import (
    FEATURES,
    InceptionScore,
    Moments,
    frechet_distance,
    frechet_distance_of,
    load_features,
)
from comfyui_pcpo.pcpo.metrics.inception_score import splits_of
from comfyui_pcpo.pcpo.metrics.similarity import (
    pairs_of,
    pixel_diversity,
    rms,
    ssim_diversity,
)
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

torch.set_num_threads(1)

KEPT = [
    [0.10245, 0.06268, 0.09746, 0.09293, 0.00598, 0.23317, 0.0, 0.06914],
    [0.10309, 0.05806, 0.09492, 0.0974, 0.00451, 0.22525, 0.0, 0.07861],
]


def rows_of(count, size, seed=0, rank=None, mean=0.0):
    """Correlated features."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(rank or size, size))
    return torch.from_numpy(random.normal(size=(count, rank or size)) @ mix + mean)


def moments_of(rows, batch=7):
    found = Moments(rows.shape[1])
    for part in rows.split(batch):
        found.add(part)
    return found


def pictures(count, side=24, seed=0, spread=60):
    random = np.random.default_rng(seed)
    base = random.integers(0, 255 - spread, (1, 3, side, side))
    more = random.integers(0, spread + 1, (count, 3, side, side))
    return torch.from_numpy((base + more).astype(np.uint8))


# moments


@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_moments_are_those_of_all_rows(batch, mean):
    rows = rows_of(101, 5, mean=mean)
    found = moments_of(rows, batch)
    exact = rows - rows[:1]  # the covariance does not depend on where 0 is
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-13, atol=1e-13)
    theirs = torch.from_numpy(np.cov(exact.numpy(), rowvar=False))
    torch.testing.assert_close(found.covariance, theirs, rtol=1e-8, atol=1e-8)
    assert found.count == 101


def test_moments_take_in_float32_without_loss():
    rows = rows_of(50, 3).float()
    torch.testing.assert_close(moments_of(rows).mean, rows.double().mean(0), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (torch.zeros(2, 3), r"shape \(2, 3\) do not fit moments of 4 features"),
        (torch.zeros(4), "do not fit"),
        (torch.tensor([[0.0] * 4, [0, 1, math.nan, 0]]), "image 1 of 2 in this batch are not all"),
        (torch.tensor([[math.inf] * 4]), "image 0 of 1"),
    ],
)
def test_moments_refuse_what_does_not_fit_and_stay_as_they_were(rows, told):
    found = moments_of(rows_of(10, 4))
    before = found.count, found.mean.clone(), found.scatter.clone()
    with pytest.raises(ValueError, match=told):
        found.add(rows)
    assert found.count == before[0]
    assert torch.equal(found.mean, before[1]) and torch.equal(found.scatter, before[2])


# the Fréchet distance


def by_root_of_matrix(one, other):
    """The formula with scipy's matrix root."""
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second)
    means = one.mean(0) - other.mean(0)
    return means @ means + np.trace(first) + np.trace(second) - 2 * np.trace(np.real(root))


@pytest.mark.parametrize("counts", [(300, 200), (40, 300), (20, 25)])
def test_frechet_distance_equals_scipy_and_torch_fidelity(counts):
    """Also with fewer rows than features, where the covariances are singular."""
    one, other = rows_of(counts[0], 32, 1), rows_of(counts[1], 32, 2, mean=0.5)
    found = frechet_distance(moments_of(one), moments_of(other))
    assert found.value == pytest.approx(by_root_of_matrix(one.numpy(), other.numpy()), rel=1e-5)
    theirs = [
        {"mu": rows.mean(0).numpy(), "sigma": np.cov(rows.numpy(), rowvar=False)}
        for rows in (one, other)
    ]
    said = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert found.value == pytest.approx(said, rel=1e-5)
    assert found.images == counts


@pytest.mark.parametrize("counts", [(300, 200), (40, 9), (2, 2)])
def test_frechet_distance_of_features_is_that_of_their_moments(counts):
    one, other = rows_of(counts[0], 32, 1), rows_of(counts[1], 32, 2, mean=0.5)
    found = frechet_distance_of(one.float(), other.float())
    by_moments = frechet_distance(moments_of(one.float()), moments_of(other.float()))
    assert found.value == pytest.approx(by_moments.value, rel=1e-7)
    assert (found.images, found.note) == (by_moments.images, by_moments.note)


def test_frechet_distance_of_equal_sets_is_zero():
    one = moments_of(rows_of(100, 16, rank=5))
    assert 0 <= frechet_distance(one, one).value < 1e-6


def test_frechet_distance_of_normal_distributions_is_its_closed_form():
    """Of commuting covariances: |m|^2 + sum (s - t)^2."""
    random = np.random.default_rng(0)
    s, t, mean = np.array([1.0, 2.0, 0.5]), np.array([2.0, 2.0, 3.0]), np.array([0.3, -0.2, 0.0])
    one = torch.from_numpy(random.normal(0, s, (200_000, 3)))
    other = torch.from_numpy(random.normal(mean, t, (200_000, 3)))
    exact = float((mean**2).sum() + ((s - t) ** 2).sum())
    assert frechet_distance_of(one[:400], other[:400]).value == pytest.approx(exact, rel=0.2)
    found = frechet_distance(moments_of(one, 50_000), moments_of(other, 50_000))
    assert found.value == pytest.approx(exact, rel=0.01)


def test_frechet_distance_says_where_there_are_too_few_images():
    enough, few = moments_of(rows_of(33, 32)), moments_of(rows_of(32, 32))
    assert frechet_distance(enough, enough).note is None
    for pair in ((few, enough), (enough, few)):
        note = str(frechet_distance(*pair).note)
        assert "a covariance of 32 features needs more than 32 images" in note
        assert f"there are {pair[0].count} and {pair[1].count}" in note


@pytest.mark.parametrize("count", [0, 1])
def test_frechet_distance_of_no_set_is_refused(count):
    rows = rows_of(5, 4)
    with pytest.raises(ValueError, match=f"two images at the very least, and there are {count}"):
        frechet_distance(moments_of(rows), moments_of(rows[:count]))
    with pytest.raises(ValueError, match=f"two images at the very least, .* 5 and {count}"):
        frechet_distance_of(rows, rows[:count])
    with pytest.raises(ValueError, match="cannot be compared"):
        frechet_distance(moments_of(rows), moments_of(rows_of(5, 3)))
    with pytest.raises(ValueError, match="cannot be compared"):
        frechet_distance_of(rows, rows_of(5, 3))


# the Inception Score


@pytest.mark.parametrize("count", [10, 101, 1000])
def test_inception_score_equals_torch_fidelity_in_any_order(count):
    logits = 3 * rows_of(count, 20).float()
    theirs = isc_features_to_metric(logits)
    found = InceptionScore(count)
    order = np.random.default_rng(0).permutation(count).tolist()
    for start in range(0, count, 7):
        rows = order[start : start + 7]
        found.add(logits[rows], rows)
    score = found.result()
    assert score.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert score.std == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)
    assert score.images == count


def test_inception_score_of_saturated_logits_is_a_number():
    """Each image surely of its own class: the score is the number of classes in a split."""
    found = InceptionScore(100)
    found.add(1e5 * torch.eye(100), range(100))
    assert found.result().mean == pytest.approx(10.0)
    same = InceptionScore(100)
    same.add(torch.ones(100, 7), range(100))
    assert same.result().mean == pytest.approx(1.0)
    assert same.result().note is None


def test_inception_score_tells_of_missing_and_few_images():
    found = InceptionScore(30)
    found.add(rows_of(29, 20), range(29))
    note = str(found.result().note)
    assert "1 of 30 images are missing" in note and "a split has 2 images" in note
    assert found.result().images == 29


def test_inception_score_refuses_what_is_none():
    with pytest.raises(ValueError, match="over 10 splits needs that many images"):
        InceptionScore(9)
    found = InceptionScore(20)
    found.add(torch.zeros(1, 3), [4])
    with pytest.raises(ValueError, match="of 20 images 1 are there, too few"):
        found.result()
    for rows, told in (([4], "twice"), ([20], "do not fit"), ([-1], "do not fit"), ([1, 2], "fit")):
        with pytest.raises(ValueError, match=told):
            found.add(torch.zeros(1, 3), rows)
    with pytest.raises(ValueError, match="twice"):
        found.add(torch.zeros(2, 3), [1, 1])
    with pytest.raises(ValueError, match="logits of image 0 of 1"):
        found.add(torch.full((1, 3), math.nan), [1])


def test_splits_are_of_equal_size():
    assert torch.bincount(splits_of(50_040)).tolist() == [5004] * 10


# pixels and SSIM


def ssim_of_scipy(one, other):
    """Wang's formula with scipy's filter, of the places where the window fits."""
    grey = [np.tensordot([0.299, 0.587, 0.114], x.numpy() / 255, 1) for x in (one, other)]

    def seen(x):
        return scipy.ndimage.gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]

    x, y = grey
    means = seen(x), seen(y)
    spread = seen(x * x) - means[0] ** 2, seen(y * y) - means[1] ** 2
    together = seen(x * y) - means[0] * means[1]
    light = (2 * means[0] * means[1] + 1e-4) / (means[0] ** 2 + means[1] ** 2 + 1e-4)
    return (light * (2 * together + 9e-4) / (spread[0] + spread[1] + 9e-4)).mean()


@pytest.mark.parametrize("side", [11, 24, 200])
def test_ssim_equals_scipy(side):
    images = pictures(4, side)
    exact = [ssim_of_scipy(images[0], image) for image in images]
    found = [1 - ssim_diversity(torch.stack([images[0], image])) for image in images]
    assert found == pytest.approx(exact, abs=1e-5)
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert max(found[1:]) < 0.99


def test_ssim_of_large_images_is_that_of_reduced_ones():
    images = pictures(2, 512)
    blown = images.repeat_interleave(2, 2).repeat_interleave(2, 3)  # 1024: by 4; 512: by 2
    assert ssim_diversity(blown) == pytest.approx(ssim_diversity(images))


def test_diversities_are_means_over_pairs():
    images = pictures(5)
    pairs = list(itertools.combinations(range(5), 2))
    pixels = [((images[i] / 255 - images[j] / 255) ** 2).mean().sqrt().item() for i, j in pairs]
    assert pixel_diversity(images) == pytest.approx(np.mean(pixels), rel=1e-6)
    similar = [ssim_of_scipy(images[i], images[j]) for i, j in pairs]
    assert ssim_diversity(images) == pytest.approx(1 - np.mean(similar), abs=1e-5)
    same = images[:1].expand(4, -1, -1, -1)
    assert pixel_diversity(same) == 0 and ssim_diversity(same) == pytest.approx(0, abs=1e-6)


def test_diversity_of_many_images_is_that_of_some_pairs():
    images = pictures(40, 12)
    whole, some = pixel_diversity(images, 10**6), pixel_diversity(images, 200)
    assert some == pytest.approx(whole, rel=0.01) and some != whole
    assert len(set(pairs_of(2000))) == 1000


def test_diversities_need_two_images_of_enough_pixels():
    for measure in (pixel_diversity, ssim_diversity):
        with pytest.raises(ValueError, match="two images of a prompt, and there are 1"):
            measure(pictures(1))
    assert pixel_diversity(pictures(2, 10)) > 0
    with pytest.raises(ValueError, match="the images are 10x10 pixels and must have 11"):
        ssim_diversity(pictures(2, 10))
    with pytest.raises(ValueError, match="cannot be compared one with the other"):
        rms(pictures(2, 12), pictures(2, 13))


# features


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 0, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 2, 129, dtype=torch.uint8),
    ],
)
def test_what_are_no_images_is_refused(images):
    with pytest.raises(ValueError, match=r"no images: a tensor|pixels and must have|than 64:1"):
        load_features("fd_random")(images)


def test_random_features_are_the_same_everywhere_and_for_ever():
    features = load_features("fd_random")
    found = features(pictures(2, 32))
    assert found.shape == (2, features.size) == (2, 256) and found.dtype == torch.float32
    kept = torch.tensor(KEPT)
    torch.testing.assert_close(found[:, ::32], kept, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, load_features("fd_random")(pictures(2, 32)))


def test_random_features_tell_sets_apart():
    features = load_features("fd_random")
    noise, other = features(pictures(64, 32, 0)), features(pictures(64, 32, 0, spread=59))
    flat = features(pictures(64, 32, 0, spread=0))
    near = frechet_distance_of(noise[:32], noise[32:]).value
    assert frechet_distance_of(noise, other).value < 3 * near
    assert frechet_distance_of(noise, flat).value > 10 * near


def test_random_features_do_not_depend_on_the_batch():
    features = load_features("fd_random")
    images = pictures(5, 40)
    one_by_one = torch.cat([features(image[None]) for image in images])
    torch.testing.assert_close(features(images), one_by_one, rtol=1e-5, atol=1e-6)


def test_what_are_no_features_is_refused():
    with pytest.raises(ValueError, match=r"no features 'fid_random'; choose one of .*fd_random"):
        load_features("fid_random")
    assert all(name == load_features(name).name for name in FEATURES if name == "fd_random")


# memory


FLAT = """
import re, sys, torch
from pathlib import Path
from comfyui_pcpo.pcpo.metrics import InceptionScore, Moments, load_features
from comfyui_pcpo.pcpo.metrics.lpips import Spread
torch.set_num_threads(1)
def resident():  # without what is mapped from files
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
features, score, wide = load_features("fd_random"), InceptionScore(10_000), Moments(1024)
moments, held = Moments(features.size), []
for start in range(0, 10_000, 100):
    if start % 400 == 0:
        spread = Spread()  # of one prompt
    random = torch.Generator().manual_seed(start)
    images = torch.randint(0, 256, (100, 3, 64, 64), dtype=torch.uint8, generator=random)
    moments.add(features(images))
    rows = torch.randn(100, 1024, generator=random)
    wide.add(rows)
    score.add(rows[:, :1008], range(start, start + 100))
    spread.add(rows)
    held.append(resident())
score.result()
print(sorted(held[5:15])[5], sorted(held[-10:])[5])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_stays_flat_from_1000_to_10000_images():
    done = subprocess.run([sys.executable, "-c", FLAT], capture_output=True, text=True, check=True)
    first, last = map(int, done.stdout.split())  # medians: single readings vary by 20 MiB
    assert last - first < 24 * 2**20, (first, last)  # the rows of 1024 alone would be 35 MiB
