"""Sample images in micro-batches; an image does not depend on how they are batched.

The policy, a family's network with guidance, is called the same way in rollout and update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...pcpo import Plan, Trajectory, classifier_free, noise_streams, rollout
from ...pcpo.finite import all_finite
from ...pcpo.plan import Segment
from ...pcpo.rollout import Denoiser, generator_for
from ...pcpo.trajectory import concatenate
from ..families import Family
from ..families.embeds import Embeds, SharedEmbeds
from ..finite import NotFiniteError
from .conditioning import StoredEmbeds
from .phases import phase

Key = tuple[int | str, ...]
Latents = Float[Tensor, "b c h w"]


@dataclass(frozen=True, slots=True)
class Policy:
    """A guided network.

    Attributes:
        autocast: makes the context that every forward pass runs in.
        guidance_scale: of classifier-free guidance; at 1 there is one forward pass, not two.
        gradient: "both" runs both branches in one batch, with gradient through both; "conditional"
            runs them separately, with gradient through one. The rollout does the same at the steps
            that are trained, so that both run the same kernels.
        negative: embeddings of the negative prompt, one row.
    """

    family: Family
    autocast: Any
    guidance_scale: float
    gradient: str
    negative: Embeds

    @property
    def joined(self) -> Policy:
        """The same with both branches in one batch: for what is not trained, where it is faster."""
        return replace(self, gradient="both")

    @phase("guidance")
    def __call__(self, x: Latents, timestep: Tensor, embeds: Embeds) -> Latents:
        """The guided prediction, float32, with gradients if they are on.

        `timestep` is one for all latents, or one for each.
        """
        context: AbstractContextManager = self.autocast()
        with context:
            if self.guidance_scale == 1:
                return self.family.predict(x, timestep, embeds)
            negative = self.negative.expand(len(embeds), embeds.sizes)
            if self.gradient == "both":
                twice = timestep if timestep.ndim == 0 else timestep.repeat(2)
                pair = Embeds.concatenate([negative, embeds])
                both = self.family.predict(x.repeat(2, 1, 1, 1), twice, pair)
                unconditional, conditional = both.chunk(2)
            else:
                with torch.no_grad():
                    unconditional = self.family.predict(x, timestep, negative)
                conditional = self.family.predict(x, timestep, embeds)
        return classifier_free(conditional, unconditional, self.guidance_scale)


@dataclass(frozen=True, slots=True)
class Request:
    """One image to sample.

    Attributes:
        prompt: row of the prompt embeddings.
        initial: seed of its initial noise, if images share it.
        start: the latent that it goes on from, on the device; None to begin with noise.
    """

    prompt: int
    key: Key
    initial: Key | None = None
    start: Float[Tensor, "c h w"] | None = None

    @property
    def tree(self) -> Key:
        """The part of the key that all images have with whom this one shares its first path."""
        return self.key[:4]

    def ancestor(self, splits: int) -> Request:
        """The path that this one comes from, so many splits before.

        Its key is the beginning of this one's.
        """
        return self if splits == 0 else replace(self, key=self.key[:-splits])


@dataclass(frozen=True, slots=True)
class Sampled:
    """Sampled trajectories, where they wait for the update, and images on the CPU.

    Attributes:
        trajectories: of each of the plan's segments.
    """

    trajectories: list[Trajectory]
    images: UInt8[Tensor, "b 3 height width"]

    @property
    def trajectory(self) -> Trajectory:
        """The only one, of images that share no path."""
        (trajectory,) = self.trajectories
        return trajectory


@dataclass(frozen=True, slots=True)
class Given:
    """The inputs of a micro-batch.

    Attributes:
        noise: initial noise and one draw per step, on the device.
        denoiser: the policy with these prompts.
        untrained: the same for steps that are not trained.
        reference: its base, if wanted.
    """

    noise: Float[Tensor, "b n_plus_1 c h w"]
    denoiser: Denoiser
    untrained: Denoiser
    reference: Denoiser | None


Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class Part:
    """A micro-batch of a segment's paths.

    Attributes:
        sampler: with the segment's plan.
        batch: padded.
        rows: of the real ones among the segment's paths.
    """

    sampler: Sampler
    segment: Segment
    batch: list[Request]
    rows: range


def images_at_once(asked: int, device: torch.device) -> int:
    """Images per forward pass, if no training depends on them.

    A CPU's kernels round differently for another number of images: there each is drawn by itself,
    and is the same whatever was asked.
    """
    return 1 if device.type == "cpu" else asked


def noise_of(requests: Sequence[Request], steps: int, shape: Sequence[int]) -> Tensor:
    """The noise of a batch of requests, (b, steps + 1, *shape), on the CPU."""
    noise = noise_streams([request.key for request in requests], steps, shape)
    shared = [(i, r.initial) for i, r in enumerate(requests) if r.initial is not None]
    for i, key in shared:
        noise[i, 0] = noise_streams([key], 0, shape)[0, 0]
    return noise


def paths_of(
    requests: Sequence[Request], leaves: int, splits: int, ends: Latents | None
) -> list[Request]:
    """The paths of a plan's segment.

    Args:
        requests: the images, whole trees.
        leaves: images that each path leads to.
        splits: of a path from here to its images.
        ends: the latents that the segment before ended with; None for the first.
    """
    paths = [request.ancestor(splits) for request in requests[::leaves]]
    if ends is None:
        return paths
    children = len(paths) // len(ends)
    return [replace(path, start=ends[row // children]) for row, path in enumerate(paths)]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Samples images for requests.

    Attributes:
        plan: the sampler, on the device.
        embeds: prompt embeddings, on the CPU or on the disk.
        micro_batch: images per forward pass; the last batch is padded to it, so that the same
            kernels run for every image.
        options: `rollout`'s storage and rounding.
        reference: context in which the network is its base, if reference predictions are wanted.
        decode: "final" or "clean": which latent becomes the image.
        waits: where trajectories wait for the update; the device if None.
        decoding: context in which the autoencoder is on the device.
        remedy: what to do if the network's predictions are not finite.
        untrained: the policy where nothing is trained (the reference, other steps); the policy
            itself if None.
    """

    policy: Policy
    plan: Plan
    embeds: Embeds | SharedEmbeds | StoredEmbeds
    shape: tuple[int, int, int]
    micro_batch: int
    device: torch.device
    options: dict[str, Any]
    reference: Callable[[], AbstractContextManager] | None = None
    decode: str = "final"
    waits: torch.device | None = None
    decoding: Callable[[], AbstractContextManager] = nullcontext
    remedy: str = "choose another LoRA or model, or compute in float32"
    untrained: Policy | None = None

    def __call__(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], None] = lambda done: None,
        see: Callable[[Tensor], None] = lambda images: None,
    ) -> Sampled:
        """Sample trajectories and images, in the order of the requests: whole trees."""

        def sample(part: Part) -> tuple[Trajectory, Latents, Latents]:
            trajectory = part.sampler.rollout(part.batch)[: len(part.rows)]
            return trajectory.to(self.place), trajectory.final, trajectory.clean

        images: list[Tensor] = []

        def take(part: Tensor) -> None:
            images.append(part)
            see(part)

        kept = self.each(requests, sample, progress, take)
        return Sampled([concatenate(parts) for parts in kept], torch.cat(images))

    def each(
        self,
        requests: Sequence[Request],
        sample: Callable[[Part], tuple[Kept, Latents, Latents]],
        progress: Callable[[int], None],
        see: Callable[[Tensor], None],
        rows: Callable[[Segment], int] | None = None,
    ) -> list[list[Kept]]:
        """Sample whole trees, segment by segment, micro-batch by micro-batch.

        Args:
            requests: the images, in order.
            sample: samples a part; returns what to keep of it, its last latents and its last clean
                estimates, of its real rows.
            progress: called with the number of finished images.
            see: called with them, on the CPU.
            rows: paths per forward pass, of each segment; `micro_batch` if None.

        Returns:
            What was kept, of each part of each segment.
        """
        every, ends, segments = [], None, self.plan.segments
        for left, segment in zip(reversed(range(len(segments))), segments, strict=True):
            size = self.micro_batch if rows is None else rows(segment)
            sampler = replace(self, plan=segment.plan, micro_batch=size)
            kept, finals, done = [], [], 0
            for batch, count in sampler.batches(paths_of(requests, segment.leaves, left, ends)):
                part = Part(sampler, segment, batch, range(done, done + count))
                keep, final, clean = sample(part)
                kept.append(keep)
                finals.append(final)
                if left == 0:
                    see(self.images(final, clean))
                done += count
                progress(done if left == 0 else 0)
            every.append(kept)
            ends = torch.cat(finals) if finals else None
        return every

    @property
    def place(self) -> torch.device:
        """Where sampled trajectories wait for the update."""
        return self.waits or self.device

    def batches(self, requests: Sequence[Request]) -> Iterator[tuple[list[Request], int]]:
        """Yield (batch, n): the first n rows are real, the rest is padding."""
        for start in range(0, len(requests), self.micro_batch):
            batch = list(requests[start : start + self.micro_batch])
            yield batch + [batch[-1]] * (self.micro_batch - len(batch)), len(batch)

    @phase("step arithmetic")
    def rollout(self, batch: list[Request]) -> Trajectory:
        """The trajectories of one full micro-batch; nothing here waits for the device."""
        given = self.inputs(batch)
        return rollout(
            given.denoiser,
            self.plan,
            given.noise,
            reference=given.reference,
            untrained=given.untrained,
            **self.options,
        )

    def conditions(self, requests: Sequence[Request]) -> Embeds:
        """What the network is told of each image, where the embeddings are."""
        embeds = self.embeds[[request.prompt for request in requests]]
        sizes = self.sizes(requests)
        return embeds if sizes is None else replace(embeds, sizes=sizes)

    def sizes(self, requests: Sequence[Request]) -> Float[Tensor, "b 6"] | None:
        """The sizes that each image is told, drawn by its own random stream.

        None if the family has no choice of them, or one for all images.
        """
        choices = getattr(self.policy.family, "size_condition", None) or ()
        if len(choices) <= 6:
            return None
        table = torch.tensor(choices, dtype=torch.float32).view(-1, 6)
        streams = [generator_for("sizes", *request.tree) for request in requests]
        rows = [torch.randint(len(table), (), generator=stream) for stream in streams]
        return table[torch.stack(rows)]

    @phase("noise and transfer")
    def inputs(self, batch: list[Request]) -> Given:
        """The inputs of one full micro-batch; nothing here waits for the device."""
        noise = noise_of(batch, len(self.plan), self.shape)
        embeds = self.conditions(batch)
        if self.device.type == "cuda":
            noise, embeds = noise.pin_memory(), embeds.pin_memory()
        noise = noise.to(self.device, non_blocking=True)
        embeds = embeds.to(self.device, non_blocking=True)
        for row, request in enumerate(batch):
            if request.start is not None:
                noise[row, 0] = request.start

        def denoiser(x: Tensor, timestep: Tensor) -> Tensor:
            return self.policy(x, timestep, embeds)

        def untrained(x: Tensor, timestep: Tensor) -> Tensor:
            return (self.untrained or self.policy)(x, timestep, embeds)

        def frozen(x: Tensor, timestep: Tensor) -> Tensor:
            assert self.reference is not None
            with self.reference():
                return untrained(x, timestep)

        return Given(noise, denoiser, untrained, None if self.reference is None else frozen)

    def images(self, final: Tensor, clean: Tensor) -> UInt8[Tensor, "b 3 height width"]:
        """Decode latents to images on the CPU.

        Raises:
            NotFiniteError: if the network or the autoencoder gave numbers that are not finite.
        """
        if not all_finite([final, clean]):
            raise NotFiniteError(
                f"the network's predictions are not finite (NaN or infinite): {self.remedy}"
            )
        with self.decoding():
            latents = final if self.decode == "final" else clean
            return self.policy.family.decode(latents).cpu()

    def under(self, plan: Plan) -> Sampler:
        """The same with another plan."""
        return replace(self, plan=plan)
