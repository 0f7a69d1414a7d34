"""The demo's tokenizer: CLIP's byte-pair encoding, each word of the grammar one token."""

from __future__ import annotations

import json
from pathlib import Path

from ...pcpo import scenes

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77


def byte_symbols() -> list[str]:
    """A character for each byte, in GPT-2's order: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def merges() -> list[tuple[str, str]]:
    """Pairs that build every word from the left, its last letter carrying the end mark.

    Short words come last: the pairs of "an" would otherwise tear "cyan" apart.
    """
    pairs: dict[tuple[str, str], None] = {}
    for word in sorted(scenes.words(), key=lambda word: (-len(word), word)):
        letters = [*word[:-1], word[-1] + "</w>"]
        built = letters[0]
        for letter in letters[1:]:
            pairs.setdefault((built, letter))
            built += letter
    return list(pairs)


def vocabulary() -> dict[str, int]:
    """Symbols, symbols that end a word, merged pieces, and the two special tokens."""
    symbols = byte_symbols()
    pieces = [first + second for first, second in merges()]
    names = [*symbols, *(symbol + "</w>" for symbol in symbols), *pieces, START, END]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def write(folder: Path, max_length: int = MAX_LENGTH) -> None:
    """Write the files that `CLIPTokenizer.from_pretrained(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "add_prefix_space": False,
        "do_lower_case": True,
        "model_max_length": max_length,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "errors": "replace",
    }
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    (folder / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
