"""The sections of a run's config, each field with its meaning, unit and range. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from . import bounds
from .bounds import (
    Amount,
    Batch,
    Group,
    Guidance,
    Images,
    Iterations,
    Positive,
    Prompts,
    Rank,
    Seed,
    Share,
    Steps,
    Updates,
    Weight,
)
from .reading import json_or_text

Transition = Literal["ddim", "dance_sde", "flow_sde", "cps"]
Credit = Literal[
    "native", "proportionate", "published", "exact", "objective_only", "relative", "weighted_loss"
]
MeanOver = Literal["trained", "step_set", "grid"]
Ratio = Literal["epsilon_matching", "density", "squared_error", "guard"]
Objective = Literal["ppo_clip", "hinge", "log_hinge"]
AdvantageKind = Literal["batch", "per_prompt", "group"]
Selection = Literal["all", "random_fraction", "sliding_window"]
Kl = Literal["exact", "without_interval"]
Update = Literal["two_pass", "one_pass"]
Precision = Literal["float32", "bfloat16", "float16"]
Diversity = Literal["pixel_diversity", "ssim_diversity", "lpips_diversity"]


class Section(BaseModel):
    """A part of the config: frozen; unknown names and infinite numbers are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """The model that is aligned."""

    source: str = Field(
        default="demo",
        description="'demo' or 'demo-flow', a diffusers folder, a checkpoint file of SD1.x, SD3, "
        "SD3.5 or FLUX.1-dev, or a hub name; 'sd14', 'sd15', 'sd35-medium' and 'flux1-dev' stand "
        "for a checkpoint that you name",
    )
    text_encoders: tuple[str, ...] = Field(
        default=(), description="files of text encoders, where a flow model's own file lacks them"
    )
    vae: str | None = Field(
        default=None, description="file of the autoencoder, where a flow model's own file lacks it"
    )
    t5_tokenizer: str | None = Field(
        default=None, description="folder with T5's tokenizer, where there is none beside the model"
    )
    t5_length: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="tokens of every prompt for T5 (Flow-GRPO: 128); the family's own, 256 for SD3 "
        "and 512 for FLUX, where not given",
    )
    guidance: Guidance = Field(
        default=3.5, description="what FLUX.1-dev is told of the guidance distilled into it"
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample"] = Field(
        default="auto", description="what the network predicts, where a single file does not say"
    )
    precision: Precision = Field(
        default="float32", description="of the network; adapters and all ratios stay float32"
    )
    width: int | None = Field(
        default=None, ge=8, le=bounds.SIDE, description="px; the model's own size where not given"
    )
    height: int | None = Field(
        default=None, ge=8, le=bounds.SIDE, description="px; the model's own size where not given"
    )
    allow_download: bool = Field(
        default=False, description="fetch a hub name that is not on this machine"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory, slower updates")
    compile: bool = Field(
        default=False,
        description="compile the network's transformer blocks: a wait at the start, then faster; "
        "needs Triton on a GPU, a C++ compiler on a CPU",
    )
    base: Literal["same", "fp8", "int8", "nf4"] = Field(
        default="same",
        description="how the frozen weights of a flow model's blocks are kept below a LoRA: in "
        "`precision`, in 8 bits, or in 4 (needs bitsandbytes)",
    )
    offload: Literal["auto", "never", "always"] = Field(
        default="auto",
        description="the autoencoder and the rewards are on the GPU only while they are used; "
        "'auto' does so on cards below 32 GB",
    )


class TrainableConfig(Section):
    """What is trained: LoRA adapters, or all weights of the network."""

    kind: Literal["lora", "full"] = Field(
        default="lora", description="LoRA adapters or a full fine-tune"
    )
    rank: Rank = Field(default=4, description="of the adapters")
    alpha: Positive = Field(default=4.0, description="adapters are scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        default=(), description="module names that get adapters; the attention's where empty"
    )
    init: Literal["gaussian", "default"] = Field(
        default="gaussian",
        description="of the down-projection: N(0, 1/rank), or peft's default (Kaiming)",
    )
    init_lora: str | None = Field(default=None, description="a LoRA file to continue from")
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="of averaged weights that are exported; 0 is none"
    )
    ema_every: Updates = Field(
        default=1,
        description="updates from one averaging to the next (Flow-GRPO: 8); before the first, "
        "weights are exported as they were trained",
    )
    ema_ramp: bool = Field(
        default=False,
        description="average over few updates at first: the decay is at most (1 + n) / (10 + n) "
        "after n of them (Flow-GRPO)",
    )
    shard: bool = Field(
        default=True,
        description="split the weights of a full fine-tune, their moments and averages over the "
        "processes, where there are several",
    )


