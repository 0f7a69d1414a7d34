"""A LoRA merged into checkpoints and folders, which then predict what the adapters did."""

from __future__ import annotations

from pathlib import Path

import pytest
import sd1_fixture
import sd3_fixture
import sdxl_fixture
import torch
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import TrainConfig
from comfyui_pcpo.trainers.families import Files, ModelError, load_family
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.lora import adapters
from comfyui_pcpo.trainers.lora.merge import write_merged
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def write_lora(model, path: Path) -> Path:
    """A random LoRA of a model, as a run exports it."""
    family = load_family(model, parts="network")
    adapters.add_lora(family.network, 2, 3.0, family.lora_targets, seed=1)
    torch.manual_seed(0)
    for _, layer in adapters.adapters(family.network):
        layer.lora_B["default"].weight.data.normal_(0, 0.1)
    return adapters.export_lora(family.network, path)


def prediction(model, lora: Path | None = None, **options) -> torch.Tensor:
    family = load_family(model, parts="network", **options)
    if lora is not None:
        adapters.load_lora(family.network, lora)
    random = torch.Generator().manual_seed(3)
    shape = family.latent_shape(64, 64)
    config = family.network.config
    width = config.get("cross_attention_dim") or config.joint_attention_dim
    pooled = config.get("pooled_projection_dim")
    pooled = pooled or (config.get("projection_class_embeddings_input_dim") or 1536) - 1536
    embeds = Embeds(
        torch.randn(2, 7, width, generator=random),
        torch.randn(2, pooled, generator=random) if pooled else None,
    )
    x = torch.randn(2, *shape, generator=random)
    timestep = torch.tensor(0.5 if "joint_attention_dim" in config else 501.0)
    with torch.no_grad():
        return family.predict(x, timestep, embeds)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    return sdxl_fixture.write_folder(tmp_path_factory.mktemp("sdxl") / "model", vae="tiny")


def assert_is_merged(model, merged, lora):
    expected = prediction(model, lora)
    assert (prediction(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (prediction(model) - expected).abs().max() > 1e-3


def test_into_a_checkpoint(sdxl, tmp_path):
    notes = {"modelspec.title": "mine", "modelspec.hash_sha256": "0xab"}
    marks = ("v_pred", "ztsnr")
    model = sdxl_fixture.write_file(sdxl, tmp_path / "noob.safetensors", *marks, **notes)
    lora = write_lora(model, tmp_path / "lora.safetensors")
    merged = write_merged(Files(model), lora, tmp_path / "merged.safetensors", {})
    assert_is_merged(model, merged, lora)
    before, after = load_file(model), load_file(merged)
    assert before.keys() == after.keys() and {*marks} <= after.keys()
    changed = {key for key in before if not before[key].equal(after[key])}
    assert len(changed) == len(load_file(lora)) // 3
    assert all(key.startswith("model.diffusion_model.") and "attn" in key for key in changed)
    with safe_open(merged, "pt") as file:
        told = file.metadata()
    assert told == {"modelspec.title": "mine", "pcpo_merged": "lora.safetensors"}


def test_into_a_folder(sdxl, tmp_path):
    lora = write_lora(sdxl, tmp_path / "lora.safetensors")
    merged = write_merged(Files(sdxl), lora, tmp_path / "merged", {})
    assert_is_merged(sdxl, merged, lora)
    names = [
        sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        for root in (sdxl, merged)
    ]
    assert names[0] == names[1]


def test_into_files_of_other_families(tmp_path):
    """SD1.x's original names; SD3's, whose queries, keys and values are one weight."""
    folder = sd1_fixture.write_folder(tmp_path / "sd1")
    sd1 = sd1_fixture.write_single_file(folder, tmp_path / "sd1.safetensors")
    original = sd3_fixture.original_names(sd3_fixture.modules("sd3.5-m"))
    sd3 = sd3_fixture.write(original, tmp_path / "sd3.safetensors")
    for model in (sd1, sd3):
        lora = write_lora(model, tmp_path / f"{model.stem}_lora.safetensors")
        merged = write_merged(Files(model), lora, tmp_path / f"{model.stem}_m.safetensors", {})
        assert_is_merged(model, merged, lora)


def test_the_command_says_what_the_run_knew(sdxl, tmp_path, capsys):
    """The run was told of v-prediction and zero SNR, and the merged file says so to ComfyUI."""
    model = sdxl_fixture.write_file(sdxl, tmp_path / "plain.safetensors")
    about = {"source": str(model), "prediction_type": "v_prediction", "zero_terminal_snr": True}
    run = JobFolder(tmp_path / "run")
    run.start({"config": TrainConfig(model=about).model_dump(mode="json")})
    write_lora(model, run.export(3))
    words = ["export", str(run.root), "--merge-into", str(model)]
    merged = tmp_path / "merged.safetensors"
    assert main([*words, "--out", str(merged)]) == 0
    assert str(merged) in capsys.readouterr().out
    assert {"v_pred", "ztsnr"} <= load_file(merged).keys()
    assert load_family(merged, parts="network").schedule.rescale_betas_zero_snr
    assert main([*words, "--out", str(tmp_path / "folder")]) == 2
    assert "becomes one file, *.safetensors; name folder accordingly" in capsys.readouterr().err


def test_eight_bits_are_refused(sdxl, tmp_path):
    model = sdxl_fixture.write_file(sdxl, tmp_path / "model.safetensors")
    lora = write_lora(model, tmp_path / "lora.safetensors")
    fp8 = {
        key: tensor.to(torch.float8_e4m3fn) if key.endswith("to_q.weight") else tensor
        for key, tensor in load_file(model).items()
    }
    save_file(fp8, tmp_path / "fp8.safetensors")
    with pytest.raises(ModelError, match=r"fp8\.safetensors is stored in 8 bits"):
        write_merged(Files(tmp_path / "fp8.safetensors"), lora, tmp_path / "m.safetensors", {})
