"""The shipped presets: the paper's settings, their twins, what is said where a part is absent."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import panel_node_fixture
import pytest
import torch
from comfyui_pcpo.registry import REWARDS
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config import train_config as c
from comfyui_pcpo.trainers.families.registry import spec_of_source
from comfyui_pcpo.trainers.job.preflight import preflight
from comfyui_pcpo.trainers.job.prompts import BUILT_IN, EXTERNAL
from safetensors.torch import save_file

# Table 7 of the paper (arXiv 2509.25774), typed from METHOD M8: setting -> column
TABLE = {
    # model, prompts, reward, prompts an iteration, images a prompt, lr, LoRA, saved every
    1: ("sd15", "animals", "aesthetic", 256, 1, 1e-4, (4, 4), 1),
    2: ("sd15", "animals", "aesthetic", 512, 1, 1e-4, (4, 4), 1),
    3: ("sd15", "animals_activities", "vlm_bert_score", 288, 1, 1e-4, (4, 4), 1),
    4: ("sd15", "animals_activities", "vlm_bert_score", 576, 1, 1e-4, (4, 4), 1),
    5: ("sd14", "hpdv2", "hps_v2_1", 32, 16, 1e-5, None, 50),
    6: ("flux1-dev", "hpdv2", "hps_v2_1", 32, 12, 3e-4, (128, 256), 60),
    7: ("sd15", "pickapic", "pick_score", 32, 16, 1e-5, None, 50),
    8: ("sd35-medium", "ocr", "ocr", 8, 8, 3e-4, (32, 64), 20),
    9: ("sd35-medium", "pickapic", "pick_score", 32, 16, 3e-4, (32, 64), 20),
    10: ("flux1-dev", "hpdv2", "hps_v2_1", 32, 12, 1e-5, None, 60),
}
DDPO, DANCE, DANCE_FLUX, FLOW_GRPO = (1, 2, 3, 4), (5, 7), (6, 10), (8, 9)
UPDATES = {6: 4, 10: 4}
KL = {8: 0.04, 9: 0.01}
FAST = ("sd35-16gb", "flux-24gb", "zimage-16gb", "klein-16gb")
BASELINE = {"credit": "native", "ratio": "density", "objective": "ppo_clip"}
PCPO = {"credit": "proportionate", "ratio": "epsilon_matching", "objective": "log_hinge"}


def test_every_preset_of_the_paper_has_a_former_name():
    former = {f"setting{n}{end}" for n in TABLE for end in ("", "-baseline")}
    assert set(c.FORMER_NAMES) == former
    artists = {"demo", "demo-flow", "sd15-8gb", "sd35-16gb", "flux-24gb", "sdxl-12gb", "sdxl-24gb"}
    artists |= {"sdxl-illustrious", "sdxl-illustrious-v", "zimage-16gb", "klein-16gb"}
    artists |= {"demo-taste", "sd15-taste"}
    artists |= {f"{base}-fast" for base in ("demo-flow", *FAST)}
    assert {*c.FORMER_NAMES.values(), *artists} == set(c.presets())
    assert len(c.presets()) == 2 * len(TABLE) + len(artists)


@pytest.mark.parametrize("former", c.FORMER_NAMES)
def test_a_former_name_reads_the_same_preset(former, tmp_path):
    """The other tests of this page read the paper's values by these names."""
    name = c.FORMER_NAMES[former]
    config = c.read_preset(former)
    assert config == c.read_preset(name)
    model, reward, *_ = name.split("-")
    assert config.model.source.startswith(model) and reward[:3] in str(config.rewards)
    assert ("full" in name) == (config.trainable.kind == "full")
    if "batch" in name:
        assert f"batch{config.images}" in name
    file = tmp_path / "mine.toml"
    file.write_text(f'extends = "{former}"\n')
    assert c.read_config(file) == config


def test_the_command_line_takes_a_former_name(capsys):
    assert main(["train", "--preset", "setting8"]) == 2  # for want of its model
    assert "preset 'setting8' needs Stable Diffusion 3.5 Medium" in capsys.readouterr().err


