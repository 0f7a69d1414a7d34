"""What the nodes that train do when they run."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .. import graph
from ..jobs.access import admit
from ..jobs.of_comfyui import registry
from . import host as training_host
from . import sockets as own
from .cost import in_words
from .run import Asked, check, earlier, go_on, start

ALIASES = [
    *("train lora", "fine-tune", "finetune", "align", "RL", "reinforcement learning", "RLHF"),
    *("GRPO", "DPO", "quality", "human preference"),
]
"""Words that the nodes which train are found by."""


def job_output() -> Any:
    """What a node that trains gives."""
    return own.Job.Output(
        display_name="job",
        tooltip="For PCPO Job, PCPO Load Job LoRA, PCPO Wait for Job and PCPO Export LoRA.",
    )


def switches() -> list[Any]:
    """The last inputs of a node that trains."""
    return [
        io.Boolean.Input(
            "train_again",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Starts a new job though one with the same inputs is there. Off: that job is "
            "returned; if it was stopped, failed or was lost, it goes on from its last checkpoint.",
        ),
        io.Boolean.Input(
            "dry_run",
            default=False,
            optional=True,
            tooltip="Checks everything and says what the training costs (time, memory, disk), but "
            "starts nothing.",
        ),
    ]


def train(asked: Asked, hidden: Any, *, train_again: bool, dry_run: bool) -> io.NodeOutput:
    """Start what a node asks for, unless it is there already or only its cost is wanted.

    Args:
        hidden: the node's id and the prompt that it is in.
    """
    admit()
    jobs, node = registry(), hidden.unique_id
    before = graph.upstream(hidden.prompt or {}, node, ("model", "clip", "vae"))
    checked = check(asked, jobs, before)
    cost = in_words(checked.cost)
    if dry_run:
        text = f"dry run: {cost}.\nAll is in order, and nothing was started."
        training_host.show_text(text, node)
        return io.NodeOutput(training_host.block_output(None), ui=ui.PreviewText(text))
    training_host.show_text(cost, node)
    id = None if train_again else earlier(jobs, checked.sign)
    if id is not None:
        text = go_on(jobs, id)
    else:
        id, text = start(asked, checked, jobs, training_host.copy_progress(node))
    training_host.show_text(text, node)
    shown = ui.PreviewText(text).as_dict() | {"pcpo_job": [id]}  # panel.js keeps it up to date
    return io.NodeOutput({"id": id}, ui=shown)
