"""A small stand-in for `comfy_api.latest`, so that nodes/*.py is tested without ComfyUI.

Importing this module puts the stand-in into `sys.modules`, unless the real one can be imported;
after that the pack's own modules are imported as usual:

    import comfy_api_fixture  # before any comfyui_pcpo.nodes module
    from comfyui_pcpo.nodes.sampling import nodes as sampling

    schema = comfy_api_fixture.schema_of(sampling.SdeSampler)   # finalized, checked
    schema.node_id, [(i.id, i.io_type, i.default) for i in schema.inputs]
    output = comfy_api_fixture.run(sampling.SdeSampler, noise_level=0.5)  # other inputs: defaults
    output.result[0]

    for node in comfy_api_fixture.all_nodes(): ...              # of nodes.extension

Every keyword that the real classes do not have is refused here too. Inputs and outputs keep what
they were given as attributes (None where it was not), and `io_type` is the real socket's name.
`ui` objects keep their arguments in `.value`. There is a `folder_paths` too, of a ComfyUI without
any model files, for what schemas list. A node's module must not import comfy and the like at its
top; what it imports inside `execute` is not here.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import types
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

INPUT = dict.fromkeys(
    ("display_name", "tooltip", "lazy", "extra_dict", "raw_link", "advanced"), None
) | {"optional": False}
WIDGET = INPUT | dict.fromkeys(("default", "socketless"), None)
NUMBER = dict.fromkeys(("min", "max", "step", "display_mode", "force_input"), None)
CHOICE = dict.fromkeys(
    ("options", "control_after_generate", "upload", "image_folder", "remote"), None
)
OUTPUT = {"id": None, "display_name": None, "tooltip": None, "is_output_list": False}

WIDGETS = {
    "Boolean": ("BOOLEAN", dict.fromkeys(("label_on", "label_off", "force_input"), None)),
    "Int": ("INT", {**NUMBER, "control_after_generate": None}),
    "Float": ("FLOAT", {**NUMBER, "round": None, "gradient_stops": None}),
    "String": (
        "STRING",
        {"multiline": False, "placeholder": None, "dynamic_prompts": None, "force_input": None},
    ),
    "Combo": ("COMBO", CHOICE),
    "MultiCombo": ("COMBO", {**CHOICE, "placeholder": None, "chip": None}),
    "Color": ("COLOR", {}),
}
SOCKETS = {
    "AnyType": "*",
    "Audio": "AUDIO",
    "Clip": "CLIP",
    "ClipVision": "CLIP_VISION",
    "Conditioning": "CONDITIONING",
    "ControlNet": "CONTROL_NET",
    "Guider": "GUIDER",
    "Hooks": "HOOKS",
    "Image": "IMAGE",
    "Latent": "LATENT",
    "LoraModel": "LORA_MODEL",
    "LossMap": "LOSS_MAP",
    "Mask": "MASK",
    "Model": "MODEL",
    "Noise": "NOISE",
    "Sampler": "SAMPLER",
    "Sigmas": "SIGMAS",
    "Vae": "VAE",
}


class Input:
    """Any input; `known` are the keywords its type has, with what they are where not given."""

    io_type = "*"
    known: dict[str, Any] = INPUT

    def __init__(self, id: str, *positional: Any, **given: Any):
        order = list(self.known)
        given |= dict(zip(order, positional, strict=False))
        refuse(self, given, self.known)
        self.id = id
        self.__dict__ |= self.known | given

    def nested(self) -> list[Input]:
        """This input and those inside it."""
        inside: list[Any] = []
        if isinstance(self, Autogrow.Input):
            inside = [self.template.input]
        elif isinstance(self, DynamicCombo.Input):
            inside = [i for option in self.options for i in option.inputs]
        return [self, *(j for i in inside for j in i.nested())]


class Output:
    """Any output."""

    io_type = "*"

    def __init__(self, *positional: Any, **given: Any):
        given |= dict(zip(OUTPUT, positional, strict=False))
        refuse(self, given, OUTPUT | {"options": None, "template": None})
        self.__dict__ |= OUTPUT | given
        self.display_name = self.display_name or self.id


def refuse(what: object, given: dict[str, Any], known: dict[str, Any]) -> None:
    """What the real classes do.

    Raises:
        TypeError: for a keyword that is not known.
    """
    if odd := set(given) - set(known):
        kind = getattr(what, "io_type", type(what).__name__)
        raise TypeError(f"{kind} has no keyword {', '.join(sorted(odd))}")


def socket(name: str, io_type: str, known: dict[str, Any] = INPUT) -> Any:
    """A type with its Input and Output."""
    made = {
        "Input": type("Input", (Input,), {"io_type": io_type, "known": known}),
        "Output": type("Output", (Output,), {"io_type": io_type}),
    }
    return type(name, (), {"io_type": io_type, "Type": Any, **made})


def widget(name: str, io_type: str, own: dict[str, Any]) -> Any:
    first = {k: own[k] for k in ("options",) if k in own}  # a combo's second positional argument
    return socket(name, io_type, first | WIDGET | own)


class Autogrow:
    """A row of inputs that grows: the templates' own inputs are `Input.template.input`."""

    io_type = "COMFY_AUTOGROW_V3"

    @dataclass
    class TemplatePrefix:
        input: Input
        prefix: str
        min: int = 1
        max: int = 10

        @property
        def names(self) -> list[str]:
            return [f"{self.prefix}{i}" for i in range(self.max)]

    @dataclass
    class TemplateNames:
        input: Input
        names: list[str]
        min: int = 1

    class Input(Input):
        io_type = "COMFY_AUTOGROW_V3"
        known = {"template": None} | {k: v for k, v in INPUT.items() if k not in {"raw_link"}}


