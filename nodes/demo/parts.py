"""The demo models' files as ComfyUI's own MODEL, CLIP and VAE.

The folders are in diffusers' format. The sizes of tiny-sd's network and of both text encoders are
too small for ComfyUI's detection, so their classes are chosen here. tiny-flow's network is one that
ComfyUI finds to be SD3's. Both autoencoders are TAESD's.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NodeError

DTYPE = torch.float32
"""Of all parts, though the files are float16: the model is small, and CPUs compute so."""

VOCABULARY = 49408
"""Rows of the token table in ComfyUI's CLIP, whatever its config says."""

PENULTIMATE = {"layer": "hidden", "layer_idx": -2, "layer_norm_hidden_state": False}
"""What SD3 takes of CLIP-L: the layer before the last, without the norm."""

SCHEDULER = Path("scheduler", "scheduler_config.json")
PROJECTION = "text_projection.weight"
TEXT, TOKENS = "clip_l.transformer.", "text_model.embeddings.token_embedding.weight"


def load_model(folder: Path) -> Any:
    """The denoising network."""
    import comfy.model_management as management
    import comfy.utils
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models import SD15

    sizes = unet_sizes(_config(folder / "unet"))
    config = SD15(sizes)  # forces 8 heads, which the demo has
    config.set_inference_dtype(DTYPE, None)
    model = config.get_model({}, "")
    theirs = comfy.utils.unet_to_diffusers(config.unet_config)
    weights = _weights(folder / "unet" / "diffusion_pytorch_model.safetensors")
    model.diffusion_model.load_state_dict({theirs[key]: value for key, value in weights.items()})
    device, rest = management.get_torch_device(), management.unet_offload_device()
    return ModelPatcher(model, load_device=device, offload_device=rest)


def unet_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """What ComfyUI's UNet takes, from diffusers' config.

    Args:
        config: contents of unet/config.json; levels that all attend.
    """
    widths, blocks = config["block_out_channels"], config["layers_per_block"]
    levels = len(widths)
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [blocks] * levels,
        "transformer_depth": [1] * (levels * blocks),
        "transformer_depth_output": [1] * (levels * (blocks + 1)),
        "transformer_depth_middle": 1,
        "context_dim": config["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }


def load_flow_model(folder: Path) -> Any:
    """The denoising network of SD3's kind."""
    from comfy.sd import load_diffusion_model_state_dict

    weights = _weights(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    options = {"dtype": DTYPE}
    # not the dynamic kind, which reads weights from a file again
    model = load_diffusion_model_state_dict(weights, model_options=options, disable_dynamic=True)
    if model is None:
        raise NodeError("this ComfyUI does not know SD3's network; update it")
    schedule = json.loads((folder / SCHEDULER).read_text(encoding="utf-8"))
    model.model.model_sampling.set_parameters(shift=schedule["shift"])
    return model


def load_clip(folder: Path, **layer: Any) -> Any:
    """The text encoder and its tokenizer: CLIP's, with the demo's few words.

    Args:
        layer: which one is taken, where it is not the last.

    Returns:
        A CLIP; its pooled vector is projected where the file has a projection.
    """
    from comfy.sd import CLIP
    from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
    from comfy.supported_models_base import ClipTarget

    config = _config(folder / "text_encoder")
    weights = _weights(folder / "text_encoder" / "model.safetensors")
    end, length = config["eos_token_id"], config["max_position_embeddings"]
    special = {"start": config["bos_token_id"], "end": end, "pad": config["pad_token_id"]}
    encoder = partial(
        SDClipModel,
        textmodel_json_config=config,
        special_tokens=special,
        max_length=length,
        return_projected_pooled=PROJECTION in weights,
        **layer,
    )
    words = partial(
        SDTokenizer,
        tokenizer_path=str(folder / "tokenizer"),
        embedding_size=config["hidden_size"],
        max_length=length,
    )
    target = ClipTarget(
        partial(SD1Tokenizer, tokenizer=words), partial(SD1ClipModel, clip_model=encoder)
    )
    state = text_state(weights, config["hidden_size"])
    # its network may not be the dynamic kind, which reads weights from a checkpoint again
    return CLIP(target, state_dict=state, model_options={"dtype": DTYPE}, disable_dynamic=True)


def text_state(weights: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """A text encoder's weights under ComfyUI's names.

    Args:
        weights: under transformers' names, with or without "text_model.".
        width: of the encoder; a projection that it lacks becomes the identity.

    Returns:
        All that ComfyUI's class holds; tokens that the demo has no word for are zeros.
    """
    state = {
        name if name == PROJECTION else f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in weights.items()
    }
    missing = VOCABULARY - len(state[TOKENS])
    state[TOKENS] = torch.nn.functional.pad(state[TOKENS], (0, 0, 0, missing))
    state.setdefault(PROJECTION, torch.eye(width))
    return {TEXT + key: value for key, value in state.items()}


def load_vae(folder: Path) -> Any:
    """The autoencoder."""
    from comfy.latent_formats import SD3, SD15
    from comfy.sd import VAE

    weights = _weights(folder / "vae" / "diffusion_pytorch_model.safetensors")
    is_flow = _config(folder / "vae")["latent_channels"] == SD3.latent_channels
    latents = SD3() if is_flow else SD15()
    shift = latents.shift_factor if is_flow else 0.0
    return VAE(sd=vae_state(weights, latents.scale_factor, shift), dtype=DTYPE)


def vae_state(weights: dict[str, Tensor], scale: float, shift: float = 0.0) -> dict[str, Tensor]:
    """A TAESD's weights under ComfyUI's names.

    Args:
        weights: under diffusers' names. The demo's latents need no scaling.
        scale: what ComfyUI divides latents by before they reach a VAE; it is undone.
        shift: what it then adds to them; likewise.

    Returns:
        The weights, the decoder's first layer being the clamp that diffusers has no number for.
    """
    state = {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(shift)}
    for key, value in weights.items():
        part, _, layer, rest = key.split(".", 3)
        state[f"taesd_{part}.{int(layer) + (part == 'decoder')}.{rest}"] = value
    return state


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _weights(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {key: value.to(DTYPE) for key, value in load_file(file).items()}
