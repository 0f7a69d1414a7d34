"""PCPO Gamma Sweep without ComfyUI: its sheet, what it says, and what it refuses."""

from __future__ import annotations

import math

import comfy_api_fixture  # noqa: F401
import pytest
import torch
from comfyui_pcpo.nodes.compare import sweep
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.pcpo.pictures.contact_sheet import BEST
from PIL import ImageColor

NAN = math.nan


@pytest.mark.parametrize("text", ["", "a", "1,,b", "0, 11", "nan", ", ".join(["1"] * 13)])
def test_gammas_that_are_none_are_refused(text):
    with pytest.raises(NodeError, match="gammas is"):
        sweep.gammas_of(text)


def pictures(gammas: int, images: int) -> torch.Tensor:
    """Each of one grey, brighter from row to row."""
    grey = torch.arange(gammas * images).view(gammas, images, 1, 1, 1) * 10 + 20
    return grey.expand(gammas, images, 3, 16, 16).to(torch.uint8)


def test_a_row_for_each_gamma_and_the_best_mean_is_marked():
    pixels, prompts = pictures(3, 4), ["one", "one", "two", "two"]
    scores = torch.tensor([[0.1, 0.2, 0.3, NAN], [0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1]])
    (page,) = sweep.sheet(pixels, (0, 1, 1.5), scores, prompts)
    shown = (page * 255).round().to(torch.uint8)
    layout = sweep.Layout((256, 256), 4, 3)
    assert shown.shape == (layout.size[1], layout.size[0], 3)
    for row in range(3):
        for column in range(4):
            x, y = layout.corner(row, column)
            assert shown[y + 128, x + 128].tolist() == pixels[row, column, :, 0, 0].tolist()
    best = torch.tensor(ImageColor.getrgb(BEST))
    marked = (shown == best).all(-1).any(1).nonzero().flatten()
    top = layout.corner(1, 0)[1]
    assert len(marked) and top < marked.min() and marked.max() < top + 256


def test_it_says_which_gamma_is_best_and_nothing_where_none_is():
    means = sweep.means_of(torch.tensor([[0.25, 0.75], [0.5, NAN], [0.5, 1.0]]))
    assert means == [0.5, 0.5, 0.75]
    assert sweep.verdict((0, 0.5, 1), means, "scene", 2) == (
        "scene by gamma: 0: 0.500, 0.5: 0.500, 1: 0.750. Best of these is gamma 1."
    )
    assert sweep.best_of([0.5, 0.5]) is None and sweep.best_of([NAN, NAN]) is None
    assert sweep.verdict((0, 1), [], "", 4) == "2 gammas, 4 images each, from the same noise"
    assert "0.75" in sweep.table((0, 0.5), [0.5, 0.75])


def test_without_a_reward_the_sheet_has_no_numbers():
    plain = sweep.sheet(pictures(2, 2), (0, 1), None, ["a", "a"])
    scored = sweep.sheet(pictures(2, 2), (0, 1), torch.tensor([[0.1, 0.2], [0.3, 0.4]]), ["a", "a"])
    assert plain.shape == scored.shape and not plain.equal(scored)
