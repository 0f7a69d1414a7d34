"""What has no effect in a run is said, and nothing else."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.effects import doubts, small_images, without_effect
from comfyui_pcpo.trainers.config.train_config import TrainConfig, presets, read_preset, validate
from comfyui_pcpo.trainers.job.folder import JobFolder
from safetensors.torch import load_file

FULL = {"kind": "full"}
EMPTY: dict = {}


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", presets())
def test_presets_have_nothing_that_has_no_effect(name):
    config = read_preset(name)
    family = "sd1" if config.sampler.transition == "ddim" else "flux" if "flux" in name else None
    found = without_effect(config, family)
    if name.startswith("flux-hpsv21-full"):  # without the LoRA whose fields it inherits
        found = [sentence for sentence in found if not sentence.startswith("trainable.")]
    assert found == []
    assert without_effect(TrainConfig()) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sampler": {"negative_prompt": "x"}}, "sampler.negative_prompt is 'x' and has no effect"),
        ({"sampler": {"guidance_gradient": "conditional"}}, "guidance_scale is 1"),
        ({"sampler": {"guidance_scale": 0}}, "the prompts have no effect"),
        ({"sampler": {"shift": 3.0}}, "sampler.shift is 3.0 and has no effect: the model is SD1.x"),
        ({"sampler": {"transition": "cps", "spacing": "model"}}, "sampler.spacing is 'model'"),
        (
            {"sampler": {"initial_noise": "prompt"}, "prompts": {"images_per_prompt": 1}},
            "sampler.initial_noise is 'prompt'",
        ),
        ({"model": {"t5_length": 128}}, "SD1.x has no T5"),
        ({"model": {"guidance": 2}}, "it is for FLUX"),
        ({"model": {"size_condition": (64, 64, 0, 0, 64, 64)}}, "has no effect: it is for SDXL"),
        ({"model": {"offload": "always"}, "run": {"device": "cpu"}}, "model.offload is 'always'"),
        ({"trainable": FULL | {"rank": 8}}, "trainable.rank is 8 and has no effect"),
        ({"trainable": FULL | {"targets": ["to_q"]}}, "trainable.targets is"),
        ({"trainable": {"shard": False}}, "trainable.kind is 'lora'"),
        ({"method": {"fraction": 0.5}}, "method.selection is 'all'"),
        ({"method": {"window": 2}}, "method.window is 2 and has no effect"),
        ({"method": {"kl": "without_interval"}}, "method.kl_weight is 0"),
        ({"method": {"kl_fraction": 0.5}}, "method.kl_weight is 0"),
        ({"method": {"window_move": "fixed"}}, "method.selection is 'all'"),
        (
            {"method": {"selection": "sliding_window", "window_start": 2}},
            "method.window_move is 'sliding'",
        ),
        (
            {"method": {"update": "one_pass", "clip_high": 1e-3}, "advantage": {"kind": "group"}},
            "nothing is ever clipped",
        ),
        (
            {
                "method": {"selection": "sliding_window", "window_stride": 2},
                "run": {"iterations": 25},
            },
            "method.window_stride is 2 and has no effect: method.window_every is 25",
        ),
        ({"advantage": {"global_std": True}}, "advantage.kind is 'per_prompt'"),
        ({"advantage": {"ddof": 1}}, "advantage.ddof is 1"),
        ({"advantage": {"kind": "batch", "buffer_size": 64}}, "advantage.buffer_size is 64"),
        ({"advantage": {"combine": "advantages"}}, "there is one reward"),
        ({"run": {"eval_prompts": 0, "eval_steps": 5}}, "run.eval_prompts is 0"),
        ({"guard": {"max_drift": 0.1}}, "guard.max_drift is 0.1 and has no effect: guard.every"),
        (
            {"guard": {"every": 5, "patience": 3}, "run": {"iterations": 10}},
            "guard.patience is 3, more than the guard's 2 looks",
        ),
        (
            {"optimizer": {"warmup": 500, "lr": 1e-3}},
            "more than the run's 200 updates: the learning rate never comes to optimizer.lr, but "
            "to 0.0004",
        ),
        (
            {"trainable": {"ema_decay": 0.9, "ema_every": 500}},
            "trainable.ema_every is 500 and has no effect: the run has 200 updates",
        ),
        ({"trainable": {"ema_decay": 0.9999}}, "are still 98.0% the untrained weights"),
    ],
)
def test_what_has_no_effect_is_said(values, said):
    family = "sd3" if "cps" in str(values) else "sd1"
    found = without_effect(validate(values, "test"), family)
    assert any(said in sentence for sentence in found), found


@pytest.mark.parametrize(
    ("family", "model", "own", "said"),
    [
        ("sdxl", {"width": 512, "height": 768}, None, "512 x 768 px; SDXL draws badly below 768 x"),
        ("sdxl", {"width": 512, "height": 512}, (1024, 1024), "below 768 x 768"),
        ("sdxl", {"width": 512}, (1024, 1024), "512 x 1024 px"),
        ("sdxl", {"width": 640, "height": 1024}, None, None),
        ("sdxl", {"width": 512}, None, None),  # the height is the model's own
        ("sdxl", {}, (1024, 1024), None),
        ("sdxl", {"width": 64, "height": 64}, (128, 128), None),  # a tiny model
        ("sdxl", {"width": 64, "height": 64, "source": "demo"}, None, None),
        ("sd1", {"width": 256, "height": 256}, None, "SD1.x draws badly below 384 x 384"),
        ("flux", {"width": 512, "height": 512}, None, None),
        ("zimage", {"width": 256, "height": 256}, None, "Z-Image draws badly below 512 x 512"),
        ("klein", {"width": 384, "height": 512}, (1024, 1024), "FLUX.2 [klein] draws badly below"),
        ("klein", {"width": 512, "height": 512}, (1024, 1024), None),
        (None, {"width": 64, "height": 64}, None, None),
    ],
)
def test_images_smaller_than_a_model_draws_well_are_said(family, model, own, said):
    config = validate({"model": {"source": "a.safetensors"} | model}, "test")
    found = small_images(config, family, own)
    assert found == [] if said is None else said in found[0]


def test_an_optimizer_that_was_reported_to_fail_is_said():
    values = {"model": {"source": "a.safetensors"}, "optimizer": {"kind": "adamw8bit"}}
    (said,) = doubts(validate(values, "test"), "zimage")
    assert said.startswith("optimizer.kind is 'adamw8bit', which was reported to fail on Z-Image;")
    assert not doubts(validate(values, "test"), "klein")
    assert not doubts(validate({"model": values["model"]}, "test"), "zimage")


def test_without_an_average_the_trained_weights_are_exported(tmp_path, capsys):
    """Exactly 0 was exported; the averages begin at the eighth update."""
    small = [
        *("--run.iterations", "2", "--prompts.per-iteration", "2", "--run.eval-prompts", "1"),
        *("--sampler.steps", "2", "--run.eval-steps", "2", "--run.save-every", "1"),
        *("--prompts.images-per-prompt", "2", "--run.micro-batch", "4"),
    ]
    for name, options in (("plain", []), ("ema", ["--trainable.ema-decay", "0.9"])):
        options += ["--trainable.ema-every", "8"] if name == "ema" else []
        root = str(tmp_path / name)
        assert main(["train", "--preset", "demo", "--out", root, *small, *options]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
    assert "trainable.ema_every is 8 and has no effect" in capsys.readouterr().out
    plain, ema = (JobFolder(tmp_path / name) for name in ("plain", "ema"))
    exports = [load_file(folder.last_export()) for folder in (plain, ema)]
    assert all(torch.equal(exports[0][key], exports[1][key]) for key in exports[0])
    assert any(tensor.any() for key, tensor in exports[1].items() if "lora_up" in key)
    assert [line["held_out"] for line in plain.metrics()] == [
        line["held_out"] for line in ema.metrics()
    ]


def test_sample_says_what_has_no_effect(tmp_path, capsys):
    asked = ["--negative-prompt", "blurry", "--spacing", "leading"]
    quick = ["--limit", "1", "--steps", "1", "--out", str(tmp_path / "out"), "--model", "demo-flow"]
    assert main(["sample", *quick, *asked]) == 0
    said = capsys.readouterr().out
    assert "--negative-prompt has no effect: --guidance-scale is 1" in said
    assert "--spacing has no effect: the model is a flow model" in said
    assert main(["sample", *quick, "--guidance-scale", "2", *asked[:2]]) == 0
    assert "no effect" not in capsys.readouterr().out
