"""Files with numbers that are not finite: refused when read or written, the tensor named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import comfyui_pcpo
import pytest
import torch
from comfyui_pcpo.nodes import names
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.pcpo.finite import all_finite
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import DEMO_FLOW_FOLDER, DEMO_FOLDER
from comfyui_pcpo.trainers.evaluate.images import Model
from comfyui_pcpo.trainers.families import autoencoder, load_family
from comfyui_pcpo.trainers.families.errors import ModelError
from comfyui_pcpo.trainers.families.sd1 import model as sd
from comfyui_pcpo.trainers.finite import NotFiniteError
from comfyui_pcpo.trainers.lora import adapters
from comfyui_pcpo.trainers.lora.safetensors_file import write_safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sd1_fixture import write_folder, write_single_file

NAN, INF = float("nan"), float("inf")
LORA = Path(comfyui_pcpo.__path__[0]) / "trainers" / "demo" / "loras"
QUICK = ("--limit", "1", "--steps", "2")
SHORT = ("--preset", "demo", "--prompts.per-iteration", "2", "--sampler.steps", "2")


def broken(file: Path, name: str, value: float = NAN, target: Path | None = None) -> Path:
    """The file with one number of a tensor replaced."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = value
    save_file(tensors, target or file, metadata=metadata)
    return target or file


def sample(out: Path, *options: str) -> int:
    return main(["sample", *QUICK, "--out", str(out), *options])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
def test_every_dtype_is_seen_through(dtype):
    tensor = torch.ones(3, 5).to(dtype)
    assert all_finite([tensor, torch.arange(3), torch.zeros(0), torch.empty(2, device="meta")])
    tensor.view(torch.uint8).view(-1)[-1] |= 0x7F  # NaN
    tensor.view(torch.uint8).view(-1)[-2] |= 0xFF if dtype.itemsize > 1 else 0
    assert not all_finite([torch.ones(2), tensor])


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "conv_out.weight"),
        ("vae", "decoder.layers.0.weight"),
        ("text_encoder", "text_model.final_layer_norm.weight"),
    ],
)
def test_a_folder_names_the_part_and_the_tensor(tmp_path, part, name, value):
    folder = write_folder(tmp_path / "model", vae="tiny")
    (file,) = (folder / part).glob("*.safetensors")
    name = name if name in load_file(file) else name.removeprefix("text_model.")
    broken(file, name, value)
    with pytest.raises(ModelError, match="not finite") as error:
        load_family(folder)
    assert part in str(error.value) and name.removeprefix("text_model.") in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_checkpoint_file_names_itself_and_the_tensor(tmp_path, suffix):
    file = write_single_file(write_folder(tmp_path / "model"), tmp_path / f"odd.{suffix}")
    name = "first_stage_model.decoder.conv_out.weight"
    if suffix == "ckpt":
        content = torch.load(file)
        content["state_dict"][name][0, 0, 0, 0] = NAN
        torch.save(content, file)
    else:
        broken(file, name)
    with pytest.raises(ModelError, match=rf"odd\.{suffix} .*{name}"):
        load_family(file)


def test_a_flow_folder_names_the_tensor(tmp_path):
    folder = Path(shutil.copytree(DEMO_FLOW_FOLDER, tmp_path / "flow"))
    (file,) = (folder / "transformer").glob("*.safetensors")
    name = sorted(load_file(file))[0]
    broken(file, name)
    with pytest.raises(ModelError, match=rf"{file.name} .*{name}"):
        load_family(folder)


# --- LoRA ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory) -> Path:
    network = load_family(DEMO_FOLDER, parts="network").network
    adapters.add_lora(network, 2, 2.0, ["to_q"], seed=0)
    return adapters.export_lora(network, tmp_path_factory.mktemp("lora") / "good.safetensors")


