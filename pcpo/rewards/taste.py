"""One person's taste: a linear head on image features, fitted to choices between two pictures.

    score(x) = w . z(x),  z the standardised features
    P(left) : P(tie) : P(right) = exp(d / 2) : nu : exp(-d / 2),  d = score of left - right

The model is Davidson 1970 (Bradley-Terry with ties), with a Gaussian prior on w (ridge) whose
strength cross-validation chooses, and Laplace's approximation of its posterior (MacKay 1992). So a
score is in log odds: how much likelier a picture is chosen than an average one of those voted on.

Votes say nothing of pictures unlike those they are about. The head therefore knows their region,
the Mahalanobis distance from their mean under Ledoit and Wolf's covariance (2004), and weights the
score s of a picture outside it: s / distance if s > 0, s (2 - 1 / distance) if s < 0. So nothing is
gained by leaving the region, neither for what is liked nor for what is not.

Shapes: m images, d features, k principal components, n votes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ...registry import REWARDS
from ...remedies import command
from ..errors import RewardUnavailable, versions_of
from ..pictures.tensors import Images
from ..pretrained.clip import TEXT, VISION, Text, Vision
from ..pretrained.dinov2 import SPECS, VisionTransformer
from ..pretrained.find import MissingWeights
from ..pretrained.network import dtype_of, load_frozen
from ..pretrained.preprocess import IMAGENET, Cropped, Prepared, Stretched
from ..pretrained.shapes import CLIPS, SIGLIPS
from ..pretrained.siglip import Siglip
from ..pretrained.tokenizers import clip_tokenizer
from ..scores import Scores
from .analytic import luma
from .base import BatchReward
from .network import NetworkReward, failed_scores
from .sharpness import laplacian

HEAD = "head.safetensors"
"""File of a taste's folder that the reward reads."""

# --- features ------------------------------------------------------------------------------------

GRID, SIDE, SMALLEST = 4, 64, 8
"""Cells on a side; pixels that a larger side is averaged to; fewest pixels of a side."""


