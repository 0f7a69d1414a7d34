"""Nodes of Implicit Reward Guidance: a base model led by its aligned versions."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from comfy_api.latest import io

from ..errors import NodeError
from ..names import checked_lora
from ..show import show_text
from .lora_notes import left_out, notes_on

log = logging.getLogger(__name__)

CATEGORY = "PCPO/guidance"
MOST = 8
TunedSocket = io.Custom("PCPO_TUNED")


def _gamma_input() -> io.Float.Input:
    return io.Float.Input(
        "gamma",
        default=1.0,
        min=-10.0,
        max=10.0,
        step=0.05,
        tooltip="How far to move from the base to the tuned model. 0: the base. 1: the tuned "
        "model. Above 1: beyond it. Below 0: away from it.",
    )


def _range_inputs() -> list[io.Float.Input]:
    tips = {
        "start": "When it starts to take part: 0 is the first step, 1 the last.",
        "end": "When it stops taking part: 0 is the first step, 1 the last.",
    }
    return [
        io.Float.Input(
            name,
            default=default,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip=tips[name],
        )
        for name, default in (("start", 0.0), ("end", 1.0))
    ]


def _share_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "share_negative",
        default=False,
        optional=True,
        advanced=True,
        tooltip="Only the base predicts the negative prompt: N tuned models then cost N + 2 "
        "predictions per step instead of 2 N + 2. It is faster and gives another result: each "
        "tuned model adds gamma times its change to the positive prediction, and cfg no longer "
        "multiplies that. A tuned model with its own negative prompt predicts it.",
    )


def _conditioning_inputs() -> list[io.Conditioning.Input]:
    tip = "Its own {} prompt, if its text encoder is tuned too. If not connected, the guider's."
    return [
        io.Conditioning.Input(name, optional=True, tooltip=tip.format(name))
        for name in ("positive", "negative")
    ]


def _tuned_output() -> Any:
    return TunedSocket.Output(display_name="tuned", tooltip="For PCPO Implicit Reward Guider.")


class PCPOTunedModel(io.ComfyNode):
    """A tuned MODEL with its gamma."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOTunedModel",
            display_name="PCPO Tuned Model",
            category=CATEGORY,
            description="A MODEL for the guider to move towards: the base with LoRAs of any kind, "
            "or another checkpoint of the same family.",
            search_aliases=["implicit reward guidance", "irg", "gamma", "tuned"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The base MODEL with LoRAs on it, or another checkpoint."
                ),
                _gamma_input(),
                *_conditioning_inputs(),
                *_range_inputs(),
            ],
            outputs=[_tuned_output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        gamma: float,
        start: float,
        end: float,
        positive: Any = None,
        negative: Any = None,
    ) -> io.NodeOutput:
        """Bundle the inputs."""
        return io.NodeOutput(_tune(model, gamma, positive, negative, start, end))


