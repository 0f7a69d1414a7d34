"""The shipped demo model: its files, its architecture, its words, and how good it is."""

from __future__ import annotations

import json
import re
import shutil
import socket
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo import Ddim, ddim_grid, noise_streams, plan_diffusion, rollout, scenes
from comfyui_pcpo.pcpo.credit import Native
from comfyui_pcpo.pcpo.plan import deterministic
from comfyui_pcpo.pcpo.rewards import load_reward
from comfyui_pcpo.trainers.config.train_config import DEMO_FOLDER
from comfyui_pcpo.trainers.demo import __main__ as recipe
from comfyui_pcpo.trainers.demo import autoencoder, diffusion, flow, latents
from comfyui_pcpo.trainers.demo.fit import Settings
from comfyui_pcpo.trainers.demo.latents import CARELESS
from comfyui_pcpo.trainers.demo.tokenizer import vocabulary
from comfyui_pcpo.trainers.families import load_family
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTokenizer

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def offline():
    def refuse(*_: object) -> None:
        raise OSError("the demo model must load without a network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture(scope="module")
def family():
    return load_family(DEMO_FOLDER)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    # without a dtype transformers 5 keeps float16 and diffusers takes float32
    pipe = StableDiffusionPipeline.from_pretrained(
        DEMO_FOLDER, torch_dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def config(name: str) -> dict[str, Any]:
    return json.loads((DEMO_FOLDER / name).read_text("utf-8"))


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    with safe_open(DEMO_FOLDER / name, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


# --- files ---------------------------------------------------------------------------------------


def test_folder_is_small_and_holds_only_what_is_loaded():
    files = [file for file in DEMO_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    assert {file.suffix for file in files} == {".json", ".txt", ".safetensors"}
    weights = {str(f.relative_to(DEMO_FOLDER)) for f in files if f.suffix == ".safetensors"}
    assert weights == {UNET, VAE, TEXT}


@pytest.mark.parametrize("name", [UNET, VAE, TEXT])
def test_weights_are_half_precision_and_finite(name):
    tensors = load_file(DEMO_FOLDER / name)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_configs_name_no_machine():
    for file in DEMO_FOLDER.rglob("*.json"):
        text = file.read_text("utf-8")
        assert "_name_or_path" not in text, file
        assert not re.search(r'"(/|[A-Za-z]:\\|~)\w', text), file


# --- architecture: what ComfyUI's SD1.x classes express ------------------------------------------


def test_unet_is_one_that_comfyui_can_build():
    found = config("unet/config.json")
    first, *rest = found["block_out_channels"]
    assert first % 32 == 0 and all(width % first == 0 for width in rest)
    expected = {
        "attention_head_dim": 8,  # the number of heads, in SD1.x configs
        "num_attention_heads": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "use_linear_projection": False,
        "in_channels": 4,
        "out_channels": 4,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "time_embedding_type": "positional",
        "resnet_time_scale_shift": "default",
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": 1,
        "only_cross_attention": False,
        "dual_cross_attention": False,
        "upcast_attention": False,
        "class_embed_type": None,
        "num_class_embeds": None,
        "addition_embed_type": None,
        "encoder_hid_dim": None,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["sample_size"] == 8 and isinstance(found["layers_per_block"], int)
    assert set(found["down_block_types"]) <= {"CrossAttnDownBlock2D", "DownBlock2D"}
    mirrored = [kind.replace("Up", "Down") for kind in found["up_block_types"][::-1]]
    assert mirrored == found["down_block_types"]

    sizes = shapes(UNET)
    projections = [s for key, s in sizes.items() if re.search(r"proj_(in|out)\.weight", key)]
    assert projections and all(len(s) == 4 for s in projections)  # 1 x 1 convolutions
    assert sizes["time_embedding.linear_1.weight"] == (4 * first, first)
    context = {s[1] for key, s in sizes.items() if key.endswith("attn2.to_k.weight")}
    assert context == {config("text_encoder/config.json")["hidden_size"]}


def test_unet_is_small():
    sizes = shapes(UNET)
    assert 1e6 <= sum(int(np.prod(shape)) for shape in sizes.values()) <= 2e6


def test_text_encoder_is_clips():
    found = config("text_encoder/config.json")
    assert found["hidden_act"] == "quick_gelu" and found["layer_norm_eps"] == 1e-5
    assert found["max_position_embeddings"] == 77
    assert found["hidden_size"] % found["num_attention_heads"] == 0
    sizes = shapes(TEXT)
    ends = {key.rpartition("embeddings.")[2]: shape for key, shape in sizes.items()}
    assert ends["position_embedding.weight"] == (77, found["hidden_size"])
    assert ends["token_embedding.weight"] == (found["vocab_size"], found["hidden_size"])


def test_autoencoder_has_taesds_shapes():
    found = config("vae/config.json")
    assert (found["_class_name"], found["act_fn"]) == ("AutoencoderTiny", "relu")
    assert (found["scaling_factor"], found["latent_magnitude"]) == (1.0, 3)
    assert found["num_encoder_blocks"] == [1, 3, 3, 3]
    assert found["num_decoder_blocks"] == [3, 3, 3, 1]
    taesd = {key: tuple(tensor.shape) for key, tensor in AutoencoderTiny().state_dict().items()}
    assert shapes(VAE) == taesd and taesd["encoder.layers.0.weight"] == (64, 3, 3, 3)


def test_noise_schedule_is_stable_diffusions(family):
    found = config("scheduler/scheduler_config.json")
    expected = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
    }
    assert {name: found[name] for name in expected} == expected
    assert family.alpha_bars[[0, -1]].tolist() == pytest.approx([0.99915, 0.0046600], rel=1e-4)


# --- words ---------------------------------------------------------------------------------------


def test_each_word_is_one_token(family):
    tokens = family.tokenizer
    ids = {word: tokens(word, add_special_tokens=False).input_ids for word in scenes.words()}
    assert all(len(found) == 1 for found in ids.values()), ids
    assert len({found[0] for found in ids.values()}) == len(scenes.words()) == 36
    assert tokens.unk_token_id not in {found[0] for found in ids.values()}
    assert tokens.model_max_length == 77


def test_sentences_become_words_between_start_and_end(family):
    tokens = family.tokenizer
    rng = np.random.default_rng(2)
    told = [scenes.describe(scenes.either_way(scene, rng), rng) for scene in scenes.all_scenes()]
    for sentence in [*told, *scenes.split().held_out, *scenes.split().reinforcement]:
        ids = tokens(sentence).input_ids
        start, *words, end = ids
        assert (start, end) == (tokens.bos_token_id, tokens.eos_token_id)
        assert tokens.convert_ids_to_tokens(words) == [f"{w}</w>" for w in sentence.split()]
        assert not {tokens.bos_token_id, tokens.eos_token_id, tokens.unk_token_id} & set(words)
        assert tokens.decode(words).strip() == sentence


def test_padding_is_the_end_token_up_to_77(family):
    tokens = family.tokenizer
    for sentence, length in (("", 0), ("a red circle to the left of an azure box", 10)):
        ids = tokens(sentence, padding="max_length", max_length=77, truncation=True).input_ids
        assert len(ids) == 77
        assert ids[0] == tokens.bos_token_id
        assert ids[length + 1 :] == [tokens.eos_token_id] * (76 - length)
        assert tokens.eos_token_id not in ids[: length + 1]


def test_tokenizer_and_text_encoder_agree(family):
    found = config("text_encoder/config.json")
    assert found["vocab_size"] == len(family.tokenizer) == len(vocabulary())
    assert found["eos_token_id"] == found["pad_token_id"] == family.tokenizer.eos_token_id
    assert found["bos_token_id"] == family.tokenizer.bos_token_id
    assert family.tokenizer.get_vocab() == vocabulary()


def test_tokenizer_has_the_files_of_transformers_4_and_5(tmp_path):
    folder = DEMO_FOLDER / "tokenizer"
    assert config("tokenizer/vocab.json") == vocabulary()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    from_both, from_old = map(CLIPTokenizer.from_pretrained, (folder, tmp_path))
    prompts = [*scenes.split().held_out, ""]
    assert from_both(prompts).input_ids == from_old(prompts).input_ids


# --- what it can do ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawings() -> tuple[torch.Tensor, list[str]]:
    rng = np.random.default_rng(31)
    chosen = [scenes.all_scenes()[i] for i in rng.integers(984, size=50)]
    pictures = np.stack([scenes.draw(scene, rng) for scene in chosen])
    prompts = [scenes.describe(scene) for scene in chosen]
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), prompts


@torch.no_grad()
def test_autoencoder_keeps_what_a_picture_shows(family, drawings):
    images, prompts = drawings
    x = images.float() / 127.5 - 1
    latents = family.vae.encode(x).latents
    assert latents.shape == (50, 4, 8, 8)
    # the scaling factor 1 is right, so that the noise schedule fits
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert latents.std((0, 2, 3)).min() > 0.6 and latents.std((0, 2, 3)).max() < 1.4
    values = load_reward("scene").score(family.decode(latents), prompts).values
    assert (values > 0.9999).float().mean() >= 0.97


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return noise_streams([("evaluation", i) for i in range(64)], 10, (4, 8, 8))


@torch.no_grad()
def drawn(family, noise, plan) -> torch.Tensor:
    embeds = family.encode(list(scenes.split().held_out))
    found = rollout(lambda x, t: family.predict(x, t, embeds), plan, noise)
    return family.decode(found.final)


@pytest.fixture(scope="module")
def images(family, noise) -> torch.Tensor:
    """What the base draws for the held-out prompts: guidance 1, 10 DDIM steps, eta 1."""
    return drawn(family, noise, plan_diffusion(ddim_grid(10, family.alpha_bars), Ddim(), Native()))


@pytest.fixture(scope="module")
def measured_by_recipe(family) -> float:
    model = torch.nn.ModuleDict({"unet": family.unet, "text_encoder": family.text_encoder})
    return diffusion.evaluate(model, family.vae, family.tokenizer, eta=1.0)


def test_base_score_leaves_something_to_align(images, measured_by_recipe):
    values = load_reward("scene").score(images, list(scenes.split().held_out)).values
    assert 0.4 <= values.mean() <= 0.75
    assert abs(values.mean() - measured_by_recipe) < 0.02  # the figure that chose the step


def test_prompts_are_obeyed(images):
    """Each picture fits its own prompt better than the prompts of the others, on the mean."""
    prompts, reward = list(scenes.split().held_out), load_reward("scene")
    own = reward.score(images, prompts).values.mean()
    others = [reward.score(images, prompts[i:] + prompts[:i]).values.mean() for i in (7, 29)]
    assert own > 1.4 * max(others)


def test_diffusers_pipeline_draws_the_same(family, pipeline, noise):
    grid = ddim_grid(10, family.alpha_bars)
    plan = deterministic(plan_diffusion(grid, Ddim(), Native()), grid, Ddim(), "epsilon")
    images = drawn(family, noise, plan)
    assert pipeline.safety_checker is None and pipeline.unet.dtype == torch.float32
    theirs = pipeline(
        list(scenes.split().held_out[:16]),
        latents=noise[:16, 0],
        num_inference_steps=10,
        guidance_scale=1.0,
        eta=0.0,
        output_type="np",
    ).images
    ours = images[:16].permute(0, 2, 3, 1).numpy() / 255
    assert theirs.shape == (16, 64, 64, 3)
    assert abs(theirs - ours).mean() < 0.5 / 255 and ours.std() > 0.1


def test_it_draws_in_two_styles_and_obeys_in_one(images):
    """What alignment can find: the dark pictures are the obedient ones."""
    values = load_reward("scene").score(images, list(scenes.split().held_out)).values
    is_light = images.float().mean(1).flatten(1).median(1).values > 128
    assert 0.15 < is_light.float().mean() < 0.6
    assert values[~is_light].mean() > values[is_light].mean() + 0.2


# --- how it is made ------------------------------------------------------------------------------


def test_readme_says_how_it_is_made():
    text = Path(recipe.__file__).with_name("README.md").read_text("utf-8")
    assert not re.findall(r"<[A-Z][A-Z0-9_]*>", text)  # figures not filled in
    rows = dict(re.findall(r"^\| `(\w+\.\w+)` \| ([\d.]+) \|", text, re.MULTILINE))
    expected = {f"autoencoder.{k}": v for k, v in asdict(autoencoder.Settings()).items()}
    expected |= {f"diffusion.{k}": v for k, v in asdict(Settings()).items()}
    expected |= {f"flow.{k}": v for k, v in asdict(flow.FlowSettings()).items()}
    expected |= {"latents.count": recipe.LATENTS, "latents.seed": recipe.LATENTS_SEED}
    expected |= {"latents.careless": CARELESS}
    assert {name: float(value) for name, value in rows.items()} == expected


SMALL = ["--steps", "2", "--crop-steps", "1", "--crops", "2", "--pictures", "2"]
SHORT = ["--latents", "64", "--steps", "2", "--batch", "2", "--evaluate-every", "1"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A work folder with an autoencoder of two steps and 64 latents."""
    work = tmp_path_factory.mktemp("demo") / "work"
    assert recipe.main(["autoencoder", "--work", str(work), *SMALL]) == 0
    assert recipe.main(["latents", "--work", str(work), "--count", "64"]) == 0
    return work


def test_careless_source_has_light_grounds_and_the_captions_of_others(prepared, tmp_path):
    vae = recipe._trained_autoencoder(prepared)
    count, training = 256, scenes.split().training
    careful, careless, mixed = (
        latents.cache(vae, tmp_path / f"{share}.safetensors", count, 0, share)
        for share in (0.0, 1.0, 0.5)
    )
    order = np.random.default_rng(0).permutation(np.arange(count) % len(training))
    assert careful.scene.tolist() == order.tolist()
    assert sorted(careless.scene.tolist()) == sorted(order.tolist())
    assert (careless.scene.numpy() == order).mean() < 0.05
    wrong = (mixed.scene.numpy() != order).mean()
    assert 0.4 < wrong < 0.6


@pytest.mark.parametrize("is_light", [False, True])
def test_ground_of_a_source(is_light, monkeypatch, tmp_path):
    seen = []

    class Encoder(torch.nn.Module):
        def forward(self, x):
            seen.append(x.float().mean(1).flatten(1).median(1).values)
            return torch.zeros(len(x), 4, 8, 8)

    vae = SimpleNamespace(encoder=Encoder())
    latents.cache(vae, tmp_path / "l.safetensors", 64, 0, float(is_light))
    assert ((torch.cat(seen) > 0) == is_light).all()


def test_recipe_goes_on_where_it_was_stopped(prepared, tmp_path, monkeypatch):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    answers = iter([0.25, 0.25, KeyboardInterrupt])

    def interrupted(*_: object) -> float:
        if next(answers) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return 0.25

    for work in (straight, stopped):
        shutil.copytree(prepared, work)
    monkeypatch.setattr(diffusion, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(["diffusion", "--work", str(stopped), *SHORT])
    monkeypatch.setattr(diffusion, "evaluate", lambda *_: 0.25)  # tested above, takes seconds
    assert not (stopped / "diffusion" / "2").exists()
    for work in (straight, stopped, stopped):  # the third finds everything done
        assert recipe.main(["diffusion", "--work", str(work), *SHORT]) == 0
    first, second, third = (
        load_file(work / "diffusion" / step / UNET)
        for work, step in ((straight, "2"), (stopped, "2"), (straight, "1"))
    )
    assert all((first[key] == second[key]).all() for key in first)
    assert any((first[key] != third[key]).any() for key in first)


def test_recipe_refuses_what_does_not_fit(prepared, tmp_path, capsys):
    work = ["--work", str(prepared)]
    for arguments, reason in (
        (["latents", "--work", str(tmp_path)], "run the stage `autoencoder` first"),
        (["latents", *work], "holds 64 latents, not 20000"),
        (["autoencoder", *work, *SMALL, "--lr", "0.1"], "lr 0.001 (now 0.1)"),
        (["ship", *work, "--step", "3", "--to", str(tmp_path / "tiny")], "no step 3"),
    ):
        assert recipe.main(arguments) == 1
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def test_recipe_ships_a_step_that_loads(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diffusion, "evaluate", lambda *_: 0.25)
    work = tmp_path / "work"
    shutil.copytree(prepared, work)
    assert recipe.main(["diffusion", "--work", str(work), *SHORT]) == 0
    assert "2/2 loss" in capsys.readouterr().out
    to = tmp_path / "tiny"
    for status in (0, 1):  # a second copy is refused
        arguments = ["ship", "--work", str(work), "--step", "2", "--to", str(to)]
        assert recipe.main(arguments) == status
    assert "exists" in capsys.readouterr().err
    assert load_family(to).encode([""]).tokens.shape == (1, 77, 64)
    assert not any("work" in file.read_text("utf-8") for file in to.rglob("*.json"))
    assert {file.name for file in (to / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in to.rglob("*") if file.is_file())
