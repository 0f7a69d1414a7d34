"""A node pack for a test's own ComfyUI: images, latents and rewards that no stock node makes.

The test copies this file into `custom_nodes`; it is never imported by the tests themselves.
"""

from __future__ import annotations

import json
import time
import types

import torch


class ProbeImages:
    """Random images whose values lie between the 8-bit ones and a little beyond 0 and 1."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("IMAGE", "LATENT")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": ("STRING", {}), "count": ("INT", {"max": 1000})}}

    def make(self, kind, count):
        channels = {"grey": 1, "rgba": 4}.get(kind, 3)
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(count, 40, 56, channels, generator=generator) * 1.1 - 0.05
        images[: count // 2] *= torch.rand(count // 2, 1, 1, 1, generator=generator)
        if kind == "half":
            images = images.half()
        if kind == "nan":
            images[-1, 3, 4, 0] = float("nan")
        if kind == "all nan":
            images[:, 3, 4, 0] = float("nan")
        numbers = torch.arange(float(count)).view(-1, 1, 1, 1)
        latent = {
            "samples": numbers.expand(-1, 4, 2, 2).clone(),
            "noise_mask": numbers.expand(-1, 1, 4, 4) / 10,
            "batch_index": [10 + i for i in range(count)],
        }
        return images, latent


class ProbeReward:
    """A reward that takes half a second a call."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("PCPO_REWARD",)
    name, needs_prompt, bounds = "slow", False, (0.0, 1.0)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return (self,)

    def score(self, images, prompts):
        print("slow reward called", flush=True)
        time.sleep(0.5)
        return types.SimpleNamespace(values=torch.zeros(len(images)), details=(), errors=())


class ProbeLatent:
    """Shows what a LATENT holds."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "show", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",)}}

    def show(self, latent):
        found = {
            "samples": latent["samples"][:, 0, 0, 0].tolist(),
            "noise_mask": [round(value, 4) for value in latent["noise_mask"][:, 0, 0, 0].tolist()],
            "batch_index": latent["batch_index"],
        }
        return {"ui": {"text": (json.dumps(found),)}}


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (ProbeImages, ProbeReward, ProbeLatent)}
