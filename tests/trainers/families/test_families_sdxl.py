"""SDXL: files and folders give diffusers' numbers; what is no SDXL is refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import sdxl_fixture as fixture
import torch
from comfyui_pcpo.trainers.families import ModelError, inspect_source, load_family
from comfyui_pcpo.trainers.families.files import Files
from comfyui_pcpo.trainers.families.header import Header
from comfyui_pcpo.trainers.families.sdxl.file import CONFIGS
from comfyui_pcpo.trainers.families.sdxl.header import judge_sdxl
from comfyui_pcpo.trainers.families.sdxl.model import StableDiffusionXL
from comfyui_pcpo.trainers.families.source import read_config
from comfyui_pcpo.trainers.families.unet_names import original_names
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

PROMPTS = ["a red square", "", "a photo of a cat on a chair, best quality"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fixture.write_folder(tmp_path_factory.mktemp("sdxl") / "model", vae="tiny")


@pytest.fixture(scope="module")
def pipeline(folder):
    clip_l = CLIPTextModel.from_pretrained(folder / "text_encoder")
    clip_g = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
    family = load_family(folder)
    return StableDiffusionXLPipeline(
        vae=family.vae,
        text_encoder=clip_l,
        text_encoder_2=clip_g,
        tokenizer=family.text.clip_l.tokenizer,
        tokenizer_2=family.text.clip_g.tokenizer,
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=None,  # pyright: ignore[reportArgumentType]
        add_watermarker=False,
    )


def files(tmp_path: Path, folder: Path, kind: str) -> Path | Files:
    """The same model as users have it."""
    if kind == "folder":
        return folder
    whole = fixture.write_file(folder, tmp_path / "whole.safetensors")
    if kind == "checkpoint":
        return whole
    if kind == "pickle":
        torch.save({"state_dict": fixture.original_tensors(folder)}, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"
    found = fixture.parts(folder)
    prefix, tensors = {
        "network alone": ("", fixture.network(folder)),
        "saved network": (fixture.UNET, fixture.network(folder)),
        "diffusers network": ("", found["unet"]),
    }[kind]
    parts = {
        "unet": {f"{prefix}{key}": tensor for key, tensor in tensors.items()},
        "clip_l": found["text_encoder"],
        "clip_g": {f"clip_g.{key}": tensor for key, tensor in found["text_encoder_2"].items()},
        "vae": fixture.original_vae(found["vae"]),
    }
    for name, part in parts.items():
        save_file(
            {key: t.contiguous() for key, t in part.items()}, tmp_path / f"{name}.safetensors"
        )
    given = [tmp_path / f"{name}.safetensors" for name in parts]
    return Files(given[0], (given[1], given[2]), given[3])


@pytest.mark.parametrize(
    "kind",
    [
        *("folder", "checkpoint", "pickle", "network alone", "saved network", "diffusers network"),
    ],
)
def test_every_form_of_a_model_gives_diffusers_numbers(tmp_path, folder, pipeline, kind):
    family = load_family(files(tmp_path, folder, kind))
    assert isinstance(family, StableDiffusionXL) and family.base_model_version == "sdxl_base_v1-0"
    embeds = family.encode(PROMPTS)
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, do_classifier_free_guidance=False, device="cpu"
        )
        assert (embeds.tokens - tokens).abs().max() < 1e-5
        assert (embeds.pooled - pooled).abs().max() < 1e-5
        x = torch.randn(3, 4, 16, 24, generator=torch.Generator().manual_seed(0))
        time_ids = torch.tensor([[128, 192, 0, 0, 128, 192]] * 3)
        more = {"text_embeds": pooled, "time_ids": time_ids}
        timestep = torch.tensor(601)
        expected = pipeline.unet(x, timestep, tokens, added_cond_kwargs=more).sample
        assert (family.predict(x, timestep, embeds) - expected).abs().max() < 1e-5
        image = pipeline.vae.decode(x / 0.13025).sample
    ours = family.decode(x)
    assert ours.shape == (3, 3, 128, 192)
    assert (ours / 127.5 - 1 - image.clamp(-1, 1)).abs().max() < 1.01 / 127.5


def test_sizes_of_the_original_image_are_conditions(folder, pipeline):
    family = load_family(folder, settings={"size_condition": (512, 640, 8, 16, 1024, 768)})
    embeds, x = family.encode(PROMPTS[:1]), torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        added = pipeline._get_add_time_ids(
            (512, 640), (8, 16), (1024, 768), torch.float32, text_encoder_projection_dim=48
        )
        more = {"text_embeds": embeds.pooled, "time_ids": added}
        timestep = torch.tensor(11)
        expected = pipeline.unet(x, timestep, embeds.tokens, added_cond_kwargs=more).sample
        assert (family.predict(x, timestep, embeds) - expected).abs().max() < 1e-5
        family.size_condition = None
        assert (family.predict(x, timestep, embeds) - expected).abs().max() > 1e-3


def test_a_prompt_without_the_sizes_that_its_image_drew_is_refused(folder):
    family = load_family(folder, settings={"size_condition": (64, 64, 0, 0, 64, 64) * 2})
    with pytest.raises(ValueError, match="lack the sizes"):
        family.predict(torch.zeros(1, 4, 8, 8), torch.tensor(1), family.encode(["a cat"]))


def test_clip_skip_takes_an_earlier_layer_of_both_clips(folder, pipeline):
    family = load_family(folder, settings={"clip_skip": 3})
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, do_classifier_free_guidance=False, device="cpu", clip_skip=1
        )
    embeds = family.encode(PROMPTS)
    assert (embeds.tokens - tokens).abs().max() < 1e-5
    assert (embeds.pooled - pooled).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("marks", "metadata", "asked", "expected"),
    [
        ((), {}, None, ("epsilon", False, "leading")),
        (("v_pred",), {}, None, ("v_prediction", False, "leading")),
        (("v_pred", "ztsnr"), {}, None, ("v_prediction", True, "trailing")),
        (("v_pred", "ztsnr"), {}, "epsilon", ("epsilon", False, "leading")),
        ((), {"modelspec.prediction_type": "v"}, None, ("v_prediction", False, "leading")),
        ((), {"modelspec.predict_key": "v"}, None, ("v_prediction", False, "leading")),
        ((), {}, "v_prediction", ("v_prediction", False, "leading")),
    ],
)
def test_a_file_says_what_the_network_predicts(
    tmp_path, folder, caplog, marks, metadata, asked, expected
):
    path = fixture.write_file(folder, tmp_path / "noob.safetensors", *marks, **metadata)
    with caplog.at_level(logging.INFO):
        schedule = load_family(path, prediction_type=asked).schedule
    told = (schedule.prediction_type, schedule.rescale_betas_zero_snr, schedule.timestep_spacing)
    assert told == expected
    assert ("is marked" in caplog.text) == bool(marks)
    assert "ComfyUI does not heed" not in caplog.text
    assert (schedule.alpha_bars()[-1] == 0) == expected[1]


def test_names_and_shapes_at_full_size():
    """1680 tensors, as diffusers converts them; the costs are the fact sheet's."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_config(CONFIGS / "unet" / "config.json"))
    state = unet.state_dict()
    originals = {original: name for original, name in original_names(state)}
    assert len(state) == len(originals) == 1680
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    given = {f"{fixture.UNET}{original}": name for original, name in originals.items()}
    assert convert_ldm_unet_checkpoint(given, dict(unet.config)) == {name: name for name in state}


