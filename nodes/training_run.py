"""Starting a job from what ComfyUI has loaded."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..trainers.config import TrainConfig
from ..trainers.job import JobError
from .demo import demo_id_of
from .errors import NodeError
from .handover import HandedOver, hand_over
from .handover_judge import judge
from .handover_write import Tick
from .jobs import JobRegistry
from .training_host import free_memory, models_folder
from .training_prompts import Prompts, check_prompts, write_prompts
from .training_settings import Values
from .training_start import (
    check_config,
    check_init_lora,
    config_of,
    lora_name,
    parts_of,
    reward_weights,
    training_device,
)

DEMO, SD1 = "demo", "sd1"
"""What a LoRA was trained on, in a job's "inputs"."""


@dataclass(frozen=True)
class Asked:
    """The inputs of PCPO Train in Background.

    Attributes:
        model: a MODEL.
        clip: a CLIP.
        vae: a VAE.
        reward: of a REWARD socket.
        prompts: what to draw.
        settings: sections and fields of the config.
        name: of the LoRA, as typed.
        init_lora: a LoRA to continue from.
        behaviour: the job's "settings".
    """

    model: Any
    clip: Any
    vae: Any
    reward: Any
    prompts: Prompts
    settings: Values
    name: str
    init_lora: Path | None
    behaviour: Mapping[str, Any]


def start(asked: Asked, jobs: JobRegistry, tick: Tick) -> tuple[str, str]:
    """Check everything, hand the model over, free its memory, and put a job into the queue.

    Args:
        asked: the inputs.
        jobs: the queue.
        tick: told how far a copy of the model is, where one has to be written.

    Returns:
        The job's id, and what to show the user.

    Raises:
        NodeError: where something is refused.
    """
    from comfy.model_management import get_torch_device

    wanted = lora_name(asked.name)
    device, note = training_device(get_torch_device())
    draft = _checked(asked, device)
    loras = models_folder("loras")
    name = jobs.free_name(loras, wanted)
    id = secrets.token_hex(8)
    place = jobs.root / id
    try:
        handed = hand_over(asked.model, asked.clip, asked.vae, place, tick)
        config = _final(draft, asked, handed, place, loras / f"{name}.safetensors")
        free_memory()
        base = SD1 if demo_id_of(asked.model) is None else DEMO
        jobs.create(config, name, device, asked.behaviour, {"base": base}, id=id)
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, JobError):
            raise NodeError(str(error)) from error
        raise
    renamed = f"models/loras has {wanted} already, so this one is {name}"
    notes = [*([renamed] if name != wanted else []), *([note] if note else []), *handed.notes]
    return id, _text(jobs, id, name, notes)


def _checked(asked: Asked, device: str) -> TrainConfig:
    """The run on the demo model and its prompts; what can be refused without a copy is refused."""
    judge(asked.model, asked.clip, asked.vae)
    parts = parts_of(asked.reward)
    draft = config_of(
        asked.settings,
        {
            "model": {"source": "demo", "allow_download": False},
            "rewards": reward_weights(parts),
            "prompts": {"source": "scenes"},
            "run": {"device": device.partition(":")[0]},
        },
    )
    check_config(draft)
    if asked.init_lora is not None:
        check_init_lora(asked.init_lora, draft.trainable.rank)
    check_prompts(asked.prompts, asked.clip, [reward for reward, _ in parts])
    return draft


def _final(
    draft: TrainConfig, asked: Asked, handed: HandedOver, place: Path, target: Path
) -> TrainConfig:
    source = write_prompts(asked.prompts, place / "prompts.jsonl")
    init_lora = None if asked.init_lora is None else str(asked.init_lora)
    config = config_of(
        draft.model_dump(mode="json"),
        {
            "model": {"source": handed.source, "prediction_type": handed.prediction_type},
            "prompts": {"source": source},
            "trainable": {"init_lora": init_lora},
            "run": {"publish": str(target)},
        },
    )
    check_config(config)
    return config


def _text(jobs: JobRegistry, id: str, name: str, notes: list[str]) -> str:
    state = jobs.summary(id)["state"]
    lines = [f"job {id}: {state}", f"LoRA: models/loras/{name}.safetensors", *notes]
    return "\n".join(lines)
