"""The training nodes without ComfyUI: faces, settings, refusals, estimates, picks and files.

What needs a loaded model is in test_nodes_handover.py and comfyui/test_comfyui_training.py.
"""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import comfy_api_fixture
import numpy as np
import pytest
import torch
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.jobs.registry import JobRegistry
from comfyui_pcpo.nodes.names import with_current_names
from comfyui_pcpo.nodes.rewards import sum as rewards_sum
from comfyui_pcpo.nodes.rewards.make import NamedReward, named_reward
from comfyui_pcpo.nodes.training import estimate as training_estimate
from comfyui_pcpo.nodes.training import export as training_export
from comfyui_pcpo.nodes.training import host as training_host
from comfyui_pcpo.nodes.training import jobs as training_jobs
from comfyui_pcpo.nodes.training import nodes as training
from comfyui_pcpo.nodes.training import pick as training_pick
from comfyui_pcpo.nodes.training import pictures
from comfyui_pcpo.nodes.training import prompts as training_prompts
from comfyui_pcpo.nodes.training import rewards as training_rewards
from comfyui_pcpo.nodes.training import run as training_run
from comfyui_pcpo.nodes.training import settings as training_settings
from comfyui_pcpo.nodes.training import start as training_start
from comfyui_pcpo.pcpo.rewards import REWARDS, WeightedSum
from comfyui_pcpo.trainers.config.train_config import (
    ConfigError,
    TrainConfig,
    presets,
    read_preset,
    validate,
)
from comfyui_pcpo.trainers.estimate.network_costs import network_for
from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.job.prompts import read_prompts
from comfyui_pcpo.trainers.run.rewards import RewardSet
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SCENE = named_reward("scene", "automatic", "automatic", "")
JPEG = named_reward("jpeg_compressibility", "automatic", "automatic", "")


def refused(function, *arguments, **named):
    """What a refusal says: one sentence with a remedy."""
    with pytest.raises(NodeError) as caught:
        function(*arguments, **named)
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".") and ";" in text
    return text


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """The texts that nodes show."""
    texts = []
    monkeypatch.setattr(training_host, "show_text", lambda text, node: texts.append(text))
    return texts


# --- faces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", training.NODES)
def test_schema(node):
    schema = comfy_api_fixture.schema_of(node)
    assert schema.node_id == node.__name__
    assert schema.display_name.startswith("PCPO ")
    assert schema.category == "PCPO/training"
    assert schema.description and schema.search_aliases
    assert all(i.tooltip for found in schema.inputs for i in found.nested())
    assert all(o.tooltip and o.display_name for o in schema.outputs)


def test_the_nodes_are_there():
    names = [node.__name__ for node in training.NODES]
    assert names == [
        *(
            "PCPOPrompts",
            "PCPOTrainingSettings",
            "PCPOTrainInBackground",
            "PCPOTrainEasy",
            "PCPOJob",
        ),
        *("PCPOLoadJobLora", "PCPOWaitForJob", "PCPOExportLora"),
    ]


def test_sockets_fit_cores_own_training_nodes():
    outputs = comfy_api_fixture.schema_of(training_jobs.PCPOJob).outputs
    assert [o.io_type for o in outputs][-2:] == ["LORA_MODEL", "LOSS_MAP"]


def test_queueing_again_looks_at_the_job_again():
    node = training.PCPOTrainInBackground
    assert node.fingerprint_inputs() != node.fingerprint_inputs()
    assert comfy_api_fixture.schema_of(node).not_idempotent


# --- settings ------------------------------------------------------------------------------------


def defaults(preset):
    """What the widgets of a preset hold, as JSON brings it."""
    widgets = training_settings.widgets(preset)
    return json.loads(json.dumps({widget.id: widget.default for widget in widgets}))


def presets_of(family):
    found = training_settings.offered_presets()
    return [name for name in found if training_settings.family_of_preset(name) == family]


def test_a_preset_is_for_one_family():
    assert {"demo", "sd15-8gb", "sd15-aesthetic"} <= set(presets_of("sd1"))
    assert "demo-flow" in presets_of("sd3")
    values = training_settings.values_of({"preset": "demo"})
    training_settings.check_family(values, "sd1")
    said = refused(training_settings.check_family, values, "sd3")
    assert said == (
        "the preset of the settings is for SD1.x models and this MODEL is SD3.5; choose one of "
        f"{', '.join(presets_of('sd3'))} in PCPO Training Settings"
    )
    values = training_settings.values_of({"preset": "demo-flow", "run_iterations": 1})
    training_settings.check_family(values, "sd3")
    assert "is for SD3.5 models and this MODEL is FLUX;" in refused(
        training_settings.check_family, values, "flux"
    )


def test_a_prompt_to_comfyui_may_have_a_former_name():
    def sent(preset: Any) -> dict[str, Any]:
        node = {"class_type": "PCPOTrainingSettings", "inputs": {"preset": preset, "x": 1}}
        return {"prompt": {"1": node, "2": {"class_type": "Other", "inputs": {"preset": preset}}}}

    after = sent("setting8-baseline")
    after["prompt"]["1"]["inputs"]["preset"] = "sd35-ocr-flowgrpo"
    assert with_current_names(sent("setting8-baseline")) == after
    for other in (sent("demo"), sent(["3", 0]), sent(None), {}, {"prompt": []}, {"prompt": None}):
        assert with_current_names(deepcopy(other)) == other
    odd = {"prompt": {"1": 5, "2": {"class_type": "PCPOTrainingSettings", "inputs": []}}}
    assert with_current_names(deepcopy(odd)) == odd


