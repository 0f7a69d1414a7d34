"""Training through the command line, on the demo model and on random ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.pcpo import Ddim, ddim_grid, noise_streams, plan_diffusion, rollout
from comfyui_pcpo.pcpo.credit import Proportionate
from comfyui_pcpo.trainers.bench.iteration import one_iteration
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import (
    DEMO_FOLDER,
    ConfigError,
    TrainConfig,
    read_preset,
)
from comfyui_pcpo.trainers.distributed.sharding import swap_values
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.report.progress import Progress
from comfyui_pcpo.trainers.run import loop
from comfyui_pcpo.trainers.run.checkpoint import Position
from comfyui_pcpo.trainers.run.iteration import requests_of
from comfyui_pcpo.trainers.run.rewards import RewardError
from comfyui_pcpo.trainers.run.setup import prepare
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from sd1_fixture import write_folder
from torch.utils._python_dispatch import TorchDispatchMode

DEMO = ("demo", "--model", "tiny-sd")
SMALL = [
    *("--run.iterations", "1", "--run.eval-prompts", "2", "--run.eval-steps", "2"),
    *("--sampler.steps", "4", "--prompts.per-iteration", "2", "--run.micro-batch", "8"),
]


def lora_of(root: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((root / "lora").glob("*.safetensors"))[-1])


def demo(root: Path, *options: str) -> dict[str, torch.Tensor]:
    assert main([*DEMO, "--out", str(root), *SMALL, *options]) == 0, options
    return lora_of(root)


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    """accelerate keeps one precision a process; every run is a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sd1"), vae="tiny")


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat\n\na dog\n  a bird  \n", encoding="utf-8")
    return file


def test_demo_writes_a_run_and_is_exact_on_policy(tmp_path, capsys):
    demo(tmp_path / "run", "--run.iterations", "2", "--run.save-every", "1")
    folder = JobFolder(tmp_path / "run")
    lines = folder.metrics()
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert line["log_ratio_max_on_policy"] == 0  # bitwise, at equal batch shape on a CPU
        assert line["clip_fraction_on_policy"] == 0
        assert line["grad_norm"] > 0
    assert folder.read("status.json")["state"] == "done"
    assert TrainConfig.model_validate(folder.read("job.json")["config"]).sampler.steps == 4
    for name in ("report/curves.png", "report/before_after.png", "samples/00002/scores.json"):
        assert (folder.root / name).is_file()
    assert len(list(folder.lora.iterdir())) == 2
    said = capsys.readouterr().out
    assert "ETA" in said and "reward" in said and "images/s" in said and "clipped" in said


def test_the_first_demo_is_the_flow_model_in_one_pass(tmp_path):
    root = tmp_path / "run"
    assert main(["demo", "--out", str(root), *SMALL, "--prompts.images-per-prompt", "2"]) == 0
    config = TrainConfig.model_validate(JobFolder(root).read("job.json")["config"])
    assert (config.model.source, config.method.update) == ("demo-flow", "one_pass")
    assert all(name.startswith("transformer.") for name in lora_of(root))
    with Image.open(root / "report" / "curves.png") as curves:
        assert curves.width > 2 * curves.height  # one row: nothing is ever off policy


def test_same_seed_same_bytes(tmp_path):
    first, second = demo(tmp_path / "a"), demo(tmp_path / "b")
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = demo(tmp_path / "c", "--run.seed", "1")
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_micro_batch_changes_no_result(tmp_path):
    # eps so large that Adam is a plain gradient step, which does not amplify rounding
    step = ("--optimizer.eps", "1", "--optimizer.lr", "1", "--optimizer.weight-decay", "0")
    eight = demo(tmp_path / "8", *step)
    one = demo(tmp_path / "1", *step, "--run.micro-batch", "1")
    three = demo(tmp_path / "3", *step, "--run.micro-batch", "3")  # a tail to fill up
    ups = [key for key in eight if "lora_up" in key]
    assert max(eight[key].abs().max() for key in ups) > 1e-4  # B started at 0: it was trained
    for other in (one, three):
        for key in eight:
            torch.testing.assert_close(other[key], eight[key], atol=1e-6, rtol=0)


