"""Nodes that show a job, load its LoRA, wait for it and export it."""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ...trainers.job.folder import JobError, JobFolder
from ...trainers.job.metrics import Thinned, is_number, lines_of
from .. import graph
from ..errors import NodeError
from ..jobs.access import Jobs, public_text
from ..jobs.of_comfyui import registry
from ..jobs.view import MAX_LINES, before_of
from . import export, pictures
from . import host as training_host
from . import sockets as own
from .pick import LATEST, chosen_id, export_of, folder_of, job_inputs, sign_of, which_inputs
from .start import lora_name

CATEGORY = "PCPO/training"
POLL_S = 0.5
ENDED, BROKEN = ("done", "stopped"), ("failed", "lost", "unreadable")
LORA, CHECKPOINT = "LoRA", "merged checkpoint"
MODELS, OUTPUT = "models", "output"
ABSENT: Any = object()
"""In place of an input that is not connected."""


class OfAJob(io.ComfyNode):
    """Base of the nodes that take a job by `job_inputs`."""

    @classmethod
    def validate_inputs(cls, job: str) -> bool | str:
        """Names are looked up when the node runs, for the list may be old."""
        return True

    @classmethod
    def fingerprint_inputs(cls, job: str, from_job: Any = ABSENT, **others: Any) -> str:
        """Changes when the job has moved on.

        A `from_job` that is connected is None here, for ComfyUI does not know it yet.
        """
        return sign_of(registry(), job if from_job is ABSENT else None)


class PCPOJob(OfAJob):
    """A job's state, curves and samples."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOJob",
            display_name="PCPO Job",
            category=CATEGORY,
            description="Shows the progress of a training job; queue it again to refresh. Its "
            "LoRA and its curve also fit ComfyUI's own Load LoRA Model, Save LoRA Weights and "
            "Plot Loss Graph.",
            search_aliases=["training progress", "loss curve", "samples", "status"],
            is_output_node=True,
            inputs=job_inputs(),
            outputs=[
                own.Job.Output(display_name="job", tooltip="The same job."),
                io.String.Output(
                    display_name="state",
                    tooltip="queued, preparing, running, paused, done, stopped, failed, lost or "
                    "unreadable.",
                ),
                io.Int.Output(display_name="iteration", tooltip="Number of finished iterations."),
                io.Image.Output(
                    display_name="curves",
                    tooltip="Plot of the reward and of the share of clipped steps.",
                ),
                io.Image.Output(
                    display_name="samples",
                    tooltip="The newest images for the held-out prompts. Nodes that use them wait "
                    "until there are some.",
                ),
                own.LoraModel.Output(
                    display_name="lora",
                    tooltip="The newest LoRA, for ComfyUI's Load LoRA Model and Save LoRA Weights.",
                ),
                own.LossMap.Output(
                    display_name="loss",
                    tooltip="Minus the mean reward of each iteration, for ComfyUI's Plot Loss "
                    "Graph.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, job: str, from_job: dict[str, Any] | None = None) -> io.NodeOutput:
        """Read the job's folder."""
        jobs = registry()
        id = chosen_id(jobs, job, from_job)
        folder, now = folder_of(jobs, id), _summary(jobs, id)
        title, loss = line_of(now), array("d")
        thinned = Thinned(MAX_LINES)
        for line in lines_of(folder.metrics_file):
            thinned.add(line)
            if is_number(reward := line.get("reward")):
                loss.append(-reward)
        training_host.show_text(title, cls.hidden.unique_id)
        picture = pictures.curves(thinned.lines, before_of(folder), title)
        samples = pictures.latest_samples(folder.samples)
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(title).as_dict()
        return io.NodeOutput(
            {"id": id},
            now["state"],
            now["iteration"],
            picture,
            training_host.block_output(None) if samples is None else samples,
            _lora_model(folder),
            _loss_map(loss.tolist(), now["name"]),
            ui=shown,
        )


def _summary(jobs: Jobs, id: str) -> dict[str, Any]:
    """A job's state."""
    try:
        return jobs.summary(id)
    except JobError as error:
        raise NodeError(str(error)) from error


def line_of(now: dict[str, Any]) -> str:
    """A job's state in one line.

    >>> line_of({"name": "a", "state": "done", "iteration": 2, "of": 2, "message": "ended well"})
    'a: done, 2 of 2 iterations; ended well'
    """
    text = f"{now['name']}: {now['state']}, {now['iteration']} of {now['of']} iterations"
    return f"{text}; {now['message']}" if now.get("message") else text


def _lora_model(folder: JobFolder) -> Any:
    try:
        return export.read_lora(export_of(folder, LATEST, 0))
    except NodeError as error:
        return training_host.block_output(str(error))


def _loss_map(values: list[float], name: str) -> Any:
    if len(set(values)) < 2:  # Plot Loss Graph divides by their spread
        return training_host.block_output(f"the job {name!r} has no curve yet; queue again later")
    return {"loss": values}


