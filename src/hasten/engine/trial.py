"""Run as a script: compile the grammar on stdin, make its first masks, and say on stdout what is wrong with it.

A few bytes of grammar can take minutes and gigabytes, and no thread that compiles can be stopped: a process can. Knows
nothing of hasten, so that it starts soon.
"""

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
    """A tokenizer of single bytes."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)
    tokens = (*(bytes([i]) for i in range(256)), b"<eos>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main() -> None:
    for what, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, BYTES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, most))
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    limits = LLParserLimits(max_lexer_states=LEXER_STATES, max_grammar_size=GRAMMAR_SIZE, verbose_errors=False)
    tokens = LLTokenizer(TokenizerWrapper(Bytes()))
    matcher = LLMatcher(tokens, sys.stdin.buffer.read().decode(), log_level=0, limits=limits)
    for _ in range(STEPS):  # what is compiled only as it is met shows by the first output that may be
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        following = [byte for byte in range(256) if mask[byte // 8 : byte // 8 + 1] and mask[byte // 8] >> byte % 8 & 1]
        if not following:
            break
        matcher.consume_token(following[0])
    sys.stdout.buffer.write(matcher.get_error().encode())


if __name__ == "__main__":
    main()