def test_widgets_are_those_of_the_preset_s_family():
    shown = {
        family: {path for path in training_settings.fields(family)}
        for family in ("sd1", "sd3", "flux")
    }
    own = training_settings.FLOW | training_settings.MEMORY
    assert shown["sd3"] - shown["sd1"] == own
    assert shown["sd1"] - shown["sd3"] == {"sampler.spacing"}
    assert shown["flux"] - shown["sd3"] == {"model.guidance"}
    for name in ("demo", "demo-flow"):
        (kind,) = (w for w in training_settings.widgets(name) if w.id == "sampler_transition")
        assert kind.default in kind.options and ("cps" in kind.options)
        assert ("ddim" in kind.options) == (name == "demo")


def test_all_presets_that_train_a_lora_are_offered():
    offered = training_settings.offered_presets()
    assert offered[:2] == ("demo", "sd15-8gb") and len(set(offered)) == len(offered)
    read = {name: read_preset(name) for name in presets()}
    others = {name for name, config in read.items() if config.trainable.kind == "full"}
    assert set(offered) == set(presets()) - others and others


@pytest.mark.parametrize("preset", training_settings.offered_presets())
def test_widgets_and_config_go_round(preset):
    expected = read_preset(preset).model_dump(mode="json")
    assert training_settings.values_of({"preset": preset, **defaults(preset)}) == expected
    assert training_settings.values_of({"preset": preset}) == expected
    assert validate(expected, "a test") == read_preset(preset)


@pytest.mark.parametrize("preset", training_settings.offered_presets())
def test_widgets_begin_within_their_own_limits(preset):
    for widget in training_settings.widgets(preset):
        if widget.io_type == "COMBO":
            assert widget.default in widget.options
        if widget.io_type in ("INT", "FLOAT"):
            assert widget.min <= widget.default <= widget.max, widget.id
            section, _, name = widget.id.partition("_")
            with pytest.raises(
                ConfigError, match=rf"{section}\.{name} is "
            ):  # the config's own end
                validate({section: {name: widget.max * 2 + 1}}, "x")
        if widget.io_type == "FLOAT":  # the front end rounds to the step's digits
            digits = max(0, -math.floor(math.log10(widget.step) + 1e-9))
            assert round(widget.default, digits) == widget.default, widget.id


def test_every_seed_of_a_graph_is_one():
    widget = next(w for w in training_settings.widgets("demo") if w.id == "run_seed")
    assert widget.max == 2**64 - 1  # as far as ComfyUI's own seeds go
    values = training_settings.values_of({"preset": "demo", "run_seed": widget.max})
    assert values["run"]["seed"] == widget.max


def test_every_field_is_a_widget_or_decided_elsewhere():
    values = TrainConfig().model_dump()
    paths = {f"{s}.{f}" for s, inner in values.items() if s != "rewards" for f in inner}
    hidden = {*training_settings.ELSEWHERE, *training_settings.FLOW, *training_settings.MEMORY}
    hidden |= {"model.guidance", "model.size_condition", "model.train_distilled"}
    assert set(training_settings.fields("sd1")) | hidden == paths
    assert not set(training_settings.fields("sd1")) & hidden
    widgets = training_settings.widgets("demo")
    main = [widget.id for widget in widgets if not widget.advanced]
    assert main == [path.replace(".", "_") for path in training_settings.MAIN]


@pytest.mark.parametrize(
    ("widget", "given", "read"),
    [
        ("optimizer_lr", 3e-6, 3e-6),
        ("sampler_guidance_scale", 4, 4.0),
        ("run_iterations", 7, 7),
        ("model_gradient_checkpointing", True, True),
        ("model_precision", "bfloat16", "bfloat16"),
        ("model_width", 0, None),
        ("model_width", "auto", None),
        ("model_width", 96, 96),
        ("model_width", "96", 96),
        ("guard_max_fall", "off", None),
        ("guard_max_fall", 0, None),
        ("method_target_weight", "0,5", 0.5),
        ("advantage_among", "siblings", "siblings"),
        ("sampler_branch_at", "2, 4", [2, 4]),
        ("method_target_weight", 0, None),
        ("method_target_weight", 0.5, 0.5),
        ("method_kl_weight", 0, 0),
        ("run_seed", 0, 0),
        ("trainable_targets", " to_q,to_k ,", ["to_q", "to_k"]),
        ("trainable_targets", "", []),
        ("sampler_negative_prompt", "", ""),
        ("advantage_ddof", 1, 1),
    ],
)
def test_a_widget_changes_its_field_alone(widget, given, read):
    before = training_settings.values_of({"preset": "demo"})
    after = training_settings.values_of({"preset": "demo", widget: given})
    path = next(p for p in training_settings.fields("sd1") if p.replace(".", "_") == widget)
    section, _, field = path.partition(".")
    assert after[section].pop(field) == read
    del before[section][field]
    assert after == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_width": 3}, "model.width is 3: Input should be greater than or equal to 8"),
        ({"optimizer_beta1": 1.0}, "optimizer.beta1 is 1.0: Input should be less than 1"),
        ({"optimizer_lr": math.nan}, "optimizer.lr is nan: Input should be a finite number"),
        ({"optimizer_updates": 5000}, "optimizer.updates is 5000, more than the"),
        ({"model_width": 3, "model_height": 4}, "equal to 8; model.height is 4: Input should"),
        ({"model_width": "wide"}, "model.width is 'wide'; write a number, or auto"),
        ({"sampler_branches": 4}, "is 4, but sampler.branch_at names no step at which images"),
        (
            {"sampler_branches": 3, "sampler_branch_at": "2"},
            "make trees of 3 images; set it to a multiple of that, or lower sampler.branches (on "
            "the node: Images per prompt, Branches at a split (1: none))",
        ),
        ({"sampler_branches": 2, "sampler_branch_at": "first"}, "Splits at steps"),
    ],
)
def test_settings_that_do_not_hold(changes, said):
    with pytest.raises(NodeError, match=re.escape(said)) as caught:
        training_settings.values_of({"preset": "demo", **changes})
    assert "\n" not in str(caught.value)


