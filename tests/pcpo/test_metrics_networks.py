"""Inception-2015, DINOv2 and LPIPS against the packages they come from, with random weights."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import sys
from pathlib import Path

import lpips as lpips_package
import metrics_fixture as fixture
import pytest
import rewards_fixture
import torch
import torchvision
from comfyui_pcpo.pcpo.metrics import load_features
from comfyui_pcpo.pcpo.metrics.inception import Inception
from comfyui_pcpo.pcpo.metrics.lpips import Lpips, Spread
from comfyui_pcpo.pcpo.pretrained import read as stored
from comfyui_pcpo.pcpo.pretrained.catalogue import WEIGHTS, metrics_of, of_metric
from comfyui_pcpo.pcpo.pretrained.dinov2 import SPECS, DinoSpec
from comfyui_pcpo.pcpo.pretrained.find import MissingWeights, WrongWeights, find
from comfyui_pcpo.pcpo.pretrained.layouts import piece_shapes, pieces_of
from comfyui_pcpo.pcpo.pretrained.metric_networks import NETWORKS, network_shapes
from comfyui_pcpo.pcpo.pretrained.network import _BUILT
from comfyui_pcpo.pcpo.pretrained.recognise import kinds_of, mismatch, required_shapes
from comfyui_pcpo.pcpo.rewards import RewardUnavailable
from safetensors.torch import save_file
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import Dinov2Config, Dinov2Model

torch.set_num_threads(1)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dinov2.json").read_text())
SMALL = DinoSpec(**fixture.DINO)
PACKAGED = Path(lpips_package.__file__).parent / "weights"


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No weights of this machine are found."""
    monkeypatch.delenv("PCPO_REWARDS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def small_dino(monkeypatch):
    monkeypatch.setitem(SPECS, "dinov2_large", SMALL)
    monkeypatch.setattr(stored, "_SEEN", {})
    _BUILT.clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Inception's file, and LPIPS's networks as torchvision writes them."""
    folder = tmp_path_factory.mktemp("reward_models")
    shapes = network_shapes("inception_2015")
    state = {name: fixture.inception_weight(name, shape) for name, shape in shapes.items()}
    fixture.write_torch(state, folder / "pt_inception-2015-12-05-6726825d.pth")
    for net, file in (("alex", "alexnet-owt-7be5be79.pth"), ("vgg", "vgg16-397923af.pth")):
        features = trunk_of(oracle(net))
        state = features | {"classifier.1.weight": torch.zeros(2, 3)}
        fixture.write_torch(state, folder / file)
    return folder


def oracle(net):
    torch.manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return lpips_package.LPIPS(net=net, pnet_rand=True, verbose=False)


def trunk_of(network):
    """An LPIPS's network by torchvision's names."""
    found = network.net.state_dict()
    return {f"features.{name.split('.', 1)[1]}": tensor.clone() for name, tensor in found.items()}


def images_of(count, height, width, seed=0):
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 4, generator=random)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.rand(count, 3, height, width, generator=random)
    return (255 * (0.8 * smooth + 0.2 * noise)).to(torch.uint8)


def shapes_in(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


# Inception


@pytest.fixture(scope="module")
def inceptions(files):
    path = files / "pt_inception-2015-12-05-6726825d.pth"
    ends = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("x", ends, feature_extractor_weights_path=str(path))
    return Inception(folders=[str(files)]), theirs


@pytest.mark.parametrize(("height", "width"), [(64, 64), (299, 299), (300, 420), (640, 512)])
def test_inception_equals_torch_fidelity(inceptions, height, width):
    ours, theirs = inceptions
    images = images_of(1, height, width)
    with torch.no_grad():
        features, logits = theirs(images)
    found = ours.both(images)
    assert features.std() > 0.1 and logits.std() > 0.1  # it is not dead
    torch.testing.assert_close(found[0], features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], logits, rtol=1e-5, atol=1e-5)
    assert found[0].shape == (1, ours.size)


def test_inception_has_exactly_the_weights_of_torch_fidelitys(inceptions):
    theirs = {k: s for k, s in shapes_in(inceptions[1]).items() if "num_batches" not in k}
    assert required_shapes("inception_2015") == theirs
    as_stored = shapes_in(inceptions[1])  # with what batch normalisation counts
    assert piece_shapes(as_stored) == theirs


def test_inception_tells_what_it_depends_on(inceptions):
    found = inceptions[0].fingerprint()
    assert found["features"] == "fid" and "tensorflow1" in found["preparation"]
    assert len(found["weights"]["inception_2015"]["sha256"]) == 64
    json.dumps(found)


def test_inception_is_in_memory_once(inceptions, files):
    again = Inception(weights=str(files / "pt_inception-2015-12-05-6726825d.pth"))
    assert again.modules()[0] is inceptions[0].modules()[0]


def test_inception_of_torchvision_is_refused(tmp_path):
    with torch.device("meta"):
        network = torchvision.models.inception_v3(init_weights=False, aux_logits=False)
    state = {name: torch.zeros(shape) for name, shape in shapes_in(network).items()}
    path = fixture.write_torch(state, tmp_path / "inception_v3.pth")
    with pytest.raises(WrongWeights, match=r"its fc\.weight is 1000x2048 and not 1008x2048"):
        Inception(weights=str(path))


# DINOv2


def dino_files(folder):
    """One file in each layout there is."""
    state = fixture.dino_state()
    (folder / "dinov2-large").mkdir()
    (folder / "new").mkdir()
    save_file(
        fixture.as_transformers(state, old=True), folder / "dinov2-large" / "model.safetensors"
    )
    save_file(
        fixture.as_transformers(state, old=False), folder / "new" / "dinov2_large.safetensors"
    )
    fixture.write_torch(state, folder / "dinov2_vitl14_pretrain.pth")
    return [
        folder / "dinov2-large",
        folder / "new" / "dinov2_large.safetensors",
        folder / "dinov2_vitl14_pretrain.pth",
    ]


def test_dinov2_equals_its_authors_code(small_dino, tmp_path):
    """Golden numbers of facebookresearch/dinov2, positions stretched."""
    path = dino_files(tmp_path)[2]
    network = load_features("fd_dinov2", weights=str(path)).modules()[0]
    found = network(rewards_fixture.numbers("pixels", (2, 3, 224, 224)))
    torch.testing.assert_close(found, torch.tensor(GOLDEN["features"]), rtol=1e-5, atol=1e-5)
    positions = network.embeddings.positions(16)[0, ::16, ::12]
    torch.testing.assert_close(positions, torch.tensor(GOLDEN["positions"]), rtol=0, atol=1e-6)


def test_dinov2_equals_transformers_but_for_the_positions(small_dino, tmp_path):
    path = dino_files(tmp_path)[2]
    network = load_features("fd_dinov2", weights=str(path)).modules()[0]
    config = Dinov2Config(
        hidden_size=SMALL.width,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        image_size=SMALL.grid * SMALL.patch,
        patch_size=SMALL.patch,
    )
    theirs = Dinov2Model(config).eval()
    theirs.load_state_dict(fixture.as_transformers(fixture.dino_state(), old=False))
    pixels = rewards_fixture.numbers("pixels", (1, 3, 224, 224))
    with torch.no_grad():
        apart = theirs(pixel_values=pixels).pooler_output - network(pixels)
        assert apart.abs().max() > 0.01  # the trap that this network is for
        positions = network.embeddings.positions(16)
        theirs.embeddings.interpolate_pos_encoding = lambda *_: positions
        found = theirs(pixel_values=pixels).pooler_output
    torch.testing.assert_close(network(pixels), found, rtol=1e-5, atol=1e-5)
    whole = rewards_fixture.numbers("pixels", (1, 3, 518, 518))
    with torch.no_grad():  # nothing to stretch: no difference
        theirs.embeddings.interpolate_pos_encoding = lambda *_: (
            theirs.embeddings.position_embeddings
        )
        found = theirs(pixel_values=whole).pooler_output
    torch.testing.assert_close(network(whole), found, rtol=1e-5, atol=1e-5)


def test_dinov2_is_read_in_every_layout(small_dino, tmp_path):
    images = images_of(1, 80, 120)
    found = [load_features("fd_dinov2", weights=str(path)) for path in dino_files(tmp_path)]
    features = [one(images) for one in found]
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2])
    assert features[0].shape == (1, SMALL.width) == (1, found[0].size)
    digests = {one.fingerprint()["weights"]["dinov2_large"]["sha256"] for one in found}
    assert len(digests) == 1
    searched = load_features("fd_dinov2", folders=[str(tmp_path)])
    assert searched.paths["dinov2_large"].is_relative_to(tmp_path)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 200), (64, 64)])
def test_dinov2_prepares_images_as_dgm_eval(small_dino, tmp_path, height, width):
    from torchvision import transforms

    prepare = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    features = load_features("fd_dinov2", weights=str(dino_files(tmp_path)[2]))
    images = images_of(2, height, width)
    theirs = features.modules()[0](torch.stack([prepare(image) for image in images]))
    torch.testing.assert_close(features(images), theirs, rtol=1e-5, atol=1e-5)


def test_dinov2_large_has_exactly_the_weights_of_the_real_files():
    config = Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=518,
        patch_size=14,
    )
    with torch.device("meta"):
        theirs = shapes_in(Dinov2Model(config))
    assert piece_shapes(theirs) == required_shapes("dinov2_large")
    assert {"embeddings.mask_token"} == set(theirs) - {
        piece.source for piece in pieces_of(theirs).values()
    }


def test_a_dinov2_with_registers_is_refused(small_dino, tmp_path):
    state = fixture.as_transformers(fixture.dino_state(), old=False)
    state["embeddings.register_tokens"] = torch.zeros(1, 4, SMALL.width)
    save_file(state, tmp_path / "dinov2_large.safetensors")
    with pytest.raises(WrongWeights, match=r"such as embeddings\.register_tokens"):
        load_features("fd_dinov2", weights=str(tmp_path / "dinov2_large.safetensors"))


# LPIPS


def loaded(files, net):
    return Lpips(net=net, folders=[str(files)])


@pytest.mark.parametrize(
    ("net", "height", "width", "count"),
    [("alex", 256, 256, 2), ("alex", 300, 256, 2), ("vgg", 256, 263, 1)],
)
def test_lpips_equals_the_package(files, net, height, width, count):
    """The channels' weights are those that the package has, and are found there."""
    one, other = images_of(count, height, width), images_of(count, height, width, seed=1)
    with torch.no_grad():
        theirs = oracle(net)(*(x.float() / 127.5 - 1 for x in (one, other)))
    ours = loaded(files, net)
    assert ours.paths[f"lpips_{net}"] == PACKAGED / "v0.1" / f"{net}.pth"
    found = ours.distance(one, other)
    assert found.min() > 1e-3
    torch.testing.assert_close(found, theirs.flatten(), rtol=1e-5, atol=1e-5)
    assert ours.distance(one, one).tolist() == [0] * count


def test_lpips_diversity_is_the_mean_over_pairs_of_the_package(files):
    images = images_of(10, 64, 80)
    resize = torchvision.transforms.v2.functional.resize
    pixels = resize(images.float() / 127.5 - 1, [256], antialias=True)
    theirs = oracle("alex")
    with torch.no_grad():
        pairs = [theirs(pixels[i], pixels[j]) for i, j in itertools.combinations(range(10), 2)]
    found = loaded(files, "alex").diversity(images)
    assert found == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-4)
    assert found > 1e-3


