"""BERTScore against the package bert-score, with the same random weights; files that are wrong."""

from __future__ import annotations

import logging
import os
import pickle
import shutil

import pytest
import torch
from comfyui_pcpo.pcpo.rewards import RewardUnavailable, bert_score
from comfyui_pcpo.pcpo.rewards.bert_score import (
    LAYER,
    LONGEST,
    Bert,
    agreements,
    network_names,
    weight_hashes,
)
from deberta_fixture import LAYERS, save_deberta
from safetensors.torch import load_file
from torch.testing import assert_close

torch.set_num_threads(1)

USED = 2
"""The layer compared in most tests."""

CANDIDATES = [
    "A red fox sits in the snow.",
    "two dogs",
    "A photograph of an astronaut who rides a horse on the moon, under a very dark blue sky",
    "  the image contains a dog  ",
    "",
    "12 × ü ☃ 🐈 [SEP] </s>",
    "   ",
    "horse " * 700,
]
REFERENCES = [
    "The image contains a fox",
    "The image contains two dogs playing chess on a wooden table",
    "The image contains an astronaut",
    "The image contains a dog",
    "The image contains a horse",
    "The image contains ☃ and [CLS] [SEP]",
    "The image contains nothing",
    "The image contains " + "a horse " * 5_000,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_deberta(tmp_path_factory.mktemp("deberta"))


@pytest.fixture(scope="module")
def bert(folder):
    return Bert(folder, "float32", "vlm_bert_score", USED)


@pytest.fixture(scope="module")
def scorer(folder):
    """The reference; it knows neither DeBERTa's limit nor, with transformers 5, empty texts."""
    import bert_score as package

    made = package.BERTScorer(
        model_type=str(folder), num_layers=USED, use_fast_tokenizer=True, device="cpu"
    )
    tokenizer = made._tokenizer
    tokenizer.model_max_length = LONGEST
    ends = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    tokenizer.build_inputs_with_special_tokens = lambda ids: [ends[0], *ids, ends[1]]
    return made


# --- equal to the reference ------------------------------------------------------------------


def test_precision_recall_and_f1_are_those_of_bert_score(bert, scorer):
    expected = torch.stack(scorer.score(CANDIDATES, REFERENCES))
    found = bert.agreements(CANDIDATES, REFERENCES)
    ours = torch.tensor(
        [[a.precision for a in found], [a.recall for a in found], [a.f1 for a in found]]
    )
    assert_close(ours, expected, rtol=0, atol=1e-6)
    assert expected[1].std() > 0.1  # the texts differ in it
    assert ours[:, [4, 6]].eq(0).all()  # the empty ones


def test_a_pair_by_itself_is_the_same_as_among_others(folder, scorer):
    bert = Bert(folder, "float32", "vlm_bert_score", USED)
    for candidate, reference in zip(CANDIDATES[:4], REFERENCES[:4], strict=True):
        expected = scorer.score([candidate], [reference])[1].item()
        assert bert.agreements([candidate], [reference])[0].recall == pytest.approx(
            expected, abs=1e-6
        )


def test_texts_that_come_again_are_not_computed_again(folder, monkeypatch):
    bert, calls = Bert(folder, "float32", "r", USED), []
    embed = Bert._embed
    monkeypatch.setattr(
        Bert, "_embed", lambda self, texts: (calls.extend(texts), embed(self, texts))[1]
    )
    first = bert.agreements(["a fox"] * 3, ["the image contains a fox"] * 3)
    assert first[0] == first[1] == first[2]
    assert bert.agreements(["two dogs"], ["the image contains a fox"])[0].recall < first[0].recall
    assert sorted(calls) == ["a fox", "the image contains a fox", "two dogs"]


def test_few_texts_are_kept(folder, monkeypatch):
    monkeypatch.setattr(bert_score, "_TEXTS_KEPT", 2)
    bert = Bert(folder, "float32", "r", USED)
    texts = ["a", "b", "c", "d"]
    assert len(bert.agreements(texts, texts)) == 4
    assert len(bert._kept) == 2


# --- the traps -------------------------------------------------------------------------------


def pairs(bert):
    texts = bert._read([*CANDIDATES[:3], *REFERENCES[:3]])
    return list(zip(texts[:3], texts[3:], strict=True))


def of_pair(candidate, reference):
    return agreements([candidate], [reference])[0]


def changed(text, units=None, weights=None):
    kind = type(text)
    return kind(
        text.units if units is None else units, text.weights if weights is None else weights
    )


def test_the_ends_can_be_taken_but_have_no_weight(bert):
    right = [of_pair(c, r).recall for c, r in pairs(bert)]
    without = [
        of_pair(changed(c, c.units[c.weights > 0], c.weights[c.weights > 0]), r).recall
        for c, r in pairs(bert)
    ]
    counted = [
        of_pair(c, changed(r, weights=torch.ones_like(r.weights))).recall for c, r in pairs(bert)
    ]
    for wrong in (without, counted):
        assert (torch.tensor(right) - torch.tensor(wrong)).abs().max() > 1e-3


def test_recall_is_not_precision(bert):
    found = [of_pair(c, r) for c, r in pairs(bert)]
    assert max(abs(a.recall - a.precision) for a in found) > 1e-3
    swapped = [of_pair(r, c) for c, r in pairs(bert)]
    assert [a.recall for a in found] == pytest.approx([a.precision for a in swapped])


def test_another_layer_is_another_score(folder, bert):
    right = bert.agreements(CANDIDATES[:3], REFERENCES[:3])
    for layer in (USED - 1, USED + 1):
        wrong = Bert(folder, "float32", "r", layer).agreements(CANDIDATES[:3], REFERENCES[:3])
        assert max(abs(a.recall - b.recall) for a, b in zip(right, wrong, strict=True)) > 1e-3


def test_layers_behind_are_not_in_memory(bert):
    assert len(bert.network.encoder.layer) == USED
    assert not bert.network.training
    assert not any(p.requires_grad for p in bert.network.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 3e-3), ("bfloat16", 3e-2)])