class DynamicCombo:
    """A choice that brings inputs of its own."""

    io_type = "COMFY_DYNAMICCOMBO_V3"

    @dataclass
    class Option:
        key: str
        inputs: list[Any]

    class Input(Input):
        io_type = "COMFY_DYNAMICCOMBO_V3"
        known = {"options": None} | {k: v for k, v in INPUT.items() if k not in {"raw_link"}}


class MatchType:
    """Sockets that take one type and give it on."""

    io_type = "COMFY_MATCHTYPE_V3"

    @dataclass
    class Template:
        template_id: str
        allowed_types: Any = None

    class Input(Input):
        io_type = "COMFY_MATCHTYPE_V3"
        known = {"template": None} | INPUT

    class Output(Output):
        io_type = "COMFY_MATCHTYPE_V3"

        def __init__(self, template: Any, *positional: Any, **given: Any):
            super().__init__(*positional, template=template, **given)


class MultiType:
    """An input that takes one of several types."""

    io_type = "COMFY_MULTITYPED_V3"

    class Input(Input):
        io_type = "COMFY_MULTITYPED_V3"
        known = {"types": None} | INPUT


class Hidden(StrEnum):
    """What ComfyUI hands a node besides its inputs."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"
    dynprompt = "DYNPROMPT"


@dataclass
class Schema:
    """The fields of the real class; `finalize` names outputs and refuses ids that occur twice."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_dev_only: bool = False
    is_api_node: bool = False
    price_badge: Any = None
    not_idempotent: bool = False
    enable_expand: bool = False
    accept_all_inputs: bool = False
    essentials_category: str | None = None
    has_intermediate_output: bool = False

    def finalize(self) -> Schema:
        for i, output in enumerate(self.outputs):
            output.id = output.id or f"_{i}_{output.io_type}_"
        for ids in ([i.id for i in self.inputs], [o.id for o in self.outputs]):
            assert len(set(ids)) == len(ids), f"{self.node_id}: ids occur twice in {ids}"
        return self


class NodeOutput:
    """What a node gives back."""

    def __init__(self, *args: Any, ui: Any = None, expand: Any = None, block_execution: Any = None):
        self.args = args
        self.ui = ui
        self.expand = expand
        self.block_execution = block_execution

    @property
    def result(self) -> tuple[Any, ...] | None:
        return self.args or None

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


class ComfyNode:
    """Base of all nodes; hidden values are set on the class by a test that needs them."""

    hidden = types.SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None, dynprompt=None)

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        return schema_of(cls)


class ComfyExtension:
    """Base of a pack."""

    async def on_load(self) -> None:
        """Nothing."""


class _Shown:
    def __init__(self, value: Any, *more: Any, **keywords: Any):
        self.value, self.more, self.keywords = value, more, keywords

    def as_dict(self) -> dict[str, Any]:
        return {type(self).__name__: (self.value,)}


