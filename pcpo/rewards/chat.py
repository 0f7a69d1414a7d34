"""Ask a vision language model behind an OpenAI-compatible server about pictures.

vLLM, SGLang, llama.cpp and Ollama are such servers. Pictures travel inside the request; the answer
is text. A picture without an answer is that picture's error; if none of a batch gets an answer, and
not because of the pictures, the server is at fault, and scoring stops.
"""

from __future__ import annotations

import base64
import io
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from PIL import Image

from ..errors import RewardUnavailable
from ..remote.http import Link, WebError, checked_link, checked_url
from .base import BatchReward

log = logging.getLogger(__name__)

KEY = "PCPO_VLM"
"""PCPO_VLM_KEY is sent to the server at PCPO_VLM_URL, and to no other."""

ANSWER_BYTES = 1 << 20
FORMATS: dict[str, dict[str, Any]] = {"jpeg": {"quality": 80}, "png": {"compress_level": 1}}
"""How Pillow saves the pictures; JPEG at 80 is DDPO's."""


@dataclass(frozen=True)
class Said:
    """The outcome of a question.

    Attributes:
        text: the answer, stripped; None if there is none.
        why: there is none.
    """

    text: str | None = None
    why: str | None = None


@dataclass(frozen=True)
class ChatReward(BatchReward):
    """A reward that asks a vision language model about each picture.

    Attributes:
        url: address of the server's API, which ends in /v1 for most.
        model: its name on the server; may be empty if the server has only one.
        image: how pictures are sent: "jpeg", at quality 80, or "png".
        max_tokens: of an answer; decoding is greedy.
        parallel: requests at once.
        timeout_seconds: longest wait for an answer.
        retries: tries after the first one, with growing pauses.

    Raises:
        ValueError: where an option cannot be one.
    """

    at_once: ClassVar[int] = 64
    is_elsewhere: ClassVar[bool] = True
    server: ClassVar[str] = KEY
    url: str = "http://127.0.0.1:8000/v1"
    model: str = ""
    image: str = "jpeg"
    max_tokens: int = 64
    parallel: int = 8
    timeout_seconds: float = 120.0
    retries: int = 3

    def __post_init__(self) -> None:
        checked_link(self.timeout_seconds, self.retries)
        object.__setattr__(self, "url", checked_url(self.url))
        if not isinstance(self.model, str):
            raise ValueError(f"model is {self.model!r}; give the name of a model of the server")
        if self.image not in FORMATS:
            raise ValueError(f"image is {self.image!r}; choose one of {', '.join(FORMATS)}")
        for name, most in (("max_tokens", 8192), ("parallel", 64)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} is {value}; it has to be a whole number from 1 to {most}")

    @cached_property
    def served_model(self) -> str:
        """The model to ask, by its name on the server.

        Raises:
            RewardUnavailable: if the server has none or several, and none is chosen.
        """
        if self.model:
            return self.model
        try:
            names = _names(self._link().ask(f"{self.url}/models"))
        except WebError as error:
            raise self._unavailable(error) from error
        if len(names) != 1:
            has = f"has {', '.join(names)}" if names else "names no model"
            raise RewardUnavailable(
                f"the language model server at {self.url} {has}; set the option 'model' of the "
                f"reward {self.name!r} to the one to ask"
            )
        return names[0]

    def ask(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[Said]:
        """Ask one question about each RGB picture; `RewardUnavailable` if none is answered."""
        model, talk = self.served_model, _BatchState(self.retries)

        def one(picture: Image.Image, question: str) -> Said | WebError:
            body = self._body(model, picture, question)
            link = self._link(talk.retries)
            try:
                answer = link.ask(f"{self.url}/chat/completions", body, talk.note_retry)
                text = text_of(answer)
                talk.note_answer()
                return Said(text)
            except WebError as error:
                talk.note_failure(error)
                return error

        with ThreadPoolExecutor(self.parallel) as pool:
            answers = list(pool.map(one, pictures, questions))
        talk.log_retries(self.url)
        errors = [said for said in answers if isinstance(said, WebError)]
        if errors and len(errors) == len(answers) and not any(e.is_of_request for e in errors):
            raise self._unavailable(errors[0])
        return [_no_answer(said) if isinstance(said, WebError) else said for said in answers]

    def identity(self) -> dict[str, Any]:
        """What the answers depend on, for a fingerprint."""
        names = ("image", "max_tokens")
        return {"model": self.served_model, **{name: getattr(self, name) for name in names}}

    def _link(self, retries: int | None = None) -> Link:
        tries = self.retries if retries is None else retries
        return Link(self.timeout_seconds, ANSWER_BYTES, tries, KEY)

    def _body(self, model: str, picture: Image.Image, question: str) -> dict[str, Any]:
        buffer = io.BytesIO()
        picture.save(buffer, self.image.upper(), **FORMATS[self.image])
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/{self.image};base64,{data}"}},
            {"type": "text", "text": question},
        ]
        settings = {"temperature": 0, "max_tokens": self.max_tokens}
        return {"model": model, "messages": [{"role": "user", "content": content}], **settings}

    def _unavailable(self, error: WebError) -> RewardUnavailable:
        return RewardUnavailable(
            f"the language model server at {self.url} cannot be used: {error}; see that one with "
            f"an OpenAI-compatible API runs there, or set the options 'url' and 'model' of the "
            f"reward {self.name!r}"
        )


class _BatchState:
    """State that the requests of one batch share."""

    def __init__(self, retries: int) -> None:
        self.retries = self._usual = retries
        self._lock = threading.Lock()
        self._is_alive = False
        self._again: Counter[str] = Counter()

    def note_retry(self, what: str) -> None:
        """Count a request that is about to be sent again."""
        with self._lock:
            self._again[what] += 1

    def note_answer(self) -> None:
        with self._lock:
            self._is_alive, self.retries = True, self._usual

    def note_failure(self, error: WebError) -> None:
        """A request was given up; until one is answered, the others are sent once each."""
        with self._lock:
            if not (self._is_alive or error.is_of_request):
                self.retries = 0

    def log_retries(self, url: str) -> None:
        """Log what was sent again, once a batch."""
        if self._again:
            whys = ", ".join(f"{why} ({count})" for why, count in self._again.most_common())
            log.warning("requests to %s were sent again: %s", url, whys)


def _no_answer(error: WebError) -> Said:
    return Said(why=f"the language model gave no answer: {error}")


def _names(said: Any) -> list[str]:
    models = said.get("data") if isinstance(said, dict) else None
    if not isinstance(models, list):
        raise WebError("an answer that lists no models")
    return [m["id"] for m in models if isinstance(m, dict) and isinstance(m.get("id"), str)]


def text_of(answer: Any) -> str:
    """The text of a chat completion, stripped; its content may be in parts.

    Raises:
        WebError: if it has no text.
    """
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise WebError("an answer that is no chat completion") from error
    if isinstance(content, list):
        content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    if not isinstance(content, str):
        raise WebError("an answer without text", is_of_request=True)
    return content.strip()
