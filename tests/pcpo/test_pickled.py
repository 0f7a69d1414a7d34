"""Files that torch has pickled: their tensors are read, and nothing that is in them is run."""

from __future__ import annotations

import argparse
import builtins
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo.pretrained.pickled import load_pickled
from comfyui_pcpo.pcpo.pretrained.read import BrokenWeights, tensors_of
from comfyui_pcpo.trainers.families.errors import ModelError
from comfyui_pcpo.trainers.families.weights import header_of_pickle, unpickle

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(2, dtype=torch.half)}


@pytest.fixture
def lightning(tmp_path, monkeypatch):
    """A checkpoint as Lightning writes it, whose package is not installed where it is read."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    for each, base in (("ModelCheckpoint", object), ("AttributeDict", dict)):
        setattr(module, each, type(each, (base,), {"__module__": module.__name__}))
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    callback = module.ModelCheckpoint()
    callback.best_model_path, callback.best_model_score = Path("x.ckpt"), torch.tensor(0.5)
    settings = module.AttributeDict(lr=np.float64(1e-4), betas=(0.9, 0.99))
    settings["model"] = argparse.Namespace(layers=[1, 2])
    content = {
        "epoch": 3,
        "state_dict": WEIGHTS,
        "callbacks": {module.ModelCheckpoint: {"best": callback, "score": np.float32(1.5)}},
        "hyper_parameters": settings,
        "counts": Counter("abc"),
        "loops": defaultdict(list, {"a": [callback]}),
    }
    torch.save(content, tmp_path / "lightning.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "lightning.ckpt"


def same(found):
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in WEIGHTS.items())


def test_the_weights_of_a_checkpoint_of_lightning_are_read(lightning):
    same(unpickle(lightning))
    same(tensors_of(lightning))
    assert header_of_pickle(lightning).shapes == {"a.weight": (2, 3), "b.bias": (2,)}
    assert load_pickled(lightning)["epoch"] == 3


def test_what_is_left_out_is_said(lightning, caplog):
    with caplog.at_level("INFO"):
        unpickle(lightning)
    assert "lightning.ckpt holds objects that are left out: argparse.Namespace, " in caplog.text


def test_afterwards_torch_refuses_as_before(lightning):
    unpickle(lightning)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(lightning, weights_only=True)


class Calls:
    """What runs a function where it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def bombs(place):
    """One for each way of running something."""
    program = f"open({str(place)!r}, 'w')"
    yield "system", Calls(os.system, f'"{sys.executable}" -c "{program}"')
    for name in ("eval", "exec"):
        yield name, Calls(getattr(builtins, name), program)
    yield "open", Calls(open, str(place), "w")
    yield "popen", Calls(subprocess.Popen, [sys.executable, "-c", program])
    yield "touch", Calls(Path.touch, place)
    yield "import", Calls(builtins.__import__, "antigravity")
    yield "getattr", Calls(getattr, place, "touch")
    yield "attributes", Calls(setattr, place, "x", 1)
    yield "nested", Calls(torch.load, place)


@pytest.mark.parametrize("name", [name for name, _ in bombs(Path("x"))])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("is_zip", [True, False])
def test_nothing_in_a_file_is_run(tmp_path, name, protocol, is_zip):
    place, file = tmp_path / "ran", tmp_path / "bomb.ckpt"
    bomb = dict(bombs(place))[name]
    torch.save(
        {"state_dict": WEIGHTS, "bomb": bomb},
        file,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=is_zip,
    )
    before = set(sys.modules)
    for read, error in ((unpickle, ModelError), (tensors_of, BrokenWeights)):
        try:
            same(read(file))
        except error as refused:
            said = str(refused)
            assert "weights_only" not in said and "python" not in said and ".safetensors" in said
    assert not place.exists()
    assert "antigravity" not in set(sys.modules) - before


def test_a_file_that_swells_is_not_read(tmp_path):
    small = tmp_path / "small.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1 << 22)}}, small)
    with (
        zipfile.ZipFile(small) as old,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for part in old.namelist():
            new.writestr(part, old.read(part))
    with pytest.raises(ModelError, match="many times its own size"):
        unpickle(tmp_path / "bomb.ckpt")
    with pytest.raises(BrokenWeights, match="many times its own size"):
        tensors_of(tmp_path / "bomb.ckpt")


def test_a_damaged_file_is_to_be_downloaded_again(tmp_path):
    torch.save({"state_dict": WEIGHTS}, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    for cut in (len(whole) // 2, len(whole) - 30):
        (tmp_path / "a.ckpt").write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="download it again") as caught:
            unpickle(tmp_path / "a.ckpt")
        assert "trust" not in str(caught.value)
