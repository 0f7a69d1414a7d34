"""The reward nodes in a real ComfyUI server, against `pcpo score` on the images it saves.

What it needs is in comfyui_fixture.py.
"""

from __future__ import annotations

import csv
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import comfyui_pcpo
import numpy as np
import pytest
from comfyui_fixture import HOST, PYTHON, needs_host
from comfyui_pcpo.pcpo import scenes
from comfyui_pcpo.pcpo.pictures.tensors import pixels_of
from comfyui_pcpo.pcpo.rewards import load_reward
from comfyui_pcpo.trainers.cli import command as cli
from PIL import Image

PROBE = Path(__file__).parent / "scripts" / "comfyui_rewards_fixture.py"
PROMPTS = ["a red circle to the left of a blue square", "a green cross", "a cyan triangle"]
START, TIMEOUT = 300, 120  # seconds, of the server and of a graph

pytestmark = needs_host


class Server:
    """A ComfyUI of its own folders."""

    def __init__(self, base: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.base, self.log = base, base / "log.txt"
        command = [PYTHON, "main.py", "--cpu", "--port", str(self.port), "--disable-auto-launch"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--base-directory", str(base)],
                cwd=HOST,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def wait(self):
        for _ in range(START):
            try:
                return self.ask("/system_stats")
            except (OSError, ValueError):
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-3000:])

    def start(self, graph):
        answer = self.ask("/prompt", {"prompt": graph})
        assert "prompt_id" in answer, answer
        return answer["prompt_id"]

    def finish(self, prompt_id):
        """What is in the history: outputs by node, and the messages by kind.

        Raises:
            AssertionError: where it does not end.
        """
        for _ in range(TIMEOUT * 10):
            entry = self.ask(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                messages = dict(entry["status"]["messages"])
                return entry["outputs"], messages
            time.sleep(0.1)
        raise AssertionError(f"no end: {self.log.read_text()[-2000:]}")

    def run(self, graph):
        outputs, messages = self.finish(self.start(graph))
        assert "execution_success" in messages, messages
        return outputs

    def refusal(self, graph):
        """The error of a graph: its node and its text."""
        answer = self.ask("/prompt", {"prompt": graph})
        for fault in answer["node_errors"].values():  # said before anything runs
            if fault["errors"]:
                return fault["class_type"], fault["errors"][0]["details"].partition(" - ")[2]
        _, messages = self.finish(answer["prompt_id"])
        error = messages["execution_error"]
        return error["node_type"], error["exception_message"].strip()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "user", "models/reward_models", "models/clip_vision"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / "some-pack").symlink_to(comfyui_pcpo.__path__[0])
    (base / "models/reward_models" / "taste.safetensors").write_bytes(b"")
    (base / "models/reward_models" / "README.md").write_text("not weights")
    (base / "models/clip_vision" / "clip_l.safetensors").write_bytes(b"")
    shutil.copy(PROBE, base / "custom_nodes" / "probe.py")
    rng = np.random.default_rng(0)
    for i, prompt in enumerate(PROMPTS):
        Image.fromarray(scenes.draw(scenes.parse(prompt), rng)).save(base / f"input/{i}.png")
    running = Server(base)
    try:
        running.wait()
        yield running
    finally:
        running.process.terminate()
        running.process.wait(20)


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def scoring(reward="jpeg_incompressibility", options="", prompt="", kind="rows", count=6):
    """Images, a reward, the node under test."""
    return {
        "images": node("ProbeImages", kind=kind, count=count),
        "reward": node("PCPOReward", reward=reward, weights="automatic", options=options),
        "score": node("PCPOScoreImages", images=["images", 0], reward=["reward", 0], prompt=prompt),
        "numbers": node("PreviewAny", source=["score", 0]),
        "best": node("PreviewAny", source=["score", 1]),
        "table": node("PreviewAny", source=["score", 2]),
        "sorted": node("SaveImage", images=["score", 3], filename_prefix=f"sorted_{kind}"),
        "sheet": node("PreviewImage", images=["score", 4]),
        "saved": node("SaveImage", images=["images", 0], filename_prefix=f"saved_{kind}"),
    }