def module(name: str, **contents: Any) -> types.ModuleType:
    """An empty module that `find_spec` finds, with some contents."""
    made = types.ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    made.__dict__.update(contents)
    return made


def modules() -> dict[str, types.ModuleType]:
    """The stand-in's modules by name."""
    io, ui = module("comfy_api.latest.io"), module("comfy_api.latest.ui")
    io.__dict__.update({name: socket(name, kind) for name, kind in SOCKETS.items()})
    io.__dict__.update({name: widget(name, *rest) for name, rest in WIDGETS.items()})
    own = (Autogrow, DynamicCombo, MatchType, MultiType, Hidden, Schema, NodeOutput, ComfyNode)
    io.__dict__.update({kind.__name__: kind for kind in own})
    io.__dict__.update(
        Custom=lambda io_type: socket("Custom", io_type),
        NumberDisplay=Enum("NumberDisplay", ["number", "slider", "gradient_slider"]),
        FolderType=Enum("FolderType", ["input", "output", "temp"]),
        UploadType=Enum("UploadType", ["image", "audio", "video", "model"]),
        ControlAfterGenerate=Enum("ControlAfterGenerate", ["fixed", "increment", "randomize"]),
    )
    shown = ("PreviewImage", "PreviewMask", "PreviewText", "SavedImages", "ImageSaveHelper")
    ui.__dict__.update({name: type(name, (_Shown,), {}) for name in shown})
    names = {"ComfyExtension": ComfyExtension, "io": io, "ui": ui, "IO": io, "UI": ui}
    latest = module("comfy_api.latest", **names)
    package = module("comfy_api", __path__=[], latest=latest)
    return {"comfy_api": package, "comfy_api.latest": latest}


def folder_paths() -> types.ModuleType:
    """A ComfyUI without models."""
    folders: dict[str, list[str]] = {}

    def missing(folder: str, name: str) -> str:
        raise FileNotFoundError(f"Model in folder '{folder}' with filename '{name}' not found.")

    return module(
        "folder_paths",
        models_dir="/nonexistent/models",
        get_input_directory=lambda: "/nonexistent/input",
        get_output_directory=lambda: "/nonexistent/output",
        get_system_user_directory=lambda name: f"/nonexistent/user/__{name}",
        folder_names_and_paths=folders,
        add_model_folder_path=lambda name, path, **_: folders.setdefault(name, []).append(path),
        get_folder_paths=lambda name: list(folders.get(name, [])),
        get_filename_list=lambda name: [],
        get_full_path=lambda folder, name: None,
        get_full_path_or_raise=missing,
    )


if "comfy_api" not in sys.modules and find_spec("comfy_api") is None:
    sys.modules.update(modules())
    sys.modules.setdefault("folder_paths", folder_paths())


def schema_of(node: Any) -> Schema:
    """A node's schema, as ComfyUI would see it at start-up."""
    return node.define_schema().finalize()


def all_nodes() -> list[Any]:
    """Every node of the pack, as ComfyUI asks for them."""
    from comfyui_pcpo.nodes.extension import PcpoExtension

    return asyncio.run(PcpoExtension().get_node_list())


def run(node: Any, **inputs: Any) -> NodeOutput:
    """Execute a node as ComfyUI would: inputs that are not given have their widget's default.

    Args:
        node: the class.
        **inputs: by id; an Autogrow's is a dict, a DynamicCombo's a dict with its own id in it.

    Returns:
        What it gives.
    """
    schema = schema_of(node)
    odd = set(inputs) - {i.id for i in schema.inputs}
    assert not odd, f"{schema.node_id} has no input {odd}"
    for i in schema.inputs:
        if i.id not in inputs and getattr(i, "default", None) is not None:
            inputs[i.id] = i.default
        missing = i.id not in inputs and not i.optional and not isinstance(i, Autogrow.Input)
        first = getattr(i, "options", None)
        if missing and i.io_type == "COMBO" and first:
            inputs[i.id], missing = first[0], False
        assert not missing, f"{schema.node_id} was not given {i.id}"
    output = node.execute(**inputs)
    return asyncio.run(output) if inspect.iscoroutine(output) else output
