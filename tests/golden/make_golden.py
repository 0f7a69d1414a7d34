"""Scores of the references themselves, with the small networks of `rewards_fixture`.

Some references do not run beside transformers 5, so this is run once in an environment of its own:

    uv venv old --python 3.11
    uv pip install --python old transformers==4.40.0 timm==0.6.13 torch torchvision "numpy<2" \
        ftfy regex
    uv pip install --python old --no-deps image-reward==1.5 hpsv2==1.2.0
    old/bin/python tests/golden/make_golden.py --ddpo DDPO --flow-grpo FLOW --clip CLIP

DDPO and FLOW are checkouts of kvablack/ddpo-pytorch and yifan123/flow_grpo; CLIP is a folder with
`bpe_simple_vocab_16e6.txt.gz` (open_clip_torch has it), beside it this repository's tokenizer is
read. It writes `rewards.json`, `rewards.npz` and `image_reward_shapes.txt` beside itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "fixtures"))

import rewards_fixture as fixture  # noqa: E402

TOKENIZER = HERE.parents[1] / "pcpo" / "pretrained" / "clip_tokenizer"
EVERY = 13  # of a prepared image's numbers, one in so many is kept


def bare(name: str, folder: Path) -> None:
    """A package whose own __init__, which does not run here, is passed over."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def installed(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


def filled(network: torch.nn.Module, salt: str = "") -> torch.nn.Module:
    shapes = {
        name: tuple(t.shape) for name, t in network.state_dict().items() if t.is_floating_point()
    }
    missing = network.load_state_dict(fixture.weights(shapes, salt), strict=False).missing_keys
    assert all(name.endswith("position_ids") for name in missing), missing
    return network.eval()


def tower(sizes: dict[str, int], **more: object) -> dict[str, object]:
    return {
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["inner"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        **more,
    }


def clip(embed: int, activation: str, salt: str) -> transformers.CLIPModel:
    config = transformers.CLIPConfig(
        text_config=tower(fixture.TEXT, hidden_act=activation, projection_dim=embed),
        vision_config=tower(
            fixture.VISION, hidden_act=activation, projection_dim=embed, patch_size=fixture.PATCH
        ),
        projection_dim=embed,
    )
    return filled(transformers.CLIPModel(config), salt)


def processor() -> transformers.CLIPProcessor:
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(str(TOKENIZER))
    return transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer)


def rgb() -> dict[str, object]:
    return {name: picture.convert("RGB") for name, picture in fixture.pictures().items()}


def planes(picture: object) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None].contiguous()


def aesthetic(ddpo: Path) -> dict[str, float]:
    """DDPO's scorer, which is given 8-bit tensors."""
    bare("ddpo_pytorch", ddpo / "ddpo_pytorch")
    scorer = importlib.import_module("ddpo_pytorch.aesthetic_scorer")
    transformers.CLIPModel.from_pretrained = classmethod(lambda *_: clip(768, "quick_gelu", "l"))
    transformers.CLIPProcessor.from_pretrained = classmethod(lambda *_: processor())
    with tempfile.TemporaryDirectory() as folder:
        head = filled(scorer.MLP(), "head")
        torch.save(head.state_dict(), Path(folder) / "sac+logos+ava1-l14-linearMSE.pth")
        scorer.ASSETS_PATH = Path(folder)
        score = scorer.AestheticScorer(torch.float32)
    return {name: score(planes(picture)).item() for name, picture in rgb().items()}


def pick_score(flow: Path) -> dict[str, list[float]]:
    """Flow-GRPO's scorer, which divides by 26."""
    bare("flow_grpo", flow / "flow_grpo")
    scorer = importlib.import_module("flow_grpo.pickscore_scorer")
    scorer.AutoProcessor.from_pretrained = classmethod(lambda *_: processor())
    scorer.AutoModel.from_pretrained = classmethod(lambda *_: clip(40, "gelu", "h"))
    score = scorer.PickScoreScorer("cpu")
    prompts = list(fixture.PROMPTS)
    return {
        name: score(prompts, [picture] * len(prompts)).tolist() for name, picture in rgb().items()
    }


def hps(vocabulary: Path) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """HPSv2's own open_clip: its network, its tokenizer and its preparation."""
    folder = installed("hpsv2")
    for name, path in (("hpsv2", folder), ("hpsv2.src", folder / "src")):
        bare(name, path)
    bare("hpsv2.src.open_clip", folder / "src" / "open_clip")
    words = "bpe_simple_vocab_16e6.txt.gz"  # which its wheel is without
    shutil.copy(vocabulary / words, folder / "src" / "open_clip" / words)
    model = importlib.import_module("hpsv2.src.open_clip.model")
    tokens = importlib.import_module("hpsv2.src.open_clip.tokenizer")
    transform = importlib.import_module("hpsv2.src.open_clip.transform")
    vision, text = fixture.VISION, fixture.TEXT
    network = model.CLIP(
        40,
        model.CLIPVisionCfg(
            layers=vision["layers"],
            width=vision["width"],
            head_width=vision["width"] // vision["heads"],
            mlp_ratio=vision["inner"] / vision["width"],
            patch_size=fixture.PATCH,
            image_size=224,
        ),
        model.CLIPTextCfg(width=text["width"], heads=text["heads"], layers=text["layers"]),
        output_dict=True,
    )
    network = filled(network, "hps")
    prepare = transform.image_transform(224, is_train=False, resize_longest_max=True)
    tokenizer = tokens.SimpleTokenizer()
    ids = [[tokenizer.encoder["<start_of_text>"], *tokenizer.encode(p)] for p in fixture.PROMPTS]
    rows = torch.zeros(len(ids), 77, dtype=torch.long)
    for i, row in enumerate(ids):
        row = [*row, tokenizer.encoder["<end_of_text>"]]
        row = row if len(row) <= 77 else [*row[:76], row[-1]]
        rows[i, : len(row)] = torch.tensor(row)
    scores, prepared = {}, {}
    for name, picture in rgb().items():
        if name == "fits":  # 224 high and not padded: the reference's network cannot take it
            continue
        image = prepare(picture)[None]
        prepared[name] = image.flatten()[::EVERY].numpy()
        with torch.no_grad():
            found = network(image.expand(len(rows), -1, -1, -1), rows)
        product = found["image_features"] @ found["text_features"].T
        scores[name] = product.diagonal().tolist()
    return scores, prepared


