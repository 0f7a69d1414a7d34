"""Adapters: what they change, what is written, and that others read the same numbers."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from comfyui_pcpo.tests.fixtures import sd1_fixture as fixture
from comfyui_pcpo.trainers.families import ModelError
from comfyui_pcpo.trainers.job import files
from comfyui_pcpo.trainers.lora import adapters
from comfyui_pcpo.trainers.lora.safetensors_file import write_safetensors
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
STEPS = torch.tensor([3, 500, 999])
DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64]


def base(dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return fixture.shake(fixture.tiny_unet()).requires_grad_(False).eval().to(dtype)


def train(network: torch.nn.Module, seed: int = 3) -> None:
    """What training does to adapters: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapters.adapters(network):
        weight = layer.lora_B["default"].weight
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3


@torch.no_grad()
def output(network: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    context = torch.randn(3, 5, 32, generator=generator)
    dtype = network.conv_in.weight.dtype
    return network(x.to(dtype), STEPS, encoder_hidden_states=context.to(dtype)).sample.float()


def trained(rank: int = 4, alpha: float = 4, targets=TARGETS) -> UNet2DConditionModel:
    network = base()
    adapters.add_lora(network, rank, alpha, targets, seed=5)
    train(network)
    assert (output(network) - output(base())).abs().max() > 0.1
    return network


# --- on the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["gaussian", "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters(init, dtype):
    network = base(dtype)
    before = output(network)
    parameters = adapters.add_lora(network, 4, 8, TARGETS, init)
    assert torch.equal(output(network), before)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {id(p) for p in parameters} == {id(p) for p in network.parameters() if p.requires_grad}
    layers = dict(adapters.adapters(network))
    assert len(layers) == 8 * 4  # 4 transformer blocks of 2 attentions of 4 projections
    assert len(parameters) == 2 * len(layers)
    for layer in layers.values():
        assert layer.scaling["default"] == 2.0
        assert layer.get_base_layer().weight.dtype == dtype
    values = torch.cat([la.lora_A["default"].weight.detach().flatten() for la in layers.values()])
    if init == "gaussian":
        assert values.std() == pytest.approx(1 / 4, rel=0.05)  # std 1 / rank
    else:
        assert values.abs().max() <= 1 / 32**0.5  # uniform within 1 / sqrt(inputs)


def test_seed_gives_the_same_adapters_and_leaves_the_generator_alone():
    first, second = base(), base(torch.float16)
    for network in (first, second):
        torch.rand(1)
        state = torch.get_rng_state()
        adapters.add_lora(network, 2, 2, ("to_q",), seed=7)
        assert torch.equal(torch.get_rng_state(), state)
    for (_, a), (_, b) in zip(adapters.adapters(first), adapters.adapters(second), strict=True):
        torch.testing.assert_close(
            a.lora_A["default"].weight,
            b.lora_A["default"].weight,
            rtol=1e-3,  # peft casts to the base's dtype in between
            atol=1e-3,
        )


def test_gradients_reach_adapters_only():
    network = base(torch.bfloat16).requires_grad_(True)
    parameters = adapters.add_lora(network, 4, 4, TARGETS)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    out = network(x.bfloat16(), 10, encoder_hidden_states=context.bfloat16()).sample
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ((0, 1, TARGETS), "rank is 0"),
        ((4, 0, TARGETS), "alpha 0"),
        ((4, 4, ()), "no LoRA targets"),
        ((4, 4, ("to_q", "to_x")), "'to_x' matches no module .*to_out.0.*to_q"),
    ],
)
def test_impossible_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        adapters.add_lora(base(), *settings)


def test_second_adapter_is_refused():
    network = trained()
    with pytest.raises(ValueError, match="has adapters already"):
        adapters.add_lora(network, 4, 4, TARGETS)


def test_reference_is_the_base():
    network = trained()
    expected, tuned = output(base()), output(network)
    frozen = next(p for p in network.parameters() if p.requires_grad).requires_grad_(False)
    flags = [p.requires_grad for p in network.parameters()]
    with adapters.reference(network):
        assert torch.equal(output(network), expected)
        with adapters.reference(network):
            pass
        assert torch.equal(output(network), expected)
    assert torch.equal(output(network), tuned)
    assert [p.requires_grad for p in network.parameters()] == flags
    assert not frozen.requires_grad
    with pytest.raises(KeyError), adapters.reference(network):
        raise KeyError
    assert torch.equal(output(network), tuned)