class SamplerConfig(Section):
    """How images are sampled while training."""

    transition: Transition = Field(default="ddim", description="the kind of a sampling step")
    steps: Steps = Field(default=50, description="steps of the sampler")
    noise_level: float = Field(
        default=1.0,
        ge=0,
        le=bounds.NOISE,
        description="eta of ddim (to 1) and dance_sde, a of flow_sde and cps (to 1)",
    )
    spacing: Literal["model", "leading", "trailing", "linspace"] = Field(
        default="leading", description="of DDIM timesteps; 'model' takes the checkpoint's own"
    )
    grid: Literal["flow_match_euler", "uniform", "inverse_count"] = Field(
        default="flow_match_euler",
        description="sigmas of flow models: diffusers' FlowMatchEuler (Flow-GRPO on SD3.5), "
        "linspace(1, 0) (DanceGRPO), or the FLUX pipeline's",
    )
    shift: float | None = Field(
        default=None,
        gt=0,
        le=bounds.GUIDANCE,
        description="of a flow model's sigmas, towards noise (DanceGRPO: 3); the model's own, "
        "which for FLUX depends on the image's size, where not given",
    )
    whole_timesteps: bool = Field(
        default=False,
        description="tell a flow model sigma in whole thousandths, rounded down, as DanceGRPO does",
    )
    guidance_scale: Guidance = Field(default=1.0, description="classifier-free guidance; 1 is none")
    guidance_gradient: Literal["both", "conditional"] = Field(
        default="both", description="gradient through both branches (DDPO) or one (Flow-GRPO)"
    )
    negative_prompt: str = Field(default="", description="prompt of the unconditional branch")
    drop_last: int = Field(
        default=0,
        ge=0,
        le=bounds.STEPS,
        description="last steps that are not trained (DanceGRPO: 1)",
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
        default="proportionate",
        description="each step's share of the advantage: the sampler's own ('native'); PCPO's "
        "('proportionate', which is 'published' on ddim); on ddim one of its readings: the "
        "authors' noise ('published': the larger root of the paper's equation, the other branch "
        "of C_t, so its true weight is uneven), noise at which the weights are even ('exact'), the "
        "sampler's noise ('objective_only'), or a policy relative to the base ('relative'); or "
        "native ratios whose terms are weighted ('weighted_loss')",
    )
    target_weight: float | None = Field(
        default=None,
        gt=0,
        le=bounds.LARGE,
        description="w*, the mean credit; the mean of the native weights where None",
    )
    solve_weight: float | None = Field(
        default=None,
        gt=0,
        le=bounds.LARGE,
        description="w of the published noise (the authors': 4.5 at 50 steps); where None, the one "
        "that gives this grid as much noise, 1.258 times DDPM's energy",
    )
    mean_over: MeanOver = Field(
        default="trained",
        description="steps over which w* is the mean: those that are trained, within the window if "
        "there is one; all but the last ones ('step_set'); or all ('grid', the authors' DanceGRPO)",
    )
    ratio: Ratio = Field(default="epsilon_matching", description="how log rho is computed")
    objective: Objective = Field(default="log_hinge", description="the clipped objective")
    clip_low: Positive = Field(default=1e-4, description="clip range xi for negative advantages")
    clip_high: Positive = Field(default=1e-4, description="clip range xi for positive advantages")
    loss_scale: Positive = Field(default=1.0, description="multiplies the objective")
    update: Update = Field(
        default="two_pass",
        description="'two_pass' samples everything and then trains on it; 'one_pass' takes the "
        "gradients while it samples (LoRA only): one forward pass less, always on policy, and "
        "optimizer.updates share the prompts out, so that each samples its own images",
    )
    selection: Selection = Field(default="all", description="which steps an iteration trains")
    fraction: float = Field(
        default=0.6, gt=0, le=1, description="of the steps, for random_fraction"
    )
    window: Steps = Field(default=4, description="steps in the sliding window")
    window_stride: Steps = Field(default=1, description="steps by which the window moves")
    window_every: Iterations = Field(default=25, description="iterations a window stays")
    kl_weight: Amount = Field(default=0.0, description="beta of the KL to the base; 0 is none")
    kl: Kl = Field(
        default="exact", description="the step's true KL, or Flow-GRPO's without the interval"
    )