def files(server, outputs, name):
    return [server.base / i["type"] / i["filename"] for i in outputs[name]["images"]]


@pytest.fixture
def pcpo_score(tmp_path):
    """The numbers that the command prints for some files."""

    def run(images, reward, prompts):
        lines = tmp_path / "prompts.txt"
        lines.write_text("\n".join(prompts))
        table = tmp_path / "scores.csv"
        given = ["score", *map(str, images), "--reward", reward, "--prompts", str(lines)]
        assert cli.main([*given, "--csv", str(table)]) == 0
        with table.open(newline="", encoding="utf-8") as opened:
            scores = {row["file"]: row["score"] for row in csv.DictReader(opened)}
        return [scores[str(image)] for image in images]

    return run


def test_the_pack_loads_without_a_word(server):
    log = server.log.read_text()
    assert "some-pack" in log
    assert "IMPORT FAILED" not in log
    assert not [line for line in log.splitlines() if "some-pack" in line and "WARN" in line]
    known = server.ask("/object_info")
    names = ("PCPOReward", "PCPONormaliseReward", "PCPOCombineRewards", "PCPOScoreImages")
    for name in (*names, "PCPOBestOfN"):
        assert known[name]["category"] == "PCPO/rewards"
    weights = known["PCPOReward"]["input"]["required"]["weights"][1]["options"]
    assert weights == ["automatic", "taste.safetensors", "clip_vision/clip_l.safetensors"]


@pytest.mark.parametrize("kind", ["rows", "rgba", "half"])
@pytest.mark.parametrize("reward", ["jpeg_incompressibility", "jpeg_compressibility"])
def test_scores_are_those_of_pcpo_score_on_the_saved_files(server, pcpo_score, kind, reward):
    outputs = server.run(scoring(reward, kind=kind))
    saved = files(server, outputs, "saved")
    printed = pcpo_score(saved, reward, ["none"])
    exact = [
        load_reward(reward).score(pixels_of(Image.open(f)), ["none"]).values.item() for f in saved
    ]
    assert [float(text) for text in outputs["numbers"]["text"]] == exact
    rows = [line.split() for line in outputs["table"]["text"][0].splitlines()[1:]]
    assert [row[2] for row in sorted(rows, key=lambda row: int(row[1]))] == printed
    order = [int(row[1]) for row in rows]
    assert order == sorted(range(6), key=lambda i: -exact[i])
    assert int(outputs["best"]["text"][0]) == order[0] == exact.index(max(exact))
    for i, file in zip(order, files(server, outputs, "sorted"), strict=True):
        assert file.read_bytes()[-200:] == saved[i].read_bytes()[-200:]  # the pixels' last bytes


def test_scene_scores_and_what_the_node_shows(server, pcpo_score):
    graph = scoring("scene", prompt="\n".join(PROMPTS)) | {
        **{str(i): node("LoadImage", image=f"{i}.png") for i in range(3)},
        "two": node("ImageBatch", image1=["2", 0], image2=["1", 0]),
        "images": node("ImageBatch", image1=["two", 0], image2=["0", 0]),
    }
    outputs = server.run(graph)
    saved = files(server, outputs, "saved")
    printed = pcpo_score(saved, "scene", PROMPTS)
    assert printed[1] == "1.0000"  # the middle picture is of the middle prompt, the others swapped
    assert printed[0] != printed[1] != printed[2]
    assert [f"{float(text):.4f}" for text in outputs["numbers"]["text"]] == printed
    table = outputs["table"]["text"][0]
    assert table.splitlines()[0].split() == [
        *("rank", "image", "score", "colour", "shape", "relation", "count", "prompt")
    ]
    assert outputs["score"]["pcpo_table"] == [table]
    (line,) = outputs["score"]["text"]
    assert line.startswith("best: image 1 with 1.0000; mean ") and line.endswith(" of 3 images")
    shown = Image.open(files(server, outputs, "score")[0])
    assert shown.size == Image.open(files(server, outputs, "sheet")[0]).size == (832, 326)


