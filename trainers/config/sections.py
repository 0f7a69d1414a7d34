"""The sections of a run's config, each field with its meaning, unit and range. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from ... import registry
from ..families.registry import FAMILIES
from ..reading import json_or_text
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

if TYPE_CHECKING:
    Transition = Credit = Ratio = Kl = Objective = AdvantageKind = Selection = str
else:
    Transition = Literal[*registry.TRANSITIONS]
    Credit = Literal[*registry.CREDITS]
    Ratio = Literal[*registry.RATIOS]
    Kl = Literal[*registry.KLS]
    Objective = Literal[*registry.OBJECTIVES]
    AdvantageKind = Literal[*registry.ADVANTAGES]
    Selection = Literal[*registry.SELECTIONS]
MeanOver = Literal["trained", "step_set", "grid"]
Update = Literal["two_pass", "one_pass"]
Precision = Literal["float32", "bfloat16", "float16"]
Diversity = Literal["pixel_diversity", "ssim_diversity", "lpips_diversity"]


NAMED = ", ".join(f"'{name}'" for spec in FAMILIES.values() for name in spec.checkpoints)
"""Models that presets name."""


class Section(BaseModel):
    """A part of the config: frozen; unknown names and infinite numbers are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """The model that is aligned."""

    source: str = Field(
        default="demo",
        description="'demo' or 'demo-flow', a diffusers folder, a checkpoint file of a "
        f"supported model, or a hub name; the presets' {NAMED} stand for a checkpoint of yours",
    )
    text_encoders: tuple[str, ...] = Field(
        default=(), description="text encoder files, for a model whose own file has none"
    )
    vae: str | None = Field(
        default=None, description="autoencoder file, for a model whose own file has none"
    )
    t5_tokenizer: str | None = Field(
        default=None, description="folder with T5's tokenizer, if there is none beside the model"
    )
    qwen_tokenizer: str | None = Field(
        default=None,
        description="folder with Qwen3's tokenizer, if there is none beside the model",
    )
    t5_length: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="T5 tokens per prompt (Flow-GRPO: 128); if not set, 256 for SD3 and 512 for "
        "FLUX",
    )
    guidance: Guidance = Field(
        default=3.5,
        description="guidance scale that FLUX.1-dev takes as an input",
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample"] = Field(
        default="auto", description="what the network predicts, if its file does not say"
    )
    zero_terminal_snr: bool | None = Field(
        default=None,
        description="whether the noise schedule ends in pure noise (v-prediction models as "
        "NoobAI's); if not set, as the file says",
    )
    clip_skip: int = Field(
        default=2,
        ge=1,
        le=12,
        description="layer of SDXL's text encoders that is read, counted from the last",
    )
    size_condition: tuple[int, ...] = Field(
        default=(),
        description="six sizes in px that SDXL is told: height and width of the original image, "
        "top and left of its crop, height and width wanted; if not set, the image's own. Of "
        "several times six, each image draws one",
    )
    train_distilled: bool = Field(
        default=False,
        description="train a model that was distilled to a few steps (Z-Image-Turbo) all the same; "
        "training breaks the distillation, and blurred images were reported",
    )
    precision: Precision = Field(
        default="float32", description="precision of the network; adapters and ratios stay float32"
    )
    width: int | None = Field(
        default=None,
        ge=8,
        le=bounds.SIDE,
        description="image width in px; if not set, the model's own",
    )
    height: int | None = Field(
        default=None,
        ge=8,
        le=bounds.SIDE,
        description="image height in px; if not set, the model's own",
    )
    allow_download: bool = Field(
        default=False, description="download a hub model that is not on this machine"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, slower updates"
    )
    compile: bool = Field(
        default=False,
        description="compile the network's transformer blocks: a slower start, then faster "
        "iterations; needs Triton on a GPU, a C++ compiler on a CPU",
    )
    base: Literal["same", "fp8", "int8", "nf4"] = Field(
        default="same",
        description="storage of a flow model's frozen weights while a LoRA is trained: in "
        "`precision`, in 8 bits, or in 4 bits (nf4; needs bitsandbytes)",
    )
    offload: Literal["auto", "never", "always", "blocks"] = Field(
        default="auto",
        description="keep the autoencoder and the rewards on the GPU only while they are used; "
        "'auto' does so on cards below 32 GB; 'blocks' also keeps a flow model's frozen blocks in "
        "main memory, each on the GPU while it runs: least memory, the same results, at some cost "
        "in time",
    )

    @field_validator("size_condition", mode="before")
    @classmethod
    def _flat(cls, sizes: Any) -> Any:
        """A list of six sizes each becomes one list."""
        if isinstance(sizes, list | tuple) and any(isinstance(s, list | tuple) for s in sizes):
            if {len(s) if isinstance(s, list | tuple) else 0 for s in sizes} != {6}:
                raise ValueError("give lists of six sizes each")
            return [size for choice in sizes for size in choice]
        return sizes

    @field_validator("size_condition")
    @classmethod
    def _six_sizes(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if len(sizes) % 6 or not all(0 <= size <= bounds.SIDE for size in sizes):
            raise ValueError(f"give six sizes of 0 to {bounds.SIDE} px, several times six, or none")
        return sizes


class TrainableConfig(Section):
    """What is trained: LoRA adapters, or all weights of the network."""

    kind: Literal["lora", "full"] = Field(
        default="lora", description="train LoRA adapters, or all weights"
    )
    rank: Rank = Field(default=4, description="rank of the LoRA adapters")
    alpha: Positive = Field(
        default=4.0, description="scale of the LoRA: its output is multiplied by alpha / rank"
    )
    targets: tuple[str, ...] = Field(
        default=(), description="names of the modules that get adapters; if empty, the attention's"
    )
    init: Literal["gaussian", "default"] = Field(
        default="gaussian",
        description="how the down-projections start: N(0, 1/rank), or peft's default (Kaiming)",
    )
    init_lora: str | None = Field(default=None, description="LoRA file to continue from")
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="decay of the averaged weights (EMA) that are exported; 0 turns averaging off",
    )
    ema_every: Updates = Field(
        default=1,
        description="updates between two steps of the average (Flow-GRPO: 8); before the first "
        "step, the trained weights are exported",
    )
    ema_ramp: bool = Field(
        default=False,
        description="average over fewer updates at first: after n updates, the decay is at most "
        "(1 + n) / (10 + n) (Flow-GRPO)",
    )
    shard: bool = Field(
        default=True,
        description="with several processes, split the weights, moments and averages of a full "
        "fine-tune between them",
    )