@pytest.mark.parametrize("end", [".alpha", ".lora_up.weight", ".lora_down.weight"])
def test_a_lora_that_is_not_finite_is_refused_wherever_it_is_used(tmp_path, capsys, lora_file, end):
    name = next(key for key in load_file(lora_file) if key.endswith(end))
    file = str(broken(lora_file, name, NAN, tmp_path / "odd.safetensors"))
    for options in (("--lora", file), ("--irg", f"{file}:0.5")):
        assert sample(tmp_path / "out", *options) == 2
        said = capsys.readouterr().err
        assert "odd.safetensors" in said and name in said and "not finite" in said, said
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="not finite"):  # init_lora
        adapters.load_lora(load_family(DEMO_FOLDER, parts="network").network, file)
    with pytest.raises(NodeError, match=r"odd\.safetensors.*not finite"):
        names.checked_lora(load_file(file), "odd.safetensors")


def test_an_alpha_in_the_header_has_to_be_finite(tmp_path, lora_file):
    kept = {k: t for k, t in load_file(lora_file).items() if not k.endswith(".alpha")}
    notes = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": INF})}
    save_file(kept, tmp_path / "odd.safetensors", metadata=notes)
    with pytest.raises(ModelError, match=r"odd\.safetensors.*alpha of inf"):
        adapters.load_lora(
            load_family(DEMO_FOLDER, parts="network").network, tmp_path / "odd.safetensors"
        )


def test_a_network_that_is_evaluated_has_to_be_finite(tmp_path):
    file = tmp_path / "net.safetensors"
    save_file({"conv_in.weight": torch.tensor([1.0, NAN])}, file)
    model = object.__new__(Model)
    model.state = "base"
    with pytest.raises(ModelError, match=r"net\.safetensors.*conv_in\.weight"):
        model.become(file)


@pytest.mark.parametrize("value", [NAN, 1e30])
def test_nothing_that_is_not_finite_is_written(tmp_path, capsys, lora_file, value):
    """1e30 is finite, and infinite in float16."""
    folder = tmp_path / "run" / "lora"
    folder.mkdir(parents=True)
    name = next(key for key in load_file(lora_file) if key.endswith(".lora_up.weight"))
    broken(lora_file, name, value, folder / "pcpo_00001.safetensors")
    out = tmp_path / "half.safetensors"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert name in said and "half.safetensors" in said and "float16" in said, said
    assert not out.exists()
    with pytest.raises(NotFiniteError):
        write_safetensors({"x": torch.tensor([NAN])}, out)


# --- what comes out of the parts -----------------------------------------------------------------


def test_black_images_end_the_command(tmp_path, capsys, monkeypatch):
    kind = autoencoder.AutoencoderTiny
    decode = kind.decode
    monkeypatch.setattr(kind, "decode", lambda *a, **k: (decode(*a, **k)[0] * NAN,))
    assert sample(tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "autoencoder" in said and "black" in said and not (tmp_path / "out").exists()
    root = tmp_path / "run"
    assert main(["train", *SHORT, "--run.eval-prompts", "1", "--out", str(root)]) == 2
    assert "held-out prompts: the autoencoder" in capsys.readouterr().err


def test_predictions_end_the_command_without_blame_for_storage(tmp_path, capsys, monkeypatch):
    predict = sd.StableDiffusion.predict
    monkeypatch.setattr(sd.StableDiffusion, "predict", lambda *a: predict(*a) * INF)
    assert sample(tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "predictions are not finite" in said and "compute in float32" in said
    root, none = tmp_path / "run", ("--run.eval-prompts", "0")
    assert main(["train", *SHORT, *none, "--out", str(root)]) == 2
    said = capsys.readouterr().err
    assert "iteration 1: the network's predictions are not finite" in said, said
    assert "bfloat16" not in said


def test_embeddings_name_the_prompt(tmp_path, capsys, monkeypatch):
    family = load_family(DEMO_FOLDER)
    family.text_encoder.final_layer_norm.weight.data[0] = NAN
    with pytest.raises(NotFiniteError, match=r"embeddings.*a red circle"):
        family.encode(["a red circle"])