def test_combined_rewards(server):
    both = {
        "other": node(
            "PCPOReward",
            reward="jpeg_compressibility",
            weights="automatic",
            options='{"quality": 50}',
        ),
        "sum": node(
            "PCPOCombineRewards",
            weights="2, -0.5",
            **{"rewards.reward_0": ["reward", 0], "rewards.reward_1": ["other", 0]},
        ),
    }
    graph = scoring(prompt="none") | both
    graph["score"]["inputs"]["reward"] = ["sum", 0]
    outputs = server.run(graph)
    for file, found in zip(
        files(server, outputs, "saved"), outputs["numbers"]["text"], strict=True
    ):
        pixels = pixels_of(Image.open(file))
        first = load_reward("jpeg_incompressibility").score(pixels, [""]).values.item()
        second = load_reward("jpeg_compressibility", quality=50).score(pixels, [""]).values.item()
        assert float(found) == pytest.approx(2 * first - 0.5 * second)


def normalised(kind, /, **inputs):
    return node("PCPONormaliseReward", reward=["reward", 0], normalise=kind, **inputs)


def test_normalised_rewards_in_a_sum(server):
    affine = {"normalise.scale": 0.5, "normalise.shift": 3.0}
    graph = scoring(prompt="none", count=20) | {
        "z": normalised("z_score"),
        "a": normalised("affine", **affine),
        "sum": node(
            "PCPOCombineRewards",
            weights="2, 1",
            **{"rewards.reward_0": ["z", 0], "rewards.reward_1": ["a", 0]},
        ),
    }
    graph["score"]["inputs"]["reward"] = ["sum", 0]
    outputs = server.run(graph)
    jpeg = [
        load_reward("jpeg_incompressibility").score(pixels_of(Image.open(f)), [""]).values.item()
        for f in files(server, outputs, "saved")
    ]
    expected = 2 * (np.array(jpeg) - np.mean(jpeg)) / np.std(jpeg) + 0.5 * np.array(jpeg) + 3
    found = [float(text) for text in outputs["numbers"]["text"]]
    assert found == pytest.approx(expected.tolist(), abs=1e-3)
    first = outputs["table"]["text"][0].splitlines()[0]
    assert "jpeg_incompressibility (z_score)" in first
    assert "jpeg_incompressibility 2 (affine)" in first
    sheet = Image.open(files(server, outputs, "sheet")[0])
    assert sheet.height > Image.open(files(server, outputs, "score")[0]).width * 0.3
    # scored again beside others: the statistics have gone on, and have now seen the batch twice
    graph["score"]["inputs"]["prompt"] = "other"
    again = [float(text) for text in server.run(graph)["numbers"]["text"]]
    assert again == pytest.approx(found, abs=1e-3)


def test_an_image_that_fails_alone_does_not_lose_the_others(server):
    graph = {k: n for k, n in scoring(kind="nan").items() if k != "saved"}
    outputs = server.run(graph)
    numbers = [float(text) for text in outputs["numbers"]["text"]]
    assert np.isnan(numbers).tolist() == [False] * 5 + [True]
    lines = outputs["table"]["text"][0].splitlines()
    assert lines[0].endswith("error")
    assert lines[-1].split()[:3] == ["6", "5", "-"]
    assert "it holds NaN or infinity instead of colours" in lines[-1]
    assert int(outputs["best"]["text"][0]) != 5


