"""Z-Image: its files in every layout give the network that diffusers has, and say velocities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfyui_pcpo.tests.fixtures import qwen_fixture
from comfyui_pcpo.tests.fixtures import zimage_fixture as fixture
from comfyui_pcpo.tests.fixtures.flux_fixture import save
from comfyui_pcpo.trainers.families import Files, ModelError, load_family
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.families.header import Header
from comfyui_pcpo.trainers.families.registry import family_of_header
from comfyui_pcpo.trainers.families.zimage import file as zimage_file
from comfyui_pcpo.trainers.families.zimage import model as zimage
from comfyui_pcpo.trainers.run.plans import sigma_grid
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_z_image_transformer_checkpoint_to_diffusers as diffusers_conversion,
)

SHORT, LONG = "a cat", "a red circle left of a blue square, and a green one"
"""Prompts whose tokens are padded to 64 and to 96."""
FULL = {"dtype": torch.float32, "vae_dtype": torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fixture.write_folder(tmp_path_factory.mktemp("models") / "zimage")


@pytest.fixture(scope="module")
def family(folder) -> zimage.ZImage:
    return zimage.load_folder(folder, **FULL)


@pytest.fixture(scope="module")
def theirs(folder) -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel.from_pretrained(folder / "transformer").eval()


def latents(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 16, 8, 12, generator=torch.Generator().manual_seed(2))


def velocity(network, x, sigma: float, embeds: Embeds) -> torch.Tensor:
    """As diffusers' pipeline has it, which gives lists of prompts without padding."""
    captions = [t[:n] for t, n in zip(embeds.tokens, embeds.lengths.tolist(), strict=True)]
    with torch.no_grad():
        time = torch.full((len(x),), 1 - sigma)
        out = network([*x[:, :, None]], time, captions, return_dict=False)[0]
    return -torch.stack([one[:, 0] for one in out])


# --- names ---------------------------------------------------------------------------------------


def test_conversion_equals_diffusers_at_full_size():
    network = fixture.full_size()
    assert network.num_parameters() == 6_154_908_736
    original = fixture.original_transformer(network.state_dict())
    assert len(original) == 454 and original["layers.29.attention.qkv.weight"].shape == (
        11520,
        3840,
    )
    assert original["layers.0.adaLN_modulation.0.weight"].shape == (15360, 256)
    ours = zimage_file.to_diffusers(original)
    expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.items()} == expected
    theirs = diffusers_conversion(dict(original))
    assert {key: tensor.shape for key, tensor in theirs.items()} == expected
    sizes = zimage_file.transformer_config({key: tuple(t.shape) for key, t in ours.items()})
    shipped = json.loads((zimage_file.CONFIGS / "transformer" / "config.json").read_text())
    for field, value in (shipped | sizes).items():
        own = network.config.get(field)
        assert field == "_class_name" or (list(own) if isinstance(own, tuple) else own) == value


def test_values_equal_diffusers_conversion():
    state = fixture.tiny_transformer().state_dict()
    original = fixture.original_transformer(state)
    ours, theirs = zimage_file.to_diffusers(original), diffusers_conversion(dict(original))
    assert ours.keys() == theirs.keys() == state.keys()
    assert all(ours[key].equal(theirs[key]) and ours[key].equal(state[key]) for key in state)
    assert zimage_file.to_diffusers(state).keys() == state.keys()  # diffusers' names stay


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [[SHORT, SHORT], [LONG, SHORT], [LONG, LONG]])
@pytest.mark.parametrize("sides", [(8, 12), (8, 8)])  # 24 and 16 tokens, padded to 32
def test_velocity_equals_diffusers(family, theirs, prompts, sides):
    embeds, x = family.encode(prompts), latents()[..., : sides[1]]
    assert embeds.is_ragged == (prompts[0] != prompts[1])
    with torch.no_grad():
        ours = family.predict(x, torch.tensor(0.7), embeds)
    expected = velocity(theirs, x, 0.7, embeds)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert ours.std() > 0.01
    other = velocity(theirs, x, 0.3, embeds)
    assert (other - expected).abs().max() > 1e-3  # time matters


def test_a_prompt_does_not_depend_on_its_neighbours(family):
    table = Embeds.concatenate([family.encode([p]).trim() for p in (SHORT, LONG)])
    assert table.tokens.shape[1] == 96 and table[[0]].tokens.shape[1] == 96
    x = latents(1)
    with torch.no_grad():
        both = family.predict(x.repeat(2, 1, 1, 1), torch.tensor(0.5), table)
        swapped = family.predict(x.repeat(2, 1, 1, 1), torch.tensor(0.5), table[[1, 0]])
        alone = [family.predict(x, torch.tensor(0.5), family.encode([p])) for p in (SHORT, LONG)]
    assert both[0].equal(swapped[1]) and both[1].equal(swapped[0])
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_gradients_are_the_same_with_checkpointing(family):
    embeds, grads = family.encode([LONG, SHORT]), []
    for enabled in (False, True):
        family.set_gradient_checkpointing(enabled)
        x = latents().requires_grad_()
        family.predict(x, torch.tensor([0.7, 0.4]), embeds).square().sum().backward()
        grads.append(x.grad)
    family.set_gradient_checkpointing(False)
    torch.testing.assert_close(*grads)


def test_float16_is_refused(folder):
    with pytest.raises(ModelError, match="overflows in float16"):
        zimage.load_folder(folder, dtype=torch.float16, vae_dtype=torch.float32)


