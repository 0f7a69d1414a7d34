"""The tastes among a run's rewards: which head scores, how far from its votes, and new votes.

The run keeps each head that it scored with (taste/DIGEST.safetensors in its folder), and writes
down which one an iteration uses before it begins (taste/used.jsonl). An iteration that is done
again uses the same, so a run goes on to the same bytes, however many votes have come since.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...pcpo.pictures.tensors import pictures_of
from ...pcpo.rewards import Images, Reward, RewardUnavailable, Scores
from ...pcpo.rewards.taste import Head, Taste
from ..config.train_config import TrainConfig
from ..errors import UserError
from ..job.files import replace_file
from ..job.folder import JobError, JobFolder
from ..taste.learn import ask, refit
from ..taste.store import Line, Log, Store

if TYPE_CHECKING:
    from ..distributed.processes import Processes

Say = Callable[[str], None]
CANDIDATES = 4
"""Pictures that are offered for each pair that is asked."""
QUEUE = 3
"""No pair is asked while so many times the pairs of one time wait."""


def used_heads(
    folder: JobFolder, iteration: int, before: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The head files that the run uses at an iteration, by the rewards' labels; empty if it has not
    begun, or has no taste.

    Args:
        folder: of the run.
        iteration: from 0.
        before: digests of the heads of the iteration before, as its checkpoint has them.

    Raises:
        JobError: if a file is gone.
    """
    lines = [line for line in _log(folder).read() if line.iteration <= iteration]
    heads = dict(before or {})
    if lines and (not heads or lines[-1].iteration == iteration):
        heads = lines[-1].heads
    files = {label: _file(folder, digest) for label, digest in heads.items()}
    for label, file in files.items():
        if not file.is_file():
            raise JobError(
                f"{file}, the head that the reward {label!r} scored with, is gone; put it back, or "
                "start a new run"
            )
    return {label: str(file) for label, file in files.items()}


class Used(Line):
    """The heads of an iteration, by the rewards' labels."""

    iteration: int
    heads: dict[str, str]


def _log(folder: JobFolder) -> Log[Used]:
    """What each iteration used, in the order of iterations."""
    return Log(folder.taste / "used.jsonl", Used)


def _file(folder: JobFolder, digest: str) -> Path:
    return folder.taste / f"{digest}.safetensors"