def best_of(n, count=6, latents=("images", 1), **more):
    graph = scoring(count=count) | {
        "keep": node(
            "PCPOBestOfN",
            images=["images", 0],
            reward=["reward", 0],
            prompt="",
            n=n,
            **({"latent": list(latents)} if latents else {}),
        ),
        "kept": node("SaveImage", images=["keep", 0], filename_prefix="kept"),
        "kept_scores": node("PreviewAny", source=["keep", 2]),
        **more,
    }
    return graph


def test_best_of_n_keeps_latents_in_step(server):
    outputs = server.run(best_of(3, latent=node("ProbeLatent", latent=["keep", 1])))
    numbers = [float(text) for text in outputs["numbers"]["text"]]
    order = sorted(range(6), key=lambda i: -numbers[i])[:3]
    assert order != [0, 1, 2]
    latent = json.loads(outputs["latent"]["text"][0])
    assert latent["samples"] == order
    assert latent["noise_mask"] == [i / 10 for i in order]
    assert latent["batch_index"] == [10 + i for i in order]
    assert [float(text) for text in outputs["kept_scores"]["text"]] == [numbers[i] for i in order]
    assert len(outputs["kept"]["images"]) == 3


def test_best_of_n_without_latents(server):
    graph = best_of(1, latents=None, latent=node("ProbeLatent", latent=["keep", 1]))
    outputs = server.run(graph)
    assert len(outputs["kept"]["images"]) == 1
    assert "latent" not in outputs  # what needs the latents does not run


REFUSED = {
    "PCPOScoreImages": {
        "the batch is empty": scoring(count=0),
        "with the prompt '', nor any other of the 6: it holds NaN": scoring(kind="all nan"),
        "the number of channels of the images is 1": scoring(kind="grey"),
        "there are 2 prompts (lines) for 6 images": scoring(prompt="a\nb"),
        "the reward 'scene' judges images by their prompt": scoring("scene"),
        "image 0 with the prompt 'a cat', nor any other of the 6: cannot read 'a cat'": scoring(
            "scene", prompt="a cat"
        ),
    },
    "PCPOReward": {
        "has no option 'qualty'; it has quality, divisor": scoring(options='{"qualty": 50}'),
        "the options 'quality=50' are not a JSON object": scoring(options="quality=50"),
        "failed: quality is 0; a JPEG's is a whole number": scoring(options='{"quality": 0}'),
    },
    "PCPOBestOfN": {
        "the best 7 of 6 images cannot be kept; lower n to 6": best_of(7),
        "there are 5 latents for 6 images": best_of(
            2, latents=("fewer", 1), fewer=node("ProbeImages", kind="rows", count=5)
        ),
    },
    "PCPOCombineRewards": {
        "the number of weights is 2 and the number of rewards is 1": scoring()
        | {
            "sum": node(
                "PCPOCombineRewards", weights="1, 2", **{"rewards.reward_0": ["reward", 0]}
            ),
            "score": node("PCPOScoreImages", images=["images", 0], reward=["sum", 0], prompt=""),
        },
    },
}


@pytest.mark.parametrize(
    ("kind", "said"), [(kind, said) for kind, cases in REFUSED.items() for said in cases]
)
def test_bad_input_is_one_sentence_at_its_node(server, kind, said):
    graph = {k: n for k, n in REFUSED[kind][said].items() if k != "saved"}  # it refuses some too
    at, text = server.refusal(graph)
    assert at == kind
    assert said in text
    assert "\n" not in text


def test_interrupt_between_chunks(server):
    graph = scoring(count=200) | {"reward": node("ProbeReward")}
    prompt_id = server.start(graph)
    deadline = time.monotonic() + TIMEOUT
    while "slow reward called" not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.ask("/interrupt", {})
    outputs, messages = server.finish(prompt_id)
    assert "execution_interrupted" in messages
    assert "score" not in outputs
    chunks = server.log.read_text().count("slow reward called")
    assert chunks <= 8  # of 25; two on a quiet machine
