"""One validated, serialisable description of a run. No torch: ComfyUI's process reads it too.

A method is a choice on independent axes (sampler, credit, ratio, objective, advantage, selection,
KL); `refusals` names the combinations that the mathematics does not allow. TOML files, the command
line, job files and the documentation are made from these fields.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError
from .refusals import refusals

DEMO_FOLDER = Path(__file__).parent / "demo" / "tiny_sd"
PRESETS = Path(__file__).parent / "presets"

Transition = Literal["ddim", "dance_sde", "flow_sde", "cps"]
Credit = Literal["native", "proportionate", "objective_only"]
Ratio = Literal["epsilon_matching", "density", "squared_error"]
Objective = Literal["ppo_clip", "hinge", "log_hinge"]
AdvantageKind = Literal["batch", "per_prompt", "group"]
Selection = Literal["all", "random_fraction", "sliding_window"]
Kl = Literal["exact", "without_interval"]
Precision = Literal["float32", "bfloat16", "float16"]

REWARD_NAMES = ("jpeg_compressibility", "jpeg_incompressibility", "scene")  # of pcpo.rewards


class ConfigError(UserError, ValueError):
    """A setting that cannot be used, with its field, its value and the remedy."""


class Section(BaseModel):
    """A part of the config: frozen; unknown names and infinite numbers are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """The model that is aligned."""

    source: str = Field(
        default="demo",
        description="'demo', a diffusers folder, one SD1.x checkpoint file, or a hub name; 'sd14' "
        "and 'sd15' stand for a checkpoint that you name",
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample"] = Field(
        default="auto", description="what the network predicts, where a single file does not say"
    )
    precision: Precision = Field(
        default="float32", description="of the network; adapters and all ratios stay float32"
    )
    width: int | None = Field(
        default=None, ge=8, description="px; the model's own size where not given"
    )
    height: int | None = Field(
        default=None, ge=8, description="px; the model's own size where not given"
    )
    allow_download: bool = Field(
        default=False, description="fetch a hub name that is not on this machine"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory, slower updates")


class TrainableConfig(Section):
    """What is trained: LoRA adapters, or all weights of the network."""

    kind: Literal["lora", "full"] = Field(
        default="lora", description="LoRA adapters or a full fine-tune"
    )
    rank: int = Field(default=4, ge=1, le=1024, description="of the adapters")
    alpha: float = Field(default=4.0, gt=0, description="adapters are scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        default=(), description="module names that get adapters; the attention's where empty"
    )
    init: Literal["gaussian", "default"] = Field(
        default="gaussian",
        description="of the down-projection: N(0, 1/rank), or peft's default (Kaiming)",
    )
    init_lora: str | None = Field(default=None, description="an SD1.x LoRA file to continue from")
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="of averaged weights that are exported; 0 is none"
    )


class SamplerConfig(Section):
    """How images are sampled while training."""

    transition: Transition = Field(default="ddim", description="the kind of a sampling step")
    steps: int = Field(default=50, ge=1, le=1000, description="steps of the sampler")
    noise_level: float = Field(
        default=1.0,
        ge=0,
        description="eta of ddim (to 1) and dance_sde, a of flow_sde and cps (to 1)",
    )
    spacing: Literal["model", "leading", "trailing", "linspace"] = Field(
        default="leading", description="of DDIM timesteps; 'model' takes the checkpoint's own"
    )
    guidance_scale: float = Field(
        default=1.0, ge=0, description="classifier-free guidance; 1 is none"
    )
    guidance_gradient: Literal["both", "conditional"] = Field(
        default="both", description="gradient through both branches (DDPO) or one (Flow-GRPO)"
    )
    negative_prompt: str = Field(default="", description="prompt of the unconditional branch")
    drop_last: int = Field(
        default=0, ge=0, description="last steps that are not trained (DanceGRPO: 1)"
    )
    initial_noise: Literal["image", "prompt", "batch"] = Field(
        default="image",
        description="which images share their initial noise (DanceGRPO on SD: batch)",
    )
    decode: Literal["final", "clean"] = Field(
        default="final", description="decode the last latent, or the last clean estimate"
    )


