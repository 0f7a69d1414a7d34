"""Milliseconds an image of each reward with a network, beside its network's own forward pass.

    python tests/benchmarks/rewards_speed.py --device cuda --dtype bfloat16 --out rewards.json
    python tests/benchmarks/rewards_speed.py --tiny

No checkpoint is needed: files of the real sizes and names are written with numbers at random
(about 4 GB at a time in float16, in the folder of temporary files), so that finding, reading and
converting them is measured as well. The images are on the device already, as they are in training;
prompts repeat as in a group, so their embeddings are kept after the first pass. What is reported:
seconds to load, milliseconds an image of the reward, of its network alone on prepared images, and
their ratio, which at full width should be at most 1.1. On a CPU it is the process's own time that
counts, of one thread. `--tiny` takes networks of a few layers, beside which preparing is all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from comfyui_pcpo.pcpo.pretrained import shapes
from comfyui_pcpo.pcpo.pretrained.recognise import required_shapes
from comfyui_pcpo.pcpo.rewards import load_reward
from comfyui_pcpo.pcpo.rewards.network import NetworkReward
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

from rewards_files_fixture import BLIP, CLIPS, blip_shapes, open_clip_shapes

NAMES = ("aesthetic", "clip_score", "pick_score", "hps_v2_1", "image_reward")
PROMPT = "a photograph of an astronaut riding a horse on the moon, highly detailed"
BLOCK = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).mul(0.02).half()


def numbers(shape: tuple[int, ...]) -> torch.Tensor:
    """Small numbers, the same block again and again."""
    count = torch.Size(shape).numel()
    return BLOCK.repeat(count // len(BLOCK) + 1)[:count].reshape(shape).clone()


def write(name: str, folder: Path) -> None:
    """The weight files of a reward."""
    if name == "image_reward":
        spec = shapes.BLIPS[name]
        torch.save({k: numbers(s) for k, s in blip_shapes(spec).items()}, folder / "ImageReward.pt")
        marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PROMPT.replace(",", "").split()]
        words = [*dict.fromkeys(marks), *(f"word{i}" for i in range(spec.vocabulary))]
        (folder / "vocab.txt").write_text("\n".join(words[: spec.vocabulary - 2]) + "\n")
    elif name.startswith("hps"):
        state = {k: numbers(s) for k, s in open_clip_shapes(shapes.CLIPS[name]).items()}
        torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    else:
        key = {"pick_score": "pick_score"}.get(name, "clip_l")
        state = {k: numbers(s) for k, s in required_shapes(key).items()}
        save_file(state, folder / f"{'PickScore' if key == 'pick_score' else 'clip'}.safetensors")
    if name == "aesthetic":
        head = {k: numbers(s) for k, s in required_shapes("aesthetic_head").items()}
        torch.save(head, folder / "sac+logos+ava1-l14-linearMSE.pth")


def own_forward(reward: Any, images: torch.Tensor) -> Callable[[], object]:
    """The network of a reward alone, on images that are prepared already."""
    prepared = reward.preparation(images)
    network = reward.modules()[0]
    prepared = prepared.to(next(network.parameters()).dtype)
    if reward.name != "image_reward":
        return lambda: network(pixel_values=prepared)
    tokens = reward._tokens([PROMPT] * len(images))
    ids, mask = tokens.ids.to(images.device), tokens.mask.to(images.device)

    def forward() -> object:
        seen = network(prepared).last_hidden_state
        return reward._text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
        )

    return forward


def clock(device: torch.device) -> Callable[[], float]:
    """On a CPU others' work does not count."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a call, after one that does not count."""
    times, now = [], clock(device)
    for _ in range(repeats + 1):
        start = now()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (now() - start))
    return statistics.median(times[1:])


@torch.no_grad()
def measure(name: str, asked: argparse.Namespace) -> dict[str, float | str]:
    """One reward's figures."""
    device = torch.device(asked.device)
    now = clock(device)
    sides = (asked.batch, 3, asked.side, asked.side)
    images = torch.randint(0, 256, sides, generator=torch.Generator().manual_seed(0))
    images, prompts = images.byte().to(device), [PROMPT] * asked.batch
    with tempfile.TemporaryDirectory() as folder:
        write(name, Path(folder))
        start = now()
        reward = load_reward(name, folders=[folder], dtype=asked.dtype)
        assert isinstance(reward, NetworkReward)
        for module in reward.modules():
            module.to(device)
        loading = now() - start
        whole = milliseconds(lambda: reward.measure(images, prompts), device, asked.repeats)
        alone = milliseconds(own_forward(reward, images), device, asked.repeats)
    return {
        "reward": name,
        "load_s": round(loading, 2),
        "ms_per_image": round(whole / asked.batch, 3),
        "network_ms_per_image": round(alone / asked.batch, 3),
        "ratio": round(whole / alone, 3),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rewards", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = {k: v for k, v in vars(asked).items() if k not in ("out", "rewards")}
    where = torch.cuda.get_device_name() if asked.device.startswith("cuda") else "cpu"
    report = {"settings": settings | {"device": where, "torch": torch.__version__}, "rewards": []}
    small = ({**CLIPS}, {"image_reward": BLIP}) if asked.tiny else ({}, {})
    with patch.dict(shapes.CLIPS, small[0]), patch.dict(shapes.BLIPS, small[1]):
        for name in asked.rewards:
            report["rewards"].append(measure(name, asked))
            print(json.dumps(report["rewards"][-1]), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
