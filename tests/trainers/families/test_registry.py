"""A family is a folder and its entry in the registry: one made here is found, trained, exported."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import comfyui_pcpo
import pytest
import torch
from comfyui_pcpo.trainers import families
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.families import ModelError, inspect_source, load_family
from comfyui_pcpo.trainers.families.countable import Countable
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.families.header import Header
from comfyui_pcpo.trainers.families.registry import FAMILIES, demo_like, supported_models, titles
from comfyui_pcpo.trainers.families.scheduler import SchedulerConfig
from comfyui_pcpo.trainers.families.sd1.spec import SD1
from comfyui_pcpo.trainers.families.spec import FamilySpec
from comfyui_pcpo.trainers.lora import adapters
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(comfyui_pcpo.__path__[0])


class DotNet(nn.Module):
    """A network of one layer that attends to nothing: colours of a latent and of a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor, colour: Tensor) -> Tensor:
        return self.mix(x.movedim(1, -1) + colour[:, None, None]).movedim(-1, 1)


@dataclass
class Dot:
    """A family of its own kind: latents are images, and a prompt is the length of its words."""

    network: Any
    name: ClassVar[str] = "dot"
    lora_targets: ClassVar[tuple[str, ...]] = ("mix",)
    base_model_version: ClassVar[str] = "dot"
    vae: ClassVar[nn.Module] = nn.Identity()
    max_prompt_length: int = 77
    schedule: ClassVar[SchedulerConfig] = SchedulerConfig(beta_schedule="scaled_linear")
    native_resolution: ClassVar[tuple[int, int]] = (8, 8)
    device: ClassVar[torch.device] = torch.device("cpu")
    brush: float = 1.0

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return 4, height, width

    def encode(self, prompts: list[str]) -> Embeds:
        words = [f"{prompt} a b c d".split()[:4] for prompt in prompts]
        counts = torch.tensor([[len(word) for word in each] for each in words])
        return Embeds(counts[:, None].float() / 10)

    def prompt_length(self, prompt: str) -> int:
        return len(prompt.split())

    def release_text_encoder(self) -> None: ...

    def predict(self, latents: Tensor, timestep: Tensor, prompt_embeds: Embeds) -> Tensor:
        return self.network(latents, prompt_embeds.tokens[:, 0])

    def decode(self, latents: Tensor, batch: int = 8) -> Tensor:
        return ((latents[:, :3].clamp(-1, 1) + 1) * 127.5).to(torch.uint8)

    def set_gradient_checkpointing(self, enabled: bool) -> None: ...

    text_modules: ClassVar[list[nn.Module]] = []

    def place(self, device: torch.device | str, *, text_alone: bool = False) -> None: ...


def load_folder(path: Path, **options: Any) -> Dot:
    network = DotNet()
    network.load_state_dict(load_file(path / "dots" / "w.safetensors"))
    return Dot(network.requires_grad_(False).eval())


def refuse(header: Header) -> None:
    raise ModelError(f"{header.name} is a dot of another colour")


DOT = FamilySpec(
    name="dot",
    package="dot_family",
    title="Dot",
    models="Dot",
    is_flow=False,
    is_large=False,
    options=frozenset({"brush"}),
    settings=("brush",),
    takes=lambda header: "dot" in header.shapes,
    judge=refuse,
    judge_parts=None,
    takes_config=lambda config: config.get("_class_name") == "DotNet",
    judge_config=lambda config, name: None,
    folders=("unet", "dots"),
    network="tiny-sd",
    checkpoints={},
    class_name="DotNet",
    blocks=(),
    channels=4,
    multiple=4,
    text=1,
    encoders=(0, 0),
    steps=3,
    transition="ddim",
    lora_targets=("mix",),
    lora_base="dot",
    lora_architecture="dot/lora",
    is_kohya=False,
    has_original_names=False,
    comfyui=replace(SD1.comfyui, classes=("DotModel",)),
)


