"""Recognise a weight file by the names and shapes in it.

The file's name matters only between files with the same ones: HPSv2, HPSv2.1 and PickScore are one
network, LAION has heads for other votes, and LPIPS has an older version.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import RewardUnavailable
from . import shapes
from .catalogue import WEIGHTS, metrics_of
from .layouts import piece_shapes
from .read import WHOLE, BrokenWeights, remember, sha256_of, shapes_of
from .shapes import Shapes

_LARGEST_VOCABULARY = 16 * 2**20  # bytes
_WHOLE_HASH = 64  # digits
_NAMED = ("aesthetic_head", "lpips_alex", "lpips_vgg", "alexnet", "vgg16")
"""Keys with the same shapes as weights that others trained."""

_BERT_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_DEBERTA = {
    "embeddings.word_embeddings.weight": (50265, 1024),
    "encoder.layer.39.attention.self.in_proj.weight": (3072, 1024),
    "encoder.layer.39.output.dense.weight": (1024, 4096),
}
"""Tensors of the 40th layer of DeBERTa XLarge, as far as BERTScore goes."""


def required_shapes(key: str) -> Shapes:
    """The names and shapes that a file must have.

    Args:
        key: of the catalogue; not a vocabulary, nor DeBERTa, which is not loaded here.
    """
    if metrics_of(key):
        from .metric_networks import network_shapes

        return network_shapes(key)
    if key == "aesthetic_head":
        return shapes.head_shapes(shapes.CLIPS["clip_l_vision"].embed)
    if key in shapes.BLIPS:
        return shapes.blip_shapes(shapes.BLIPS[key])
    if key in shapes.SIGLIPS:
        return shapes.siglip_shapes(shapes.SIGLIPS[key])
    spec = shapes.CLIPS[key]
    return shapes.vision_shapes(spec) if key == "clip_l_vision" else shapes.clip_shapes(spec)


def mismatch(path: Path, key: str) -> str | None:
    """Why a file's contents are not those of `key`, None if they are.

    Args:
        path: the file, or a folder in Hugging Face's format.
        key: of the catalogue.
    """
    if key == "bert_vocab":
        return _vocabulary_mismatch(path)
    return _deberta_mismatch(path) if key == "deberta" else _tensor_mismatch(path, key)


def _tensor_mismatch(path: Path, key: str) -> str | None:
    wanted, there = (
        required_shapes(key),
        remember("pieces", path, lambda p: piece_shapes(shapes_of(p))),
    )
    for name, shape in wanted.items():
        if name not in there:
            return f"it has no tensor {name} ({_shape_text(shape)})"
        if there[name] != shape:
            return f"its {name} is {_shape_text(there[name])} and not {_shape_text(shape)}"
    whole = shapes.clip_shapes(shapes.CLIPS[key]) if key == "clip_l_vision" else wanted
    more = [name for name in there if name not in whole]
    return f"it has tensors that there are none of in it, such as {more[0]}" if more else None


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"


def _vocabulary_mismatch(path: Path) -> str | None:
    """BERT's vocabulary has two tokens fewer than ImageReward's network, which adds [DEC] and
    [ENC].
    """
    try:
        if path.stat().st_size > _LARGEST_VOCABULARY:
            return "it is too large for a list of words"
        words = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        return f"it is no text ({error})"
    count = shapes.BLIPS["image_reward"].vocabulary - 2
    if len(words) != count:
        return f"it has {len(words)} lines and not {count}"
    missing = [mark for mark in _BERT_MARKS if mark not in words]
    return f"it has no {missing[0]}" if missing else None


def _deberta_mismatch(path: Path) -> str | None:
    folder = path if path.is_dir() else path.parent
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its folder has no config.json that can be read ({error})"
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "deberta":
        return f"its config.json is that of a {kind!r} and not of a 'deberta'"
    there = {name.removeprefix("deberta."): s for name, s in shapes_of(path).items()}
    for name, shape in _DEBERTA.items():
        if there.get(name) != shape:
            return f"it has no tensor {name} ({_shape_text(shape)})"
    return None


def kinds_of(path: Path) -> list[str]:
    """The keys that a file could be, by its contents; none if it cannot be read."""
    keys = []
    for key in WEIGHTS:
        try:
            if mismatch(path, key) is None:
                keys.append(key)
        except BrokenWeights:
            return []
        except RewardUnavailable:  # LPIPS's without torchvision
            continue
    return keys


def alike(key: str) -> list[str]:
    """The keys whose files have the same names and shapes, this one included."""
    if key not in shapes.CLIPS:
        return [key]
    return [k for k in shapes.CLIPS if k == key or required_shapes(k) == required_shapes(key)]


def needs_name(key: str) -> bool:
    """Whether a file's contents leave open which of several it is."""
    return len(alike(key)) > 1 or key in _NAMED


def owner(path: Path, key: str) -> str | None:
    """The key that a file's name or hash points to, among those that are alike.

    The longest hint in the file's name decides, or in its folder's if all models use that name.

    Args:
        path: the file, or a folder in Hugging Face's format.
        key: of the catalogue.

    Returns:
        The key; None if neither points to any.
    """
    known, size = WEIGHTS[key].sha256, WEIGHTS[key].size
    is_whole = known and len(known) == _WHOLE_HASH
    if is_whole and path.is_file() and path.stat().st_size == size and sha256_of(path) == known:
        return key
    told = (path.parent if path.name in WHOLE else path).name.lower()
    hints = [(len(hint), k) for k in alike(key) for hint in WEIGHTS[k].hints if hint in told]
    return max(hints)[1] if hints else None
