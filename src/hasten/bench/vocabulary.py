"""A tokenizer for random weights: so many tokens of printable text, so that servers have something to write."""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path

LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
END = "<|end|>"


def write_tokenizer(folder: Path, size: int) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE of `size` tokens, the last of which ends a text.

    After the bytes come words of two, three ... letters, each merged from the word before its last letter.
    """
    vocabulary = {character: i for i, character in enumerate(_bytes()[: size - 1])}
    merges = []
    for length in itertools.count(2):
        for letters in itertools.product(LETTERS, repeat=length):
            if len(vocabulary) == size - 1:
                break
            word = "".join(letters)
            vocabulary[word] = len(vocabulary)
            merges.append([word[:-1], word[-1]])
        else:
            continue
        break
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": size - 1, "content": END, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document = {
        "version": "1.0",
        "added_tokens": [{**end, **flags}],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}), encoding="utf-8")


def _bytes() -> list[str]:
    """The characters by which byte-level BPE (GPT-2) writes the 256 bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [256 + n for n in range(256 - len(plain))]
    return [chr(c) for c in (*plain, *others)]