def test_the_settings_node_gives_values_and_an_estimate(shown):
    found = comfy_api_fixture.run(
        training.PCPOTrainingSettings, preset={"preset": "demo", "run_iterations": 3}
    )
    values, text = found.result
    assert values["run"]["iterations"] == 3 and "3 iterations" in text
    assert shown == [text]


# --- the estimate --------------------------------------------------------------------------------


def memory_gib(preset, **changes):
    values = training_settings.values_of({"preset": preset, **changes})
    return training_estimate.estimate(values).memory / 2**30


def update_gib(preset, **changes):
    values = training_settings.values_of({"preset": preset, **changes})
    return training_estimate.estimate(values).stages[-1].total / 2**30


def work(preset, **changes):
    values = training_settings.values_of({"preset": preset, **changes})
    return training_estimate.estimate(values).flop


def test_the_small_preset_fits_its_card_and_the_paper_s_do_not():
    assert 2 < memory_gib("sd15-8gb") < 7
    assert memory_gib("demo") < 1
    assert memory_gib("demo-flow") < 1
    for preset in presets_of("sd1"):
        if preset not in ("demo", "sd15-8gb", "demo-taste", "sd15-taste"):
            assert 8 < memory_gib(preset) < 80


@pytest.mark.parametrize(
    ("setting", "less", "more"),
    [
        ("trainable_rank", 4, 64),
        ("run_micro_batch", 1, 2),
        ("model_width", 512, 768),
        ("model_height", 256, 512),
        ("sampler_guidance_scale", 1.0, 5.0),
        ("model_precision", "bfloat16", "float32"),
        ("model_gradient_checkpointing", True, False),
    ],
)
def test_memory_grows_with(setting, less, more):
    assert update_gib("sd15-8gb", **{setting: less}) < update_gib("sd15-8gb", **{setting: more})


@pytest.mark.parametrize(
    ("setting", "less", "more"),
    [
        ("sampler_steps", 10, 20),
        ("prompts_per_iteration", 4, 8),
        ("prompts_images_per_prompt", 4, 8),
        ("model_width", 512, 768),
        ("sampler_guidance_scale", 1.0, 5.0),
        ("sampler_drop_last", 1, 0),
        ("model_gradient_checkpointing", False, True),
    ],
)
def test_work_grows_with(setting, less, more):
    assert work("sd15-8gb", **{setting: less}) < work("sd15-8gb", **{setting: more})


def test_work_by_hand():
    demo = training_settings.values_of(
        {
            "preset": "demo",
            "sampler_steps": 10,
            "sampler_guidance_scale": 1.0,
            "prompts_per_iteration": 2,
            "prompts_images_per_prompt": 4,
            "method_selection": "all",
            "sampler_drop_last": 0,
        }
    )
    network, n = network_for("demo"), 64 * 64 / 16**2
    forward, update = (
        sum(c * n**i for i, c in enumerate(found))
        for found in (network.forward, network.update["lora"])
    )

    def passes(values):
        found = training_estimate.estimate(values).work
        return found["rollout"], found["update"]

    assert passes(demo) == pytest.approx((8 * 10 * forward, 8 * 10 * update))
    demo["method"] |= {"selection": "random_fraction", "fraction": 0.5}
    assert passes(demo) == pytest.approx((8 * 10 * forward, 8 * 5 * update))
    demo["method"] |= {"selection": "sliding_window", "window": 3}
    assert passes(demo) == pytest.approx((8 * 10 * forward, 8 * 3 * update))


# --- prompts -------------------------------------------------------------------------------------


@pytest.fixture
def input_folder(tmp_path, monkeypatch):
    import folder_paths

    folder = tmp_path / "input"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(folder), raising=False)
    return folder


def prompts_of(**source):
    return comfy_api_fixture.run(training.PCPOPrompts, source=source).result


def test_prompts_of_a_text(shown):
    found, count, text = prompts_of(source="text", text=" a cat \n\n\ta dog\r\n")
    assert found == training_prompts.Prompts(("a cat", "a dog"))
    assert (count, text) == (2, "a cat\na dog")
    assert shown == ["2 prompts"]
    assert "holds no prompt; write one prompt per line" in refused(
        prompts_of, source="text", text=" \n "
    )


@pytest.mark.parametrize("name", training_prompts.SETS)
def test_prompts_of_a_set(name, shown):
    found, count, text = prompts_of(source=name)
    assert found.texts == read_prompts(name) and found.built_in == name
    assert count == len(found.texts) == len(text.splitlines()) > 10
    assert bool(found.held_out) == (name == "scenes")
    assert not set(found.held_out) & set(found.texts)
    assert ("others to judge by" in shown[0]) == (name == "scenes")


@pytest.mark.parametrize("text", ["a cat\na \ud800 dog", "a cat\n\0"])
def test_prompts_of_a_text_that_nothing_could_draw(text):
    assert "line 2 has U+" in refused(prompts_of, source="text", text=text)


def test_prompts_of_a_file(input_folder):
    (input_folder / "b.txt").write_text("a cat\n\nein Hündchen\n", encoding="utf-8")
    (input_folder / "a.jsonl").write_text('{"prompt": "a dog", "more": 1}\n', encoding="utf-8")
    (input_folder / "c.png").touch()
    assert training_prompts.input_files() == ["a.jsonl", "b.txt"]
    assert prompts_of(source="file", file="b.txt")[0].texts == ("a cat", "ein Hündchen")
    assert prompts_of(source="file", file="a.jsonl")[0].texts == ("a dog",)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.txt", None, "there is no prompt file 'gone.txt'; put a file of prompts (.txt, "),
        ("../secret.txt", None, "there is no prompt file '../secret.txt';"),
        ("empty.txt", b"\n \n", "empty.txt holds no prompt; write one per line"),
        ("latin.txt", "süß".encode("latin-1"), "is not UTF-8 text (byte 1); save it as UTF-8"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', 'bad.jsonl, line 2 has no "prompt"'),
    ],
)
def test_prompt_files_that_are_refused(input_folder, name, content, said):
    (input_folder.parent / "secret.txt").write_text("a secret")
    if content is not None:
        (input_folder / name).write_bytes(content)
    assert said in refused(prompts_of, source="file", file=name)


