"""How well a taste learns simulated people, and what training on it does to what they truly like.

    python tests/benchmarks/taste.py --out taste.json                    # 5 seeds; resumes
    python tests/benchmarks/taste.py --out taste.json --plot taste.png   # tables and plot

People have a hidden utility on the pictures of tiny-flow:

    warm     mean of red minus blue: linear in the head's features
    calm     right scenes (the reward scene) and little sharpness: the features cannot see the first
    dim      minus |mean light - 0.25|: not linear

Some of their votes are flipped. `agreement` asks about base images, all pairs at random or (as the
product does) half of them informative, and tests on random pairs of other prompts' images.
`training` trains tiny-flow on the truth itself, on a head of 100 votes, on it with asking on, and
on votes used directly as rewards (on each two neighbours of a prompt, 128 in all); the figure is
the true utility of held-out prompts' images before and after, in deviations of the base model's.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import torch
from comfyui_pcpo.pcpo.pictures.files import open_picture
from comfyui_pcpo.pcpo.pictures.tensors import pictures_of, pixels_of
from comfyui_pcpo.pcpo.rewards import BatchReward, Images, Scores, taste
from comfyui_pcpo.pcpo.rewards.scene import SceneReward
from comfyui_pcpo.pcpo.rewards.sharpness import Sharpness
from comfyui_pcpo.registry import REWARDS, RewardEntry
from comfyui_pcpo.trainers.config.train_config import TrainConfig, read_preset, validate
from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.run import tastes
from comfyui_pcpo.trainers.run.sampler import Request
from comfyui_pcpo.trainers.run.setup import prepare
from comfyui_pcpo.trainers.run.start import train
from comfyui_pcpo.trainers.taste.learn import draw, refit
from comfyui_pcpo.trainers.taste.store import Pair, Store

COUNTS = (25, 50, 100, 200, 400)
ARMS = ("truth", "head", "asking", "votes")
FLIPS = (0.0, 0.1, 0.25)
VOTES, ROUND = 100, 8
LINES = ("C0", "C0", "C1", "C1", "C3", "C3")


def warm(images: Images, prompts: Sequence[str]) -> torch.Tensor:
    pixels = images.double() / 255
    return (pixels[:, 0] - pixels[:, 2]).mean((1, 2))


def calm(images: Images, prompts: Sequence[str]) -> torch.Tensor:
    scene = SceneReward().score(images, prompts).values.double()
    return scene - Sharpness().score(images, prompts).values.double() / 2000


def dim(images: Images, prompts: Sequence[str]) -> torch.Tensor:
    return -((images.double() / 255).mean((1, 2, 3)) - 0.25).abs()


PEOPLE: dict[str, Callable[[Images, Sequence[str]], torch.Tensor]] = {
    "warm": warm,
    "calm": calm,
    "dim": dim,
}


class Truth(BatchReward):
    """What a person truly likes."""

    name: ClassVar[str] = "person"

    def __init__(self, who: str) -> None:
        self.who = who

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        return Scores(PEOPLE[self.who](images, prompts).float())


class Direct(Truth):
    """The person's votes as rewards: 1 for the chosen of two neighbours, 0 for the other."""

    name: ClassVar[str] = "votes"
    at_once: ClassVar[int] = 4096

    def __init__(self, who: str, flips: float, seed: int) -> None:
        super().__init__(who)
        self.flips, self.chance = flips, random.Random(seed)

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        values = torch.full((len(images),), 0.5)
        utilities = PEOPLE[self.who](images, prompts)
        for i in range(0, len(images) - 1, 2):
            best = i + int(utilities[i + 1] > utilities[i])
            best = 2 * i + 1 - best if self.chance.random() < self.flips else best
            values[best], values[2 * i + 1 - best] = 1.0, 0.0
        return Scores(values)


REWARDS.entries["person"] = RewardEntry(f"{__name__}:Truth")
REWARDS.entries["votes"] = RewardEntry(f"{__name__}:Direct")


def config_of(
    a: argparse.Namespace, seed: int, rewards: dict[str, Any], **more: Any
) -> TrainConfig:
    values = read_preset("demo-flow").model_dump(mode="json")
    values["rewards"] = rewards
    values["prompts"] |= {"per_iteration": a.prompts, "images_per_prompt": a.images}
    values["run"] |= {"iterations": a.iterations, "save_every": a.iterations, "seed": seed}
    values["optimizer"]["lr"], values["sampler"]["steps"] = a.rate, a.steps
    values["run"] |= {"eval_prompts": a.held_out, "checkpoint_every": a.iterations}
    values["run"]["eval_steps"] = a.steps + 2
    return validate(values | more, "the benchmark")