class SamplerConfig(Section):
    """How images are sampled while training."""

    transition: Transition = Field(
        default="ddim",
        description="kind of sampling step: ddim for diffusion models, the others for flow models",
    )
    steps: Steps = Field(default=50, description="sampling steps")
    noise_level: float = Field(
        default=1.0,
        ge=0,
        le=bounds.NOISE,
        description="noise that a step adds: eta of ddim (up to 1) and dance_sde, a of flow_sde "
        "and cps (up to 1)",
    )
    spacing: Literal["model", "leading", "trailing", "linspace"] = Field(
        default="leading",
        description="spacing of the DDIM timesteps; 'model' takes the checkpoint's own",
    )
    grid: Literal["flow_match_euler", "uniform", "inverse_count"] = Field(
        default="flow_match_euler",
        description="sigmas of a flow model: diffusers' FlowMatchEuler (Flow-GRPO on SD3.5), "
        "linspace(1, 0) (DanceGRPO), or the FLUX pipeline's",
    )
    shift: float | None = Field(
        default=None,
        gt=0,
        le=bounds.GUIDANCE,
        description="shift of a flow model's sigmas towards noise (DanceGRPO: 3); if not set, the "
        "model's own, which for FLUX depends on the image size",
    )
    whole_timesteps: bool = Field(
        default=False,
        description="round sigma down to whole thousandths for a flow model, as DanceGRPO does",
    )
    guidance_scale: Guidance = Field(
        default=1.0, description="classifier-free guidance scale; 1 turns it off"
    )
    guidance_gradient: Literal["both", "conditional"] = Field(
        default="both",
        description="train through both guidance branches (DDPO) or the conditional one "
        "(Flow-GRPO)",
    )
    negative_prompt: str = Field(
        default="", description="negative prompt, for the unconditional branch"
    )
    drop_last: int = Field(
        default=0,
        ge=0,
        le=bounds.STEPS,
        description="steps at the end that are not trained (DanceGRPO: 1)",
    )
    initial_noise: Literal["image", "prompt", "batch"] = Field(
        default="image",
        description="initial noise: each image its own, one for all images of a prompt, or one "
        "for the whole batch (DanceGRPO on SD)",
    )
    decode: Literal["final", "clean"] = Field(
        default="final", description="what is decoded: the last latent, or the last clean estimate"
    )
    branches: int = Field(
        default=1,
        ge=1,
        le=bounds.GROUP,
        description="branches into which images of a prompt split at each step of branch_at, with "
        "noise of their own from there; what they share before is sampled and trained once. 1: "
        "they share nothing",
    )
    branch_at: tuple[int, ...] = Field(
        default=(),
        description="steps, counted from 0, at which images of a prompt split into branches; none: "
        "the first step of a sliding window",
    )


