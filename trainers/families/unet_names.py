"""The names that the UNets of SD1.x and SDXL have in original checkpoints (LDM's)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_PLACE = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)(?:\.(.+))?")


def original_names(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (original, diffusers') names of modules or tensors, from all those of a network.

    >>> names = ["down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.proj_in"]
    >>> [original for original, _ in original_names(names)]
    ['input_blocks.1.0.in_layers.2', 'input_blocks.3.1.proj_in']
    """
    paths = list(paths)
    found = [(path, _PLACE.fullmatch(path)) for path in paths]
    resnets = {m[4] for _, m in found if m and m[1] == "down" and m[3] == "resnets"}
    attend = {m[2] for _, m in found if m and m[1] == "up" and m[3] == "attentions"}
    per_level = len(resnets) + 1
    for path, match in found:
        if match is not None:
            yield _inside(match, per_level, attend), path
            continue
        for ours, theirs in _TOP.items():
            if path == ours or path.startswith(f"{ours}."):
                yield theirs + path.removeprefix(ours), path


def original_layers(paths: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """The original layers of a network, and the modules that they are in diffusers."""
    for original, path in original_names(paths):
        yield original, (path,), False


def _inside(match: re.Match[str], per_level: int, attend: set[str]) -> str:
    side, level, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        layer, _, end = rest.partition(".")
        rest = _RESNET[layer] + (f".{end}" if end else "")
    if side is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    first = level * per_level
    if kind == "downsamplers":
        return f"input_blocks.{first + per_level}.0.op{rest.removeprefix('conv')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + per_level - 1}.{1 + (match[2] in attend)}.{rest}"
    part = int(kind == "attentions")
    if side == "down":
        return f"input_blocks.{first + index + 1}.{part}.{rest}"
    return f"output_blocks.{first + index}.{part}.{rest}"