def test_a_changed_file_is_read_again(input_folder):
    def sign(**source):
        return training.PCPOPrompts.fingerprint_inputs(source)

    file = input_folder / "a.txt"
    absent = sign(source="file", file="a.txt")
    file.write_text("a cat")
    before = sign(source="file", file="a.txt")
    file.write_text("a cat\na dog")
    assert len({absent, before, sign(source="file", file="a.txt")}) == 3
    assert sign(source="text", text="a cat") is None


def test_prompts_reach_the_worker(tmp_path):
    texts = ('a "cat"', "日本 {x}", "#1 a dog", "back\\slash", "line\u2028inside")
    file = tmp_path / "job" / "prompts.jsonl"
    source = training_prompts.write_prompts(training_prompts.Prompts(texts), file)
    assert source == str(file) and read_prompts(source) == (*texts[:-1], "line inside")
    built_in = training_prompts.from_set("animals")
    assert training_prompts.write_prompts(built_in, tmp_path / "none.jsonl") == "animals"
    assert not (tmp_path / "none.jsonl").exists()


class Words:
    """A CLIP whose chunks have 75 words; brackets are weights unless they are escaped."""

    def tokenize(self, text):
        for letter in "()":
            text = text.replace(f"\\{letter}", " x ").replace(letter, " ")
        return {"l": [[]] * max(1, math.ceil(len(text.split()) / 75))}


class Both(Words):
    """FLUX's: T5 has a token for each word, and CLIP-L as above."""

    def tokenize(self, text):
        return super().tokenize(text) | {"t5xxl": [[0] * max(256, len(text.split()) + 1)]}


class Few(Words):
    """The flow demo's: 24 tokens, with those that begin and end them."""

    tokenizer = SimpleNamespace(clip_l=SimpleNamespace(max_length=24))

    def tokenize(self, text):
        return {"l": [[]] * max(1, math.ceil(len(text.split()) / 22))}


def test_the_limit_of_a_prompt_is_its_model_s():
    def length(clip, count):
        text = " ".join(["word"] * count)
        training_prompts.check_prompts(training_prompts.Prompts((text,)), clip, ())

    length(Both(), 511)
    assert "shorten it to 512 tokens" in refused(length, Both(), 512)
    length(Few(), 22)
    assert "shorten it to 22 tokens" in refused(length, Few(), 23)


def test_t5_gets_as_many_tokens_as_in_comfyui():
    for held_out, length in (((), 256), ((" ".join(["word"] * 299),), 300)):
        prompts = training_prompts.Prompts(("a cat",), held_out)
        assert training_prompts.t5_length(Both(), prompts) == length


def check(texts, rewards=(), held_out=()):
    prompts = training_prompts.Prompts(tuple(texts), tuple(held_out))
    training_prompts.check_prompts(prompts, Words(), rewards)


def test_prompts_that_fit_pass():
    check(["a cat", " ".join(["word"] * 75)], [JPEG])
    check(["a red circle"], [JPEG, SCENE], ["a blue square"])


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a cat", "embedding:bad_hands"], "'embedding:bad_hands' names an embedding, which"),
        ([" ".join(["word"] * 76)], "is too long for the text encoder; shorten it to 75 tokens"),
        (["(" * 70 + " " + "a " * 30], "is too long for the text encoder"),  # letters in training
    ],
)
def test_prompts_that_are_refused(texts, said):
    assert said in refused(check, texts)
    assert said in refused(check, ["a cat"], held_out=texts)


def test_a_prompt_that_the_reward_cannot_read():
    said = refused(check, ["a red circle", "a cat"], [JPEG, SCENE])
    assert said.startswith("the reward 'scene' cannot judge by the prompt 'a cat': ")
    assert said.endswith("; change the prompt or take another reward")


# --- names, rewards, the LoRA to continue from ---------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("my_lora", "my_lora"),
        ("  my lora v1.2 ", "my lora v1.2"),
        ("style.safetensors", "style"),
        ("Stil für Ölbilder", "Stil für Ölbilder"),
        ("console", "console"),
        ("x" * 80, "x" * 80),
    ],
)
def test_names_of_files(typed, name):
    assert training_start.lora_name(typed) == name


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("a/b", "has / in it; use letters"),
        ("..\\b?", "has ? \\ in it; use letters"),
        ("a\x07", "has a control character in it; use letters"),
        ("", "cannot be a file's; write one like my_style"),
        (" .safetensors ", "cannot be a file's"),
        (".hidden", "cannot be a file's"),
        ("..", "cannot be a file's"),
        ("ends.", "cannot be a file's"),
        ("NUL", "cannot be a file's"),
        ("com1.lora", "cannot be a file's"),
        ("x" * 81, "has more than 80 bytes; shorten it"),
        ("ü" * 41, "has more than 80 bytes; shorten it"),
    ],
)
def test_names_that_are_refused(typed, said):
    assert said in refused(training_start.lora_name, typed)


def section(reward):
    """The rewards of a job, by both ways of reading them."""
    found = training_rewards.section_of(training_rewards.judges_of(reward))
    judges = validate({"rewards": found}, "the test").reward_parts
    assert list(judges) == list(found)
    return found