def grid_features(images: Images) -> Float[Tensor, "b 104"]:
    """A picture in 104 numbers, without a network.

    Of pixels in 0 to 1, averaged to at most 64 x 64, for each cell of a 4 x 4 grid, row by row:
    light (BT.601 luma), red minus green, yellow minus blue, saturation (largest minus smallest
    channel), contrast (deviation of luma), sharpness (log of 0.01 + mean |Laplacian| of luma).
    Last, for the 4 x 2 cells of the left half, the mean |difference| from the mirror image.
    """
    pixels = images.double() / 255
    height, width = pixels.shape[-2:]
    pixels = functional.adaptive_avg_pool2d(pixels, (min(height, SIDE), min(width, SIDE)))
    grey, (red, green, blue) = luma(pixels), pixels.unbind(1)
    edges = laplacian(functional.pad(grey[:, None], (1, 1, 1, 1), "replicate")[:, 0])
    mirrored = (pixels - pixels.flip(-1)).abs().mean(1)
    maps = [grey, red - green, (red + green) / 2 - blue, pixels.amax(1) - pixels.amin(1)]
    light, square, edge, mirror = (_cells(m) for m in (grey, grey.square(), edges.abs(), mirrored))
    contrast = (square - light.square()).clamp(min=0).sqrt()
    parts = [*map(_cells, maps), contrast, (0.01 + edge).log(), mirror[..., : GRID // 2]]
    return torch.cat([part.flatten(1) for part in parts], 1)


def _cells(values: Float[Tensor, "b h w"]) -> Float[Tensor, "b 4 4"]:
    return functional.adaptive_avg_pool2d(values, GRID)


class Features(Protocol):
    """What turns pictures, and if it `needs_prompt` their prompts, into the numbers that a head
    weights.
    """

    needs_prompt: ClassVar[bool]

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, "b d"]: ...
    def modules(self) -> list[nn.Module]: ...
    def fingerprint(self) -> dict[str, Any]: ...


class Grid:
    """`grid_features`: nothing to download."""

    needs_prompt: ClassVar[bool] = False

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        return grid_features(images).cpu()

    def modules(self) -> list[nn.Module]:
        return []

    def fingerprint(self) -> dict[str, Any]:
        return {"features": "grid"}


class NetworkFeatures(NetworkReward):
    """What `judge` returns is not one number of each picture, but its features."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        return self.measure(images, prompts).values.double()


@dataclass(frozen=True, eq=False)
class ClipL(NetworkFeatures):
    """CLIP ViT-L/14's image embedding, of unit length."""

    name: ClassVar[str] = "clip_l"
    key: ClassVar[str] = "clip_l_vision"

    @property
    def preparation(self) -> Cropped:
        return Cropped()

    @property
    def files(self) -> Mapping[str, tuple[str | None, tuple[str, ...]]]:
        return {self.key: (self.weights, VISION)}

    @cached_property
    def _vision(self) -> Vision:
        return Vision(self.paths[self.key], CLIPS[self.key], self.dtype)

    def modules(self) -> list[nn.Module]:
        return [self._vision.network]

    def judge(self, prepared: Prepared, prompts: Sequence[str]) -> Tensor:
        return self._vision(prepared)


@dataclass(frozen=True, eq=False)
class ClipLPrompt(ClipL):
    """CLIP ViT-L/14's image embedding, and its product with the prompt's, number by number.

    The prompt's own embedding would tell nothing: it is the same for both pictures of a pair. The
    sum of the product is CLIP's score, so what is liked in one prompt and not in another can be
    learnt, and how well a picture fits its prompt.
    """

    name: ClassVar[str] = "clip_l+prompt"
    key: ClassVar[str] = "clip_l"
    needs_prompt: ClassVar[bool] = True

    @property
    def files(self) -> Mapping[str, tuple[str | None, tuple[str, ...]]]:
        return {self.key: (self.weights, VISION + TEXT)}

    @cached_property
    def _text(self) -> Text:
        return Text(self.paths[self.key], CLIPS[self.key], self.dtype, clip_tokenizer(self.name))

    def modules(self) -> list[nn.Module]:
        return [self._vision.network, self._text.network]

    def judge(self, prepared: Prepared, prompts: Sequence[str]) -> Tensor:
        images = self._vision(prepared)
        return torch.cat([images, images * self._text(prompts).to(images.device)], 1)


@dataclass(frozen=True, eq=False)
class SiglipSo400m(NetworkFeatures):
    """SigLIP So400m/14's image embedding at 384 pixels, of unit length."""

    name: ClassVar[str] = "siglip"

    @property
    def preparation(self) -> Stretched:
        return Stretched(SIGLIPS["siglip"].size)

    @property
    def files(self) -> Mapping[str, tuple[str | None, tuple[str, ...]]]:
        return {"siglip": (self.weights, ("vision_model.",))}

    @cached_property
    def _vision(self) -> Siglip:
        return Siglip(self.paths["siglip"], SIGLIPS["siglip"], self.dtype)

    def modules(self) -> list[nn.Module]:
        return [self._vision.network]

    def judge(self, prepared: Prepared, prompts: Sequence[str]) -> Tensor:
        return self._vision(prepared)


@dataclass(frozen=True, eq=False)
class Dinov2Large(NetworkFeatures):
    """DINOv2 ViT-L/14's first token."""

    name: ClassVar[str] = "dinov2"

    @property
    def preparation(self) -> Stretched:
        return Stretched(224, *IMAGENET)

    @property
    def files(self) -> Mapping[str, tuple[str | None, tuple[str, ...]]]:
        return {"dinov2_large": (self.weights, ("",))}

    @cached_property
    def _network(self) -> nn.Module:
        spec = SPECS["dinov2_large"]
        path = self.paths["dinov2_large"]
        return load_frozen(path, ("",), spec, lambda: VisionTransformer(spec), self.dtype)

    def modules(self) -> list[nn.Module]:
        return [self._network]

    def judge(self, prepared: Prepared, prompts: Sequence[str]) -> Tensor:
        return self._network(prepared.to(dtype_of(self._network)))


FEATURES: dict[str, Callable[..., Features]] = {
    "grid": Grid,
    "clip_l": ClipL,
    "clip_l+prompt": ClipLPrompt,
    "siglip": SiglipSo400m,
    "dinov2": Dinov2Large,
}
"""By name. A change of a map is a new name: a head is of no use with other features."""

# --- choices -------------------------------------------------------------------------------------

RANK = 128
"""Most principal components of the features that a head is fitted in."""
STRENGTHS = tuple(10.0**power for power in (2.5, 2, 1.5, 1, 0.5, 0, -0.5))
"""Strengths of the ridge that cross-validation chooses from."""
TIE_PRIOR = (-1.0, 2.0)
"""Mean and deviation of log nu before any vote: of choices between equals one in six is a tie."""
PRIOR_WEIGHT = 3.0
"""Deviations that one of a prior counts as: its weight is held back less by the ridge."""
ENOUGH_VOTES, ENOUGH_AGREEMENT = 30, 0.6
"""Below one of them a head does not know its owner yet."""
FOLDS, FEW_FOLDS, HELD_OUT = 25, 8, 5
"""Most folds, and most where each is fitted several times; a fold holds out one picture of 5."""
LATEST = 2000
"""Votes by which the ridge is chosen; more change it little, and take long."""
ROUGHLY = 1e-5
"""How close a fold is fitted."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What a person chose.

    Attributes:
        pairs: indices of the left and the right picture.
        outcomes: 1 for left, -1 for right, 0 for a tie.
        is_random: of each pair, whether it was drawn at random: only those show how well a head
            agrees with the person, because the others were chosen by one.
    """

    pairs: Int[Tensor, "n 2"]
    outcomes: Float[Tensor, " n"]
    is_random: Bool[Tensor, " n"]

    def __getitem__(self, rows: Tensor) -> Choices:
        return Choices(self.pairs[rows], self.outcomes[rows], self.is_random[rows])

    def __len__(self) -> int:
        return len(self.outcomes)

    def differences(self, z: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """The features of the left pictures minus those of the right ones."""
        return z[self.pairs[:, 0]] - z[self.pairs[:, 1]]


def log_probabilities(
    difference: Float[Tensor, " n"], log_nu: Tensor | float
) -> Float[Tensor, "n 3"]:
    """Davidson's log P of left, tie, right, by the difference of their scores."""
    tie = torch.as_tensor(log_nu, dtype=difference.dtype).expand_as(difference)
    return torch.stack([difference / 2, tie, -difference / 2], 1).log_softmax(1)


@dataclass(frozen=True, slots=True)
class Davidson:
    """The mode of the posterior.

    Attributes:
        weight: of the features.
        log_nu: how often equals are tied.
    """

    weight: Float[Tensor, " k"]
    log_nu: float

    @classmethod
    def fit(
        cls,
        x: Float[Tensor, "n k"],
        outcomes: Float[Tensor, " n"],
        strength: float,
        start: Davidson | None = None,
        close: float = 1e-9,
    ) -> Davidson:
        """Newton's method with halved steps; the posterior is log-concave.

        Args:
            x: differences of features, float64.
            outcomes: 1, 0 or -1.
            strength: of the ridge.
            start: where to begin; at the prior's mode if None.
            close: it ends once a step lowers -log posterior by less than this share.
        """
        start = start or cls(x.new_zeros(x.shape[1]), TIE_PRIOR[0])
        at = start._point
        value = _loss(at, x, outcomes, strength)
        for _ in range(50):
            gradient, hessian = _slopes(at, x, outcomes, strength)
            step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
            for halvings in range(30):
                trial = at - step * 0.5**halvings
                if (lower := _loss(trial, x, outcomes, strength)) <= value:
                    break
            else:
                break
            at, gained, value = trial, value - lower, lower
            if gained < close * (1 + abs(value)):
                break
        return cls(at[:-1], at[-1].item())

    @property
    def _point(self) -> Float[Tensor, "k+1"]:
        return torch.cat([self.weight, self.weight.new_tensor([self.log_nu])])

    def covariance(
        self, x: Float[Tensor, "n k"], outcomes: Float[Tensor, " n"], strength: float
    ) -> Float[Tensor, "k k"]:
        """Laplace's, of the weight, for what it was fitted to."""
        hessian = _slopes(self._point, x, outcomes, strength)[1]
        return torch.cholesky_inverse(torch.linalg.cholesky(hessian))[:-1, :-1]


def _loss(at: Tensor, x: Tensor, outcomes: Tensor, strength: float) -> float:
    """-log posterior, without its constant."""
    logs = log_probabilities(x @ at[:-1], at[-1])
    chosen = logs.gather(1, (1 - outcomes).long()[:, None]).sum()
    mean, deviation = TIE_PRIOR
    prior = strength * at[:-1].square().sum() + ((at[-1] - mean) / deviation).square()
    return (prior / 2 - chosen).item()


def _slopes(at: Tensor, x: Tensor, outcomes: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of `_loss`: choices are an exponential family in (outcome / 2, tie)."""
    left, tie, right = log_probabilities(x @ at[:-1], at[-1]).exp().unbind(1)
    mean, deviation = TIE_PRIOR
    expected, k = (left - right) / 2, x.shape[1]
    gradient, hessian = torch.zeros_like(at), at.new_zeros(k + 1, k + 1)
    gradient[:k] = strength * at[:k] - x.T @ (outcomes / 2 - expected)
    gradient[k] = (at[k] - mean) / deviation**2 - ((outcomes == 0).double() - tie).sum()
    hessian[:k, :k] = x.T @ (((left + right) / 4 - expected.square())[:, None] * x)
    hessian.diagonal()[:k] += strength
    hessian[:k, k] = hessian[k, :k] = -x.T @ (expected * tie)
    hessian[k, k] = (tie * (1 - tie)).sum() + deviation**-2
    return gradient, hessian


def folds(choices: Choices) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows to fit and rows to test, with no picture on both sides.

    Each fold holds out the pictures of some random pairs (of all, if none is random). What is
    tested are those pairs; what is fitted are the pairs of which no picture is held out.
    """
    tested = choices.is_random if choices.is_random.any() else torch.ones(len(choices)).bool()
    rows = tested.nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    size = max(1, len(choices.pairs.unique()) // (2 * HELD_OUT))
    for part in rows.split(size)[:FOLDS]:
        held_out = torch.isin(choices.pairs, choices.pairs[part]).any(1)
        yield (~held_out).nonzero()[:, 0], part


def predicted(
    z: Float[Tensor, "m k"], choices: Choices, strength: float, votes: int, at_once: int = FOLDS
) -> Float[Tensor, " n"]:
    """Differences of scores of pairs of unseen pictures; NaN of pairs that are not tested.

    Args:
        z: features of the pictures.
        choices: in the order of time.
        strength: of the ridge.
        votes: how many of them are fitted, the first ones.
        at_once: most folds.
    """
    x, found, last = choices.differences(z), z.new_full((len(choices),), math.nan), None
    for fitted, tested in islice(folds(choices), at_once):
        rows = fitted[fitted < votes]
        last = Davidson.fit(x[rows], choices.outcomes[rows], strength, last, ROUGHLY)
        found[tested] = x[tested] @ last.weight
    return found


def best_strength(z: Float[Tensor, "m k"], choices: Choices) -> float:
    """The ridge under which pairs of unseen pictures are likeliest, among the last votes."""
    choices = choices[torch.arange(len(choices))[-LATEST:]]
    x, losses = choices.differences(z), dict.fromkeys(STRENGTHS, 0.0)
    for fitted, tested in islice(folds(choices), FEW_FOLDS):
        last = None
        for strength in STRENGTHS:
            last = Davidson.fit(x[fitted], choices.outcomes[fitted], strength, last, ROUGHLY)
            logs = log_probabilities(x[tested] @ last.weight, last.log_nu)
            rows = (1 - choices.outcomes[tested]).long()[:, None]
            losses[strength] -= logs.gather(1, rows).sum().item()
    return min(STRENGTHS, key=losses.__getitem__)


# --- the head ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """A fitted taste, float64.

    Attributes:
        features: its name in `FEATURES`.
        prior: a reward whose value is one more feature; empty for none.
        mean: of the features of the pictures voted on.
        scale: their deviations.
        weight: of the standardised features.
        covariance: Laplace's, of the weight.
        precision: inverse covariance of the standardised features.
        log_nu: how often equals are tied.
        bound: distance of the region's edge.
        votes: that it is fitted to.
        agreement: share of unseen random pairs on which it agrees with the person; NaN if unknown.
    """

    features: str
    prior: str
    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    weight: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    precision: Float[Tensor, "d d"]
    log_nu: float
    bound: float
    votes: int = 0
    agreement: float = math.nan

    def z(self, features: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Features in deviations from the mean of the pictures voted on.

        Raises:
            RewardUnavailable: if they are others than those that the head weights.
        """
        if (count := features.shape[1]) != len(self.mean):
            raise RewardUnavailable(
                f"the head weights {len(self.mean)} numbers of a picture, and the features "
                f"{self.features!r} are {count}; fit the taste again"
            )
        return (features.double() - self.mean) / self.scale

    def distance(self, z: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """Mahalanobis distance from the pictures voted on; 1 is the edge of their region."""
        return mahalanobis(z, self.precision) / self.bound

    def score(self, z: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """Log odds against an average picture; lowered outside the region, to 0 or to twice."""
        score = z @ self.weight
        return score - score.abs() * (1 - 1 / self.distance(z).clamp(min=1))

    @property
    def doubt(self) -> str:
        """Why the head is not to be relied on yet, in a sentence; empty if it may be."""
        if self.votes < ENOUGH_VOTES:
            return (
                f"the taste does not know you yet: it has {self.votes} votes; give it "
                f"{ENOUGH_VOTES} or more"
            )
        if self.agreement >= ENOUGH_AGREEMENT:
            return ""
        found = "was never tested on random pairs"
        if self.agreement == self.agreement:
            found = f"agrees with you on {self.agreement:.0%} of random pairs, and half is chance"
        return f"the taste does not know you yet: it {found}; vote on more pairs"

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that tell heads apart."""
        tensors, texts = self._parts()
        data = [tensors[name].numpy().tobytes() for name in sorted(tensors)]
        return hashlib.sha256(b"".join([json.dumps(texts).encode(), *data])).hexdigest()[:12]

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors = {k: v.contiguous() for k, v in values.items() if isinstance(v, Tensor)}
        return tensors, {k: str(v) for k, v in values.items() if k not in tensors}

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        from safetensors.torch import save_file

        tensors, texts = self._parts()
        save_file(tensors, path, metadata=texts)

    @classmethod
    def load(cls, path: Path) -> Head:
        """Read a head that `save` wrote.

        Raises:
            RewardUnavailable: if there is none, it is damaged, or of features that are not known.
        """
        from safetensors import SafetensorError, safe_open

        fit = command("taste", "fit", path.parent)
        try:
            with safe_open(path, framework="pt") as file:
                texts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            kinds = {"log_nu": float, "bound": float, "votes": int, "agreement": float}
            head = cls(**tensors, **{k: kinds.get(k, str)(v) for k, v in texts.items()})
            d = len(head.mean)
            shapes = [t.shape for t in (head.scale, head.weight, head.covariance, head.precision)]
            if shapes != [(d,), (d,), (d, d), (d, d)] or not head.bound > 0:
                raise ValueError("its parts do not fit each other")
            if not all(t.isfinite().all() for t in tensors.values()):
                raise ValueError("a number in it is not finite")
        except FileNotFoundError as error:
            if not path.parent.is_dir():
                raise RewardUnavailable(
                    f"there is no taste {path.parent}: it was moved or deleted, or never made; "
                    f"make one with {command('taste', 'new', path.parent)}, and vote"
                ) from error
            raise RewardUnavailable(
                f"there is no {path}: a taste has it after its first fit; vote, then run {fit}"
            ) from error
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise RewardUnavailable(f"{path} is no head of a taste ({error}); run {fit}") from error
        if head.features not in FEATURES:
            raise RewardUnavailable(
                f"{path} is of the features {head.features!r}, which are not known here (they are "
                f"{', '.join(FEATURES)}); run {fit} --features NAME"
            )
        return head


def mahalanobis(z: Float[Tensor, "m d"], precision: Float[Tensor, "d d"]) -> Float[Tensor, " m"]:
    """Distance from 0 per root of the dimension: 1 on average where the covariance is right."""
    return ((z @ precision) * z).sum(1).clamp(min=0).div(z.shape[1]).sqrt()


def shrunk_covariance(z: Float[Tensor, "m d"]) -> Float[Tensor, "d d"]:
    """Ledoit and Wolf's covariance of centred rows (2004, lemma 3.2): (1 - b) S + b tr(S) / d I."""
    m, d = z.shape
    sample = z.T @ z / m
    centre = sample.trace() / d * torch.eye(d, dtype=z.dtype)
    spread = (sample - centre).square().sum()
    noise = (z.square().sum(1).square().sum() / m - sample.square().sum()) / m
    share = float((noise / spread).clamp(0, 1)) if spread > 0 else 1.0
    return (1 - share) * sample + share * centre


def region(z: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "d d"], float]:
    """The region of standardised pictures: its precision, and the distance of its edge.

    95% of the pictures are within it when each fifth of them is measured by the rest.
    """
    parts = torch.arange(len(z)) % HELD_OUT
    found = []
    for part in parts.unique().tolist() if len(z) > HELD_OUT else []:
        root = _covariance_root(z[parts != part])
        whitened = torch.linalg.solve_triangular(root, z[parts == part].T, upper=False)
        found.append(whitened.square().mean(0).sqrt())  # `mahalanobis`, without the inverse
    bound = torch.cat(found).quantile(0.95).item() if found else 1.0
    return torch.cholesky_inverse(_covariance_root(z)), max(bound, 1.0)


def _covariance_root(z: Tensor) -> Tensor:
    covariance = shrunk_covariance(z) + 1e-3 * torch.eye(z.shape[1], dtype=z.dtype)
    return torch.linalg.cholesky(covariance)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A head, and what cross-validation says of it.

    Attributes:
        head: itself.
        strength: of its ridge.
        right: random pairs of unseen pictures on which it agrees with the person.
        tested: their number.
        curve: `learning_curve`.
    """

    head: Head
    strength: float
    right: int
    tested: int
    curve: list[tuple[int, float]]


def fit(
    features: Float[Tensor, "m d"], choices: Choices, name: str = "grid", prior: str = ""
) -> Fitted:
    """Fit a head to choices.

    Args:
        features: of the pictures, by the map called `name`; the last one is that of `prior`.
        choices: in the order of time, at least one.
        name: key of `FEATURES`.
        prior: a reward, or empty.
    """
    features = features.double()
    mean, deviation = features.mean(0), features.std(0, correction=0)
    floor = 0.1 * deviation.square().mean().sqrt().clamp(min=1e-6)
    scale = (deviation.square() + floor.square()).sqrt()
    if prior:
        scale[-1] /= PRIOR_WEIGHT
    z = (features - mean) / scale
    basis = torch.linalg.svd(z, full_matrices=False).Vh[:RANK].T
    parts = z @ basis
    strength = best_strength(parts, choices)
    x = choices.differences(parts)
    found = Davidson.fit(x, choices.outcomes, strength)
    unseen = torch.eye(len(mean), dtype=z.dtype) - basis @ basis.T
    precision, bound = region(z)
    right, count = agreement(predicted(parts, choices, strength, len(choices)), choices)
    head = Head(
        *(name, prior, mean, scale, basis @ found.weight),
        covariance=basis @ found.covariance(x, choices.outcomes, strength) @ basis.T
        + unseen / strength,
        precision=precision,
        log_nu=found.log_nu,
        bound=bound,
        votes=len(choices),
        agreement=right / count if count else math.nan,
    )
    return Fitted(head, strength, right, count, learning_curve(parts, choices, strength))


def agreement(tested: Float[Tensor, " n"], choices: Choices) -> tuple[int, int]:
    """On how many of the random pairs that were held out and decided the head chose as the person
    did, and their number. A tie has no side to agree with.
    """
    counted = choices.is_random & (choices.outcomes != 0) & tested.isfinite()
    right = tested[counted] * choices.outcomes[counted] > 0
    return int(right.sum()), int(counted.sum())


def learning_curve(
    z: Float[Tensor, "m k"], choices: Choices, strength: float
) -> list[tuple[int, float]]:
    """(votes fitted, share of unseen random pairs agreed on), all on the same pairs: for 25 votes,
    50, 100 and so on to all.
    """
    counts = [25 << i for i in range(20) if 25 << i < len(choices)]
    curve = []
    for count in [*counts, len(choices)]:
        tested = predicted(z, choices, strength, count, FEW_FOLDS)
        right, of = agreement(tested, choices)
        curve += [(count, right / of)] if of else []
    return curve


def informative(
    z: Float[Tensor, "m d"], head: Head, pairs: Int[Tensor, "p 2"], count: int
) -> list[int]:
    """Rows of the pairs whose answers tell most about the weight, no picture twice.

    One after the other, by the gain log(1 + I x' C x) of Bayesian D-optimality (Chaloner and
    Verdinelli 1995): I is the Fisher information of the choice, x the difference of the pictures,
    and C the covariance given those taken before, so that they differ from each other.
    """
    x, covariance, taken = z[pairs[:, 0]] - z[pairs[:, 1]], head.covariance, list[int]()
    left, _, right = log_probabilities(x @ head.weight, head.log_nu).exp().unbind(1)
    information = (left + right) / 4 - (left - right).square() / 4
    open_ = torch.ones(len(pairs), dtype=torch.bool)
    while len(taken) < count and open_.any():
        spread = x @ covariance
        gain = (information * (spread * x).sum(1)).masked_fill(~open_, -1)
        row = int(gain.argmax())
        taken.append(row)
        open_ &= ~torch.isin(pairs, pairs[row]).any(1)
        fall = information[row] / (1 + gain[row])
        covariance = covariance - fall * torch.outer(spread[row], spread[row])
    return taken


# --- the reward ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Taste(BatchReward):
    """How much the owner of a taste would like a picture, as a head fitted to votes predicts it.

    Attributes:
        folder: folder of the taste, with its head.safetensors.
        head: path of a head to use instead of the folder's.
        weights: of the network of its features; searched where None.
        folders: where weights are searched first.
        dtype: of that network.

    Raises:
        RewardUnavailable: if there is no head, or its network's weights are not there.
    """

    name: ClassVar[str] = "taste"
    unit: ClassVar[str] = "log odds"
    folder: str | None = None
    head: str | None = None
    weights: str | None = None
    folders: list[str] = field(default_factory=list)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        path = self.head or (self.folder and Path(self.folder) / HEAD)
        if not path:
            raise RewardUnavailable(
                "the reward 'taste' needs the option folder, that of a taste; make one with "
                f"{command('taste', 'new', 'FOLDER')}, and vote"
            )
        self.fitted = Head.load(Path(path).expanduser())
        _ = self.features, self.prior

    @property
    def options(self) -> dict[str, Any]:
        """Where its network's weights are, and their dtype."""
        return {"weights": self.weights, "folders": self.folders, "dtype": self.dtype}

    @cached_property
    def features(self) -> Features:
        return features_of(self.fitted.features, **self.options)

    @cached_property
    def prior(self) -> BatchReward | None:
        return prior_of(self.fitted.prior, self.folders)

    @property
    def needs_prompt(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        has_prior = self.prior is not None and self.prior.needs_prompt
        return has_prior or self.features.needs_prompt

    def modules(self) -> list[nn.Module]:
        return [*self.features.modules(), *(self.prior.modules() if self.prior else [])]

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Scores, with each picture's `distance`: beyond 1 it is unlike those voted on."""
        if why := too_small(images):
            return failed_scores(len(images), why)
        z = self.fitted.z(described(images, prompts, self.features, self.prior))
        details = tuple({"distance": value} for value in self.fitted.distance(z).tolist())
        return Scores(self.fitted.score(z).float(), details)

    def fingerprint(self) -> dict[str, Any]:
        prior = {"prior": self.prior.fingerprint()} if self.prior else {}
        return {
            "reward": self.name,
            "head": self.fitted.digest,
            "features": self.features.fingerprint(),
            **prior,
            "versions": versions_of("torch", "pillow"),
        }


def features_of(name: str, **options: Any) -> Features:
    """The feature map called `name`; options of weights go to those with a network.

    Raises:
        RewardUnavailable: if its weights are not there.
    """
    try:
        return FEATURES[name]() if name == "grid" else FEATURES[name](**options)
    except MissingWeights as error:
        told = f"the features {name!r} of a taste need a network: {error}"
        raise RewardUnavailable(told) from error


def prior_of(name: str, folders: Sequence[str] = ()) -> BatchReward | None:
    """The reward that a head starts from."""
    if not name:
        return None
    kind = REWARDS[name]
    return kind(folders=list(folders)) if issubclass(kind, NetworkReward) else kind()


def too_small(images: Images) -> str | None:
    """Why pictures have no features, None if they have."""
    height, width = images.shape[-2:]
    is_small = min(height, width) < SMALLEST
    return (
        f"the image is {width}x{height}; a taste needs {SMALLEST}x{SMALLEST}" if is_small else None
    )


def described(
    images: Images, prompts: Sequence[str], features: Features, prior: BatchReward | None
) -> Float[Tensor, "b d"]:
    """The features of images, and the value of the prior where there is one."""
    found = features(images, prompts).double()
    if prior is None:
        return found
    scores = prior.score(images, prompts)
    return torch.cat([found, scores.values.double()[:, None]], 1)
