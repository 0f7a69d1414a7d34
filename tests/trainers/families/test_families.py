"""Loading a model: folders and single files give the same network, and refusals say why."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_pcpo.tests.fixtures import sd1_fixture as fixture
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.families import ModelError, architecture, load_family
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.families.scheduler import SchedulerConfig
from comfyui_pcpo.trainers.families.sd1 import single_file
from comfyui_pcpo.trainers.families.sd1.folder import load_tokenizer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

PROMPTS = ["a red circle left of a blue square", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: fixture.write_folder(root / kind, kind) for kind in ("kl", "tiny")}


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def pipeline(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=load_family(folder).vae,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=load_tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# --- a folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vae", ["kl", "tiny"])
def test_folder_equals_the_diffusers_pipeline(folders, latents, vae):
    family, pipe = load_family(folders[vae]), pipeline(folders[vae])
    embeds = family.encode(PROMPTS)
    expected = pipe.encode_prompt(PROMPTS[0], "cpu", 1, False)[0]
    torch.testing.assert_close(embeds.tokens[:1], expected)
    assert embeds.tokens.shape == (2, 77, 32) and embeds.tokens.dtype == torch.float32
    assert embeds.pooled is None

    timestep = torch.tensor([7, 500, 999])
    context = embeds[[0, 1, 0]]
    expected = pipe.unet(latents, timestep, encoder_hidden_states=context.tokens).sample
    torch.testing.assert_close(family.predict(latents, timestep, context), expected)

    if vae == "tiny":  # a decoder's layout in memory decides how its sums are rounded
        pipe.vae.to(memory_format=torch.channels_last)
    pil = pipe.image_processor.postprocess(
        pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample, output_type="pil"
    )
    images = family.decode(latents, batch=3)
    assert images.dtype == torch.uint8 and images.is_contiguous()
    for image, other in zip(images, pil, strict=True):
        assert (image.permute(1, 2, 0).numpy() == np.asarray(other)).all()
    assert len(images.unique()) > 100  # not all black and white: rounding shows


def test_decode_does_not_depend_on_its_batch(folders, latents):
    family = load_family(folders["kl"])
    whole, parts = family.decode(latents, batch=3).int(), family.decode(latents, batch=1).int()
    assert (whole - parts).abs().max() <= 1  # another batch may round the other way


def test_family_is_frozen_and_in_eval_mode(folders):
    family = load_family(folders["kl"])
    modules = (family.unet, family.vae, family.text_encoder)
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert not any(m.training for m in modules)
    assert family.network is family.unet
    family.release_text_encoder()
    with pytest.raises(RuntimeError, match="released"):
        family.encode(PROMPTS)


def test_predict_goes_through_the_wrapped_network(folders, latents):
    family = load_family(folders["kl"])
    family.network = lambda x, t, **_: (x.new_full((1,), 7.0),)
    assert family.predict(latents, torch.tensor(1), Embeds(torch.zeros(3, 77, 32))) == 7.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_network(folders, latents, dtype):
    full, half = load_family(folders["kl"]), load_family(folders["kl"], dtype=dtype)
    assert {p.dtype for p in half.unet.parameters()} == {dtype}
    assert half.vae.dtype == torch.float32
    embeds = half.encode(PROMPTS)[[0, 0, 1]]
    out = half.predict(latents, torch.tensor(500), embeds)
    assert out.dtype == torch.float32
    expected = full.predict(latents, torch.tensor(500), embeds)
    assert 0 < (out - expected).abs().max() < 0.05 * expected.abs().max()


def test_sizes(folders):
    family = load_family(folders["kl"])
    assert family.native_resolution == (16, 16)  # 8 latent points of 2 pixels
    assert load_family(folders["tiny"]).native_resolution == (64, 64)
    assert family.latent_shape(24, 16) == (4, 8, 12)
    with pytest.raises(ValueError, match="height is 15; it must be a multiple of 2, for example"):
        family.latent_shape(16, 15)


def test_gradient_checkpointing_gives_the_same_gradient(folders, latents):
    family = load_family(folders["kl"])
    weight = family.unet.mid_block.resnets[0].conv1.weight.requires_grad_(True)
    embeds = family.encode(["x"] * 3)
    gradients = []
    for enabled in (False, True):
        family.set_gradient_checkpointing(enabled)
        assert family.unet.is_gradient_checkpointing is enabled
        loss = family.predict(latents, torch.tensor(10), embeds).square().mean()
        gradients.append(torch.autograd.grad(loss, weight)[0])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_half_precision_variant_and_missing_weights(folders, tmp_path):
    family = load_family(folders["kl"])
    folder = fixture.write_folder(tmp_path / "variant")
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_suffix("").with_name("diffusion_pytorch_model.fp16.safetensors"))
    again = load_family(folder)
    for ours, theirs in zip(again.unet.parameters(), family.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="vae holds no"):
        load_family(folder)


# --- the noise schedule --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        fixture.SCHEDULER,
        fixture.SCHEDULER | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    ],
)
def test_alpha_bars_equal_diffusers(config):
    ours = SchedulerConfig.from_dict(config)
    theirs = DDIMScheduler(**config)
    assert ours.alpha_bars().dtype == torch.float64
    # diffusers works in float32
    torch.testing.assert_close(
        ours.alpha_bars().float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7
    )
    final = ours.final_alpha_bar if ours.final_alpha_bar is not None else ours.alpha_bars()[0]
    assert float(final) == pytest.approx(float(theirs.final_alpha_cumprod))
    assert ours.prediction_type == theirs.config.prediction_type
    assert ours.timestep_spacing == theirs.config.timestep_spacing
    assert ours.steps_offset == theirs.config.steps_offset


def test_unknown_schedules_are_refused():
    with pytest.raises(ModelError, match="beta_schedule is 'squaredcos_cap_v2'"):
        SchedulerConfig.from_dict({"beta_schedule": "squaredcos_cap_v2"})
    with pytest.raises(ModelError, match="trained_betas"):
        SchedulerConfig.from_dict({"trained_betas": [0.1, 0.2]})


# --- a single file -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vae", "suffix", "layers"),
    [("kl", ".safetensors", 2), ("tiny", ".safetensors", 1), ("kl", ".ckpt", 1)],
)
def test_single_file_equals_its_folder(tmp_path, latents, vae, suffix, layers):
    folder = fixture.write_folder(tmp_path / "folder", vae, layers)
    path = fixture.write_single_file(folder, tmp_path / f"model{suffix}", layers)
    ours, theirs = load_family(path), load_family(folder)
    assert ours.encode(PROMPTS).tokens.equal(theirs.encode(PROMPTS).tokens)
    embeds = theirs.encode(PROMPTS)[[0, 1, 0]]
    for timestep in (torch.tensor(3), torch.tensor([1, 500, 999])):
        torch.testing.assert_close(
            ours.predict(latents, timestep, embeds),
            theirs.predict(latents, timestep, embeds),
            rtol=1e-6,
            atol=1e-6,
        )
    assert ours.decode(latents).equal(theirs.decode(latents))
    assert ours.scheduler_config == theirs.scheduler_config


def test_tiny_vae_shift_and_scale_of_comfyui(tmp_path, folders, latents):
    tensors = load_file(fixture.write_single_file(folders["tiny"], tmp_path / "plain.safetensors"))
    tensors["first_stage_model.vae_scale"] = torch.tensor(0.5)
    tensors["first_stage_model.vae_shift"] = torch.tensor(0.25)
    save_file(tensors, tmp_path / "shifted.safetensors")
    plain = load_family(tmp_path / "plain.safetensors")
    shifted = load_family(tmp_path / "shifted.safetensors")
    raw = (latents / 0.18215 - 0.25) * 0.5  # what ComfyUI feeds its decoder
    difference = shifted.decode(latents).int() - plain.decode(raw * 0.18215).int()
    assert difference.abs().max() <= 1  # the two ways to the same number round differently


def test_half_precision_file_is_read_as_asked(tmp_path, folders):
    tensors = load_file(fixture.write_single_file(folders["kl"], tmp_path / "a.safetensors"))
    save_file(
        {k: t.to(torch.float8_e4m3fn) for k, t in tensors.items()}, tmp_path / "b.safetensors"
    )
    family = load_family(tmp_path / "b.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in family.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in family.text_encoder.parameters()} == {torch.float32}


def test_prediction_type(tmp_path, folders):
    def load(path, asked=None):
        return load_family(path, prediction_type=asked).scheduler_config.prediction_type

    path = fixture.write_single_file(folders["tiny"], tmp_path / "a.safetensors")
    assert load(path) == "epsilon"
    assert load(path, "v_prediction") == "v_prediction"
    note = {"modelspec.prediction_type": "v"}
    path = fixture.write_single_file(folders["tiny"], tmp_path / "b.safetensors", **note)
    assert load(path) == "v_prediction"
    assert load(path, "sample") == "sample"  # who asks knows better than a note
    assert load_family(path).base_model_version == "sd_v1_v"
    with pytest.raises(ModelError, match="prediction_type is 'eps'; it must be one of"):
        load(path, "eps")
    folder = fixture.write_folder(tmp_path / "v", prediction_type="v_prediction")
    assert load(folder) == "v_prediction"
    with pytest.raises(ModelError, match=r"'epsilon', but .* predicts 'v_prediction'"):
        load(folder, "epsilon")


@pytest.mark.parametrize("marks", [("v_pred",), ("v_pred", "ztsnr"), ("ztsnr",)], ids="+".join)
def test_marks_of_a_v_prediction_model(tmp_path, folders, caplog, marks):
    """As ComfyUI has them in SDXL; it takes SD1.x's for epsilon, which is said."""
    caplog.set_level("INFO")
    tensors = fixture.original_names(folders["tiny"]) | dict.fromkeys(marks, torch.zeros(0))
    save_file(tensors, tmp_path / "a.safetensors")
    family = load_family(tmp_path / "a.safetensors")
    found = family.scheduler_config
    assert found.prediction_type == ("v_prediction" if "v_pred" in marks else "epsilon")
    assert found.rescale_betas_zero_snr == (len(marks) == 2)
    assert found.timestep_spacing == ("trailing" if len(marks) == 2 else "leading")
    assert f"a.safetensors is marked {' and '.join(marks)}" in caplog.text
    assert "ComfyUI does not heed these marks" in caplog.text
    asked = load_family(tmp_path / "a.safetensors", prediction_type="epsilon").scheduler_config
    assert (asked.prediction_type, asked.rescale_betas_zero_snr) == ("epsilon", False)


