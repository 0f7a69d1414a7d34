"""Starting a job from what ComfyUI has loaded."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...trainers.config.effects import small_images, without_effect
from ...trainers.config.train_config import TrainConfig
from ...trainers.families.registry import FAMILIES, demo_like
from ...trainers.job.folder import JobError
from ...trainers.job.prompts import split_prompts
from ..errors import NodeError
from ..handover.hand_over import HandedOver, hand_over
from ..handover.judge import judge
from ..handover.write import Tick
from ..jobs.access import Jobs
from .host import free_memory, models_folder
from .prompts import Prompts, check_prompts, t5_length, write_prompts
from .rewards import check_rewards, doubts_of, guard_of, judges_of, section_of, watched_of
from .settings import Values, check_distilled, check_family
from .start import check_config, check_init_lora, config_of, lora_name, training_device


@dataclass(frozen=True)
class Asked:
    """The inputs of PCPO Train in Background.

    Attributes:
        settings: sections and fields of the config.
        name: of the LoRA, as typed.
        init_lora: a LoRA to continue from.
        behaviour: the job's "settings".
        guard_reward: of a REWARD socket, not trained on; None where none is connected.
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
    guard_reward: Any = None


def start(asked: Asked, jobs: Jobs, tick: Tick) -> tuple[str, str]:
    """Check everything, hand the model over, free its memory, and put a job into the queue.

    Args:
        tick: told the progress of a copy of the model, if one has to be written.
    """
    from comfy.model_management import get_torch_device

    wanted = lora_name(asked.name)
    device, note = training_device(get_torch_device())
    draft, family = _check_run(asked, device)
    loras = models_folder("loras")
    name = jobs.free_name(loras, wanted)
    id = secrets.token_hex(8)
    place = jobs.root / id
    try:
        handed = hand_over(asked.model, asked.clip, asked.vae, place, tick)
        config = _final(draft, asked, handed, place, loras / f"{name}.safetensors")
        check_config(config, family)
        free_memory()
        jobs.create(config, name, device, asked.behaviour, {"base": handed.base}, id=id)
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, JobError):
            raise NodeError(str(error)) from error
        raise
    renamed = f"models/loras already has {wanted}, so the new file is {name}"
    notes = [*([renamed] if name != wanted else []), *([note] if note else []), *handed.notes]
    notes += [*flow_notes(config, family, handed.shift), *without_effect(config, family)]
    notes += [*small_images(config, family), *doubts_of(judges_of(asked.reward))]
    if asked.prompts.built_in is None:
        notes.append(split_prompts(config.prompts, config.run.eval_prompts).note)
    return id, _text(jobs, id, name, notes)


def _check_run(asked: Asked, device: str) -> tuple[TrainConfig, str]:
    """The run on a demo model and its prompts; what can be refused without a copy is refused."""
    family = judge(asked.model, asked.clip, asked.vae).family
    check_family(asked.settings, family)
    check_distilled(asked.model, asked.settings, family)
    judges = judges_of(asked.reward)
    check_rewards(judges)
    watched = [] if asked.guard_reward is None else [watched_of(asked.guard_reward)]
    check_rewards(watched)
    draft = config_of(
        asked.settings,
        {
            "model": {
                "source": demo_like(family),
                "allow_download": False,
            },
            "rewards": section_of(judges),
            "prompts": {"source": "scenes"},
            "guard": guard_of(watched),
            "run": {"device": device.partition(":")[0]},
        },
    )
    check_config(draft, family)
    if asked.init_lora is not None:
        check_init_lora(asked.init_lora, draft.trainable.rank)
    rewards = [judge.reward for judge in [*judges, *watched]]
    check_prompts(asked.prompts, asked.clip, rewards)
    return draft, family


def _final(
    draft: TrainConfig, asked: Asked, handed: HandedOver, place: Path, target: Path
) -> TrainConfig:
    source = write_prompts(asked.prompts, place / "prompts.jsonl")
    init_lora = None if asked.init_lora is None else str(asked.init_lora)
    shift, model = draft.sampler.shift or handed.shift, dict(handed.model)
    if "t5_tokenizer" in model and draft.model.t5_length is None:
        model["t5_length"] = t5_length(asked.clip, asked.prompts)
    return config_of(
        draft.model_dump(mode="json"),
        {
            "model": model,
            "sampler": {"shift": shift},
            "prompts": {"source": source},
            "trainable": {"init_lora": init_lora},
            "run": {"publish": str(target)},
        },
    )


def flow_notes(config: TrainConfig, family: str, asked: float | None) -> list[str]:
    """Notes on what earlier nodes ask of a flow model, and what training does about it.

    Args:
        asked: the shift that the MODEL asks for, or None.
    """
    notes, chosen = [], config.sampler.shift
    if asked is not None and chosen == asked:
        notes.append(f"training uses the MODEL's shift, {asked:.4g}")
    elif asked is not None:
        notes.append(
            f"sampler_shift of the settings, {chosen:.4g}, overrides the MODEL's, {asked:.4g}"
        )
    spec = FAMILIES[family]
    if "guidance" in spec.settings:
        notes.append(
            f"{spec.title} is trained at guidance {config.model.guidance:g} (model_guidance); a "
            "FluxGuidance node does not change that"
        )
    return notes


def _text(jobs: Jobs, id: str, name: str, notes: list[str]) -> str:
    state = jobs.summary(id)["state"]
    lines = [f"job {id}: {state}", f"LoRA: models/loras/{name}.safetensors", *notes]
    return "\n".join(lines)