class MethodConfig(Section):
    """How rewards become gradients."""

    credit: Credit = Field(
        default="proportionate", description="each step's share of the advantage"
    )
    target_weight: float | None = Field(
        default=None,
        gt=0,
        description="w*, the mean credit; the mean of the native weights where None",
    )
    ratio: Ratio = Field(default="epsilon_matching", description="how log rho is computed")
    objective: Objective = Field(default="log_hinge", description="the clipped objective")
    clip_low: float = Field(default=1e-4, gt=0, description="clip range xi for negative advantages")
    clip_high: float = Field(
        default=1e-4, gt=0, description="clip range xi for positive advantages"
    )
    loss_scale: float = Field(default=1.0, gt=0, description="multiplies the objective")
    selection: Selection = Field(default="all", description="which steps an iteration trains")
    fraction: float = Field(
        default=0.6, gt=0, le=1, description="of the steps, for random_fraction"
    )
    window: int = Field(default=4, ge=1, description="steps in the sliding window")
    window_stride: int = Field(default=1, ge=1, description="steps by which the window moves")
    window_every: int = Field(default=25, ge=1, description="iterations a window stays")
    kl_weight: float = Field(default=0.0, ge=0, description="beta of the KL to the base; 0 is none")
    kl: Kl = Field(
        default="exact", description="the step's true KL, or Flow-GRPO's without the interval"
    )


class AdvantageConfig(Section):
    """How rewards become advantages."""

    kind: AdvantageKind = Field(default="per_prompt", description="what a reward is compared with")
    limit: float = Field(default=5.0, gt=0, description="advantages are clipped to +-limit")
    offset: float = Field(default=1e-6, gt=0, description="added to the standard deviation")
    ddof: Literal[0, 1] = Field(default=0, description="population's (0) or sample's (1) deviation")
    global_std: bool = Field(default=False, description="group: divide by all rewards' deviation")
    buffer_size: int = Field(default=32, ge=2, description="per_prompt: images remembered a prompt")
    min_count: int = Field(default=16, ge=1, description="per_prompt: images before own statistics")
    combine: Literal["rewards", "advantages"] = Field(
        default="rewards", description="several rewards: normalise their sum, or sum the normalised"
    )


class PromptConfig(Section):
    """What is asked for."""

    source: str = Field(
        default="scenes",
        description="a built-in set (scenes, animals, animals_activities, varied), or a .txt or "
        ".jsonl file",
    )
    per_iteration: int = Field(default=16, ge=1, description="prompts an iteration")
    images_per_prompt: int = Field(default=4, ge=1, description="images of each prompt")
    order: Literal["shuffled", "random"] = Field(
        default="shuffled", description="each prompt once an epoch, or drawn with replacement"
    )


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(default=1e-4, gt=0, description="learning rate")
    warmup: int = Field(
        default=0, ge=0, description="updates over which the learning rate rises from 0 to lr"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the second moment")
    weight_decay: float = Field(default=1e-4, ge=0, description="decoupled weight decay")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="gradients are scaled down to this norm"
    )
    updates: int = Field(default=2, ge=1, description="optimizer steps an iteration")


class RunConfig(Section):
    """How long, where, and what is kept."""

    iterations: int = Field(default=100, ge=1, description="rollouts, each followed by its updates")
    micro_batch: int = Field(
        default=8, ge=1, description="images a forward pass; changes no result"
    )
    seed: int = Field(default=0, ge=0, description="of everything random")
    device: str = Field(default="auto", description="'auto', 'cpu' or 'cuda'")
    save_every: int = Field(
        default=10, ge=1, description="iterations between LoRA files and samples"
    )
    checkpoint_every: int = Field(
        default=1, ge=1, description="iterations between checkpoints to resume from"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="last checkpoints that are kept, besides the best"
    )
    tensorboard: bool = Field(default=False, description="also write TensorBoard events")
    publish: str | None = Field(
        default=None,
        pattern=r"\.safetensors$",
        description="a file that the newest LoRA is copied to as well, in ComfyUI's models/loras "
        "for example; must not exist yet",
    )
    eval_prompts: int = Field(
        default=16, ge=0, description="images of the before-and-after comparison"
    )
    eval_steps: int = Field(default=10, ge=1, description="DDIM steps of the comparison")
    eval_noise: float = Field(
        default=0.0, ge=0, le=1, description="eta of the comparison's DDIM; 0 without noise"
    )
    storage: Precision = Field(default="float32", description="of stored latents and noise")
    storage_rounding: Literal["before", "after"] = Field(
        default="before", description="'after' use repeats the baselines' rounding fault, for study"
    )


