"""tokenizer.json as GGUF's metadata: byte-level BPE ("gpt2") and BPE over words with byte fallback ("llama").

What cannot be said in GGUF without changing how text is cut is left out: the file then takes token ids only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.checkpoint.files import LARGEST_TOKENIZER, parse_object, read_bytes, read_optional_object
from hasten.checkpoint.gguf.container import Value
from hasten.checkpoint.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LLAMA3 = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
PRE_TOKENIZERS = {LLAMA3: "llama-bpe", LLAMA3.replace("{1,3}", ""): "qwen2", None: "gpt-2"}
"""Regular expression that cuts text into words -> llama.cpp's name for it; None: ByteLevel's own."""


def vocabulary(directory: Path, size: int) -> dict[str, Value]:
    """Metadata for the tokenizer in `directory`, padded to `size` tokens; of ids alone where there is none to say."""
    prefix = "tokenizer.ggml."
    none: dict[str, Value] = {f"{prefix}model": "no_vocab"}
    if not (directory / "tokenizer.json").exists():
        return none
    stated = parse_object(read_bytes(directory / "tokenizer.json", LARGEST_TOKENIZER), "tokenizer.json")
    model = stated.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        return none
    Tokenizer(directory, size)  # raises CheckpointError where ids or merges make no sense
    found = _byte_fallback(stated) if model.get("byte_fallback") else _byte_level(stated)
    if found is None:
        return none
    tokens, types = _tokens(stated, size)
    config = read_optional_object(directory / "tokenizer_config.json")
    ids = {token: i for i, token in enumerate(tokens)}
    if "scores" in found:
        found["scores"] = [float(found["scores"].get(token, 0.0)) for token in tokens]
    made: dict[str, Value] = {f"{prefix}{key}": value for key, value in found.items()}
    made |= {f"{prefix}tokens": tokens, f"{prefix}token_type": types}
    for name in ("bos", "eos", "unk"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            made[f"{prefix}{'unknown' if name == 'unk' else name}_token_id"] = ids[token]
    made[f"{prefix}add_bos_token"] = _begins_with_special(stated)
    if isinstance(config.get("chat_template"), str):
        made["tokenizer.chat_template"] = config["chat_template"]
    return made


def _byte_level(stated: dict[str, Any]) -> dict[str, Any] | None:
    """BPE over bytes written as characters, cut by a regular expression that llama.cpp knows."""
    steps = stated.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if not steps or steps[-1].get("type") != "ByteLevel" or stated.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    splits = [s for s in steps[:-1] if s.get("type") == "Split"]
    if len(splits) != len(steps) - 1 or len(splits) > 1:
        return None
    expression = splits[0].get("pattern", {}).get("Regex") if splits else None
    if expression not in PRE_TOKENIZERS or bool(splits) == bool(steps[-1].get("use_regex", True)):
        return None
    return {"model": "gpt2", "pre": PRE_TOKENIZERS[expression], "merges": _merges(stated["model"])}


def _byte_fallback(stated: dict[str, Any]) -> dict[str, Any]:
    """SentencePiece's way: the pair whose token scores highest is merged first, so a merge's rank becomes a score."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(_merges(stated["model"])):
        scores.setdefault("".join(merge.split(" ", 1)), -float(rank))
    steps = stated.get("normalizer") or {}
    prefixed = any(step.get("type") == "Prepend" for step in steps.get("normalizers", [steps]))
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefixed}


def _begins_with_special(stated: dict[str, Any]) -> bool:
    steps = stated.get("post_processor") or {}
    steps = steps.get("processors", [steps])
    return any("SpecialToken" in step["single"][0] for step in steps if step.get("single"))


def _merges(model: dict[str, Any]) -> list[str]:
    """Pairs as "left right"; tokenizers writes them so, or as lists."""
    return [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]


def _tokens(stated: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Each id's token and its type; ids without one are unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    fallback = bool(stated["model"].get("byte_fallback"))
    for token, i in stated["model"]["vocab"].items():
        is_byte = fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[i], types[i] = token, BYTE if is_byte else NORMAL
    for added in stated.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    unknown = stated["model"].get("unk_token")
    if fallback and unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    return tokens, types