# --- what is refused -----------------------------------------------------------------------------

FULL = {
    "label_emb.0.0.weight": (1280, 2816),
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "input_blocks.6.0.op.weight": (640, 640, 3, 3),
    "middle_block.1.transformer_blocks.0.attn1.to_q.weight": (1280, 1280),
}


def pruned(second: int, third: int) -> dict[str, tuple[int, ...] | None]:
    """A network without a transformer in its middle."""
    return {
        "middle_block.1.transformer_blocks.0.attn1.to_q.weight": None,
        f"input_blocks.4.1.transformer_blocks.{second - 1}.attn1.to_q.weight": (640, 640),
        f"input_blocks.7.1.transformer_blocks.{third - 1}.attn1.to_q.weight": (1280, 1280),
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label_emb.0.0.weight": (1536, 2560)}, "is the SDXL refiner"),
        ({"label_emb.0.0.weight": (1280, 5632)}, "is Kolors"),
        ({"input_blocks.0.0.weight": (320, 9, 3, 3)}, "takes 9 channels .* inpainting"),
        ({"input_blocks.0.0.weight": (320, 8, 3, 3)}, "takes 8 channels .* edit"),
        ({"edm_mean": (4,)}, "is Playground v2.5, whose noise schedule"),
        ({"edm_vpred.sigma_max": ()}, "is CosXL, whose noise schedule"),
        (pruned(2, 4), "is SSD-1B, which has fewer layers"),
        (pruned(1, 2), "is Segmind Vega, which has fewer layers"),
        (pruned(2, 5), "is KOALA-1B"),
        (pruned(2, 6), "is KOALA-700M"),
        ({"input_blocks.0.0.weight": None}, "holds no complete network"),
        ({"x.qweight": (1,), "x.wscales": (1,)}, "holds SVDQuant weights"),
    ],
)
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_relatives_are_refused_by_name(change, said, prefix):
    shapes = {f"{prefix}{key}": shape for key, shape in FULL.items()}
    for key, shape in change.items():
        key = key if key.startswith("edm") else prefix + key
        if shape is None:
            del shapes[key]
        else:
            shapes[key] = shape
    with pytest.raises(ModelError, match=said):
        judge_sdxl(Header("model.safetensors", shapes))
    judge_sdxl(Header("model.safetensors", FULL))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"projection_class_embeddings_input_dim": 2560}, "SDXL refiner"),
        ({"in_channels": 9}, "inpainting model"),
        ({"in_channels": 8}, "edit model"),
        ({"mid_block_type": None}, "fewer layers than SDXL"),
    ],
)
def test_folders_of_relatives_are_refused(tmp_path, change, said):
    (tmp_path / "unet").mkdir()
    config = read_config(CONFIGS / "unet" / "config.json") | change
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        inspect_source(tmp_path)