def test_a_saved_workflow_may_have_a_former_name(tmp_path):
    def graph(preset: str) -> dict[str, Any]:
        ours = {"type": "PCPOTrainingSettings"}
        inner = {**ours, "widgets_values": {"preset": preset, "preset.run_seed": 4}}
        return {
            "nodes": [
                {**ours, "widgets_values": [preset, 3], "widgets_values_named": {"preset": preset}},
                {"type": "Note", "widgets_values": ["setting1"]},
                ours,
            ],
            "definitions": {"subgraphs": [{"nodes": [inner]}]},
        }

    body = """
        const { renamePresets } = await import("./former_names.js");
        a.graphs.forEach((graph) => renamePresets(graph, a.names));
        return a.graphs;"""
    given = {"names": c.FORMER_NAMES, "graphs": [graph("setting1"), graph("demo"), {}]}
    found = panel_node_fixture.run(tmp_path, body, given)
    assert found == [graph("sd15-aesthetic"), graph("demo"), {}]


@pytest.mark.parametrize("base", ["demo-flow", *FAST])
def test_a_fast_preset_is_its_base_but_for_what_is_measured(base):
    """What docs/speed.md calls all together: `changes_of` in tests/benchmarks/to_reward.py."""
    own, fast = c.read_preset(base), c.read_preset(f"{base}-fast")
    method = {"update": "one_pass", "selection": "sliding_window", "window": 3, "fraction": 0.6}
    method |= {"window_every": 1}
    sampler = {"branches": own.prompts.images_per_prompt}
    values = own.model_dump(mode="json")
    assert fast == c.validate(c.merge(values, {"method": method, "sampler": sampler}), "a test")


def test_numbers_of_before_are_shown_as_words(tmp_path):
    number, off = {"word": "auto", "unset": -1}, {"word": "off", "unset": 0}
    preset = {"options": [{"key": "demo", "inputs": {"optional": {"guard": ["X", off]}}}]}
    required = {"noise": ["STRING,FLOAT,INT", number], "seed": ["INT", {"min": 0}]}
    given = {
        "input": {"required": required | {"preset": ["C", preset]}},
        "widgets": [
            {"name": "noise", "value": value} for value in (-1, -0.5, 0, 0.7, "0.7", "auto")
        ]
        + [{"name": "preset.guard", "value": value} for value in (0, 2)]
        + [{"name": "seed", "value": 0}],
    }
    body = """
        const { numbersToWords, wordsOf } = await import("./former_names.js");
        numbersToWords(a.widgets, wordsOf(a.input));
        return a.widgets.map(({ value }) => value);"""
    found = panel_node_fixture.run(tmp_path, body, given)
    assert found == ["auto", "auto", "0", "0.7", "0.7", "auto", "off", "2", 0]


@pytest.mark.parametrize("end", ["", "-baseline"])
@pytest.mark.parametrize("number", TABLE)
def test_settings_have_the_papers_values(number, end):
    config = c.read_preset(f"setting{number}{end}")
    model, prompts, reward, slots, images, lr, lora, saved = TABLE[number]
    assert config.model.source == model
    assert config.prompts.source == prompts
    assert {part.name: part.weight for part in config.reward_parts.values()} == {reward: 1.0}
    options = {7: {"normalise": "cosine"}, 9: {"normalise": "/26"}}.get(number, {})
    assert config.reward_parts[reward].options == options
    assert (config.prompts.per_iteration, config.prompts.images_per_prompt) == (slots, images)
    assert config.optimizer.lr == lr
    assert config.optimizer.updates == UPDATES.get(number, 2)
    assert config.optimizer.max_grad_norm == 1.0
    assert config.run.save_every == saved
    assert (config.method.clip_low, config.method.clip_high) == (1e-4, 1e-4)
    assert config.method.kl_weight == KL.get(number, 0)
    t = config.trainable
    assert t.kind == ("lora" if lora else "full")
    assert lora is None or (t.rank, t.alpha, t.targets) == (*lora, ())
    o = config.optimizer
    assert (o.weight_decay, o.beta1, o.beta2, o.eps, o.warmup) == (1e-4, 0.9, 0.999, 1e-8, 0)


