"""Which loaded flow models are refused, and the files that others are handed over by: no ComfyUI.

What is handed over is compared with ComfyUI's own numbers in comfyui/test_comfyui_handover.py.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import comfy_api_fixture  # noqa: F401 (before the pack's nodes)
import pytest
import torch
from comfyui_pcpo.nodes import families
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.handover import flow as handover_flow
from comfyui_pcpo.nodes.handover.judge import Judged, asked_shift, judge
from comfyui_pcpo.nodes.handover.write import original_name
from comfyui_pcpo.tests.nodes.test_nodes_handover import clip as sd1_clip
from comfyui_pcpo.tests.nodes.test_nodes_handover import kind, patcher
from comfyui_pcpo.trainers.families.flux.spec import FLUX
from comfyui_pcpo.trainers.families.registry import FAMILIES
from safetensors.torch import save_file
from torch import nn

WIDTHS = {"sd3": 24, "flux": 16, "zimage": 20, "klein": 60}
CLASSES = {"sd3": "SD3", "flux": "Flux", "zimage": "ZImage", "klein": "Flux2"}


def sampling(family, shift=3.0, *bases):
    """A model_sampling that tells its network times as the family's does."""
    is_flux = family in ("flux", "klein")
    made = type("ModelSamplingFlux" if is_flux else "Discrete", bases or (CONST,), {})
    times = 1000.0 if family == "sd3" else 1.0
    return made(shift=shift, sigmas=torch.linspace(0.001, 1, 10), timestep=lambda s: s * times)


CONST = type("CONST", (SimpleNamespace,), {})


def model(family, demo=None, schedule=None, network=None, **fields):
    config = {"in_channels": 128 if family == "klein" else 16}
    config |= {"cap_feat_dim": WIDTHS["zimage"], "context_in_dim": WIDTHS[family]}
    config["context_embedder_config"] = {"params": {"in_features": WIDTHS["sd3"]}}
    config |= fields.pop("config", {})
    network = network or nn.Linear(2, 2)
    network.model_config = kind(CLASSES[family], unet_config=config)
    made = patcher(model=network, **fields)
    made.get_model_object = {"model_sampling": schedule or sampling(family)}.__getitem__
    made.get_attachment = lambda name: demo
    return made


def clip(family, layer_idx=None, name=None, **widths):
    """Text encoders by ComfyUI's names, with the numbers they give a token."""
    stage = type(name or FAMILIES[family].comfyui.clip + "_", (nn.Module,), {})()
    for part in ("clip_l", "clip_g", "t5xxl", "qwen3_4b"):
        encoder = nn.Module()
        encoder.transformer = nn.Module()
        table = nn.Embedding(3, widths.get(part, 1))
        encoder.transformer.get_input_embeddings = lambda table=table: table
        setattr(stage, part, encoder if part in widths else None)
    made = sd1_clip(layer_idx=layer_idx)
    made.cond_stage_model = stage
    return made


def vae(name="AutoencodingEngine", channels=16, **fields):
    stage = type(name, (nn.Linear,), {})(2, 2)
    return SimpleNamespace(
        first_stage_model=stage, latent_channels=channels, patcher=patcher(**fields)
    )


def whole(family):
    if family in ("zimage", "klein"):
        return clip(family, qwen3_4b=20)
    return clip(family, clip_l=8, t5xxl=WIDTHS[family])


KLEIN_VAE = vae("AutoencoderKL", channels=128)


def refusal(*parts):
    with pytest.raises(NodeError) as caught:
        judge(*parts)
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".") and re.search("[;,] ", text)
    return text


# --- what can be trained -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("decoder", [vae(), vae("AutoencoderKL"), vae("TAESD")])
def test_plain_flow_models_pass(family, decoder):
    found = judge(model(family), whole(family), decoder)
    assert found == Judged(family, {}, (), is_quantised=False)