class MethodConfig(Section):
    """How rewards become gradients."""

    credit: Credit = Field(
        default="proportionate",
        description="each step's share of the advantage. 'native': the sampler's own. "
        "'proportionate': PCPO's; on ddim that is 'published'. 'weighted_loss': native ratios "
        "with weighted terms. For ddim only: 'published', the authors' noise (the larger root of "
        "the paper's equation, the other branch of C_t, so its true weights are uneven); 'exact', "
        "noise at which the weights are even; 'objective_only', the sampler's own noise; "
        "'relative', a policy relative to the base",
    )
    target_weight: float | None = Field(
        default=None,
        gt=0,
        le=bounds.LARGE,
        description="mean credit w*; if not set, the mean of the native weights",
    )
    solve_weight: float | None = Field(
        default=None,
        gt=0,
        le=bounds.LARGE,
        description="w of the 'published' noise (the authors': 4.5 at 50 steps); if not set, the "
        "w that gives this grid as much noise, 1.258 times DDPM's energy",
    )
    mean_over: MeanOver = Field(
        default="trained",
        description="steps over which w* is averaged: the trained ones, within the window if "
        "there is one; all but the last ones ('step_set'); or all ('grid', the authors' DanceGRPO)",
    )
    ratio: Ratio = Field(
        default="epsilon_matching",
        description="how the log-ratio of new and old policy is computed",
    )
    objective: Objective = Field(default="log_hinge", description="clipped objective")
    clip_low: Positive = Field(default=1e-4, description="clip range for negative advantages")
    clip_high: Positive = Field(default=1e-4, description="clip range for positive advantages")
    loss_scale: Positive = Field(default=1.0, description="factor on the objective")
    update: Update = Field(
        default="two_pass",
        description="'two_pass' samples all images, then trains on them. 'one_pass' takes the "
        "gradients while it samples (LoRA only): it saves a forward pass and is always on policy; "
        "each of the optimizer.updates samples its own share of the prompts",
    )
    selection: Selection = Field(default="all", description="steps that an iteration trains")
    fraction: float = Field(
        default=0.6, gt=0, le=1, description="share of the steps that random_fraction trains"
    )
    window: Steps = Field(default=4, description="length of the sliding window in steps")
    window_move: Literal["sliding", "random", "fixed"] = Field(
        default="sliding",
        description="how the window of sliding_window moves: on from noise to image, to any place, "
        "or not at all",
    )
    window_start: int = Field(
        default=0,
        ge=0,
        le=bounds.STEPS,
        description="trained step at which a fixed window begins; 0 is the first one",
    )
    window_stride: Steps = Field(default=1, description="steps by which the window moves")
    window_every: Iterations = Field(default=25, description="iterations before the window moves")
    kl_weight: Amount = Field(
        default=0.0, description="weight (beta) of the KL to the base; 0 turns it off"
    )
    kl_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the trained steps whose KL is computed, at random in each iteration; "
        "it counts the more, so that its mean stays",
    )
    kl: Kl = Field(
        default="exact",
        description="KL of a step: exact, or as in Flow-GRPO, which leaves out the interval",
    )


class AdvantageConfig(Section):
    """How rewards become advantages."""

    kind: AdvantageKind = Field(
        default="per_prompt",
        description="what a reward is compared with: the batch, the prompt's last rewards, or its "
        "group of images",
    )
    limit: Positive = Field(default=5.0, description="advantages are clipped to -limit and +limit")
    offset: Positive = Field(default=1e-6, description="number added to the standard deviation")
    ddof: Literal[0, 1] = Field(
        default=0, description="standard deviation of the population (0) or of a sample (1)"
    )
    global_std: bool = Field(
        default=False, description="for group: divide by the standard deviation of all rewards"
    )
    buffer_size: int = Field(
        default=32,
        ge=2,
        le=bounds.IMAGES,
        description="for per_prompt: rewards to remember for each prompt",
    )
    min_count: Images = Field(
        default=16,
        description="for per_prompt: rewards that a prompt needs before it has its own statistics",
    )
    combine: Literal["rewards", "advantages"] = Field(
        default="rewards",
        description="with several rewards: normalise their sum, or normalise each and add them up",
    )
    among: Literal["prompt", "siblings"] = Field(
        default="prompt",
        description="with sampler.branches: compare all images of a prompt, or at each split the "
        "means of its branches",
    )