@pytest.fixture
def dot(tmp_path, monkeypatch):
    """A folder of the family, which is registered meanwhile."""
    monkeypatch.setitem(FAMILIES, "dot", DOT)
    model, costs = ModuleType("dot_family.model"), ModuleType("dot_family.costs")
    vars(model).update(load_folder=load_folder)
    vars(costs).update(COUNTABLE=Countable(lambda config: (), None, None, None))  # pyright: ignore[reportArgumentType]
    for name, module in (("model", model), ("costs", costs)):
        monkeypatch.setitem(sys.modules, f"dot_family.{name}", module)
    files = {"unet": "config.json", "dots": "config.json", "scheduler": "scheduler_config.json"}
    for part, file in files.items():
        (tmp_path / "dot" / part).mkdir(parents=True)
        (tmp_path / "dot" / part / file).write_text(json.dumps({"_class_name": "DotNet"}))
    torch.manual_seed(0)
    for part in ("unet", "dots"):
        save_file(DotNet().state_dict(), tmp_path / "dot" / part / "w.safetensors")
    return tmp_path / "dot"


def test_a_new_family_is_recognised_and_loaded(dot, tmp_path):
    assert inspect_source(dot).family == "dot"
    family = load_family(dot, settings={"brush": 2.5, "guidance": 3.0, "t5_length": None})
    assert family.brush == 2.5 and not hasattr(family, "guidance")
    save_file({"dot": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="a dot of another colour"):
        inspect_source(tmp_path / "other.safetensors")
    assert supported_models().endswith("Z-Image and Dot") and titles("brush") == "Dot"
    assert adapters.spec_of(family.network) is DOT and demo_like("dot") == "demo"


def test_a_new_family_is_trained_and_exported(dot, tmp_path, capsys):
    out = tmp_path / "run"
    config = tmp_path / "dot.toml"
    config.write_text(
        f"rewards = {{ brightness = 1.0 }}\n[model]\nsource = {str(dot)!r}\n"
        "[optimizer]\nlr = 0.05\n[trainable]\nrank = 2\nalpha = 2.0\n[sampler]\nsteps = 3\n"
        "[prompts]\nper_iteration = 2\nimages_per_prompt = 4\n"
        "[run]\niterations = 2\neval_prompts = 4\n"
    )
    assert main(["train", str(config), "--dry-run"]) == 0
    assert main(["train", str(config), "--out", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["grad_norm"] > 0
    exported = sorted((out / "lora").glob("*.safetensors"))[-1]
    assert set(load_file(exported)) == {
        *(f"transformer.mix.lora_{part}.weight" for part in "AB"),
        "transformer.mix.alpha",
    }
    network = load_folder(dot).network
    assert adapters.load_lora(network, exported).targets == ("mix",)
    assert main(["resume", str(out), "--iterations", "3"]) == 0
    assert main(["train", str(config), "--model.width", "10", "--out", str(tmp_path / "x")]) == 2
    assert "multiple of 4" in capsys.readouterr().err


def test_comfyui_s_class_of_a_new_family_is_known(dot):
    import comfy_api_fixture  # noqa: F401 (before the pack's nodes)
    from comfyui_pcpo.nodes.families import base_title, family_of_model

    config = type("DotModel", (SimpleNamespace,), {})()
    assert family_of_model(SimpleNamespace(model=SimpleNamespace(model_config=config))) == "dot"
    assert base_title("dot") == "a Dot model"


# --- the other way round -------------------------------------------------------------------------


def test_family_names_stand_in_their_folders_alone():
    """All others read the registry."""
    names = re.compile("|".join(rf"[\"']{name}[\"']|families\.{name}\b" for name in FAMILIES))
    files = [f for part in ("pcpo", "trainers", "nodes") for f in (ROOT / part).rglob("*.py")]
    own = Path(families.__file__).parent
    places = {
        f"{file.relative_to(ROOT).as_posix()}: {line.strip()}"
        for file in files
        if not file.is_relative_to(own)
        for line in file.read_text(encoding="utf-8").splitlines()
        if names.search(line)
    }
    assert len(places) <= 4, "\n".join(sorted(places))


def test_each_family_has_its_parts():
    for spec in FAMILIES.values():
        assert spec.part("costs").COUNTABLE and spec.part("model").load_folder
        assert hasattr(spec.part("file"), "original_layers") if spec.has_original_names else True
        assert spec.title and spec.channels and len(spec.folders) >= 2
