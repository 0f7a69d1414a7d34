"""Runs inside ComfyUI, as a custom node or imported: never imported by the tests themselves.

Tells ComfyUI of sizes that it does not read off a file: of a Qwen3-4B with few and narrow layers,
and of a Z-Image that is 1152 wide.
"""

from __future__ import annotations

from functools import partial

import comfy.model_detection as detection
import comfy.supported_models as supported
import comfy.text_encoders.llama as llama

NARROW, HEAD = 1152, 128
QWEN = {"num_hidden_layers": 28, "num_attention_heads": 1, "num_key_value_heads": 1}
OWN = {"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0}
OWN |= {"ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0}
OWN |= {"pad_tokens_multiple": 32, "n_heads": NARROW // HEAD, "n_kv_heads": NARROW // HEAD}

NODE_CLASS_MAPPINGS: dict[str, type] = {}


class SmallZImage(supported.ZImage):
    """ComfyUI tells Z-Image by its width."""

    unet_config = {"image_model": "lumina2", "dim": NARROW}  # noqa: RUF012 (as the others)


def detected(original, *args, **kwargs):
    found = original(*args, **kwargs)
    return found | OWN if found and found.get("dim") == NARROW else found


SmallZImage.__name__ = "ZImage"
supported.models.insert(0, SmallZImage)
detection.detect_unet_config = partial(detected, detection.detect_unet_config)
llama.Qwen3_4BConfig = partial(llama.Qwen3_4BConfig, intermediate_size=64, **QWEN)
