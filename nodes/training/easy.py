"""Training with six inputs: the job is the one that PCPO Train in Background starts by a preset."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io

from .. import graph
from ..errors import NodeError
from ..families import DEMOS, base_of
from ..jobs.of_comfyui import registry
from ..rewards.make import AUTOMATIC, named_reward, reward_names
from . import prompts as training_prompts
from .begin import ALIASES, job_output, switches, train
from .check_before import base_before, check_room
from .run import Asked
from .settings import Values, family_of_preset, offered_presets, values_of
from .start import lora_name

LENGTHS = {"short": 1 / 3, "usual": 1.0, "long": 3.0}
"""Iterations, as a multiple of the preset's."""
USUAL, FAST = "usual", "fast"
BEHAVIOUR = {"on_server_exit": "continue", "pause_while_busy": False}
"""The defaults of PCPO Train in Background."""


def preset_for(base: str | None, speed: str = USUAL) -> str:
    """The preset of a demo model, or the one of a family that fits the smallest card.

    Args:
        speed: `FAST` for the preset of that name with "-fast".
    """
    fitting = [name for name in offered_presets() if family_of_preset(name) == base]
    usual = [name for name in fitting if name not in DEMOS.values()]
    if base not in DEMOS.values() and not usual:
        raise NodeError("no preset is for this MODEL; use PCPO Train in Background")
    name = str(base) if base in DEMOS.values() else usual[0]
    if speed != FAST:
        return name
    if f"{name}-fast" not in offered_presets():
        raise NodeError(
            "speed is 'fast', which was tried on flow models alone (SD3.5, FLUX, Z-Image, FLUX.2 "
            "[klein], tiny-flow), and this MODEL is none; set it to 'usual'"
        )
    return f"{name}-fast"


def settings_for(base: str | None, how_long: str, speed: str = USUAL) -> Values:
    """A preset's settings with more or fewer iterations."""
    values = values_of({"preset": preset_for(base, speed)})
    values["run"]["iterations"] = max(1, round(values["run"]["iterations"] * LENGTHS[how_long]))
    return values


def prompts_for(base: str | None, text: str) -> training_prompts.Prompts:
    """The prompts of the box, or a set of this pack's where it is empty."""
    if text.strip():
        return training_prompts.from_text(text)
    return training_prompts.from_set("scenes" if base in DEMOS.values() else "varied")


class PCPOTrainEasy(io.ComfyNode):
    """Starts a training job with a preset's settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOTrainEasy",
            display_name="PCPO Train (Easy)",
            category="PCPO/training",
            description="Trains a LoRA with which your model scores higher on a reward, with the "
            "settings that suit the model. It starts the same job as PCPO Train in Background "
            "does with that preset, and the PCPO tab in the sidebar shows it.",
            search_aliases=[*ALIASES, "easy", "simple", "beginner", "beauty"],
            is_output_node=True,
            not_idempotent=True,
            inputs=_inputs(),
            outputs=[job_output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        """Refuse what can be seen in the graph."""

        def check(node: graph.Node) -> None:
            given, base = node["inputs"], base_before(node)
            if isinstance(name := given.get("name"), str):
                lora_name(name)
            if not graph.is_link(chosen := given.get("reward")):
                named_reward(chosen, AUTOMATIC, AUTOMATIC, "")
            if base is not None and (how_long := given.get("how_long")) in LENGTHS:
                settings = settings_for(base, how_long, given.get("speed", USUAL))
                check_room(settings, base, registry().root)

        return graph.verdict(cls, check)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        """Never the same: the job may have ended or been deleted."""
        return time.time_ns()

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        reward: str,
        prompts: str,
        name: str,
        how_long: str,
        train_again: bool = False,
        dry_run: bool = False,
        speed: str = USUAL,
    ) -> io.NodeOutput:
        """Choose a preset, and start."""
        base = base_of(model)
        settings = (
            settings_for(base, how_long, speed)
            if base is not None
            else values_of({"preset": "demo"})
        )
        made = named_reward(reward, AUTOMATIC, AUTOMATIC, "")
        found = prompts_for(base, prompts)
        asked = Asked(model, clip, vae, made, found, settings, name, None, BEHAVIOUR)
        return train(asked, cls.hidden, train_again=train_again, dry_run=dry_run)


def _inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model to train, from a checkpoint loader."),
        io.Clip.Input("clip", tooltip="The model's text encoder. It is not trained."),
        io.Vae.Input("vae", tooltip="The model's autoencoder. It is not trained."),
        io.Combo.Input(
            "reward",
            options=reward_names(),
            default="scene",
            tooltip="What to raise. scene: the demo models' own. aesthetic: beauty. pick_score, "
            "hps_v2_1: what people prefer. The help page of PCPO Reward says which files they "
            "need.",
        ),
        io.String.Input(
            "prompts",
            multiline=True,
            default="",
            tooltip="What to draw, one prompt per line; a few dozen are enough. Empty: prompts "
            "from this pack (scenes for the demo models, varied for others).",
        ),
        io.String.Input(
            "name",
            default="my_pcpo_lora",
            tooltip="Name of the job and of its file in models/loras. If the name is taken, -2, "
            "-3 and so on is added; nothing is overwritten.",
        ),
        io.Combo.Input(
            "how_long",
            options=list(LENGTHS),
            default="usual",
            tooltip="usual: the iterations of the preset. short: a third of them. long: three "
            "times as many; watch the samples, and load an earlier LoRA if they get worse.",
        ),
        *switches(),
        io.Combo.Input(
            "speed",
            options=[USUAL, FAST],
            default=USUAL,
            optional=True,
            tooltip="fast: for flow models (SD3.5, FLUX, Z-Image, FLUX.2 [klein], tiny-flow), "
            "a third to a half less time to the same reward, measured on tiny-flow alone. Images "
            "of a prompt share the start of their way, and three steps are trained at a time.",
        ),
    ]


NODES: tuple[type[io.ComfyNode], ...] = (PCPOTrainEasy,)
