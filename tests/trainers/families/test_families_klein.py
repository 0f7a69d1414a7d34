"""FLUX.2 [klein] 4B: its files in every layout give the network and images that diffusers has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_pcpo.tests.fixtures import klein_fixture as fixture
from comfyui_pcpo.tests.fixtures import qwen_fixture, taef2_fixture
from comfyui_pcpo.tests.fixtures.flux_fixture import save
from comfyui_pcpo.tests.fixtures.sd1_fixture import original_vae
from comfyui_pcpo.trainers.families import Files, ModelError, load_family
from comfyui_pcpo.trainers.families.flow import FlowSchedule
from comfyui_pcpo.trainers.families.header import Header
from comfyui_pcpo.trainers.families.klein import file as klein_file
from comfyui_pcpo.trainers.families.klein import model as klein
from comfyui_pcpo.trainers.families.klein.header import is_distilled
from comfyui_pcpo.trainers.families.registry import family_of_header
from comfyui_pcpo.trainers.families.text.tokenizers import qwen_tokenizer
from comfyui_pcpo.trainers.lora.adapters import add_lora, module_names
from comfyui_pcpo.trainers.run.plans import sigma_grid
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers as diffusers_conversion,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

PROMPTS = ["a red circle left of a blue square", ""]
FULL = {"dtype": torch.float32, "vae_dtype": torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fixture.write_folder(tmp_path_factory.mktemp("models") / "klein")


@pytest.fixture(scope="module")
def family(folder) -> klein.Klein:
    return klein.load_folder(folder, **FULL)


@pytest.fixture(scope="module")
def pipeline(folder) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLFlux2.from_pretrained(folder / "vae"),
        text_encoder=qwen_fixture.tiny_qwen(28),
        tokenizer=qwen_tokenizer(folder / "tokenizer"),
        transformer=Flux2Transformer2DModel.from_pretrained(folder / "transformer"),
    )


def latents(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 128, 4, 6, generator=torch.Generator().manual_seed(2))


# --- names ---------------------------------------------------------------------------------------


def test_conversion_equals_diffusers_at_full_size():
    network = fixture.full_size()
    assert network.num_parameters() == 3_875_544_576
    original = fixture.original_transformer(network.state_dict())
    assert len(original) == 149
    assert original["single_blocks.19.linear1.weight"].shape == (27648, 3072)
    ours, theirs = klein_file.to_diffusers(original), diffusers_conversion(dict(original))
    expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.items()} == expected
    assert {key: tensor.shape for key, tensor in theirs.items()} == expected
    sizes = klein_file.transformer_config({key: tuple(t.shape) for key, t in ours.items()})
    shipped = json.loads((klein_file.CONFIGS / "transformer" / "config.json").read_text())
    for field, value in (shipped | sizes).items():
        own = network.config.get(field)
        assert field == "_class_name" or (list(own) if isinstance(own, tuple) else own) == value


def test_values_equal_diffusers_conversion():
    state = fixture.tiny_transformer().state_dict()
    original = fixture.original_transformer(state)
    ours, theirs = klein_file.to_diffusers(original), diffusers_conversion(dict(original))
    assert ours.keys() == theirs.keys() == state.keys()
    assert all(ours[key].equal(theirs[key]) and ours[key].equal(state[key]) for key in state)
    assert klein_file.to_diffusers(state).keys() == state.keys()  # diffusers' names stay


# --- against diffusers' pipeline -----------------------------------------------------------------


def test_embeddings_equal_the_pipelines(family, pipeline):
    embeds = family.encode(PROMPTS)
    pipeline.tokenizer.chat_template = (
        "{{ '<|im_start|>user\n' + messages[0].content + '<|im_end|>\n' }}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
    )
    expected, _ = pipeline.encode_prompt(PROMPTS, device="cpu")
    assert embeds.tokens.shape == (2, 512, 3 * qwen_fixture.WIDTH) and embeds.lengths is None
    torch.testing.assert_close(embeds.tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sigma", [torch.tensor(0.7), torch.tensor([0.9, 0.2])])
def test_velocity_equals_the_pipelines_network(family, pipeline, sigma):
    embeds, x = family.encode(PROMPTS), latents()
    image = pipeline._prepare_latent_ids(x)
    text = pipeline._prepare_text_ids(embeds.tokens)
    with torch.no_grad():
        ours = family.predict(x, sigma, embeds)
        theirs = pipeline.transformer(
            hidden_states=pipeline._pack_latents(x),
            timestep=sigma.expand(2),
            guidance=None,
            encoder_hidden_states=embeds.tokens,
            txt_ids=text,
            img_ids=image,
            return_dict=False,
        )[0]
    expected = pipeline._unpack_latents_with_ids(theirs, image, 4, 6)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert ours.std() > 0.01


def test_images_equal_the_pipelines(family, pipeline):
    z = latents()
    bn = pipeline.vae.bn
    deviation = (bn.running_var + 1e-4).sqrt()[:, None, None]
    raw = pipeline._unpatchify_latents(z * deviation + bn.running_mean[:, None, None])
    with torch.no_grad():
        image = pipeline.vae.decode(raw).sample
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    ours = family.decode(z)
    assert ours.shape == (2, 3, 64, 96) and ours.equal(expected)
    assert family.latent_shape(96, 64) == (128, 4, 6)
    with pytest.raises(ValueError, match="must be a multiple of 16"):
        family.latent_shape(100, 64)


@pytest.mark.parametrize(("side", "steps"), [(32, 4), (64, 4), (32, 20), (96, 20)])
def test_sigmas_equal_the_pipelines(side, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    mu = compute_empirical_mu(side**2, steps)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    schedule = FlowSchedule(is_empirical=True, patch=1)
    ours = sigma_grid(schedule, (128, side, side), steps, "inverse_count").sigmas
    torch.testing.assert_close(ours.float(), scheduler.sigmas, atol=1e-6, rtol=0)


def test_sigma_is_not_rounded_in_bfloat16(folder):
    family = klein.load_folder(folder, dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    family.transformer.time_guidance_embed.time_proj.register_forward_hook(
        lambda module, args, out: seen.append(args[0])
    )
    family.predict(latents(1), torch.tensor(0.9081), family.encode(["a"]))
    assert seen[0].dtype == torch.float32 and seen[0].item() == pytest.approx(908.1, abs=1e-3)
    assert family.vae.bn.running_var.dtype == torch.float32  # and no statistics of the latents
    assert family.vae.decoder.conv_in.weight.dtype == torch.bfloat16


def test_gradients_are_the_same_with_checkpointing(family):
    embeds, grads = family.encode(PROMPTS), []
    for enabled in (False, True):
        family.set_gradient_checkpointing(enabled)
        x = latents().requires_grad_()
        family.predict(x, torch.tensor([0.7, 0.4]), embeds).square().sum().backward()
        grads.append(x.grad)
    family.set_gradient_checkpointing(False)
    torch.testing.assert_close(*grads)


def test_adapters_reach_the_single_blocks():
    network = fixture.tiny_transformer()
    add_lora(network, 2, 2, klein.Klein.lora_targets)
    with_adapters = {n for n, m in network.named_modules() if hasattr(m, "lora_A")}
    expected = {n for n in module_names(network) if ".attn." in n}
    assert with_adapters == expected and "single_transformer_blocks.1.attn.to_out" in expected


# --- files ---------------------------------------------------------------------------------------


def files_of(folder: Path, to: Path, layout: str) -> Files:
    found, tokenizer = fixture.parts(folder), folder / "tokenizer"
    if layout == "one file":
        network = save(fixture.whole(folder), to / "all.safetensors")
        return Files(network, qwen_tokenizer=tokenizer)
    vae, network = found["vae"], found["network"]
    if layout == "diffusers' names":
        network = Flux2Transformer2DModel.from_pretrained(folder / "transformer").state_dict()
        vae = AutoencoderKLFlux2.from_pretrained(folder / "vae").state_dict()
    if layout == "BFL's autoencoder":
        vae = {
            key.replace("post_quant_conv", "decoder.post_quant_conv")
            if key.startswith("post_quant")
            else f"encoder.{key}"
            if key.startswith("quant_conv")
            else key: tensor
            for key, tensor in vae.items()
        }
        assert "encoder.quant_conv.weight" in vae and "decoder.post_quant_conv.bias" in vae
    return Files(
        save(network, to / "flux-2-klein-base-4b.safetensors"),
        (save(found["qwen"], to / "qwen_3_4b.safetensors"),),
        save(vae, to / "flux2-vae.safetensors"),
        None,
        tokenizer,
    )


@pytest.mark.parametrize(
    "layout", ["one file", "original names", "diffusers' names", "BFL's autoencoder"]
)
def test_files_are_the_folder(folder, family, tmp_path, layout):
    loaded = load_family(files_of(folder, tmp_path, layout))
    embeds = loaded.encode(PROMPTS)
    assert embeds.tokens.equal(family.encode(PROMPTS).tokens)
    with torch.no_grad():
        predicted = [f.predict(latents(), torch.tensor(0.7), embeds) for f in (loaded, family)]
    assert predicted[0].equal(predicted[1])
    assert loaded.decode(latents()).equal(family.decode(latents()))
    assert loaded.schedule == family.schedule and loaded.schedule.is_empirical


def test_taef2_gives_the_images_of_its_own_network(folder, tmp_path):
    files, tiny = files_of(folder, tmp_path, "original names"), taef2_fixture.made()
    vae = save(tiny.whole(), tmp_path / "taef2.safetensors")
    family = load_family(replace(files, vae=vae), parts="network")
    expected = ((tiny.decode(latents()) / 2 + 0.5).clamp(0, 1) * 255).round()
    ours = family.decode(latents()).float()
    assert ours.shape == (2, 3, 64, 96) and (ours - expected).abs().max() <= 1
    assert (ours == expected).float().mean() > 0.999 and expected.std() > 10
    without = {key: t for key, t in tiny.whole().items() if ".pool." not in key}
    save(without, vae)
    assert not load_family(replace(files, vae=vae)).decode(latents()).float().equal(ours)
    save({key: t for key, t in tiny.whole().items() if key != "taesd_decoder.3.pool.1.bias"}, vae)
    with pytest.raises(
        ModelError, match=r"(?s)not laid out as TAESD's: .*layers\.2\.pool\.1\.bias"
    ):
        load_family(replace(files, vae=vae))


@pytest.mark.parametrize("layout", ["original names", "diffusers' names"])
def test_a_narrower_decoder_is_read(folder, tmp_path, layout):
    """FLUX.2's small decoder: the encoder's widths stay."""
    sizes = fixture.VAE | {"block_out_channels": (64, 64, 64, 64)}
    narrow = AutoencoderKLFlux2(**sizes, decoder_block_out_channels=(32, 32, 32, 32))
    narrow.bn.running_mean, narrow.bn.running_var = torch.randn(128), torch.rand(128) + 0.5
    state, found = narrow.state_dict(), files_of(folder, tmp_path, layout)
    if layout == "original names":
        parts = []
        for part, width in (("encoder", 64), ("decoder", 32)):
            plain = AutoencoderKL(**fixture.VAE | {"block_out_channels": (width,) * 4})
            own = {key: t for key, t in state.items() if key.startswith(part)}
            plain.load_state_dict(own, strict=False)
            both = original_vae(plain).items()
            parts.append({key: t for key, t in both if key.startswith(part)})
        rest = {key: t for key, t in state.items() if key.startswith(("quant", "post", "bn"))}
        save(parts[0] | parts[1] | rest, found.vae)
    else:
        save(state, found.vae)
    family = load_family(found, parts="network")
    assert all(t.equal(state[key]) for key, t in family.vae.state_dict().items())
    assert family.decode(latents()).shape == (2, 3, 64, 96)


def test_relatives_are_refused_by_name_and_licence():
    def shapes(**changes: object) -> dict[str, tuple[int, ...]]:
        network = fixture.full_size(**changes)
        original = fixture.original_transformer(
            {k: t for k, t in network.state_dict().items() if "guidance_embedder" not in k}
        )
        return {key: tuple(t.shape) for key, t in original.items()}

    assert family_of_header(Header("ok", shapes())) == "klein"
    nine = {"num_attention_heads": 32, "joint_attention_dim": 12288, "num_layers": 8}
    dev = shapes(num_attention_heads=48, joint_attention_dim=15360)
    coded = shapes() | {"single_blocks.0.linear1.weight_scale_2": (1,)}
    for more, match in (
        (shapes(**nine), r"x is FLUX.2 \[klein\] 9B, whose licence is non-commercial"),
        (dev | {"guidance_in.in_layer.weight": (6144, 256)}, r"x is FLUX.2 \[dev\], .*licence"),
        (coded, "x holds nvfp4 weights"),
        (shapes(in_channels=64), "takes 64 channels a token"),
        ({"double_stream_modulation_img.lin.weight": (1, 1)}, "no complete network"),
    ):
        with pytest.raises(ModelError, match=match):
            family_of_header(Header("x", more))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"guidance_embeds": True}, r"is FLUX.2 \[dev\]"),
        ({"num_attention_heads": 32, "joint_attention_dim": 12288}, "klein. 9B"),
    ],
)
def test_folders_of_relatives_are_refused(tmp_path, fields, match):
    path = fixture.write_folder(tmp_path / "other")
    config = path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(ModelError, match=match):
        load_family(path)


def test_parts_of_other_models_are_refused(folder, tmp_path):
    files, found = files_of(folder, tmp_path, "original names"), fixture.parts(folder)
    plain = {k: t for k, t in found["vae"].items() if not k.startswith("bn.")}
    wide = {k: torch.zeros(32, 32) if "embed_tok" in k else t for k, t in found["qwen"].items()}
    taef1 = {"taesd_decoder.1.weight": torch.zeros(64, 16, 3, 3)}
    other = save(wide, tmp_path / "wide.safetensors")
    for given, match in (
        (Files(files.network, (), files.vae), "comes without its text encoder: give Qwen3-4B"),
        (Files(files.network, files.text_encoders), r"holds no VAE: give FLUX.2's"),
        (Files(files.network, (other,), files.vae), "48 wide and this text encoder gives 96"),
        (
            Files(files.network, files.text_encoders, save(taef1, tmp_path / "taef1.safetensors")),
            r"has 16 latent channels and the network takes 32: .*; give FLUX\.2's .* or TAEF2",
        ),
        (
            Files(
                files.network,
                files.text_encoders,
                save(plain, tmp_path / "vae.safetensors"),
                None,
                files.qwen_tokenizer,
            ),
            "lacks bn.running_mean: it is no VAE of FLUX.2",
        ),
    ):
        with pytest.raises(ModelError, match=match):
            load_family(given)


def test_a_folder_says_whether_it_is_distilled(tmp_path):
    for told in (False, True):
        path = fixture.write_folder(tmp_path / f"flux2-{told}", is_distilled=told)
        assert is_distilled(path) is told
