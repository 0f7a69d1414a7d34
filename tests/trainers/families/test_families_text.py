"""Text encoders: which one a file holds, every layout it may have, and where tokenizers are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_pcpo.tests.fixtures import sd3_fixture as fixture
from comfyui_pcpo.trainers.families import ModelError
from comfyui_pcpo.trainers.families.header import Header
from comfyui_pcpo.trainers.families.text import files as text_file
from comfyui_pcpo.trainers.families.text import tokenizers
from comfyui_pcpo.trainers.families.text.header import encoders_of_file, find_encoders
from comfyui_pcpo.trainers.families.text.tokenizers import clip_tokenizer, t5_tokenizer
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

PROMPTS = ["a red circle left of a blue square", ""]

# The published encoders: architecture, and number of parameters with the projection.
CLIPS = {
    kind: CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    for kind, width, layers in (("clip_l", 768, 12), ("clip_g", 1280, 32))
}
PARAMETERS = {"clip_l": 123_650_304, "clip_g": 694_659_840, "t5": 4_762_310_656}
T5_XXL = T5Config(
    vocab_size=32128,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return fixture.write_t5_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def header(tensors: dict[str, torch.Tensor], prefix: str = "") -> Header:
    return Header("file", {prefix + key: tuple(t.shape) for key, t in tensors.items()})


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("layout", [fixture.original_clip, fixture.open_clip])
def test_full_size_clip_is_recognised_by_its_shapes(kind, layout):
    config = CLIPS[kind]
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[kind]
    tensors = layout(model)
    for prefix in ("", "transformer.", "conditioner.embedders.2.model."):
        assert find_encoders(header(tensors, prefix)) == {kind: prefix}
    named = text_file.clip_names(tensors)
    assert named.keys() == model.state_dict().keys()
    assert all(named[key].shape == t.shape for key, t in model.state_dict().items())
    encoder = text_file.load_clip(tensors, clip_tokenizer(kind), kind, "x", is_projected=True)
    told = encoder.model.config
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "projection_dim"):
        assert getattr(told, field) == getattr(config, field)
    assert told.hidden_act == {"clip_l": "quick_gelu", "clip_g": "gelu"}[kind]
    assert (encoder.width, encoder.pooled_width) == (config.hidden_size, config.hidden_size)


def test_full_size_t5_is_recognised_by_its_shapes(tokenizer):
    with torch.device("meta"):
        model = T5EncoderModel(T5_XXL)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS["t5"]
    tensors = fixture.original_t5(model)
    assert find_encoders(header(tensors, "t5xxl.transformer.")) == {"t5": "t5xxl.transformer."}
    extra = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1), **tensors}
    encoder = text_file.load_t5(extra, t5_tokenizer(tokenizer), "x")
    for field in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "dense_act_fn"):
        assert getattr(encoder.model.config, field) == getattr(T5_XXL, field)
    assert sum(p.numel() for p in encoder.model.parameters()) == PARAMETERS["t5"]


@pytest.mark.parametrize(
    "layout", ["transformers", "without text_model", "OpenCLIP", "old ComfyUI"]
)
def test_layouts_of_clip_give_the_same_states(layout):
    model = fixture.modules("sd3.5-m")["text_encoder_2"]
    plain = fixture.original_clip(model)
    tensors = {
        "transformers": plain | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
        "without text_model": {k.removeprefix("text_model."): t for k, t in plain.items()},
        "OpenCLIP": fixture.open_clip(model),
        "old ComfyUI": {k: t for k, t in plain.items() if k != "text_projection.weight"}
        | {"text_projection": plain["text_projection.weight"].T},
    }[layout]
    tokenizer = clip_tokenizer("clip_g")
    encoder = text_file.load_clip(tensors, tokenizer, "clip_g", "x", is_projected=True)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert ids[1].tolist() == [49406, 49407] + [0] * 75
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
    states = encoder.encode(PROMPTS)
    assert states.last.equal(expected.last_hidden_state)
    assert states.hidden.equal(expected.hidden_states[-2])
    assert states.pooled.equal(expected.text_embeds)
    encoder.is_projected = False
    plain_pooled = encoder.encode(PROMPTS).pooled
    torch.testing.assert_close(model.text_projection(plain_pooled), expected.text_embeds)


def test_other_encoders_are_refused_by_name():
    def refuse(match: str, shapes: dict[str, tuple[int, ...]]) -> None:
        with pytest.raises(ModelError, match=match):
            encoders_of_file(Header("file", shapes))

    refuse("CLIP-H", {"text_model.embeddings.token_embedding.weight": (49408, 1024)})
    refuse(
        r"holds no CLIP, T5 or Qwen3 text encoder \(it begins with model\.a", {"model.a": (2, 2)}
    )
    refuse("begins with nothing", {})


def test_t5_tokenizer_is_looked_for(tmp_path, tokenizer, monkeypatch):
    asked = []

    def cached(repository: str, file: str) -> str | None:
        asked.append((repository, file))
        is_there = file == "tokenizer_2/tokenizer.json"
        return str(tokenizer / "tokenizer.json") if is_there else None

    monkeypatch.setattr(tokenizers, "try_to_load_from_cache", cached)
    ids = t5_tokenizer(tmp_path / "absent", None, tokenizer)("a red square").input_ids
    assert ids == [4, 5, 10, 1] and not asked
    assert t5_tokenizer(None)("a red square").input_ids == ids
    assert asked[0] == ("google/t5-v1_1-xxl", "tokenizer.json")
    assert asked[-1] == ("black-forest-labs/FLUX.1-dev", "tokenizer_2/tokenizer.json")
    monkeypatch.setattr(tokenizers, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(ModelError, match=r"folder of a model.*t5_tokenizer.*google/t5-v1_1-xxl"):
        t5_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        t5_tokenizer(tmp_path)


def test_t5_in_half_precision_keeps_what_overflows_in_float32(tokenizer):
    tensors = fixture.original_t5(fixture.modules("sd3.5-m")["text_encoder_3"])
    half = {key: tensor.half() for key, tensor in tensors.items()}
    encoder = text_file.load_t5(half, t5_tokenizer(tokenizer), "x")
    kept = {k for k, p in encoder.model.named_parameters() if p.dtype == torch.float32}
    assert len(kept) == 2 and all(key.endswith("DenseReluDense.wo.weight") for key in kept)
    full = text_file.load_t5(tensors, t5_tokenizer(tokenizer), "x").encode(PROMPTS, 12)
    states = encoder.encode(PROMPTS, 12)
    assert states.shape == (2, 12, 64) and states.dtype == torch.float32
    torch.testing.assert_close(states, full, rtol=0.02, atol=0.02)
