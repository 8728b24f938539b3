"""A GGUF file's tokenizer as tokenizer.json and tokenizer_config.json: the inverse of vocabulary.py.

Read are byte-level BPE ("gpt2") whose way to cut words is known, and SentencePiece's BPE with byte fallback ("llama"),
in which the pair whose token scores highest is merged first. All else is refused: a guess would cut text otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hasten.checkpoint.gguf.vocabulary import CONTROL, LLAMA3, NORMAL, PRE_TOKENIZERS, UNUSED, USER_DEFINED
from hasten.errors import CheckpointError

HINT = "put the model's tokenizer.json beside the GGUF file"
EXPRESSIONS = {name: expression for expression, name in PRE_TOKENIZERS.items()}
DIGITS = "smollm"
"""Digits one by one, then as gpt-2."""
ALIASES = {
    **dict.fromkeys(("llama3", "llama-v3"), "llama-bpe"),
    **dict.fromkeys(("gpt2", "mpt", "olmo"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r"), DIGITS),
    "deepseek-r1-qwen": "qwen2",
}
LONGEST_TOKEN = 1024
MOST_SPLIT = 1 << 28
"""Characters that are cut out of all tokens to find their parts: a hundred times what large vocabularies take."""
SPACE = "\u2581"


def definition(metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json). Raises CheckpointError where the file does not hold what they need."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"a GGUF tokenizer of kind {kind!r} is not read"[:200], HINT)
    tokens, types = _tokens(metadata)
    made = _byte_level(metadata, tokens, types) if kind == "gpt2" else _byte_fallback(metadata, tokens, types)
    special = {
        name: _token(metadata, tokens, key) for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"))
    }
    begins = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or _pre(metadata) == "llama-bpe"))
    ends = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    made |= {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "post_processor": _template(tokens, special["bos"] if begins else None, special["eos"] if ends else None),
    }
    config: dict[str, Any] = {f"{name}_token": token for name, token in special.items() if token is not None}
    template = metadata.get("tokenizer.chat_template")
    return made, config | ({"chat_template": template} if isinstance(template, str) else {})


def _tokens(metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or max(map(len, tokens)) > LONGEST_TOKEN:
        raise CheckpointError("the GGUF file's tokenizer has no tokens, or one of impossible length", HINT)
    types = metadata.get("tokenizer.ggml.token_type")
    types = [NORMAL] * len(tokens) if types is None else np.asarray(types).tolist()
    if len(types) != len(tokens):
        raise CheckpointError(f"the GGUF file's tokenizer has {len(tokens)} tokens and {len(types)} types", HINT)
    known = [t for t, kind in zip(tokens, types, strict=True) if kind != UNUSED]
    if len(set(known)) != len(known):
        raise CheckpointError("the GGUF file's tokenizer has a token twice", HINT)
    return tokens, types


def _pre(metadata: dict[str, Any]) -> str:
    stated = str(metadata.get("tokenizer.ggml.pre", "unstated"))
    return ALIASES.get(stated, stated)


def _byte_level(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    pre = _pre(metadata)
    if pre not in EXPRESSIONS and pre != DIGITS:
        raise CheckpointError(
            f"a GGUF tokenizer that cuts words as '{pre[:80]}' is not read",
            f"read are: {', '.join([*EXPRESSIONS, DIGITS])}; or {HINT}",
        )
    merges = metadata.get("tokenizer.ggml.merges")
    vocabulary = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    if not isinstance(merges, list):
        raise CheckpointError("the GGUF file's tokenizer has no merges", HINT)
    expression = EXPRESSIONS.get(pre)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": expression is None}
    steps: list[dict[str, Any]] = [level]
    if expression is not None:
        steps.insert(0, {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False})
    if pre == DIGITS:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {**_bpe(vocabulary, merges), "ignore_merges": expression == LLAMA3},
    }


def _bpe(vocabulary: dict[str, int], merges: list[str]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _byte_fallback(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),) or not np.isfinite(scores).all():
        raise CheckpointError("the GGUF file's tokenizer has no score for each token", HINT)
    added = {i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED, UNUSED)}
    vocabulary = {t: i for i, t in enumerate(tokens) if i not in added}
    unknown = _token(metadata, tokens, "unknown")
    if unknown is not None:
        vocabulary[unknown] = tokens.index(unknown)
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    restore = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    merges = _merges([t for i, t in enumerate(tokens) if types[i] == NORMAL], vocabulary, scores)
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if prefixed else []), replace],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {**_bpe(vocabulary, merges), "unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
    }


def _merges(tokens: list[str], vocabulary: dict[str, int], scores: Any) -> list[str]:
    """Every way to put a token together from two others, best score first: SentencePiece's order, as ranks."""
    if sum(len(token) ** 2 for token in tokens) > MOST_SPLIT:
        raise CheckpointError("the GGUF file's tokens are too long to be told apart in reasonable time", HINT)
    ranked = []
    for token in tokens:
        score = -float(scores[vocabulary[token]])
        for at in range(1, len(token)):
            left, right = vocabulary.get(token[:at]), vocabulary.get(token[at:])
            if left is not None and right is not None:
                ranked.append((score, left, right, f"{token[:at]} {token[at:]}"))
    ranked.sort()
    return [merge for *_, merge in ranked]


def _token(metadata: dict[str, Any], tokens: list[str], name: str) -> str | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[value] if type(value) is int and 0 <= value < len(tokens) else None


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **flags, "special": types[i] != USER_DEFINED}
        for i, token in enumerate(tokens)
        if types[i] in (2, CONTROL, USER_DEFINED)  # 2: unknown
    ]


def _template(tokens: list[str], bos: str | None, eos: str | None) -> dict[str, Any] | None:
    """A post-processor that puts bos and eos around a text; None for neither."""
    if bos is None and eos is None:
        return None

    def around(sequence: str, kind: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": kind}}]
        if bos is not None:
            parts.insert(0, {"SpecialToken": {"id": bos, "type_id": kind}})
        if eos is not None:
            parts.append({"SpecialToken": {"id": eos, "type_id": kind}})
        return parts

    special = {t: {"id": t, "ids": [tokens.index(t)], "tokens": [t]} for t in (bos, eos) if t is not None}
    single = around("A", 0)
    return {"type": "TemplateProcessing", "single": single, "pair": single + around("B", 1), "special_tokens": special}
