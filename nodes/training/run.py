"""Starting a job from what ComfyUI has loaded."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...trainers.config.effects import doubts, without_effect
from ...trainers.config.train_config import TrainConfig
from ...trainers.families.registry import FAMILIES, demo_like
from ...trainers.job.folder import JobError
from ...trainers.job.prompts import split_prompts
from ..errors import NodeError
from ..families import base_of
from ..handover.flow import loaded_files
from ..handover.hand_over import HandedOver, copied_bytes, hand_over
from ..handover.judge import judge
from ..handover.write import Tick
from ..jobs.access import Jobs
from ..jobs.registry import RESUMABLE
from ..jobs.view import sign_of
from .cost import Cost, check_disk, cost_of, in_words, place_of
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


@dataclass(frozen=True, slots=True)
class Checked:
    """A training that can be started.

    Attributes:
        draft: its config, on a demo model and its prompts.
        device: of the job.
        note: on the device, if there is something to say.
        cost: what it needs.
        sign: the same for the same inputs; None where that is not known.
    """

    draft: TrainConfig
    family: str
    device: str
    note: str | None
    cost: Cost
    sign: str | None


def check(asked: Asked, jobs: Jobs, upstream: list[Any] | None = None) -> Checked:
    """Refuse what cannot be trained, and say what the rest costs; nothing is written.

    Args:
        upstream: the nodes that model, clip and vae come from (`graph.upstream`).
    """
    from comfy.model_management import get_torch_device

    lora_name(asked.name)
    found = get_torch_device()
    device, note = training_device(found)
    draft, family = _check_run(asked, device)
    parts, base = (asked.model, asked.clip, asked.vae), base_of(asked.model)
    assert base is not None  # for it was judged
    values = {**asked.settings, "rewards": draft.model_dump(mode="json")["rewards"]}
    folders = (jobs.root, models_folder("loras"))
    place = place_of(found, device, folders)
    cost = cost_of(values, base, place, jobs, copied_bytes(*parts))
    sign = None if upstream is None else _sign(asked, draft, upstream)
    return Checked(draft, family, device, note, cost, sign)


def _sign(asked: Asked, draft: TrainConfig, upstream: list[Any]) -> str:
    files = loaded_files(asked.model, asked.clip.patcher, asked.vae.patcher)
    files += [] if asked.init_lora is None else [asked.init_lora]
    prompts = asked.prompts
    what = [
        *(upstream, sign_of(files), draft.model_dump(mode="json"), asked.name.strip()),
        *(str(asked.init_lora), dict(asked.behaviour)),
        *(prompts.built_in, prompts.texts, prompts.held_out),
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def earlier(jobs: Jobs, sign: str | None) -> str | None:
    """The newest job with the same inputs."""
    for job in jobs.jobs() if sign is not None else ():
        about = jobs.folder(job["id"]).read("job.json").get("inputs", {})
        if about.get("asked") == sign and job["state"] != "unreadable":
            return job["id"]
    return None


def go_on(jobs: Jobs, id: str) -> str:
    """Resume an earlier job that ended early, and say what has become of it."""
    before = jobs.summary(id)
    said = f"it is there already ({before['state']}): its inputs are unchanged"
    if before["state"] in RESUMABLE:
        jobs.resume(id)
        said = f"it was {before['state']} and goes on, for its inputs are unchanged"
    return f"{said}.\nSwitch on train_again to train anew.\njob {id}: {jobs.summary(id)['state']}"


def start(asked: Asked, checked: Checked, jobs: Jobs, tick: Tick) -> tuple[str, str]:
    """Hand the model over, free its memory, and put a job into the queue.

    Args:
        tick: told the progress of a copy of the model, if one has to be written.
    """
    wanted, loras = lora_name(asked.name), models_folder("loras")
    draft, family, device, note = checked.draft, checked.family, checked.device, checked.note
    check_disk(checked.cost.disk, (jobs.root, loras))
    name = jobs.free_name(loras, wanted)
    id = secrets.token_hex(8)
    place = jobs.root / id
    try:
        handed = hand_over(asked.model, asked.clip, asked.vae, place, tick)
        config = _final(draft, asked, handed, place, loras / f"{name}.safetensors")
        check_config(config, family)
        free_memory()
        inputs = {"base": handed.base, "asked": checked.sign}
        jobs.create(config, name, device, asked.behaviour, inputs, id=id)
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, JobError):
            raise NodeError(str(error)) from error
        raise
    renamed = f"models/loras already has {wanted}, so the new file is {name}"
    notes = [*([renamed] if name != wanted else []), *([note] if note else []), *handed.notes]
    notes += [*flow_notes(config, family, handed.shift), *without_effect(config, family)]
    notes += [*doubts(config, family), *doubts_of(judges_of(asked.reward))]
    if asked.prompts.built_in is None:
        notes.append(split_prompts(config.prompts, config.run.eval_prompts).note)
    return id, _text(jobs, id, name, [in_words(checked.cost), *notes])


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
        check_init_lora(asked.init_lora, draft.trainable.rank, family)
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