class AdvantageConfig(Section):
    """How rewards become advantages."""

    kind: AdvantageKind = Field(default="per_prompt", description="what a reward is compared with")
    limit: Positive = Field(default=5.0, description="advantages are clipped to +-limit")
    offset: Positive = Field(default=1e-6, description="added to the standard deviation")
    ddof: Literal[0, 1] = Field(default=0, description="population's (0) or sample's (1) deviation")
    global_std: bool = Field(default=False, description="group: divide by all rewards' deviation")
    buffer_size: int = Field(
        default=32, ge=2, le=bounds.IMAGES, description="per_prompt: images remembered a prompt"
    )
    min_count: Images = Field(default=16, description="per_prompt: images before own statistics")
    combine: Literal["rewards", "advantages"] = Field(
        default="rewards", description="several rewards: normalise their sum, or sum the normalised"
    )


class RewardConfig(Section):
    """One of the rewards; a number alone in its place is its weight."""

    weight: Weight = Field(default=1.0, description="times its values; negative makes a penalty")
    name: str | None = Field(
        default=None, description="which, where the key is a label and not a reward's name"
    )
    normalise: Literal["raw", "affine", "z_score"] = Field(
        default="raw",
        description="its values as they are, scale * value + shift, or their distance from the "
        "mean of all so far in deviations of all so far",
    )
    scale: Positive = Field(default=1.0, description="for affine")
    shift: Weight = Field(default=0.0, description="for affine")
    options: dict[str, JsonValue] = Field(
        default={}, description="the reward's own, as the command rewards list shows them"
    )

    @classmethod
    def of(cls, asked: float | Mapping[str, Any] | RewardConfig) -> RewardConfig:
        """Read the short form or the long one."""
        return cls(weight=asked) if isinstance(asked, int | float) else cls.model_validate(asked)


class PromptConfig(Section):
    """What is asked for."""

    source: str = Field(
        default="scenes",
        description="a built-in set (scenes, animals, animals_activities, varied), or a file: "
        '.txt, .csv or .tsv with a column "prompt", .json, .jsonl',
    )
    held_out: str = Field(
        default="auto",
        min_length=1,
        description="prompts of the before-and-after comparison: a built-in set, a file, 'split' "
        "(some of source, which are not trained on), 'training' (the first of source, which are), "
        "or 'auto': the set's own, 'split' of a file, 'training' of a set that has none",
    )
    per_iteration: Prompts = Field(default=16, description="prompts an iteration")
    images_per_prompt: Group = Field(default=4, description="images of each prompt")
    order: Literal["shuffled", "random"] = Field(
        default="shuffled", description="each prompt once an epoch, or drawn with replacement"
    )


