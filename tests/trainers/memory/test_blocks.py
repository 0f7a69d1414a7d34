"""Blocks that wait in main memory: the same bytes, room for two, and copies ahead of their use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures import flux_fixture, klein_fixture, sd3_fixture, zimage_fixture
from comfyui_pcpo.tests.fixtures.sd1_fixture import write_folder as write_sd1
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import ConfigError, TrainConfig, read_preset
from comfyui_pcpo.trainers.estimate.fit import CARDS, refusal, seconds
from comfyui_pcpo.trainers.estimate.memory import estimate
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.families.registry import FAMILIES
from comfyui_pcpo.trainers.families.text.header import LAYERS, SIZES
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.job.preflight import preflight
from comfyui_pcpo.trainers.lora import adapters
from comfyui_pcpo.trainers.memory.blocks import BlockSwap, swap_blocks, swap_encoders
from comfyui_pcpo.trainers.memory.low_bit import pack_base
from transformers import Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

CPU = torch.device("cpu")
FIXTURES = {
    "sd3": sd3_fixture,
    "flux": flux_fixture,
    "zimage": zimage_fixture,
    "klein": klein_fixture,
}


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    return {name: fixture.write_folder(made / name) for name, fixture in FIXTURES.items()}


def network_of(folder: Path, *, base: str, again: bool, dtype: torch.dtype) -> tuple[Any, Any]:
    """A family with adapters that are far from nothing, its base packed if that is wanted."""
    family = load_family(folder, dtype=dtype)
    adapters.add_lora(family.network, 2, 2.0, family.lora_targets, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, layer in adapters.adapters(family.network):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1, generator=generator)
    if base != "same":
        pack_base(family.network, base, CPU, waits=True)
    family.set_gradient_checkpointing(again)
    parameters = [p for p in family.network.parameters() if p.requires_grad]
    return family, parameters


def passes(family: Any, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Predictions and gradients of two passes, with a pass without gradients between them."""
    embeds = family.encode(["a cat", "a red circle and a longer prompt"])
    shape = family.latent_shape(64, 96)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    found = []
    for sigma in (0.8, 0.3):
        out = family.predict(x, torch.tensor(sigma), embeds)
        grads = torch.autograd.grad(out.square().mean(), parameters, allow_unused=True)
        with torch.no_grad():
            found += [out.detach(), family.predict(x, torch.tensor(0.5), embeds)]
        found += [grad for grad in grads if grad is not None]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("base", "again"), [("same", False), ("same", True), ("fp8", False)])
@pytest.mark.parametrize("name", FIXTURES)
def test_predictions_and_gradients_are_the_same_bytes(folders, name, base, again, dtype):
    about = {"base": base, "again": again, "dtype": dtype}
    plain = passes(*network_of(folders[name], **about))
    family, parameters = network_of(folders[name], **about)
    assert swap_blocks(family.network, CPU) is not None
    swapped = passes(family, parameters)
    assert len(plain) == len(swapped) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, swapped, strict=True))


@pytest.mark.parametrize("name", FIXTURES)
def test_there_is_room_for_two_blocks(folders, name):
    family, _ = network_of(folders[name], base="same", again=False, dtype=torch.float32)
    repeated = FAMILIES[name].blocks
    blocks = [m for m in family.network.modules() if type(m).__name__ in repeated]
    frozen = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
    largest = max(sum(p.nbytes for p in parameters) for parameters in frozen)
    swap = swap_blocks(family.network, CPU)
    storages = [p.untyped_storage() for parameters in frozen for p in parameters]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert len(sizes) == 2 and sum(sizes.values()) == swap.device_bytes
    assert 2 * largest <= swap.device_bytes < 2.2 * largest


@pytest.mark.parametrize("name", ["sd3", "flux", "zimage", "klein"])
def test_text_encoders_give_the_same_bytes(folders, name):
    prompts = ["a cat", "a red circle left of a blue square"]
    plain, swapped = (load_family(folders[name], parts="text") for _ in range(2))
    swap_encoders(swapped, CPU)
    swapped.place(CPU, text_alone=True)
    large = swapped.text_modules[-1]
    hooked = [module for module in large.modules() if module._forward_pre_hooks]
    assert len(hooked) > 1
    a, b = (family.encode(prompts) for family in (plain, swapped))
    assert torch.equal(a.tokens, b.tokens)
    assert a.pooled is None or torch.equal(a.pooled, b.pooled)


def test_the_sizes_of_layers_are_the_published_ones():
    sizes = {"num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(d_model=4096, d_kv=64, d_ff=10240, **sizes))
        config = Qwen3Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36)
        config.num_key_value_heads = 8
        qwen = Qwen3Model(config)
        qwen.norm = torch.nn.Identity()  # which is never read
    for kind, network, layers in (("t5", t5, t5.encoder.block), ("qwen3_4b", qwen, qwen.layers)):
        whole = sum(p.numel() for p in network.parameters())
        each = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        assert whole in (SIZES[kind], SIZES[kind] - 2560)
        # T5's first layer has the table of positions, too
        assert LAYERS[kind] == (whole - sum(each[1:]) - each[-1], each[-1])


