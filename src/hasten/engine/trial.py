"""Run as a script: compile the grammar on stdin, make its first masks, and say on stdout what is wrong with it.

stdin has {"grammar": ..., "vocabulary": tokens, "special": [texts of special tokens]}.

A few bytes of grammar can take minutes and gigabytes, and no thread that compiles can be stopped: a process can. Knows
nothing of hasten, so that it starts soon.
"""

import json
import os
import resource
import sys

SECONDS = 2
"""Of processor time, the interpreter's own start included."""
BYTES = 1 << 30
LEXER_STATES = 20_000
GRAMMAR_SIZE = 50_000
"""Symbols."""
STEPS = 4


class Bytes:
    """A tokenizer of single bytes, empty tokens up to the model's vocabulary, and the model's special ones by name."""

    eos_token_id = 256
    bos_token_id = None

    def __init__(self, vocabulary: int, special: list[str]) -> None:
        plain = (*(bytes([i]) for i in range(256)), b"<eos>", *[b""] * (vocabulary - 257))
        self.tokens = (*plain, *(name.encode() for name in special))
        self.special_token_ids = (256, *range(len(plain), len(self.tokens)))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main() -> None:
    os.nice(10)  # who asks for no grammar goes first
    for what, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, BYTES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, most))
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    limits = LLParserLimits(max_lexer_states=LEXER_STATES, max_grammar_size=GRAMMAR_SIZE, verbose_errors=False)
    task = json.load(sys.stdin.buffer)
    tokens = LLTokenizer(TokenizerWrapper(Bytes(task["vocabulary"], task["special"])))
    matcher = LLMatcher(tokens, task["grammar"], log_level=0, limits=limits)
    for _ in range(STEPS):  # what is compiled only as it is met shows by the first output that may be
        mask = 0 if matcher.is_error() else int.from_bytes(matcher.compute_bitmask(), "little")
        mask &= ~(1 << Bytes.eos_token_id)
        if not mask:
            break
        matcher.consume_token((mask & -mask).bit_length() - 1)
    sys.stdout.buffer.write(matcher.get_error().encode())


if __name__ == "__main__":
    main()
