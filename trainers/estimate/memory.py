"""Estimate what a run needs: memory of the device by stage, work, time. No torch.

Counted, not guessed: `network_costs.json` has the arithmetic and the live memory of each network,
from running it on tensors without memory (`count_networks.py`). What is not counted is named in
`Stage.parts`: the CUDA context, and 5 % that the allocator cannot use.

The tokens of an image are squares of 16 x 16 pixels; n of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...registry import REWARDS, RewardEntry
from ..config.train_config import AdvantageConfig, RewardConfig, compares_within_prompts
from ..families.registry import FAMILIES
from ..families.text.header import LAYERS
from .network_costs import DEMO_WEIGHTS, Network, network_for

GIB = float(2**30)

TOKEN = 16  # px
SMALL_CARD = 32 * GIB  # as in memory/trajectory_store.py: below it things wait in main memory
CONTEXT = 0.6 * GIB  # of CUDA with its libraries' workspaces
SLACK = 0.05  # of what is allocated

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PACKED = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes per weight."""
MOMENTS = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}
"""Bytes of AdamW per trained weight."""
ENCODING = 0.4 * GIB  # activations of 8 prompts
JUDGED = 16  # images that a reward is given at once

Values = Mapping[str, Mapping[str, Any]]
"""Sections and fields of a `TrainConfig`."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The memory of the device in a part of an iteration.

    Attributes:
        parts: bytes, by what they are for.
    """

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run needs.

    Attributes:
        stages: memory, in the order of a run.
        work: operations of an iteration, by part.
        moved: bytes of packed weights that an iteration unpacks.
        copied: bytes of blocks that an iteration copies from main memory to the device.
    """

    network: Network
    stages: tuple[Stage, ...]
    work: Mapping[str, float]
    moved: float
    iterations: int
    copied: float = 0.0

    @property
    def flop(self) -> float:
        return sum(self.work.values())

    @property
    def memory(self) -> float:
        """Bytes of the device at the worst moment."""
        return max(stage.total for stage in self.stages)


def estimate(values: Values, network: Network | None = None, card: float | None = None) -> Estimate:
    """Estimate what a config needs.

    Args:
        values: sections and fields of a `TrainConfig`.
        network: of the model; guessed from its name if None.
        card: bytes of the device; a large one if None.
    """
    network = network or network_for(values["model"]["source"])
    case = _Case(values, network, card or 2 * SMALL_CARD)
    iterations, moved = values["run"]["iterations"], case.unpacking_bytes()
    return Estimate(network, case.stages(), case.work(), moved, iterations, case.copied_bytes())


def trained_steps(values: Values) -> float:
    """The mean number of a sampler's steps that an iteration trains."""
    method = values["method"]
    steps = values["sampler"]["steps"] - values["sampler"]["drop_last"]
    if method["selection"] == "random_fraction":
        return max(1, int(steps * method["fraction"]))
    return min(steps, method["window"]) if method["selection"] == "sliding_window" else steps


def paths_per_image(values: Values) -> tuple[float, float]:
    """The mean number of paths that an image has for itself, at a sampled and at a trained step.

    Without `sampler.branches` both are 1; images of a tree share some paths.
    """
    sampler, method = values["sampler"], values["method"]
    children, at = sampler.get("branches", 1), sampler.get("branch_at", ())
    steps = sampler["steps"]
    first, last = 0.0, float(steps - sampler["drop_last"])
    if method["selection"] == "sliding_window":
        is_fixed = method.get("window_move") == "fixed"
        first = method["window_start"] if is_fixed else max(0.0, (last - method["window"]) / 2)
        last = min(last, first + method["window"])
    if children == 1:
        return 1.0, 1.0
    edges = (0, *(at or (first,)), steps)
    pieces = list(pairwise(edges))
    own = [children ** -(len(pieces) - 1.0 - depth) for depth in range(len(pieces))]
    inside = [max(0.0, min(end, last) - max(start, first)) for start, end in pieces]
    sampled = sum(share * (end - start) for share, (start, end) in zip(own, pieces, strict=True))
    trained = sum(share * length for share, length in zip(own, inside, strict=True))
    return sampled / steps, trained / (last - first)


def _polynomial(coefficients: Sequence[float], n: float) -> float:
    return sum(c * n**power for power, c in enumerate(coefficients))


