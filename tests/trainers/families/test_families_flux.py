"""FLUX.1-dev: its files in every layout give the network that diffusers has, and say velocities."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_pcpo.tests.fixtures import flux_fixture as fixture
from comfyui_pcpo.trainers.families import ModelError, autoencoder
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.families.files import Files
from comfyui_pcpo.trainers.families.flux import file as flux_file
from comfyui_pcpo.trainers.families.flux import header as flux_header
from comfyui_pcpo.trainers.families.flux import model as flux
from comfyui_pcpo.trainers.families.header import Header
from comfyui_pcpo.trainers.families.text.tokenizers import clip_tokenizer, t5_tokenizer
from comfyui_pcpo.trainers.families.weights import open_weights
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers as diffusers_conversion,
)
from transformers import CLIPTextModel, T5EncoderModel

PROMPTS = ["a red circle left of a blue square", ""]
FULL = {"dtype": torch.float32, "vae_dtype": torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fixture.write_folder(tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture(scope="module")
def family(folder) -> flux.Flux:
    return flux.load_folder(folder, **FULL)


@pytest.fixture(scope="module")
def tokenizer(folder) -> Path:
    return folder / "tokenizer_2"


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(2))


# --- names ---------------------------------------------------------------------------------------


def test_conversion_equals_diffusers_at_full_size():
    network = fixture.full_size()
    assert network.num_parameters() == 11_901_408_320
    original = fixture.original_transformer(network.state_dict())
    assert len(original) == 780  # tensors of the published file
    assert original["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    ours = flux_file.to_diffusers(original)
    theirs = diffusers_conversion(dict(original))
    expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.items()} == expected
    assert {key: tensor.shape for key, tensor in theirs.items()} == expected
    sizes = flux_file.transformer_config({key: tuple(t.shape) for key, t in ours.items()})
    for field, value in sizes.items():
        assert network.config[field] == value, field
    shipped = json.loads((flux_file.CONFIGS / "transformer" / "config.json").read_text())
    for field, value in shipped.items():
        assert field == "_class_name" or _plain(network.config[field]) == value, field


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def test_values_equal_diffusers_conversion():
    """FLUX's own heights, which diffusers' conversion is made for, and two columns."""
    generator = torch.Generator().manual_seed(3)
    original = {
        key: torch.randn(*tensor.shape[:1], *(2 for _ in tensor.shape[1:]), generator=generator)
        for key, tensor in fixture.original_transformer(fixture.full_size().state_dict()).items()
        if "_blocks." not in key or key.split(".")[1] == "0"
    }
    theirs = diffusers_conversion(dict(original))
    for tensors in (original, fixture.comfyui_names(original)):
        ours = flux_file.to_diffusers(tensors)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.parametrize("depth", [1, 3])
def test_inverse_of_the_fixture(depth):
    """At another width, and with as many blocks of each kind as there are."""
    network = FluxTransformer2DModel(
        num_layers=depth,
        num_single_layers=4 - depth,
        num_attention_heads=1,
        joint_attention_dim=8,
        guidance_embeds=True,
    )
    state = network.state_dict()
    again = flux_file.to_diffusers(fixture.original_transformer(state))
    assert again.keys() == state.keys()
    assert all(again[key].equal(state[key]) for key in state)
    assert flux_file.to_diffusers(state).keys() == state.keys()  # diffusers' names stay


# --- a folder ------------------------------------------------------------------------------------


def pipeline(folder: Path) -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=clip_tokenizer("clip_l"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=t5_tokenizer(folder / "tokenizer_2"),
        transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer"),
    )


def test_folder_equals_the_diffusers_pipeline(folder, family, latents):
    pipe = pipeline(folder)
    tokens, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS, device="cpu")
    embeds = family.encode(PROMPTS)
    assert embeds.tokens.shape == (2, 512, 32) and embeds.tokens.dtype == torch.float32
    torch.testing.assert_close(embeds.tokens, tokens)
    torch.testing.assert_close(embeds.pooled, pooled)

    seen = {}
    pipe.transformer.register_forward_hook(
        lambda _module, _args, kwargs, out: seen.update(kwargs, out=out[0]), with_kwargs=True
    )
    images = pipe(
        prompt_embeds=tokens,
        pooled_prompt_embeds=pooled,
        latents=pipe._pack_latents(latents, 2, 16, 8, 12),
        height=64,
        width=96,
        num_inference_steps=1,
        sigmas=[0.8],
        guidance_scale=3.5,
        output_type="latent",
    ).images
    sigma = seen["timestep"][0]
    ours = family.predict(latents, sigma, embeds)
    theirs = pipe._unpack_latents(seen["out"], 64, 96, 8)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs)
    stepped = latents - sigma * ours  # from sigma to 0: the velocity is eps - x0
    torch.testing.assert_close(pipe._pack_latents(stepped, 2, 16, 8, 12), images)

    raw = latents / 0.3611 + 0.1159
    with torch.no_grad():
        pil = pipe.image_processor.postprocess(pipe.vae.decode(raw).sample, output_type="np")
    decoded = family.decode(latents, batch=2)
    assert decoded.shape == (2, 3, 64, 96) and decoded.dtype == torch.uint8
    assert (decoded.permute(0, 2, 3, 1).numpy() == np.rint(pil * 255)).all()
    assert len(decoded.unique()) > 50


def test_one_sigma_for_all_is_one_a_row(family, latents):
    embeds = family.encode(PROMPTS)
    one = family.predict(latents, torch.tensor(0.3), embeds)
    torch.testing.assert_close(family.predict(latents, torch.tensor([0.3, 0.3]), embeds), one)
    rows = family.predict(latents, torch.tensor([0.3, 0.9]), embeds)
    torch.testing.assert_close(rows[:1], one[:1])
    assert (rows[1] - one[1]).abs().max() > 1e-3


def test_sizes(family):
    assert family.latent_shape(64, 96) == (16, 12, 8)
    assert family.native_resolution == (1024, 1024)
    with pytest.raises(ValueError, match="width is 520; it must be a multiple of 16, for example"):
        family.latent_shape(520, 512)
    assert family.schedule.is_dynamic
    assert round(family.schedule.shift_of(1024, 10), 3) == 1.878
    assert (family.name, family.base_model_version) == ("flux", "flux1")
    assert family.max_prompt_length == 512
    assert family.prompt_length("a cat") == 7  # letters and spaces, and the end


def test_packing_is_diffusers(latents):
    packed = flux.pack(latents)
    assert packed.equal(FluxPipeline._pack_latents(latents, 2, 16, 8, 12))
    assert flux.unpack(packed, 8, 12).equal(latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    assert flux.positions(4, 6, torch.device("cpu")).equal(ids)


def test_frozen_released_and_wrapped(folder, latents):
    family = flux.load_folder(folder, **FULL)
    assert not any(
        p.requires_grad for m in (family.transformer, family.vae) for p in m.parameters()
    )
    assert not family.transformer.training
    embeds = family.encode(PROMPTS)
    family.release_text_encoder()
    with pytest.raises(RuntimeError, match="released"):
        family.encode(PROMPTS)
    with pytest.raises(RuntimeError, match="released"):
        family.prompt_length("x")
    with pytest.raises(ValueError, match="pooled"):
        family.predict(latents, torch.tensor(0.5), Embeds(embeds.tokens))
    family.network = lambda hidden_states, **_: (torch.full_like(hidden_states, 7.0),)
    assert (family.predict(latents, torch.tensor(0.5), embeds) == 7.0).all()


def test_times_are_embedded_in_float32(folder, family, latents):
    half = flux.load_folder(folder, dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert {p.dtype for p in half.transformer.parameters()} == {torch.bfloat16}
    told = []
    half.transformer.time_text_embed.register_forward_pre_hook(lambda _m, args: told.append(args))
    embeds = family.encode(PROMPTS)
    sigma = torch.tensor([0.9601, 0.0089])
    velocity = half.predict(latents, sigma, embeds)
    assert velocity.dtype == torch.float32
    assert told[0][0].equal(sigma * 1000) and told[0][1].equal(torch.tensor([3500.0, 3500.0]))
    assert told[0][2].dtype == torch.bfloat16
    expected = family.predict(latents, sigma, embeds)
    assert 0 < (velocity - expected).abs().max() < 0.05 * expected.abs().max()


def test_gradient_checkpointing_gives_the_same_gradient(family, latents):
    weight = family.transformer.x_embedder.weight.requires_grad_(True)
    embeds = family.encode(PROMPTS)
    gradients = []
    for enabled in (False, True):
        family.set_gradient_checkpointing(enabled)
        assert family.transformer.is_gradient_checkpointing is enabled
        loss = family.predict(latents, torch.tensor(0.4), embeds).square().mean()
        gradients.append(torch.autograd.grad(loss, weight)[0])
    family.set_gradient_checkpointing(False)
    weight.requires_grad_(False)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


# --- files ---------------------------------------------------------------------------------------


def written(folder: Path, tokenizer: Path, layout: str, root: Path) -> Files:
    found = fixture.parts(folder)
    suffix = ".ckpt" if layout == "pickle" else ".safetensors"
    if layout == "whole":
        path = fixture.save(fixture.whole(folder), root / f"flux{suffix}")
        return Files(path, t5_tokenizer=tokenizer)
    network = {
        "original": found["network"],
        "pickle": found["network"],
        "comfyui": fixture.prefixed(
            "model.diffusion_model.", fixture.comfyui_names(found["network"])
        ),
        "diffusers": FluxTransformer2DModel.from_pretrained(folder / "transformer").state_dict(),
    }[layout]
    texts = tuple(fixture.save(found[n], root / f"{n}{suffix}") for n in ("t5xxl", "clip_l"))
    vae = fixture.save(found["vae"], root / f"ae{suffix}")
    return Files(fixture.save(network, root / f"flux{suffix}"), texts, vae, tokenizer)


@pytest.mark.parametrize("layout", ["original", "comfyui", "diffusers", "whole", "pickle"])
def test_files_equal_their_folder(folder, family, tokenizer, latents, tmp_path, layout):
    again = flux.load_files(written(folder, tokenizer, layout, tmp_path), **FULL)
    embeds = family.encode(PROMPTS)
    torch.testing.assert_close(again.encode(PROMPTS).tokens, embeds.tokens)
    torch.testing.assert_close(again.encode(PROMPTS).pooled, embeds.pooled)
    sigma = torch.tensor([0.2, 1.0])
    assert again.predict(latents, sigma, embeds).equal(family.predict(latents, sigma, embeds))
    assert again.decode(latents).equal(family.decode(latents))
    assert again.schedule == family.schedule


def test_given_parts_go_before_the_checkpoints_own(folder, tokenizer, latents, tmp_path):
    parts = written(folder, tokenizer, "whole", tmp_path)
    other = fixture.write_folder(tmp_path / "other", "tiny")
    vae = fixture.save(fixture.parts(other)["vae"], tmp_path / "taesd.safetensors")
    own = flux.load_files(parts, **FULL)
    mixed = flux.load_files(Files(parts.network, (), vae, tokenizer), **FULL)
    assert not mixed.decode(latents).equal(own.decode(latents))
    theirs = flux.load_folder(other, **FULL)  # TAESD in diffusers' layout
    difference = mixed.decode(latents).int() - theirs.decode(latents).int()
    assert difference.abs().max() <= 1


def test_fp8_is_read_as_the_numbers_it_stands_for(folder, family, latents, tmp_path, caplog):
    network = fixture.parts(folder)["network"]
    coded, scaled, expected = {}, {"scaled_fp8": torch.zeros(2)}, {}
    for key, tensor in network.items():
        if key.endswith(".weight") and "blocks" in key:
            scale = tensor.abs().max() / 448
            coded[key] = tensor.to(torch.float8_e4m3fn)
            scaled[key] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[key.replace(".weight", ".scale_weight")] = scale
            scaled[key.replace(".weight", ".scale_input")] = torch.tensor(1.0)
            expected[key] = scaled[key].float() * scale
        else:
            coded[key] = scaled[key] = expected[key] = tensor
    embeds, sigma = family.encode(PROMPTS), torch.tensor(0.5)

    def predict(tensors, name):
        path = fixture.save(tensors, tmp_path / name)
        loaded = flux_file.load_transformer(open_weights(path), dtype=torch.float32)
        changed = flux.Flux(
            loaded, family.vae, family.clip, family.t5, family.schedule, family.dtype
        )
        return changed.predict(latents, sigma, embeds)

    with caplog.at_level(logging.INFO):
        ours = predict(scaled, "scaled.safetensors")
    said = [record.message for record in caplog.records if "fp8" in record.message]
    assert len(said) == 1 and said[0].startswith("scaled.safetensors stores weights as scaled fp8:")
    assert ours.equal(predict(expected, "expected.safetensors"))
    plain = {k: t.float() for k, t in coded.items()}
    first = predict(coded, "coded.safetensors")
    assert first.equal(predict(plain, "plain.safetensors"))
    assert first.equal(predict(coded, "coded.ckpt"))
    current = {  # the names of newer files
        k.replace(".scale_weight", ".weight_scale").replace(".scale_input", ".input_scale"): t
        for k, t in scaled.items()
        if k != "scaled_fp8"
    } | {"double_blocks.0.img_attn.qkv.comfy_quant": torch.zeros(9, dtype=torch.uint8)}
    assert ours.equal(predict(current, "current.safetensors"))


# --- the autoencoder -----------------------------------------------------------------------------


def test_autoencoder_in_diffusers_names(folder, family, latents, tmp_path):
    state = AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    weights = open_weights(fixture.save(state, tmp_path / "vae.safetensors"))
    vae = autoencoder.load_autoencoder(weights, flux_file.CONFIGS, dtype=torch.float32)
    assert autoencoder.decode_images(vae, latents, 2).equal(family.decode(latents))


def test_taesd_shift_and_scale_of_comfyui(tmp_path, latents):
    tensors = fixture.original_tiny_vae(fixture.shake(fixture.tiny_vae("tiny")))
    tensors |= {"vae_scale": torch.tensor(0.5), "vae_shift": torch.tensor(0.25)}
    weights = open_weights(fixture.save(tensors, tmp_path / "vae.safetensors"))
    vae = autoencoder.load_autoencoder(weights, flux_file.CONFIGS, dtype=torch.float32)
    raw = (latents / 0.3611 + 0.1159 - 0.25) * 0.5  # what ComfyUI feeds its decoder
    image = vae.decode(raw).sample
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round()
    difference = autoencoder.decode_images(vae, latents, 2) - expected
    assert difference.abs().max() <= 1  # the two ways to the same number round differently


def test_autoencoder_at_full_size():
    """The shipped config is the published model's: its parameters and the names of its file."""
    configs = json.loads((flux_file.CONFIGS / "vae" / "config.json").read_text())
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(configs)
    assert vae.num_parameters() == 83_819_683
    assert len(fixture.original_vae(vae)) == 244


