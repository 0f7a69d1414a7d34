"""Which loaded models are refused, and the file that others are written to: without ComfyUI.

What is written is compared with ComfyUI's own numbers in comfyui/test_comfyui_training.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from types import SimpleNamespace

import comfy_api_fixture  # noqa: F401 (before the pack's nodes)
import pytest
import torch
from comfyui_pcpo.nodes.demo.nodes import DEMO_FOLDER
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.handover import demo as handover_demo
from comfyui_pcpo.nodes.handover import hand_over
from comfyui_pcpo.nodes.handover import judge as handover_judge
from comfyui_pcpo.nodes.handover import state as handover_state
from comfyui_pcpo.nodes.handover import write as handover_write
from comfyui_pcpo.nodes.handover.judge import judge
from comfyui_pcpo.nodes.handover.write import Dequantised, original_name, write_checkpoint
from comfyui_pcpo.pcpo.schedules import scaled_linear_alpha_bars, zero_terminal_snr
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.families.flux.spec import FLUX
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

WIDTH = 8


def kind(name, *bases, **fields):
    """An instance of a class of this name."""
    return type(name, bases or (SimpleNamespace,), {})(**fields)


def patcher(**fields):
    names = (
        *("patches", "object_patches", "weight_wrapper_patches", "injections", "hook_patches"),
        *("additional_models", "wrappers", "model_options"),
    )
    plain = {name: {} for name in names} | {"forced_hooks": None, "cached_patcher_init": None}
    return SimpleNamespace(**(plain | fields))


EPS = type("EPS", (SimpleNamespace,), {})
V_PREDICTION = type("V_PREDICTION", (EPS,), {})
X0 = type("X0", (EPS,), {})


def schedule(base=EPS, alpha_bars=None):
    table = scaled_linear_alpha_bars() if alpha_bars is None else alpha_bars
    return type("ModelSampling", (base,), {})(sigmas=(1 / table - 1).sqrt().float())


def model(family="SD15", sampling=None, module=None, channels=4, **fields):
    sizes = {"in_channels": channels, "context_dim": WIDTH}
    network = module or nn.Linear(2, 2)
    network.model_config = kind(family, unet_config=sizes)
    objects = {"model_sampling": sampling or schedule()}
    made = patcher(model=network, **fields)
    made.get_model_object = objects.__getitem__
    made.get_attachment = lambda name: None
    return made


def clip(width=WIDTH, parts=("clip_l",), layer_idx=None, num_layers=12, **fields):
    encoder = nn.Module()
    for part in parts:
        transformer = nn.Module()
        transformer.embeddings = nn.Embedding(3, width)
        transformer.get_input_embeddings = lambda t=transformer: t.embeddings
        inner = nn.Module()
        inner.transformer, inner.num_layers = transformer, num_layers
        setattr(encoder, part, inner)
    return SimpleNamespace(
        cond_stage_model=encoder,
        patcher=patcher(**fields),
        layer_idx=layer_idx,
        apply_hooks_to_conds=None,
    )


def vae(name="AutoencoderKL", channels=4, **fields):
    stage = type(name, (nn.Linear,), {})(2, 2)
    return SimpleNamespace(
        first_stage_model=stage, latent_channels=channels, patcher=patcher(**fields)
    )


def refusal(*parts):
    with pytest.raises(NodeError) as caught:
        judge(*parts)
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".") and re.search("[;,] ", text)
    return text


# --- what can be trained -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "expected"), [(EPS, "epsilon"), (V_PREDICTION, "v_prediction"), (X0, "sample")]
)
def test_a_plain_sd1_model_passes(base, expected):
    found = judge(model(sampling=schedule(base)), clip(), vae())
    assert found == handover_judge.Judged(
        "sd1", {"prediction_type": expected, "zero_terminal_snr": False}, (), is_quantised=False
    )


@pytest.mark.parametrize("ends_in_noise", [False, True])
def test_a_schedule_that_ends_in_pure_noise_is_told(ends_in_noise):
    """ComfyUI's own ends at alpha_bar 4.897e-08 then, and ours at 0."""
    usual = scaled_linear_alpha_bars()
    table = zero_terminal_snr(usual).clamp(min=4.897e-8) if ends_in_noise else usual
    for family in ("SD15", "SDXL"):
        given = model(family, sampling=schedule(V_PREDICTION, table))
        parts = ("clip_l",) if family == "SD15" else ("clip_l", "clip_g")
        text = clip(parts=parts, width=WIDTH // len(parts), layer_idx=-2)
        text.cond_stage_model.__class__ = type("SDXLClipModel", (nn.Module,), {})
        kind = judge(given, text, vae()).kind
        assert kind == {"prediction_type": "v_prediction", "zero_terminal_snr": ends_in_noise}


def test_both_clips_of_sdxl_together_are_as_wide_as_it_reads():
    text = clip(parts=("clip_l", "clip_g"))
    text.cond_stage_model.__class__ = type("SDXLClipModel", (nn.Module,), {})
    said = refusal(model("SDXL"), text, vae())
    assert "CLIP-L and CLIP-G gives 16 numbers per token and this MODEL reads 8;" in said


def sdxl_clip(layer_idx=None):
    text = clip(parts=("clip_l", "clip_g"), width=WIDTH // 2, layer_idx=layer_idx)
    text.cond_stage_model.__class__ = type("SDXLClipModel", (nn.Module,), {})
    return text


@pytest.mark.parametrize("layer", [None, -1, -2, -12])
def test_layers_that_both_clips_of_sdxl_have_pass(layer):
    assert judge(model("SDXL"), sdxl_clip(layer), vae()).family == "sdxl"


def test_layers_that_one_clip_of_sdxl_lacks_are_refused():
    assert refusal(model("SDXL"), sdxl_clip(-13), vae()) == (
        "CLIP Set Last Layer is at -13, and the smaller text encoder of SDXL has 12 layers; set it "
        "to -2, which SDXL was trained with"
    )


RESCALED = {"model_options": {"sampler_cfg_function": len}}
"""What ComfyUI's RescaleCFG leaves on a MODEL."""
EDM = type("ModelSamplingContinuousEDM", (V_PREDICTION,), {})(sigmas=torch.linspace(0.01, 80, 1000))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (model("SDXL", channels=9), "this MODEL takes 9 channels, as inpainting"),
        (model("SDXL", **RESCALED), "no checkpoint can hold (sampler_cfg_function); connect the"),
        (model("SDXL", sampling=EDM), "the noise schedule of this MODEL is not SDXL's; connect"),
        (model("SDXLRefiner"), "this MODEL is the SDXL refiner, which cannot be trained here yet;"),
        (model("SDXL_instructpix2pix"), "this MODEL is SDXL InstructPix2Pix, which cannot"),
        (model("SSD1B"), "this MODEL is SDXL (SSD-1B), which cannot be trained here yet; connect"),
        (model("Segmind_Vega"), "this MODEL is SDXL (Vega), which cannot be trained here yet;"),
        (model("KOALA_700M"), "this MODEL is SDXL (KOALA), which cannot be trained here yet;"),
    ],
)
def test_relatives_of_sdxl_are_refused(given, said):
    assert said in refusal(given, sdxl_clip(), vae())


