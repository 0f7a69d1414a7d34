"""The rewards with a network equal their references, given the same weights.

What installs beside transformers 5 is asked itself: transformers' CLIP and processor, open_clip,
torchvision. The others' numbers were taken once (`golden/make_golden.py`).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import pytest
import rewards_fixture as fixture
import torch
from comfyui_pcpo.pcpo.pictures.tensors import pictures_of, pixels_of
from comfyui_pcpo.pcpo.pretrained import preprocess
from comfyui_pcpo.pcpo.pretrained.preprocess import Cropped, Padded
from comfyui_pcpo.pcpo.pretrained.tokenizers import CLIP_TOKENIZER, clean_prompt, clip_tokenizer
from comfyui_pcpo.pcpo.rewards import load_reward
from comfyui_pcpo.pcpo.rewards.clip_score import VARIANTS
from rewards_files_fixture import (
    CLIP_B,
    CLIP_H,
    CLIP_L,
    NAMES,
    clip_state,
    make_small,
    open_clip_shapes,
    write,
)
from torch.testing import assert_close
from torchvision import transforms
from torchvision.transforms import functional as vision
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizerFast

HERE = Path(__file__).parents[2] / "golden"
GOLDEN = json.loads((HERE / "rewards.json").read_text())
PIXELS = np.load(HERE / "rewards.npz")
EVERY = 13  # as in make_golden
PICTURES = fixture.pictures()
PROMPTS = list(fixture.PROMPTS)
# without AVX sums are rounded in another order: the same network differs from itself by 1.1e-6
EXACT = {"atol": 4e-6 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 1e-6, "rtol": 0}
OPEN_CLIP_TOKENS = open_clip.tokenizer.SimpleTokenizer()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("reward_models"))


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        yield
    made.cache_clear()


@cache
def made(name, files, **options):
    return load_reward(name, folders=[str(files)], **options)


def scored(reward, picture, prompts=PROMPTS):
    return reward.score([picture] * len(prompts), prompts).values


@cache
def reference_clip(spec, salt):
    """transformers' whole CLIP with the same weights."""
    parts = {
        f"{name}_config": {
            "hidden_size": tower.width,
            "intermediate_size": tower.inner,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "hidden_act": spec.activation,
            "projection_dim": spec.embed,
        }
        for name, tower in (("vision", spec.vision), ("text", spec.text))
    }
    parts["vision_config"]["patch_size"] = spec.patch
    model = CLIPModel(CLIPConfig(**parts, projection_dim=spec.embed)).eval()
    model.load_state_dict(clip_state(spec, salt), strict=True)
    return model


# Scores


@pytest.mark.parametrize("picture", PICTURES)
def test_aesthetic_equals_ddpos_scorer(files, picture):
    reward = made("aesthetic", files)
    found = reward.score([PICTURES[picture]], [""])
    assert found.values.dtype == torch.float32
    assert_close(found.values.item(), GOLDEN["aesthetic"][picture], **EXACT)


@pytest.mark.parametrize("picture", PICTURES)
def test_pick_score_equals_flow_grpos_scorer(files, picture):
    reward = made("pick_score", files, normalise="/26")
    expected = torch.tensor(GOLDEN["pick_score"][picture])
    assert_close(scored(reward, PICTURES[picture]), expected, **EXACT)


@pytest.mark.parametrize("name", ["hps_v2", "hps_v2_1"])
@pytest.mark.parametrize("picture", GOLDEN["hps"])
def test_hps_equals_hpsv2s_own_code(files, name, picture):
    reward = made(name, files)
    assert_close(scored(reward, PICTURES[picture]), torch.tensor(GOLDEN["hps"][picture]), **EXACT)


@pytest.mark.parametrize("picture", PICTURES)
def test_image_reward_equals_its_own_code(files, picture):
    reward = made("image_reward", files)
    expected = torch.tensor(GOLDEN["image_reward"][picture])
    assert_close(scored(reward, PICTURES[picture]), expected, **EXACT)


