"""The feature maps of a taste that need a network: against transformers, with small networks."""

from __future__ import annotations

import huggingface_hub
import metrics_fixture
import pytest
import rewards_fixture as fixture
import torch
from comfyui_pcpo.pcpo.errors import RewardUnavailable
from comfyui_pcpo.pcpo.metrics import load_features
from comfyui_pcpo.pcpo.pictures.files import open_picture
from comfyui_pcpo.pcpo.pictures.tensors import pixels_of
from comfyui_pcpo.pcpo.pretrained import read as stored
from comfyui_pcpo.pcpo.pretrained import shapes
from comfyui_pcpo.pcpo.pretrained.dinov2 import SPECS, DinoSpec
from comfyui_pcpo.pcpo.pretrained.find import find
from comfyui_pcpo.pcpo.pretrained.network import _BUILT
from comfyui_pcpo.pcpo.pretrained.recognise import kinds_of
from comfyui_pcpo.pcpo.pretrained.shapes import SiglipSpec, TowerSpec
from comfyui_pcpo.pcpo.pretrained.siglip import siglip_network
from comfyui_pcpo.pcpo.rewards import load_reward, taste
from comfyui_pcpo.trainers.taste.learn import refit
from rewards_files_fixture import make_small, write
from safetensors.torch import save_file
from taste_fixture import voted
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

