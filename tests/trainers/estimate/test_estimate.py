"""What a run takes: counted figures against measured ones, the table, refusals and remedies."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from comfyui_pcpo.tests.fixtures import sd3_fixture
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config import train_config as c
from comfyui_pcpo.trainers.estimate import count, count_networks
from comfyui_pcpo.trainers.estimate.fit import GIB, apply_changes, refusal, remedies, seconds
from comfyui_pcpo.trainers.estimate.memory import estimate, paths_per_image
from comfyui_pcpo.trainers.estimate.network_costs import network_for, networks
from torch import nn

KINDS = count_networks.network_kinds()


def values_of(preset="sd35-16gb", **changes):
    found = c.read_preset(preset).model_dump(mode="json")
    return apply_changes(found, [(*name.split("_", 1), value) for name, value in changes.items()])


# --- counting ------------------------------------------------------------------------------------


def test_arithmetic_and_memory_of_a_layer_by_hand():
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    with count.shapes_alone():
        count.without_memory(network)

        def call(net):
            return net(torch.empty(10, 64))

        forward = count.cost(network, call, torch.float32, backward=False)
        both = count.cost(network, call, torch.float32, backward=True)
    products = 2 * 10 * (64 * 128 + 128 * 32)
    assert forward.flop == products
    assert both.flop == 3 * products - 2 * 10 * 64 * 128  # the input has no gradient
    # the input, and both sides of the ReLU or the second layer's output
    assert forward.peak == 4 * 10 * (64 + 128 + 128)
    assert both.peak >= 4 * 10 * (64 + 128 + 32)


def test_attention_is_counted_without_the_matrix_of_all_pairs():
    with count.shapes_alone():
        q = torch.empty(2, 4, 1000, 16, requires_grad=True)

        class Net(nn.Module):
            def forward(self, x):
                return nn.functional.scaled_dot_product_attention(x, x, x)

        forward = count.cost(Net(), lambda net: net(q), torch.float32, backward=False)
        both = count.cost(Net(), lambda net: net(q), torch.float32, backward=True)
    assert forward.flop == 4 * 2 * 4 * 1000 * 1000 * 16
    assert both.flop == 3.5 * forward.flop
    assert both.peak < 8 * q.nbytes  # the matrix alone is 62


def test_what_is_counted_without_memory_is_what_a_real_run_takes():
    """The same passes on real tensors: arithmetic equal, memory by torch's own hooks."""
    kind = KINDS["tiny-flow"]
    kind = replace(kind, config=kind.config | {"num_layers": 8})
    for is_again in (False, True):
        mode = count_networks.Mode("lora", False, is_again)
        counted = count_networks.count_pass(kind, (), mode, 8)
        network = count_networks.network_of(kind, (), mode)
        real = network.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*real.parameters(), *real.buffers()):
                tensor.normal_(0, 0.02)
        held: dict[int, torch.Tensor] = {}
        own = {p.untyped_storage().data_ptr() for p in real.parameters()}

        def pack(tensor, held=held, own=own):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kind.countable.call(real, 1, 8, kind.text).sum()
        saved = sum(t.untyped_storage().nbytes() for t in held.values())
        if not is_again:  # what is kept is most of the peak; the rest passes through
            assert saved <= counted.peak <= 1.5 * saved
            whole = counted.peak
        else:
            assert counted.peak < 0.75 * whole