def test_clip_of_one_file_is_not_sdxls():
    said = refusal(model("SDXL"), clip(), vae())
    assert said.endswith(
        "connect the CLIP of an SDXL checkpoint, or clip_l and clip_g by DualCLIPLoader, type sdxl"
    )


def test_what_changes_no_number_passes():
    harmless = model(
        object_patches={"model_sampling": 1, "manual_cast_dtype": 2},
        model_options={
            "transformer_options": {"optimized_attention_override": 1, "patches": {}},
            "disable_cfg1_optimization": True,
            "sampler_cfg_function": None,
        },
        wrappers={"diffusion_model": {"torch.compile": [1], "gone": []}},
        patches={"a weight": [("a LoRA",)]},
        injections={"taken back": []},
    )
    assert judge(harmless, clip(), vae("TAESD")).kind["prediction_type"] == "epsilon"


# --- other models --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("SDXLRefiner", "the SDXL refiner"),
        ("SSD1B", "SDXL (SSD-1B)"),
        ("FluxInpaint", "FLUX.1 Fill"),
        ("SD20", "SD2.x"),
        ("QwenImage", "QwenImage"),
    ],
)
def test_other_families_are_refused_by_name(family, name):
    said = refusal(model(family), clip(), vae())
    assert said == (
        f"this MODEL is {name}, which cannot be trained here yet; connect an SD1.x, SDXL, SD3.5, "
        "FLUX.2 [klein], FLUX or Z-Image model (or one made from them) or PCPO Demo Model"
    )


