"""A model in several files, as ComfyUI users have them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

Parts = Literal["all", "text", "network"]
"""What of a model to load: "text" leaves out the network's weights, "network" the text encoders."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a model's parts.

    Attributes:
        network: a whole checkpoint, or the denoising network alone.
        text_encoders: files of text encoders, in any order; recognised by their tensors.
        vae: the autoencoder's file; None if the checkpoint has it.
        t5_tokenizer: a folder with T5's tokenizer; None to search for it.
        qwen_tokenizer: a folder with Qwen3's tokenizer; likewise.
    """

    network: Path
    text_encoders: tuple[Path, ...] = ()
    vae: Path | None = None
    t5_tokenizer: Path | None = None
    qwen_tokenizer: Path | None = None


FIELDS = tuple(field.name for field in fields(Files))[1:]
"""Those of a model's parts beside its network; the config's section `model` has them too."""