def test_lpips_can_be_compared_between_sizes(files):
    images = images_of(3, 128, 128)
    ours = loaded(files, "alex")
    large = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert ours.diversity(large) == pytest.approx(ours.diversity(images), rel=0.15)


def test_the_networks_of_lpips_are_those_of_torchvision():
    for name in ("alexnet", "vgg16"):
        with torch.device("meta"):
            theirs = shapes_in(getattr(torchvision.models, name)())
        assert piece_shapes(theirs) == required_shapes(name)
        convolutions = {n: s for n, s in theirs.items() if n.startswith("features.")}
        assert required_shapes(name) == convolutions
        assert piece_shapes(convolutions) == convolutions


def test_lpips_without_torchvision_says_how_to_get_it(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RewardUnavailable, match=r"LPIPS needs the package 'torchvision'.*install"):
        loaded(files, "alex")
    heads = PACKAGED / "v0.1" / "alex.pth"
    assert kinds_of(heads) == ["lpips_alex"]  # what others need torchvision for is no matter


def test_lpips_takes_the_present_version_of_its_weights(tmp_path):
    """The package holds the first version too, equal in names and shapes."""
    assert mismatch(PACKAGED / "v0.0" / "alex.pth", "lpips_alex") is None
    shutil.copy(PACKAGED / "v0.1" / "alex.pth", tmp_path / "renamed.pth")
    assert find("lpips_alex", [tmp_path]) == tmp_path / "renamed.pth"
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(PACKAGED / "v0.0" / "alex.pth", old / "alex.pth")
    assert find("lpips_alex", [old]).is_relative_to(PACKAGED / "v0.1")