@pytest.mark.parametrize("name", ["hps_v2_1"])
def test_hps_equals_open_clip(files, name):
    spec = CLIP_H
    network = open_clip.model.CLIP(
        embed_dim=spec.embed,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=spec.vision.layers,
            width=spec.vision.width,
            head_width=spec.vision.width // spec.vision.heads,
            mlp_ratio=spec.vision.inner / spec.vision.width,
            patch_size=spec.patch,
            image_size=spec.size,
        ),
        text_cfg=open_clip.CLIPTextCfg(
            width=spec.text.width, heads=spec.text.heads, layers=spec.text.layers
        ),
    ).eval()
    network.load_state_dict(fixture.weights(open_clip_shapes(spec), "hps"), strict=True)
    tokens = OPEN_CLIP_TOKENS(PROMPTS)
    reward = made(name, files)
    for picture in PICTURES.values():
        image = Padded()(pixels_of(picture)).expand(len(PROMPTS), -1, -1, -1)
        with torch.no_grad():
            images = network.encode_image(image, normalize=True)
            expected = (images * network.encode_text(tokens, normalize=True)).sum(-1)
        assert_close(scored(reward, picture), expected, **EXACT)


def cosines_of_transformers(prompts, prepared, spec=CLIP_L, salt="l"):
    tokenizer = CLIPTokenizerFast.from_pretrained(CLIP_TOKENIZER)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    model = reference_clip(spec, salt)
    with torch.no_grad():
        out = model(**tokens, pixel_values=prepared.expand(len(prompts), -1, -1, -1))
    return out.logits_per_image.diagonal() / 100


@pytest.mark.parametrize("picture", PICTURES)
def test_clip_score_equals_transformers_clip(files, picture):
    processor = CLIPImageProcessorPil()
    prepared = processor(PICTURES[picture], return_tensors="pt")["pixel_values"]
    expected = cosines_of_transformers(PROMPTS, prepared)
    assert_close(scored(made("clip_score", files), PICTURES[picture]), expected, **EXACT)
    found = scored(made("clip_score", files, variant="torchmetrics"), PICTURES[picture])
    assert_close(found, (100 * expected).clamp(min=0), atol=1e-4, rtol=0)


def by_torchvision(picture, interpolation, as_tensor):
    """OpenAI's preparation (a PIL resize), or DiffusionNFT's (a tensor's)."""
    first = [transforms.ToTensor()] if as_tensor else []
    last = [] if as_tensor else [transforms.ToTensor()]
    return transforms.Compose(
        [
            *first,
            transforms.Resize(224, interpolation=interpolation),
            transforms.CenterCrop(224),
            *last,
            transforms.Normalize(preprocess.MEAN, preprocess.DEVIATION),
        ]
    )(picture.convert("RGB"))[None]


@pytest.mark.parametrize("picture", PICTURES)
def test_clip_scores_other_variants(files, picture):
    bicubic, bilinear = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.BILINEAR
    picture = PICTURES[picture]
    prepared = by_torchvision(picture, bilinear, as_tensor=True)
    reward = made("clip_score", files, variant="diffusion_nft")
    assert_close(scored(reward, picture), cosines_of_transformers(PROMPTS, prepared), **EXACT)

    prepared = by_torchvision(picture, bicubic, as_tensor=False)
    for variant, spec, salt, prefix, scale in (
        ("image_reward", CLIP_L, "l", "", 1.0),
        ("hessel", None, "b", "A photo depicts ", 2.5),
    ):
        model = reference_clip(spec or CLIP_B, salt)
        ids = OPEN_CLIP_TOKENS([prefix + prompt for prompt in PROMPTS])
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=prepared.expand(len(ids), -1, -1, -1))
        expected = scale * out.logits_per_image.diagonal() / 100
        reward = made("clip_score", files, variant=variant)
        assert VARIANTS[variant].scale == scale
        expected = expected.clamp(min=0) if variant == "hessel" else expected
        assert_close(scored(reward, picture), expected, **EXACT)


# Preparations alone


@pytest.mark.parametrize(
    "kind, preparation",
    [("clip", Cropped()), ("image_reward", Cropped(corner="even")), ("hps", Padded())],
)
@pytest.mark.parametrize("picture", PICTURES)
def test_preparations_equal_the_references(kind, preparation, picture):
    if f"{kind}/{picture}" not in PIXELS:
        assert (kind, picture) == ("hps", "fits")  # which HPSv2 does not pad
        return
    found = preparation(pixels_of(PICTURES[picture])).flatten()[::EVERY]
    assert_close(found, torch.from_numpy(PIXELS[f"{kind}/{picture}"]), **EXACT)


@pytest.mark.parametrize(
    "height, width",
    [
        (224, 224),
        (512, 512),
        (512, 768),
        (1024, 576),
        (227, 224),
        (224, 231),
        (3, 3),
        (1, 1),
        (1, 64),
    ],
)
def test_cropped_equals_transformers_and_torchvision(height, width):
    images = fixture.numbers("noise", (2, 3, height, width)).mul(60).add(128).clamp(0, 255).byte()
    expected = CLIPImageProcessorPil()(pictures_of(images), return_tensors="pt")["pixel_values"]
    assert_close(Cropped()(images), expected, **EXACT)
    bicubic = transforms.InterpolationMode.BICUBIC
    ours, theirs = (
        Cropped(corner="even")(images),
        [by_torchvision(picture, bicubic, as_tensor=False) for picture in pictures_of(images)],
    )
    assert_close(ours, torch.cat(theirs), **EXACT)


