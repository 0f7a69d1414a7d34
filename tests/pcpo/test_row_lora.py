"""LoRAs of several versions on one batch: equal to a layer of merged weights for each row."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from comfyui_pcpo.pcpo.row_lora import Batch, LowRank, StackedLora, stretches
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

OWNERS = st.lists(st.sampled_from([None, 0, 1, 2, 3]), min_size=1, max_size=9)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loras(layer, ranks, first=0, count=None):
    """A LoRA a variant, each of a rank and a scale of its own."""
    out = layer.weight.shape[0] if count is None else count
    inner = layer.weight.shape[1:]
    return [
        LowRank(v, rand(out, r, seed=v), rand(r, *inner, seed=v + 9), 0.5 + v, first, count)
        for v, r in ranks.items()
    ]


def merged(layer, x, owners, additions):
    """Each row by a layer whose weight has the LoRAs of its owner in it."""
    rows = []
    for row, owner in zip(x, owners, strict=True):
        weight = layer.weight.detach().clone()
        for one in additions:
            if one.variant == owner:
                last = None if one.count is None else one.first + one.count
                delta = one.scale * one.up.flatten(1) @ one.down.flatten(1)
                weight[one.first : last] += delta.view_as(weight[one.first : last])
        values = {"weight": weight, "bias": layer.bias}
        rows.append(torch.func.functional_call(layer, values, (row[None],))[0])
    return torch.stack(rows).detach()


LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 6)),
    "linear of vectors": (nn.Linear(6, 5), (6,)),
    "convolution": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 8, 8)),
    "1x1 convolution": (nn.Conv2d(4, 6, 1), (4, 4, 4)),
}


@pytest.mark.parametrize("is_strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_row_has_the_lora_of_its_owner(kind, is_strided):
    layer, shape = LAYERS[kind]
    layer.double()
    additions = loras(layer, {3: 1, 2: 4, 0: 2}) + loras(layer, {2: 3})[:1]
    stack = StackedLora.of(layer, additions)
    for owners in [(3, 2, 0), (0, 0, 2, 2, 3, 3, None, None), (2, None, 0, 3, 1, 3, 3), (None,)]:
        batch = Batch(owners, 2)
        x = rand(len(batch), *shape)
        y = layer(x).detach()
        if is_strided:
            x, y = (t.mT.contiguous().mT for t in (x, y))
        stack(layer, x, y, batch)
        expected = merged(layer, x, [o for o in owners for _ in range(2)], additions)
        torch.testing.assert_close(y, expected)


def test_part_of_a_fused_layer():
    layer = nn.Linear(6, 9).double()
    additions = loras(layer, {1: 2, 0: 3}, first=3, count=4)
    x, owners = rand(3, 2, 6), (0, None, 1)
    y = layer(x).detach()
    StackedLora.of(layer, additions)(layer, x, y, Batch(owners, 1))
    torch.testing.assert_close(y, merged(layer, x, owners, additions))


def test_in_another_precision_than_the_layer_s_output():
    layer = nn.Linear(6, 5).double()
    additions = loras(layer, {0: 2})
    x = rand(2, 3, 6)
    y = layer(x).detach()
    expected = merged(layer, x, (0, 0), additions)
    StackedLora.of(layer, additions).like(y)(layer, x.float(), y, Batch((0,), 2))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


class Counted(TorchDispatchMode):
    """What torch computes, by the operation's name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_work_of_a_layer_is_one_product_for_all_versions(kind):
    layer, shape = LAYERS[kind]
    layer.double()
    found = []
    for count in (2, 5):
        owners = (*(v for v in reversed(range(count)) for _ in range(2)), None, None)
        stack = StackedLora.of(layer, loras(layer, dict.fromkeys(reversed(range(count)), 2)))
        x = rand(len(owners), *shape)
        y = layer(x).detach()
        with Counted() as counted:
            stack(layer, x, y, Batch(owners, 1))
        found.append(counted.calls)
    assert found[0] == found[1]
    assert found[1]["baddbmm_"] == 1
    assert found[1]["bmm"] + found[1]["convolution"] == 1


@given(OWNERS, st.permutations([None, 0, 1, 2]), st.integers(1, 4), st.integers(1, 3))
def test_stretches_are_the_rows_of_their_owners(owners, places, count, size):
    variants, batch = tuple(places[:count]), Batch(tuple(owners), size)
    told: list[int | str | None] = ["nobody"] * len(batch)
    for slots, rows in batch.parts(variants):
        part = (rows.stop - rows.start) // len(slots)
        assert part * len(slots) == rows.stop - rows.start
        for place, slot in enumerate(slots):
            start = rows.start + place * part
            told[start : start + part] = [variants[slot]] * part
    each = [owner for owner in owners for _ in range(size)]
    assert told == [owner if owner in variants else "nobody" for owner in each]
    for variant in variants:
        rows = [i for part in batch.rows(variant) for i in range(part.start, part.stop)]
        assert rows == [i for i, owner in enumerate(each) if owner == variant]
    assert batch.holds(variants) == any(owner in variants for owner in owners)


def test_core_s_order_is_one_stretch():
    assert len(stretches((2, 2, 1, 1, 0, 0, None, None), (2, 1, 0))) == 1
    assert len(stretches((2, 1, 0, None, None), (2, 1, 0))) == 1


DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_is_applied_in_float32_whatever_the_file_s_dtype(dtype):
    """Two LoRAs of one version, each of a dtype of its own: ComfyUI casts them to float32 first."""
    layer, x, owners = nn.Linear(6, 5), rand(2, 3, 6).float(), (None, 0)
    first, second = loras(layer, {0: 4}) + loras(layer, {0: 2})
    stored = [(first, dtype), (second, torch.float32)]
    files = [replace(o, up=o.up.to(d), down=o.down.to(d), scale=0.37) for o, d in stored]
    exact = [replace(o, up=o.up.float(), down=o.down.float()) for o in files]
    y = layer(x).detach()
    stack = StackedLora.of(layer, files).like(x)
    stack(layer, x, y, Batch(owners, 1))
    torch.testing.assert_close(y, merged(layer, x, owners, exact), rtol=1e-5, atol=1e-5)
