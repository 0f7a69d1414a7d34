"""`pcpo sample`: its images do not depend on how many are drawn at a time."""

from __future__ import annotations

import pytest
import torch
from comfyui_pcpo.trainers.cli import sample_export
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.run.sampler import images_at_once

SMALL = ["--limit", "4", "--steps", "3", "--device", "cpu"]


@pytest.mark.parametrize("scale", ["1", "3"], ids=["plain", "guided"])
@pytest.mark.parametrize("model", ["demo", "demo-flow"])
def test_a_batch_size_changes_no_byte_on_a_cpu(tmp_path, model, scale):
    written = []
    for batch in ("1", "2", "8"):
        out, latents = tmp_path / batch, tmp_path / f"{batch}.safetensors"
        words = ["--model", model, "--guidance-scale", scale, "--batch", batch]
        words += ["--out", str(out), "--latents", str(latents)]
        assert main(["sample", *SMALL, *words]) == 0
        written.append([latents, *sorted(out.glob("*.png"))])
    first = [file.read_bytes() for file in written[0]]
    assert len(first) == 5
    assert [[file.read_bytes() for file in files] for files in written[1:]] == [first] * 2


def test_what_is_said_of_a_gpu_is_rounding():
    assert images_at_once(8, torch.device("cuda")) == 8
    assert images_at_once(8, torch.device("cpu")) == 1
    said = sample_export.SampleArguments.model_fields["batch"].description
    assert said is not None and "only by rounding" in said