class RewardConfig(Section):
    """One of the rewards; a number alone in its place is its weight."""

    weight: Weight = Field(
        default=1.0, description="factor on its values; a negative one makes a penalty"
    )
    name: str | None = Field(default=None, description="name of the reward, if the key is a label")
    normalise: Literal["raw", "affine", "z_score"] = Field(
        default="raw",
        description="how its values are scaled: not at all, to scale * value + shift, or to "
        "standard deviations from the mean of all values so far",
    )
    scale: Positive = Field(default=1.0, description="for affine")
    shift: Weight = Field(default=0.0, description="for affine")
    options: dict[str, JsonValue] = Field(
        default={}, description="options of the reward, which the command rewards list shows"
    )

    @classmethod
    def of(cls, asked: float | Mapping[str, Any] | RewardConfig) -> RewardConfig:
        """Read the short form or the long one."""
        return cls(weight=asked) if isinstance(asked, int | float) else cls.model_validate(asked)


class PromptConfig(Section):
    """The prompts."""

    source: str = Field(
        default="scenes",
        description="a built-in set (scenes, animals, animals_activities, varied, tags), or a "
        'file: .txt, .csv or .tsv with a column "prompt", .json, .jsonl',
    )
    held_out: str = Field(
        default="auto",
        min_length=1,
        description="prompts of the before-and-after comparison: a built-in set, a file, 'split' "
        "(some of source, which are then not trained on), 'training' (the first of source), or "
        "'auto': the set's own; 'split' for a file, 'training' for a set that has none",
    )
    per_iteration: Prompts = Field(default=16, description="prompts per iteration")
    images_per_prompt: Group = Field(default=4, description="images per prompt")
    order: Literal["shuffled", "random"] = Field(
        default="shuffled",
        description="take each prompt once per epoch, or draw them with replacement",
    )


class OptimizerConfig(Section):
    """AdamW."""

    kind: Literal["adamw", "adamw8bit"] = Field(
        default="adamw", description="Adam's moments in float32, or in 8 bits (needs bitsandbytes)"
    )
    lr: Positive = Field(default=1e-4, description="learning rate")
    warmup: int = Field(
        default=0,
        ge=0,
        le=bounds.UPDATES,
        description="updates over which the learning rate rises from 0 to lr",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay rate of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay rate of the second moment")
    weight_decay: Amount = Field(default=1e-4, description="decoupled weight decay")
    eps: Positive = Field(default=1e-8, description="number added to the root of the second moment")
    max_grad_norm: float = Field(
        default=1.0,
        gt=0,
        le=bounds.NORM,
        description="largest norm of the gradients; larger ones are scaled down to it",
    )
    updates: Images = Field(default=2, description="optimizer updates per iteration")


class RunConfig(Section):
    """How long and where a run goes, and what it keeps."""

    iterations: Iterations = Field(
        default=100,
        description="iterations to train; each samples images, then updates the weights",
    )
    micro_batch: Batch = Field(
        default=8,
        description="images per forward pass; fewer need less memory, and results change by "
        "rounding only",
    )
    seed: Seed = Field(default=0, description="seed of all random numbers")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to compute; 'auto' takes the GPU if there is one"
    )
    save_every: Iterations = Field(
        default=10, description="iterations between saved LoRAs and samples"
    )
    checkpoint_every: Iterations = Field(
        default=1, description="iterations between the checkpoints that a run resumes from"
    )
    keep_checkpoints: Iterations = Field(
        default=2, description="newest checkpoints to keep, besides the best"
    )
    tensorboard: bool = Field(default=False, description="write TensorBoard events too")
    publish: str | None = Field(
        default=None,
        pattern=r"\.safetensors$",
        description="file to copy the newest LoRA to (with a guard, the best one), for example in "
        "ComfyUI's models/loras; it must not exist yet",
    )
    eval_prompts: int = Field(
        default=16,
        ge=0,
        le=bounds.PROMPTS,
        description="held-out prompts in the before-and-after comparison, one image each",
    )
    eval_steps: Steps = Field(default=10, description="sampling steps of the comparison")
    eval_noise: Share = Field(
        default=0.0,
        description="noise of the comparison's sampler: eta of DDIM, or the noise level of CPS "
        "for flow models; 0 is none",
    )
    storage: Precision = Field(
        default="float32", description="precision of stored latents and noise"
    )
    store_on: Literal["auto", "device", "cpu"] = Field(
        default="auto",
        description="where trajectories are kept until the update; 'auto' takes main memory for "
        "cards below 32 GB; results do not change",
    )
    cache: str | None = Field(
        default=None,
        description="folder of prompt embeddings that runs share, or 'off'; if not set, "
        "PCPO_CACHE of the environment, else the user's cache folder",
    )
    storage_rounding: Literal["before", "after"] = Field(
        default="before",
        description="when stored values are rounded: 'before' they are used, or 'after', "
        "which repeats a fault of the baselines, for study",
    )


