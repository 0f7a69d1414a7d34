"""Whether a picture shows the text that its prompt quotes, read by RapidOCR.

The networks (PP-OCR, Apache-2.0, 31 MB) come with RapidOCR's own wheel; it is given their paths, so
that it never looks for others on the network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

import torch
from PIL import Image

from ...remedies import install
from ..errors import RewardUnavailable, versions_of
from ..pictures.tensors import Images, pictures_of
from ..scores import Scores
from .base import BatchReward, require
from .text_match import edit_score, exact_score, quoted_text, word_f1

MODES: dict[str, Callable[[str, str], float]] = {
    "edit": edit_score,
    "exact": exact_score,
    "word_f1": word_f1,
}
NETWORKS = {"Det.model_path": "PP-OCR*_det_*.onnx", "Rec.model_path": "PP-OCR*_rec_*.onnx"}
MAX_THREADS = 8
NO_TEXT = (
    "the prompt quotes no text that the picture should show; write it in double quotes, as in "
    'a sign that says "open"'
)


@dataclass(frozen=True)
class Ocr(BatchReward):
    """How far the text in a picture is the one that the prompt quotes, 0 to 1.

    What is read are all lines, top to bottom, joined without a space; a picture without text
    reads as nothing and gets 0. Case never counts, nor white space; punctuation counts for "edit"
    and "exact".

    Attributes:
        mode: "edit", 1 - edit distance / length as in Flow-GRPO; "exact", all or nothing; or
            "word_f1", the agreement of the words, with the lines as words apart.
        target: the text for all prompts; the first one in the prompt's double quotes where None.
        side: longest side in px at which text is looked for; larger images are shrunk to it.

    Raises:
        ValueError: where an option cannot be one.
    """

    name: ClassVar[str] = "ocr"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    unit: ClassVar[str] = "share"
    mode: str = "edit"
    target: str | None = None
    side: int = 320

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; choose one of {', '.join(MODES)}")
        if self.target is not None and not (isinstance(self.target, str) and self.target.strip()):
            raise ValueError(
                f"target is {self.target!r}; give the text that every picture should show, or "
                "leave it out for the one that each prompt quotes"
            )
        if isinstance(self.side, bool) or self.side not in range(64, 4097):
            raise ValueError(f"side is {self.side}; it has to be a whole number from 64 to 4096")
        require(("rapidocr", "onnxruntime"), self.name)
        _ = self.files

    @property
    def needs_prompt(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.target is None

    @cached_property
    def files(self) -> dict[str, Path]:
        """The networks, by the engine's name for their setting.

        Raises:
            RewardUnavailable: if the package lacks one.
        """
        spec = find_spec("rapidocr")
        folder = Path(spec.origin if spec and spec.origin else "rapidocr").parent / "models"
        networks = {}
        for setting, pattern in NETWORKS.items():
            there = sorted(folder.glob(pattern))
            if not there:
                raise RewardUnavailable(
                    f"the package 'rapidocr' has no {pattern} in {folder}; install it anew: "
                    f"{install('--force-reinstall', '--no-deps', 'rapidocr')}"
                )
            networks[setting] = there[-1]
        return networks

    def complaints(self, prompts: Sequence[str]) -> list[str | None]:
        wanted = self.target is None
        return [NO_TEXT if wanted and quoted_text(prompt) is None else None for prompt in prompts]

    def fingerprint(self) -> dict[str, Any]:
        """What its numbers depend on: above all the engine and its networks."""
        return {
            "reward": self.name,
            "mode": self.mode,
            "target": self.target,
            "side": self.side,
            "sha256": {path.name: _sha256(path) for path in self.files.values()},
            "versions": versions_of("rapidocr", "onnxruntime", "opencv-python-headless"),
        }

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        pictures = pictures_of(images)
        _ = self._engines  # made here, once, rather than by each thread
        with ThreadPoolExecutor(min(self._threads, len(pictures))) as pool:
            judged = list(pool.map(self._judge, pictures, prompts))
        values = torch.tensor([detail.get(self.mode, float("nan")) for detail, _ in judged])
        return Scores(values, tuple(d for d, _ in judged), tuple(why for _, why in judged))

    def read(self, picture: Image.Image) -> tuple[str, ...]:
        """The lines of text in a picture, top to bottom."""
        engine = self._engines.get()
        try:
            output = engine(picture.convert("RGB"))  # a picture: arrays would be taken as BGR
        finally:
            self._engines.put(engine)
        return tuple(output.txts or ())

    def _judge(self, picture: Image.Image, prompt: str) -> tuple[dict[str, float], str | None]:
        """The parts of a picture's score, or why it has none."""
        target = self.target or quoted_text(prompt) or ""
        try:
            lines = self.read(picture)
        except Exception as error:  # of the engine or its network, with this picture alone
            return {}, f"the text could not be read: {type(error).__name__}: {error}"
        joined, spaced = "".join(lines), " ".join(lines)
        return {
            mode: score(spaced if mode == "word_f1" else joined, target)
            for mode, score in MODES.items()
        }, None

    @property
    def _threads(self) -> int:
        return min(os.cpu_count() or 1, MAX_THREADS)

    @cached_property
    def _engines(self) -> SimpleQueue[Any]:
        """One engine per thread; a thread takes one and puts it back."""
        from rapidocr import RapidOCR

        settings: dict[str, Any] = {key: str(path) for key, path in self.files.items()}
        settings |= {
            "Global.log_level": "critical",  # it warns of each picture without text
            "Global.use_cls": False,
            "Det.limit_side_len": self.side,
            "Det.limit_type": "max",
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        }
        engines: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self._threads):
            engines.put(RapidOCR(params=settings))
        return engines


def _sha256(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