def test_rewards_are_told_by_name_and_weight():
    inner = WeightedSum((SCENE, JPEG), (0.5, 2.0))
    total = WeightedSum((inner, JPEG, SCENE), (2.0, 1.0, -3.0))
    assert section(total) == {"scene": -2.0, "jpeg_compressibility": 5.0}
    assert section(SCENE) == {"scene": 1.0}


def test_rewards_are_told_with_options_and_scales():
    small = named_reward("jpeg_compressibility", "automatic", "automatic", '{"quality": 50}')
    scaled = rewards_sum.normalise(JPEG, {"normalise": "affine", "scale": 0.5, "shift": -1})
    running = rewards_sum.normalise(small, {"normalise": "z_score"})
    running.scales[0].see(torch.arange(4.0))  # scored with before
    total = rewards_sum.combine((small, scaled, JPEG, running, running), (1, 2, -3, 0.5, 1))
    jpeg, options = "jpeg_compressibility", {"quality": 50}
    assert section(total) == {
        jpeg: {"weight": 1, "options": options},
        f"{jpeg}_2": {
            "weight": 2,
            "name": jpeg,
            "normalise": "affine",
            "scale": 0.5,
            "shift": -1.0,
        },
        f"{jpeg}_3": {"weight": -3, "name": jpeg},
        f"{jpeg}_4": {"weight": 1.5, "name": jpeg, "normalise": "z_score", "options": options},
    }
    assert section(running) == {jpeg: {"weight": 1, "normalise": "z_score", "options": options}}


def test_what_a_job_is_told_makes_the_same_reward():
    small = named_reward("jpeg_compressibility", "automatic", "automatic", '{"quality": 50}')
    parts = (
        SCENE,
        rewards_sum.normalise(small, {"normalise": "affine", "scale": 2, "shift": 3}),
    )
    total = rewards_sum.combine(parts, (1.0, 0.25))
    there = RewardSet.from_config(validate({"rewards": section(total)}, "the test")).as_one()
    images = torch.randint(0, 255, (3, 3, 40, 40), dtype=torch.uint8)
    prompts = ["a red circle"] * 3
    assert there.score(images, prompts).values.equal(total.score(images, prompts).values)


def test_the_guard_s_reward_is_told_by_name_and_options():
    text = json.dumps({"quality": 50, "divisor": 2000})
    small = named_reward("jpeg_compressibility", "automatic", "automatic", text)
    told = training_rewards.guard_of([training_rewards.watched_of(small)])
    settings = training_settings.values_of({"preset": "demo", "guard_every": 5})
    config = training_start.config_of(settings, {"guard": told})
    assert config.guard.reward == "jpeg_compressibility"
    assert config.guard.options == json.loads(small.options) and config.guard.every == 5
    assert training_rewards.guard_of([]) == {}
    off = training_settings.values_of({"preset": "demo"})
    assert "guard.every is 0" in refused(training_start.config_of, off, {"guard": told})
    two = rewards_sum.combine((SCENE, JPEG), (1.0, 1.0))
    for other in (
        two,
        rewards_sum.combine((SCENE,), (2.0,)),
        rewards_sum.normalise(SCENE, {"normalise": "z_score"}),
    ):
        assert "connect PCPO Reward directly" in refused(training_rewards.watched_of, other)


def test_a_scale_over_a_sum_is_not_trained_on():
    summed = rewards_sum.combine((SCENE, JPEG), (1.0, 0.1))
    twice = rewards_sum.normalise(JPEG, {"normalise": "z_score"})
    for inner, names in ((summed, "'scene', 'jpeg_compressibility'"), (twice, "'jpeg_compressib")):
        outer = rewards_sum.normalise(inner, {"normalise": "z_score"})
        said = refused(training_rewards.judges_of, rewards_sum.combine((outer, SCENE), (1, 1)))
        assert said.startswith("PCPO Normalise Reward is behind PCPO Combine Rewards or another")
        assert names in said
        assert said.endswith("put it right behind PCPO Reward, and combine afterwards")


def test_rewards_that_a_worker_does_not_know():
    other = SimpleNamespace(name="pretty")
    known = ", ".join(REWARDS)
    said = f"the reward 'pretty' cannot be trained on here; choose one of {known}"
    assert refused(training_rewards.judges_of, other) == said
    assert refused(training_rewards.judges_of, WeightedSum((SCENE, other), (1.0, 1.0))) == said


def test_a_reward_that_is_gone_since_its_node_ran():
    gone = NamedReward("jpeg_compressibility", '{"quality": 500}', JPEG.made)
    judges = training_rewards.judges_of(gone)
    assert "quality is 500" in refused(training_rewards.check_rewards, judges)
    training_rewards.check_rewards(training_rewards.judges_of(JPEG))


def lora_file(path, modules=("lora_unet_a", "lora_unet_b"), rank=4, form="kohya", **more):
    down, up = {
        "kohya": (".lora_down.weight", ".lora_up.weight"),
        "peft": (".lora_A.weight", ".lora_B.weight"),
        "diffusers": (".lora.down.weight", ".lora.up.weight"),
        "processor": ("_lora.down.weight", "_lora.up.weight"),
    }[form]
    tensors = {f"{module}{down}": torch.ones(rank, 8) for module in modules}
    tensors |= {f"{module}{up}": torch.ones(8, rank) for module in modules}
    tensors |= {f"{module}.alpha": torch.tensor(2.0) for module in modules if form == "kohya"}
    save_file(tensors | more, path, metadata={"ss_network_dim": str(rank)})
    return path


@pytest.mark.parametrize("form", ["kohya", "peft", "diffusers", "processor"])
def test_a_lora_to_continue_from(tmp_path, form):
    file = lora_file(tmp_path / "a.safetensors", form=form)
    training_start.check_init_lora(file, 4)
    training_start.check_init_lora(file, 8)
    said = refused(training_start.check_init_lora, file, 2)
    assert said == "a.safetensors has rank 4 and the settings 2; set trainable_rank to 4 or more"