SMALL = SiglipSpec(vision=TowerSpec(32, 2, 4, 64), patch=56, size=224)
PROMPTS = ["a red cube", "two cats", "an astronaut"]


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    """Small networks, and no weights of this machine."""
    monkeypatch.setattr(stored, "_SEEN", {})
    make_small(monkeypatch)
    monkeypatch.setitem(shapes.SIGLIPS, "siglip", SMALL)
    monkeypatch.setitem(SPECS, "dinov2_large", DinoSpec(**metrics_fixture.DINO))
    monkeypatch.delenv("PCPO_REWARDS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _BUILT.clear()


@pytest.fixture
def pictures():
    found = fixture.pictures()
    return [found[name].convert("RGB") for name in ("landscape", "portrait", "square")]


def described(features, pictures, prompts):
    pairs = zip(pictures, prompts, strict=True)
    return torch.cat([features(pixels_of(picture), [prompt]) for picture, prompt in pairs])


@pytest.fixture
def siglip():
    """A whole SigLIP of transformers."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "patch_size": 56}
    torch.manual_seed(0)
    config = SiglipConfig(
        text_config={**text, "num_attention_heads": 2, "projection_size": 32},
        vision_config={**vision, "num_attention_heads": 4, "image_size": 224},
    )
    return SiglipModel(config).eval()


def test_siglip_is_transformers(siglip, pictures, tmp_path):
    siglip.save_pretrained(tmp_path / "siglip-so400m-patch14-384")
    features = taste.features_of("siglip", folders=[str(tmp_path)])
    found = described(features, pictures, PROMPTS)
    size = {"height": 224, "width": 224}
    prepare = SiglipImageProcessorPil(size=size, resample=3)  # bicubic, as its file says
    with torch.no_grad():
        theirs = siglip.vision_model(**prepare(pictures, return_tensors="pt")).pooler_output
    expected = theirs / theirs.norm(dim=1, keepdim=True)
    assert found.shape == (3, 32)
    assert (found - expected).abs().max() < 1e-6
    assert (expected[0] - expected[1]).abs().max() > 2e-2


def test_the_tower_alone_is_found_by_its_contents(siglip, tmp_path):
    state = {n: t for n, t in siglip.state_dict().items() if n.startswith("vision_model.")}
    save_file(state, tmp_path / "any.safetensors")
    assert kinds_of(tmp_path / "any.safetensors") == ["siglip"]
    assert find("siglip", [tmp_path]) == tmp_path / "any.safetensors"


def test_the_real_siglip_has_the_shapes_that_are_asked_for(monkeypatch):
    monkeypatch.undo()
    spec = shapes.SIGLIPS["siglip"]
    with torch.device("meta"):
        network = siglip_network(spec)
    theirs = {f"vision_model.{n}": tuple(t.shape) for n, t in network.state_dict().items()}
    assert shapes.siglip_shapes(spec) == theirs
    count = sum(torch.Size(shape).numel() for shape in theirs.values())
    assert count == 428_225_600  # its card says 400M; in half precision 856 MB


def test_dinov2_is_the_network_of_the_metric(pictures, tmp_path):
    save_file(metrics_fixture.dino_state(), tmp_path / "dinov2_vitl14.safetensors")
    features = taste.features_of("dinov2", folders=[str(tmp_path)])
    theirs = load_features("fd_dinov2", folders=[str(tmp_path)])
    expected = torch.cat([theirs(pixels_of(picture)) for picture in pictures])
    assert torch.equal(described(features, pictures, PROMPTS), expected.double())


def test_with_the_prompt_it_is_clips_embedding_and_the_parts_of_its_score(pictures, tmp_path):
    write(tmp_path)
    plain, both = (
        taste.features_of(name, folders=[str(tmp_path)]) for name in ("clip_l", "clip_l+prompt")
    )
    found, size = described(both, pictures, PROMPTS), described(plain, pictures, PROMPTS).shape[1]
    assert torch.equal(found[:, :size], described(plain, pictures, PROMPTS))
    score = load_reward("clip_score", folders=[str(tmp_path)]).score(pictures, PROMPTS)
    assert found[:, size:].sum(1).tolist() == pytest.approx(score.values.tolist(), abs=1e-6)
    assert both.needs_prompt and not plain.needs_prompt


@pytest.mark.parametrize("name", ["clip_l", "clip_l+prompt", "siglip", "dinov2"])
def test_missing_weights_are_named_with_where_to_get_them(name):
    said = rf"the features '{name}' of a taste need a network: .*; put it into models/.*rewards get"
    with pytest.raises(RewardUnavailable, match=said.replace("+", r"\+")):
        taste.features_of(name)


def test_a_taste_is_fitted_and_scores_with_a_network(siglip, tmp_path):
    file = tmp_path / "sigclip_vision_patch14_384.safetensors"
    save_file({n: t for n, t in siglip.state_dict().items() if n.startswith("vision")}, file)
    store, utilities = voted(tmp_path / "taste", votes=40)
    head = refit(store, "siglip", weights=str(file))
    reward = load_reward("taste", folder=str(store.root), weights=str(file))
    items = [open_picture(store.image_file(digest)) for digest in utilities]
    found = reward.score(items, [""] * len(items)).values
    assert torch.corrcoef(torch.stack([found, torch.tensor([*utilities.values()])]))[0, 1] > 0.5
    assert len(head.mean) == 32 and reward.fingerprint()["features"]["reward"] == "siglip"


def test_a_head_of_another_prompt_map_needs_the_prompts(tmp_path):
    write(tmp_path)
    store, _ = voted(tmp_path / "taste", votes=20)
    refit(store, "clip_l+prompt", folders=[str(tmp_path)])
    reward = load_reward("taste", folder=str(store.root), folders=[str(tmp_path)])
    assert reward.needs_prompt
    image = pixels_of(fixture.pictures()["square"].convert("RGB"))
    values = reward.score(torch.cat([image, image]), PROMPTS[:2]).values
    assert values[0] != values[1]


def test_a_head_of_other_features_than_now_is_one_sentence(tmp_path):
    store, _ = voted(tmp_path / "taste", votes=10)
    refit(store)
    reward = load_reward("taste", folder=str(store.root))
    reward.fitted = taste.Head(
        **{
            **{name: getattr(reward.fitted, name) for name in reward.fitted.__dataclass_fields__},
            "mean": torch.zeros(103, dtype=torch.float64),
        }
    )
    said = r"the head weights 103 numbers of a picture, and the features 'grid' are 104; fit the"
    with pytest.raises(RewardUnavailable, match=said):
        reward.measure(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), [""])
