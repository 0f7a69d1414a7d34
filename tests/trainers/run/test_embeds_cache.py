"""Prompt embeddings on the disk: found again, made again, and the encoders that stay unread."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures import flux_fixture, sd1_fixture, sd3_fixture
from comfyui_pcpo.trainers.config.train_config import DEMO_FOLDER, ConfigError, TrainConfig
from comfyui_pcpo.trainers.errors import RunError
from comfyui_pcpo.trainers.families import Files, load_family
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.families.identity import text_identity
from comfyui_pcpo.trainers.job.cache_folder import cache_folder, cache_told
from comfyui_pcpo.trainers.run import conditioning as c
from comfyui_pcpo.trainers.run import setup as p
from comfyui_pcpo.trainers.run.conditioning import EmbedsCache
from safetensors.torch import load_file, save_file

PROMPTS = ("a cat", "a dog", "a red circle")


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    return {
        "sd1": DEMO_FOLDER,
        "sd3": sd3_fixture.write_folder(made / "sd3"),
        "flux": flux_fixture.write_folder(made / "flux"),
    }


def config_of(source, cache, prompts=PROMPTS, changes=None) -> TrainConfig:
    file = cache.parent / "prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    is_flow = source != DEMO_FOLDER
    values = {
        "model": {"source": str(source), "width": 64, "height": 64},
        "rewards": {"jpeg_compressibility": 1.0},
        "prompts": {"source": str(file)},
        "run": {"cache": str(cache), "eval_prompts": 1, "device": "cpu"},
        "sampler": {"transition": "flow_sde", "steps": 4} if is_flow else {"steps": 4},
    }
    for section, fields in (changes or {}).items():
        values[section] = values.get(section, {}) | fields
    return TrainConfig.model_validate(values)


def files_in(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture
def loads(monkeypatch):
    """Which parts of models were loaded."""
    found, load = [], p.load_family

    def watched(*given, **options):
        found.append(options["parts"])
        return load(*given, **options)

    monkeypatch.setattr(p, "load_family", watched)
    return found


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_the_second_run_finds_what_the_first_made_and_reads_no_encoder(
    folders, tmp_path, loads, family
):
    config = config_of(folders[family], tmp_path / "cache")
    first = p.prepare(config)
    assert loads == ["text", "network"]
    assert len(files_in(tmp_path / "cache")) == len(PROMPTS) + 1  # with the negative prompt's
    assert (tmp_path / "cache" / "README.txt").is_file()
    AcceleratorState._reset_state(reset_partial_state=True)
    second = p.prepare(config)
    assert loads == ["text", "network", "network"]
    whole = load_family(folders[family]).encode([*PROMPTS] + [""] * 5)
    for setup in (first, second):
        with pytest.raises(RuntimeError):
            setup.family.encode(["a cat"])
        for row, prompt in enumerate([*PROMPTS, PROMPTS[0]]):
            now, then = setup.sampler.embeds[[row]], whole[[PROMPTS.index(prompt)]]
            torch.testing.assert_close(now.tokens, then.tokens, rtol=1e-5, atol=1e-5)
            assert (now.pooled is None) == (then.pooled is None)
        assert setup.sampler.policy.negative.tokens.shape[0] == 1
    for row in range(4):
        assert torch.equal(first.sampler.embeds[[row]].tokens, second.sampler.embeds[[row]].tokens)


def test_what_a_prompt_becomes_does_not_depend_on_its_neighbours(folders, tmp_path):
    alone = config_of(folders["sd3"], tmp_path / "a", PROMPTS[:1])
    one = p.prepare(alone).sampler.embeds[[0]]
    AcceleratorState._reset_state(reset_partial_state=True)
    many = p.prepare(config_of(folders["sd3"], tmp_path / "b", PROMPTS)).sampler.embeds[[0]]
    assert torch.equal(one.tokens, many.tokens) and torch.equal(one.pooled, many.pooled)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_made_again_and_that_is_said(folders, tmp_path, damage):
    config, said = config_of(folders["sd3"], tmp_path / "cache"), []
    before = p.prepare(config).sampler.embeds[[0, 1, 2]].tokens
    for file in files_in(tmp_path / "cache"):
        data = bytearray(file.read_bytes())
        if damage == "flipped":
            data[-9] ^= 255
        file.write_bytes({"cut": data[:-8], "flipped": data, "empty": b""}[damage])
    AcceleratorState._reset_state(reset_partial_state=True)
    again = p.prepare(config, said.append).sampler.embeds[[0, 1, 2]].tokens
    assert torch.equal(before, again)
    assert sum("are damaged" in text for text in said) == len(PROMPTS) + 1
    assert any("encoding 4 prompts" in text for text in said)
    cache = c.cache_of(config, print)
    assert all(cache.read(prompt) is not None for prompt in (*PROMPTS, ""))


def test_the_key_knows_the_encoders_the_precision_and_nothing_else(tmp_path):
    one, two = (sd3_fixture.write_folder(tmp_path / name) for name in "ab")
    assert text_identity(Files(one)) == text_identity(Files(two))
    network = two / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({key: t + 1 for key, t in load_file(network).items()}, network)
    assert text_identity(Files(one)) == text_identity(Files(two))
    encoder = two / "text_encoder_2" / "model.safetensors"
    save_file({key: t + 1 for key, t in load_file(encoder).items()}, encoder)
    changed = text_identity(Files(two))
    assert text_identity(Files(one)) != changed
    tokenizer = two / "tokenizer_3" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"x": 1}))
    assert text_identity(Files(two)) != changed
    half = config_of(one, tmp_path / "cache", changes={"model": {"precision": "bfloat16"}})
    whole = config_of(one, tmp_path / "cache")
    assert c.cache_of(half, print).identity != c.cache_of(whole, print).identity


def test_a_single_file_is_known_by_its_text_encoders(tmp_path):
    tensors = sd3_fixture.original_names(sd3_fixture.modules("sd3.5-m"))
    found = {}
    for name, part in (("a", ""), ("b", "model.diffusion_model."), ("c", "text_encoders.clip_l.")):
        changed = {k: t + 1 if part and k.startswith(part) else t for k, t in tensors.items()}
        path = sd3_fixture.write(changed, tmp_path / f"{name}.safetensors")
        found[name] = text_identity(Files(path))
    assert found["a"] == found["b"] != found["c"]


def test_a_long_prompt_is_refused_before_the_network_is_read(folders, tmp_path, loads):
    config = config_of(folders["sd1"], tmp_path / "cache", [*PROMPTS, "word " * 100])
    with pytest.raises(ConfigError, match="402 tokens and the model takes 77"):
        p.prepare(config)
    assert loads == ["text"] and not files_in(tmp_path / "cache")


def test_where_embeddings_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PCPO_CACHE", str(tmp_path / "env"))
    assert cache_folder(None) == tmp_path / "env"
    assert cache_folder(str(tmp_path / "own")) == tmp_path / "own"
    assert cache_folder("off") is None
    assert cache_told().startswith(f"{tmp_path / 'env'}: 0 prompts, 0 MiB")
    monkeypatch.delenv("PCPO_CACHE")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache_folder(None) == tmp_path / "pcpo" / "prompts"


def test_without_a_cache_nothing_is_written(folders, tmp_path, loads):
    config = config_of(folders["sd1"], tmp_path / "cache", changes={"run": {"cache": "off"}})
    p.prepare(config)
    assert not (tmp_path / "cache").exists() and loads == ["text", "network"]


def test_a_cache_that_cannot_be_written_is_said_and_does_not_stop_a_run(folders, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    said = []
    setup = p.prepare(config_of(folders["sd1"], tmp_path / "cache"), said.append)
    assert len(setup.sampler.embeds[[0, 1]]) == 2
    assert sum("cannot be kept in" in text for text in said) == 1


def test_of_many_prompts_those_that_are_asked_for_are_encoded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(c, "ALL", 5)
    prompts = [f"a {animal}" for animal in "abcdefghij"]
    config = config_of(
        folders["sd1"],
        tmp_path / "cache",
        prompts,
        changes={
            "prompts": {"per_iteration": 2, "images_per_prompt": 1, "held_out": "training"},
            "optimizer": {"updates": 1},
            "run": {"iterations": 2},
        },
    )
    setup = p.prepare(config)
    asked = {row for i in range(2) for row in c.chosen_prompts(config.prompts, 10, 0, i)}
    assert len(files_in(tmp_path / "cache")) == len({*asked, 0}) + 1
    for row in asked:
        assert len(setup.sampler.embeds[[row]]) == 1
    with pytest.raises(IndexError):
        setup.sampler.embeds[[({*range(1, 10)} - asked).pop()]]


def test_large_embeddings_stay_on_the_disk(folders, tmp_path, monkeypatch):
    whole = p.prepare(config_of(folders["flux"], tmp_path / "a"))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(c, "IN_MEMORY", 1000)
    setup = p.prepare(config_of(folders["flux"], tmp_path / "b"))
    rows = [2, 0, 2, 3]
    assert torch.equal(setup.sampler.embeds[rows].tokens, whole.sampler.embeds[rows].tokens)
    assert torch.equal(setup.sampler.embeds[rows].pooled, whole.sampler.embeds[rows].pooled)
    assert torch.equal(setup.sampler.policy.negative.tokens, whole.sampler.policy.negative.tokens)
    for file in files_in(tmp_path / "b"):
        file.unlink()
    with pytest.raises(RunError, match=r"are gone from .*; resume the run"):
        setup.sampler.embeds[[0]]


def test_two_writers_and_a_reader_see_whole_files(tmp_path):
    cache = EmbedsCache(tmp_path, "id", print)
    embeds = Embeds(torch.ones(1, 3, 4, dtype=torch.bfloat16))
    for _ in range(2):
        cache.write("a cat", embeds)
    found = cache.read("a cat")
    assert found is not None and found.pooled is None and torch.equal(found.tokens, embeds.tokens)
    assert [path.name[0] != "." for path in tmp_path.rglob("*.safetensors")] == [True]
    assert cache.read("a dog") is None and not cache.has("a dog")


def test_a_single_file_without_its_network_encodes_alike(tmp_path):
    tensors = sd3_fixture.original_names(sd3_fixture.modules("sd3.5-m"))
    path = sd3_fixture.write(tensors, tmp_path / "a.safetensors")
    tokenizer = sd3_fixture.write_t5_tokenizer(tmp_path / "t5")
    files = Files(path, t5_tokenizer=tokenizer)
    whole, text, network = (load_family(files, parts=x) for x in ("all", "text", "network"))
    assert text.device.type == "meta"
    one, two = whole.encode(["a cat"]), text.encode(["a cat"])
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.pooled, two.pooled)
    assert network.text is None and network.latent_shape(64, 64) == text.latent_shape(64, 64)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocities = [f.predict(x, torch.tensor(0.5), one) for f in (whole, network)]
    assert torch.equal(*velocities)


def test_sd1_as_a_file_leaves_its_encoder_out(tmp_path):
    folder = sd1_fixture.write_folder(tmp_path / "folder")
    path = sd1_fixture.write_single_file(folder, tmp_path / "a.safetensors")
    assert load_family(path, parts="network").text_encoder is None
    assert load_family(path, parts="text").text_encoder is not None
