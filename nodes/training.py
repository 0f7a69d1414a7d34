"""Nodes that start a training: prompts, settings, and the job itself."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io, ui

from . import sockets, training_host, training_jobs, training_prompts, training_settings
from . import training_sockets as own
from .access import admit, registry
from .training_estimate import estimate, text_of
from .training_run import Asked, start

CATEGORY = "PCPO/training"
TEXT, FILE = "text", "file"
ON_EXIT = ("continue", "save_and_stop")
EXAMPLE = "a red circle left of a blue square\na green triangle above a yellow circle"


class PCPOPrompts(io.ComfyNode):
    """What a training asks for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        text = io.String.Input(
            "text",
            multiline=True,
            default=EXAMPLE,
            tooltip="One prompt a line, in plain words: weights such as (red:1.2) are read as "
            "letters.",
        )
        file = io.Combo.Input(
            "file",
            options=training_prompts.input_files(),
            tooltip="From ComfyUI's input folder: a .txt file with one prompt per line, a .csv or "
            '.tsv table with a column "prompt", a .json list, or .jsonl lines with a "prompt".',
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
            description="The prompts that a training draws images for: your own, or one of the "
            "sets in this pack. Some dozens are enough; what they have in common is what is "
            "learnt.",
            search_aliases=["prompt list", "dataset", "training prompts", "captions"],
            inputs=[
                io.DynamicCombo.Input(
                    "source",
                    options=options,
                    tooltip="text: the box below. file: from the input folder. scenes: the demo "
                    "model's coloured shapes. animals, animals_activities, varied: for SD1.x.",
                )
            ],
            outputs=[
                own.Prompts.Output(display_name="prompts", tooltip="For PCPO Train in Background."),
                io.Int.Output(display_name="count", tooltip="How many there are."),
                io.String.Output(display_name="text", tooltip="They, one a line."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, source: dict[str, Any]) -> Any:
        """Changes when the file does."""
        return training_prompts.file_sign(source["file"]) if source.get("file") else None

    @classmethod
    def execute(cls, source: dict[str, Any]) -> io.NodeOutput:
        """Read and count them."""
        kind = source["source"]
        if kind == TEXT:
            prompts = training_prompts.from_text(source["text"])
        elif kind == FILE:
            prompts = training_prompts.from_file(source.get("file") or "")
        else:
            prompts = training_prompts.from_set(kind)
        count = len(prompts.texts)
        other = f", and {len(prompts.held_out)} others to judge by" if prompts.held_out else ""
        training_host.show_text(f"{count} prompts{other}", cls.hidden.unique_id)
        return io.NodeOutput(prompts, count, "\n".join(prompts.texts))


class PCPOTrainingSettings(io.ComfyNode):
    """All that can be set."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id=training_settings.NODE_ID,
            display_name="PCPO Training Settings",
            category=CATEGORY,
            description="How to train. A preset brings its values; change what you like. Most of "
            "what there is to set is under the node's advanced inputs.",
            search_aliases=["config", "hyperparameters", "learning rate", "rank", "preset"],
            inputs=[training_settings.preset_input()],
            outputs=[
                own.Settings.Output(
                    display_name="settings", tooltip="For PCPO Train in Background."
                ),
                io.String.Output(
                    display_name="estimate",
                    tooltip="About how long it takes and how much memory, and how that is counted.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, preset: dict[str, Any]) -> io.NodeOutput:
        """Check them together."""
        values = training_settings.values_of(preset)
        text = text_of(estimate(values))
        training_host.show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(values, text)


class PCPOTrainInBackground(io.ComfyNode):
    """A job."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOTrainInBackground",
            display_name="PCPO Train in Background",
            category=CATEGORY,
            description="Trains a LoRA that makes the loaded model score higher by a reward, in a "
            "process of its own: you can go on working. Each time it is queued a new job starts; "
            "the PCPO tab at the side shows it. The LoRA is written to models/loras as it grows.",
            search_aliases=["train lora", "fine-tune", "rl", "reinforcement", "align", "finetune"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[*_sockets(), *_widgets()],
            outputs=[
                own.Job.Output(
                    display_name="job",
                    tooltip="For PCPO Job, PCPO Load Job LoRA, PCPO Wait for Job and PCPO Export "
                    "LoRA.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        """Never the same: queueing again asks for another job."""
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
    ) -> io.NodeOutput:
        """Check everything, hand the model over, and put the job into the queue."""
        admit()
        node = cls.hidden.unique_id
        behaviour = {"on_server_exit": on_server_exit, "pause_while_busy": pause_while_busy}
        lora = training_host.lora_path(continue_from)
        asked = Asked(
            model, clip, vae, reward, prompts, settings, name, lora, behaviour, guard_reward
        )
        id, text = start(asked, registry(), training_host.copying(node))
        training_host.show_text(text, node)
        return io.NodeOutput({"id": id}, ui=ui.PreviewText(text))


def _sockets() -> list[Any]:
    return [
        io.Model.Input(
            "model",
            tooltip="What is trained, as it is loaded: LoRAs that are on it become part of the "
            "base. SD1.x, SD3.5, FLUX.1-dev or PCPO Demo Model.",
        ),
        io.Clip.Input("clip", tooltip="Its text encoder, which is not trained."),
        io.Vae.Input("vae", tooltip="Its autoencoder, which is not trained."),
        sockets.Reward.Input("reward", tooltip="What is to become higher: PCPO Reward's."),
        own.Prompts.Input("prompts", tooltip="What to draw meanwhile: PCPO Prompts'."),
        own.Settings.Input("settings", tooltip="How to train: PCPO Training Settings'."),
        sockets.Reward.Input(
            "guard_reward",
            optional=True,
            tooltip="Not trained on, but looked at by the guard (guard_every of the settings): "
            "where it falls by more than guard_max_fall, training ends. PCPO Reward's.",
        ),
    ]


def _widgets() -> list[Any]:
    return [
        io.String.Input(
            "name",
            default="my_pcpo_lora",
            tooltip="Of the job and of the file in models/loras. Where it is taken, -2, -3 and so "
            "on is added; nothing is overwritten.",
        ),
        io.Combo.Input(
            "continue_from",
            options=training_host.lora_files(),
            default=training_host.NONE,
            advanced=True,
            tooltip="A LoRA to start from instead of none; it must not be on the MODEL as well.",
        ),
        io.Combo.Input(
            "on_server_exit",
            options=list(ON_EXIT),
            default=ON_EXIT[0],
            advanced=True,
            tooltip="What the job does when ComfyUI ends. continue: it goes on, and is found again "
            "at the next start. save_and_stop: it ends after its iteration and can be resumed.",
        ),
        io.Boolean.Input(
            "pause_while_busy",
            default=False,
            advanced=True,
            tooltip="Between iterations, give the memory back and wait while ComfyUI's queue has "
            "work. For cards that cannot hold both.",
        ),
    ]


NODES: tuple[type[io.ComfyNode], ...] = (
    PCPOPrompts,
    PCPOTrainingSettings,
    PCPOTrainInBackground,
    *training_jobs.NODES,
)
