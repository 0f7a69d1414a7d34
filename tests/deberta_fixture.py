"""A tiny DeBERTa with random weights and a vocabulary of its own, as a folder."""

from __future__ import annotations

from pathlib import Path

import torch

CORPUS = [
    "the image contains a red fox that sits in the snow",
    "a photograph of two dogs playing chess on a wooden table",
    "answer concisely what is going on in this image",
    "an astronaut riding a horse on the moon under a blue sky",
]
LAYERS = 4
VOCABULARY = 400


def save_deberta(folder: Path, layers: int = LAYERS, seed: int = 0) -> Path:
    """DeBERTa XLarge MNLI in small: the same kind of network, files and tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import DebertaConfig, DebertaForSequenceClassification, DebertaTokenizer

    torch.manual_seed(seed)
    config = DebertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        relative_attention=True,
        pos_att_type="c2p|p2c",
        position_biased_input=False,
        max_relative_positions=-1,
        type_vocab_size=0,
        layer_norm_eps=1e-7,
        initializer_range=0.3,  # so that vectors of different tokens differ
        pooler_hidden_size=32,
    )
    DebertaForSequenceClassification(config).save_pretrained(folder)
    trained = ByteLevelBPETokenizer()
    marks = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    trained.train_from_iterator(CORPUS * 5, vocab_size=VOCABULARY, special_tokens=marks)
    trained.save_model(str(folder))
    vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    DebertaTokenizer.from_pretrained(folder, vocab=vocabulary, merges=merges).save_pretrained(
        folder
    )
    return folder
