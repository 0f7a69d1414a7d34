"""Model families: what the training loop needs of a model, and how one is found and loaded.

Importing this package does not import torch: `inspect_source` checks a file by its header and a
folder by its configs, so that ComfyUI's process and the config reader can refuse a model at once.

Shapes: b images in a batch; (c, h, w) one latent.
Timesteps are the network's own (0 to 999 for SD1.x) and are known only here and in the grids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .errors import ModelError
from .files import Files, Parts
from .parts import judge_files
from .registry import FAMILIES, family_of_header
from .source import Source, inspect_source

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, UInt8
    from torch import Tensor, nn

    from .embeds import Embeds
    from .flow import FlowSchedule
    from .scheduler import SchedulerConfig
__all__ = [
    "Family",
    "Files",
    "ModelError",
    "Parts",
    "Source",
    "inspect_source",
    "judge_files",
    "load_family",
]


class Family(Protocol):
    """What the loop needs of a model. All modules are frozen and in eval mode.

    Attributes:
        name: the family's name in configs and job files.
        lora_targets: module names that get adapters when the config names none.
        network: the module that is trained; may be replaced by its wrapped form (DDP, FSDP).
        vae: the autoencoder, moved to the device when it is needed, if memory is short.
        max_prompt_length: tokens of a prompt that the text encoder takes.
        base_model_version: the base's name in LoRA managers.
    """

    name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    network: Any
    vae: Any
    max_prompt_length: int

    @property
    def base_model_version(self) -> str: ...

    @property
    def text_modules(self) -> list[nn.Module]:
        """The networks of the text encoders; none once released."""
        ...

    @property
    def schedule(self) -> SchedulerConfig | FlowSchedule:
        """The noise schedule, and what a diffusion network predicts; a flow network predicts
        velocity.
        """
        ...

    @property
    def native_resolution(self) -> tuple[int, int]:
        """(width, height) in pixels that the model was made for."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(c, h, w) of one latent for an image of this size."""
        ...

    def encode(self, prompts: list[str]) -> Embeds:
        """Prompt embeddings, float32."""
        ...

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt, including start and end."""
        ...

    def release_text_encoder(self) -> None:
        """Drop the text encoder; `encode` is refused afterwards."""
        ...

    def predict(
        self,
        latents: Float[Tensor, "b c h w"],
        timestep: Tensor,
        prompt_embeds: Embeds,
    ) -> Float[Tensor, "b c h w"]:
        """The network's prediction, float32 in and out, with gradients if they are on."""
        ...

    def decode(
        self, latents: Float[Tensor, "b c h w"], batch: int = 8
    ) -> UInt8[Tensor, "b 3 height width"]:
        """Images of latents, never with gradients."""
        ...

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Trade time for memory in the backward pass."""
        ...

    def place(self, device: torch.device | str, *, text_alone: bool = False) -> None:
        """Move every module, or the text encoders alone."""
        ...


def load_family(
    source: str | Path | Files,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    vae_dtype: torch.dtype | None = None,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    allow_download: bool = False,
    parts: Parts = "all",
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Load a model from a folder, checkpoint files, or a name on the Hugging Face hub.

    Nothing is downloaded unless `allow_download` is set; weights are read from safetensors, or from
    a checkpoint by torch's restricted unpickler. A source that cannot be used raises `ModelError`:
    before weights are read if the header, the configs or the folder's contents show it.

    Args:
        source: a diffusers folder, a .safetensors or .ckpt file, "organisation/name", or the
            files of a model's parts.
        dtype: of the network; float32 if None.
        device: where the modules live.
        vae_dtype: of the autoencoder; float32 if None, which is safe for every one.
        prediction_type: "epsilon", "v_prediction" or "sample" for a single file that does not
            say; a folder says it itself and must agree.
        zero_snr: whether a diffusion model's noise schedule ends in pure noise; as the source says
            if None.
        allow_download: download a hub name that is not in the local cache.
        parts: "text" leaves a flow model's network on torch's "meta" device, to encode prompts
            with; "network" leaves the text encoders out, as after `release_text_encoder`.
        settings: of the `Family` ("guidance", "t5_length"); those that it does not have, and
            those that are None, count for nothing.

    Returns:
        The `Family`, frozen and in eval mode.

    Raises:
        ModelError: if the source cannot be used, or an option is not of the model's family.
    """
    files = source if isinstance(source, Files) else Files(Path(source))
    model = inspect_source(files.network, allow_download=allow_download)
    model = replace(model, family=model.family or _family_of_pickle(model.path))
    judge_files(files, model)
    spec = FAMILIES[model.family or ""]
    for name, value in (("prediction_type", prediction_type), ("zero_terminal_snr", zero_snr)):
        if spec.is_flow and value is not None:
            raise ModelError(
                f"{name} is {value!r}, but {model.path.name} is a flow model, which predicts the "
                "velocity; leave it out"
            )
    # torch and diffusers are imported only once the source is known to be good
    import torch

    module = spec.part("model")
    options: dict[str, Any] = {
        "dtype": dtype or torch.float32,
        "vae_dtype": vae_dtype or torch.float32,
        "parts": parts,
    }
    if not spec.is_flow:
        options |= {"prediction_type": prediction_type, "zero_snr": zero_snr}
    if model.kind == "folder":
        family = module.load_folder(model.path, **options)
    else:
        family = module.load_files(replace(files, network=model.path), **options)
    family.place(device, text_alone=parts == "text")
    for name in spec.settings:
        if (value := (settings or {}).get(name)) not in (None, ()):
            setattr(family, name, value)
    return family


def _family_of_pickle(path: Path) -> str:
    """Reading a .ckpt's header needs torch; its weights are left on the disk."""
    from .weights import header_of_pickle

    return family_of_header(header_of_pickle(path))