def image_reward_network(med: dict[str, object], vision: dict[str, int], patch: int) -> object:
    """ImageReward's network; its tower of fixed sizes is made with the given ones."""
    module = importlib.import_module("ImageReward.ImageReward")
    pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    vit = importlib.import_module("ImageReward.models.BLIP.vit")
    make = module.MLP
    module.MLP = lambda _: make(med["hidden_size"])
    pretrain.create_vit = lambda *_: (
        vit.VisionTransformer(
            img_size=224,
            patch_size=patch,
            embed_dim=vision["width"],
            depth=vision["layers"],
            num_heads=vision["heads"],
            mlp_ratio=vision["inner"] / vision["width"],
        ),
        vision["width"],
    )
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder) / "vocab.txt"
        words.write_text("\n".join(fixture.WORDS) + "\n", encoding="utf-8")
        load = transformers.BertTokenizer
        blip = importlib.import_module("ImageReward.models.BLIP.blip")
        blip.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda _: load(str(words)))
        config = Path(folder) / "med_config.json"
        config.write_text(json.dumps(med))
        network = module.ImageReward(str(config))
    module.MLP = make
    return network


def med_config(text: dict[str, int], words: int, context: int) -> dict[str, object]:
    return {
        **tower(text),
        "vocab_size": words,
        "max_position_embeddings": context,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 0,
        "add_type_embeddings": False,
        "add_cross_attention": True,
        "architectures": ["BertModel"],
        "model_type": "bert",
    }


def image_reward() -> tuple[dict[str, list[float]], list[float], dict[str, np.ndarray]]:
    """ImageReward's own code: scores, its vision tower's output for one picture, pixels."""
    folder = installed("ImageReward")
    bare("ImageReward", folder)
    bare("ImageReward.models", folder / "models")
    shim = "fairscale.nn.checkpoint.checkpoint_activations"
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint", shim):
        bare(name, folder)
    sys.modules[shim].checkpoint_wrapper = lambda module: module
    tiny = med_config(fixture.TEXT, len(fixture.WORDS) + 2, 64)
    network = filled(image_reward_network(tiny, fixture.VISION, fixture.PATCH))
    scores, prepared = {}, {}
    seen = network.blip.visual_encoder(network.preprocess(rgb()["landscape"])[None])
    for name, picture in rgb().items():
        prepared[name] = network.preprocess(picture).flatten()[::EVERY].numpy()
        with torch.no_grad():
            scores[name] = [network.score(prompt, picture) for prompt in fixture.PROMPTS]
    return scores, seen.flatten()[::EVERY].tolist(), prepared


def image_reward_shapes() -> str:
    """Names and shapes in the real ImageReward.pt."""
    vision = {"width": 1024, "layers": 24, "heads": 16, "inner": 4096}
    text = {"width": 768, "layers": 12, "heads": 12, "inner": 3072}
    full = image_reward_network(med_config(text, 30524, 512), vision, 16)
    shapes = {name: "x".join(map(str, t.shape)) for name, t in full.state_dict().items()}
    return "".join(f"{name} {shape}\n" for name, shape in shapes.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ddpo", type=Path, required=True)
    parser.add_argument("--flow-grpo", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    hps_scores, hps_pixels = hps(asked.clip)
    reward_scores, seen, reward_pixels = image_reward()
    image = transformers.CLIPImageProcessor()
    clip_pixels = {
        name: image(picture, return_tensors="pt")["pixel_values"].flatten()[::EVERY].numpy()
        for name, picture in fixture.pictures().items()
    }
    scores = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "aesthetic": aesthetic(asked.ddpo),
        "pick_score": pick_score(asked.flow_grpo),
        "hps": hps_scores,
        "image_reward": reward_scores,
        "image_reward_vision": seen,
    }
    (HERE / "rewards.json").write_text(json.dumps(scores, indent=1) + "\n")
    pixels = {"clip": clip_pixels, "hps": hps_pixels, "image_reward": reward_pixels}
    np.savez_compressed(
        HERE / "rewards.npz",
        **{f"{kind}/{name}": x for kind, part in pixels.items() for name, x in part.items()},
    )
    if not (HERE / "image_reward_shapes.txt").exists():  # takes a minute
        (HERE / "image_reward_shapes.txt").write_text(image_reward_shapes())


if __name__ == "__main__":
    main()