# --- to a file -----------------------------------------------------------------------------------


def pipeline_of(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize(
    ("rank", "alpha", "targets"),
    [
        (4, 4, TARGETS),
        (4, 6, TARGETS),
        (2, 1, (*TARGETS, "proj_in", "proj_out", "net.0.proj", "net.2")),
    ],
)
def test_export_loads_in_a_plain_diffusers_pipeline(tmp_path, rank, alpha, targets):
    network = trained(rank, alpha, targets)
    path = adapters.export_lora(network, tmp_path / "sub" / "a.safetensors")
    pipe = pipeline_of(base())
    pipe.load_lora_weights(str(path))
    torch.testing.assert_close(output(pipe.unet), output(network), rtol=1e-5, atol=1e-5)


def test_export_names_and_metadata(tmp_path):
    network = trained(4, 6)
    notes = {"pcpo.algorithm": "pcpo", "pcpo.iteration": 30, "ss_base_model_version": "sd_v1_v"}
    path = adapters.export_lora(network, tmp_path / "a.safetensors", metadata=notes)
    tensors = load_file(path)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{stem}.lora_down.weight"].shape == (4, 32)
    assert tensors[f"{stem}.lora_up.weight"].shape == (32, 4)
    assert tensors[f"{stem}.alpha"] == 6
    assert len(tensors) == 3 * 32
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert float(metadata["ss_network_alpha"]) == 6
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_base_model_version"] == "sd_v1_v"
    assert metadata["pcpo.iteration"] == "30"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    half = load_file(adapters.export_lora(network, path, dtype=torch.float16))
    kinds = {(key.endswith(".alpha"), tensor.dtype) for key, tensor in half.items()}
    assert kinds == {(True, torch.float32), (False, torch.float16)}


def test_export_refuses_what_is_no_lora(tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        adapters.export_lora(base(), tmp_path / "a.safetensors")
    network = trained()
    _, layer = next(adapters.adapters(network))
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        adapters.export_lora(network, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_export_of_a_whole_network(tmp_path):
    network = base()
    adapters.export_unet(network, tmp_path / "unet", dtype=torch.float32)
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert torch.equal(output(again), output(network))
    path = adapters.export_unet(network, tmp_path / "net.safetensors", metadata={"step": 3})
    assert path == tmp_path / "net.safetensors"
    assert {t.dtype for t in load_file(path).values()} == {torch.float16}
    with pytest.raises(ValueError, match="export them as a LoRA"):
        adapters.export_unet(trained(), path)


def test_writing_replaces_whole_files_only(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_safetensors({"x": torch.zeros(2)}, path)

    def fails(*_args, **_options):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="disk full"):
            write_safetensors({"x": torch.ones(2)}, path)
    assert load_file(path)["x"].sum() == 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_replacing_waits_for_a_reader(tmp_path, monkeypatch):
    """As on Windows, where a file that is open cannot be replaced."""
    held, replace = threading.Event(), os.replace

    def refused_while_held(source, target):
        if not held.is_set():
            raise PermissionError("in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused_while_held)
    threading.Timer(0.2, held.set).start()
    path = write_safetensors({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    assert load_file(path)["x"].sum() == 2

    held.clear()
    monkeypatch.setattr(files, "PATIENCE_S", 0.1)
    start = time.monotonic()
    with pytest.raises(PermissionError):
        write_safetensors({"x": torch.ones(2)}, path)
    assert 0.1 <= time.monotonic() - start < 1.5


# --- from a file ---------------------------------------------------------------------------------


def test_reload_into_a_bare_network(tmp_path):
    network = trained(4, 6)
    path = adapters.export_lora(network, tmp_path / "a.safetensors")
    again = base()
    loaded = adapters.load_lora(again, path)
    assert (loaded.rank, loaded.alpha, loaded.notes) == (4, 6, ())
    assert len(loaded.targets) == 32
    torch.testing.assert_close(output(again), output(network), rtol=1e-6, atol=1e-6)
    second = adapters.export_lora(again, tmp_path / "b.safetensors")
    for key, tensor in load_file(path).items():
        assert torch.equal(load_file(second)[key], tensor)


def test_reload_into_adapters_of_the_run(tmp_path):
    """Another rank, alpha and a wider choice of targets: the function is the file's."""
    network = trained(4, 6, ("to_q", "to_v"))
    path = adapters.export_lora(network, tmp_path / "a.safetensors")
    again = base()
    parameters = adapters.add_lora(again, 8, 8, TARGETS)
    train(again)  # what was there is overwritten
    loaded = adapters.load_lora(again, path)
    assert (loaded.rank, loaded.alpha) == (8, 8)
    notes = " ".join(loaded.notes)
    assert "padded with zeros to this run's rank 8" in notes
    assert "[1.5] differs from this run's 1" in notes
    assert "16 of this run's 32 modules" in notes
    torch.testing.assert_close(output(again), output(network), rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for p in parameters)
    assert all(p.any() for _, a in adapters.adapters(again) for p in [a.lora_A["default"].weight])


def peft_names(tensors):
    return {k: t for k, t in tensors.items() if not k.endswith(".alpha")}


@pytest.mark.parametrize("form", ["diffusers", "old diffusers", "peft", "no prefix"])
def test_names_of_other_programs(tmp_path, form):
    network = trained(4, 4)
    tensors = {}
    for name, layer in adapters.adapters(network):
        down, up = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        if form == "old diffusers":
            stem, target = name.removesuffix(".0").rsplit(".", 1)
            key, ends = f"unet.{stem}.processor.{target}_lora", ("down", "up")
        elif form == "diffusers":
            key, ends = f"unet.{name}.lora", ("down", "up")
        else:
            prefix = "base_model.model." if form == "peft" else ""
            key, ends = f"{prefix}{name}", ("lora_A", "lora_B")
        tensors[f"{key}.{ends[0]}.weight"], tensors[f"{key}.{ends[1]}.weight"] = down, up
    save_file(tensors, tmp_path / "a.safetensors")
    again = base()
    loaded = adapters.load_lora(again, tmp_path / "a.safetensors")
    assert (loaded.rank, loaded.alpha) == (4, 4)
    torch.testing.assert_close(output(again), output(network), rtol=1e-6, atol=1e-6)


def test_what_diffusers_saves_is_read_with_its_alpha(tmp_path):
    network = trained(4, 10)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers,
        unet_lora_adapter_metadata=network.peft_config["default"].to_dict(),
    )
    again = base()
    loaded = adapters.load_lora(again, tmp_path / "pytorch_lora_weights.safetensors")
    assert (loaded.rank, loaded.alpha) == (4, 10)
    torch.testing.assert_close(output(again), output(network), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_stabilised", [False, True], ids=["plain", "rank-stabilised"])
def test_scales_in_the_metadata_are_diffusers_own(tmp_path, caplog, is_stabilised):
    """Ranks and alphas by pattern, alpha over the root of the rank: as diffusers reads them."""
    network = base()
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(TARGETS),
        use_rslora=is_stabilised,
        rank_pattern={"to_v": 2},
        alpha_pattern={"down_blocks.*to_q": 3, "to_v": 5},
    )
    inject_adapter_in_model(config, network, adapter_name="default")
    train(network)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    noted = {"unet_lora_layers": layers, "unet_lora_adapter_metadata": config.to_dict()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, **noted)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    theirs, again, bare = base(), base(), base()
    pipeline = pipeline_of(theirs)
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(output(theirs), output(network), rtol=1e-5, atol=1e-5)
    adapters.load_lora(again, file)
    torch.testing.assert_close(output(again), output(network), rtol=1e-5, atol=1e-5)
    assert "ComfyUI does not read it and applies 1" in caplog.text
    adapters.add_lora(bare, 4, 4, TARGETS)  # init_lora, which folds each scale into B
    adapters.load_lora(bare, file)
    torch.testing.assert_close(output(bare), output(network), rtol=1e-5, atol=1e-5)
    with safe_open(adapters.export_lora(bare, tmp_path / "b.safetensors"), "pt") as written:
        assert "lora_adapter_metadata" not in written.metadata()  # alphas of its own say it all


BROKEN = [
    "{",
    "[]",
    "3",
    '{"unet.r": 4, "unet.lora_alpha": "four"}',
    '{"unet.r": 4, "unet.alpha_pattern": 2}',
]


@pytest.mark.parametrize("text", BROKEN)
def test_metadata_that_is_no_configuration_is_refused_where_it_is_needed(tmp_path, text):
    tensors = load_file(adapters.export_lora(trained(), tmp_path / "a.safetensors"))
    noted = {"lora_adapter_metadata": text}
    save_file(tensors, tmp_path / "a.safetensors", noted)
    adapters.load_lora(base(), tmp_path / "a.safetensors")  # it has alphas
    save_file(peft_names(tensors), tmp_path / "b.safetensors", noted)
    with pytest.raises(ModelError, match=r"no configuration of peft.*save it again"):
        adapters.load_lora(base(), tmp_path / "b.safetensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_of_any_dtype_is_computed_in_float32(tmp_path, dtype):
    tensors = load_file(adapters.export_lora(trained(4, 3), tmp_path / "a.safetensors"))
    stored = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    alphas = {key: t.reshape(1) for key, t in stored.items() if key.endswith("alpha")}
    save_file({**stored, **alphas}, tmp_path / "stored.safetensors")
    exact = {key: tensor.float() for key, tensor in stored.items()}
    save_file(exact, tmp_path / "exact.safetensors")
    found, expected = base(), base()
    adapters.load_lora(found, tmp_path / "stored.safetensors")
    adapters.load_lora(expected, tmp_path / "exact.safetensors")
    torch.testing.assert_close(output(found), output(expected), rtol=1e-6, atol=1e-6)


def test_unusable_files_are_refused(tmp_path):
    path = adapters.export_lora(trained(), tmp_path / "good.safetensors")
    good = load_file(path)

    def refuse(match, change, network=None, **options):
        tensors = dict(good)
        change(tensors)
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(ModelError, match=match):
            adapters.load_lora(network or base(), tmp_path / "bad.safetensors", **options)

    some = next(k for k in good if k.endswith("lora_down.weight"))
    wide, text = torch.zeros(4, 99), torch.zeros(4, 4)
    refuse("lacks the down weight", lambda t: t.pop(some))
    refuse("is \\(4, 99\\) where the network needs \\(4, 32\\)", lambda t: t.update({some: wide}))
    alpha, none = some.replace("lora_down.weight", "alpha"), torch.zeros(0, 32)
    refuse(r"alpha of .* is 2 numbers", lambda t: t.update({alpha: torch.ones(2)}))
    refuse("do not fit together", lambda t: t.update({some: torch.zeros(4)}))
    up = some.replace("lora_down", "lora_up")
    refuse("do not fit together", lambda t: t.update({some: none, up: torch.zeros(32, 0)}))
    other = {f"lora_unet_mid_x.lora_{part}.weight": text.clone() for part in ("up", "down")}
    refuse("another base model", lambda t: t.update(other))
    refuse("no plain LoRA", lambda t: t.update({some.replace("lora_down", "hada_w1_a"): text}))
    refuse("text encoder", lambda t: t.update({"lora_te_x.lora_down.weight": text}))
    refuse(
        "no LoRA of the denoising",
        lambda t: (t.clear(), t.update({"lora_te_x.alpha": text})),
        ignore_text_encoder=True,
    )
    narrow, small = base(), base()
    adapters.add_lora(narrow, 4, 4, ("to_q", "to_k"))
    adapters.add_lora(small, 2, 2, TARGETS)
    refuse(
        "also changes to_out.0, to_v, .*targets to to_k, to_out.0, to_q, to_v",
        lambda t: None,
        narrow,
    )
    refuse("rank 4 and this run 2: set trainable.rank to 4", lambda t: None, small)
    with pytest.raises(ModelError, match="cannot be read"):
        adapters.load_lora(base(), tmp_path / "absent.safetensors")


def test_text_encoder_part_can_be_ignored(tmp_path):
    network = trained()
    tensors = load_file(adapters.export_lora(network, tmp_path / "a.safetensors"))
    tensors["lora_te_text_model_x.lora_down.weight"] = torch.ones(4, 4)
    save_file(tensors, tmp_path / "b.safetensors")
    again = base()
    adapters.load_lora(again, tmp_path / "b.safetensors", ignore_text_encoder=True)
    torch.testing.assert_close(output(again), output(network), rtol=1e-6, atol=1e-6)