def base_images(a: argparse.Namespace, seed: int) -> tuple[Images, list[str]]:
    """Images of the base model, some of each of some prompts."""
    setup = prepare(config_of(a, seed, {"scene": 1.0}))
    chosen = random.Random(seed).sample(range(len(setup.prompts)), a.pool // a.each)
    requests = [Request(p, ("pool", seed, p, i)) for p in chosen for i in range(a.each)]
    sampled = setup.sampler.under(setup.plans.at(0))(requests)
    return sampled.images, [setup.prompts[request.prompt] for request in requests]


# --- agreement -----------------------------------------------------------------------------------


def answers(gap: torch.Tensor, flips: float, chance: torch.Generator) -> torch.Tensor:
    flipped = torch.rand(len(gap), generator=chance) < flips
    return torch.where(flipped, -gap.sign(), gap.sign()).double()


def pairs_of(prompts: Sequence[str], first: int, last: int) -> torch.Tensor:
    """All pairs of one prompt among the images from `first` to `last`."""
    rows = combinations(range(first, last), 2)
    return torch.tensor([(i, j) for i, j in rows if prompts[i] == prompts[j]])


def agreement(
    a: argparse.Namespace, who: str, flips: float, way: str, pool: Any, seed: int
) -> dict[str, Any]:
    """Share of pairs of prompts not voted on in which the head agrees with the truth, by number of
    votes, and the share that it states itself.
    """
    images, prompts, features = pool
    half = len(images) // 2
    utilities, chance = PEOPLE[who](images, prompts), torch.Generator().manual_seed(seed)
    free, tests = pairs_of(prompts, 0, half), pairs_of(prompts, half, len(images))
    free, gap = free[torch.randperm(len(free), generator=chance)], gaps(utilities, tests)
    pairs, outcomes = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0).double()
    is_random, found, head = torch.zeros(0, dtype=torch.bool), {}, None
    while len(pairs) < max(a.counts):
        round_ = max(ROUND, len(pairs) // 8)  # rounds grow: the product's, of 8, cost more fits
        count = round_ if head is None else round_ // 2
        chosen, free = free[:count], free[count:]
        if head is not None:
            open_ = (~torch.isin(free, chosen).any(1)).nonzero()[:, 0]
            rows = taste.informative(head.z(features), head, free[open_], round_ - count)
            chosen = torch.cat([chosen, free[open_[rows]]])
            is_left = torch.ones(len(free), dtype=torch.bool)
            is_left[open_[rows]] = False
            free = free[is_left]
        given = answers(gaps(utilities, chosen), flips, chance)
        pairs, outcomes = torch.cat([pairs, chosen]), torch.cat([outcomes, given])
        is_random = torch.cat([is_random, torch.arange(len(chosen)) < count])
        for votes in a.counts:
            if votes <= len(pairs) and votes not in found:
                known = taste.Choices(pairs[:votes], outcomes[:votes], is_random[:votes])
                now = fitted(features, known)
                said = gaps(now.score(now.z(features)), tests)
                right = (said * gap > 0).double()[gap != 0].mean().item()
                found[votes] = {"right": right, "itself": now.agreement}
        if way == "half":
            head = fitted(features, taste.Choices(pairs, outcomes, is_random))
    return {str(votes): value for votes, value in found.items()}


def gaps(utilities: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    return utilities[pairs[:, 0]] - utilities[pairs[:, 1]]


def fitted(features: torch.Tensor, choices: taste.Choices) -> taste.Head:
    """A head on the pictures that were voted on, as the product fits it."""
    used, places = choices.pairs.unique(return_inverse=True)
    known = taste.Choices(places.view_as(choices.pairs), choices.outcomes, choices.is_random)
    return taste.fit(features[used], known).head


# --- training ------------------------------------------------------------------------------------


def answer(store: Store, who: str, flips: float, chance: random.Random) -> None:
    """Vote on all pairs that wait."""
    for pair in store.waiting():
        both = [pixels_of(open_picture(store.image_file(d))) for d in (pair.left, pair.right)]
        left, right = PEOPLE[who](torch.cat(both), [pair.prompt] * 2).tolist()
        chosen = "left" if (left > right) != (chance.random() < flips) else "right"
        store.vote(pair, chosen)


def taught(folder: Path, who: str, flips: float, pool: Any, seed: int) -> Store:
    """A taste of `VOTES` votes on base images, in rounds as the page draws them."""
    store, chance, (images, prompts, _) = Store.new(folder), random.Random(seed), pool
    half = len(images) // 2
    store.offer(pictures_of(images[:half]), prompts[:half], "base")
    while len(store.votes()) < VOTES:
        head = refit(store) if store.votes() else None
        pairs: list[Pair] = draw(store, store.offers(), ROUND, head, chance)
        store.put(pairs[: VOTES - len(store.votes())])
        answer(store, who, flips, chance)
    refit(store)
    return store


def training(
    a: argparse.Namespace, who: str, flips: float, arm: str, pool: Any, seed: int
) -> dict[str, Any]:
    """The true utility before and after, in deviations of the base model's."""
    root = Path(tempfile.mkdtemp(prefix="pcpo-taste-"))
    try:
        direct = {"who": who, "flips": flips, "seed": seed}
        rewards: dict[str, Any] = {"person": {"options": {"who": who}}}
        if arm == "votes":
            rewards = {"votes": {"options": direct}}
        elif arm != "truth":
            store = taught(root / "taste", who, flips, pool, seed)
            rewards = {"taste": {"options": {"folder": str(store.root)}}}
        ask, chance = tastes.Tastes.ask, random.Random(seed)

        def asked(self: tastes.Tastes, *arguments: Any) -> None:
            ask(self, *arguments)
            for reward in self.rewards.values():
                answer(Store(reward.folder or ""), who, flips, chance)

        asks = {"taste": {"ask_every": 2 if arm == "asking" else 0, "pairs": 8}}
        tastes.Tastes.ask = asked if arm == "asking" else ask
        try:
            train(config_of(a, seed, rewards, **asks), root / "run")
        finally:
            tastes.Tastes.ask = ask
        return measured(root / "run", a, who, pool)
    finally:
        shutil.rmtree(root)


def measured(run: Path, a: argparse.Namespace, who: str, pool: Any) -> dict[str, Any]:
    images, prompts, _ = pool
    spread = PEOPLE[who](images, prompts).std().item()
    values = []
    for iteration in (0, a.iterations):
        folder = run / "samples" / f"{iteration:05}"
        texts = [line["prompt"] for line in json.loads((folder / "scores.json").read_text())]
        files = sorted(folder.glob("*.png"))
        shown = torch.cat([pixels_of(open_picture(file)) for file in files])
        values.append(PEOPLE[who](shown, texts).mean().item() / spread)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = {k: lines[-1][k] for k in ("distance_taste", "votes_taste") if k in lines[-1]}
    return {"before": values[0], "after": values[1], **more}


# --- what came out -------------------------------------------------------------------------------

Cells = dict[tuple[str, ...], list[float]]


def cells(results: dict[str, Any], kind: str) -> Cells:
    """All seeds' figures by person, flips and way (with the votes), or by person, flips and arm."""
    found: Cells = {}
    for key, value in results.items():
        is_of, _, *rest = key.split("/")
        if is_of != kind:
            continue
        if kind == "training":
            found.setdefault((*rest,), []).append(value["after"] - value["before"])
        else:
            for votes, parts in value.items():
                found.setdefault((*rest, votes), []).append(parts["right"])
    return found


def told(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation over seeds, with their number."""
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {spread:{form}} ({len(values)})"


def table(results: dict[str, Any]) -> str:
    """Both tables, as Markdown: means and deviations over seeds, with their number."""
    known, gained = cells(results, "agreement"), cells(results, "training")
    counts = sorted({int(key[3]) for key in known})
    head = ["person", "flipped", "pairs", *(f"{count} votes" for count in counts)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for who, flips, way in dict.fromkeys(key[:3] for key in known):
        row = [told(known.get((who, flips, way, str(count)), []), ".0%") for count in counts]
        lines.append(f"| {' | '.join([who, f'{float(flips):.0%}', way, *row])} |")
    head = ["person", "flipped", *ARMS, "head : truth"]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for who, flips in dict.fromkeys(key[:2] for key in gained):
        truth = gained.get((who, "0", "truth"), [])
        found = {arm: gained.get((who, flips, arm), []) for arm in ARMS} | {"truth": truth}
        row = [told(found[arm], ".2f") for arm in ARMS]
        share = ""
        if found["head"] and truth:
            share = f"{statistics.mean(found['head']) / statistics.mean(truth):.0%}"
        lines.append(f"| {' | '.join([who, f'{float(flips):.0%}', *row, share])} |")
    return "\n".join(lines)


def draw_plot(results: dict[str, Any], target: Path) -> None:
    """Agreement by votes for each person, and what training gained."""
    from matplotlib.figure import Figure

    known, gained = cells(results, "agreement"), cells(results, "training")
    people = [who for who in PEOPLE if any(key[0] == who for key in known)]
    figure = Figure((3.2 * (len(people) + 1), 3.2), layout="constrained")
    axes = figure.subplots(1, len(people) + 1, squeeze=False)[0]
    for axis, who in zip(axes[:-1], people, strict=True):
        for (flips, way), colour in zip(
            dict.fromkeys(key[1:3] for key in known if key[0] == who), LINES, strict=False
        ):
            points = {
                int(k[3]): statistics.mean(v)
                for k, v in known.items()
                if k[:3] == (who, flips, way)
            }
            style = {"color": colour, "linestyle": "-" if way == "half" else "--", "marker": "."}
            axis.plot([*points], [*points.values()], label=f"{float(flips):.0%}, {way}", **style)
        axis.set(title=who, xscale="log", xlabel="votes", ylim=(0.45, 1), xticks=[], xticklabels=[])
        counts = sorted({int(key[3]) for key in known})
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    axes[0].set_ylabel("agreement on unseen pairs")
    axes[0].legend(title="flipped, pairs", fontsize=7, title_fontsize=7)
    bars = axes[-1]
    for i, arm in enumerate(ARMS):
        values = [gained.get((who, "0", arm), []) for who in people]
        means = [statistics.mean(value) if value else 0.0 for value in values]
        spreads = [statistics.stdev(value) if len(value) > 1 else 0.0 for value in values]
        at = [place + (i - 1.5) * 0.2 for place in range(len(people))]
        bars.bar(at, means, 0.2, yerr=spreads, label=arm)
    bars.set_xticks(range(len(people)), people)
    bars.set(title="rise of the true utility", ylabel="deviations of base images")
    bars.legend(fontsize=7)
    figure.savefig(target, dpi=110)


# --- all -----------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="taste.json")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--people", nargs="*", default=list(PEOPLE))
    parser.add_argument("--flips", type=float, nargs="*", default=list(FLIPS))
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--counts", type=int, nargs="*", default=list(COUNTS))
    parser.add_argument("--pool", type=int, default=800, help="base images")
    parser.add_argument("--each", type=int, default=8, help="of each prompt")
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--training-flips", type=float, nargs="*", default=[0.0, 0.1])
    parser.add_argument("--flipped", nargs="*", default=["warm"], help="whose votes, in training")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--plot", type=Path, help="only print the tables, and draw them to a file")
    a = parser.parse_args(arguments)
    out = Path(a.out)
    results = json.loads(out.read_text()) if out.is_file() else {}
    if a.table or a.plot:
        print(table(results))
        if a.plot:
            draw_plot(results, a.plot)
        return 0
    for seed in range(a.seeds):
        works: dict[str, Callable[[Any], Any]] = {}
        for who in a.people:
            for flips in a.flips:
                for way in ("random", "half"):
                    works[f"agreement/{seed}/{who}/{flips:g}/{way}"] = (
                        lambda pool, x=(who, flips, way), seed=seed: agreement(a, *x, pool, seed)
                    )
            for flips in a.training_flips:
                for arm in a.arms:
                    if flips and (arm == "truth" or who not in a.flipped):
                        continue  # the truth has no votes that could be flipped
                    works[f"training/{seed}/{who}/{flips:g}/{arm}"] = (
                        lambda pool, x=(who, flips, arm), seed=seed: training(a, *x, pool, seed)
                    )
        if all(key in results for key in works):
            continue
        images, prompts = base_images(a, seed)
        pool = (images, prompts, taste.grid_features(images))
        for key in sorted(works):  # agreement first, which takes seconds
            if key not in results:
                results[key] = works[key](pool)
                write_json(out, results)
                print(key, json.dumps(results[key]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