@pytest.mark.parametrize("number", DDPO + DANCE)
def test_the_sampler_of_stable_diffusion_1(number):
    """METHOD M8: 50 steps of DDIM at eta 1, guidance 5."""
    config = c.read_preset(f"setting{number}-baseline")
    s = config.sampler
    assert (s.transition, s.steps, s.noise_level, s.guidance_scale) == ("ddim", 50, 1.0, 5.0)
    assert (s.spacing, s.guidance_gradient, s.decode) == ("leading", "both", "final")
    assert (config.method.selection, config.trainable.init) == ("all", "gaussian")
    method = c.read_preset(f"setting{number}").method  # METHOD M3: the authors' own constants
    assert (method.solve_weight, method.target_weight) == (4.5, None)
    assert method.mean_over == ("grid" if number in DANCE else "trained")


@pytest.mark.parametrize(("number", "steps"), [(6, 12), (10, 16)])
def test_dancegrpos_constants_on_flux(number, steps):
    """BASELINES B3: shift 3 at any size, 720 px, sample deviation, 60 % of the steps, no EMA."""
    config = c.read_preset(f"setting{number}-baseline")
    s, m, a = config.sampler, config.method, config.advantage
    assert (s.transition, s.noise_level, s.steps) == ("dance_sde", 0.3, steps)
    assert (s.grid, s.shift, s.whole_timesteps, s.drop_last) == ("uniform", 3.0, True, 1)
    assert (s.guidance_scale, config.model.guidance) == (1.0, 3.5)
    assert (s.initial_noise, s.decode) == ("prompt", "clean")
    assert (m.selection, m.fraction) == ("random_fraction", 0.6)
    assert (a.kind, a.ddof, a.offset, a.limit, a.global_std) == ("group", 1, 1e-8, 5.0, False)
    assert (config.model.width, config.model.height) == (720, 720)
    assert (config.model.precision, config.model.t5_length) == ("bfloat16", None)  # FLUX's 512
    assert (config.trainable.init, config.trainable.ema_decay) == ("default", 0)
    assert config.run.iterations == 300


@pytest.mark.parametrize("number", FLOW_GRPO)
def test_flow_grpos_constants(number):
    """BASELINES B4: CFG 4.5 with one gradient, its own KL, one deviation for all, EMA."""
    config = c.read_preset(f"setting{number}-baseline")
    s, m, a, t = config.sampler, config.method, config.advantage, config.trainable
    assert (s.transition, s.noise_level, s.steps, s.drop_last) == ("flow_sde", 0.7, 10, 1)
    assert (s.grid, s.shift, s.whole_timesteps) == ("flow_match_euler", 3.0, False)
    assert (s.guidance_scale, s.guidance_gradient, s.negative_prompt) == (4.5, "conditional", "")
    assert (s.initial_noise, s.decode, m.selection) == ("image", "final", "all")
    assert m.kl == "without_interval"
    assert (a.kind, a.ddof, a.offset, a.limit, a.global_std) == ("group", 0, 1e-4, 5.0, True)
    assert (t.init, t.ema_decay, t.ema_every, t.ema_ramp) == ("gaussian", 0.9, 8, True)
    assert (config.model.width, config.model.height, config.model.t5_length) == (512, 512, 128)
    assert (config.model.precision, config.run.eval_steps) == ("float16", 40)


@pytest.mark.parametrize("number", DDPO)
def test_ddpos_constants(number):
    """BASELINES B1: per-prompt statistics over 32 rewards, prompts drawn at random, fp16."""
    config = c.read_preset(f"setting{number}-baseline")
    a = config.advantage
    assert (a.kind, a.buffer_size, a.min_count, a.offset) == ("per_prompt", 32, 16, 1e-6)
    assert (a.limit, a.ddof) == (5.0, 0)
    assert (config.sampler.drop_last, config.sampler.initial_noise) == (0, "image")
    assert (config.prompts.order, config.model.precision) == ("random", "float16")
    assert config.run.iterations == 200