def test_samples_do_not_depend_on_the_batch(tmp_path):
    latents = []
    for batch in ("1", "8"):
        file = tmp_path / f"{batch}.safetensors"
        options = ["--limit", "5", "--eta", "1", "--steps", "5", "--guidance-scale", "2"]
        out = ["--out", str(tmp_path / batch), "--latents", str(file), "--batch", batch]
        assert main(["sample", *options, *out]) == 0
        latents.append(load_file(file)["latents"])
    torch.testing.assert_close(latents[0], latents[1], atol=1e-5, rtol=0)
    assert len(list((tmp_path / "8").glob("*.png"))) == 5
    assert main(["score", str(tmp_path / "8")]) == 0  # prompts.json beside the images


def test_exported_lora_in_diffusers_is_the_trained_network(tmp_path):
    config = read_preset("demo")
    fast = {"iterations": 2, "eval_prompts": 2, "save_every": 2}
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update=fast),
            "sampler": config.sampler.model_copy(update={"steps": 4}),
            "prompts": config.prompts.model_copy(update={"per_iteration": 2}),
            "optimizer": config.optimizer.model_copy(update={"lr": 1e-2}),
        }
    )
    setup = prepare(config)
    folder = JobFolder(tmp_path / "run")
    folder.start({"config": config.model_dump(mode="json")})
    result = loop.run(setup, folder, Progress.silent(), Position())
    pipe = StableDiffusionPipeline.from_pretrained(DEMO_FOLDER, torch_dtype=torch.float32)
    x, embeds = torch.randn(3, 4, 8, 8), setup.sampler.embeds[:3]
    t = torch.tensor([11, 401, 901])
    with torch.no_grad():
        base = pipe.unet(x, t, embeds.tokens).sample
        pipe.load_lora_weights(str(result.export))
        loaded = pipe.unet(x, t, embeds.tokens).sample
        trained = setup.family.predict(x, t, embeds)
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=0)
    assert (trained - base).abs().max() > 1e-3


def test_bf16_storage_after_use_is_stopped(tmp_path, capsys):
    options = ["--run.storage", "bfloat16", "--run.storage-rounding", "after"]
    assert main([*DEMO, "--out", str(tmp_path / "run"), *SMALL, *options]) == 2
    said = capsys.readouterr().err
    assert "before any training" in said and "run.storage" in said
    assert JobFolder(tmp_path / "run").read("status.json")["state"] == "failed"
    assert not list((tmp_path / "run" / "lora").glob("*"))


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_rounded_storage_before_use_is_exact(tmp_path, storage):
    demo(tmp_path / "run", "--run.storage", storage)
    assert JobFolder(tmp_path / "run").metrics()[0]["log_ratio_max_on_policy"] == 0