@dataclass(frozen=True, slots=True)
class _Case:
    """A config on a network and a card."""

    values: Values
    network: Network
    card: float

    # what is asked for

    @property
    def model(self) -> Mapping[str, Any]:
        return self.values["model"]

    @property
    def n(self) -> float:
        side = self.network.side
        return (self.model["width"] or side) * (self.model["height"] or side) / TOKEN**2

    @property
    def images(self) -> int:
        prompts = self.values["prompts"]
        return prompts["per_iteration"] * prompts["images_per_prompt"]

    @property
    def is_guided(self) -> bool:
        return self.values["sampler"]["guidance_scale"] not in (0, 1)

    @property
    def joint(self) -> int:
        """Passes of an image that run, and are kept, together."""
        return 2 if self.is_guided and self.values["sampler"]["guidance_gradient"] == "both" else 1

    @property
    def untrained(self) -> int:
        """Passes of an image that run together where nothing is trained (`Policy.joined`)."""
        return 2 if self.is_guided and not self.model.get("compile") else self.joint

    @property
    def is_one_pass(self) -> bool:
        return self.values["method"].get("update") == "one_pass"

    @property
    def is_full(self) -> bool:
        return self.values["trainable"]["kind"] == "full"

    @property
    def trained_weights(self) -> float:
        """Trained weights."""
        adapters = self.network.adapters * self.values["trainable"]["rank"]
        return self.network.weights if self.is_full else adapters

    @property
    def compute(self) -> int:
        return BYTES[self.model["precision"]]

    @property
    def is_small(self) -> bool:
        return self.card < SMALL_CARD

    def _is_chosen(self, choice: str, chosen: str) -> bool:
        return choice == chosen or (choice == "auto" and self.is_small)

    # memory

    def stages(self) -> tuple[Stage, ...]:
        """The memory of a run, stage by stage."""
        lent = self._is_swapped or self._is_chosen(self.model["offload"], "always")
        vae = 4.0 * self.network.vae_weights
        judges, judging, _ = self._reward_costs()
        others = {"autoencoder": vae} | ({"rewards": judges} if judges else {})
        resident = self._resident() | ({} if lent else others)
        store = self._stored_bytes()
        batch = self.values["run"]["micro_batch"] * self.joint
        precision = "float32" if self.model["precision"] == "float32" else "half"
        rollout = _polynomial(self.network.memory[f"rollout_{precision}"], self.n)
        rollout *= self.values["run"]["micro_batch"] * self.untrained
        again = "_again" if self.model["gradient_checkpointing"] else ""
        kind = "full" if self.is_full else "lora"
        update = _polynomial(self.network.memory[f"{kind}_{precision}{again}"], self.n) * batch
        decode = _polynomial(self.network.decode_memory, self.n) * self.values["run"]["micro_batch"]
        whole = {"a layer made whole": self._unpacked_bytes()} if self._unpacked_bytes() else {}
        loading = {key: resident[key] for key in ("network", "two blocks") if key in resident}
        loading |= whole
        gradients = {"gradients": 4.0 * self.trained_weights}
        if self.is_one_pass:
            passes, learning = gradients | {"activations": max(update, rollout)}, {}
        else:
            passes, learning = {"forward pass": rollout}, {"activations": update}
        scoring = {"rewards": judges, "their activations": judging} if judges else {}
        return (
            self._stage("encode", self._encoders()),
            self._stage("load", loading),
            self._stage("rollout", resident | whole | store | passes),
            self._stage("decode", {"autoencoder": vae} | resident | store | {"decoder": decode}),
            self._stage("reward", resident | store | scoring),
            self._stage("update", resident | whole | store | gradients | learning),
        )

    def _stage(self, name: str, parts: Mapping[str, float]) -> Stage:
        slack = SLACK * sum(parts.values())
        context = 0.0 if self.network.weights < DEMO_WEIGHTS else CONTEXT  # a demo runs on a CPU
        return Stage(name, {**parts, "CUDA context": context, "allocator's slack": slack})

    def _encoders(self) -> dict[str, float]:
        single, other = FAMILIES[self.network.family].encoders
        if self.network.weights < DEMO_WEIGHTS:  # a demo model's is as small as itself
            single, other = self.network.weights, 0
        kept = 4 if self.is_full else self.compute
        rest, layer = LAYERS.get(FAMILIES[self.network.family].comfyui.encoders[-1], (other, 0))
        if self._is_swapped and other:
            other = min(other, rest + 2 * layer)
        weights = 4.0 * single + float(kept) * other
        return {"text encoders": weights, "activations": ENCODING if other else ENCODING / 8}

    def _resident(self) -> dict[str, float]:
        network, base = self.network, self.model["base"]
        packed = network.packable if base != "same" and not self.is_full else 0
        each = 4 if self.is_full else self.compute
        parts = {"network": each * (network.weights - packed) + PACKED.get(base, 0) * packed}
        if self._is_swapped:
            swapped = self._swapped_bytes()
            parts["network"] -= swapped
            parts["two blocks"] = 2 * swapped * network.block / network.blocks
        if not self.is_full:
            parts["adapters"] = 4.0 * self.trained_weights
        parts["optimizer"] = MOMENTS[self.values["optimizer"]["kind"]] * self.trained_weights
        if self.values["trainable"]["ema_decay"]:
            parts["average"] = 4.0 * self.trained_weights
        return parts

    @property
    def _is_swapped(self) -> bool:
        return self.model["offload"] == "blocks" and self.network.blocks > 0

    def _swapped_bytes(self) -> float:
        """Bytes of all blocks."""
        network, base = self.network, self.model["base"]
        packed = min(network.packable, network.blocks) if base != "same" else 0
        return self.compute * (network.blocks - packed) + PACKED.get(base, 0) * packed

    def _unpacked_bytes(self) -> float:
        """Bytes of the largest packed layer, unpacked, with the product that makes it."""
        is_packed = self.model["base"] != "same" and not self.is_full
        return 2.0 * self.compute * self.network.largest if is_packed else 0.0

    def _stored_bytes(self) -> dict[str, float]:
        """Bytes waiting on the device.

        These are trajectories, or in one pass the images' own gradients; those of an iteration, or
        of a micro-batch.
        """
        run = self.values["run"]
        if self.is_one_pass:
            waits = self._is_chosen(run["store_on"], "cpu")
            images = run["micro_batch"] if waits else self._waiting_images()
            return {"gradients by image": 4.0 * self.trained_weights * images}
        spec = FAMILIES[self.network.family]
        numbers = spec.channels * (TOKEN // spec.factor) ** 2 * self.n  # of a latent
        steps = self.values["sampler"]["steps"] - self.values["sampler"]["drop_last"]
        kept = steps * (2 * BYTES[run["storage"]] + 4 + (4 if self._has_kl() else 0)) + 8
        images = self.images
        if self._is_chosen(run["store_on"], "cpu"):
            images = run["micro_batch"]
        noise = 4 * (self.values["sampler"]["steps"] + 1) * run["micro_batch"]
        kept *= paths_per_image(self.values)[1]
        return {"trajectories": numbers * (images * kept + noise)}

    def _waiting_images(self) -> int:
        """Images that wait for each other's rewards in one pass."""
        prompts = self.values["prompts"]
        slots = -(-prompts["per_iteration"] // self.values["optimizer"]["updates"])
        advantage = AdvantageConfig.model_validate(self.values["advantage"])
        rewards = self._rewards()
        if compares_within_prompts(advantage, (part for part, _ in rewards)):
            unit = -(-self.values["run"]["micro_batch"] // prompts["images_per_prompt"])
            waits = any(entry.is_elsewhere for _, entry in rewards)
            slots = min(slots, 2 * unit if waits else unit)  # one is sampled while one is judged
        return slots * prompts["images_per_prompt"]

    def _rewards(self) -> list[tuple[RewardConfig, RewardEntry]]:
        asked = self.values.get("rewards", {}).items()
        parts = ((label, RewardConfig.of(part)) for label, part in asked)
        return [(p, REWARDS.entries.get(p.name or label, RewardEntry(""))) for label, p in parts]

    def _reward_costs(self) -> tuple[float, float, float]:
        """Bytes of the rewards' weights, bytes alive while one scores, operations per image."""
        weights = live = work = 0.0
        for part, entry in self._rewards():
            each = BYTES.get(str(part.options.get("dtype")), 4)
            weights += each * entry.weights
            live = max(live, each * entry.live * JUDGED)
            work += entry.work
        return weights, live, work

    def _has_kl(self) -> bool:
        return self.values["method"]["kl_weight"] > 0

    # work

    def work(self) -> dict[str, float]:
        """Operations of an iteration."""
        forward, branches = _polynomial(self.network.forward, self.n), 2 if self.is_guided else 1
        steps, trained = self.values["sampler"]["steps"], trained_steps(self.values)
        kept = steps - self.values["sampler"]["drop_last"]
        sampled, learnt = paths_per_image(self.values)
        steps, trained, kept = steps * sampled, trained * learnt, kept * learnt
        referred = trained if self.is_one_pass else kept
        referred *= self.values["method"].get("kl_fraction", 1) if self._has_kl() else 0
        passes = branches * (steps + referred)
        kind = "full" if self.is_full else "lora"
        update = self.joint * _polynomial(self.network.update[kind], self.n)
        if self.model["gradient_checkpointing"]:
            update += self.joint * forward
        if self.is_one_pass:  # its forward pass is the rollout's; the KL's gradient is a pass more
            update = (update - self.joint * forward) * (2 if self._has_kl() else 1)
        else:
            update += (branches - self.joint) * forward
        judging = self._reward_costs()[2]
        return {
            "rollout": self.images * passes * forward,
            "decode": self.images * _polynomial(self.network.decode, self.n),
            **({"reward": self.images * judging} if judging else {}),
            "update": self.images * trained * update,
        }

    def unpacking_bytes(self) -> float:
        """Bytes read and written to unpack packed weights, in all passes of an iteration."""
        base = self.model["base"]
        if base == "same" or self.is_full:
            return 0.0
        each = PACKED[base] + 3 * self.compute  # written, scaled, read
        return self._passes() * self.network.packable * each

    def copied_bytes(self) -> float:
        """Bytes of blocks that are copied to the device in all passes of an iteration."""
        return self._passes(again=0) * self._swapped_bytes() if self._is_swapped else 0.0

    def _passes(self, again: int = 1) -> float:
        """Passes of micro-batches through the network in an iteration.

        `again` counts what gradient checkpointing computes once more, for which a block that is
        brought for its backward pass is there already.
        """
        batches = self.images / self.values["run"]["micro_batch"]
        again *= 1 if self.model["gradient_checkpointing"] else 0
        learnt = (1 if self.is_one_pass else 2) + again
        sampled, trained = paths_per_image(self.values)
        passes = self.values["sampler"]["steps"] * sampled
        return batches * (passes + learnt * trained * trained_steps(self.values))
