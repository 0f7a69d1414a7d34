"""SD3 and SD3.5: folders, single files and separate files give what diffusers and ComfyUI give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_pcpo.tests.fixtures import sd3_fixture as fixture
from comfyui_pcpo.trainers.families import ModelError
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.families.files import Files
from comfyui_pcpo.trainers.families.flow import FlowSchedule
from comfyui_pcpo.trainers.families.header import Header, read_header
from comfyui_pcpo.trainers.families.sd3 import file as sd3_file
from comfyui_pcpo.trainers.families.sd3 import header as sd3_header
from comfyui_pcpo.trainers.families.sd3 import model as sd3
from comfyui_pcpo.trainers.families.text.tokenizers import clip_tokenizer, t5_tokenizer
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.loaders.single_file_utils import (
    convert_sd3_transformer_checkpoint_to_diffusers as diffusers_conversion,
)
from safetensors.torch import load_file, save_file

PROMPTS = ["a red circle left of a blue square", ""]
KINDS = ("sd3.5-m", "sd3.5-l", "sd3-m")


def from_folder(path: Path, dtype: torch.dtype = torch.float32) -> sd3.StableDiffusion3:
    return sd3.load_folder(path, dtype=dtype, vae_dtype=torch.float32)


def from_files(*paths: Path, dtype: torch.dtype = torch.float32, **parts) -> sd3.StableDiffusion3:
    files = Files(paths[0], tuple(paths[1:]), **parts)
    return sd3.load_files(files, dtype=dtype, vae_dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fixture.write_folder(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="module")
def tokenizer(folder) -> Path:
    return folder / "tokenizer_3"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    tensors = fixture.original_names(fixture.modules("sd3.5-m"))
    return fixture.write(tensors, tmp_path_factory.mktemp("models") / "whole.safetensors")


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 16, 8, 12, generator=torch.Generator().manual_seed(2))


def same(ours: sd3.StableDiffusion3, theirs: sd3.StableDiffusion3, latents: torch.Tensor) -> None:
    ours.t5_length = theirs.t5_length = 12
    embeds, expected = ours.encode(PROMPTS), theirs.encode(PROMPTS)
    torch.testing.assert_close(embeds.tokens, expected.tokens, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(embeds.pooled, expected.pooled, rtol=1e-6, atol=1e-6)
    rows = expected[[0, 1, 0]]
    for sigma in (torch.tensor(0.3), torch.tensor([1.0, 0.5, 0.0])):
        a, b = (family.predict(latents, sigma, rows) for family in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert ours.decode(latents).equal(theirs.decode(latents))
    assert ours.schedule == theirs.schedule == FlowSchedule(shift=3.0)


# --- a folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_folder_equals_the_diffusers_pipeline(tmp_path, latents, kind):
    made = fixture.modules(kind)
    path = fixture.write_folder(tmp_path / "sd3", kind)
    family, tokenizer = from_folder(path), t5_tokenizer(path / "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        **made,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=clip_tokenizer("clip_l"),
        tokenizer_2=clip_tokenizer("clip_g"),
        tokenizer_3=tokenizer,
    )
    assert family.base_model_version == kind
    family.t5_length = 20
    options = {"prompt_2": None, "prompt_3": None, "max_sequence_length": 20}
    tokens, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS[0], **options)
    embeds = family.encode(PROMPTS)
    torch.testing.assert_close(embeds.tokens, torch.cat([tokens, negative]))
    torch.testing.assert_close(embeds.pooled, torch.cat([pooled, negative_pooled]))
    assert embeds.tokens.shape == (2, 97, 64) and embeds.tokens.dtype == torch.float32

    sigma, rows = torch.tensor([0.02, 0.5, 1.0]), embeds[[0, 1, 0]]
    expected = pipe.transformer(latents, rows.tokens, rows.pooled, timestep=sigma * 1000).sample
    torch.testing.assert_close(family.predict(latents, sigma, rows), expected)
    one = family.predict(latents, torch.tensor(0.5, dtype=torch.float64), rows)
    torch.testing.assert_close(one[1], expected[1], rtol=1e-5, atol=1e-5)

    config = pipe.vae.config
    raw = latents / config.scaling_factor + config.shift_factor
    pil = pipe.image_processor.postprocess(pipe.vae.decode(raw).sample, output_type="pil")
    images = family.decode(latents, batch=3)
    for image, other in zip(images, pil, strict=True):
        assert (image.permute(1, 2, 0).numpy() == np.asarray(other)).all()
    assert len(images.unique()) > 50  # not all black and white: rounding shows


def test_sharded_half_precision_folder(folder, tmp_path, latents):
    made = fixture.modules("sd3.5-m")
    path = fixture.write_folder(tmp_path / "sd3")
    for name in ("transformer", "text_encoder_3"):
        for file in (path / name).glob("*.safetensors"):
            file.unlink()
        made[name].save_pretrained(path / name, max_shard_size="20KB", variant="fp16")
        assert len(list((path / name).glob("*.fp16*.safetensors"))) > 2
    same(from_folder(path), from_folder(folder), latents)


def test_family_is_frozen_and_in_eval_mode(folder):
    family = from_folder(folder)
    text = family.text
    modules = (family.transformer, family.vae, text.clip_l.model, text.clip_g.model, text.t5.model)
    assert not any(p.requires_grad or p.is_meta for m in modules for p in m.parameters())
    assert not any(b.is_meta for m in modules for b in m.buffers())
    assert not any(module.training for module in modules)
    assert text.t5.model.shared.weight is text.t5.model.encoder.embed_tokens.weight
    assert family.network is family.transformer
    family.release_text_encoder()
    assert family.max_prompt_length == 0
    for method, argument in (("encode", PROMPTS), ("prompt_length", "a")):
        with pytest.raises(RuntimeError, match="released"):
            getattr(family, method)(argument)


def test_predict_goes_through_the_wrapped_network(folder, latents):
    family, told = from_folder(folder), {}

    def network(**given):
        told.update(given)
        return (latents * 2,)

    family.network = network
    embeds = Embeds(torch.zeros(3, 5, 64), torch.zeros(3, 40))
    assert family.predict(latents, torch.tensor(0.25), embeds).equal(latents * 2)
    assert told["timestep"].tolist() == [250.0] * 3
    with pytest.raises(ValueError, match="lack the pooled vector"):
        family.predict(latents, torch.tensor(0.25), Embeds(embeds.tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(folder, latents, dtype):
    full, half = from_folder(folder), from_folder(folder, dtype)
    assert {p.dtype for p in half.transformer.parameters()} == {dtype}
    assert {p.dtype for p in half.text.clip_g.model.parameters()} == {torch.float32}
    assert half.vae.dtype == torch.float32
    embeds, expected = half.encode(PROMPTS), full.encode(PROMPTS)
    assert embeds.tokens.dtype == torch.float32
    assert 0 < (embeds.tokens - expected.tokens).abs().max() < 0.1 * expected.tokens.abs().max()
    rows = expected[[0, 0, 1]]
    out = half.predict(latents, torch.tensor(0.77), rows)
    assert out.dtype == torch.float32
    exact = full.predict(latents, torch.tensor(0.77), rows)
    assert 0 < (out - exact).abs().max() < 0.05 * exact.abs().max()


def test_gradient_checkpointing_gives_the_same_gradient(folder, latents):
    family = from_folder(folder)
    weight = family.transformer.transformer_blocks[0].attn.to_q.weight.requires_grad_(True)
    embeds = family.encode(["a"] * 3)
    gradients = []
    for enabled in (False, True):
        family.set_gradient_checkpointing(enabled)
        assert family.transformer.is_gradient_checkpointing is enabled
        loss = family.predict(latents, torch.tensor(0.1), embeds).square().mean()
        gradients.append(torch.autograd.grad(loss, weight)[0])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_sizes(folder):
    family = from_folder(folder)
    assert family.native_resolution == (128, 128)
    assert family.latent_shape(48, 128) == (16, 16, 6)
    with pytest.raises(ValueError, match="height is 40; it must be a multiple of 16, for example"):
        family.latent_shape(16, 40)
    with pytest.raises(ValueError, match="144 x 16 pixels; this network's positions reach 128"):
        family.latent_shape(144, 16)


def test_prompt_lengths(folder, caplog):
    family = from_folder(folder)
    assert (family.max_prompt_length, family.prompt_length(PROMPTS[0])) == (256, 9)
    family.t5_length = 4
    family.encode(["a red circle"])
    assert not caplog.text
    family.encode(["a red red circle", "a " * 80])
    assert "5 tokens cut to 4 for T5" in caplog.text
    assert "82 tokens cut to 77 for CLIP-L" in caplog.text
    family.text.t5 = None
    assert (family.max_prompt_length, family.prompt_length("a red circle")) == (77, 5)


def test_lora_targets_are_flow_grpos(folder):
    names = [name for name, _ in from_folder(folder).transformer.named_modules()]
    found = [
        n for n in names if n.endswith(tuple(f".{t}" for t in sd3.StableDiffusion3.lora_targets))
    ]
    assert len(found) == 3 * 8 - 1  # the last block gives no text
    assert not any("attn2" in name for name in found)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_file_equals_its_folder(tmp_path, latents, kind, suffix):
    path = fixture.write_folder(tmp_path / "folder", kind)
    file = tmp_path / f"model{suffix}"
    fixture.write(fixture.original_names(fixture.modules(kind)), file)
    ours = from_files(file, t5_tokenizer=path / "tokenizer_3")
    assert ours.base_model_version == kind
    same(ours, from_folder(path), latents)


def test_separate_files_equal_the_folder(tmp_path, folder, tokenizer, latents):
    made = fixture.modules("sd3.5-m")

    def named(prefix, tensors):
        return {prefix + key: tensor for key, tensor in tensors.items()}

    # at this size only the name says that it is CLIP-G
    texts = {
        "t5xxl": fixture.original_t5(made["text_encoder_3"]),
        "clip_g": named("clip_g.", fixture.open_clip(made["text_encoder_2"])),
        "clip_l": fixture.original_clip(made["text_encoder"]),
    }
    paths = [fixture.write(t, tmp_path / f"{name}.safetensors") for name, t in texts.items()]
    network, vae = tmp_path / "network.safetensors", tmp_path / "vae.safetensors"
    fixture.write(fixture.original_transformer(made["transformer"]), network)
    fixture.write(fixture.original_vae(made["vae"]), vae)
    parts = {"vae": vae, "t5_tokenizer": tokenizer}
    same(from_files(network, *paths, **parts), from_folder(folder), latents)
    fixture.write(made["transformer"].state_dict(), network)  # diffusers' own file
    same(from_files(network, *paths, **parts), from_folder(folder), latents)
    with pytest.raises(ModelError, match=r"clip_l.* and .*clip_l.*both hold CLIP-L"):
        from_files(network, paths[2], paths[2], **parts)


def test_a_given_encoder_goes_before_the_checkpoints(tmp_path, checkpoint, tokenizer):
    tensors = fixture.original_clip(fixture.modules("sd3.5-m")["text_encoder"])
    changed = {key: tensor * 1.5 for key, tensor in tensors.items()}
    given = fixture.write(changed, tmp_path / "clip_l.safetensors")
    plain = from_files(checkpoint, t5_tokenizer=tokenizer).encode(PROMPTS)
    other = from_files(checkpoint, given, t5_tokenizer=tokenizer).encode(PROMPTS)
    assert not other.pooled[:, :16].isclose(plain.pooled[:, :16]).any()
    assert other.pooled[:, 16:].equal(plain.pooled[:, 16:])


def test_projection_of_clip_l_is_no_part_of_sd3(tmp_path, checkpoint, tokenizer):
    tensors = load_file(checkpoint)
    projection = "text_encoders.clip_l.transformer.text_projection.weight"
    tensors[projection] = torch.randn_like(tensors[projection])
    path = fixture.write(tensors, tmp_path / "other.safetensors")
    ours, theirs = (
        from_files(p, t5_tokenizer=tokenizer).encode(PROMPTS) for p in (path, checkpoint)
    )
    assert ours.pooled.equal(theirs.pooled)


# Which encoders there are; where in the tokens, and in the pooled vector, theirs are.
PRESENT = {
    "lg": (slice(0, 40), slice(0, 40)),
    "l": (slice(0, 16), slice(0, 16)),
    "g": (slice(16, 40), slice(16, 40)),
    "t": (slice(0, 0), slice(0, 0)),
    "gt": (slice(16, 40), slice(16, 40)),
}


@pytest.mark.parametrize("present", PRESENT)
def test_missing_encoders_are_treated_as_in_comfyui(
    tmp_path, checkpoint, tokenizer, caplog, present
):
    names = {"l": "text_encoders.clip_l.", "g": "text_encoders.clip_g.", "t": "text_encoders.t5"}
    gone = tuple(prefix for letter, prefix in names.items() if letter not in present)
    kept = {k: t for k, t in load_file(checkpoint).items() if not k.startswith(gone)}
    path = fixture.write(kept, tmp_path / "part.safetensors")
    whole = from_files(checkpoint, t5_tokenizer=tokenizer)
    assert "comes without" not in caplog.text
    family = from_files(path, t5_tokenizer=tokenizer)
    said = next(r.getMessage() for r in caplog.records if "comes without" in r.getMessage())
    for letter, title in (("l", "CLIP-L"), ("g", "CLIP-G"), ("t", "T5")):
        assert (title in said.split(":")[0]) != (letter in present)
    whole.t5_length = family.t5_length = 6
    full, part = whole.encode(PROMPTS), family.encode(PROMPTS)
    columns, pooled = PRESENT[present]
    clips = torch.zeros(2, 77, 64)
    clips[..., columns] = full.tokens[:, :77, columns]
    expected = [clips] if present != "t" else []
    expected += [full.tokens[:, 77:]] if "t" in present else []
    assert part.tokens.equal(torch.cat(expected, dim=1))
    vector = torch.zeros(2, 40)
    vector[:, pooled] = full.pooled[:, pooled]
    assert part.pooled.equal(vector)


def quantised(tensors: dict[str, torch.Tensor], *, scaled: bool) -> dict[str, torch.Tensor]:
    """Weights of linear layers as fp8; with a scale beside, as scaled fp8 files have it."""
    out = dict(tensors)
    for key, tensor in tensors.items():
        if not key.endswith(("qkv.weight", "fc1.weight", "wi_0.weight", "q_proj.weight")):
            continue
        scale = (tensor.abs().max() / 448).float() if scaled else torch.tensor(1.0)
        out[key] = (tensor / scale).to(torch.float8_e4m3fn)
        if scaled:
            out[f"{key.removesuffix('.weight')}.scale_weight"] = scale.reshape(1)
            out[f"{key.removesuffix('.weight')}.scale_input"] = torch.ones(1)
    if scaled:
        out["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
        out["text_encoders.t5xxl.transformer.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return out


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_files(tmp_path, checkpoint, tokenizer, latents, scaled, caplog):
    caplog.set_level("INFO")
    stored = quantised(load_file(checkpoint), scaled=scaled)
    save_file(stored, tmp_path / "fp8.safetensors")
    family = from_files(tmp_path / "fp8.safetensors", t5_tokenizer=tokenizer)
    assert caplog.text.count("fp8.safetensors stores weights as") == 1
    plain = {}
    for key, tensor in stored.items():
        if key.endswith(("scale_weight", "scale_input", "scaled_fp8")):
            continue
        scale = stored.get(f"{key.removesuffix('.weight')}.scale_weight", torch.ones(1))
        plain[key] = tensor.float() * (scale if key.endswith(".weight") else 1)
    fixture.write(plain, tmp_path / "plain.safetensors")
    same(family, from_files(tmp_path / "plain.safetensors", t5_tokenizer=tokenizer), latents)


# --- sizes and names at full size ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_full_size_names_and_shapes_equal_diffusers_conversion(kind):
    with torch.device("meta"):
        model = SD3Transformer2DModel(**fixture.FULL[kind])
    assert model.num_parameters() == fixture.PARAMETERS[kind]
    original = fixture.original_transformer(model)
    ours = sd3_file.to_diffusers(original)
    theirs = diffusers_conversion(dict(original))
    assert ours.keys() == theirs.keys() == model.state_dict().keys()
    assert all(ours[key].shape == theirs[key].shape for key in ours)
    read = sd3_file.transformer_config({key: tuple(t.shape) for key, t in ours.items()})
    for field, value in read.items():
        told = model.config[field]
        assert (list(told) if isinstance(told, tuple) else told) == value, field


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_equals_diffusers(kind):
    original = fixture.original_transformer(fixture.modules(kind)["transformer"])
    ours, theirs = sd3_file.to_diffusers(original), diffusers_conversion(dict(original))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)


def test_shipped_configs():
    config = SD3Transformer2DModel.load_config(str(sd3_file.CONFIGS), subfolder="transformer")
    with torch.device("meta"):
        model = SD3Transformer2DModel.from_config(config)
    assert model.num_parameters() == fixture.PARAMETERS["sd3.5-m"]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(sd3_file.CONFIGS / "scheduler")
    told = FlowSchedule.from_dict(scheduler.config)
    assert told == FlowSchedule(shift=3.0, is_dynamic=False, num_train_timesteps=1000)


# --- refusals ------------------------------------------------------------------------------------


def test_incomplete_and_foreign_files_are_refused(tmp_path, checkpoint, tokenizer):
    def refuse(match: str, change) -> None:
        tensors = load_file(checkpoint)
        change(tensors)
        path = fixture.write(tensors, tmp_path / "odd.safetensors")
        with pytest.raises(ModelError, match=match):
            from_files(path, t5_tokenizer=tokenizer)

    def drop(part: str):
        def change(tensors):
            for key in [key for key in tensors if part in key]:
                del tensors[key]

        return change

    def put(key: str, *shape: int):
        return lambda tensors: tensors.update({key: torch.zeros(shape)})

    net, text = "model.diffusion_model.", "text_encoders."
    refuse(r"odd.safetensors lacks transformer_blocks.2.ff.net.2.bias", drop("2.x_block.mlp.fc2.b"))
    refuse("not laid out as SD3's: it lacks 'pos_embed", drop(f"{net}pos_embed"))
    refuse("no complete SD3 network", drop(f"{net}x_embedder"))
    refuse("has a tensor odd.weight", put(f"{net}odd.weight", 1))
    refuse("takes 33 channels", put(f"{net}x_embedder.proj.weight", 32, 33, 2, 2))
    refuse(r"context_embedder.bias of shape \(5,\)", put(f"{net}context_embedder.bias", 5))
    refuse("context_processor", put(f"{net}context_processor.layers.0.attn.qkv.weight", 1))
    refuse("nvfp4", put(f"{net}joint_blocks.0.x_block.attn.qkv.weight_scale_2", 1))
    refuse("holds no text encoder: .*clip_l, clip_g, t5xxl", drop(text))
    refuse("holds no VAE", drop("first_stage_model."))
    refuse(
        "CLIP-L in odd.safetensors lacks .*final_layer", drop("clip_l.transformer.text_model.fi")
    )
    refuse("CLIP-G in odd.safetensors lacks text_projection", drop("clip_g.transformer.text_proj"))
    refuse("T5 in odd.safetensors lacks shared", drop("t5xxl.transformer.shared"))
    refuse("holds a T5 of version 1.0", drop("DenseReluDense.wi_1"))
    bias = f"{text}t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.relative_attention_bias"
    refuse("holds a UMT5", put(f"{bias}.weight", 32, 2))


def test_parts_of_different_models_are_refused(tmp_path, folder, tokenizer):
    other = fixture.clip(40, 2, "gelu")
    path = fixture.write_folder(tmp_path / "sd3")
    other.save_pretrained(path / "text_encoder_2")
    with pytest.raises(ModelError, match="pooled vector of 56 and the network takes 40"):
        from_folder(path)
    path = fixture.write_folder(tmp_path / "more")
    config = fixture.t5().config
    config.d_model = 32
    type(fixture.t5())(config).save_pretrained(path / "text_encoder_3")
    with pytest.raises(ModelError, match="tokens 64 wide, and T5 gives 32"):
        from_folder(path)
    path = fixture.write_folder(tmp_path / "vocabulary")
    config.d_model, config.vocab_size = 64, 20
    type(fixture.t5())(config).save_pretrained(path / "text_encoder_3")
    with pytest.raises(ModelError, match=r"tokenizer of T5 knows .* text encoder 20"):
        from_folder(path)


def test_headers_of_other_models_are_none_of_sd3(checkpoint):
    header = read_header(checkpoint)
    assert sd3_header.is_sd3(header)
    sd3_header.judge_sd3(header)
    sd3_header.judge_sd3_parts(header)
    for key in (
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "joint_transformer_blocks.0.attn.add_k_proj.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",  # FLUX has it too
    ):
        assert not sd3_header.is_sd3(Header("other", {key: (8, 8)}))
    with pytest.raises(ModelError, match="ControlNet"):
        shapes = dict(header.shapes) | {"controlnet_blocks.0.weight": (1,)}
        sd3_header.judge_sd3(Header("x", shapes))
    with pytest.raises(ModelError, match="takes 33 channels"):
        sd3_header.judge_sd3_config({"in_channels": 33}, "folder")