def test_each_block_is_copied_once_a_pass_and_ahead_of_its_use(folders, monkeypatch):
    copied = []
    plain = BlockSwap._copy

    def watched(swap, place, *, is_ahead=False):
        copied.append((place, is_ahead))
        plain(swap, place, is_ahead=is_ahead)

    monkeypatch.setattr(BlockSwap, "_copy", watched)
    network = zimage_fixture.tiny_transformer(n_layers=6).eval().requires_grad_(False)
    swap = swap_blocks(network, CPU)
    count = len(swap._hosts)
    order = [*range(count)]
    for _ in range(2):  # learned in the first
        copied.clear()
        for place in [*order, *reversed(order)]:  # forward and backward
            swap.bring(place)
    assert len(copied) == 2 * count - 4  # two are there at each turn
    assert all(is_ahead for _, is_ahead in copied)


SMALL = """
rewards = { jpeg_incompressibility = 1.0 }
model = { width = 64, height = 64 }
sampler = { transition = "flow_sde", noise_level = 0.7, steps = 3, drop_last = 1 }
advantage = { kind = "group" }
prompts = { per_iteration = 2, images_per_prompt = 2 }
optimizer = { lr = 1e-2 }
run = { iterations = 2, micro_batch = 2, save_every = 1, eval_prompts = 1, eval_steps = 2 }
"""


def train(model: Path, root: Path, *options: str) -> JobFolder:
    prompts, config = root.with_suffix(".txt"), root.with_suffix(".toml")
    prompts.write_text("a cat\na dog\na red circle left of a blue square\n", encoding="utf-8")
    config.write_text(SMALL, encoding="utf-8")
    files = ["--model.source", str(model), "--prompts.source", str(prompts), "--out", str(root)]
    assert main(["train", str(config), *files, *options]) == 0
    return JobFolder(root)


@pytest.mark.parametrize("update", ["two_pass", "one_pass"])
@pytest.mark.parametrize("name", ["zimage", "klein"])
def test_a_run_exports_the_same_bytes(folders, tmp_path, name, update):
    options = ("--method.update", update, "--method.kl-weight", "0.01")
    options += ("--model.gradient-checkpointing",) if update == "two_pass" else ()
    runs = {
        choice: train(folders[name], tmp_path / choice, *options, "--model.offload", choice)
        for choice in ("never", "blocks")
    }
    plain, swapped = (runs[choice].last_export().read_bytes() for choice in ("never", "blocks"))
    assert plain == swapped
    line = runs["blocks"].metrics()[-1]
    assert line["log_ratio_max_on_policy"] == 0 and line["grad_norm"] > 0


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        ("trainable", {"kind": "full"}, "model.offload is 'blocks', whose blocks are frozen"),
        ("model", {"compile": True, "offload": "blocks"}, "model.compile is true, but model.off"),
    ],
)
def test_what_blocks_cannot_be_is_refused(section, value, said):
    values: dict[str, Any] = {"model": {"offload": "blocks"}, section: value}
    with pytest.raises(ValueError, match=said):
        TrainConfig.model_validate(values)


def test_a_family_without_such_blocks_is_refused(tmp_path):
    source = str(write_sd1(tmp_path / "sd1"))
    config = TrainConfig.model_validate({"model": {"source": source, "offload": "blocks"}})
    with pytest.raises(ConfigError, match=r"model\.offload is 'blocks', which is for SD3\.5"):
        preflight(config)


@pytest.mark.parametrize("preset", ["zimage-16gb", "klein-16gb", "flux-24gb", "sd35-16gb"])
def test_the_estimate_counts_two_blocks_and_the_copies(preset):
    values = read_preset(preset).model_dump(mode="json")
    before = estimate(values, card=16 * 2.0**30)
    values["model"]["offload"] = "blocks"
    after = estimate(values, card=16 * 2.0**30)
    network = before.network
    assert 0.9 * network.weights < network.blocks < network.weights
    parts = [e.stages[2].parts for e in (before, after)]
    each = 1 if values["model"]["base"] == "fp8" else 2
    assert parts[1]["two blocks"] == pytest.approx(2 * each * network.block, rel=0.2)
    assert parts[1]["network"] < 0.15 * parts[0]["network"]
    assert after.copied > 0 == before.copied
    assert seconds(after, CARDS[0]) >= seconds(before, CARDS[0])


def test_a_card_that_is_too_small_is_told_of_blocks():
    values, card = read_preset("flux-24gb").model_dump(mode="json"), 4 * 2.0**30
    said = refusal(values, estimate(values, card=card), card)
    assert said is not None and "it fits with" in said and "--model.offload blocks" in said