def test_lpips_refuses_what_is_none(files, tmp_path):
    with pytest.raises(ValueError, match="net is 'squeeze'; choose one of alex, vgg"):
        Lpips(net="squeeze", folders=[str(files)])
    state = torch.load(PACKAGED / "v0.1" / "alex.pth", map_location="cpu", weights_only=True)
    path = fixture.write_torch({n: t - 1 for n, t in state.items()}, tmp_path / "heads.pth")
    with pytest.raises(WrongWeights, match="has negative weights"):
        Lpips(heads=str(path), folders=[str(files)]).diversity(images_of(2, 64, 64))
    ours = loaded(files, "alex")
    with pytest.raises(ValueError, match="two images of a prompt, and there are 1"):
        ours.diversity(images_of(1, 64, 64))
    with pytest.raises(ValueError, match="cannot be compared one with the other"):
        ours.distance(images_of(1, 64, 64), images_of(1, 64, 65))
    spread = Spread()
    rows = ours.embed(images_of(1, 64, 64))
    spread.add(rows)
    n = rows.shape[1]
    with pytest.raises(ValueError, match="must be of one size"):
        spread.add(ours.embed(images_of(1, 64, 90)))
    before = spread.count
    with pytest.raises(ValueError, match="embeddings of image 1 of 2 in this batch are not all"):
        spread.add(torch.stack([torch.zeros(n), torch.full((n,), torch.nan)]))
    assert spread.count == before == 1


