"""Text to tokens and back: tokenizer.json through the `tokenizers` library, with the chat template beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.checkpoint.files import LARGEST_TOKENIZER, read_bytes, read_optional_object, read_text
from hasten.errors import CheckpointError, InputError

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
REPLACEMENT = "\ufffd"
AT_ONCE = 4096
"""Characters that are encoded while other threads wait; for longer texts the library is called as a batch, which alone
lets them go on."""
LONGEST_CHARACTER = 4
"""Bytes of one in UTF-8."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """tokenizer.json, tokenizer_config.json and the chat template of a model directory.

    Raises CheckpointError where a file is missing, cannot be read, or knows tokens that the model does not.
    """

    def __init__(self, path: Path, vocabulary: int | None = None) -> None:
        import tokenizers

        self.path = path
        data = read_bytes(path / "tokenizer.json", LARGEST_TOKENIZER)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            # Its errors are bare Exceptions, and panics of Rust that derive from BaseException.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise CheckpointError(f"{path / 'tokenizer.json'} is no tokenizer: {reason}") from None
        # Of a library without encode_batch_fast its slower brother, which counts characters besides.
        self._encode_batch = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = read_optional_object(path / "tokenizer_config.json")
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary_size = max(ids.values(), default=-1) + 1
        self.longest_token = max(map(len, ids), default=1)
        """Characters that one token stands for at most."""
        if vocabulary is not None and not 0 < self.vocabulary_size <= vocabulary:
            raise CheckpointError(
                f"{path / 'tokenizer.json'} has tokens up to id {self.vocabulary_size - 1}, the model's vocabulary "
                f"ends at {vocabulary - 1}",
                "the tokenizer is of another model",
            )
        self._byte_tokens = (
            frozenset(i for token, i in ids.items() if BYTE_TOKEN.fullmatch(token))
            if b'"ByteFallback"' in data
            else frozenset()
        )
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_tokens = self._special_tokens()

    def _special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token ... as text; tokenizer_config.json first, then special_tokens_map.json."""
        found: dict[str, str] = {}
        for values in (self._config, read_optional_object(self.path / "special_tokens_map.json")):
            for name in SPECIAL:
                value = values.get(name)
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str):
                    found.setdefault(name, value)
        return found

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        found: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return found

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids. `special`: with the tokens that tokenizer.json's post-processor adds (a leading bos, say).

        Text that looks like a special token becomes that token either way, as the library does.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError("the text holds half of a surrogate pair, which is no character") from None
        if len(text) <= AT_ONCE:
            found = self._tokenizer.encode(text, add_special_tokens=special)
        else:
            found = self._encode_batch([text], add_special_tokens=special)[0]
        ids: list[int] = found.ids
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know (a padded vocabulary) give no text."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token(self, id: int) -> str | None:
        """The vocabulary's own spelling of a token, or None where it has none."""
        found: str | None = self._tokenizer.id_to_token(id)
        return found

    def definition(self) -> str:
        """tokenizer.json as the library writes it, for other libraries that read it."""
        text: str = self._tokenizer.to_str()
        return text

    def stream(self, skip_special: bool = True) -> Stream:
        """Decodes a sequence as it grows."""
        return Stream(self, skip_special)

    def is_byte(self, id: int) -> bool:
        """Whether a token is one raw byte (<0x0A>) that joins its neighbours into characters."""
        return id in self._byte_tokens

    def is_silent(self, id: int, skip_special: bool) -> bool:
        """Whether a token gives no text at all, so that what stands around it joins."""
        return self.token(id) is None or (skip_special and id in self._special_ids)

    @property
    def has_chat_template(self) -> bool:
        return self._templates() != {}

    @property
    def chat_template(self) -> str:
        """The source of its chat templates, by which a model's habits are known; "" where there is none."""
        return "\n".join(self._templates().values())

    def _templates(self) -> dict[str, str]:
        """Templates by name; "default" is the one for plain chat. A .jinja file goes before tokenizer_config.json."""
        if (self.path / "chat_template.jinja").exists():
            return {"default": read_text(self.path / "chat_template.jinja")}
        stored = read_optional_object(self.path / "chat_template.json").get("chat_template")
        stored = self._config.get("chat_template") if stored is None else stored
        if isinstance(stored, str):
            return {"default": stored}
        if isinstance(stored, list):
            named = [e for e in stored if isinstance(e, dict)]
            return {str(e.get("name")): e["template"] for e in named if isinstance(e.get("template"), str)}
        return {}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **values: Any,
    ) -> str:
        """The prompt for `messages` ({"role", "content"}); encode it with special=False, it holds its own bos.

        Raises CheckpointError where there is no template or it is at fault, InputError where it refuses the messages.
        """
        from hasten.checkpoint.chat import render

        templates = self._templates()
        template = templates.get("tool_use" if tools and "tool_use" in templates else "default")
        if template is None:
            raise CheckpointError(f"{self.path} has no chat template", "use `hasten generate` for models without one")
        given = {
            "messages": [dict(m) for m in messages],
            "tools": [dict(t) for t in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return render(template, {**self.special_tokens, **given, **values})


class Stream:
    """Decodes token by token. What it returns, joined, is what decoding the whole sequence returns.

    Text is held back while it may still change: an unfinished character (shown as U+FFFD), and a run of raw byte
    tokens, which is only judged as a whole, once it ends. The window that is decoded again at each step stays a few
    tokens long, whatever bytes they are.
    """

    WINDOW = 8

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that have been handed out

    def push(self, id: int) -> str:
        """The text that this token settles, often "" or more than its own."""
        if self._tokenizer.is_silent(id, self._skip_special):
            return ""
        self._window.append(id)
        if self._tokenizer.is_byte(id):
            return ""
        text = self._tokenizer.decode(self._window, self._skip_special)
        settled = len(text) - 1 if text.endswith(REPLACEMENT) else len(text)
        new = text[self._sent : settled]
        self._sent = max(self._sent, settled)
        if settled == len(text) and new and len(self._window) > self.WINDOW:
            # The last token alone is context enough: it is no raw byte, and gives text for the next to follow.
            self._window = [id]
            self._sent = len(self._tokenizer.decode(self._window, self._skip_special))
        elif len(self._window) > self.WINDOW:
            self._cut(text)
        return new

    def _cut(self, text: str) -> None:
        """Drop what stands before the window's last character, which may be unfinished; `text` is the window's.

        That character has begun at one of the last tokens, at most 4. Where the window's parts decode alone to what
        they decode to together, no character spans them: its bytes would be shown as one U+FFFD or more on either side.
        """
        for at in range(len(self._window) - 1, len(self._window) - 1 - LONGEST_CHARACTER, -1):
            before = self._tokenizer.decode(self._window[:at], self._skip_special)
            rest = self._tokenizer.decode(self._window[at:], self._skip_special)
            if rest and before + rest == text and len(before) <= self._sent:
                self._window, self._sent = self._window[at:], self._sent - len(before)
                return

    def finish(self) -> str:
        """What was held back to the end."""
        rest = self._tokenizer.decode(self._window, self._skip_special)[self._sent :]
        self._window, self._sent = [], 0
        return rest