@pytest.mark.parametrize(("family", "decoder"), [("zimage", vae()), ("klein", KLEIN_VAE)])
def test_models_that_read_qwen_pass(family, decoder):
    assert judge(model(family), whole(family), decoder) == Judged(family, {}, (), False)


def test_a_part_of_the_text_encoders_is_enough():
    for widths in ({"clip_l": 8}, {"clip_g": 8}, {"t5xxl": 24}, {"clip_l": 8, "clip_g": 8}):
        judge(model("sd3"), clip("sd3", **widths), vae())
    judge(model("flux"), clip("flux", name="SD1ClipModel", clip_l=16), vae())


def test_a_demo_model_is_judged_by_its_own_files_later():
    judge(model("sd3", demo="tiny-flow"), clip("sd3", name="SD1ClipModel", clip_l=8), vae())


def test_names_of_bases():
    assert families.base_of(model("sd3")) == "sd3" and families.base_of(model("flux")) == "flux"
    assert families.base_of(model("sd3", demo="tiny-flow")) == "demo-flow"
    assert [families.base_title(base) for base in ("sd1", "sd3", "flux", "demo-flow")] == [
        *("an SD1.x model", "an SD3.5 model", "a FLUX model", "PCPO Demo Model's tiny-flow")
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Lumina2", "is Lumina-Image 2.0 or NewBie, which cannot"),
        ("ZImagePixelSpace", "is a Z-Image that draws pixels, without an autoencoder, which"),
    ],
)
def test_relatives_of_z_image_are_refused(name, said):
    given = model("zimage")
    given.model.model_config = kind(name, unet_config={})
    assert said in refusal(given, whole("zimage"), vae())


# --- what cannot ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (model("flux", config={"in_channels": 32}), "takes 32 channels, as inpainting and edit"),
        (model("sd3", config={"context_processor_layers": 2}), "layers of its own for the text"),
        (model("zimage", config={"siglip_feat_dim": 1152}), "a part that reads images, as Omni"),
        (model("zimage", schedule=sampling("sd3")), "or use ModelSamplingAuraFlow"),
        (
            model("klein", config={"guidance_embed": True, "hidden_size": 6144}),
            "this MODEL is FLUX.2 [dev], of 32 billion weights and a non-commercial licence:",
        ),
        (
            model("klein", config={"hidden_size": 4096, "context_in_dim": 12288}),
            "this MODEL is FLUX.2 [klein] 9B, whose licence is non-commercial: choose FLUX.2",
        ),
        (
            model("sd3", schedule=sampling("flux")),
            "this MODEL a schedule that is not SD3.5's",
        ),
        (model("flux", schedule=sampling("sd3")), "gives this MODEL a schedule that is not FLUX's"),
        (model("sd3", schedule=sampling("sd3", 0.0)), "a schedule that is not SD3.5's; connect"),
    ],
)
def test_other_networks_are_refused(given, said):
    family = families.family_of_model(given)
    assert said in refusal(given, whole(family), vae())


@pytest.mark.parametrize(
    ("family", "text", "said"),
    [
        (
            "sd3",
            clip("sd3", name="SD1ClipModel", clip_l=24),
            "is SD1ClipModel, which no SD3.5",
        ),
        ("sd3", clip("flux", clip_l=8, t5xxl=24), "is FluxClipModel_, which no SD3.5 reads"),
        ("flux", clip("sd3", clip_l=8, t5xxl=16), "by DualCLIPLoader, type flux"),
        ("flux", clip("flux", name="SD1ClipModel", clip_l=8), "is SD1ClipModel, which no FLUX"),
        ("sd3", clip("sd3"), "which no SD3.5 reads; connect the CLIP of an SD3.5 checkpoint"),
        (
            "flux",
            clip("flux", clip_l=8, t5xxl=9),
            "T5 gives 9 numbers per token and this",
        ),
        ("zimage", clip("klein", qwen3_4b=20), "Flux2TEModel_, which no Z-Image reads; connect"),
        ("klein", clip("zimage", qwen3_4b=20), "by CLIPLoader, type flux2"),
        ("klein", clip("klein"), "is Flux2TEModel_, which no FLUX.2 [klein]"),  # Qwen3-8B, Mistral
        ("klein", clip("klein", qwen3_4b=21), "Qwen3-4B gives 63 numbers per token and this MODEL"),
        ("sd3", clip("sd3", -2, clip_l=8), "CLIP Set Last Layer is at -2, and SD3.5 reads fixed"),
    ],
)
def test_other_text_encoders_are_refused(family, text, said):
    assert said in refusal(model(family), text, vae())


