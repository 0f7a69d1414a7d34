"""Which steps an iteration trains."""

from __future__ import annotations

import pytest
import torch
from comfyui_pcpo.pcpo import SELECTIONS
from comfyui_pcpo.pcpo.rollout import generator_for
from comfyui_pcpo.pcpo.selection import AllSteps, RandomFraction, SlidingWindow

torch.set_num_threads(1)


def test_all_steps_in_order():
    assert AllSteps()(5, generator_for(0)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("num_steps", "fraction", "count"), [(15, 0.6, 9), (11, 0.6, 6), (10, 1.0, 10), (4, 0.1, 1)]
)
def test_random_fraction_takes_distinct_steps(num_steps, fraction, count):
    # 15 and 11: DanceGRPO's 16 and 12 steps without the last
    chosen = RandomFraction(fraction)(num_steps, generator_for(0, "selection")).tolist()
    assert len(chosen) == len(set(chosen)) == count
    assert set(chosen) <= set(range(num_steps))


def test_random_fraction_depends_on_the_image_alone():
    kind, keys = RandomFraction(0.6), [(1, 0, image) for image in range(4)]
    together = [kind(15, generator_for(*key)).tolist() for key in keys]
    backwards = [kind(15, generator_for(*key)).tolist() for key in reversed(keys)]
    torch.manual_seed(123)  # the global generator has no part in it
    assert together == backwards[::-1]
    assert len({tuple(chosen) for chosen in together}) == 4


def test_random_fraction_favours_no_step():
    # 600 images, 9 of 15 each: 360 a step, standard deviation 12; 5 of them
    counts = torch.zeros(15)
    for image in range(600):
        counts[RandomFraction(0.6)(15, generator_for(image))] += 1
    assert (counts - 360).abs().max() < 60


def positions(window, trained, iterations):
    masks = [window.inside(torch.tensor(trained), i) for i in range(iterations)]
    return [mask.nonzero().flatten().tolist() for mask in masks]


def test_the_window_moves_and_rolls_back():
    window = SlidingWindow(size=2, stride=2, every=1)
    # the third place would be 4-5 of 5 steps: the window keeps its size and stops at the end
    expected = [[0, 1], [2, 3], [3, 4], [0, 1], [2, 3]]
    assert positions(window, [True] * 5, 5) == expected


def test_the_window_stays_for_some_iterations():
    window = SlidingWindow(size=3, stride=1, every=2)
    expected = [[0, 1, 2]] * 2 + [[1, 2, 3]] * 2 + [[0, 1, 2]]
    assert positions(window, [True] * 4, 5) == expected


def test_the_window_is_among_the_trained_steps():
    window = SlidingWindow(size=2, stride=1, every=1)
    trained = [False, True, True, False, True, False]
    assert positions(window, trained, 3) == [[1, 2], [2, 4], [1, 2]]


def test_a_window_wider_than_the_steps_is_all_of_them():
    for size in (3, 9):
        window = SlidingWindow(size=size, every=1)
        assert positions(window, [True, True, False], 3) == [[0, 1]] * 3


def test_mix_grpo_window():
    # 25 steps, size 4, stride 1, 25 iterations a place: 22 places, then back
    window = SlidingWindow()
    places = positions(window, [True] * 25, 25 * 23)
    assert places[0] == places[24] == places[25 * 22] == [0, 1, 2, 3]
    assert places[25] == [1, 2, 3, 4]
    assert places[25 * 22 - 1] == [21, 22, 23, 24]
    assert window(4, generator_for(0)).tolist() == [0, 1, 2, 3]


def test_a_fixed_window_stays_where_it_begins():
    window = SlidingWindow(size=2, every=1, move="fixed", start=2)
    assert positions(window, [True, False, True, True, True], 3) == [[3, 4]] * 3
    assert positions(window, [True] * 3, 2) == [[1, 2]] * 2  # never beyond the last step


def test_a_random_window_is_as_often_at_every_place():
    window = SlidingWindow(size=2, every=2, move="random", seed=3)
    places = positions(window, [True] * 4 + [False], 2000)
    assert places[::2] == places[1::2]  # it stays for two iterations
    counts = [places[::2].count([i, i + 1]) for i in range(3)]
    assert sum(counts) == 1000 and all(abs(count - 333) < 75 for count in counts)  # 5 deviations
    assert places[:40] == positions(window, [True] * 4 + [False], 40)
    other = SlidingWindow(size=2, every=2, move="random", seed=4)
    assert positions(other, [True] * 4 + [False], 40) != places[:40]


def test_the_table_of_selections():
    kinds = {"all": AllSteps, "random_fraction": RandomFraction, "sliding_window": SlidingWindow}
    assert kinds == SELECTIONS
    assert [k.stochastic_window for k in SELECTIONS.values()] == [False, False, True]