@pytest.mark.parametrize("number", DANCE)
def test_dancegrpos_constants(number):
    """BASELINES B2: groups of 16, 49 of 50 steps, one initial noise, sample deviation, bf16."""
    config = c.read_preset(f"setting{number}-baseline")
    a = config.advantage
    assert (a.kind, a.ddof, a.offset, a.limit, a.global_std) == ("group", 1, 1e-8, 5.0, False)
    assert (config.sampler.drop_last, config.sampler.initial_noise) == (1, "batch")
    assert (config.model.precision, config.trainable.ema_decay) == ("bfloat16", 0)
    assert config.run.iterations == 300


@pytest.mark.parametrize("number", TABLE)
def test_twins_differ_in_credit_ratio_and_objective_alone(number):
    ours = c.read_preset(f"setting{number}").model_dump()
    theirs = c.read_preset(f"setting{number}-baseline").model_dump()
    assert PCPO.items() <= ours["method"].items()
    assert theirs == {**ours, "method": {**ours["method"], **BASELINE}}


@pytest.mark.parametrize(("name", "plain"), [("demo-taste", "demo"), ("sd15-taste", "sd15-8gb")])
def test_a_taste_has_an_anchor_and_asks(name, plain):
    ours, theirs = c.read_preset(name), c.read_preset(plain)
    (part,) = ours.reward_parts.values()
    assert (part.name, part.options) == ("taste", {"folder": "my-taste"})
    assert ours.method.kl_weight > 0 and ours.taste.ask_every > 0
    changed = {"rewards", "method", "taste"}
    assert ours.model_dump(exclude=changed) == theirs.model_dump(exclude=changed)


def test_the_artists_preset_runs_as_shipped_and_fits_ten_minutes():
    config = c.read_preset("sd15-8gb")
    assert set(config.rewards) <= set(REWARDS)
    assert config.prompts.source in BUILT_IN
    assert (config.trainable.kind, config.model.precision) == ("lora", "bfloat16")
    assert config.model.gradient_checkpointing and config.run.micro_batch <= 2
    # 1.6 TFLOP both branches; one to sample, four to update; 25 TFLOP/s
    assert config.images * config.sampler.steps * 5 * 1.6 / 25 < 600


@pytest.fixture(scope="module")
def flow_files(tmp_path_factory):
    """By setting, a flow model's file as far as its header is read."""
    net, clip = "model.diffusion_model.", "text_encoders.clip_l.transformer.text_model.embeddings"
    both = {"vae.decoder.conv_in.weight": (8, 16, 3, 3), f"{clip}.token_embedding.weight": (9, 8)}
    flux = {
        "double_blocks.0.img_attn.proj.weight": (128, 128),
        "img_in.weight": (128, 64),
        "txt_in.weight": (128, 8),
        "vector_in.in_layer.weight": (128, 64),
        "guidance_in.in_layer.weight": (128, 256),
    }
    sd3 = {
        "joint_blocks.0.context_block.attn.qkv.weight": (96, 32),
        "x_embedder.proj.weight": (32, 16, 2, 2),
    }
    folder, found = tmp_path_factory.mktemp("flow"), {}
    for name, shapes, numbers in (("flux", flux, DANCE_FLUX), ("sd3", sd3, FLOW_GRPO)):
        named = both | {net + key: shape for key, shape in shapes.items()}
        path = folder / f"{name}.safetensors"
        save_file({key: torch.zeros(shape) for key, shape in named.items()}, path)
        found |= dict.fromkeys(numbers, path)
    return found


def started(name: str, model: Path | None = None, **changes: str) -> str:
    """What is said when a preset is started, after changes like the command line's."""
    values = c.read_preset(name).model_dump()
    if model is not None:
        values["model"]["source"] = str(model)
    if "reward" in changes:
        values["rewards"] = {changes["reward"]: 1.0}
    with pytest.raises((c.ConfigError, ValueError)) as error:
        preflight(c.TrainConfig.model_validate(values), f"preset {name!r}")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("number", TABLE)
def test_the_rewards_of_the_settings_are_here(number):
    assert TABLE[number][2] in REWARDS