@pytest.mark.parametrize("name", KINDS)
def test_the_table_is_what_is_counted(name):
    kind, entry = KINDS[name], networks()[name]
    sizes = count_networks.sizes_of(kind)
    assert sizes == {key: getattr(entry, key) for key in sizes}
    n = kind.sides[0] ** 2
    for mode, flop, memory in (
        (count_networks.Mode("", True), entry.forward, "rollout_half"),
        (count_networks.Mode("lora", True, True), None, "lora_half_again"),
    ):
        found = count_networks.count_full_depth(kind, mode, kind.sides[0])
        known = sum(x * n**i for i, x in enumerate(entry.memory[memory]))
        assert found.peak == pytest.approx(known, rel=1e-3)
        if flop is not None:
            assert found.flop == pytest.approx(sum(x * n**i for i, x in enumerate(flop)), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD3.5-M", "FLUX.1-dev"])
def test_few_blocks_tell_what_all_of_them_take(name):
    kind, mode = KINDS[name], count_networks.Mode("lora", True, True)
    told = count_networks.count_full_depth(kind, mode, 32)
    found = count_networks.count_pass(kind, kind.depth, mode, 32)
    assert told.flop == pytest.approx(found.flop, rel=1e-6)
    assert told.peak == pytest.approx(found.peak, rel=0.01)


def test_published_numbers_of_weights():
    found = networks()
    assert found["SD1.5"].weights == 859_520_964
    # without the table of positions, which is no parameter
    assert found["SD3.5-M"].weights == sd3_fixture.PARAMETERS["sd3.5-m"]
    assert found["FLUX.1-dev"].weights == 11_901_408_320
    assert found["FLUX.1-dev"].packable > 0.97 * found["FLUX.1-dev"].weights
    unet = 8.03e11  # a forward pass of SD1.5 at 512 px, counted before by hand
    assert sum(x * 1024**i for i, x in enumerate(found["SD1.5"].forward)) == pytest.approx(
        unet, rel=0.03
    )


# --- the estimate --------------------------------------------------------------------------------


def memory(card=None, **changes):
    found = estimate(values_of(**changes), card=card)
    return {stage.name: stage.total / GIB for stage in found.stages}


def test_branches_that_are_trained_apart_are_sampled_together():
    joint, apart = (memory(sampler_guidance_gradient=way) for way in ("both", "conditional"))
    assert apart["rollout"] == joint["rollout"]
    compiled = memory(sampler_guidance_gradient="conditional", model_compile=True)
    assert compiled["rollout"] < apart["rollout"]


@pytest.mark.parametrize(
    ("stage", "less", "more"),
    [
        ("update", {"model_gradient_checkpointing": True}, {"model_gradient_checkpointing": False}),
        ("rollout", {"model_base": "fp8"}, {"model_base": "same"}),
        ("rollout", {"model_base": "nf4"}, {"model_base": "int8"}),
        ("update", {"run_micro_batch": 1}, {"run_micro_batch": 2}),
        ("update", {"model_width": 512}, {"model_width": 768}),
        ("decode", {"model_width": 512}, {"model_width": 768}),
        ("update", {"trainable_rank": 32}, {"trainable_rank": 128}),
        ("update", {"optimizer_kind": "adamw8bit"}, {"optimizer_kind": "adamw"}),
        (
            "update",
            {"sampler_guidance_gradient": "conditional"},
            {"sampler_guidance_gradient": "both"},
        ),
        ("rollout", {"run_store_on": "cpu"}, {"run_store_on": "device"}),
        ("rollout", {"run_storage": "float16"}, {"run_storage": "float32"}),
        ("reward", {"model_offload": "always"}, {"model_offload": "never"}),
        ("reward", {"trainable_ema_decay": 0.0}, {"trainable_ema_decay": 0.9}),
        ("encode", {"model_precision": "bfloat16"}, {"model_precision": "float32"}),
    ],
)
def test_memory_grows_with(stage, less, more):
    common = {"run_store_on": "device"} if "run_storage" in less else {}
    assert memory(**common, **less)[stage] < memory(**common, **more)[stage]


def test_a_small_card_keeps_less_on_it():
    small, large = memory(card=16 * GIB), memory(card=80 * GIB)
    assert small["reward"] < large["reward"] and small["update"] < large["update"]
    assert small["decode"] < large["decode"]  # the trajectories, if not the autoencoder


def test_time_grows_with_packing_and_with_the_kl():
    from comfyui_pcpo.trainers.estimate.fit import CARDS

    plain, packed = (estimate(values_of(model_base=base)) for base in ("same", "fp8"))
    assert packed.flop == plain.flop and seconds(packed, CARDS[0]) > seconds(plain, CARDS[0])
    assert estimate(values_of(method_kl_weight=0.1)).flop > plain.flop


def test_one_pass_saves_a_forward_pass_and_keeps_gradients_by_image():
    shared = {"advantage_global_std": False, "method_kl_weight": 0.0}
    one, two = (
        estimate(values_of(method_update=way, optimizer_updates=1, **shared), card=80 * GIB)
        for way in ("one_pass", "two_pass")
    )
    assert one.work["rollout"] == two.work["rollout"]
    steps = {"sampler_steps": 3, "sampler_drop_last": 2, "sampler_guidance_scale": 1.0, **shared}
    once, twice = (
        estimate(values_of(method_update=way, **steps)) for way in ("one_pass", "two_pass")
    )
    forward = once.work["rollout"] / 3  # of one step, the trained one
    assert twice.work["update"] - once.work["update"] == pytest.approx(forward)
    stored = {stage.name: stage.parts for stage in one.stages}
    values = values_of(advantage_global_std=False)
    weights = one.network.adapters * values["trainable"]["rank"]
    size, batch = values["prompts"]["images_per_prompt"], values["run"]["micro_batch"]
    unit = size * -(-batch // size)
    assert stored["update"]["gradients by image"] == 4 * weights * unit
    assert "trajectories" not in stored["rollout"] and "activations" in stored["rollout"]
    everything = estimate(
        values_of(method_update="one_pass", optimizer_updates=1, advantage_global_std=True),
        card=80 * GIB,
    )
    images = values["prompts"]["per_iteration"] * size
    found = {stage.name: stage.parts for stage in everything.stages}
    assert found["update"]["gradients by image"] == 4 * weights * images
    values = values_of(method_update="one_pass", optimizer_updates=1, **shared)
    served = estimate({**values, "rewards": {"mine": {"name": "remote"}}}, card=80 * GIB)
    found = {stage.name: stage.parts for stage in served.stages}
    assert found["update"]["gradients by image"] == 4 * weights * min(2 * unit, images)
    together = values_of(method_update="one_pass", optimizer_updates=1, **shared)
    together = {**together, "rewards": {"scene": {"normalise": "z_score"}, "brightness": 1.0}}
    found = {stage.name: stage.parts for stage in estimate(together, card=80 * GIB).stages}
    assert found["update"]["gradients by image"] == 4 * weights * images


def test_parts_are_told_and_add_up():
    found = estimate(values_of("flux-24gb"), card=24 * GIB)
    update = next(stage for stage in found.stages if stage.name == "update")
    assert sum(update.parts.values()) == update.total
    network = networks()["FLUX.1-dev"]
    weights = 2 * (network.weights - network.packable) + network.packable
    assert update.parts["network"] == weights
    assert update.parts["adapters"] == 4 * 32 * network.adapters == update.parts["gradients"]
    assert update.parts["optimizer"] == 8 * 32 * network.adapters


def test_the_networks_of_rewards_are_counted():
    scene = values_of("sd15-8gb")
    taste = {**scene, "rewards": {"aesthetic": 1.0}}
    half = {"name": "pick_score", "options": {"dtype": "float16"}}
    both = {**scene, "rewards": {"aesthetic": 1.0, "mine": half}}
    small, large = 8 * GIB, 80 * GIB
    rewards = [4 * 304e6, 4 * 304e6 + 2 * 986e6]
    for values, weights in zip((taste, both), rewards, strict=True):
        lent, kept = (
            {stage.name: stage.parts for stage in estimate(values, card=card).stages}
            for card in (small, large)
        )
        assert lent["reward"]["rewards"] == kept["reward"]["rewards"] == weights
        assert "rewards" not in lent["update"] and kept["update"]["rewards"] == weights
    images = scene["prompts"]["per_iteration"] * scene["prompts"]["images_per_prompt"]
    more = estimate(taste).flop - estimate(scene).flop
    assert more == pytest.approx(images * 162e9)
    assert "rewards" not in estimate(scene).stages[4].parts


# --- refusals ------------------------------------------------------------------------------------


def test_a_run_that_does_not_fit_is_told_the_fewest_settings():
    network = network_for("sd35-medium")
    values = values_of(model_gradient_checkpointing=False, run_micro_batch=8)
    found = estimate(values, card=16 * GIB)
    assert found.memory > 16 * GIB
    changes = remedies(values, network, 16 * GIB)
    assert changes is not None and len(changes) == 1
    after = estimate(apply_changes(values, changes), card=16 * GIB)
    assert after.memory <= 16 * GIB
    said = refusal(values, found, 16 * GIB)
    assert said is not None and "the update needs" in said and "\n" not in said
    assert "--model.gradient-checkpointing True" in said or "--run.micro-batch 1" in said


def test_no_remedy_that_is_not_needed_is_named():
    network = network_for("flux1-dev")
    values = values_of("flux-24gb", model_base="same", model_gradient_checkpointing=False)
    changes = remedies(values, network, 24 * GIB)
    assert changes is not None and len(changes) == 2
    for fewer in itertools.combinations(changes, len(changes) - 1):
        assert estimate(apply_changes(values, fewer), network, 24 * GIB).memory > 24 * GIB


def test_what_cannot_fit_is_said():
    values = values_of("flux-24gb")
    found = estimate(values, card=2 * GIB)
    said = refusal(values, found, 2 * GIB)
    assert said is not None and "use a larger card or a smaller model" in said


def test_a_full_fine_tune_is_not_told_to_pack_its_base():
    values = values_of(trainable_kind="full", trainable_ema_decay=0.0)
    changes = remedies(values, network_for("sd35-medium"), 40 * GIB) or []
    assert all(name != "base" for _, name, _ in changes)


# --- the command ---------------------------------------------------------------------------------


def test_a_dry_run_prints_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "demo", "--dry-run", "--card-gb", "8"]) == 0
    said = capsys.readouterr().out
    assert "Estimate for tiny-sd" in said and "it fits: the card has 8.0 GiB" in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_and_names_settings(capsys):
    preset = ["train", "--preset", "flux-24gb", "--model.base", "same", "--dry-run"]
    assert main([*preset, "--card-gb", "24"]) == 2
    said = capsys.readouterr().err
    assert "the card has 24.0; it fits with --model.base fp8" in said
    assert main([*preset, "--card-gb", "none"]) == 2
    assert "--card-gb is 'none': Input should be a valid number" in capsys.readouterr().err