class TrainFields(Section):
    """A run, each field checked by itself: what the command line is made from."""

    model: ModelConfig = ModelConfig()
    trainable: TrainableConfig = TrainableConfig()
    sampler: SamplerConfig = SamplerConfig()
    method: MethodConfig = MethodConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    rewards: dict[str, float] = Field(
        default={"scene": 1.0}, min_length=1, description="reward names with their weights"
    )
    prompts: PromptConfig = PromptConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()


class TrainConfig(TrainFields):
    """A run, its fields checked together."""

    @property
    def images(self) -> int:
        """Images an iteration."""
        return self.prompts.per_iteration * self.prompts.images_per_prompt

    @model_validator(mode="after")
    def _compatible(self) -> TrainConfig:
        for is_refused, reason in refusals(self):
            if is_refused:
                raise ValueError(reason)
        return self


# --- files -----------------------------------------------------------------------------------


def presets() -> list[str]:
    """The names of the shipped presets."""
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def read_config(source: str | Path) -> TrainConfig:
    """Read a config from a TOML or JSON file.

    A TOML file may begin with `extends = "setting1"`: it then changes that preset, section by
    section (`rewards` is replaced as a whole).

    Args:
        source: the file; sections and fields as in `TrainConfig`, what is left out has its default.

    Returns:
        The validated config.

    Raises:
        ConfigError: where there is no such file, or a field is unknown or cannot have its value.
    """
    file = Path(source)
    if not file.is_file():
        raise ConfigError(f"there is no config file {file}; give a .toml file or --preset NAME")
    if file.suffix == ".json":
        return validate(_text(file), file.name)
    return validate(_resolved(file, ()), file.name)


def read_preset(name: str) -> TrainConfig:
    """Read a shipped preset.

    Args:
        name: one of `presets()`.

    Returns:
        The validated config.

    Raises:
        ConfigError: where there is no such preset.
    """
    if name not in presets():
        raise ConfigError(f"there is no preset {name!r}; choose one of {', '.join(presets())}")
    return read_config(PRESETS / f"{name}.toml")


def _resolved(file: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """A TOML file's values over those of the preset it extends.

    Raises:
        ConfigError: where a file is no TOML, or `extends` names no preset or one of those `below`.
    """
    try:
        values = tomllib.loads(_text(file))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file.name} is not TOML: {error}") from error
    if "extends" not in values:
        return values
    name, chain = values.pop("extends"), (*below, file.resolve())
    if name not in presets():
        known = ", ".join(presets())
        raise ConfigError(f"{file.name}: extends is {name!r}, no preset; choose one of {known}")
    base = (PRESETS / f"{name}.toml").resolve()
    if base in chain:
        raise ConfigError(f"{file.name}: extends is {name!r}, which leads back here; end the loop")
    return _merged(_resolved(base, chain), values)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sections field by field; rewards, whose names are free, as a whole."""
    merged = {**base, **changes}
    for name in (base.keys() & changes.keys()) - {"rewards"}:
        if isinstance(base[name], dict) and isinstance(changes[name], dict):
            merged[name] = {**base[name], **changes[name]}
    return merged


def _text(file: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: where it is no UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file.name} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error


def validate(values: dict[str, Any] | str, where: str) -> TrainConfig:
    """Check values read from somewhere.

    Args:
        values: nested sections, or the text of a JSON file.
        where: what to call them in an error.

    Returns:
        The config.

    Raises:
        ConfigError: naming every field at fault, its value and what is allowed.
    """
    try:
        if isinstance(values, str):
            return TrainConfig.model_validate_json(values)
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """One line a fault: the field, the value and what is wrong with it."""
    lines = []
    for fault in error.errors():
        field = ".".join(map(str, fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        unknown = fault["type"] == "extra_forbidden"
        if not field:
            lines.append(message)
        elif unknown:
            lines.append(f"there is no setting {field!r}; see `pcpo train --help`")
        else:
            lines.append(f"{field} is {fault['input']!r}: {message}")
    return "\n".join(lines)