def test_other_autoencoders_are_refused():
    said = refusal(model("sd3"), whole("sd3"), vae("AutoencoderKL", channels=4))
    assert said == "this VAE (AutoencoderKL) is not for SD3.5; connect the VAE of SD3.5"
    said = refusal(model("klein"), whole("klein"), vae("AutoencoderKL"))
    assert said.endswith(
        "is not for FLUX.2 [klein]; connect the VAE of FLUX.2 [klein] (flux2-vae.safetensors)"
    )
    said = refusal(model("flux"), whole("flux"), vae("WanVAE"))
    assert said == "this VAE (WanVAE) is not for FLUX; connect the VAE of FLUX (ae.safetensors)"


# --- the schedule --------------------------------------------------------------------------------


def test_the_shift_of_a_node_is_what_counts():
    assert asked_shift(model("sd3")) is None
    assert asked_shift(model("klein")) is None  # it depends on size and steps
    assert asked_shift(model("zimage")) == 3.0  # ComfyUI's, where 6 is published
    put = {"object_patches": {"model_sampling": 1}}
    assert asked_shift(model("zimage", schedule=sampling("zimage", 6.0), **put)) == 6.0
    assert asked_shift(model("sd3", schedule=sampling("sd3", 5.0), **put)) == 5.0
    found = asked_shift(model("flux", schedule=sampling("flux", 1.15), **put))
    assert found == pytest.approx(3.158, abs=1e-3)


# --- files ---------------------------------------------------------------------------------------


def load_diffusion_model(path):
    """Named as ComfyUI's functions are."""


def load_clip_model_patcher(path):
    """The same of text encoders."""


def load_vae_patcher(path):
    """The same of an autoencoder."""


def a_gguf_loader(path):
    """Someone else's."""


def loaded(function, *paths, **fields):
    first = str(paths[0]) if len(paths) == 1 else [str(path) for path in paths]
    return {"cached_patcher_init": (function, (first, "more")), **fields}


@pytest.fixture
def files(tmp_path):
    """A network with a CLIP-L in it, the same without, CLIP-L, T5 and an autoencoder."""
    network = {
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(6, 2),
        "model.diffusion_model.x_embedder.proj.weight": torch.zeros(2, 16, 2, 2),
    }
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 8)}
    t5 = {
        "encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2),
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": torch.zeros(2, 2),
    }
    inside = {f"text_encoders.clip_l.transformer.{key}": value for key, value in text.items()}
    made = {"whole": network | inside, "network": network, "clip": text, "t5": t5}
    made["vae"] = {"decoder.conv_in.weight": torch.zeros(2, 16, 3, 3)}
    for name, tensors in made.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in made}


def text_of(*paths, **widths):
    made = clip("sd3", **(widths or {"clip_l": 8}))
    made.patcher = patcher(**loaded(load_clip_model_patcher, *paths))
    return made


def parts_of(files, network="network", text=("clip",), decoder="vae", **widths):
    given = model("sd3", **loaded(load_diffusion_model, files[network]))
    encoders = text_of(*(files[name] for name in text), **widths)
    return handover_flow.files_of_parts(
        given, encoders, vae(**loaded(load_vae_patcher, files[decoder]))
    )


