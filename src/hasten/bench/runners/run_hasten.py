"""hasten itself, asked in the same way as its peers: steps of the compiled program, prompts in chunks, greedy."""

from __future__ import annotations

import sys
import time
from typing import Any

import protocol


class Hasten(protocol.Engine):
    def load(
        self, path: str, threads: int, context: int, tokens: int, batch: int, kv_format: str = "auto", **_: Any
    ) -> dict[str, Any]:
        """`context`: the longest sequence; `tokens`: those of all sequences together; `batch`: sequences at most."""
        import numpy as np

        from hasten import checkpoint
        from hasten.backends import native
        from hasten.backends.batch import Limits
        from hasten.bench.latency import BLOCK, greedy
        from hasten.engine import memory
        from hasten.engine.llm import STEP_TOKENS

        started = time.perf_counter()
        self.np, self.chunk, self.block, self.greedy = np, STEP_TOKENS, BLOCK, greedy
        self.settings = {"model": path, "threads": threads, "kv_format": kv_format}
        self.llms: dict[int, Any] = {}
        model = checkpoint.open(path)
        model = model.at_context(min(model.graph.context, max(context, 16)))  # as it is served: rope may depend on it
        self.vocabulary = model.graph.vocabulary
        limits = Limits(
            context=model.graph.context,
            max_tokens=max(STEP_TOKENS, batch),
            max_sequences=batch,
            max_rows=batch,
            block_size=BLOCK,
            kv_blocks=-(-tokens // BLOCK) + batch,
            kv_format=memory.kv_format(model.formats.values(), kv_format, model.kv_formats),
            threads=threads,
        )
        memory.require(memory.predict(model.graph, 0, limits), memory.memory()[1])
        self.program = native.compile(model.graph, model.weights(), limits, tune=True)
        return {"seconds": time.perf_counter() - started, "version": f"hasten, {self.program.isa}"}

    def step(self, tokens: Any, positions: Any, starts: list[int], tables: Any, rows: list[int]) -> Any:
        """One step; the most likely token of each wanted row."""
        from hasten.backends.batch import Batch

        np = self.np
        tokens, positions, starts, wanted = (np.asarray(x, np.int32) for x in (tokens, positions, starts, rows))
        outputs = self.program.step(Batch(tokens, positions, starts, tables, wanted))
        return outputs.sample(self.greedy(len(rows))).tokens if rows else wanted

    def tables(self, batch: int, length: int) -> Any:
        return self.np.arange(batch * -(-length // self.block), dtype=self.np.int32).reshape(batch, -1)

    def feed(self, tokens: list[int], table: Any) -> int:
        """A prompt in chunks into the blocks of `table` [blocks]; its first token."""
        for start in range(0, len(tokens), self.chunk):
            part = tokens[start : start + self.chunk]
            last = start + len(part) == len(tokens)
            positions = self.np.arange(start, start + len(part))
            found = self.step(part, positions, [0, len(part)], table[None], [len(part) - 1] if last else [])
        return int(found[0])

    def prompt(self, tokens: list[int]) -> None:
        self.feed(tokens, self.tables(1, len(tokens))[0])

    def fill(self, batch: int, depth: int) -> None:
        """Every block written, by prompts of a step's tokens side by side where one would be longer: a step's time does
        not hang on what keys and values are, and a long prompt takes minutes."""
        self.room = depth + 64
        given = protocol.random_tokens(depth, self.vocabulary)
        span = self.chunk // self.block
        for table in self.tables(batch, self.room):
            for number, start in enumerate(range(0, depth, self.chunk)):
                part = given[start : start + self.chunk]
                token = self.feed(part, table[number * span : (number + 1) * span])
            self.last = [token] * batch

    def alone(self, workload: dict[str, Any], turn: int) -> dict[str, Any]:
        """What a server would be asked (bench/servers.py), by the engine without one."""
        from hasten.bench import servers
        from hasten.bench.load.arrivals import Schedule
        from hasten.bench.peers.common import Workload
        from hasten.engine.llm import LLM
        from hasten.engine.request import SamplingParams

        asked = Workload(**workload)
        wanted = servers.load(asked, turn)
        if asked.batch not in self.llms:
            self.llms = {asked.batch: LLM(**self.settings, context=asked.length, max_batch=asked.batch)}
            self.llms[asked.batch].generate([[1] * servers.SHORTEST])
        engine = self.llms[asked.batch].make_engine()
        texts = servers.prompts(wanted)
        given = [[int(p) for p in texts.pieces(arrival, n)] for n, arrival in enumerate(Schedule(wanted))]
        params = SamplingParams(temperature=0, max_tokens=asked.new, ignore_eos=True)
        started = time.perf_counter()
        under_way = 0
        while given or under_way:
            while given and under_way < asked.batch:
                engine.add(given.pop(0), params)
                under_way += 1
            under_way -= sum(s.finish_reason is not None for s in engine.step())
        return {"seconds": time.perf_counter() - started}

    def steps(self, batch: int, depth: int, new: int) -> None:
        tables, tokens, every = self.tables(batch, self.room), self.last, list(range(batch))
        for position in range(depth, depth + new):
            tokens = self.step(tokens, [position] * batch, [*every, batch], tables, every)


if __name__ == "__main__":
    sys.exit(protocol.serve(Hasten()))
