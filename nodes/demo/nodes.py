"""Nodes of the demo model, which is in this pack: workflows run with nothing to download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ...trainers.config.train_config import DEMO_FLOW_FOLDER, DEMO_FOLDER
from ..errors import NodeError
from ..host import num_patches
from . import parts as demo_parts

CATEGORY = "PCPO/demo"

DEMO_TAG = "pcpo_demo"
"""Attachment of a MODEL that holds the demo's id; clones keep it."""

TINY_SD, TINY_FLOW = "tiny-sd", "tiny-flow"
DEMOS: dict[str, Path] = {TINY_SD: DEMO_FOLDER, TINY_FLOW: DEMO_FLOW_FOLDER}
"""Folder of each demo model by its id."""

LORAS = DEMO_FOLDER.parent / "loras"
NONE = "none"


def demo_id_of(model: Any) -> str | None:
    """Which demo model a MODEL is, patched or not; None for all others."""
    return model.get_attachment(DEMO_TAG)


def lora_files() -> dict[str, Path]:
    """The shipped LoRAs of the demo models by name."""
    return {file.stem: file for file in sorted(LORAS.glob("*.safetensors"))}


class PCPODemoModel(io.ComfyNode):
    """The demo model as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPODemoModel",
            display_name="PCPO Demo Model",
            category=CATEGORY,
            description="A tiny Stable Diffusion model that comes with this pack. In a second, on "
            "any computer, it draws coloured shapes from prompts such as 'a red circle left of a "
            "blue square', 64 x 64 px large. tiny-sd works with all nodes for SD1.x, tiny-flow "
            "with those for SD3.5.",
            search_aliases=["demo", "tiny", "test model", "checkpoint", "example"],
            inputs=[
                io.Combo.Input(
                    "demo",
                    options=list(DEMOS),
                    default=next(iter(DEMOS)),
                    tooltip="tiny-sd: an SD1.x model with 1 million weights. tiny-flow: an SD3 "
                    "model with 4 million weights; use it with EmptySD3LatentImage. Both need "
                    "latents of 64 x 64 px.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The denoising network."),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="The text encoder. It knows only the words of the demo's prompts.",
                ),
                io.Vae.Output(
                    display_name="vae",
                    tooltip="The autoencoder. One latent pixel is 8 x 8 px of the image.",
                ),
            ],
        )

    @classmethod
    def execute(cls, demo: str) -> io.NodeOutput:
        """Load the three parts."""
        folder = DEMOS[demo]
        if not (folder / "vae").is_dir():
            raise NodeError(f"the files of demo '{demo}' are missing; reinstall this pack")
        if demo == TINY_FLOW:
            model = demo_parts.load_flow_model(folder)
            clip = demo_parts.load_clip(folder, **demo_parts.PENULTIMATE)
        else:
            model, clip = demo_parts.load_model(folder), demo_parts.load_clip(folder)
        model.set_attachments(DEMO_TAG, demo)
        return io.NodeOutput(model, clip, demo_parts.load_vae(folder))


class PCPODemoLora(io.ComfyNode):
    """A shipped LoRA of the demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPODemoLora",
            display_name="PCPO Demo LoRA",
            category=CATEGORY,
            description="Puts one of this pack's LoRAs on the demo model. Each was aligned to a "
            "reward by this pack's own training.",
            search_aliases=["demo", "lora", "tiny", "aligned"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of PCPO Demo Model."),
                io.Combo.Input(
                    "lora",
                    options=list(lora_files()) or [NONE],
                    tooltip="The LoRA to load. Its name says which reward it was aligned to.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="1 is the LoRA as trained, 0 the base model.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The MODEL with the LoRA.")],
        )

    @classmethod
    def execute(cls, model: Any, lora: str, strength: float) -> io.NodeOutput:
        """Load the file and patch a clone."""
        file = lora_files().get(lora)
        if file is None:
            raise NodeError(f"this pack has no demo LoRA '{lora}'; update or reinstall it")
        if demo_id_of(model) is None:
            raise NodeError(
                f"demo LoRA '{lora}' fits PCPO Demo Model only, and this MODEL is another; "
                "use ComfyUI's Load LoRA for LoRAs of your own"
            )
        from comfy.sd import load_lora_for_models
        from safetensors.torch import load_file

        tuned, _ = load_lora_for_models(model, None, load_file(file), strength, 0.0)
        if num_patches(tuned) == num_patches(model):
            raise NodeError(
                f"no weight of demo LoRA '{lora}' fits {demo_id_of(model)}; choose the other model "
                "in PCPO Demo Model"
            )
        return io.NodeOutput(tuned)


NODES: tuple[type[io.ComfyNode], ...] = (PCPODemoModel, PCPODemoLora)