NATIVE = ("--method.credit", "native")
VARIANTS = {
    "ddpo": (*NATIVE, "--method.ratio", "density", "--method.objective", "ppo_clip"),
    "matching": (*NATIVE, "--method.objective", "hinge"),
    "objective_only": ("--method.credit", "objective_only", "--sampler.noise-level", "0.5"),
    "kl": ("--method.kl-weight", "0.1"),
    "full": ("--trainable.kind", "full", "--model.precision", "bfloat16"),
    "bfloat16": ("--model.precision", "bfloat16"),
    "guided": ("--sampler.guidance-scale", "3"),
    "conditional": (
        *("--sampler.guidance-scale", "3"),
        *("--sampler.guidance-gradient", "conditional"),
    ),
    "fraction": ("--method.selection", "random_fraction"),
    "window": ("--method.selection", "sliding_window", "--method.window", "2"),
    "drop_last": ("--sampler.drop-last", "1", "--sampler.initial-noise", "batch"),
    "shared_prompt_noise": ("--sampler.initial-noise", "prompt", "--sampler.decode", "clean"),
    "batch": ("--advantage.kind", "batch"),
    "group": ("--advantage.kind", "group", "--advantage.ddof", "1"),
    "ema": ("--trainable.ema-decay", "0.9"),
    "ema_ramp": (
        *("--trainable.ema-decay", "0.9", "--trainable.ema-every", "2"),
        "--trainable.ema-ramp",
    ),
    "checkpointing": ("--model.gradient-checkpointing",),
    "random_prompts": ("--prompts.order", "random"),
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_axis_trains(tmp_path, random_model, prompt_file, options):
    config = tmp_path / "config.toml"
    config.write_text(
        "rewards = { jpeg_incompressibility = 1.0, jpeg_compressibility = 0.5 }\n"
        f"[model]\nsource = '{random_model.as_posix()}'\n"
        f"[prompts]\nsource = '{prompt_file.as_posix()}'\n"
    )
    assert main(["train", str(config), "--out", str(tmp_path / "run"), *SMALL, *options]) == 0
    (line,) = JobFolder(tmp_path / "run").metrics()
    assert line["log_ratio_max_on_policy"] < 1e-5
    assert 0 < line["grad_norm"] < float("inf")
    assert line["log_ratio_max"] > 0  # the second update is off policy
    assert line["reward_jpeg_incompressibility"] == -line["reward_jpeg_compressibility"]


def test_averages_are_flow_grpos(random_model, prompt_file):
    """Every second of four updates, the decay rising as (1 + n) / (10 + n)."""
    values = {
        "rewards": {"jpeg_incompressibility": 1.0},
        "model": {"source": str(random_model)},
        "prompts": {"source": str(prompt_file), "per_iteration": 2, "images_per_prompt": 2},
        "sampler": {"steps": 2},
        "trainable": {"ema_decay": 0.25, "ema_every": 2, "ema_ramp": True},
        "optimizer": {"updates": 1, "lr": 1e-2},
    }
    setup = prepare(TrainConfig.model_validate(values))
    expected = [p.detach().double() for p in setup.learner.parameters]
    started = [p.clone() for p in expected]
    for done, decay in enumerate((None, 2 / 11, None, 0.25)):  # 4 / 13 is above the limit
        one_iteration(setup, done)
        if decay is not None:
            pairs = zip(expected, setup.learner.parameters, strict=True)
            expected = [decay * old + (1 - decay) * now.detach() for old, now in pairs]
        for average, value in zip(setup.learner.averaged.weights, expected, strict=True):
            torch.testing.assert_close(average.double(), value, rtol=1e-6, atol=1e-7)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(expected, started, strict=True))


def test_advantages_of_several_rewards_can_be_summed(tmp_path, random_model, prompt_file):
    values = {
        "rewards": {"jpeg_incompressibility": 1.0, "jpeg_compressibility": 1.0},
        "model": {"source": str(random_model)},
        "prompts": {"source": str(prompt_file), "per_iteration": 2},
        "advantage": {"combine": "advantages", "kind": "batch"},
    }
    setup = prepare(TrainConfig.model_validate(values))
    rewards = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [-1.0, -2, -3, -4, -5, -6, -7, -8]])
    requests = requests_of(setup.config, len(setup.prompts), 0)
    total = setup.advantages(rewards, [setup.prompts[request.prompt] for request in requests])
    torch.testing.assert_close(total, torch.zeros(8))  # opposite rewards cancel


def test_init_lora_continues(tmp_path):
    demo(tmp_path / "first", "--optimizer.lr", "1e-2")
    file = next((tmp_path / "first" / "lora").glob("*"))
    options = ("--trainable.init-lora", str(file), "--optimizer.lr", "1e-9")
    second = demo(tmp_path / "second", *options, "--method.kl-weight", "0.1")
    for key, value in load_file(file).items():
        torch.testing.assert_close(second[key], value, atol=1e-6, rtol=1e-5)