def test_a_marked_file_is_sampled(tmp_path, folders, capsys):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(fixture.original_names(folders["tiny"]) | marks, tmp_path / "a.safetensors")
    words = ["sample", "--model", str(tmp_path / "a.safetensors"), "--prompts", "a cat"]
    words += ["--steps", "3", "--width", "64", "--height", "64", "--out", str(tmp_path / "out")]
    assert main([*words, "--eta", "1", "--latents", str(tmp_path / "l.safetensors")]) == 0
    assert "is marked v_pred and ztsnr" in capsys.readouterr().out
    assert load_file(tmp_path / "l.safetensors")["latents"].isfinite().all()


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_pickle_s_one_key_is_looked_under(tmp_path, folders, key):
    """As ComfyUI does, whatever the key is called."""
    tensors = fixture.original_names(folders["tiny"])
    torch.save({key: tensors}, tmp_path / "nested.ckpt")
    torch.save(tensors, tmp_path / "plain.ckpt")
    nested, plain = (load_family(tmp_path / f"{name}.ckpt") for name in ("nested", "plain"))
    for ours, theirs in zip(nested.unet.parameters(), plain.unet.parameters(), strict=True):
        assert ours.equal(theirs)


def test_shipped_configs_are_those_of_sd15():
    """Parameter counts of the published model, and the sizes read back from its tensors."""
    configs = str(single_file.CONFIGS)
    text_config = json.loads((single_file.CONFIGS / "text_encoder/config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(configs, subfolder="unet")
        )
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(configs, subfolder="vae"))
        text = CLIPTextModel(CLIPTextConfig(**text_config))
    assert unet.num_parameters() == 859_520_964
    assert vae.num_parameters() == 83_653_863
    assert sum(p.numel() for p in text.parameters()) == 123_060_480

    attends_up = tuple(kind.startswith("Cross") for kind in unet.config.up_block_types)
    shapes = {
        fixture.original_unet_name(key, 2, attends_up): tuple(tensor.shape)
        for key, tensor in unet.state_dict().items()
    }
    for field, value in architecture.unet_config(shapes).items():
        assert _plain(unet.config[field]) == value, field
    vae_shapes = {k: tuple(t.shape) for k, t in fixture.original_vae(vae).items()}
    for field, value in architecture.vae_config(vae_shapes).items():
        assert _plain(vae.config[field]) == value, field
    shapes = {k.removeprefix("text_model."): tuple(t.shape) for k, t in text.state_dict().items()}
    for field, value in architecture.text_config(shapes).items():
        assert text_config[field] == value, field


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