def test_loras_that_training_cannot_continue(tmp_path):
    def said(file):
        return refused(training_start.check_init_lora, file, 8)

    text = lora_file(tmp_path / "text.safetensors", ("lora_unet_a", "lora_te_b"))
    assert "also changes the text encoder" in said(text)
    dora = lora_file(tmp_path / "d.safetensors", **{"lora_unet_a.dora_scale": torch.ones(8)})
    assert "d.safetensors is not a plain LoRA (lora_unet_a.dora_scale); choose one" in said(dora)
    save_file({"a.hada_w1_a": torch.ones(2, 2)}, tmp_path / "hada.safetensors")
    assert "is not a plain LoRA (a.hada_w1_a); choose one" in said(tmp_path / "hada.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 20)
    assert "broken.safetensors cannot be read as a LoRA" in said(tmp_path / "broken.safetensors")
    assert "gone.safetensors cannot be read as a LoRA" in said(tmp_path / "gone.safetensors")


# --- the config of the job -----------------------------------------------------------------------


def test_other_inputs_decide_their_part_of_the_config():
    settings = training_settings.values_of({"preset": "demo"})
    before = json.dumps(settings)
    changes = {"rewards": {"jpeg_compressibility": 2.0}, "run": {"publish": "/a/b.safetensors"}}
    config = training_start.config_of(settings, changes)
    assert config.rewards == {"jpeg_compressibility": 2.0}
    assert config.run.publish == "/a/b.safetensors"
    assert config.run.iterations == settings["run"]["iterations"]
    assert json.dumps(settings) == before
    said = "run.publish is 'b.txt'"
    with pytest.raises(NodeError, match=said):
        training_start.config_of(settings, {"run": {"publish": "b.txt"}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model": {"precision": "float16"}, "run": {"device": "cpu"}},
            "model_precision is 'float16', which a CPU cannot train in; use 'float32'",
        ),
        ({"model": {"source": "/gone.ckpt"}}, "there is no model at /gone.ckpt"),
        ({"prompts": {"source": "/gone.txt"}}, "/gone.txt"),
        ({"trainable": {"init_lora": "/gone"}}, "trainable.init_lora is '/gone', which is no file"),
    ],
)
def test_what_the_worker_would_refuse_is_refused_at_once(changes, said):
    settings = training_settings.values_of({"preset": "demo"})
    training_start.check_config(training_start.config_of(settings, {}), "sd1")
    with pytest.raises(NodeError, match=re.escape(said)):
        training_start.check_config(training_start.config_of(settings, changes), "sd1")


def test_samplers_of_flow_models_are_refused():
    flow = SimpleNamespace(transition="cps")
    config = SimpleNamespace(
        run=SimpleNamespace(device="cuda"), model=SimpleNamespace(), sampler=flow
    )
    assert "sampler_transition is 'cps', which is for flow models" in refused(
        training_start.check_config, config, "sd1"
    )


def test_samplers_of_diffusion_models_are_refused():
    chosen = SimpleNamespace(transition="ddim")
    config = SimpleNamespace(run=SimpleNamespace(device="cuda"), sampler=chosen)
    said = refused(training_start.check_config, config, "flux")
    assert said == (
        "sampler_transition is 'ddim', which is for diffusion models; FLUX is a flow model: use "
        "'dance_sde' or 'flow_sde' or 'cps'"
    )


@pytest.mark.parametrize(
    ("chosen", "asked", "family", "said"),
    [
        (None, None, "sd3", []),
        (5.0, 5.0, "sd3", ["training uses the MODEL's shift, 5"]),
        (
            3.0,
            5.0,
            "sd3",
            ["sampler_shift of the settings, 3, overrides the MODEL's, 5"],
        ),
        (None, None, "flux", ["FLUX is trained at guidance 3.5 (model_guidance); a FluxGuid"]),
    ],
)
def test_what_nodes_before_have_asked_for_is_respected_or_said(chosen, asked, family, said):
    sampler = SimpleNamespace(shift=chosen)
    config = SimpleNamespace(sampler=sampler, model=SimpleNamespace(guidance=3.5))
    notes = training_run.flow_notes(config, family, asked)
    assert len(notes) == len(said) and all(map(str.startswith, notes, said))


def test_devices():
    assert training_start.training_device(torch.device("cpu")) == ("cpu", None)
    assert training_start.training_device(torch.device("cuda")) == ("cuda:0", None)
    assert training_start.training_device(torch.device("cuda:1")) == ("cuda:1", None)
    device, note = training_start.training_device(torch.device("mps"))
    assert device == "cpu" and "'mps'" in note


# --- which job, which file -----------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    found = JobRegistry(tmp_path / "jobs")
    for module in (training_jobs, training_pick, training):
        monkeypatch.setattr(module, "registry", lambda: found)
    yield found
    found.close()


def add_job(jobs, digit, name, created, state="done", iteration=3, base="demo", **status):
    folder = JobFolder(jobs.root / (digit * 16))
    folder.root.mkdir(parents=True)
    settings = training_settings.values_of({"preset": "demo"})
    publish = {"publish": f"/somewhere/loras/{name}.safetensors"}
    model = {"source": f"/somewhere/{name}.ckpt"} if base != "demo" else {}
    if base != "demo":
        model |= {"text_encoders": ["/somewhere/l.ckpt"], "vae": "/somewhere/ae.ckpt"}
    config = training_start.config_of(settings, {"run": publish, "model": model})
    about = {"name": name, "created": created, "device": "cpu", "inputs": {"base": base}}
    folder.start({"config": config.model_dump(mode="json"), **about})
    folder.status(state, iteration=iteration, of=3, **status)
    return folder