def test_half_precision_is_of_the_network_alone(folder, bert, dtype, tolerance):
    half = Bert(folder, dtype, "r", USED)
    assert {p.dtype for p in half.network.parameters()} == {getattr(torch, dtype)}
    right, found = (b.agreements(CANDIDATES[:3], REFERENCES[:3]) for b in (bert, half))
    for one, other in zip(right, found, strict=True):
        assert one.recall == pytest.approx(other.recall, abs=tolerance)
    units = half._read(["a fox in the snow"])[0].units
    assert units.dtype == torch.float32
    assert_close(units.norm(dim=-1), torch.ones(len(units)), rtol=0, atol=1e-6)


def test_a_text_beyond_the_limit_is_cut_and_said_once(folder, caplog):
    bert = Bert(folder, "float32", "vlm_bert_score", USED)
    with caplog.at_level(logging.WARNING):
        long = bert.agreements(["a fox"], ["fox " * 10_000])[0]
        bert.agreements(["a fox"], ["dog " * 10_000])
    assert len([r for r in caplog.records if "tokens of a prompt at most" in r.message]) == 1
    assert 0 < long.recall <= 1
    assert bert._kept[("fox " * 10_000).strip()].weights.tolist() == [0] + [1] * (LONGEST - 2) + [0]


# --- full size, without its weights ----------------------------------------------------------


def test_every_tensor_of_the_full_file_is_taken_or_known():
    from transformers import DebertaConfig, DebertaForSequenceClassification, DebertaModel

    sizes = {
        **{"vocab_size": 50265, "hidden_size": 1024, "num_attention_heads": 16},
        **{"intermediate_size": 4096, "relative_attention": True, "pos_att_type": "c2p|p2c"},
        **{"position_biased_input": False, "type_vocab_size": 0, "pooler_hidden_size": 1024},
    }
    with torch.device("meta"):
        whole = DebertaForSequenceClassification(DebertaConfig(**sizes, num_hidden_layers=48))
        ours = DebertaModel(DebertaConfig(**sizes, num_hidden_layers=LAYER))
    there = {**whole.state_dict(), "deberta.embeddings.position_ids": torch.zeros(1)}
    assert sum(p.numel() for p in whole.parameters()) == pytest.approx(758e6, rel=0.01)
    found = network_names(there, LAYER)
    wanted = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert {own: tuple(there[name].shape) for own, name in found.items()} == wanted


# --- files that are wrong --------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "deberta")


def recalls(bert):
    return [a.recall for a in bert.agreements(CANDIDATES[:2], REFERENCES[:2])]


def load(folder, layer=USED):
    return Bert(folder, "float32", "vlm_bert_score", layer)


def test_torchs_own_format_is_read_too(copy, bert):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert recalls(load(copy)) == pytest.approx(recalls(bert), abs=1e-6)
    assert list(weight_hashes(copy)) == ["pytorch_model.bin"]
    assert len(weight_hashes(copy)["pytorch_model.bin"]) == 64


def test_too_few_layers(folder):
    with pytest.raises(RewardUnavailable, match=rf"has {LAYERS} layers, and the 40th is wanted"):
        load(folder, LAYER)


def test_a_missing_tensor(copy):
    from safetensors.torch import save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["deberta.encoder.layer.0.output.dense.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(RewardUnavailable, match=r"are not those that its config\.json describes"):
        load(copy)


def test_an_unknown_tensor(copy):
    from safetensors.torch import save_file

    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "vision.patch": torch.zeros(3)}, copy / "model.safetensors")
    with pytest.raises(RewardUnavailable, match=r"a tensor 'vision\.patch', which DeBERTa has not"):
        load(copy)


def test_a_truncated_file(copy):
    raw = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(RewardUnavailable, match=r"model\.safetensors") as error:
        load(copy)
    assert "\n" not in str(error.value)


class Runs:
    """A pickle that would run a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_with_code_is_not_run(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(RewardUnavailable, match=r"pytorch_model\.bin"):
        load(copy)
    torch.save({"deberta.x": Runs(tmp_path / "ran")}, copy / "pytorch_model.bin")
    with pytest.raises(RewardUnavailable, match=r"pytorch_model\.bin"):
        load(copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("gone", [["tokenizer.json"], ["tokenizer_config.json", "merges.txt"]])
def test_a_tokenizer_of_other_files_is_the_same(copy, bert, gone):
    for name in gone:
        (copy / name).unlink()
    assert recalls(load(copy)) == pytest.approx(recalls(bert), abs=1e-6)


def test_a_folder_without_a_tokenizer(copy):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (copy / name).unlink()
    with pytest.raises(RewardUnavailable, match="has no tokenizer that can be read; put tokenizer"):
        load(copy)