def test_spread_keeps_its_digits():
    rows = 1e4 + torch.randn(50, 7, dtype=torch.float64)
    spread = Spread()
    for part in rows.split(8):
        spread.add(part)
    pairs = [(a - b).square().sum() for a, b in itertools.combinations(rows, 2)]
    assert spread.value == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-9)


# weights that are not there


@pytest.mark.parametrize("metric", ["fid", "fd_dinov2", "lpips"])
def test_missing_weights_are_told_with_all_one_needs_to_get_them(metric, tmp_path, monkeypatch):
    monkeypatch.setattr("comfyui_pcpo.pcpo.pretrained.find.find_spec", lambda name: None)
    make = Lpips if metric == "lpips" else (lambda **options: load_features(metric, **options))
    with pytest.raises(RewardUnavailable) as told:
        make(folders=[str(tmp_path)])
    file = of_metric(metric)[0]
    for part in (
        *(f"the metric {metric!r} needs", file.name, f"models/{file.folder}", file.size_told),
        *(file.licence, file.page, f"trainers rewards get {metric}`", str(tmp_path)),
    ):
        assert part in str(told.value)
    assert "\n" not in str(told.value)


def test_weights_are_found_in_the_hubs_checkpoints(files, tmp_path):
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(files / "alexnet-owt-7be5be79.pth", folder)
    assert find("alexnet") == folder / "alexnet-owt-7be5be79.pth"
    with pytest.raises(MissingWeights):
        find("vgg16")


def test_a_network_of_other_training_is_not_taken_for_it(files, tmp_path):
    """Its names and shapes do not tell: only its name does."""
    shutil.copy(files / "alexnet-owt-7be5be79.pth", tmp_path / "places365.pth")
    with pytest.raises(MissingWeights, match="could be it by shape"):
        find("alexnet", [tmp_path])
    assert find("alexnet", given=tmp_path / "places365.pth").name == "places365.pth"


def test_the_catalogue_names_what_metrics_need():
    keys = {
        file.key
        for metric in ("fid", "fd_dinov2", "lpips", "lpips_vgg")
        for file in of_metric(metric)
    }
    assert keys == set(NETWORKS) == {key for key in WEIGHTS if metrics_of(key)}
    for key in keys:
        file = WEIGHTS[key]
        assert (file.repo is None) == (file.url is not None)
        assert all(link.startswith("https://") for link in (file.page, file.url or file.page))


def test_nothing_is_loaded_before_it_is_asked_for(files):
    gc.collect()
    before = len(_BUILT)
    made = [Inception(folders=[str(files)]), loaded(files, "vgg")]
    assert len(_BUILT) == before and len(made) == 2