def add_loras(folder, *iterations):
    folder.lora.mkdir(exist_ok=True)
    for iteration in iterations:
        lora_file(folder.lora / f"pcpo_{iteration:05}.safetensors", rank=iteration)


def test_a_job_is_chosen_by_name_id_or_socket(jobs):
    assert "there is no job yet; start one" in refused(
        training_pick.chosen_id, jobs, training_pick.NEWEST
    )
    for digit, name, created in (("a", "one", 1.0), ("b", "two", 2.0), ("c", "one", 3.0)):
        add_job(jobs, digit, name, created)
    chosen = training_pick.chosen_id
    assert chosen(jobs, training_pick.NEWEST) == "c" * 16
    assert chosen(jobs, "one") == "c" * 16  # the newer of two
    assert chosen(jobs, "two") == "b" * 16
    assert chosen(jobs, "a" * 16) == "a" * 16
    assert chosen(jobs, "two", {"id": "a" * 16}) == "a" * 16
    assert "there is no job 'three' any more; press R" in refused(chosen, jobs, "three")
    gone = {"id": "d" * 16}
    assert "any more; press R" in refused(chosen, jobs, training_pick.NEWEST, gone)
    names = training_pick.job_inputs()[0].options
    assert names == [training_pick.NEWEST, "one", "two"]


def test_the_sign_changes_when_the_chosen_job_moves_on(jobs):
    one, two = add_job(jobs, "a", "one", 1.0), add_job(jobs, "b", "two", 2.0)

    def signs():
        chosen = (training_pick.NEWEST, "one", "two", "b" * 16, None)
        return [training_pick.sign_of(jobs, name) for name in chosen]

    before = signs()
    assert signs() == before
    add_loras(one, 1)
    after = signs()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True, False]
    two.status("running", iteration=2, of=3)
    last = signs()
    assert [a == b for a, b in zip(after, last, strict=True)] == [False, True, False, False, False]


def test_which_lora(jobs):
    folder = add_job(jobs, "a", "one", 1.0, "stopped")
    name = training_pick.export_of
    said = refused(name, folder, training_pick.LATEST, 1)
    assert said == "the job 'one' (stopped, iteration 3) has no LoRA yet; queue again when it has"
    add_loras(folder, 1, 2, 10)
    assert name(folder, training_pick.LATEST, 1).stem == "pcpo_00010"
    assert name(folder, training_pick.NUMBERED, 2).stem == "pcpo_00002"
    said = refused(name, folder, training_pick.NUMBERED, 3)
    assert said == "the job 'one' has no LoRA of iteration 3; it has 1, 2, 10"
    assert name(folder, training_pick.BEST, 1).stem == "pcpo_00010"  # nothing measured
    for iteration, score in ((10, None), (10, math.nan), (1, 0.2), (2, 0.7), (3, 0.9)):
        folder.add_metrics({"iteration": iteration, "held_out": score})
    folder.add_metrics({"iteration": 10, "reward": 5.0})
    assert name(folder, training_pick.BEST, 1).stem == "pcpo_00002"  # 3 has no file
    write_json(folder.guard / "guard.json", {"best": 1})
    assert name(folder, training_pick.BEST, 1).stem == "pcpo_00001"  # whatever the reward says
    write_json(folder.guard / "guard.json", {"best": None})
    assert name(folder, training_pick.BEST, 1).stem == "pcpo_00002"


# --- pictures ------------------------------------------------------------------------------------

METRICS = [
    {"iteration": i, "reward": 0.1 * i, "reward_std": 0.05, "clip_fraction": 0.02 * i}
    for i in range(1, 11)
]


def pixels_of(picture, colour):
    """How many pixels are about of a colour, and how far up they are in the mean."""
    wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    near = (picture[0] - wanted).abs().max(-1).values < 0.1
    rows = near.nonzero()[:, 0].float()
    return int(near.sum()), float(rows.mean()) if len(rows) else math.nan


def assert_is_image(picture):
    assert picture.dtype == torch.float32 and picture.shape[-1] == 3
    assert picture.isfinite().all() and 0 <= picture.min() <= picture.max() <= 1


def test_curves_show_the_data():
    held_out = [{**line, "held_out": 0.5} for line in METRICS]
    picture = pictures.curves(held_out, 0.1, "a job")
    assert picture.shape == (1, 400, 960, 3)
    assert_is_image(picture)
    reward, left, right = pictures.LINE, picture[:, :, :480], picture[:, :, 480:]
    assert pixels_of(left, reward)[0] > 300
    assert pixels_of(right, pictures.CLIPPED)[0] > 300
    assert pixels_of(left, pictures.BAND)[0] > 1000
    early, late = pixels_of(left[:, 100:, 64:200], reward), pixels_of(left[:, 100:, 300:], reward)
    assert early[1] > late[1] + 50  # it rises
    flat = pictures.curves([{**line, "reward": 0.5} for line in METRICS], None, "a job")
    assert not flat.equal(picture)
    without = pixels_of(flat[:, 80:], pictures.HELD_OUT)[0]
    assert without < pixels_of(picture[:, 80:], pictures.HELD_OUT)[0] / 10


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        METRICS[:1],
        [{"iteration": 1, "reward": math.nan, "clip_fraction": None}],
        [{"iteration": 1, "reward": math.inf}, {"iteration": 2}],
        [{"iteration": i, "reward": 3.0, "reward_std": math.nan} for i in (1, 2)],
        [{"iteration": i, "reward": 1e30 * i} for i in (1, 2)],
    ],
)
@pytest.mark.parametrize("title", ["a job", "two\nlines", "long " * 200, "日本", ""])
def test_curves_of_anything(metrics, title):
    assert_is_image(pictures.curves(metrics, math.nan, title))


