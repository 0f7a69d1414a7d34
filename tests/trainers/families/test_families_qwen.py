"""Qwen3-4B: its files in every layout, what is read of it, its templates and its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from comfyui_pcpo.tests.fixtures import qwen_fixture as fixture
from comfyui_pcpo.trainers.families import ModelError
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.families.files import Files
from comfyui_pcpo.trainers.families.header import Header
from comfyui_pcpo.trainers.families.parts import judge_files
from comfyui_pcpo.trainers.families.source import Source
from comfyui_pcpo.trainers.families.text import tokenizers
from comfyui_pcpo.trainers.families.text.files import encoders_in
from comfyui_pcpo.trainers.families.text.header import SIZES, encoders_of_file, find_encoders
from comfyui_pcpo.trainers.families.text.qwen import (
    Qwen3,
    Reading,
    is_read,
    qwen_from_files,
    qwen_from_folder,
)
from comfyui_pcpo.trainers.families.text.tokenizers import qwen_tokenizer
from comfyui_pcpo.trainers.families.weights import Weights, open_weights
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

PLAIN = Reading("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", (-2,), is_padded=False)
SEVERAL = Reading("<|im_start|>{}<think>", (1, 2, 3), is_padded=True)
PROMPT = "a (red:1.2) {circle}"
SAVED = "text_encoders.qwen3_4b.transformer."


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return fixture.tiny_qwen()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return fixture.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def load(path: Path, tokenizer: Path | None, reading: Reading = PLAIN) -> Qwen3:
    places = encoders_in(open_weights(path))
    return qwen_from_files(places, reading, tokenizer, torch.float32)


def states(model: Qwen3ForCausalLM, ids: list[int], length: int = 0) -> tuple[torch.Tensor, ...]:
    row = torch.tensor([[*ids, *[256] * (length - len(ids))]])
    mask = (torch.arange(row.shape[1]) < len(ids))[None].long()
    with torch.no_grad():
        return model.model(row, attention_mask=mask, output_hidden_states=True).hidden_states


def test_full_size_is_recognised_by_its_shapes():
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    tensors = {k: t for k, t in model.state_dict().items() if k != "lm_head.weight"}
    assert sum(t.numel() for t in tensors.values()) == SIZES["qwen3_4b"]
    for prefix in ("", SAVED):
        shapes = {prefix + key: tuple(t.shape) for key, t in tensors.items()}
        assert find_encoders(Header("x", shapes)) == {"qwen3_4b": f"{prefix}model."}
    read = [key for key in tensors if is_read(Reading("{}", (9, 18, 27), True), 36)(key)]
    assert sum(tensors[key].numel() for key in read) == 3_114_088_192  # layers 0 to 26
    read = [key for key in tensors if is_read(PLAIN, 36)(key)]
    assert "model.layers.34.mlp.up_proj.weight" in read and len(read) == 35 * 11 + 1


def test_a_prompt_in_its_template_without_padding(model, tokenizer, tmp_path):
    qwen = load(fixture.write_file(model, tmp_path / "qwen.safetensors"), tokenizer)
    text = PLAIN.template.format(PROMPT)
    ids = qwen.tokenizer(text).input_ids
    assert ids[0] == 257 and ids.count(258) == 1 and qwen.count(PROMPT) == len(ids)
    found = qwen.encode(PROMPT)
    assert found.shape == (len(ids), fixture.WIDTH) and found.dtype == torch.float32
    torch.testing.assert_close(found, states(model, ids)[-2][0], atol=1e-6, rtol=1e-6)
    assert qwen.width == fixture.WIDTH and len(qwen.model.layers) == 3


def test_several_layers_and_padding_that_is_attended_to(model, tokenizer, tmp_path):
    qwen = load(fixture.write_file(model, tmp_path / "qwen.safetensors"), tokenizer, SEVERAL)
    found, ids = qwen.encode(PROMPT), qwen.tokenizer(SEVERAL.template.format(PROMPT)).input_ids
    expected = states(model, ids, 512)
    assert found.shape == (512, 3 * fixture.WIDTH) == (512, qwen.width)
    torch.testing.assert_close(found, torch.cat(expected[1:4], -1)[0], atol=1e-6, rtol=1e-6)
    assert found[-1].abs().max() > 0


@pytest.mark.parametrize("layout", ["comfyui", "folder", "shards", "fp8"])
def test_layouts_give_the_same_states(model, tokenizer, tmp_path, layout):
    plain = load(fixture.write_file(model, tmp_path / "qwen.safetensors"), tokenizer)
    expected = plain.encode(PROMPT)
    if layout == "comfyui":
        qwen = load(fixture.write_file(model, tmp_path / "all.safetensors", SAVED), tokenizer)
    elif layout == "fp8":
        path = tmp_path / "qwen_3_4b_fp8_scaled.safetensors"
        save_file(fixture.scaled_fp8(fixture.tensors(model)), path)
        qwen = load(path, tokenizer)
        assert (qwen.encode(PROMPT) - expected).norm() < 0.2 * expected.norm()
        return
    else:
        size = "1MB" if layout == "folder" else "20KB"
        model.save_pretrained(tmp_path / "text_encoder", max_shard_size=size)
        files = [*(tmp_path / "text_encoder").glob("*.safetensors")]
        assert (len(files) > 1) == (layout == "shards")
        shutil.copytree(tokenizer, tmp_path / "tokenizer")
        qwen = qwen_from_folder(tmp_path, PLAIN, torch.float32)
    assert qwen.encode(PROMPT).equal(expected)


def test_only_the_layers_that_are_needed_are_read(model, tokenizer, tmp_path, monkeypatch):
    path, read = fixture.write_file(model, tmp_path / "qwen.safetensors"), []
    under = Weights.under
    monkeypatch.setattr(
        Weights,
        "under",
        lambda self, *args: read.extend(self.header.shapes) or under(self, *args),
    )
    load(path, tokenizer)
    assert {key.split(".")[2] for key in read if ".layers." in key} == {"0", "1", "2"}
    assert "model.norm.weight" not in read
    load(path, tokenizer, Reading("{}", (1,), is_padded=False))
    assert len([key for key in read if ".layers.0." in key]) == 22


def test_an_encoder_of_too_few_layers_is_refused(model, tokenizer, tmp_path):
    path = fixture.write_file(model, tmp_path / "qwen.safetensors")
    with pytest.raises(ModelError, match="has 4 layers, and layer 27 is read: choose Qwen3-4B"):
        load(path, tokenizer, Reading("{}", (9, 18, 27), is_padded=True))


def test_a_folders_chat_template_is_not_used(model, tokenizer, tmp_path):
    path = fixture.write_file(model, tmp_path / "qwen.safetensors")
    other = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    about = json.loads((other / "tokenizer_config.json").read_text())
    about["chat_template"] = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    (other / "tokenizer_config.json").write_text(json.dumps(about))
    assert load(path, other).encode(PROMPT).equal(load(path, tokenizer).encode(PROMPT))


def test_a_prompt_that_is_too_long_is_cut_and_logged(model, tokenizer, tmp_path, caplog):
    qwen = load(fixture.write_file(model, tmp_path / "qwen.safetensors"), tokenizer)
    assert len(qwen.encode("a" * 600)) == 512
    assert "tokens cut to 512 for Qwen3-4B: aaa" in caplog.text


@pytest.mark.parametrize(
    ("width", "more", "match"),
    [
        (4096, ("q_norm.weight",), "holds Qwen3-8B: Z-Image and FLUX.2 .klein. 4B take Qwen3-4B"),
        (1024, ("q_norm.weight",), "holds Qwen3-0.6B"),
        (3584, ("q_proj.bias",), "holds Qwen2.5"),
        (2304, (), "holds a language model that is no Qwen3"),
    ],
)
def test_relatives_are_refused_by_name(width, more, match):
    shapes = {"model.layers.0.post_attention_layernorm.weight": (width,)}
    shapes |= {f"model.layers.0.self_attn.{name}": (128,) for name in more}
    with pytest.raises(ModelError, match=match):
        encoders_of_file(Header("file", shapes))
    shapes["model.visual.blocks.0.norm1.weight"] = (8,)
    with pytest.raises(ModelError, match="holds Qwen-VL"):
        encoders_of_file(Header("file", shapes))


def test_a_model_that_does_not_take_it_says_so(model, tmp_path, monkeypatch):
    qwen = fixture.write_file(model, tmp_path / "qwen.safetensors")
    network = tmp_path / "sd3.safetensors"
    save_file({"vae.decoder.conv_in.weight": torch.zeros(1, 16)}, network)
    with pytest.raises(ModelError, match=r"holds Qwen3-4B, which SD3\.5 does not take"):
        judge_files(Files(network, (qwen,)), Source(network, "safetensors", "sd3"))


def test_where_the_tokenizer_is(tokenizer, tmp_path, monkeypatch):
    assert len(qwen_tokenizer(None, tmp_path / "none", tokenizer)) == 261
    monkeypatch.setattr(tokenizers, "try_to_load_from_cache", lambda *names: None)
    with pytest.raises(ModelError, match=r"Qwen3's tokenizer was not found: .*qwen25_tokenizer"):
        qwen_tokenizer(tmp_path)
    asked = []
    monkeypatch.setattr(
        tokenizers,
        "try_to_load_from_cache",
        lambda *names: asked.append(names) or str(tokenizer / "tokenizer.json"),
    )
    assert len(qwen_tokenizer()) == 261 and asked == [("Qwen/Qwen3-4B", "tokenizer.json")]
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        qwen_tokenizer(tmp_path)
    network = tmp_path / "x.safetensors"
    with pytest.raises(
        ModelError, match=r"qwen_tokenizer is .*, where there is no tokenizer\.json"
    ):
        judge_files(
            Files(network, qwen_tokenizer=tmp_path / "none"), Source(network, "pickle", "sd3")
        )


def test_prompts_of_different_lengths_are_padded_when_they_are_joined():
    short = Embeds(torch.ones(1, 32, 2), lengths=torch.tensor([10]))
    long = Embeds(torch.ones(1, 64, 2), lengths=torch.tensor([40]))
    same = Embeds.concatenate([short, short])
    assert not same.is_ragged and same.tokens.shape == (2, 32, 2)
    both = Embeds.concatenate([short, long]).to(torch.bfloat16)
    assert both.is_ragged and both[[0]].is_ragged and both.tokens.shape == (2, 64, 2)
    assert both.lengths.tolist() == [10, 40] and both.lengths.dtype == torch.int64
    assert both.tokens[0, 32:].abs().max() == 0 and both.nbytes == 2 * 64 * 2 * 2 + 16
    assert both[[1]].expand(3).lengths.tolist() == [40, 40, 40]