def test_export_to_half_precision(tmp_path):
    full = demo(tmp_path / "run")
    out = tmp_path / "half.safetensors"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    half = load_file(out)
    assert half.keys() == full.keys()
    for key, tensor in half.items():  # an alpha of 0.3 would be another scale in half precision
        assert tensor.dtype == (torch.float32 if key.endswith(".alpha") else torch.float16)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rewards", "beauty", "1"], ["beauty", "scene"]),
        (["--prompts.source", "nowhere.txt"], ["nowhere.txt", "scenes"]),
        (["--model.source", "nowhere"], ["nowhere"]),
        (["--model.precision", "float16"], ["model.precision", "bfloat16"]),
        (["--sampler.transition", "dance_sde"], ["dance_sde", "ddim"]),
        (["--method.ratio", "density"], ["method.ratio", "native"]),
    ],
)
def test_refused_before_anything_is_written(tmp_path, capsys, options, said):
    assert main([*DEMO, "--out", str(tmp_path / "run"), *SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in said), error
    assert not (tmp_path / "run").exists()


def test_prompts_that_a_reward_cannot_read_are_refused(tmp_path, prompt_file, capsys):
    options = ["--prompts.source", str(prompt_file)]
    assert main([*DEMO, "--out", str(tmp_path / "run"), *SMALL, *options]) == 2
    assert "a cat" in capsys.readouterr().err


def test_a_used_folder_is_not_overwritten(tmp_path, capsys):
    kept = demo(tmp_path / "run")
    assert main([*DEMO, "--out", str(tmp_path / "run"), *SMALL]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert all(torch.equal(kept[k], v) for k, v in lora_of(tmp_path / "run").items())


def test_a_failing_reward_stops_the_run():
    config = read_preset("demo")
    setup = prepare(
        config.model_copy(update={"run": config.run.model_copy(update={"eval_prompts": 0})})
    )
    blank = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(RewardError, match="scene"):
        setup.reward_set.score(blank, ["not of the grammar"])


class SeesSyncs(TorchDispatchMode):
    """Counts the operation behind .item(), .tolist() of one number, bool() and float()."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_inner_loops_never_read_a_number_back(tmp_path):
    from comfyui_pcpo.trainers.run.update.two_pass import Batch, Pairs, accumulate, chosen_pairs

    setup = prepare(read_preset("demo"))
    requests = requests_of(setup.config, len(setup.prompts), 0)[:16]
    with SeesSyncs() as seen:
        trajectory = setup.sampler.rollout(requests)
        batch = Batch(trajectory, setup.sampler.embeds[:16], torch.randn(16), setup.sampler.plan)
        steps = len(trajectory.step)
        chosen = chosen_pairs(
            [(i, r.key) for i, r in enumerate(requests)], steps, setup.learner.selection
        )
        # choosing pairs is planning, not the inner loop: only it may read numbers
        seen.count = 0
        pairs = Pairs.of(chosen, 16, torch.device("cpu"))
        backward = setup.processes.accelerator.backward
        accumulate(setup.objective, batch, pairs, len(chosen), 16, backward)
        assert seen.count == 0


def test_swapped_restores_after_an_error():
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(KeyError), swap_values([parameter], [torch.zeros(2)]):
        assert parameter.sum() == 0
        raise KeyError
    assert parameter.sum() == 2


def test_metrics_survive_a_cut_line(tmp_path):
    folder = JobFolder(tmp_path)
    folder.add_metrics({"iteration": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "rew')
    assert folder.metrics() == [{"iteration": 1}]
    folder.status("running", iteration=3)
    assert json.loads((tmp_path / "status.json").read_text())["iteration"] == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_prompt_order_covers_every_prompt_once_an_epoch():
    from comfyui_pcpo.trainers.config.sections import PromptConfig
    from comfyui_pcpo.trainers.job.prompts import chosen_prompts

    config = PromptConfig(per_iteration=4)
    drawn = [i for iteration in range(5) for i in chosen_prompts(config, 10, 0, iteration)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_rollout_noise_is_the_trainings(tmp_path):
    """What is sampled depends on an image's key alone, not on its neighbours."""
    plan = plan_diffusion(ddim_grid(3), Ddim(), Proportionate()).to("cpu")
    keys = [(0, 0, slot, image) for slot in range(2) for image in range(2)]

    def sampled(chosen):
        noise = noise_streams(chosen, 3, (4, 8, 8))
        return rollout(lambda x, t: 0.1 * x, plan, noise).final

    torch.testing.assert_close(sampled(keys)[2:], sampled(keys[2:]))


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)
