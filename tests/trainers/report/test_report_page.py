"""The page of a run: whole, safe and the same numbers, however little there is to show."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import comfyui_pcpo
import pytest
from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.report import page as report_page
from comfyui_pcpo.trainers.report import page_images
from comfyui_pcpo.trainers.report.page import write_page

JOB = {
    "config": {
        "method": {"credit": "proportionate", "objective": "ppo"},
        "rewards": {"scene": 1.0},
    },
    "versions": {"torch": "2.11.0"},
    "inputs": {"base": "sha256:0"},
}
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script> & {{charts}} {{data}}",
    "\"quotes\" 'and' \\ \u2028 \u2029 \u00e9\u4e2d",
]


class Page(HTMLParser):
    """The elements of a page, and the text inside each script."""

    def __init__(self, file: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data

    @property
    def data(self) -> dict:
        found = [i for i, (_, a) in enumerate(self.scripted()) if a.get("id") == "data"]
        return json.loads(self.scripts[found[0]])

    def scripted(self):
        return [element for element in self.elements if element[0] == "script"]


def add_samples(folder: JobFolder, iteration: int, prompts: list[str], reward: float = 0.5) -> None:
    place = folder.samples / f"{iteration:05}"
    place.mkdir(parents=True)
    for i in range(len(prompts)):
        (place / f"{i:03}.png").write_bytes(image(iteration, i))
    scores = [{"prompt": p, "reward": reward} for p in prompts]
    (place / "scores.json").write_text(json.dumps(scores), encoding="utf-8")


def image(iteration: int, row: int) -> bytes:
    return b"\x89PNG" + bytes([iteration % 256, row, 0, 255]) * 7


def line(iteration: int, **more) -> dict:
    return {"iteration": iteration, "reward": 0.1 * iteration, "grad_norm": 1.0, **more}


@pytest.fixture
def folder(tmp_path) -> JobFolder:
    folder = JobFolder(tmp_path / "job")
    write_json(folder.root / "job.json", JOB)
    return folder


def page_of(folder: JobFolder) -> Page:
    return Page(write_page(folder))


def test_the_numbers_are_those_of_the_run(folder):
    lines = [
        line(i, held_out=0.7, log_ratio_histogram=[i] * 22, grad_norms=[0.5, 1.5]) for i in (1, 2)
    ]
    for each in lines:
        folder.add_metrics(each)
    folder.status("running", iteration=2, of=5)
    data = page_of(folder).data
    assert [{k: v for k, v in x.items() if "variance" not in k} for x in data["metrics"]] == lines
    assert data["measured"] == {"count": 2, "width": 1}
    assert (data["config"], data["versions"]) == (JOB["config"], JOB["versions"])
    assert data["environment"] == {"inputs": JOB["inputs"]}  # all else that the job says
    assert data["summary"] | {"iteration": 2, "of": 5, "after": 0.7} == data["summary"]
    assert data["status"]["state"] == "running"


def test_a_taste_s_distance_is_drawn(folder):
    folder.add_metrics(line(1, distance_taste=1.5, outside_taste=0.75, votes_taste=40))
    page = page_of(folder)
    assert page.data["metrics"][0]["distance_taste"] == 1.5
    assert "function tasteCurves(metrics)" in page.scripts[-1]
    assert "of tasteCurves(data.metrics)" in page.scripts[-1]


def test_images_are_inside_unchanged_and_with_their_scores(folder):
    prompts = ["a red ball", "a blue box"]
    add_samples(folder, 0, prompts, reward=0.25)
    add_samples(folder, 10, prompts, reward=0.75)
    data = page_of(folder).data
    samples = data["samples"]
    assert samples["prompts"] == prompts
    assert [c["iteration"] for c in samples["columns"]] == [0, 10]
    for column in samples["columns"]:
        decoded = [base64.b64decode(text, validate=True) for text in column["images"]]
        assert decoded == [image(column["iteration"], row) for row in (0, 1)]
    assert [c["rewards"] for c in samples["columns"]] == [[0.25] * 2, [0.75] * 2]
    assert data["summary"]["before"] == 0.25


def test_the_reward_before_is_in_the_last_message_where_the_base_has_no_samples(folder):
    add_samples(folder, 4, ["a prompt"])
    for message in ("held-out reward 0.389 -> 0.633", "0.389 -> 0.633"):
        folder.status("done", message=message)
        assert page_of(folder).data["summary"]["before"] == 0.389
    folder.status("failed", message="RewardError: 3 -> is no number")
    assert page_of(folder).data["summary"]["before"] is None


def test_hostile_prompts_are_text(folder):
    clean = page_of(folder)
    add_samples(folder, 1, HOSTILE)
    page = page_of(folder)
    assert page.data["samples"]["prompts"] == HOSTILE
    assert page.elements == clean.elements  # nothing in a prompt became an element
    script = page.text.split('id="data">')[1].split("</script>")[0]
    assert not re.search("[<>&\u2028\u2029]", script)


def test_the_title_is_text_too(tmp_path):
    page = page_of(JobFolder(tmp_path / "a <b> & {{charts}}"))
    assert "<title>PCPO report: a &lt;b&gt; &amp; {{charts}}</title>" in page.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_becomes_null(folder, value):
    lines = [  # as earlier versions wrote them
        line(1, held_out=value, seconds=value, images_per_second=value),
        line(2, grad_norms=[value, 1.0], kl=value),
    ]
    text = "".join(json.dumps(each) + "\n" for each in lines)
    folder.metrics_file.write_text(text, encoding="utf-8")
    add_samples(folder, 0, ["a prompt"], reward=value)
    data = page_of(folder).data
    assert data["metrics"][0]["held_out"] is data["metrics"][1]["kl"] is None
    assert data["metrics"][1]["grad_norms"] == [None, 1.0]
    assert data["samples"]["columns"][0]["rewards"] == [None]
    assert set(data["summary"].values()) == {None, 2}  # 2: the iteration


def test_a_folder_with_nothing_in_it(tmp_path):
    data = page_of(JobFolder(tmp_path)).data
    assert data["metrics"] == [] and data["status"] == {} and data["config"] == {}
    assert data["samples"]["columns"] == data["samples"]["prompts"] == []


def test_unfinished_samples_are_left_out_and_missing_images_said(folder):
    add_samples(folder, 1, ["a", "b"])
    add_samples(folder, 2, ["a", "b"])
    (folder.samples / "00001" / "001.png").unlink()
    (folder.samples / "00002" / "scores.json").unlink()
    add_samples(folder, 3, ["a", "b"])
    (folder.samples / "00003" / "scores.json").write_text('[{"prompt": "a", "rew')
    (folder.samples / "not an iteration").mkdir()
    (columns,) = page_of(folder).data["samples"]["columns"]
    assert columns["iteration"] == 1
    assert columns["images"][0] and columns["images"][1] is None


def test_the_grid_is_capped_evenly_with_the_first_and_the_last_in_it(folder):
    prompts = [f"prompt {i}" for i in range(20)]
    for iteration in range(0, 40, 2):
        add_samples(folder, iteration, prompts)
    samples = page_of(folder).data["samples"]
    chosen = [column["iteration"] for column in samples["columns"]]
    assert len(chosen) == 8 and chosen[0] == 0 and chosen[-1] == 38
    assert {b - a for a, b in pairwise(chosen)} <= {4, 6}
    assert samples["prompts"] == prompts[:16]
    assert all(len(c["images"]) == len(c["rewards"]) == 16 for c in samples["columns"])
    assert (samples["prompts_kept"], samples["iterations_kept"]) == (20, 20)


def test_large_images_cost_rows_but_never_the_first(folder, monkeypatch):
    for iteration in (0, 1):
        add_samples(folder, iteration, ["a", "b", "c", "d"])
    monkeypatch.setattr(page_images, "MAX_IMAGE_BYTES", 2 * 2 * 32)  # two rows of two images
    assert page_of(folder).data["samples"]["prompts"] == ["a", "b"]
    monkeypatch.setattr(page_images, "MAX_IMAGE_BYTES", 1)
    assert page_of(folder).data["samples"]["prompts"] == ["a"]


def variances(folder: JobFolder, *lines: dict) -> list[float | None]:
    folder.cut_metrics(0)
    for each in lines:
        folder.add_metrics(each)
    return [each.get("grad_norm_variance") for each in page_of(folder).data["metrics"]]


def test_variance_of_the_gradient_norm(folder):
    assert variances(folder, line(1), line(2, grad_norm=3.0)) == [None, 1.0]
    # of the updates, where they are there: 1, 3, 5 have the variance 8/3
    norms = [line(1, grad_norms=[1.0, 3.0]), line(2, grad_norms=[5.0])]
    assert variances(folder, *norms) == [1.0, pytest.approx(8 / 3)]
    # a trailing window: the outlier of the first iteration leaves it
    lines = [line(1, grad_norm=100.0), *(line(i) for i in range(2, 13))]
    found = variances(folder, *lines)
    assert found[9] > 1 and found[10:] == [0.0, 0.0]
    assert variances(folder, line(1, grad_norm=math.nan), {"iteration": 2}) == [None, None]


def test_nothing_is_fetched_from_anywhere(folder):
    add_samples(folder, 1, ["a prompt"])
    page = page_of(folder)
    assert set(re.findall(r"https?://[^\"'\s]*", page.text)) == {"http://www.w3.org/2000/svg"}
    assert "{{" not in page.text  # every placeholder is filled
    for tag, attributes in page.elements:
        for name in {"src", "href", "srcset", "action", "poster"} & set(attributes):
            assert attributes[name].startswith("data:"), (tag, attributes)
    assert not re.search(r"@import|url\(|\bfetch\(|\bimport\b\s*[\"'{*(]", page.text)
    (policy,) = [a["content"] for _, a in page.elements if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    for function in ("lineChart", "barChart"):
        assert f"export function {function}(" in page.scripts[-1]


def test_every_element_that_the_script_asks_for_is_there(folder):
    page = page_of(folder)
    asked = set(re.findall(r"""(?:\$|getElementById)\("([\w-]+)"\)""", page.scripts[-1]))
    assert asked and asked <= {attributes.get("id") for _, attributes in page.elements}


def test_the_page_is_replaced_whole_or_not_at_all(folder, monkeypatch):
    file = write_page(folder)
    assert file == folder.report / "report.html"
    old = file.read_text(encoding="utf-8")
    folder.add_metrics(line(1))

    def crash(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            write_page(folder)
    assert file.read_text(encoding="utf-8") == old
    assert list(folder.report.iterdir()) == [file]
    assert write_page(folder).read_text(encoding="utf-8") != old


def test_it_is_written_without_torch(folder):
    script = (
        "import sys; from pathlib import Path\n"
        "from comfyui_pcpo.trainers.job.folder import JobFolder\n"
        "from comfyui_pcpo.trainers.report.page import write_page\n"
        "write_page(JobFolder(Path(sys.argv[1])))\n"
        "print(*{'torch', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, str(folder.root)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""


def test_the_files_it_is_made_of_are_in_the_package():
    root = Path(comfyui_pcpo.__path__[0])
    assert report_page.TEMPLATE.is_file() and report_page.TEMPLATE.is_relative_to(root)
    for file in (report_page.CHARTS, *report_page.CURVES):
        assert file.is_file() and file.is_relative_to(root)