@pytest.mark.parametrize("height, width", [(224, 224), (512, 768), (1024, 576), (300, 299), (5, 7)])
def test_padded_equals_resizing_by_torchvision_and_padding(height, width):
    images = fixture.numbers("noise", (1, 3, height, width)).mul(60).add(128).clamp(0, 255).byte()
    scale = 224 / max(height, width)
    inside = [round(height * scale), round(width * scale)]
    bicubic = transforms.InterpolationMode.BICUBIC
    resized = vision.resize(images.float() / 255, inside, bicubic, antialias=True)
    top, left = (224 - inside[0]) // 2, (224 - inside[1]) // 2
    around = [left, top, 224 - inside[1] - left, 224 - inside[0] - top]
    padded = vision.pad(resized, around)
    expected = vision.normalize(padded, list(preprocess.MEAN), list(preprocess.DEVIATION))
    assert_close(Padded()(images), expected, **EXACT)


@pytest.mark.parametrize("height, width", [(512, 512), (512, 768), (1024, 576), (7, 9), (1, 50)])
def test_torch_resizes_within_one_step_of_pillow(height, width):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, height, width), generator=random).byte()
    size = preprocess.shortest_to(height, width, 224)
    found = preprocess.resized_by_torch(images, *size)
    expected = preprocess.resize(images, *size)
    far = (found.int() - expected.int()).abs()
    assert far.max() <= 1
    assert far.float().mean() < 2e-3
    soft = Cropped().with_gradient(images.float() / 255)
    assert (soft - Cropped()(images)).abs().mean() < 0.05  # not rounded, and not clipped between


# Tokenizers


def test_cleaned_prompts_have_open_clips_tokens():

    prompts = [
        *PROMPTS,
        "“curly” ‘quotes’",
        "&lt;b&gt; &amp;amp;",
        "a\n\tb  c",
        "ａｂｃ",
        "x" * 300,
    ]
    tokens = clip_tokenizer("hps_v2", clean_prompt)(prompts).ids
    expected = OPEN_CLIP_TOKENS(prompts)
    for ours, theirs in zip(tokens.tolist(), expected.tolist(), strict=True):
        length = theirs.index(49407) + 1
        assert ours[:length] == theirs[:length]
        assert set(ours[length:]) <= {49407}


def test_prompts_not_cleaned_have_transformers_tokens():
    made = CLIPTokenizerFast.from_pretrained(CLIP_TOKENIZER)
    expected = made(PROMPTS, padding=True, truncation=True, max_length=77)["input_ids"]
    assert clip_tokenizer("pick_score")(PROMPTS).ids.tolist() == expected
    theirs = OPEN_CLIP_TOKENS(PROMPTS[2:3])[0].tolist()
    assert expected[2] != theirs


# What all share


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_scores_as_its_images_alone(files, name):
    reward = made(name, files)
    pictures = [*PICTURES.values()]
    prompts = [PROMPTS[i % 4] for i in range(len(pictures))]
    together = reward.score(pictures, prompts).values
    alone = [reward.score([p], [q]).values for p, q in zip(pictures, prompts, strict=True)]
    assert_close(together, torch.cat(alone), atol=2e-5 if name == "pick_score" else 1e-6, rtol=0)
    assert len(together.unique()) > 6


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_score(files, name):
    reward = made(name, files)
    images = torch.cat([pixels_of(PICTURES["large"])] * 2)
    where = (images.float() / 255).requires_grad_()
    values = reward.value(where, PROMPTS[:2])
    near = {"pick_score": 0.5}.get(name, 0.01)
    assert_close(values.detach(), reward.score(images, PROMPTS[:2]).values, atol=near, rtol=0)
    (slope,) = torch.autograd.grad(values.sum(), where)
    assert slope.abs().sum((1, 2, 3)).min() > 0
    step = 1e-3 * slope / slope.norm()
    with torch.no_grad():
        ahead, behind = (
            reward.value(where + s * step, PROMPTS[:2]).sum().double() for s in (1, -1)
        )
    expected = 2 * (slope.double() * step.double()).sum()
    assert_close(ahead - behind, expected, rtol=0.1, atol=1e-6)