class OptimizerConfig(Section):
    """AdamW."""

    kind: Literal["adamw", "adamw8bit"] = Field(
        default="adamw", description="moments in float32, or in 8 bits (needs bitsandbytes)"
    )
    lr: Positive = Field(default=1e-4, description="learning rate")
    warmup: int = Field(
        default=0,
        ge=0,
        le=bounds.UPDATES,
        description="updates over which the learning rate rises from 0 to lr",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the second moment")
    weight_decay: Amount = Field(default=1e-4, description="decoupled weight decay")
    eps: Positive = Field(default=1e-8, description="added to the root of the second moment")
    max_grad_norm: float = Field(
        default=1.0, gt=0, le=bounds.NORM, description="gradients are scaled down to this norm"
    )
    updates: Images = Field(default=2, description="optimizer steps an iteration")


class RunConfig(Section):
    """How long, where, and what is kept."""

    iterations: Iterations = Field(
        default=100, description="rollouts, each followed by its updates"
    )
    micro_batch: Batch = Field(
        default=8, description="images a forward pass; changes results by rounding alone"
    )
    seed: Seed = Field(default=0, description="of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to compute; 'auto' is the GPU where there is one"
    )
    save_every: Iterations = Field(
        default=10, description="iterations between LoRA files and samples"
    )
    checkpoint_every: Iterations = Field(
        default=1, description="iterations between checkpoints to resume from"
    )
    keep_checkpoints: Iterations = Field(
        default=2, description="last checkpoints that are kept, besides the best"
    )
    tensorboard: bool = Field(default=False, description="also write TensorBoard events")
    publish: str | None = Field(
        default=None,
        pattern=r"\.safetensors$",
        description="a file that the newest LoRA (with a guard, the best one) is copied to as "
        "well, in ComfyUI's models/loras for example; must not exist yet",
    )
    eval_prompts: int = Field(
        default=16, ge=0, le=bounds.PROMPTS, description="images of the before-and-after comparison"
    )
    eval_steps: Steps = Field(default=10, description="steps of the comparison's sampler")
    eval_noise: Share = Field(
        default=0.0,
        description="of the comparison: eta of DDIM, or noise level of CPS for flow models; "
        "0 without noise",
    )
    storage: Precision = Field(default="float32", description="of stored latents and noise")
    store_on: Literal["auto", "device", "cpu"] = Field(
        default="auto",
        description="where trajectories wait for the update; 'auto' is main memory for cards below "
        "32 GB; changes no result",
    )
    cache: str | None = Field(
        default=None,
        description="folder of prompt embeddings that runs share, or 'off'; PCPO_CACHE of the "
        "environment or the user's cache folder where not given",
    )
    storage_rounding: Literal["before", "after"] = Field(
        default="before", description="'after' use repeats the baselines' rounding fault, for study"
    )


class GuardConfig(Section):
    """What ends a run whose images collapse, whatever the reward that it trains says of them."""

    every: int = Field(
        default=0,
        ge=0,
        le=bounds.ITERATIONS,
        description="iterations between the guard's looks at the held-out prompts; 0 is no guard",
    )
    prompts: Prompts = Field(
        default=8, description="held-out prompts it looks at, the first of run.eval_prompts"
    )
    images: int = Field(
        default=4, ge=2, le=bounds.GROUP, description="images of each, at fixed seeds"
    )
    diversity: Diversity = Field(
        default="pixel_diversity",
        description="how unlike each other the images of a prompt are; LPIPS alone needs weights",
    )
    min_diversity: Share = Field(
        default=0.5,
        description="out of bounds below this share of the base's diversity; 0 is no bound",
    )
    max_drift: Share = Field(
        default=0.0,
        description="out of bounds where images are further than this from the base's of the same "
        "prompt and seed: root mean square of pixels from 0 to 1; 0 is no bound",
    )
    reward: str | None = Field(
        default=None, description="a second reward, which is not trained on but looked at"
    )
    reward_options: tuple[str, ...] = Field(
        default=(), description="of the second reward: OPTION=VALUE, the value JSON or a text"
    )
    max_fall: float | None = Field(
        default=None,
        gt=0,
        le=bounds.LARGE,
        description="out of bounds where the second reward is further than this below the base's, "
        "in its own units",
    )
    patience: Iterations = Field(
        default=2, description="looks out of bounds, one after the other, that end the run"
    )

    @property
    def options(self) -> dict[str, Any]:
        """The second reward's options by name."""
        pairs = (text.partition("=") for text in self.reward_options)
        return {name: json_or_text(value, f"guard's {name}") for name, _, value in pairs}