# --- refusals ------------------------------------------------------------------------------------


def header(**changes: tuple[int, ...] | None) -> Header:
    shapes = {
        "double_blocks.0.img_attn.proj.weight": (256, 256),
        "img_in.weight": (256, 64),
        "vector_in.in_layer.weight": (256, 64),
        "guidance_in.in_layer.weight": (256, 256),
    }
    shapes |= {key.replace("__", "."): shape for key, shape in changes.items()}
    return Header(
        "x.safetensors", {key: shape for key, shape in shapes.items() if shape is not None}
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"guidance_in__in_layer__weight": None}, "FLUX.1-schnell: schnell is timestep-distilled"),
        ({"img_in__weight": (256, 384)}, "takes 384 channels .* inpainting or edit model"),
        ({"img_in__weight": None}, "no complete network of FLUX.1"),
        ({"img_in__weight": (250, 64)}, "no complete network of FLUX.1"),
        ({"distilled_guidance_layer__in_proj__weight": (4, 4)}, "is a Chroma model"),
        ({"double_stream_modulation_img__lin__weight": (4, 4)}, "is a FLUX.2 model"),
        ({"txt_in__individual_token_refiner__x": (4, 4)}, "is a HunyuanVideo model"),
        ({"double_blocks__0__img_attn__qkv__weight_scale_2": ()}, "holds nvfp4 weights"),
        ({"double_blocks__0__img_attn__qkv__weight__absmax": (4,)}, "holds 8-bit or 4-bit weights"),
        ({"img_in__weight_scale": (8, 2)}, "holds block-scaled fp8 weights"),
    ],
)
def test_other_networks_are_refused_by_name(changes, told):
    assert flux_header.is_flux(header(**changes))
    with pytest.raises(ModelError, match=told):
        flux_header.judge_flux(header(**changes))