@pytest.mark.parametrize(("shift", "steps"), [(6.0, 16), (3.0, 8)])
def test_sigmas_equal_diffusers(folder, shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    schedule = zimage.FlowSchedule(shift=shift)
    ours = sigma_grid(schedule, (16, 64, 64), steps, "inverse_count").sigmas
    torch.testing.assert_close(ours.float(), scheduler.sigmas, atol=1e-6, rtol=0)


# --- files ---------------------------------------------------------------------------------------


def files_of(folder: Path, to: Path, layout: str) -> Files:
    found = fixture.parts(folder)
    if layout == "one file":
        network = save(fixture.whole(folder), to / "all.safetensors")
        return Files(network, qwen_tokenizer=folder / "tokenizer")
    if layout == "diffusers' names":
        state = ZImageTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
        network = save(state, to / "diffusers.safetensors")
    else:
        suffix = "ckpt" if layout == "pickle" else "safetensors"
        network = save(found["network"], to / f"z_image_bf16.{suffix}")
    qwen = save(found["qwen"], to / "qwen_3_4b.safetensors")
    return Files(
        network, (qwen,), save(found["vae"], to / "ae.safetensors"), None, folder / "tokenizer"
    )


@pytest.mark.parametrize("layout", ["one file", "original names", "diffusers' names", "pickle"])
def test_files_are_the_folder(folder, family, tmp_path, layout):
    loaded = load_family(files_of(folder, tmp_path, layout))
    embeds, expected = loaded.encode([LONG, SHORT]), family.encode([LONG, SHORT])
    assert embeds.tokens.equal(expected.tokens) and embeds.lengths.equal(expected.lengths)
    with torch.no_grad():
        predicted = [f.predict(latents(), torch.tensor(0.7), embeds) for f in (loaded, family)]
    assert predicted[0].equal(predicted[1])
    assert loaded.decode(latents()).equal(family.decode(latents()))
    assert loaded.schedule == family.schedule and loaded.schedule.shift == 6


def test_images_equal_diffusers(folder, family):
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        image = vae.decode(latents() / 0.3611 + 0.1159).sample
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    assert family.decode(latents()).equal(expected)


def test_turbo_has_its_own_shift_and_tiny_autoencoder(tmp_path):
    folder = fixture.write_folder(tmp_path / "tiny", vae="tiny")
    network = save(fixture.whole(folder), tmp_path / "z_image_turbo_bf16.safetensors")
    loaded = load_family(Files(network, qwen_tokenizer=folder / "tokenizer"))
    assert loaded.schedule.shift == 3
    assert loaded.decode(latents()).equal(zimage.load_folder(folder, **FULL).decode(latents()))


def test_relatives_are_refused_by_name():
    shapes = {key: tuple(t.shape) for key, t in fixture.full_size().state_dict().items()}
    assert family_of_header(Header("ok", shapes)) == "zimage"
    lumina = {k: s for k, s in shapes.items() if "pad_token" not in k}
    for more, match in (
        (lumina, "x is Lumina-Image 2.0"),
        (lumina | {"clip_text_pooled_proj.0.weight": (1,)}, "x is NewBie"),
        (shapes | {"siglip_embedder.0.weight": (1,)}, "x is Z-Image-Omni or -Edit"),
        (shapes | {"dec_net.cond_embed.weight": (1, 1)}, "that draws pixels"),
        (shapes | {"layers.0.attention.to_q.weight_scale_2": (1,)}, "x holds nvfp4 weights"),
        ({"control_layers.0.attention.to_q.weight": (1, 1)}, "x is a Z-Image ControlNet"),
        (shapes | {"all_x_embedder.2-1.weight": (3840, 128)}, "takes 32 channels"),
        ({"cap_embedder.1.weight": (3840, 2560), "cap_pad_token": (1, 3840)}, "no complete"),
    ):
        with pytest.raises(ModelError, match=match):
            family_of_header(Header("x", more))


def test_parts_of_other_models_are_refused(folder, tmp_path):
    files = files_of(folder, tmp_path, "original names")
    wide = {
        k: torch.zeros(32, 32) if "embed_tokens" in k else t
        for k, t in fixture.parts(folder)["qwen"].items()
    }
    other = save(wide, tmp_path / "wide.safetensors")
    sdxl = {"decoder.conv_in.weight": torch.zeros(512, 4, 3, 3)}
    for given, match in (
        (Files(files.network, (), files.vae), "comes without its text encoder: give Qwen3-4B"),
        (Files(files.network, files.text_encoders), "holds no VAE: give Z-Image's"),
        (Files(files.network, (other,), files.vae), "16 wide and this text encoder gives 32"),
        (
            Files(
                files.network, files.text_encoders, save(sdxl, tmp_path / "sdxl_vae.safetensors")
            ),
            r"sdxl_vae\.safetensors has 4 latent channels and the network takes 16: .* ae\.safe",
        ),
    ):
        with pytest.raises(ModelError, match=match):
            load_family(given)


def test_a_folder_of_a_relative_is_refused(folder, tmp_path):
    path = fixture.write_folder(tmp_path / "omni")
    config = path / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"siglip_feat_dim": null', '"siglip_feat_dim": 8'))
    with pytest.raises(ModelError, match="Z-Image-Omni or -Edit"):
        load_family(path)


def test_the_template_and_its_layer_are_z_images(family):
    assert (
        zimage.READING.template.format("x")
        == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(family.text.model.layers) == 3 == len(qwen_fixture.tiny_qwen().model.layers) - 1
    with pytest.raises(RuntimeError, match="released"):
        loaded = zimage.ZImage(family.transformer, family.vae, None, family.schedule, torch.float32)
        loaded.encode(["a"])