def test_schnell_is_refused_with_the_reason():
    said = refusal(model("FluxSchnell"), clip(), vae())
    assert said.startswith("this MODEL is FLUX.1-schnell, which maps noise to an image in a few")
    assert said.endswith("; connect FLUX.1-dev or a model made from it")


def test_inpainting_models_are_refused():
    assert "takes 9 channels, as inpainting" in refusal(model(channels=9), clip(), vae())


@pytest.mark.parametrize(
    "sampling",
    [
        schedule(alpha_bars=scaled_linear_alpha_bars() * 0.99),
        schedule(alpha_bars=scaled_linear_alpha_bars()[::20]),  # LCM's
    ],
)
def test_other_schedules_are_refused(sampling):
    said = refusal(model(sampling=sampling), clip(), vae())
    assert said.startswith("the noise schedule of this MODEL is not SD1.x's; connect the MODEL")


def test_flow_models_of_sd1_are_refused():
    flow = type("CONST", (SimpleNamespace,), {})(sigmas=torch.linspace(1, 0.001, 1000))
    assert "the noise schedule" in refusal(model(sampling=flow), clip(), vae())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (clip(parts=("clip_l", "clip_g")), "which no SD1.x reads; connect the CLIP of an SD1.x"),
        (clip(parts=("t5xxl",)), "which no SD1.x reads; connect the CLIP of an SD1.x"),
        (clip(width=2 * WIDTH), "gives 16 numbers per token and this MODEL reads 8;"),
        (clip(forced_hooks=object()), "hooks are set on this CLIP"),
    ],
)
def test_other_text_encoders_are_refused(text, said):
    assert said in refusal(model(), text, vae())


@pytest.mark.parametrize(
    ("decoder", "said"),
    [
        (vae(channels=16), "this VAE (AutoencoderKL) is not for SD1.x; connect the VAE of SD1.x"),
        (vae("WanVAE"), "this VAE (WanVAE) is not for SD1.x"),
        (vae(patches={"a": [1]}), "a node has changed this VAE; connect the VAE from before"),
    ],
)
def test_other_autoencoders_are_refused(decoder, said):
    assert said in refusal(model(), clip(), decoder)


# --- changes that no file holds ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"injections": {"bypass_lora": [1]}}, "bypass_lora"),
        ({"hook_patches": {"a hook": {"weight": 1}}}, "a hook"),
        ({"object_patches": {"diffusion_model.out": 1}}, "diffusion_model.out"),
        ({"weight_wrapper_patches": {"out.weight": [1]}}, "out.weight"),
        ({"additional_models": {"controlnet": [1]}}, "controlnet"),
        ({"wrappers": {"apply_model": {"mine": [1]}}}, "mine"),
        ({"model_options": {"model_function_wrapper": len}}, "model_function_wrapper"),
        ({"model_options": {"transformer_options": {"patches": {"attn1": [1]}}}}, "patches"),
    ],
)
@pytest.mark.parametrize("part", ["MODEL", "CLIP", "VAE"])
def test_changes_that_are_no_weights_are_refused(changes, name, part):
    parts = {"MODEL": model, "CLIP": clip, "VAE": vae}
    made = [make(**(changes if part == own else {})) for own, make in parts.items()]
    assert refusal(*made) == (
        f"the {part} is changed by a node in a way that no checkpoint can hold ({name}); connect "
        f"the {part} from before that node"
    )