def test_headers_that_pass():
    flux_header.judge_flux(header())
    shapes = {f"model.diffusion_model.{key}": s for key, s in header().shapes.items()}
    flux_header.judge_flux(Header("x", shapes))
    assert flux_header.is_flux(Header("x", shapes))
    lora = {f"diffusion_model.{key[:-7]}.lora_A.weight": s for key, s in header().shapes.items()}
    assert not flux_header.is_flux(Header("x", lora))
    assert not flux_header.is_flux(Header("x", {"joint_blocks.0.x_block.attn.qkv.weight": (4, 4)}))


def test_schnell_folder_is_refused(tmp_path):
    folder = fixture.write_folder(tmp_path / "schnell", guidance=False)
    with pytest.raises(ModelError, match="timestep-distilled"):
        flux.load_folder(folder, **FULL)
    fill = {"in_channels": 384, "out_channels": 64, "guidance_embeds": True}
    with pytest.raises(ModelError, match="384 channels"):
        flux_header.judge_flux_config(fill, "fill")


def test_missing_and_wrong_parts_are_refused(folder, tokenizer, tmp_path):
    parts = written(folder, tokenizer, "original", tmp_path)
    found = fixture.parts(folder)
    t5, clip = parts.text_encoders

    def load(network=parts.network, texts=parts.text_encoders, vae=parts.vae):
        return flux.load_files(Files(network, texts, vae, tokenizer), **FULL)

    with pytest.raises(ModelError, match=r"flux.safetensors comes without CLIP-L: FLUX takes"):
        load(texts=(t5,))
    with pytest.raises(ModelError, match=r"tokens 32 wide and CLIP-L gives 64"):
        load(texts=(clip,))
    with pytest.raises(ModelError, match=r"flux.safetensors holds no VAE"):
        load(vae=None)
    with pytest.raises(ModelError, match=r"clip_l.safetensors holds no VAE"):
        load(vae=clip)
    few = {k: t[:, :4] if k == "decoder.conv_in.weight" else t for k, t in found["vae"].items()}
    with pytest.raises(ModelError, match="4 latent channels and the network takes 16"):
        load(vae=fixture.save(few, tmp_path / "sd1_vae.safetensors"))
    bad = {k: t for k, t in found["vae"].items() if k != "decoder.mid.block_1.conv1.bias"}
    with pytest.raises(ModelError, match=r"incomplete|not laid out"):
        load(vae=fixture.save(bad, tmp_path / "bad_vae.safetensors"))
    bad = {k: t for k, t in found["network"].items() if k != "single_blocks.1.linear2.bias"}
    with pytest.raises(ModelError, match=r"lacks single_transformer_blocks.1.proj_out.bias"):
        load(fixture.save(bad, tmp_path / "bad.safetensors"))
    big = {
        k: torch.cat([t, t], -1) if "final_layer" in k else t for k, t in found["network"].items()
    }
    with pytest.raises(ModelError, match="is expected: it is of another architecture"):
        load(fixture.save(big, tmp_path / "big.safetensors"))
