"""ms an image of the rewards that read text, and how much of it is their networks' own.

    python tests/benchmarks/text_rewards_speed.py
    python tests/benchmarks/text_rewards_speed.py --full --device cuda --dtype bfloat16

OCR is timed on rendered words, beside RapidOCR alone on the same pictures; BERTScore on random
weights, beside the forward pass alone on the same tokens: a tiny DeBERTa, or with `--full` one of
XLarge's size. On a CPU the processor's time is counted rather than the clock's, so that other
programs do not show; it is that of all threads together.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from comfyui_pcpo.pcpo.rewards import load_reward
from comfyui_pcpo.pcpo.rewards.bert_score import LAYER, Bert
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from deberta_fixture import VOCABULARY, save_deberta

WORDS = ["Hello", "OPEN 24", "Pizza", "Welcome", "Exit", "Fresh Bread", "Stop", "Cafe"]
FULL = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}


def page(word: str, side: int) -> Image.Image:
    """A picture of a word."""
    picture = Image.new("RGB", (side, side), (245, 240, 230))
    font = ImageFont.load_default(max(8, side // 8))
    ImageDraw.Draw(picture).text((side / 2, side / 2), word, (20, 20, 20), font, "mm")
    return picture


def milliseconds(work: Callable[[int], object], count: int, device: str, rounds: int = 5) -> float:
    """The median time of one of `count` items, after a round that is not counted."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    found = []
    for i in range(rounds + 1):
        start = clock()
        work(i)
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(1000 * (clock() - start) / count)
    return sorted(found[1:])[rounds // 2]


def ocr(side: int) -> tuple[float, float]:
    """The reward, and its engine alone."""
    reward, pictures = load_reward("ocr"), [page(word, side) for word in WORDS]
    prompts = [f'"{word}"' for word in WORDS]
    assert reward.score(pictures, prompts).values.mean() > 0.9
    engine = reward._engines.get()
    alone = milliseconds(lambda _: [engine(p) for p in pictures], len(WORDS), "cpu")
    reward._engines.put(engine)
    return milliseconds(lambda _: reward.score(pictures, prompts), len(WORDS), "cpu"), alone


def bert(device: str, dtype: str, is_full: bool) -> tuple[float, float]:
    """BERTScore of captions, and the network's forward pass alone."""
    with tempfile.TemporaryDirectory() as folder:
        layer = LAYER if is_full else 2
        save_deberta(Path(folder), layer, sizes=FULL if is_full else {})
        compared = Bert(Path(folder), dtype, "vlm_bert_score", layer)
    compared.network.to(device)
    ids = torch.randint(5, VOCABULARY // 2, (2, 16, 18), device=device)

    def forward(_: int) -> None:
        with torch.no_grad():
            for part in ids:
                compared.network(input_ids=part, attention_mask=torch.ones_like(part))

    def score(i: int) -> None:
        said = [f"a photograph of two dogs {i} {j} playing on a table" for j in range(16)]
        asked = [f"The image contains two dogs {i} {j} and a table" for j in range(16)]
        compared.agreements(said, asked)

    lengths = compared.tokens(["a photograph of two dogs 1 11 playing on a table"]).ids.shape[1]
    ids = ids[..., :lengths]
    return milliseconds(score, 16, device), milliseconds(forward, 16, device)


def main() -> None:
    """Print one line a reward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="DeBERTa of XLarge's size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    a = parser.parse_args()
    torch.set_num_threads(1)
    found = {f"ocr, {side} px": ocr(side) for side in (64, 128, 256, 512, 1024)}
    size = "XLarge" if a.full else "tiny"
    found[f"BERTScore, {size}, {a.dtype}, {a.device}"] = bert(a.device, a.dtype, a.full)
    for name, (whole, network) in found.items():
        ratio = whole / network
        print(f"{name:42} {whole:8.2f} ms  network {network:8.2f} ms  ratio {ratio:5.2f}")


if __name__ == "__main__":
    main()