# --- quantised weights ---------------------------------------------------------------------------


class Coded(nn.Module):
    """One weight that is something else."""

    def __init__(self, name, dtype=torch.uint8, layout=None):
        super().__init__()
        weight = torch.zeros(2, 2, dtype=dtype).as_subclass(type(name, (torch.Tensor,), {}))
        if layout:
            weight._layout_cls = layout
        self.weight = weight
        self.named_parameters = lambda: [("weight", self.weight)]


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        (Coded("GGMLTensor"), "GGUF"),
        (Coded("Params4bit"), "NF4"),
        (Coded("Int8Params", torch.int8), "int8"),
        (Coded("QuantizedTensor", torch.bfloat16, "TensorCoreNVFP4Layout"), "NVFP4"),
        (Coded("Parameter", torch.int8), "int8"),
    ],
)
def test_codes_are_refused_by_name(weight, what):
    assert refusal(model(module=weight), clip(), vae()) == (
        f"the MODEL has {what} weights, which cannot be trained; load the fp16, bf16 or fp8 file "
        "of the same model"
    )


def test_fp8_passes_with_a_word():
    plain = Coded("Parameter", torch.float8_e4m3fn)
    scaled = Coded("QuantizedTensor", torch.bfloat16, "TensorCoreFP8E4M3Layout")
    found = judge(model(module=plain), clip(), vae())
    assert found.is_quantised
    assert found.notes == ("the fp8 weights of the MODEL were turned into bfloat16 for training",)
    found = judge(model(module=scaled), clip(), vae())
    assert found.is_quantised
    assert found.notes == ("the scaled fp8 weights of the MODEL were dequantised for training",)


def test_dequantised_weights_are_made_when_written():
    class Code:
        _layout_cls, shape, dtype = "TensorCoreFP8E4M3Layout", (2, 2), torch.bfloat16

        def dequantize(self):
            return torch.full((2, 2), 3.0)

    assert handover_state.layout_of(Code()) == "TensorCoreFP8E4M3Layout"
    assert handover_state.layout_of(torch.zeros(1)) is None
    made = Dequantised(patcher(), "a.weight", Code())
    assert (made.shape, made.dtype) == ((2, 2), torch.bfloat16)


# --- the file that it came from ------------------------------------------------------------------


def load_checkpoint_part(path):
    """Named as ComfyUI's functions are."""


def load_vae(path):
    """The same of a file with one part."""


def loaded(path, function=load_checkpoint_part):
    init = {"cached_patcher_init": (function, (str(path), "more"), 0)}
    return model(**init), clip(**init), vae(**init)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "base.safetensors"
    file.touch()
    monkeypatch.setattr(hand_over, "inspect_source", lambda path: None)
    return file


def test_the_file_of_all_three(checkpoint, tmp_path):
    parts = loaded(checkpoint)
    assert hand_over.common_file(*parts) == checkpoint
    other = tmp_path / "other.safetensors"
    other.touch()
    for i, part in enumerate(loaded(other)):
        mixed = [*parts]
        mixed[i] = part
        assert hand_over.common_file(*mixed) is None
    checkpoint.unlink()
    assert hand_over.common_file(*parts) is None


def test_no_file_where_something_was_changed(checkpoint):
    network, text, decoder = loaded(checkpoint)
    network.patches = {"a": [1]}
    assert hand_over.common_file(network, text, decoder) is None
    network.patches, text.layer_idx = {}, -2
    assert hand_over.common_file(network, text, decoder) is None
    text.layer_idx = -1
    assert hand_over.common_file(network, text, decoder) == checkpoint
    assert hand_over.common_file(*loaded(checkpoint, load_vae)) is None
    assert hand_over.common_file(model(), clip(), vae()) is None


def test_no_file_that_the_trainer_cannot_read(tmp_path):
    broken = tmp_path / "a.safetensors"
    broken.write_bytes(b"nothing of the kind")
    assert hand_over.common_file(*loaded(broken)) is None
    pickled = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(2)}}, pickled)
    assert hand_over.common_file(*loaded(pickled)) == pickled
    torch.save({"callback": os.getcwd}, pickled)  # code, which the trainer does not run
    assert hand_over.common_file(*loaded(pickled)) is None