class GuardConfig(Section):
    """The guard, which ends a run whose images collapse even if its reward goes on rising."""

    every: int = Field(
        default=0,
        ge=0,
        le=bounds.ITERATIONS,
        description="iterations between the guard's checks on held-out prompts; 0 turns the guard "
        "off",
    )
    prompts: Prompts = Field(
        default=8,
        description="held-out prompts that the guard checks, the first of run.eval_prompts",
    )
    images: int = Field(
        default=4, ge=2, le=bounds.GROUP, description="images per prompt, at fixed seeds"
    )
    diversity: Diversity = Field(
        default="pixel_diversity",
        description="measure of how much the images of a prompt differ; only LPIPS needs weights",
    )
    min_diversity: Share = Field(
        default=0.5,
        description="lowest diversity allowed, as a share of the base's; 0 sets no bound",
    )
    max_drift: Share = Field(
        default=0.0,
        description="how far an image may be from the base's at the same prompt and seed: "
        "root mean square of pixels from 0 to 1; 0 sets no bound",
    )
    reward: str | None = Field(
        default=None, description="second reward, which the guard checks and training does not use"
    )
    reward_options: tuple[str, ...] = Field(
        default=(),
        description="options of the second reward: OPTION=VALUE, the value in JSON or as text",
    )
    max_fall: float | None = Field(
        default=None,
        gt=0,
        le=bounds.LARGE,
        description="how far the second reward may fall below the base's, in its own units",
    )
    patience: Iterations = Field(
        default=2, description="consecutive checks out of bounds that end the run"
    )

    @property
    def options(self) -> dict[str, Any]:
        """The second reward's options by name."""
        pairs = (text.partition("=") for text in self.reward_options)
        return {name: json_or_text(value, f"guard's {name}") for name, _, value in pairs}


class TasteConfig(Section):
    """Votes while a run trains on a taste."""

    ask_every: int = Field(
        default=0,
        ge=0,
        le=bounds.ITERATIONS,
        description="iterations between the times that pairs of new images are put up for votes, "
        "which count from the next iteration on; 0 asks for none",
    )
    pairs: int = Field(
        default=8, ge=1, le=bounds.GROUP, description="pairs that are put up for votes at a time"
    )


class TrainFields(Section):
    """The settings of a run, each checked by itself."""

    model: ModelConfig = ModelConfig()
    trainable: TrainableConfig = TrainableConfig()
    sampler: SamplerConfig = SamplerConfig()
    method: MethodConfig = MethodConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    prompts: PromptConfig = PromptConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()
    guard: GuardConfig = GuardConfig()
    taste: TasteConfig = TasteConfig()


class TrainSettings(TrainFields):
    """A run and its rewards, each field checked by itself."""

    rewards: dict[str, Weight | RewardConfig] = Field(
        default={"scene": 1.0},
        min_length=1,
        description="rewards by name, or by a label, each with its weight or more",
    )

    @property
    def reward_parts(self) -> dict[str, RewardConfig]:
        """The rewards in their long form."""
        parts = {}
        for label, asked in self.rewards.items():
            part = RewardConfig.of(asked)
            parts[label] = part.model_copy(update={"name": part.name or label})
        return parts

    @property
    def images(self) -> int:
        """Images per iteration."""
        return self.prompts.per_iteration * self.prompts.images_per_prompt

    @property
    def tree(self) -> int:
        """Images that share the beginning of their path."""
        splits = max(1, len(self.sampler.branch_at))
        return self.sampler.branches**splits if self.sampler.branches > 1 else 1
