"""transformers on torch, in bf16, eager or compiled."""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import protocol


class Transformers(protocol.Engine):
    """Greedy steps through model(...) with a cache: `generate` adds its own Python to each of them."""

    def load(self, path: str, threads: int, compiled: bool = False, **_: Any) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        started = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.forward = torch.compile(self.model.forward, dynamic=True) if compiled else self.model.forward
        self.vocabulary = self.model.config.vocab_size
        return {"seconds": time.perf_counter() - started, "version": f"torch {torch.__version__}"}

    def run(self, tokens: Any, cache: Any) -> tuple[Any, Any]:
        """Feed [batch, tokens]; the most likely next token of each, [batch, 1], and the cache."""
        out = self.forward(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(dim=-1), out.past_key_values

    def prompt(self, tokens: list[int]) -> None:
        self.run(self.torch.tensor([tokens]), None)[0].tolist()

    def fill(self, batch: int, depth: int) -> None:
        """One prompt's keys and values, repeated along the sequence and over sequences: a step's time is the same."""
        given = protocol.random_tokens(min(depth, 128), self.vocabulary)
        self.last, short = self.run(self.torch.tensor([given]), None)
        from transformers import DynamicCache

        self.full = DynamicCache()
        for index, layer in enumerate(short.layers):
            repeats = -(-depth // len(given))
            keys, values = (x.repeat(batch, 1, repeats, 1)[:, :, :depth] for x in (layer.keys, layer.values))
            self.full.update(keys, values, index)
        self.last = self.last.repeat(batch, 1)
        self.rewind(batch, depth)

    def rewind(self, batch: int, depth: int) -> None:
        self.cache = copy.deepcopy(self.full)

    def steps(self, batch: int, depth: int, new: int) -> None:
        tokens, cache = self.last, self.cache
        for _ in range(new):
            tokens, cache = self.run(tokens, cache)
        tokens.tolist()


if __name__ == "__main__":
    sys.exit(protocol.serve(Transformers()))