@pytest.mark.parametrize(
    ("index", "kept"), [(None, None), (-1, None), (-2, 11), (-12, 1), (-13, None), (-24, None)]
)
def test_kept_layers_of_clip_skip(index, kept):
    assert hand_over._kept_layers(clip(layer_idx=index)) == kept


def test_the_demo_model_with_another_prediction(tmp_path):
    changed = model(sampling=schedule(V_PREDICTION))
    changed.get_attachment = lambda name: "tiny-sd"
    with pytest.raises(NodeError, match="prediction, 'epsilon', to 'v_prediction', or its sch"):
        hand_over.hand_over(changed, clip(), vae(), tmp_path / "job", lambda done, size: None)
    assert not list(tmp_path.iterdir()) and DEMO_FOLDER.is_dir()


# --- the file that is written --------------------------------------------------------------------


def saved(monkeypatch, given, **parts):
    """What ComfyUI would save of a MODEL that it has loaded as one of v-prediction."""

    def state_dict_for_saving(network, text, decoder):
        return {**network, **(text or {}), "v_pred": torch.zeros(0)}

    management = SimpleNamespace(load_models_gpu=lambda patchers: None)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    monkeypatch.setitem(sys.modules, "comfy", SimpleNamespace(model_management=management))
    given.model.diffusion_model = nn.Linear(2, 2)
    given.model.state_dict_for_saving = state_dict_for_saving
    given.model_state_dict_for_saving = lambda module, prefix: {f"{prefix}out": torch.ones(1)}
    return handover_write.tensors_of(given, None, None, **parts)


@pytest.mark.parametrize(
    ("bases", "zsnr", "marks"),
    [
        ((V_PREDICTION,), False, {"v_pred"}),
        ((V_PREDICTION,), True, {"v_pred", "ztsnr"}),
        ((EPS,), False, set()),
        ((EPS,), True, set()),  # ComfyUI looks at ztsnr beside v_pred alone
    ],
)
def test_a_copy_says_how_sdxl_is_sampled(monkeypatch, bases, zsnr, marks):
    sampling = type("Both", (*bases, type("ModelSamplingDiscrete", (), {})), {})(zsnr=zsnr)
    found = saved(monkeypatch, model("SDXL", sampling=sampling))
    assert found.keys() == {"diffusion_model.out", *marks}
    assert all(found[mark].numel() == 0 for mark in marks)
    others = saved(monkeypatch, model("SDXL", sampling=sampling), with_network=False)
    assert not others  # a text encoder's file says nothing of the network
    assert "ztsnr" not in saved(monkeypatch, model("SD15", sampling=sampling))  # unread there


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(3, 5, generator=generator)
    return {
        "double": plain.double(),
        "single": plain,
        "half": plain.half(),
        "brain": plain.bfloat16(),
        "fp8": plain.to(torch.float8_e4m3fn),
        "fp8 wide": plain.to(torch.float8_e5m2),
        "whole": torch.arange(-3, 4),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "turned": plain.T,
        "narrow": plain[:, 1:3],
        "every second": plain.flatten()[::2],
        "number": torch.tensor(0.18215),
        "nothing": torch.tensor([]),
        "trained": torch.nn.Parameter(plain),
    }


