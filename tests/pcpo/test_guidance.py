"""Guidance: classifier-free and by implicit rewards."""

from __future__ import annotations

import pytest
import torch
from comfyui_pcpo.pcpo.guidance import classifier_free, implicit_reward
from torch.testing import assert_close

torch.set_num_threads(1)


def test_classifier_free_by_hand():
    conditional, unconditional = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    assert classifier_free(conditional, unconditional, 5.0).item() == 11.0  # 1 + 5 (3 - 1)
    assert classifier_free(conditional, unconditional, 0.0).item() == 1.0


def test_classifier_free_at_one_is_the_prompt_alone():
    conditional, unconditional = torch.randn(2, 3, 4).unbind()
    assert_close(classifier_free(conditional, unconditional, 1.0), conditional)


def test_implicit_reward_by_hand():
    reference, first, second = torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[5.0]])
    guided = implicit_reward(reference, [first, second], [0.5, 2.0])
    assert guided.item() == 9.5  # 1 + 0.5 (2 - 1) + 2 (5 - 1)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0, 1.7])
def test_implicit_reward_lies_on_the_line_through_both_networks(gamma):
    reference, tuned = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    expected = (1 - gamma) * reference + gamma * tuned
    assert_close(implicit_reward(reference, [tuned], [gamma]), expected)


def test_no_tuned_network_is_the_reference():
    reference = torch.randn(2, 3)
    assert torch.equal(implicit_reward(reference, [], []), reference)


def test_implicit_reward_refuses_unequal_numbers():
    with pytest.raises(ValueError, match="1 tuned predictions but 2 gammas"):
        implicit_reward(torch.zeros(1, 1), [torch.zeros(1, 1)], [1.0, 1.0])
