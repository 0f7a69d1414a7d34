"""Nodes that start a training: prompts, settings, and the job itself."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io

from .. import graph, sockets
from ..jobs.of_comfyui import registry
from ..names import NODE_ID
from . import check_before, easy
from . import host as training_host
from . import jobs as training_jobs
from . import prompts as training_prompts
from . import settings as training_settings
from . import sockets as own
from .begin import ALIASES, job_output, switches, train
from .estimate import estimate, text_of
from .run import Asked

CATEGORY = "PCPO/training"
TEXT, FILE = "text", "file"
ON_EXIT = ("continue", "save_and_stop")
EXAMPLE = "a red circle left of a blue square\na green triangle above a yellow circle"


class PCPOPrompts(io.ComfyNode):
    """Prompts to train on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        text = io.String.Input(
            "text",
            multiline=True,
            default=EXAMPLE,
            tooltip="One prompt per line, in plain words. Weights such as (red:1.2) are read as "
            "text.",
        )
        file = io.Combo.Input(
            "file",
            options=training_prompts.input_files(),
            tooltip="A file in ComfyUI's input folder: .txt with one prompt per line, .csv or "
            '.tsv with a column "prompt", .json with a list, or .jsonl with a "prompt" in each '
            "line.",
        )
        options = [
            io.DynamicCombo.Option(TEXT, [text]),
            io.DynamicCombo.Option(FILE, [file]),
            *(io.DynamicCombo.Option(name, []) for name in training_prompts.SETS),
        ]
        return io.Schema(
            node_id="PCPOPrompts",
            display_name="PCPO Prompts",
            category=CATEGORY,
            description="The prompts that training draws images for: your own, or a set from this "
            "pack. A few dozen are enough; the LoRA learns what they have in common.",
            search_aliases=["prompt list", "dataset", "training prompts", "captions"],
            inputs=[
                io.DynamicCombo.Input(
                    "source",
                    options=options,
                    tooltip="text: the box below. file: a file in ComfyUI's input folder. scenes: "
                    "coloured shapes, for the demo models. animals, animals_activities, varied: "
                    "sets for all other models.",
                )
            ],
            outputs=[
                own.Prompts.Output(display_name="prompts", tooltip="For PCPO Train in Background."),
                io.Int.Output(display_name="count", tooltip="Number of prompts."),
                io.String.Output(display_name="text", tooltip="The prompts, one per line."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, source: dict[str, Any]) -> Any:
        """Changes when the file does."""
        return training_prompts.file_sign(source["file"]) if source.get("file") else None

    @classmethod
    def validate_inputs(cls, source: dict[str, Any]) -> bool | str:
        """Say before anything runs that there are none."""

        def check(node: graph.Node) -> None:
            if (values := graph.values_of(node, "source")) is not None:
                _prompts_of(values)

        return graph.verdict(cls, check)

    @classmethod
    def execute(cls, source: dict[str, Any]) -> io.NodeOutput:
        """Read and count the prompts."""
        prompts = _prompts_of(source)
        count = len(prompts.texts)
        other = f", and {len(prompts.held_out)} others to judge by" if prompts.held_out else ""
        training_host.show_text(f"{count} prompts{other}", cls.hidden.unique_id)
        return io.NodeOutput(prompts, count, "\n".join(prompts.texts))


def _prompts_of(source: dict[str, Any]) -> training_prompts.Prompts:
    kind = source["source"]
    if kind == TEXT:
        return training_prompts.from_text(source["text"])
    if kind == FILE:
        return training_prompts.from_file(source.get("file") or "")
    return training_prompts.from_set(kind)


class PCPOTrainingSettings(io.ComfyNode):
    """Settings of a training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE_ID,
            display_name="PCPO Training Settings",
            category=CATEGORY,
            description="How to train. Choose a preset, then change what you like. Most settings "
            "are among the node's advanced inputs.",
            search_aliases=[
                *("config", "hyperparameters", "learning rate", "rank", "preset"),
                *("RL", "GRPO", "DPO"),
            ],
            inputs=[training_settings.preset_input()],
            outputs=[
                own.Settings.Output(
                    display_name="settings", tooltip="For PCPO Train in Background."
                ),
                io.String.Output(
                    display_name="estimate",
                    tooltip="Estimated time and memory, and how they were calculated.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, preset: dict[str, Any]) -> bool | str:
        """Check the settings together before anything runs."""
        return graph.verdict(cls, lambda node: check_before.settings_of(node))

    @classmethod
    def execute(cls, preset: dict[str, Any]) -> io.NodeOutput:
        """Check the settings together."""
        values = training_settings.values_of(preset)
        text = text_of(estimate(values))
        training_host.show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(values, text)


class PCPOTrainInBackground(io.ComfyNode):
    """Starts a training job."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOTrainInBackground",
            display_name="PCPO Train in Background",
            category=CATEGORY,
            description="Trains a LoRA with which the model scores higher on a reward. Training "
            "runs in a process of its own, so you can go on working; the PCPO tab in the sidebar "
            "shows it. Run again with the same inputs, and the job is not started twice: one that "
            "was stopped or failed goes on. The LoRA in models/loras is updated during training.",
            search_aliases=ALIASES,
            is_output_node=True,
            not_idempotent=True,
            inputs=[*_sockets(), *_widgets()],
            outputs=[job_output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        """Look at what the node is connected to before anything runs."""
        return graph.verdict(cls, lambda node: check_before.check_training(node, registry().root))

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
        reward: Any,
        prompts: training_prompts.Prompts,
        settings: training_settings.Values,
        name: str,
        continue_from: str,
        on_server_exit: str,
        pause_while_busy: bool,
        guard_reward: Any = None,
        train_again: bool = False,
        dry_run: bool = False,
    ) -> io.NodeOutput:
        """Check everything, hand the model over, and put the job into the queue."""
        behaviour = {"on_server_exit": on_server_exit, "pause_while_busy": pause_while_busy}
        lora = training_host.lora_path(continue_from)
        asked = Asked(
            model, clip, vae, reward, prompts, settings, name, lora, behaviour, guard_reward
        )
        return train(asked, cls.hidden, train_again=train_again, dry_run=dry_run)


def _sockets() -> list[Any]:
    return [
        io.Model.Input(
            "model",
            tooltip="The model to train: SD1.x, SDXL, SD3.5, FLUX.1-dev, Z-Image, FLUX.2 [klein] "
            "4B or PCPO Demo Model. LoRAs on it become part of the base.",
        ),
        io.Clip.Input("clip", tooltip="The model's text encoder. It is not trained."),
        io.Vae.Input("vae", tooltip="The model's autoencoder. It is not trained."),
        sockets.Reward.Input("reward", tooltip="The reward to raise (from PCPO Reward)."),
        own.Prompts.Input("prompts", tooltip="Prompts to draw images for (from PCPO Prompts)."),
        own.Settings.Input("settings", tooltip="How to train (from PCPO Training Settings)."),
        sockets.Reward.Input(
            "guard_reward",
            optional=True,
            tooltip="A second reward (from PCPO Reward), which the guard checks and training does "
            "not use. If it falls by more than guard_max_fall, training ends. guard_every in the "
            "settings turns the guard on.",
        ),
    ]


def _widgets() -> list[Any]:
    return [
        io.String.Input(
            "name",
            default="my_pcpo_lora",
            tooltip="Name of the job and of its file in models/loras. If the name is taken, -2, "
            "-3 and so on is added; nothing is overwritten.",
        ),
        io.Combo.Input(
            "continue_from",
            options=training_host.lora_files(),
            default=training_host.NONE,
            advanced=True,
            tooltip="A LoRA to continue training. Do not load it on the MODEL as well.",
        ),
        io.Combo.Input(
            "on_server_exit",
            options=list(ON_EXIT),
            default=ON_EXIT[0],
            advanced=True,
            tooltip="What the job does when ComfyUI closes. continue: it goes on training, and "
            "the panel shows it again at the next start. save_and_stop: it finishes its iteration "
            "and stops; you can resume it.",
        ),
        io.Boolean.Input(
            "pause_while_busy",
            default=False,
            advanced=True,
            tooltip="Frees the memory between iterations and waits while ComfyUI's queue has "
            "work. For graphics cards that cannot hold both.",
        ),
        *switches(),
    ]


NODES: tuple[type[io.ComfyNode], ...] = (
    PCPOPrompts,
    PCPOTrainingSettings,
    PCPOTrainInBackground,
    *easy.NODES,
    *training_jobs.NODES,
)
