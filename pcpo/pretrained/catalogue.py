"""The weight files of rewards and metrics: what each is called, how large it is, where it is from.

No torch here. What could not be read off the file itself or off its page is named in
`unverified`, and shown with "about" or "unverified".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Folder = Literal["reward_models", "clip_vision"]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of weights, or of a vocabulary, that a reward or a metric is computed with.

    Attributes:
        key: its name here.
        name: its usual name, with its folder if it has one.
        folder: of ComfyUI's `models`, to put it in.
        what: its contents.
        page: where to read about it and download it by hand.
        repo: on the Hugging Face hub; None if it is not there.
        file: in the repository.
        beside: further files of the repository that have to lie beside it.
        size: in bytes; None if unknown.
        licence: of the weights.
        sha256: of the file, or its first digits; None if unknown.
        url: of the file itself if it is not on the hub.
        hints: lower-case parts of names that distinguish it from files of the same shapes.
        unverified: fields that are from memory or computed from the number of parameters.
    """

    key: str
    name: str
    folder: Folder
    what: str
    page: str
    repo: str | None
    file: str | None
    size: int | None
    licence: str
    sha256: str | None = None
    url: str | None = None
    beside: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    @property
    def size_told(self) -> str:
        """Its size, for a person.

        >>> WEIGHTS["aesthetic_head"].size_told, WEIGHTS["pick_score"].size_told
        ('3.71 MB', 'about 3.94 GB')
        """
        if self.size is None:
            return "of unknown size"
        unit, name = next(
            ((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if self.size >= u),
            (1.0, "bytes"),
        )
        return f"{'about ' if 'size' in self.unverified else ''}{self.size / unit:.3g} {name}"

    @property
    def licence_told(self) -> str:
        return f"{self.licence} (unverified)" if "licence" in self.unverified else self.licence


_HUB = "https://huggingface.co/"
_LPIPS = (
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/"
)

_FILES = (
    WeightFile(
        key="aesthetic_head",
        name="sac+logos+ava1-l14-linearMSE.pth",
        folder="reward_models",
        what="the linear head of LAION's aesthetic predictor over CLIP ViT-L/14",
        page="https://github.com/christophschuhmann/improved-aesthetic-predictor",
        repo="trl-lib/ddpo-aesthetic-predictor",
        file="aesthetic-model.pth",
        size=3_714_759,
        licence="Apache-2.0",
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        hints=("sac+logos+ava1-l14-linearmse", "aesthetic-model", "laion", "chadscorer", "chad."),
    ),
    WeightFile(
        key="clip_l_vision",
        name="clip-vit-large-patch14.safetensors",
        folder="clip_vision",
        what="OpenAI's CLIP ViT-L/14, of which the vision tower suffices",
        page=_HUB + "openai/clip-vit-large-patch14",
        repo="openai/clip-vit-large-patch14",
        file="model.safetensors",
        size=1_710_000_000,
        licence="MIT",
        hints=("clip-vit-large-patch14", "clip_vision_l"),
        unverified=("size",),
    ),
    WeightFile(
        key="clip_l",
        name="clip-vit-large-patch14.safetensors",
        folder="clip_vision",
        what="OpenAI's CLIP ViT-L/14 with both towers",
        page=_HUB + "openai/clip-vit-large-patch14",
        repo="openai/clip-vit-large-patch14",
        file="model.safetensors",
        size=1_710_000_000,
        licence="MIT",
        hints=("clip-vit-large-patch14",),
        unverified=("size",),
    ),
    WeightFile(
        key="clip_b32",
        name="clip-vit-base-patch32/pytorch_model.bin",
        folder="clip_vision",
        what="OpenAI's CLIP ViT-B/32 with both towers",
        page=_HUB + "openai/clip-vit-base-patch32",
        repo="openai/clip-vit-base-patch32",
        file="pytorch_model.bin",
        size=605_000_000,
        licence="MIT",
        hints=("clip-vit-base-patch32",),
        unverified=("repo", "file", "size"),
    ),
    WeightFile(
        key="pick_score",
        name="PickScore_v1/model.safetensors",
        folder="reward_models",
        what="PickScore v1, a CLIP ViT-H/14 tuned on Pick-a-Pic",
        page=_HUB + "yuvalkirstain/PickScore_v1",
        repo="yuvalkirstain/PickScore_v1",
        file="model.safetensors",
        size=3_940_000_000,
        licence="none stated on its page",
        hints=("pickscore", "pick_score", "pick-a-pic", "pickapic"),
        unverified=("size", "licence"),
    ),
    WeightFile(
        key="hps_v2",
        name="HPS_v2_compressed.pt",
        folder="reward_models",
        what="HPSv2, a CLIP ViT-H/14 tuned on human preferences",
        page=_HUB + "xswu/HPSv2",
        repo="xswu/HPSv2",
        file="HPS_v2_compressed.pt",
        size=3_940_000_000,
        licence="Apache-2.0",
        hints=("hps_v2_", "hps_v2.pt", "hps_v2.safetensors", "hpsv2_", "hpsv2.pt", "hpsv20"),
        unverified=("size",),
    ),
    WeightFile(
        key="hps_v2_1",
        name="HPS_v2.1_compressed.pt",
        folder="reward_models",
        what="HPSv2.1, a CLIP ViT-H/14 tuned on human preferences",
        page=_HUB + "xswu/HPSv2",
        repo="xswu/HPSv2",
        file="HPS_v2.1_compressed.pt",
        size=3_940_000_000,
        licence="Apache-2.0",
        hints=("hps_v2.1", "hps_v2_1", "hpsv2.1", "hpsv2_1", "hpsv21"),
        unverified=("size",),
    ),
    WeightFile(
        key="image_reward",
        name="ImageReward.pt",
        folder="reward_models",
        what="ImageReward v1.0, a BLIP with a linear head",
        page=_HUB + "THUDM/ImageReward",
        repo="THUDM/ImageReward",
        file="ImageReward.pt",
        size=1_790_000_000,
        licence="Apache-2.0",
        hints=("imagereward", "image_reward", "image-reward"),
        unverified=("size",),
    ),
    WeightFile(
        key="bert_vocab",
        name="bert-base-uncased/vocab.txt",
        folder="reward_models",
        what="the vocabulary of BERT (uncased)",
        page=_HUB + "google-bert/bert-base-uncased",
        repo="google-bert/bert-base-uncased",
        file="vocab.txt",
        size=232_000,
        licence="Apache-2.0",
        hints=("bert-base-uncased",),
        unverified=("size", "licence"),
    ),
    WeightFile(
        key="deberta",
        name="deberta-xlarge-mnli/pytorch_model.bin",
        folder="reward_models",
        what="DeBERTa XLarge MNLI, the language model that BERTScore compares with",
        page=_HUB + "microsoft/deberta-xlarge-mnli",
        repo="microsoft/deberta-xlarge-mnli",
        file="pytorch_model.bin",
        size=3_030_000_000,
        licence="MIT",
        beside=("config.json", "vocab.json", "merges.txt", "tokenizer_config.json"),
        hints=("deberta-xlarge-mnli",),
        unverified=("size", "file", "beside"),
    ),
    WeightFile(
        key="inception_2015",
        name="pt_inception-2015-12-05-6726825d.pth",
        folder="reward_models",
        what="the Inception network of FID and the Inception Score",
        page="https://github.com/mseitzer/pytorch-fid/releases",
        repo=None,
        file=None,
        size=95_600_000,
        licence="Apache-2.0",
        sha256="6726825d",
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        hints=("inception-2015-12-05", "inception_2015"),
        unverified=("size",),
    ),
    WeightFile(
        key="dinov2_large",
        name="dinov2-large/model.safetensors",
        folder="reward_models",
        what="DINOv2 ViT-L/14 without registers, the network of FD-DINOv2",
        page=_HUB + "facebook/dinov2-large",
        repo="facebook/dinov2-large",
        file="model.safetensors",
        size=1_217_000_000,
        licence="Apache-2.0",
        hints=("dinov2-large", "dinov2_large", "dinov2_vitl14"),
        unverified=("size",),
    ),
    WeightFile(
        key="lpips_alex",
        name="lpips/alex_v0.1.pth",
        folder="reward_models",
        what="LPIPS's weights of AlexNet's channels, version 0.1; the package lpips has them too",
        page="https://github.com/richzhang/PerceptualSimilarity",
        repo=None,
        file=None,
        size=6_009,
        licence="BSD-2-Clause",
        sha256="df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        url=_LPIPS + "alex.pth",
    ),
    WeightFile(
        key="lpips_vgg",
        name="lpips/vgg_v0.1.pth",
        folder="reward_models",
        what="LPIPS's weights of VGG16's channels, version 0.1; the package lpips has them too",
        page="https://github.com/richzhang/PerceptualSimilarity",
        repo=None,
        file=None,
        size=7_289,
        licence="BSD-2-Clause",
        sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        url=_LPIPS + "vgg.pth",
    ),
    WeightFile(
        key="alexnet",
        name="alexnet-owt-7be5be79.pth",
        folder="reward_models",
        what="torchvision's AlexNet, of which LPIPS reads the convolutions",
        page="https://pytorch.org/vision/stable/models/alexnet.html",
        repo=None,
        file=None,
        size=244_400_000,
        licence="BSD-3-Clause",
        sha256="7be5be79",
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        hints=("alexnet",),
        unverified=("size", "licence"),
    ),
    WeightFile(
        key="vgg16",
        name="vgg16-397923af.pth",
        folder="reward_models",
        what="torchvision's VGG16, of which LPIPS reads the convolutions",
        page="https://pytorch.org/vision/stable/models/vgg.html",
        repo=None,
        file=None,
        size=553_400_000,
        licence="BSD-3-Clause",
        sha256="397923af",
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        hints=("vgg16-397923af", "vgg16."),
        unverified=("size", "licence"),
    ),
)

WEIGHTS: dict[str, WeightFile] = {file.key: file for file in _FILES}

# reward -> keys of WEIGHTS, at its default options
_NEEDS: dict[str, tuple[str, ...]] = {
    "aesthetic": ("aesthetic_head", "clip_l_vision"),
    "clip_score": ("clip_l",),
    "hps_v2": ("hps_v2",),
    "hps_v2_1": ("hps_v2_1",),
    "image_reward": ("image_reward", "bert_vocab"),
    "pick_score": ("pick_score",),
    "vlm_bert_score": ("deberta",),
}


# metric -> keys of WEIGHTS
METRICS: dict[str, tuple[str, ...]] = {
    "fid": ("inception_2015",),
    "inception_score": ("inception_2015",),
    "fd_dinov2": ("dinov2_large",),
    "lpips": ("lpips_alex", "alexnet"),
    "lpips_vgg": ("lpips_vgg", "vgg16"),
}


def of_metric(name: str) -> list[WeightFile]:
    """The weight files that a metric needs.

    >>> [file.key for file in of_metric("lpips")], of_metric("fd_random")
    (['lpips_alex', 'alexnet'], [])
    """
    return [WEIGHTS[key] for key in METRICS.get(name, ())]


def of_reward(name: str) -> list[WeightFile]:
    """The weight files that a reward needs at its default options.

    >>> [file.key for file in of_reward("aesthetic")], of_reward("scene")
    (['aesthetic_head', 'clip_l_vision'], [])
    """
    return [WEIGHTS[key] for key in _NEEDS.get(name, ())]


def rewards_of(key: str) -> list[str]:
    """The rewards that need a weight file, first those that need it by default.

    >>> rewards_of("bert_vocab"), rewards_of("clip_b32")
    (['image_reward'], ['clip_score'])
    """
    others = ["clip_score"] if key == "clip_b32" else []
    return [reward for reward, keys in _NEEDS.items() if key in keys] + others


def metrics_of(key: str) -> list[str]:
    """The metrics that need a weight file.

    >>> metrics_of("inception_2015"), metrics_of("clip_l")
    (['fid', 'inception_score'], [])
    """
    return [metric for metric, keys in METRICS.items() if key in keys]
