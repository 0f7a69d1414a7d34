"""Weight files: told by what is in them, found where they may be, refused where they are not it."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import rewards_fixture as fixture
import torch
from comfyui_pcpo.pcpo.pretrained import clip as towers
from comfyui_pcpo.pcpo.pretrained import shapes as shapes_module
from comfyui_pcpo.pcpo.pretrained.catalogue import WEIGHTS, of_reward, rewards_of
from comfyui_pcpo.pcpo.pretrained.find import MissingWeights, WrongWeights, digest, find
from comfyui_pcpo.pcpo.pretrained.layouts import piece_shapes, pieces_of
from comfyui_pcpo.pcpo.pretrained.read import BrokenWeights, shapes_of, tensors_of
from comfyui_pcpo.pcpo.pretrained.recognise import mismatch, required_shapes
from comfyui_pcpo.pcpo.rewards import RewardUnavailable, image_reward, load_reward
from rewards_files_fixture import CLIP_H, CLIP_L, NAMES, STORED, clip_state, make_small, write
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, DebertaConfig, DebertaModel

GOLDEN = Path(__file__).parents[2] / "golden"
DROPPED = re.compile(  # all that a real file may hold and no network reads
    r"(text_model|vision_model)\.embeddings\.position_ids|attn_mask"
    r"|blip\.text_encoder\.embeddings\.position_ids|blip\.(vision|text)_proj\.(weight|bias)"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("reward_models"))


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No weights of this machine are found."""
    monkeypatch.delenv("PCPO_REWARDS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


# The real files, by the networks of those who made them


def shapes_in(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def clip_of_transformers(text, vision, patch, embed):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = CLIPConfig(
        text_config=dict(zip(names, text, strict=True)),
        vision_config={**dict(zip(names, vision, strict=True)), "patch_size": patch},
        projection_dim=embed,
    )
    config.text_config.projection_dim = config.vision_config.projection_dim = embed
    with torch.device("meta"):
        found = shapes_in(CLIPModel(config))
    # as saved by transformers below 4.31
    found["text_model.embeddings.position_ids"] = (1, 77)
    found["vision_model.embeddings.position_ids"] = (1, (224 // patch) ** 2 + 1)
    return found


def clip_of_open_clip(name):
    with torch.device("meta"):
        return shapes_in(open_clip.model.CLIP(**open_clip.get_model_config(name)))


def image_reward_shapes():
    lines = (GOLDEN / "image_reward_shapes.txt").read_text().split("\n")
    pairs = [line.split() for line in lines if line]
    found = {name: tuple(map(int, shape.split("x"))) for name, shape in pairs}
    return found | {"blip.text_encoder.embeddings.position_ids": (1, 512)}


def head_shapes():
    widths = [768, 1024, 128, 64, 16, 1]
    found = {}
    for layer, narrow, wide in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        found |= {f"layers.{layer}.weight": (wide, narrow), f"layers.{layer}.bias": (wide,)}
    return found


H = ((1024, 4096, 24, 16), (1280, 5120, 32, 16), 14, 1024)
L = ((768, 3072, 12, 12), (1024, 4096, 24, 16), 14, 768)
B = ((512, 2048, 12, 8), (768, 3072, 12, 12), 32, 512)
REAL = {
    "aesthetic_head": head_shapes,
    "clip_l": lambda: clip_of_transformers(*L),
    "clip_b32": lambda: clip_of_transformers(*B),
    "pick_score": lambda: clip_of_transformers(*H),
    "hps_v2": lambda: clip_of_open_clip("ViT-H-14"),
    "hps_v2_1": lambda: clip_of_open_clip("ViT-H-14"),
    "image_reward": image_reward_shapes,
}


@pytest.mark.parametrize("key", REAL)
def test_every_tensor_of_a_real_file_is_used_or_on_the_drop_list(key):
    stored = REAL[key]()
    used = {piece.source for piece in pieces_of(stored).values()}
    assert all(DROPPED.fullmatch(name) for name in set(stored) - used)
    assert not [name for name in used if DROPPED.fullmatch(name)]
    assert piece_shapes(stored) == required_shapes(key)


@pytest.mark.parametrize("key", [k for k in REAL if k != "aesthetic_head"])
def test_every_weight_of_a_network_is_in_the_file(key):
    with torch.device("meta"):
        if key == "image_reward":
            spec = shapes_module.BLIPS[key]
            parts = {"vision.": image_reward.vision_network, "text.": image_reward.text_network}
        else:
            spec = shapes_module.CLIPS[key]
            parts = {"": towers.vision_network, " ": towers.text_network}
        found = {
            f"{stem.strip()}{name}": shape
            for stem, make in parts.items()
            for name, shape in shapes_in(make(spec)).items()
        }
    rest = {
        n: s for n, s in required_shapes(key).items() if n != "logit_scale" and "head." not in n
    }
    assert found == rest


def test_number_of_parameters_is_that_of_the_real_networks():
    def millions(key):
        return sum(torch.Size(shape).numel() for shape in required_shapes(key).values()) / 1e6

    assert millions("clip_l") == pytest.approx(428, abs=1)
    assert millions("clip_l_vision") == pytest.approx(304, abs=1)
    assert millions("pick_score") == pytest.approx(986, abs=1)
    assert millions("image_reward") == pytest.approx(446, abs=1)


def test_what_deberta_is_recognised_by_is_in_it():
    from comfyui_pcpo.pcpo.pretrained.recognise import _DEBERTA

    config = DebertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=48,
        num_attention_heads=16,
        intermediate_size=4096,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["c2p", "p2c"],
    )
    with torch.device("meta"):
        found = shapes_in(DebertaModel(config))
    assert _DEBERTA.items() <= found.items()


def test_the_catalogue_names_what_rewards_need():
    for name in NAMES:
        assert of_reward(name)
        for file in of_reward(name):
            assert name in rewards_of(file.key)
            assert file.size
            assert file.page.startswith("https://")
    assert len(WEIGHTS["aesthetic_head"].sha256 or "") == 64


# Finding


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_found_in_a_folder(small, files, name):
    reward = load_reward(name, folders=["/nowhere", str(files)])
    assert list(reward.paths.values()) == [files / path for path in STORED[name]]


def test_weights_are_found_whatever_they_are_called(small, files, tmp_path):
    """Only what is equal in shape needs its name."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    shutil.copy(files / "ImageReward.pt", tmp_path / "a" / "b" / "x.bin")
    shutil.copy(files / "bert-base-uncased" / "vocab.txt", tmp_path / "words.txt")
    shutil.copy(files / "clip-vit-large-patch14.safetensors", tmp_path / "y.safetensors")
    (tmp_path / "readme.txt").write_text("no vocabulary")
    assert find("image_reward", [tmp_path]) == tmp_path / "a" / "b" / "x.bin"
    assert find("bert_vocab", [tmp_path]) == tmp_path / "words.txt"
    assert find("clip_l", [tmp_path]) == tmp_path / "y.safetensors"
    assert find("clip_l_vision", [tmp_path]) == tmp_path / "y.safetensors"


def test_links_that_lead_nowhere_are_passed_over(small, files, tmp_path):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "gone.safetensors")
    (tmp_path / "b.safetensors").symlink_to(files / "clip-vit-large-patch14.safetensors")
    (tmp_path / "again").symlink_to(tmp_path)
    assert find("clip_l", [tmp_path / "again"]).samefile(
        files / "clip-vit-large-patch14.safetensors"
    )


def test_the_vision_tower_alone_suffices_for_aesthetic(small, files, tmp_path):
    state = {n: t for n, t in clip_state(CLIP_L, "l").items() if n.startswith("vis")}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, tmp_path / "clip_vision_l.safetensors")
    shutil.copy(files / STORED["aesthetic"][0], tmp_path)
    alone = load_reward("aesthetic", folders=[str(tmp_path)])
    whole = load_reward("aesthetic", folders=[str(files)])
    picture = fixture.pictures()["large"]
    assert alone.score([picture], [""]).values == whole.score([picture], [""]).values
    ours, theirs = alone.fingerprint(), whole.fingerprint()
    key = "clip_l_vision"
    assert ours["weights"][key]["sha256"] == theirs["weights"][key]["sha256"]
    with pytest.raises(MissingWeights, match="clip_score"):
        load_reward("clip_score", folders=[str(tmp_path)])


def test_equal_shapes_are_told_apart_by_name(small, files, tmp_path):
    assert find("hps_v2", [files]).name == "HPS_v2_compressed.pt"
    assert find("hps_v2_1", [files]).name == "HPS_v2.1_compressed.pt"
    assert find("pick_score", [files]).parent.name == "PickScore_v1"
    shutil.copy(files / "HPS_v2.1_compressed.pt", tmp_path / "HPS_v2.1.pt")
    assert find("hps_v2_1", [tmp_path]).name == "HPS_v2.1.pt"
    for key in ("hps_v2", "pick_score"):
        with pytest.raises(MissingWeights):
            find(key, [tmp_path])
    (tmp_path / "HPS_v2.1.pt").rename(tmp_path / "model.pt")
    with pytest.raises(MissingWeights, match=r"model\.pt could be it by shape: give the right"):
        find("hps_v2_1", [tmp_path])
    assert find("hps_v2_1", given=tmp_path / "model.pt") == tmp_path / "model.pt"


def test_another_head_of_laions_is_not_taken_for_it(small, files, tmp_path):
    shutil.copy(files / STORED["aesthetic"][0], tmp_path / "ava+logos-l14-linearMSE.pth")
    with pytest.raises(MissingWeights, match="could be it by shape"):
        find("aesthetic_head", [tmp_path])


def test_a_given_file_of_another_name_is_taken_with_a_warning(small, files, caplog):
    with caplog.at_level(logging.WARNING):
        find("pick_score", given=files / "HPS_v2.1_compressed.pt")
    assert "HPS_v2.1_compressed.pt is taken for pick_score" in caplog.text


def test_weights_are_found_in_the_environments_folder(small, files, monkeypatch):
    monkeypatch.setenv("PCPO_REWARDS", str(files))
    assert load_reward("pick_score").paths["pick_score"].is_relative_to(files)


def test_weights_are_found_in_image_rewards_own_cache(small, files, tmp_path):
    cache = tmp_path / "home" / ".cache" / "ImageReward"
    cache.mkdir(parents=True)
    shutil.copy(files / "ImageReward.pt", cache)
    assert find("image_reward") == cache / "ImageReward.pt"


def test_weights_are_found_in_the_hubs_cache(small, files, tmp_path):
    commit = "0" * 40
    home = tmp_path / "hub" / "models--yuvalkirstain--PickScore_v1"
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    shutil.copy(files / "PickScore_v1" / "model.safetensors", home / "snapshots" / commit)
    assert find("pick_score") == home / "snapshots" / commit / "model.safetensors"


def test_weights_in_several_files(small, files, tmp_path):
    state = clip_state(CLIP_H, "h")
    names = sorted(state)
    parts = {f"model-{i}.safetensors": names[i::2] for i in (0, 1)}
    folder = tmp_path / "PickScore_v1"
    folder.mkdir()
    for name, held in parts.items():
        save_file({key: state[key] for key in held}, folder / name)
    index = {"weight_map": {key: name for name, held in parts.items() for key in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    picture, prompt = [fixture.pictures()["large"]], ["a cube"]
    found = load_reward("pick_score", folders=[str(tmp_path)])
    assert found.paths["pick_score"] == folder
    whole = load_reward("pick_score", weights=str(files / "PickScore_v1"))
    assert found.score(picture, prompt).values == whole.score(picture, prompt).values
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(BrokenWeights, match=r"has no file model-1\.safetensors"):
        load_reward("pick_score", weights=str(folder))


def test_deberta_is_found_with_its_tokenizer(tmp_path, monkeypatch):
    from comfyui_pcpo.pcpo.pretrained import recognise

    monkeypatch.setattr(recognise, "_DEBERTA", {"encoder.weight": (2, 3)})
    folder = tmp_path / "deberta-xlarge-mnli"
    folder.mkdir()
    torch.save({"deberta.encoder.weight": torch.zeros(2, 3)}, folder / "pytorch_model.bin")
    with pytest.raises(MissingWeights, match=r"no config\.json"):
        find("deberta", [tmp_path])
    (folder / "config.json").write_text('{"model_type": "deberta"}')
    assert find("deberta", [tmp_path]) == folder
    assert find("deberta", given=folder) == folder
    (folder / "config.json").write_text('{"model_type": "deberta-v2"}')
    with pytest.raises(WrongWeights, match="'deberta-v2' and not of a 'deberta'"):
        find("deberta", given=folder)


@pytest.mark.parametrize("name", NAMES)
def test_missing_weights_are_told_with_all_one_needs_to_get_them(tmp_path, name):
    file = of_reward(name)[0]
    with pytest.raises(RewardUnavailable) as told:
        load_reward(name, folders=[str(tmp_path)])
    for part in (
        *(name, file.name, f"models/{file.folder}", file.size_told, file.licence, file.page),
        *(f"trainers rewards get {name}`", str(tmp_path)),
    ):
        assert part in str(told.value)
    assert "\n" not in str(told.value)


def test_where_no_folder_is_named_it_says_so(monkeypatch):
    monkeypatch.delenv("PCPO_REWARDS", raising=False)
    with pytest.raises(MissingWeights) as told:
        find("clip_l")
    assert "not in the Hugging Face cache, and PCPO_REWARDS names no folder" in str(told.value)
    assert "neither" not in str(told.value)


def test_a_file_that_changed_is_read_again(small, files, tmp_path):
    path = tmp_path / "clip.safetensors"
    state = load_file(files / "clip-vit-large-patch14.safetensors")
    save_file(state, path)
    assert mismatch(path, "clip_l") is None
    before = digest(path)
    save_file({name: tensor + 1 for name, tensor in state.items()}, path)
    assert digest(path) != before
    del state["visual_projection.weight"]
    save_file(state, path)
    assert "no tensor visual_projection.weight (768x32)" in str(mismatch(path, "clip_l"))


# Wrong, broken and hostile files


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_file_is_refused(small, files, name):
    other = "PickScore_v1/model.safetensors" if name == "image_reward" else "ImageReward.pt"
    with pytest.raises(WrongWeights) as told:
        load_reward(name, weights=str(files / other), folders=[str(files)])
    text = str(told.value)
    assert f"{other} is not {of_reward(name)[0].name}" in text
    assert "has no tensor" in text
    assert f"it is {'PickScore' if name == 'image_reward' else 'ImageReward'}" in text


def test_a_head_with_relus_is_refused(small, files, tmp_path):
    layers = dict(zip((0, 2, 4, 6, 7), (0, 3, 6, 9, 11), strict=True))
    state = tensors_of(files / STORED["aesthetic"][0])
    moved = {
        re.sub(r"\d+", lambda m: str(layers[int(m[0])]), n, count=1): t for n, t in state.items()
    }
    path = tmp_path / "ava+logos-l14-reluMSE.pth"
    torch.save(moved, path)
    with pytest.raises(WrongWeights, match=r"has no tensor layers\.2\.weight"):
        load_reward("aesthetic", weights=str(path), folders=[str(files)])


def test_a_larger_network_is_refused(small, tmp_path):
    state = clip_state(CLIP_L, "l")
    state["vision_model.encoder.layers.2.layer_norm1.weight"] = torch.zeros(32)
    save_file(state, tmp_path / "clip.safetensors")
    for key in ("clip_l", "clip_l_vision"):
        with pytest.raises(WrongWeights, match=r"such as vision_model\.encoder\.layers\.2"):
            find(key, given=tmp_path / "clip.safetensors")


def cut(path, target, share):
    target.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return target


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.5, 0.999])
@pytest.mark.parametrize("file", ["PickScore_v1/model.safetensors", "HPS_v2_compressed.pt"])
def test_a_truncated_file_is_refused(small, files, tmp_path, file, share):
    key = "hps_v2" if "HPS" in file else "pick_score"
    path = cut(files / file, tmp_path / f"{key}_{Path(file).name}", share)
    with pytest.raises(BrokenWeights, match=r"is no complete .* download it again"):
        find(key, given=path)
    with pytest.raises(MissingWeights):
        find(key, [tmp_path])


def test_a_truncated_file_of_the_old_format_is_refused(small, files, tmp_path):
    state = tensors_of(files / STORED["aesthetic"][0])
    old = tmp_path / "old.pth"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    assert shapes_of(old) == shapes_of(files / STORED["aesthetic"][0])
    with pytest.raises(BrokenWeights, match="is no complete"):
        find("aesthetic_head", given=cut(old, tmp_path / "cut.pth", 0.5))


def test_a_search_tells_of_a_broken_file_of_the_right_name(small, files, tmp_path):
    cut(files / "HPS_v2_compressed.pt", tmp_path / "HPS_v2_compressed.pt", 0.5)
    with pytest.raises(MissingWeights, match=r"was passed over, as .* is no complete"):
        load_reward("hps_v2", folders=[str(tmp_path)])


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", ["torch", "torch_old", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(small, tmp_path, protocol):
    mark, path = tmp_path / "it_ran", tmp_path / "HPS_v2_compressed.pt"
    held = {"state_dict": {"a": torch.zeros(2)}, "more": Hostile(mark)}
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(held))
    else:
        torch.save(held, path, _use_new_zipfile_serialization=protocol == "torch")
    with pytest.raises(BrokenWeights, match=r"(pickle with code|is no complete)"):
        find("hps_v2", given=path)
    with pytest.raises(MissingWeights):
        find("hps_v2", [tmp_path])
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_program_is_refused(small, tmp_path):
    path = tmp_path / "ViT-L-14.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    with pytest.raises(BrokenWeights, match="TorchScript program, which is never run"):
        find("clip_l", given=path)


def test_text_and_other_data_are_refused(small, tmp_path):
    text = tmp_path / "a.pt"
    text.write_text("<!doctype html>")
    with pytest.raises(BrokenWeights, match="no complete file of torch's"):
        find("hps_v2", given=text)
    listed = tmp_path / "b.pt"
    torch.save([torch.zeros(2)], listed)
    with pytest.raises(BrokenWeights, match="holds a list, no weights by name"):
        find("hps_v2", given=listed)
    with pytest.raises(MissingWeights, match=r"there is no .*c\.pt, the path given"):
        find("hps_v2", given=tmp_path / "c.pt")


def test_another_vocabulary_is_refused(small, files, tmp_path):
    words = tmp_path / "vocab.txt"
    words.write_text("[PAD]\na\n")
    given = {"vocab": str(words), "folders": [str(files)]}
    with pytest.raises(WrongWeights, match="it has 2 lines and not"):
        load_reward("image_reward", **given)
    words.write_text("\n".join(["x" if w == "[SEP]" else w for w in fixture.WORDS]))
    with pytest.raises(WrongWeights, match=r"it has no \[SEP\]"):
        load_reward("image_reward", **given)


def test_an_index_cannot_name_files_elsewhere(small, files, tmp_path):
    index = {"weight_map": {"a": "../../secret.bin"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenWeights, match=r"has no file \.\./\.\./secret\.bin"):
        find("pick_score", given=tmp_path)