def test_samples_of_the_last_complete_iteration(tmp_path):
    assert pictures.latest_samples(tmp_path / "none") is None
    for iteration, is_complete in ((0, True), (9, True), (10, True), (20, False)):
        place = tmp_path / f"{iteration:05}"
        place.mkdir()
        for i in range(2):
            image = np.full((6, 8, 3), 10 * iteration + i, dtype=np.uint8)
            Image.fromarray(image).save(place / f"{i:03}.png")
        if is_complete:
            (place / "scores.json").write_text("[]")
    (tmp_path / "other").mkdir()
    found = pictures.latest_samples(tmp_path)
    assert found.shape == (2, 6, 8, 3)
    assert_is_image(found)
    assert (found * 255).round()[:, 0, 0, 0].tolist() == [100, 101]


# --- the nodes of a job --------------------------------------------------------------------------


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(training_host, "block_output", lambda reason: ("blocked", reason))
    monkeypatch.setattr(training_host, "progress", lambda total: lambda done: None)


def test_the_job_node_shows_a_job(jobs, host, shown):
    folder = add_job(jobs, "a", "one", 1.0, "failed", message="out of\nmemory")
    result = comfy_api_fixture.run(training_jobs.PCPOJob).result
    assert result[:3] == ({"id": "a" * 16}, "failed", 3)
    assert result[4] == ("blocked", None)
    assert result[5][0] == result[6][0] == "blocked"
    assert "has no LoRA yet" in result[5][1] and "has no curve yet" in result[6][1]
    for i in (1, 2):
        folder.add_metrics({"iteration": i, "reward": 0.25 * i})
    add_loras(folder, 3)
    result = comfy_api_fixture.run(training_jobs.PCPOJob, job="one").result
    assert result[3].shape == (1, 400, 960, 3)
    assert result[5]["lora_unet_a.lora_down.weight"].shape == (3, 8)
    assert result[6] == {"loss": [-0.25, -0.5]}
    assert shown[-1].startswith("one: failed, 3 of 3 iterations; out of")


def test_waiting_ends_with_the_job(jobs, host):
    add_job(jobs, "a", "one", 1.0)
    add_job(jobs, "b", "two", 2.0, "failed", message="the disk is full")
    node, job = training_jobs.PCPOWaitForJob, {"id": "a" * 16}
    assert comfy_api_fixture.run(node, job=job).result == (job,)
    with pytest.raises(NodeError, match="the training two: failed, 3 of 3 iterations; the disk is"):
        comfy_api_fixture.run(node, job={"id": "b" * 16})
    with pytest.raises(NodeError, match="there is no job"):
        comfy_api_fixture.run(node, job={"id": "c" * 16})


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", training_export.DTYPES)
def test_an_export(jobs, host, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(training_host, "models_folder", lambda kind: tmp_path / kind)
    folder = add_job(jobs, "a", "one", 1.0, base="sd1")
    add_loras(folder, 2, 3)
    given = {"which": "iteration", "iteration": 2, "name": "mine", "dtype": dtype}
    file, *_ = comfy_api_fixture.run(training_jobs.PCPOExportLora, job="one", **given).result
    assert file == str(tmp_path / "loras" / "mine.safetensors")
    written, own = load_file(file), load_file(folder.lora / "pcpo_00002.safetensors")
    assert set(written) == set(own)
    for key, tensor in written.items():
        is_scale = key.endswith(".alpha")
        assert tensor.dtype == (torch.float32 if is_scale else training_export.DTYPES[dtype])
        assert tensor.equal(own[key].to(tensor.dtype))
    with safe_open(file, framework="pt") as opened:
        notes = opened.metadata()
    assert notes["ss_network_dim"] == "2"
    assert (notes["pcpo_job"], notes["pcpo_name"]) == ("a" * 16, "one")
    config = json.loads(notes["pcpo_config"])
    assert config["optimizer"] == folder.job()["config"]["optimizer"]
    assert config["model"]["source"] == "one.ckpt" and "somewhere" not in str(notes)
    assert config["model"]["text_encoders"] == ["l.ckpt"] and config["model"]["vae"] == "ae.ckpt"


def test_an_export_never_overwrites(jobs, host, tmp_path, monkeypatch, shown):
    monkeypatch.setattr(training_host, "output_folder", lambda: tmp_path)
    add_loras(add_job(jobs, "a", "one", 1.0), 1)
    files = [
        comfy_api_fixture.run(training_jobs.PCPOExportLora, name="x", folder="output").result[0]
        for _ in range(3)
    ]
    stems = sorted(file.stem for file in (tmp_path / "loras").iterdir())
    assert stems == ["x", "x-2", "x-3"]
    assert files == [str(tmp_path / "loras" / f"{stem}.safetensors") for stem in stems]
    assert shown[-1].endswith("x-3.safetensors (x was taken)")


def test_a_weight_that_is_too_large_for_half(jobs, tmp_path):
    folder = add_job(jobs, "a", "one", 1.0)
    file = lora_file(tmp_path / "a.safetensors", more=torch.tensor([1e6]))
    target = tmp_path / "out" / "b.safetensors"
    said = refused(training_export.export_lora, folder, file, target, torch.float16)
    assert said == "some weights are too large for float16; choose float32 or bfloat16"
    assert not target.exists()
    training_export.export_lora(folder, file, target, torch.bfloat16)
    assert target.exists()


def test_a_merged_checkpoint_needs_all_parts(jobs, tmp_path):
    folder = add_job(jobs, "a", "one", 1.0)
    demo = SimpleNamespace(get_attachment=lambda name: "tiny-sd")
    merged = training_export.export_merged
    said = refused(merged, folder, tmp_path, tmp_path, (demo, None, demo), len)
    assert said == "a merged checkpoint needs model, clip and vae; connect all three"
    said = refused(merged, folder, tmp_path, tmp_path, (demo, demo, demo), len)
    assert said == "the demo model is too small for a checkpoint file; export its LoRA"
