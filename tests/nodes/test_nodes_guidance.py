"""The rows of a guided batch, and what a LoRA adds to them; without ComfyUI."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import comfy_api_fixture
import pytest
import torch
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.guidance import lora_notes
from comfyui_pcpo.nodes.guidance import nodes as guidance
from comfyui_pcpo.nodes.guidance import rows as irg_rows
from comfyui_pcpo.nodes.guidance.layers import Difference, low_rank
from comfyui_pcpo.nodes.guidance.rows import RowAdapters, obstacle, shared_patches
from comfyui_pcpo.pcpo.row_lora import Batch, StackedLora, stretches
from torch import nn


def adapter(up, down, alpha=None, mid=None, dora=None, reshape=None, name="lora"):
    return SimpleNamespace(name=name, weights=(up, down, alpha, mid, dora, reshape))


def plain(up, down):
    """A patch of a ModelPatcher."""
    return (1.0, adapter(up, down), 1.0, None, None)


class Model:
    """What the adapters ask of a MODEL."""

    load_device = torch.device("cpu")

    def __init__(self, model, patches, injections=(), free=1e9):
        self.model, self.patches, self.free = model, patches, free
        self.injections = dict.fromkeys(injections)

    def is_clone(self, other):
        return self.model is other.model

    def get_free_memory(self, device):
        return self.free


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    found = torch.zeros_like(expected)
    StackedLora.of(layer, [one])(layer, inputs, found, Batch((0,), len(inputs)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("part", ["weight", "bias", "both"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (4, 3, 6)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 4, 8, 8)),
        (nn.GroupNorm(2, 4), (4, 4, 8, 8)),
        (nn.LayerNorm(6), (4, 3, 6)),
    ],
    ids=["linear", "convolution", "group norm", "layer norm"],
)
def test_difference_equals_other_parameters(layer, shape, part):
    layer.double()
    inputs = rand(*shape)
    own = {name: value.detach() for name, value in layer.named_parameters()}
    other = {
        name: value + rand(*value.shape, seed=7) if part in (name, "both") else value
        for name, value in own.items()
    }
    changed = {n: other[n] - own[n] for n in own if part in (n, "both")}
    found = layer(inputs).detach()
    Difference(0, **changed)(layer, inputs, found, Batch((0, 0), len(inputs) // 2))
    torch.testing.assert_close(found, torch.func.functional_call(layer, other, (inputs,)))


def test_what_is_no_plain_lora_is_not_added():
    layer, up, down = nn.Linear(6, 5), rand(5, 2), rand(2, 6)
    assert low_rank(0, layer, plain(up, down)) is not None
    for patch in (
        (1.0, adapter(up, down, dora=rand(5)), 1.0, None, None),
        (1.0, adapter(up, down, mid=rand(2, 2)), 1.0, None, None),
        (1.0, adapter(up, down, reshape=[5, 9]), 1.0, None, None),
        (1.0, adapter(up, down, name="lokr"), 1.0, None, None),
        (1.0, ("diff", (rand(5, 6),)), 1.0, None, None),
        (1.0, adapter(up, down), 0.5, None, None),
        (1.0, adapter(up, down), 1.0, (1, 0, 3), None),
        (1.0, adapter(up, down), 1.0, (0, 0, 3), None),
        plain(up, rand(2, 7)),
    ):
        assert low_rank(0, layer, patch) is None
    assert low_rank(0, nn.LayerNorm(6), plain(up, down)) is None


def test_each_row_has_its_own_difference(monkeypatch):
    network = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)).double()
    values = {"0.weight": rand(5, 6, seed=1), "0.bias": rand(5, seed=2), "1.bias": rand(5, seed=3)}
    monkeypatch.setattr(irg_rows, "difference", lambda patcher, key, *patches: values[key])
    rows = RowAdapters({})
    rows.add(1, network, {k: [(1.0, ("diff", (v,)), 1.0, None, None)] for k, v in values.items()})
    changed = {key: p.detach() + values.get(key, 0) for key, p in network.named_parameters()}
    x = rand(3, 6)
    first, other = network(x).detach(), torch.func.functional_call(network, changed, (x,)).detach()
    rows.inject(Model(network, {}))
    with rows.on(Batch((None, 1, 1), 1)), torch.no_grad():
        torch.testing.assert_close(network(x), torch.cat([first[:1], other[1:]]))


@pytest.mark.parametrize("free", [1e9, 0], ids=["kept", "brought each time"])
def test_each_row_has_its_own_version_and_the_layer_is_given_back(free):
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 9)).double()
    base = Model(network, {}, free=free)
    parts = [(rand(6, 2, seed=i), rand(2, 6, seed=i + 9)) for i in range(2)]
    fused = adapter(rand(3, 2, seed=5), rand(2, 6, seed=6))
    patches = [
        {"0.weight": [plain(*parts[0])]},
        {"2.weight": [(0.5, fused, 1.0, (0, 3, 3), None)]},
    ]
    rows = RowAdapters({})
    for variant, one in enumerate(patches):
        rows.add(variant, network, one)
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
        with rows.on(Batch((None, 0, 1, None, 0), 1)):
            mixed = network(x)
    torch.testing.assert_close(mixed[[0, 3]], expected[[0, 3]])
    torch.testing.assert_close(mixed[[1, 4]], versions[[1, 4]])
    torch.testing.assert_close(mixed[2], second[2])
    rows.eject(base)
    assert rows.keeps == bool(free)
    assert "forward" not in network[0].__dict__ and torch.equal(network(x), expected)


def test_stacks_are_in_core_s_order_of_a_batch():
    network = nn.Sequential(nn.Linear(6, 6)).double()
    rows = RowAdapters({})
    for variant in (None, 0, 1, 2):
        rows.add(variant, network, {"0.weight": [plain(rand(6, 2), rand(2, 6))]})
    (stack,) = rows._additions(Model(network, {}))["0"]
    assert stretches((2, 2, 1, 1, 0, 0, None, None), stack.variants)[0].slots == (0, 1, 2, 3)


def test_folded_batch_is_refused():
    network = nn.Sequential(nn.Linear(6, 6)).double()
    rows = RowAdapters({})
    rows.add(0, network, {"0.weight": [plain(rand(6, 2), rand(2, 6))]})
    rows.inject(Model(network, {}))
    with rows.on(Batch((0, None), 2)), pytest.raises(RuntimeError, match="2 rows in a batch"):
        network(rand(2, 6))


def test_versions_share_what_all_of_them_do_first():
    one, two, three = (plain(rand(2, 1, seed=i), rand(1, 2)) for i in range(3))
    base = {"weight": [one, two], "bias": [three]}
    assert shared_patches(base, {**base, "other": [one]}) == base
    assert shared_patches(base, {"weight": [one, three], "bias": [one]}) == {"weight": [one]}
    assert shared_patches(base, {"weight": [two, one]}) == {}


def test_what_a_version_lacks_of_the_base_is_the_rows_of_the_base():
    network = nn.Sequential(nn.Linear(6, 6)).double()
    patches = [{"0.weight": [plain(rand(6, 2, seed=i), rand(2, 6, seed=9))]} for i in range(2)]
    rows = RowAdapters(shared_patches(*patches))
    for variant, one in zip((None, 0), patches, strict=True):
        rows.add(variant, network, one)
    x = rand(2, 6, seed=3)
    expected = network(x).detach()
    for row, one in enumerate(patches):
        up, down = one["0.weight"][0][1].weights[:2]
        expected[row] += x[row] @ down.T @ up.T
    rows.inject(Model(network, {}))
    with rows.on(Batch((None, 0), 1)), torch.no_grad():
        torch.testing.assert_close(network(x), expected)


def test_what_keeps_a_version_out_of_the_batch():
    network = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
    patch = plain(rand(2, 1), rand(1, 2))
    base = Model(network, {"0.weight": [patch]})
    assert obstacle(base, Model(network, {"0.weight": [patch, patch]})) is None
    assert obstacle(base, Model(network, {})) is None
    resized = (1.0, adapter(rand(2, 1), rand(1, 2), reshape=[2, 4]), 1.0, None, None)
    padded = (1.0, ("diff", (rand(2, 4), {"pad_weight": True})), 1.0, None, None)
    for tuned, reason in (
        (Model(nn.Linear(2, 2), {}), "is of another file"),
        (Model(network, base.patches, ["bypass_lora"]), "something else than weights"),
        (Model(network, base.patches | {"1.weight": [patch]}), "1.weight, which is of no linear"),
        (Model(network, {"0.weight": [patch, resized]}), "size of 0.weight"),
        (Model(network, {"0.weight": [patch, padded]}), "size of 0.weight"),
    ):
        assert reason in obstacle(base, tuned)


def test_nodes_refuse_what_cannot_be(monkeypatch):
    guider, tuned = guidance.PCPOImplicitRewardGuider, guidance.PCPOTunedModel
    with pytest.raises(NodeError, match=r"end is 0\.2 and start 0\.5"):
        comfy_api_fixture.run(tuned, model=None, start=0.5, end=0.2)
    fake = SimpleNamespace(ImplicitRewardGuider=None, Tuned=None)
    monkeypatch.setitem(__import__("sys").modules, "comfyui_pcpo.nodes.guidance.guider", fake)
    monkeypatch.setattr("comfyui_pcpo.nodes.guidance.guider", fake, raising=False)
    base = SimpleNamespace(model=nn.Linear(1, 1))
    with pytest.raises(NodeError, match="cfg is 4, which needs a negative prompt"):
        comfy_api_fixture.run(guider, base=base, positive=[], cfg=4.0, tuned={})
    other = {"tuned_0": SimpleNamespace(model=SimpleNamespace(model=nn.ReLU()))}
    with pytest.raises(NodeError, match="tuned model 1 is a ReLU and the base a Linear"):
        comfy_api_fixture.run(guider, base=base, positive=[], cfg=1.0, tuned=other)


def test_what_of_a_lora_does_not_count_is_said():
    log = logging.getLogger("comfy")
    with lora_notes.left_out() as keys:
        for key in (
            "lora_te_x.alpha",
            "text_encoders.clip_l.y.lora_up.weight",
            "lora_unet_z.alpha",
        ):
            log.warning("lora key not loaded: %s", key)
        log.warning("something else")
    log.warning("lora key not loaded: later")
    text, other = lora_notes.notes_on({}, {}, keys)
    assert "the text encoder (2 tensors), which is left out here: load it with Load LoRA" in text
    assert "1 tensors that fit nothing" in other and "lora_unet_z.alpha" in other


STATED = {"unet.r": 4, "unet.lora_alpha": 4, "unet.use_rslora": True}


@pytest.mark.parametrize(
    ("noted", "is_said"),
    [
        (STATED, True),
        (STATED | {"unet.use_rslora": False}, False),
        (STATED | {"unet.use_rslora": False, "unet.lora_alpha": 8}, True),
        (STATED | {"unet.use_rslora": False, "unet.alpha_pattern": {"to_q": 2}}, True),
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": 9}, False),
        ([], False),
    ],
)
def test_a_scale_that_comfyui_does_not_read_is_said(noted, is_said):
    metadata = {"lora_adapter_metadata": json.dumps(noted)}
    notes = lora_notes.notes_on({"x.lora_A.weight": None}, metadata, [])
    assert [note.startswith("states its scale") for note in notes] == [True] * is_said
    assert not lora_notes.notes_on({"x.alpha": None}, metadata, [])
    assert not lora_notes.notes_on({}, {"lora_adapter_metadata": "{"}, [])