def test_parts_are_named_by_their_files(files, tmp_path):
    found = parts_of(files)
    assert found == (files["network"], (files["clip"],), files["vae"])
    assert handover_flow.model_section(found, tmp_path / "copy") == {
        "source": str(files["network"]),
        "text_encoders": [str(files["clip"])],
        "vae": str(files["vae"]),
    }
    found = parts_of(files, "whole", ("whole",), "whole")
    expected = {"source": str(files["whole"]), "text_encoders": [], "vae": None}
    assert handover_flow.model_section(found, tmp_path / "copy") == expected
    found = parts_of(files, text=("clip", "t5"), clip_l=8, t5xxl=24)
    assert found[1] == (files["clip"], files["t5"])


def test_what_is_copied_is_named_by_the_copy(files, tmp_path):
    copy = tmp_path / "copy"
    name = str(copy)
    for parts, expected in (
        ((None, None, None), {"source": name, "text_encoders": [], "vae": None}),
        ((None, (files["clip"],), None), {"text_encoders": [str(files["clip"])], "vae": None}),
        ((files["network"], None, None), {"text_encoders": [name], "vae": name}),
    ):
        assert expected.items() <= handover_flow.model_section(parts, copy).items()


def test_encoders_of_the_network_s_file_are_not_added_to_others(files):
    assert parts_of(files, "whole")[0] == files["whole"]  # the same kind, which is replaced
    assert parts_of(files, "whole", ("t5",), t5xxl=24)[0] is None


def test_no_file_where_something_was_changed(files):
    found = handover_flow.files_of
    plain = loaded(load_diffusion_model, files["network"])
    assert found(patcher(**plain)) == (files["network"],)
    assert found(patcher(**plain | {"patches": {"a": [1]}})) is None
    assert found(patcher(**loaded(a_gguf_loader, files["network"]))) is None
    assert found(patcher()) is None
    files["network"].unlink()
    assert found(patcher(**plain)) is None


def test_no_file_that_the_trainer_cannot_read(files, tmp_path):
    files["network"].write_bytes(b"nothing of the kind")
    assert parts_of(files)[0] is None
    files["vae"].write_bytes(b"nothing of the kind")
    assert parts_of(files)[2] is None
    assert parts_of(files, text=("t5",))[1] is None  # T5, where CLIP-L is loaded
    assert parts_of(files, text=("clip", "clip"))[1] is None


def test_weights_that_a_loader_has_rounded_are_no_more_the_file_s(files, tmp_path):
    def network_file(dtype):
        module = nn.Linear(2, 2)
        module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
        given = model("sd3", network=module, **loaded(load_diffusion_model, files["network"]))
        return handover_flow.files_of_parts(given, text_of(files["clip"]), vae())[0]

    assert network_file(torch.bfloat16) == files["network"]
    assert network_file(torch.float8_e4m3fn) is None
    tensors = {
        "joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(6, 2).to(torch.float8_e4m3fn),
        "x_embedder.proj.weight": torch.zeros(2, 16, 2, 2),
    }
    save_file(tensors, files["network"])
    assert network_file(torch.float8_e4m3fn) == files["network"]
    assert network_file(torch.float8_e5m2) is None
    note = handover_flow.fp8_note((files["network"], (files["clip"],), None))
    assert note == "the fp8 weights of network.safetensors are read as the numbers they stand for"
    assert handover_flow.fp8_note((None, (files["clip"],), None)) is None


def test_a_pickled_file_is_looked_at_without_its_weights(tmp_path):
    file = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(2, 3)}, "more": 1}, file)
    assert handover_flow.header_of_file(file).shapes == {"a": (2, 3)}
    torch.save([torch.zeros(2)], file)
    assert handover_flow.header_of_file(file).shapes == {}


def test_names_of_flux_are_those_of_the_original():
    name = "model.diffusion_model.single_blocks.0.norm.key_norm"
    assert original_name(f"{name}.weight", FLUX.comfyui.renamed) == f"{name}.scale"