def test_a_written_file_reads_back_bit_by_bit(tensors, tmp_path):
    file, ticks = tmp_path / "deep" / "model.safetensors", []
    notes = {"pcpo_job": "0123", "text": 'ü "quoted"'}
    write_checkpoint(file, tensors, lambda done, size: ticks.append((done, size)), notes)
    found = load_file(file)
    assert list(found) and set(found) == set(tensors)
    for key, tensor in tensors.items():
        dtype = torch.bfloat16 if key.startswith("fp8") else tensor.dtype
        assert found[key].dtype == dtype and found[key].shape == tensor.shape
        assert found[key].equal(tensor.detach().to(dtype)), key
        if key.startswith("fp8"):
            assert found[key].to(tensor.dtype).float().equal(tensor.float())  # nothing is lost
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", **notes}
    sizes = [done for done, _ in ticks]
    assert sizes == sorted(sizes) and len(ticks) == len(tensors)
    assert ticks[-1] == (ticks[0][1], ticks[0][1])
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        assert length % 8 == 0 and json.loads(stream.read(length))["half"]["dtype"] == "F16"
    assert file.stat().st_size == 8 + length + ticks[-1][1]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_write_that_is_interrupted_leaves_nothing(tensors, tmp_path):
    class Interrupted(Exception):
        """What ComfyUI raises."""

    def tick(done, size):
        if done > size / 2:
            raise Interrupted

    file = tmp_path / "model.safetensors"
    with pytest.raises(Interrupted):
        write_checkpoint(file, tensors, tick)
    assert not list(tmp_path.iterdir())
    file.write_text("old")
    with pytest.raises(Interrupted):
        write_checkpoint(file, tensors, tick)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_full_disk_is_said_before_anything_is_written(tensors, tmp_path, monkeypatch):
    size = handover_write.header_of(tensors)[1]
    short = SimpleNamespace(free=size + handover_write.SPARE - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: short)
    with pytest.raises(
        NodeError, match=r"needs 1 MB and 68 MB in reserve, but .* has 67 MB free; free some space"
    ):
        write_checkpoint(tmp_path / "a.safetensors", tensors, lambda done, size: None)
    assert not list(tmp_path.iterdir())
    short.free += 1
    write_checkpoint(tmp_path / "a.safetensors", tensors, lambda done, size: None)


def test_a_disk_that_fills_meanwhile_is_said(tensors, tmp_path):
    def tick(done, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "a.safetensors"
    with pytest.raises(NodeError, match=r"a.safetensors cannot be written \(No space left on dev"):
        write_checkpoint(file, tensors, tick)
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").write_text("no folder")
    with pytest.raises(NodeError, match="cannot be written"):
        write_checkpoint(tmp_path / "taken" / "a.safetensors", tensors, tick)


def test_one_tensor_at_a_time_is_made(tmp_path):
    alive = []

    class Late:
        shape, dtype = torch.Size([4]), torch.float32

        def to(self, device):
            alive.append(1)
            assert len(alive) == 1
            return torch.ones(4)

    def tick(done, size):
        alive.pop()

    write_checkpoint(tmp_path / "a.safetensors", {"a": Late(), "b": Late()}, tick)
    assert load_file(tmp_path / "a.safetensors")["b"].sum() == 4


def test_names_are_those_of_original_checkpoints():
    changes = FLUX.comfyui.renamed
    assert original_name("a.key_norm.weight", changes) == "a.key_norm.scale"
    assert original_name("a.norm1.weight", changes) == "a.norm1.weight"
    assert original_name("a.key_norm.weight", ()) == "a.key_norm.weight"
    assert handover_write._is_skipped("t.encoder.layers.10.mlp.fc1.weight", 10)
    assert not handover_write._is_skipped("t.encoder.layers.9.mlp.fc1.weight", 10)
    assert not handover_write._is_skipped("t.final_layer_norm.weight", 0)


def test_a_copy_of_the_demo_is_read_to_the_last_digit(tmp_path):
    files = (handover_demo.UNET, handover_demo.TEXT_ENCODER, handover_demo.VAE)
    weights = {
        file: {
            key: value * (1 + 1e-5)
            for key, value in handover_demo._read(DEMO_FOLDER / file).items()
        }
        for file in files
    }
    copy = tmp_path / "copy"
    handover_demo.write_demo(DEMO_FOLDER, weights, copy)
    family = load_family(copy)
    for file, module in zip(files, (family.unet, family.text_encoder, family.vae), strict=True):
        found = {key.removeprefix("text_model."): v for key, v in module.state_dict().items()}
        for key, value in weights[file].items():
            assert found[key.removeprefix("text_model.")].equal(value), key
