"""llama.cpp: its own tools for prompts and batches, its C interface where a tool would repeat a long prompt each time.

The tools are built from the source package of llama-cpp-python together with the libraries that the binding loads, so
both are the same build. Where the tools are missing, the C interface measures everything, and `via` says so.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import protocol
from llama_state import stretched

CACHES = {"f32": 0, "f16": 1, "q8_0": 8}  # ggml's numbers
TOOL_SECONDS = 0.25  # repeat a tool's measurement until it has taken about as long
CHUNK = 512


class LlamaCpp(protocol.Engine):
    def load(self, path: str, threads: int, tools: str | None = None, **_: Any) -> dict[str, Any]:
        """Nothing is read yet: the tools load the model themselves. `tools` is the folder that holds them."""
        self.path, self.threads = path, threads
        self.tools = Path(tools) if tools else None
        self.model: Any = None
        self.context: Any = None
        self.shape: tuple[Any, ...] = ()
        return {"seconds": 0.0}

    def prefill(self, tokens: int, least: float, flash: bool = False, via: str = "tools", **_: Any) -> dict[str, Any]:
        if self.tools is None or via == "binding":
            self.open(1, tokens + 1, flash, "f16")
            return {**super().prefill(tokens, least), "via": "C interface"}
        return self.llama_bench(["-p", str(tokens), "-n", "0"], least, flash)

    def llama_bench(self, arguments: list[str], least: float, flash: bool) -> dict[str, Any]:
        """Seconds of one test. What it loads and its warm-up are not counted."""
        common = ["-m", self.path, "-t", str(self.threads), "-ngl", "0", "-o", "json", "-fa", str(int(flash))]
        taken: list[float] = []
        repeats = 1
        while repeats:
            (found,) = json.loads(self.run([str(self._tool("llama-bench")), *common, *arguments, "-r", str(repeats)]))
            taken = [ns / 1e9 for ns in found["samples_ns"]]
            enough = -(-min(least, TOOL_SECONDS) // taken[0]) if repeats == 1 else 0
            repeats = min(int(enough), protocol.MAX_REPEATS) if enough > 1 else 0
        return {"seconds": float(np.median(taken)), "repeats": len(taken), "via": "llama-bench"}

    def decode(
        self,
        batch: int,
        depth: int,
        new: int,
        least: float,
        flash: bool = False,
        cache: str = "f16",
        via: str = "tools",
    ) -> dict[str, Any]:
        if self.tools is not None and via == "tools" and depth <= 1024:
            return self.batched_bench(batch, depth, new, least, flash, cache)
        self.open(batch, depth + new, flash, cache)
        return {**super().decode(batch, depth, new, least), "via": "C interface"}

    def batched_bench(self, batch: int, depth: int, new: int, least: float, flash: bool, cache: str) -> dict[str, Any]:
        """Seconds of `new` steps of `batch` sequences that share a prompt of `depth` tokens, computed once."""
        size = batch * (depth + new) + 256
        arguments = ["-m", self.path, "-t", str(self.threads), "-tb", str(self.threads), "-ngl", "0", "-c", str(size)]
        arguments += ["-npp", str(depth), "-ntg", str(new), "-pps", "-b", "512", "-ub", "512"]
        arguments += ["-fa", "on" if flash else "off", "-ctk", cache, "-ctv", cache, "--output-format", "jsonl"]

        def measured(repeats: int) -> list[float]:
            tests = ",".join([str(batch)] * repeats)
            printed = self.run([str(self._tool("llama-batched-bench")), *arguments, "-npl", tests])
            return [float(json.loads(line)["t_tg"]) for line in printed.splitlines() if line.startswith("{")]

        taken = measured(1)
        enough = min(int(-(-min(least, TOOL_SECONDS) // taken[0])), protocol.MAX_REPEATS)
        taken = measured(enough) if enough > 1 else taken
        return {"seconds": float(np.median(taken)), "repeats": len(taken), "via": "llama-batched-bench"}

    def _tool(self, name: str) -> Path:
        assert self.tools is not None
        return self.tools / name

    def run(self, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
        return done.stdout

    # --- the C interface

    def open(self, batch: int, length: int, flash: bool, cache: str) -> None:
        """A context of `batch` sequences of up to `length` tokens; the last one is kept while it will do."""
        from llama_cpp import llama_cpp as c

        self.c = c
        if self.model is None:
            c.llama_backend_init()
            params = c.llama_model_default_params()
            params.n_gpu_layers = 0
            self.model = c.llama_model_load_from_file(self.path.encode(), params)
            if not self.model:
                raise RuntimeError(f"llama.cpp cannot load {self.path}")
            self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        if self.context and self.shape[0] == (batch, flash, cache) and self.shape[1] >= length:
            return
        if self.context:
            c.llama_free(self.context)
        params = c.llama_context_default_params()
        params.n_ctx = -(-length // 256) * 256 * batch
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = int(flash)
        params.type_k = params.type_v = CACHES[cache]
        self.context, self.filled = c.llama_init_from_model(self.model, params), None
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context of that size")
        self.shape = ((batch, flash, cache), length)
        self.memory = c.llama_get_memory(self.context)
        self.batch = c.llama_batch_init(CHUNK, 0, 1)

    def step(self, tokens: list[int], positions: list[int], sequences: list[int], wanted: list[int]) -> Any:
        """One llama_decode; logits of the wanted rows, [rows, vocabulary]."""
        b = self.batch
        b.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = token, position, 1, sequence, 0
        for i in wanted:
            b.logits[i] = 1
        if self.c.llama_decode(self.context, b):
            raise RuntimeError("llama_decode failed")
        rows = [self.c.llama_get_logits_ith(self.context, i) for i in wanted]
        self.c.llama_synchronize(self.context)
        return np.array([np.ctypeslib.as_array(row, (self.vocabulary,)) for row in rows])

    def feed(self, tokens: list[int], sequence: int = 0) -> int:
        """A prompt in chunks; the most likely next token."""
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            wanted = [len(part) - 1] if start + len(part) == len(tokens) else []
            found = self.step(part, list(range(start, start + len(part))), [sequence] * len(part), wanted)
        return int(found[0].argmax())

    def first_token(self, tokens: int) -> dict[str, Any]:
        self.open(1, tokens + 1, True, "f16")
        return super().first_token(tokens)

    def prompt(self, tokens: list[int]) -> None:
        self.c.llama_memory_clear(self.memory, False)
        self.feed(tokens)

    def fill(self, batch: int, depth: int) -> None:
        """A short prompt's keys and values, repeated up to `depth`: what a step costs does not hang on their values."""
        self.c.llama_memory_clear(self.memory, False)
        given = protocol.random_tokens(depth, self.vocabulary)
        if batch == 1 and depth > 2 * CHUNK:
            self.last = [self.feed(given[:256])]
            size = self.c.llama_state_seq_get_size(self.context, 0)
            state = (ctypes.c_uint8 * size)()
            self.c.llama_state_seq_get_data(self.context, state, size, 0)
            long = stretched(bytes(state), depth)
            if long is not None:
                self.c.llama_memory_clear(self.memory, False)
                self.c.llama_state_seq_set_data(
                    self.context, (ctypes.c_uint8 * len(long)).from_buffer(long), len(long), 0
                )
                if self.c.llama_memory_seq_pos_max(self.memory, 0) == depth - 1:
                    return
            self.c.llama_memory_clear(self.memory, False)
        self.last = [self.feed(given, sequence) for sequence in range(batch)]

    def rewind(self, batch: int, depth: int) -> None:
        for sequence in range(batch):
            self.c.llama_memory_seq_rm(self.memory, sequence, depth, -1)

    def steps(self, batch: int, depth: int, new: int) -> None:
        tokens, every = self.last, list(range(batch))
        for position in range(depth, depth + new):
            tokens = self.step(tokens, [position] * batch, every, every).argmax(axis=-1).tolist()

    def logits(self, path: str, out: str, tokens: list[int], threads: int) -> dict[str, Any]:
        """Teacher-forced: float32 [tokens, vocabulary] into the .npy file `out`."""
        self.load(path, threads)
        self.open(1, len(tokens), False, "f32")
        found = []
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            rows = list(range(len(part)))
            found.append(self.step(part, [start + i for i in rows], [0] * len(part), rows))
        np.save(out, np.concatenate(found))
        return {}

    def encode(self, path: str, text: str) -> dict[str, Any]:
        """The tokens of a text, with whatever the file says stands before them."""
        self.load(path, 1)
        self.open(1, 32, False, "f16")
        found = (self.c.llama_token * (len(text.encode()) + 8))()
        data = text.encode()
        count = self.c.llama_tokenize(
            self.c.llama_model_get_vocab(self.model), data, len(data), found, len(found), True, False
        )
        return {"tokens": list(found[:count])}

    def quantize(self, source: str, target: str, file_type: int, threads: int) -> dict[str, Any]:
        """llama.cpp's own mix of types for a file of `file_type`."""
        from llama_cpp import llama_cpp as c

        c.llama_backend_init()
        params = c.llama_model_quantize_default_params()
        params.ftype, params.nthread = file_type, threads
        if c.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
            raise RuntimeError("llama_model_quantize failed")
        return {}


if __name__ == "__main__":
    sys.exit(protocol.serve(LlamaCpp()))