class PCPOLoadJobLora(OfAJob):
    """A job's LoRA on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOLoadJobLora",
            display_name="PCPO Load Job LoRA",
            category=CATEGORY,
            description="Puts the LoRA of a training job on the model, even during training: "
            "queue again to use the newest one.",
            search_aliases=["load lora", "trained lora", "checkpoint", "aligned"],
            inputs=[
                io.Model.Input("model", tooltip="The model that was trained, without the LoRA."),
                *job_inputs(),
                *which_inputs(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="1 is the LoRA as trained, 0 the base model.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The model's text encoder, which is passed on."
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with the LoRA."),
                io.Clip.Output(display_name="clip", tooltip="The CLIP, if one is connected."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        job: str,
        which: str,
        iteration: int,
        strength: float,
        from_job: dict[str, Any] | None = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        """Find the file, and load it as Load LoRA does."""
        jobs = registry()
        folder = folder_of(jobs, chosen_id(jobs, job, from_job))
        file = export_of(folder, which, iteration)
        return io.NodeOutput(*export.with_lora(folder, file, model, clip, strength))


class PCPOWaitForJob(io.ComfyNode):
    """Waits for a job."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOWaitForJob",
            display_name="PCPO Wait for Job",
            category=CATEGORY,
            description="Holds the queue until a training job has ended, so that the nodes after "
            "it use its result. Nothing else runs meanwhile. Interrupt ends the wait, not the "
            "training.",
            search_aliases=["wait", "barrier", "batch", "until done"],
            inputs=[own.Job.Input("job", tooltip="The job of PCPO Train in Background.")],
            outputs=[own.Job.Output(display_name="job", tooltip="The same job, ended.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Changes when a job has moved on."""
        return sign_of(registry(), None)

    @classmethod
    def execute(cls, job: dict[str, Any]) -> io.NodeOutput:
        """Poll the job twice a second."""
        jobs, node = registry(), cls.hidden.unique_id
        shown, now = "", _summary(jobs, job["id"])
        tick = training_host.progress(max(1, now["of"]))
        with jobs.waited_for():
            while now["state"] not in (*ENDED, *BROKEN):
                tick(min(now["iteration"], max(1, now["of"])))
                if (text := line_of(now)) != shown:
                    shown = text
                    training_host.show_text(text, node)
                time.sleep(POLL_S)
                now = _summary(jobs, job["id"])
        training_host.show_text(line_of(now), node)
        if now["state"] in BROKEN:
            raise NodeError(f"the training {line_of(now)}")
        return io.NodeOutput({"id": job["id"]})


class PCPOExportLora(OfAJob):
    """A job's LoRA as a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCPOExportLora",
            display_name="PCPO Export LoRA",
            category=CATEGORY,
            description="Writes the LoRA of a training job to a file of its own, in another "
            "precision or from an earlier iteration; or merges it into a whole checkpoint.",
            search_aliases=["save lora", "merge lora", "save checkpoint", "convert lora"],
            is_output_node=True,
            inputs=[*job_inputs(), *which_inputs(), *_file_inputs(), *_parts()],
            outputs=[io.String.Output(display_name="file", tooltip="Path of the file.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, job: str) -> bool | str:
        """Refuse a file's name before anything runs."""

        def check(node: graph.Node) -> None:
            if isinstance(name := node["inputs"].get("name"), str):
                lora_name(name)

        return graph.verdict(cls, check)

    @classmethod
    def execute(
        cls,
        job: str,
        which: str,
        iteration: int,
        name: str,
        kind: str,
        dtype: str,
        folder: str,
        from_job: dict[str, Any] | None = None,
        model: Any = None,
        clip: Any = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        """Write the LoRA under a free name."""
        jobs, node, wanted = registry(), cls.hidden.unique_id, lora_name(name)
        source = folder_of(jobs, chosen_id(jobs, job, from_job))
        file = export_of(source, which, iteration)
        target = export.free_file(_place(kind, folder), wanted)
        if kind == LORA:
            export.export_lora(source, file, target, export.DTYPES[dtype])
        else:
            parts = (model, clip, vae)
            export.export_merged(source, file, target, parts, training_host.copy_progress(node))
        taken = "" if target.stem == wanted else f" ({wanted} was taken)"
        text = public_text(f"{target}{taken}")
        training_host.show_text(text, node)
        return io.NodeOutput(str(target), ui=ui.PreviewText(text))


def _place(kind: str, folder: str) -> Path:
    subfolder = "loras" if kind == LORA else "checkpoints"
    if folder == MODELS:
        return training_host.models_folder(subfolder)
    return training_host.output_folder() / subfolder


def _file_inputs() -> list[Any]:
    return [
        io.String.Input(
            "name",
            default="my_pcpo_lora_export",
            tooltip="Name of the file. If it is taken, -2, -3 and so on is added.",
        ),
        io.Combo.Input(
            "kind",
            options=[LORA, CHECKPOINT],
            default=LORA,
            tooltip="A LoRA file, or a whole checkpoint with the LoRA merged in. For a "
            "checkpoint, connect model, clip and vae.",
        ),
        io.Combo.Input(
            "dtype",
            options=list(export.DTYPES),
            default="float32",
            tooltip="Precision of the LoRA's weights. float32: as trained. float16, bfloat16: "
            "half the size. A checkpoint keeps the precision of the loaded model.",
        ),
        io.Combo.Input(
            "folder",
            options=[MODELS, OUTPUT],
            default=MODELS,
            tooltip="models: where ComfyUI's loaders look. output: where ComfyUI saves images.",
        ),
    ]


def _parts() -> list[Any]:
    return [
        io.Model.Input("model", optional=True, tooltip="The base model, for a merged checkpoint."),
        io.Clip.Input("clip", optional=True, tooltip="The text encoder, for a merged checkpoint."),
        io.Vae.Input("vae", optional=True, tooltip="The autoencoder, for a merged checkpoint."),
    ]


NODES: tuple[type[io.ComfyNode], ...] = (
    PCPOJob,
    PCPOLoadJobLora,
    PCPOWaitForJob,
    PCPOExportLora,
)