def test_parts_that_do_not_belong_together_are_refused(tmp_path, folder):
    tensors = fixture.original_tensors(folder)

    def refuse(match: str, *missing: str, **others: torch.Tensor) -> None:
        kept = {k: t for k, t in tensors.items() if not k.startswith(missing or "-")}
        save_file(
            {k: t.contiguous() for k, t in (kept | others).items()}, tmp_path / "a.safetensors"
        )
        with pytest.raises(ModelError, match=match):
            load_family(tmp_path / "a.safetensors")

    refuse("comes without CLIP-G", fixture.CLIP_G)
    refuse("comes without CLIP-L", fixture.CLIP_L)
    refuse("holds no VAE", fixture.VAE)
    first = next(key for key in tensors if key.endswith("attn2.to_k.weight"))
    refuse("tokens 90 wide and the CLIPs give 96", **{first: tensors[first][:, :90].contiguous()})
    refuse("lacks down_blocks", f"{fixture.UNET}input_blocks.1.0.in_layers.0")
    refuse("does not belong", **{f"{fixture.UNET}surplus.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "metadata", "word"),
    [
        ("sd_xl_turbo_1.0.safetensors", {}, "turbo"),
        ("dreamshaperXL_lightningDPMSDE.safetensors", {}, "lightning"),
        ("Hyper-SDXL-8steps.safetensors", {}, "hyper"),
        ("my_dmd2_merge.safetensors", {}, "dmd2"),
        ("model.safetensors", {"modelspec.title": "pony LCM"}, "lcm"),
        ("illustriousXL_v01.safetensors", {"modelspec.title": "Illustrious"}, None),
    ],
)
def test_distilled_models_are_warned_of(tmp_path, folder, caplog, name, metadata, word):
    load_family(fixture.write_file(folder, tmp_path / name, **metadata), parts="network")
    assert (f"{name} has {word!r} in its name or notes" in caplog.text) == bool(word)
    assert bool(caplog.text) == bool(word)


def test_the_autoencoder_is_never_in_float16(folder):
    with pytest.raises(ModelError, match="overflows in float16: load it in bfloat16"):
        load_family(folder, vae_dtype=torch.float16)
    family = load_family(folder, dtype=torch.float16, vae_dtype=torch.bfloat16)
    assert family.vae.dtype == torch.bfloat16 and family.unet.dtype == torch.float16