# --- the tokenizer -------------------------------------------------------------------------------

# From open_clip's SimpleTokenizer, without begin and end.
TOKENS = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "don't you're 12345 3.14 #hash": [
        *(847, 713, 592, 982, 272, 273, 274, 275, 276, 274, 269, 272, 275, 258, 19199),
    ],
    "l'été à Zürich — naïve café": [
        *(331, 262, 3459, 39694, 21259, 89, 6522, 4021, 2005, 1097, 35689, 563, 15304),
    ],
    "猫 🐱 supercalifragilistic": [163, 234, 360, 22979, 1642, 2857, 13093, 2076, 1561],
    "": [],
}


@pytest.mark.parametrize("prompt", TOKENS)
def test_shipped_tokenizer(prompt):
    ids = load_tokenizer()(prompt).input_ids
    assert ids == [49406, *TOKENS[prompt], 49407]


def test_tokenizer_pads_and_cuts_to_77(folders, caplog):
    family = load_family(folders["tiny"])
    tokens = family.tokenizer(["a", "b " * 100], padding="max_length", truncation=True)
    assert [len(ids) for ids in tokens.input_ids] == [77, 77]
    assert tokens.input_ids[0][2:] == [49407] * 75
    assert family.encode(["b " * 100]).tokens.shape == (1, 77, 32)
    assert "cut to 77" in caplog.text


def test_folder_with_its_own_tokenizer(tmp_path):
    load_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    for prompt, ids in TOKENS.items():
        assert tokenizer(prompt).input_ids == [49406, *ids, 49407]


def test_folder_without_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no vocabulary"):
        load_tokenizer(tmp_path)
