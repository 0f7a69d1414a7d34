"""Weight files of the small networks, in the layouts that the real ones have."""

from __future__ import annotations

from pathlib import Path

import rewards_fixture as fixture
import torch
from comfyui_pcpo.pcpo.pretrained import clip as towers
from comfyui_pcpo.pcpo.pretrained import layouts, shapes
from comfyui_pcpo.pcpo.pretrained import read as stored
from comfyui_pcpo.pcpo.pretrained.shapes import BlipSpec, ClipSpec, TowerSpec
from safetensors.torch import save_file

torch.set_num_threads(1)

VISION = TowerSpec(*(fixture.VISION[k] for k in ("width", "layers", "heads", "inner")))
TEXT = TowerSpec(*(fixture.TEXT[k] for k in ("width", "layers", "heads", "inner")))
CLIP_L = ClipSpec(VISION, TEXT, fixture.PATCH, 224, 768, "quick_gelu")
CLIP_B = ClipSpec(VISION, TEXT, fixture.PATCH, 224, 36, "quick_gelu")
CLIP_H = ClipSpec(VISION, TEXT, fixture.PATCH, 224, 40, "gelu")
BLIP = BlipSpec(VISION, TEXT, fixture.PATCH, 224, len(fixture.WORDS) + 2, 64)
CLIPS = {
    "clip_l_vision": CLIP_L,
    "clip_l": CLIP_L,
    "clip_b32": CLIP_B,
    "pick_score": CLIP_H,
    "hps_v2": CLIP_H,
    "hps_v2_1": CLIP_H,
}

NAMES = ("aesthetic", "clip_score", "hps_v2", "hps_v2_1", "image_reward", "pick_score")
"""The rewards that have a network."""

STORED = {  # what `write` makes, by reward
    "aesthetic": ("sac+logos+ava1-l14-linearMSE.pth", "clip-vit-large-patch14.safetensors"),
    "clip_score": ("clip-vit-large-patch14.safetensors",),
    "hps_v2": ("HPS_v2_compressed.pt",),
    "hps_v2_1": ("HPS_v2.1_compressed.pt",),
    "image_reward": ("ImageReward.pt", "bert-base-uncased/vocab.txt"),
    "pick_score": ("PickScore_v1/model.safetensors",),
}


def make_small(monkeypatch):
    """The networks of the weight files are the small ones, and nothing is kept from before."""
    for key, spec in CLIPS.items():
        monkeypatch.setitem(shapes.CLIPS, key, spec)
    monkeypatch.setitem(shapes.BLIPS, "image_reward", BLIP)
    monkeypatch.setattr(stored, "_SEEN", {})
    towers._BUILT.clear()


def clip_state(spec: ClipSpec, salt: str) -> dict[str, torch.Tensor]:
    return fixture.weights(shapes.clip_shapes(spec), salt)


def open_clip_shapes(spec: ClipSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes as open_clip has them, written down by hand."""
    found = {"logit_scale": (), "visual.class_embedding": (spec.vision.width,)}
    found["visual.conv1.weight"] = (spec.vision.width, 3, spec.patch, spec.patch)
    for prefix, tower, places in (
        ("visual.", spec.vision, (spec.size // spec.patch) ** 2 + 1),
        ("", spec.text, spec.context),
    ):
        width = tower.width
        found[f"{prefix}positional_embedding"] = (places, width)
        for i in range(tower.layers):
            layer = f"{prefix}transformer.resblocks.{i}"
            found |= {f"{layer}.ln_{n}.{w}": (width,) for n in "12" for w in ("weight", "bias")}
            found[f"{layer}.attn.in_proj_weight"] = (3 * width, width)
            found[f"{layer}.attn.in_proj_bias"] = (3 * width,)
            found[f"{layer}.attn.out_proj.weight"] = (width, width)
            found[f"{layer}.attn.out_proj.bias"] = (width,)
            found[f"{layer}.mlp.c_fc.weight"] = (tower.inner, width)
            found[f"{layer}.mlp.c_fc.bias"] = (tower.inner,)
            found[f"{layer}.mlp.c_proj.weight"] = (width, tower.inner)
            found[f"{layer}.mlp.c_proj.bias"] = (width,)
    for norm, width in (
        ("visual.ln_pre", spec.vision.width),
        ("visual.ln_post", spec.vision.width),
        ("ln_final", spec.text.width),
    ):
        found |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    found["visual.proj"] = (spec.vision.width, spec.embed)
    found["text_projection"] = (spec.text.width, spec.embed)
    found["token_embedding.weight"] = (spec.vocabulary, spec.text.width)
    return found


def blip_shapes(spec: BlipSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes as ImageReward has them, from ours backwards."""
    found = {}
    for name, shape in shapes.blip_shapes(spec).items():
        for pattern, theirs in (
            ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
            ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
            ("vision.embeddings.patch_embedding", "blip.visual_encoder.patch_embed.proj"),
            ("vision.post_layernorm", "blip.visual_encoder.norm"),
            ("vision.encoder.layers", "blip.visual_encoder.blocks"),
            ("text.", "blip.text_encoder."),
            ("head.", "mlp."),
        ):
            if name.startswith(pattern):
                name = name.replace(pattern, theirs, 1)
                break
        if "visual_encoder.blocks" in name:
            name = name.replace("self_attn.projection", "attn.proj").replace("self_attn", "attn")
            name = name.replace("layer_norm", "norm")
        found[name] = shape
    for part, width in (("vision", spec.vision.width), ("text", spec.text.width)):
        found |= {f"blip.{part}_proj.weight": (256, width), f"blip.{part}_proj.bias": (256,)}
    return found


def write(folder: Path) -> Path:
    """All weight files, as they are called and laid out in the wild."""
    for name in ("PickScore_v1", "bert-base-uncased"):
        (folder / name).mkdir(parents=True)
    clip = clip_state(CLIP_L, "l")
    save_file(clip, folder / "clip-vit-large-patch14.safetensors")
    save_file(clip_state(CLIP_H, "h"), folder / "PickScore_v1" / "model.safetensors")
    save_file(clip_state(CLIP_B, "b"), folder / "clip-vit-base-patch32.safetensors")
    for name in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        hps = fixture.weights(open_clip_shapes(CLIP_H), "hps")
        torch.save({"epoch": 1, "state_dict": hps}, folder / name)
    torch.save(
        fixture.weights(shapes.head_shapes(768), "head"),
        folder / "sac+logos+ava1-l14-linearMSE.pth",
    )
    blip = fixture.weights(blip_shapes(BLIP))
    blip["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(blip, folder / "ImageReward.pt")
    words = folder / "bert-base-uncased" / "vocab.txt"
    words.write_text("\n".join(fixture.WORDS) + "\n", encoding="utf-8")
    return folder


def pieces(path: Path) -> dict[str, torch.Tensor]:
    return layouts.taken(stored.tensors_of(path))