@dataclass(slots=True)
class Tastes:
    """The tastes of a run.

    Attributes:
        rewards: by label.
        places: their indices among the run's rewards.
        distances: of this process's images of the iteration, by label.
        pictures: these images, with their prompts.
        votes: the last one that each was fitted to.
        said: what was said once.
    """

    rewards: dict[str, Taste]
    places: dict[str, int]
    distances: dict[str, list[float]] = field(default_factory=dict)
    pictures: list[tuple[Images, Sequence[str]]] = field(default_factory=list)
    votes: dict[str, str] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, labels: Iterable[str], rewards: Sequence[Reward]) -> Tastes:
        """Those among rewards; their networks may still be placed elsewhere."""
        pairs = zip(labels, rewards, strict=True)
        found: dict[str, Taste] = {}
        for label, reward in pairs:
            if isinstance(reward, Taste):
                found[label] = reward
        return cls(found, {label: rewards.index(taste) for label, taste in found.items()})

    def digests(self) -> dict[str, str]:
        """The heads that score now."""
        return {label: taste.fitted.digest for label, taste in self.rewards.items()}

    def doubts(self) -> list[str]:
        """Why not to rely on them yet, one sentence each."""
        named = ((label, taste.fitted.doubt) for label, taste in self.rewards.items())
        return [f"the reward {label!r}: {doubt}" for label, doubt in named if doubt]

    # --- which head scores -----------------------------------------------------------------------

    def renew(
        self, number: int, folder: JobFolder, config: TrainConfig, processes: Processes, say: Say
    ) -> None:
        """Take the heads of an iteration: those it used before, or those of all votes by now.

        Args:
            number: of the iteration, counted from 0.
            folder: of the run.
            config: of the run.
            processes: of the run; the first one fits, the others read.
            say: called with notes for the user.
        """
        self.distances, self.pictures = {}, []
        if not self.rewards or (number > 0 and config.taste.ask_every == 0):
            return
        with processes.in_agreement():
            if processes.is_first and all(line.iteration != number for line in _log(folder).read()):
                self._choose(number, folder, say)
        with processes.in_agreement():
            for label, file in used_heads(folder, number).items():
                self.rewards[label].fitted = Head.load(Path(file))

    def _choose(self, number: int, folder: JobFolder, say: Say) -> None:
        heads = {}
        for label, taste in self.rewards.items():
            head = taste.fitted if number == 0 else self._refitted(label, taste, say)
            heads[label] = head.digest
            with replace_file(_file(folder, head.digest)) as fresh:
                head.save(fresh)
        _log(folder).append([Used(iteration=number, heads=heads)])

    def _refitted(self, label: str, taste: Taste, say: Say) -> Head:
        """The head of all votes; the one of before if there are none new, or they are gone."""
        try:
            store = Store(taste.folder or "")
            votes = store.votes()
            last = f"{len(votes)} {votes[-1].id}" if votes else ""
            if not last or self.votes.get(label) == last:
                return taste.fitted
            head = refit(store, taste.fitted.features, taste.fitted.prior, **taste.options)
            self.votes[label] = last
            if head.votes != taste.fitted.votes:
                say(f"the reward {label!r} is fitted to {head.votes} votes")
            return head
        except (UserError, RewardUnavailable, OSError) as error:
            self._once(say, f"{error}; the run goes on with the head of {taste.fitted.votes} votes")
            return taste.fitted

    def _once(self, say: Say, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            say(text)

    # --- what it scored --------------------------------------------------------------------------

    def see(self, images: Images, prompts: Sequence[str], scores: Sequence[Scores]) -> None:
        """Take images of an iteration that were scored, and all rewards' scores of them."""
        for label, place in self.places.items():
            found = [detail["distance"] for detail in scores[place].details]
            self.distances.setdefault(label, []).extend(found)
        if self.rewards and len(images):
            self.pictures.append((images, prompts))

    def measured(self, processes: Processes) -> dict[str, Any]:
        """For the line of metrics: each head, its votes, and how far the images are from them."""
        line = {}
        for label, taste in self.rewards.items():
            own = torch.tensor(self.distances.get(label, []), dtype=torch.float64)
            sums = torch.stack([own.sum(), (own > 1).double().sum(), own.new_tensor(len(own))])
            sums = sums.float().to(processes.device)
            processes.add_up([sums])
            distance, outside, count = sums.tolist()
            line |= {
                f"distance_{label}": distance / max(1, count),
                f"outside_{label}": outside / max(1, count),
                f"votes_{label}": taste.fitted.votes,
                f"head_{label}": taste.fitted.digest,
            }
        return line

    def ask(
        self, number: int, line: Mapping[str, Any], folder: JobFolder, config: TrainConfig, say: Say
    ) -> None:
        """Put pairs of an iteration's images into the queues of the tastes, if it is time, or if
        the images are unlike those voted on.

        Args:
            number: finished iterations.
            line: what `measured` gave.
            folder: of the run.
            config: of the run.
            say: called with notes for the user.
        """
        for label, taste in self.rewards.items():
            is_far = line[f"distance_{label}"] > 1
            if is_far:
                self._once(
                    say,
                    f"the images are unlike those that the reward {label!r} was voted on, and "
                    "their scores count less; vote on new ones",
                )
            every = config.taste.ask_every
            if every and (is_far or number % every == 0):
                try:
                    self._put(taste, number, folder, config)
                except (UserError, RewardUnavailable, OSError) as error:
                    self._once(say, f"{error}; no pair is asked")

    def _put(self, taste: Taste, number: int, folder: JobFolder, config: TrainConfig) -> None:
        store, pairs = Store(taste.folder or ""), config.taste.pairs
        if len(store.waiting()) >= QUEUE * pairs:
            return
        chance = random.Random(f"{config.run.seed} {number}")
        source = f"{folder.root.resolve().name}, iteration {number}"
        chosen = self._some(CANDIDATES * pairs, chance)
        pictures = [pictures_of(image[None])[0] for image, _ in chosen]
        prompts = [prompt for _, prompt in chosen]
        ask(store, pictures, prompts, source, pairs, taste.fitted, chance, **taste.options)

    def _some(self, count: int, chance: random.Random) -> list[tuple[Tensor, str]]:
        """Some images of some prompts, so that most have another of their own prompt."""
        groups: dict[str, list[Tensor]] = {}
        for images, prompts in self.pictures:
            for image, prompt in zip(images, prompts, strict=True):
                groups.setdefault(prompt, []).append(image)
        chosen: list[tuple[Tensor, str]] = []
        for prompt in chance.sample([*groups], len(groups)):
            own = groups[prompt]
            some = chance.sample(own, min(CANDIDATES, len(own)))
            chosen += [(image, prompt) for image in some]
        return chosen[:count]