def test_a_network_that_is_not_in_the_table_is_counted(tmp_path, capsys):
    folder = sd3_fixture.write_folder(tmp_path / "sd3", "sd3-m")
    size = ["--model.width", "64", "--model.height", "64", "--card-gb", "2"]
    given = ["--preset", "sd35-16gb", "--model.source", str(folder), "--dry-run", *size]
    assert main(["train", *given]) == 0
    assert "Estimate for this sd3 network" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sampled", "trained"),
    [
        ({}, 1, 1),
        ({"branches": 4, "branch_at": [6]}, (6 / 4 + 4) / 10, (6 / 4 + 3) / 9),
        ({"branches": 2, "branch_at": [2, 5]}, (2 / 4 + 3 / 2 + 5) / 10, (2 / 4 + 3 / 2 + 4) / 9),
    ],
)
def test_a_path_that_images_share_is_counted_once(changes, sampled, trained):
    values = c.read_preset("demo-flow").model_dump(mode="json")
    values["sampler"] |= {"steps": 10, "drop_last": 1, **changes}
    values["method"]["selection"] = "all"
    assert paths_per_image(values) == pytest.approx((sampled, trained))


def test_in_a_window_all_that_is_trained_is_an_images_own():
    values = c.read_preset("demo-flow").model_dump(mode="json")
    values["sampler"] |= {"steps": 10, "drop_last": 1, "branches": 4}
    values["method"] |= {"selection": "sliding_window", "window": 3}
    assert paths_per_image(values) == pytest.approx(((3 / 4 + 7) / 10, 1))
    values["method"] |= {"window_move": "fixed", "window_start": 5}
    assert paths_per_image(values) == pytest.approx(((5 / 4 + 5) / 10, 1))