@pytest.mark.parametrize("number", TABLE)
def test_a_checkpoint_to_be_named_is_described(number):
    name = TABLE[number][0]
    said = started(f"setting{number}", reward="jpeg_compressibility")
    spec = spec_of_source(name)
    assert spec is not None
    wanted = spec.checkpoints[name]
    for word in (wanted.title, wanted.page, wanted.licence, "--model.source"):
        assert word in said


@pytest.mark.parametrize("number", DANCE + DANCE_FLUX + FLOW_GRPO)
def test_prompts_that_are_not_shipped_are_described(number, flow_files):
    prompts = TABLE[number][1]
    model = flow_files.get(number, c.DEMO_FOLDER)
    said = started(f"setting{number}", model, reward="jpeg_compressibility")
    for word in (*EXTERNAL[prompts], prompts, "--prompts.source"):
        assert word in said


def test_a_preset_with_all_its_parts_is_started():
    values = c.read_preset("sd15-8gb").model_dump()
    values["model"]["source"] = "demo"
    preflight(c.TrainConfig.model_validate(values))
    preflight(c.read_preset("demo"))


def test_an_absent_lora_and_model_are_refused(tmp_path):
    values = c.read_preset("demo").model_dump()
    values["trainable"]["init_lora"] = str(tmp_path / "none.safetensors")
    with pytest.raises(c.ConfigError, match=r"init_lora is .*none\.safetensors.*check the path"):
        preflight(c.TrainConfig.model_validate(values))
    assert "there is no model at" in started("demo", tmp_path / "none")


def test_presets_are_read_and_judged_without_torch():
    code = (
        "import sys\n"
        "from comfyui_pcpo.trainers.config.train_config import presets, read_preset\n"
        "from comfyui_pcpo.trainers.errors import ConfigError\n"
        "from comfyui_pcpo.trainers.job.preflight import preflight\n"
        "for name in presets():\n"
        "    try:\n"
        "        preflight(read_preset(name), name)\n"
        "        print(name)\n"
        "    except ConfigError:\n"
        "        pass\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "demo",
        "demo-flow",
        "demo-flow-fast",
        "demo-taste",
    ]  # all others need a checkpoint


# --- extends ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of presets of its own."""
    made = tmp_path / "presets"
    made.mkdir()
    shutil.copy(c.PRESETS / "demo.toml", made)
    monkeypatch.setattr(c, "PRESETS", made)
    return made


def test_extends_changes_fields_and_replaces_rewards(folder):
    (folder / "child.toml").write_text(
        'extends = "demo"\nrewards = { jpeg_compressibility = 2.0 }\n[sampler]\nsteps = 7\n'
    )
    child, demo = c.read_preset("child"), c.read_preset("demo")
    assert child.rewards == {"jpeg_compressibility": 2.0}
    assert child.sampler == demo.sampler.model_copy(update={"steps": 7})
    assert child.sampler.initial_noise == "prompt"  # the parent's, not the default
    rest = {"rewards", "sampler"}
    assert child.model_dump(exclude=rest) == demo.model_dump(exclude=rest)


def test_a_users_file_extends_a_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('extends = "sd15-bertscore-batch576-ddpo"\n[run]\nseed = 7\n')
    config, base = c.read_config(file), c.read_preset("sd15-bertscore-batch576-ddpo")
    assert config.run == base.run.model_copy(update={"seed": 7})
    assert config.model_dump(exclude={"run"}) == base.model_dump(exclude={"run"})


def test_extends_refuses_loops_and_unknown_names(folder):
    (folder / "a.toml").write_text('extends = "b"\n')
    (folder / "b.toml").write_text('extends = "a"\n')
    (folder / "self.toml").write_text('extends = "self"\n')
    (folder / "lost.toml").write_text('extends = "nowhere"\n')
    (folder / "odd.toml").write_text("extends = 3\n")
    for name, said in {
        "a": r"b\.toml: extends is 'a', which leads back here; end the loop",
        "self": r"self\.toml: extends is 'self', which leads back here; end the loop",
        "lost": r"lost\.toml: extends is 'nowhere', no preset; choose one of a, b, demo",
        "odd": r"odd\.toml: extends is 3, no preset",
    }.items():
        with pytest.raises(c.ConfigError, match=said):
            c.read_preset(name)
