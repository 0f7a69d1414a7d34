"""SD3 predicts and encodes here what it does in real ComfyUI.

What it needs is in comfyui_fixture.py; for the network also checkpoints/tiny_sd35.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from comfyui_fixture import HOST, MODELS, in_comfyui, needs_host
from comfyui_pcpo.trainers.families.files import Files
from comfyui_pcpo.trainers.families.sd3 import model as sd3
from comfyui_pcpo.trainers.families.sd3.text import TextEncoders
from comfyui_pcpo.trainers.families.text.files import load_clip, load_t5
from comfyui_pcpo.trainers.families.text.tokenizers import clip_tokenizer, t5_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

SCRIPT = Path(__file__).parent / "scripts" / "comfyui_sd3_fixture.py"
PROMPT = "a red circle left of a blue square"

pytestmark = needs_host


def load(path: Path) -> sd3.StableDiffusion3:
    return sd3.load_files(Files(path), dtype=torch.float32, vae_dtype=torch.float32)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_checkpoint_in_real_comfyui(tmp_path, suffix):
    checkpoint = MODELS / "checkpoints" / f"tiny_sd35{suffix}"
    if not checkpoint.is_file():
        pytest.skip(f"PCPO_TINY_MODELS has no checkpoints/{checkpoint.name}")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn(3, 16, 8, 12, generator=generator),
        "sigma": torch.tensor([0.05, 0.6022, 1.0]),
        "prompt": torch.tensor(list(PROMPT.encode()), dtype=torch.uint8),
    }
    paths = [tmp_path / f"{name}.safetensors" for name in ("inputs", "outputs", "saved")]
    save_file(inputs, paths[0])
    in_comfyui(SCRIPT, "predict", checkpoint, *paths)
    theirs = load_file(paths[1])
    for path in (checkpoint, paths[2]):  # what ComfyUI saves of it is read as well
        family = load(path)
        embeds = family.encode([PROMPT])
        torch.testing.assert_close(embeds.tokens, theirs["tokens"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(embeds.pooled, theirs["pooled"], rtol=1e-4, atol=1e-4)
        ours = family.predict(inputs["latents"], inputs["sigma"], embeds.expand(3))
        # the clean estimate that ComfyUI gives costs digits of the velocity where sigma is small
        torch.testing.assert_close(ours, theirs["velocity"], rtol=1e-4, atol=1e-4)
        images = family.decode(inputs["latents"]).permute(0, 2, 3, 1)
        assert (theirs["images"] * 255 - images).abs().max() <= 1
        print(f"velocity: largest difference {(ours - theirs['velocity']).abs().max():.1e}")
    paths[2].unlink()


def random_weights(make, **config) -> dict[str, Tensor]:
    """Random weights that share one buffer, so that the file is small; norms stay near 1."""
    buffer = torch.randn(300_007, generator=torch.Generator().manual_seed(1)).half()
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in make(**config).state_dict().items()}
    tensors = {}
    for number, (key, shape) in enumerate(shapes.items()):
        rows, columns = shape[0], math.prod(shape[1:])
        stride = max(1, (len(buffer) - columns - 97) // rows) if columns > 1 else 1
        stride = min(stride, columns)
        weight = buffer[number % 97 :].as_strided((rows, columns), (stride, 1)).view(shape)
        is_norm = len(shape) == 1 and key.endswith("weight")
        tensors[key] = 1 + 0.1 * weight if is_norm else weight * (0.5 / columns**0.5)
    return tensors


def shallow_encoders() -> dict[str, dict[str, Tensor]]:
    """CLIP-L, CLIP-G and T5 of their own widths, which ComfyUI fixes, but with few layers."""

    def clip(width: int) -> dict[str, Tensor]:
        config = CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=width // 64,
            projection_dim=width,
        )
        return random_weights(CLIPTextModelWithProjection, config=config)

    config = T5Config(
        vocab_size=128,
        d_model=4096,
        d_kv=64,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    t5 = random_weights(T5EncoderModel, config=config)
    t5.pop("encoder.embed_tokens.weight", None)
    return {"clip_l": clip(768), "clip_g": clip(1280), "t5xxl": t5}


def test_embeddings_in_real_comfyui(tmp_path):
    prompt = "a a a"  # of T5 tokens that a small table has
    stored = shallow_encoders()
    torch.save(stored, tmp_path / "encoders.pt")
    presents = ("lgt", "lg", "l", "g", "t", "gt")
    files = (tmp_path / "encoders.pt", tmp_path / "outputs.safetensors")
    in_comfyui(SCRIPT, "encode", *files, prompt, *presents)
    theirs = load_file(tmp_path / "outputs.safetensors")
    named = {k: {key: t.float() for key, t in part.items()} for k, part in stored.items()}
    tokenizer = t5_tokenizer(Path(HOST) / "comfy" / "text_encoders" / "t5_tokenizer")
    tokenizer_l, tokenizer_g = clip_tokenizer("clip_l"), clip_tokenizer("clip_g")
    tokenizer.__class__ = type("Small", (type(tokenizer),), {"__len__": lambda self: 128})
    l_clip = load_clip(named["clip_l"], tokenizer_l, "clip_l", "L", is_projected=False)
    g_clip = load_clip(named["clip_g"], tokenizer_g, "clip_g", "G", is_projected=True)
    t5 = load_t5(named["t5xxl"], tokenizer, "T5")
    for present in presents:
        encoders = TextEncoders(
            l_clip if "l" in present else None,
            g_clip if "g" in present else None,
            t5 if "t" in present else None,
        )
        encoders.check(4096, 2048)
        ours = encoders.encode([prompt], 4096, 2048, 77)
        for name, found in (("tokens", ours.tokens), ("pooled", ours.pooled)):
            expected = theirs[f"{present}.{name}"]
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * scale)
