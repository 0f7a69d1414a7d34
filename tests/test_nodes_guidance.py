"""The rows of a guided batch, and what a LoRA adds to them; without ComfyUI."""

from __future__ import annotations

from types import SimpleNamespace

import comfy_api_fixture
import pytest
import torch
from comfyui_pcpo.nodes import guidance, irg_rows
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.irg_rows import RowAdapters, low_rank, rows_of
from torch import nn


def adapter(up, down, alpha=None, mid=None, dora=None, name="lora"):
    return SimpleNamespace(name=name, weights=(up, down, alpha, mid, dora, None))


class Model:
    """What the adapters ask of a MODEL."""

    def __init__(self, model, patches):
        self.model, self.patches = model, patches

    def is_clone(self, other):
        return self.model is other.model


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rows_follow_the_order_that_core_chose():
    owner = [None, None, 0, 0, 2, 2]
    assert rows_of([5, 0, 2, 1], owner, 12) == {2: [slice(0, 3)], 0: [slice(6, 9)]}
    assert rows_of([0, 1], owner, 2) == {}
    assert rows_of([3, 2], owner, 2) == {0: [slice(0, 1), slice(1, 2)]}


@pytest.mark.parametrize(
    ("layer", "up", "down", "inputs"),
    [
        (nn.Linear(6, 5), rand(5, 2), rand(2, 6), rand(4, 3, 6)),
        (
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            rand(4, 2, 1, 1),
            rand(2, 3, 3, 3),
            rand(4, 3, 8, 8),
        ),
        (nn.Conv2d(3, 4, 1), rand(4, 2), rand(2, 3), rand(4, 3, 8, 8)),
    ],
    ids=["linear", "convolution", "1x1 convolution of matrices"],
)
def test_addition_equals_merged_weights(layer, up, down, inputs):
    layer.double()
    delta = (0.7 * 8 / 2 * up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
    one = low_rank(0, layer, (0.7, adapter(up, down, alpha=8.0), 1.0, None, None))
    merged = {"weight": layer.weight + delta, "bias": layer.bias}
    expected = torch.func.functional_call(layer, merged, (inputs,)) - layer(inputs)
    torch.testing.assert_close(one(layer, inputs), expected)


def test_what_is_no_plain_lora_is_not_added():
    layer, up, down = nn.Linear(6, 5), rand(5, 2), rand(2, 6)
    plain = (1.0, adapter(up, down), 1.0, None, None)
    assert low_rank(0, layer, plain) is not None
    for patch in (
        (1.0, adapter(up, down, dora=rand(5)), 1.0, None, None),
        (1.0, adapter(up, down, mid=rand(2, 2)), 1.0, None, None),
        (1.0, adapter(up, down, name="lokr"), 1.0, None, None),
        (1.0, ("diff", (rand(5, 6),)), 1.0, None, None),
        (1.0, adapter(up, down), 0.5, None, None),
        (1.0, adapter(up, down), 1.0, (1, 0, 3), None),
    ):
        assert low_rank(0, layer, patch) is None
    assert low_rank(0, nn.LayerNorm(6), plain) is None


def test_each_row_has_its_own_version_and_the_layer_is_given_back():
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 9)).double()
    base = Model(network, {})
    parts = [(rand(6, 2, seed=i), rand(2, 6, seed=i + 9)) for i in range(2)]
    fused = adapter(rand(3, 2, seed=5), rand(2, 6, seed=6))
    tuned = [
        Model(network, {"0.weight": [(1.0, adapter(*parts[0]), 1.0, None, None)]}),
        Model(network, {"2.weight": [(0.5, fused, 1.0, (0, 3, 3), None)]}),
    ]
    rows = RowAdapters()
    for variant, model in enumerate(tuned):
        rows.add(variant, base, model)
    x = rand(5, 6, seed=3)
    expected = network(x).detach()
    first = nn.functional.linear(x, network[0].weight + parts[0][0] @ parts[0][1], network[0].bias)
    versions = network[2](first.relu()).detach()
    hidden = network[0](x).relu()
    second = expected.clone()
    second[:, 3:6] += 0.5 * (hidden @ fused.weights[1].T @ fused.weights[0].T).detach()
    rows.inject(base)
    with torch.no_grad():
        assert torch.equal(network(x), expected)  # no batch is told of: all rows are the base's
        with rows.batch({0: [slice(1, 2), slice(4, 5)], 1: [slice(2, 3)]}, 5):
            mixed = network(x)
    torch.testing.assert_close(mixed[[0, 3]], expected[[0, 3]])
    torch.testing.assert_close(mixed[[1, 4]], versions[[1, 4]])
    torch.testing.assert_close(mixed[2], second[2])
    rows.eject(base)
    assert "forward" not in network[0].__dict__ and torch.equal(network(x), expected)


def test_folded_batch_is_refused():
    network = nn.Sequential(nn.Linear(6, 6)).double()
    tuned = Model(network, {"0.weight": [(1.0, adapter(rand(6, 2), rand(2, 6)), 1.0, None, None)]})
    rows = RowAdapters()
    rows.add(0, Model(network, {}), tuned)
    rows.inject(tuned)
    with rows.batch({0: [slice(0, 1)]}, 4), pytest.raises(RuntimeError, match="2 rows in a batch"):
        network(rand(2, 6))


def test_extension_is_the_base_with_more():
    network, one, two = nn.Linear(2, 2), adapter(None, None), adapter(None, None)
    base = Model(network, {"weight": [(1.0, one, 1.0, None, None)]})
    more = Model(network, {"weight": [*base.patches["weight"], (1.0, two, 1.0, None, None)]})
    assert irg_rows.is_extension(base, more) and irg_rows.is_extension(base, base)
    assert [len(found) for _, found in irg_rows.extra_patches(base, more)] == [1]
    other = Model(network, {"weight": [(1.0, two, 1.0, None, None)]})
    stronger = Model(network, {"weight": [(0.5, one, 1.0, None, None)]})
    for model in (other, stronger, Model(network, {}), Model(nn.Linear(2, 2), more.patches)):
        assert not irg_rows.is_extension(base, model)


def test_nodes_refuse_what_cannot_be(monkeypatch):
    guider, tuned = guidance.PCPOImplicitRewardGuider, guidance.PCPOTunedModel
    with pytest.raises(NodeError, match=r"end is 0\.2 and start 0\.5"):
        comfy_api_fixture.run(tuned, model=None, start=0.5, end=0.2)
    fake = SimpleNamespace(ImplicitRewardGuider=None, Tuned=None)
    monkeypatch.setitem(__import__("sys").modules, "comfyui_pcpo.nodes.irg", fake)
    monkeypatch.setattr("comfyui_pcpo.nodes.irg", fake, raising=False)
    base = SimpleNamespace(model=nn.Linear(1, 1))
    with pytest.raises(NodeError, match="cfg is 4, which needs a negative prompt"):
        comfy_api_fixture.run(guider, base=base, positive=[], cfg=4.0, tuned={})
    other = {"tuned_0": SimpleNamespace(model=SimpleNamespace(model=nn.ReLU()))}
    with pytest.raises(NodeError, match="tuned model 1 is a ReLU and the base a Linear"):
        comfy_api_fixture.run(guider, base=base, positive=[], cfg=1.0, tuned=other)