class PCPOTunedLora(io.ComfyNode):
    """A LoRA file with its gamma."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        return io.Schema(
            node_id="PCPOTunedLora",
            display_name="PCPO Tuned LoRA",
            category=CATEGORY,
            description="A LoRA for the guider to move towards. If it changes the text encoder "
            "too, load it with Load LoRA instead, encode the prompt with that CLIP, and connect "
            "both to PCPO Tuned Model.",
            search_aliases=["implicit reward guidance", "irg", "gamma", "lora"],
            inputs=[
                io.Model.Input("base", tooltip="The MODEL that is the guider's base."),
                io.Combo.Input(
                    "lora_name",
                    options=_lora_names(),
                    tooltip="A LoRA in models/loras.",
                ),
                _gamma_input(),
                *_range_inputs(),
            ],
            outputs=[_tuned_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, base: Any, lora_name: str, gamma: float, start: float, end: float
    ) -> io.NodeOutput:
        """Patch a clone with the file, as Load LoRA at strength 1 does; say what is left out."""
        import comfy.sd
        import comfy.utils
        import folder_paths

        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        weights, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        checked_lora(weights, lora_name)
        with left_out() as keys:
            model, _ = comfy.sd.load_lora_for_models(base, None, weights, 1.0, 0.0)
        if all(len(model.patches[k]) == len(base.patches.get(k, [])) for k in model.patches):
            raise NodeError(
                f"lora_name '{lora_name}' changes nothing in this MODEL; it was made for another "
                "family, or for the text encoder alone"
            )
        if notes := notes_on(weights, metadata or {}, keys):
            log.warning("PCPO Tuned LoRA: %s %s", lora_name, "; it ".join(notes))
            show_text("\n".join(notes), cls.hidden.unique_id)
        return io.NodeOutput(_tune(model, gamma, None, None, start, end))


def _lora_names() -> list[str]:
    """The files in models/loras; none where there is no ComfyUI around."""
    if find_spec("folder_paths") is None:
        return []
    import folder_paths

    return folder_paths.get_filename_list("loras")


def _tune(model: Any, gamma: float, positive: Any, negative: Any, start: float, end: float) -> Any:
    """The bundle."""
    if end <= start:
        raise NodeError(f"end is {end:g} and start {start:g}; end must be the larger")
    from .guider import Tuned

    return Tuned(model, gamma, positive, negative, start, end)


def check_family(base: Any, tuned: list[Any]) -> None:
    """Refuse tuned models of another family than the base."""
    for place, one in enumerate(tuned, 1):
        if type(one.model.model) is not type(base.model):
            theirs, ours = type(one.model.model).__name__, type(base.model).__name__
            raise NodeError(
                f"tuned model {place} is a {theirs} and the base a {ours}; all must be of one "
                "family"
            )


class PCPOImplicitRewardGuider(io.ComfyNode):
    """The guider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets and sockets."""
        template = io.Autogrow.TemplatePrefix(
            TunedSocket.Input("tuned", tooltip="PCPO Tuned Model's or PCPO Tuned LoRA's."),
            prefix="tuned_",
            min=1,
            max=MOST,
        )
        return io.Schema(
            node_id="PCPOImplicitRewardGuider",
            display_name="PCPO Implicit Reward Guider",
            category=CATEGORY,
            description="Implicit Reward Guidance: predicts the base plus, for each tuned model, "
            "gamma times its difference from the base. This mixes and exaggerates rewards while "
            "sampling, without training again. Tuned models that are LoRAs of the base run in one "
            "batch with it.",
            search_aliases=["irg", "implicit reward guidance", "cfg guider", "mix loras"],
            inputs=[
                io.Model.Input("base", tooltip="The base MODEL."),
                io.Conditioning.Input("positive", tooltip="The positive prompt."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt; needed unless cfg is 1.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance of each model; 1 turns it off.",
                ),
                io.Autogrow.Input(
                    "tuned", template=template, tooltip="The tuned models to move towards, up to 8."
                ),
                _share_input(),
            ],
            outputs=[
                io.Guider.Output(
                    display_name="guider",
                    tooltip="For SamplerCustomAdvanced or PCPO Sample with Trajectory.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        base: Any,
        positive: Any,
        cfg: float,
        tuned: dict[str, Any],
        negative: Any = None,
        share_negative: bool = False,
    ) -> io.NodeOutput:
        """Build the guider; it is given its latents by a sampler."""
        from .guider import ImplicitRewardGuider

        given = [one for one in tuned.values() if one is not None]
        if negative is None and cfg != 1:
            raise NodeError(f"cfg is {cfg:g}, which needs a negative prompt; connect one, or set 1")
        check_family(base, given)
        guider = ImplicitRewardGuider(base, given, shares_negative=share_negative)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)


NODES: tuple[type[io.ComfyNode], ...] = (
    PCPOTunedModel,
    PCPOTunedLora,
    PCPOImplicitRewardGuider,
)
