"""A hash of what prompt embeddings are made from: the text encoders, without loading them.

Of each tensor its name, type, shape and three pieces are read: training or merging changes all of
them, and gigabytes stay on the disk. Small files are read whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from .files import Files
from .header import read_header
from .source import Source, inspect_source
from .text.header import TOKENIZERS, find_encoders

PIECE = 4096  # bytes of a tensor's beginning, middle and end
SMALL = 32 << 20  # bytes of a file that is read whole
_SAFETENSORS = (".safetensors", ".sft")
_WIDTHS = (  # of the conditioning that a network takes: encoders are padded to them
    *("context_embedder.weight", "txt_in.weight", "vector_in.in_layer.weight"),
    *("y_embedder.mlp.0.weight", "time_text_embed.text_embedder.linear_1.weight"),
    "cap_embedder.1.weight",
)


def text_identity(files: Files, *tokenizers: Path | None) -> str:
    """SHA-256, in hexadecimal digits, of a set of text encoders.

    Network and autoencoder do not count; `tokenizers` are folders of those that the model may not
    have itself.
    """
    model = inspect_source(files.network)
    total = hashlib.sha256((model.family or "a pickle").encode())
    for text in [*_of_model(model), *(_of_file(path, "") for path in files.text_encoders)]:
        total.update(text.encode())
    own = (getattr(files, tokenizer.field) for tokenizer in TOKENIZERS.values())
    for folder in (*own, *tokenizers):
        if folder is not None and folder.is_dir():
            total.update(_of_folder(folder).encode())
    return total.hexdigest()


def _of_model(model: Source) -> Iterable[str]:
    if model.kind == "folder":
        parts = [*model.path.glob("text_encoder*"), *model.path.glob("tokenizer*")]
        yield from (_of_folder(part) for part in sorted(parts))
        configs = (model.path / name / "config.json" for name in ("transformer", "unet"))
        yield from (path.read_text(encoding="utf-8") for path in configs if path.is_file())
    elif model.kind == "safetensors":
        header = read_header(model.path)
        yield str([(key, s) for key, s in sorted(header.shapes.items()) if key.endswith(_WIDTHS)])
        yield from (_of_file(model.path, prefix) for prefix in find_encoders(header).values())
    else:
        yield _of_file(model.path, "")


def _of_folder(part: Path) -> str:
    """Hash a module's or tokenizer's folder: its files by name."""
    files = [path for path in sorted(part.iterdir()) if path.is_file()]
    return "".join(f"{part.name}/{path.name} {_of_file(path, '')}\n" for path in files)


def _of_file(path: Path, prefix: str) -> str:
    """Hash a file, or the part below a prefix if it is safetensors."""
    digest, stat = hashlib.sha256(), path.stat()
    with path.open("rb") as stream:
        if path.suffix.lower() in _SAFETENSORS:
            for piece in _pieces(stream, prefix):
                digest.update(piece)
        elif stat.st_size <= SMALL:
            digest.update(stream.read())
        else:  # a pickle, whose tensors cannot be found without reading it
            digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _pieces(stream: BinaryIO, prefix: str) -> Iterable[bytes]:
    size = int.from_bytes(stream.read(8), "little")
    header: dict[str, Any] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    for key, entry in sorted(header.items()):
        if not key.startswith(prefix):
            continue
        first, last = entry["data_offsets"]
        yield f"{key[len(prefix) :]} {entry['dtype']} {entry['shape']}\n".encode()
        for start in (first, (first + last) // 2, max(first, last - PIECE)):
            stream.seek(8 + size + start)
            yield stream.read(min(PIECE, last - start))
