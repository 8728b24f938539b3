"""hasten beside llama.cpp on one shape: random weights, equal bytes, equal tokens, taken in turn in one run.

    python -m venv llama-venv && CMAKE_ARGS=-DGGML_NATIVE=ON llama-venv/bin/pip install llama-cpp-python gguf
    python scripts/compare_llama_cpp.py config.json --llama-python llama-venv/bin/python --threads 2

Q4_0 and Q8_0 store 4.5 and 8.5 bits a weight, as int4-g32 and int8-g32 do; the head is in the same type. llama.cpp
runs in a process of its own, once with flash attention and once without; a round times each engine once, so ratios are
of neighbours in time. A ratio above 1 says that hasten is faster.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = {"q4_0": "int4-g32", "q8_0": "int8-g32"}
BLOCK_BYTES = {"q4_0": 18, "q8_0": 34}  # 32 weights: an f16 scale, then the codes
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}


# --- the side that runs llama.cpp (a worker process under --llama-python; needs numpy, gguf and llama-cpp-python)


def write_gguf(config: dict[str, Any], kind: str, path: Path) -> int:
    """A model of random weights, every matrix in `kind`. Returns the bytes that a decoding step reads."""
    import gguf

    arch = ARCHITECTURES[config["model_type"]]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads, inner = config.get("num_key_value_heads", heads), config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    matrices = {"token_embd": (config["vocab_size"], hidden)}
    vectors = {"output_norm.weight": hidden}
    tied = config.get("tie_word_embeddings", False)
    if not tied:
        matrices["output"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        shapes = {
            "attn_q": (heads * head_dim, hidden),
            "attn_k": (kv_heads * head_dim, hidden),
            "attn_v": (kv_heads * head_dim, hidden),
            "attn_output": (hidden, heads * head_dim),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        matrices |= {f"blk.{i}.{name}": shape for name, shape in shapes.items()}
        vectors |= {f"blk.{i}.attn_norm.weight": hidden, f"blk.{i}.ffn_norm.weight": hidden}
        if arch == "qwen2":
            vectors |= {f"blk.{i}.{name}.bias": shapes[name][0] for name in ("attn_q", "attn_k", "attn_v")}
    draw = np.random.default_rng(0)
    read = 0
    for name, (rows, columns) in matrices.items():
        blocks = draw.integers(0, 256, (rows, columns // 32, BLOCK_BYTES[kind]), dtype=np.uint8)
        blocks[..., :2] = np.array([0.02 / (4.6 if kind == "q4_0" else 74)], np.float16).view(np.uint8)
        data = blocks.reshape(rows, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
        read += data.nbytes if tied or name != "token_embd" else 0
    for name, size in vectors.items():
        writer.add_tensor(name, np.full(size, 1.0 if name.endswith("weight") else 0.0, np.float32))
        read += 4 * size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


class Llama:
    """llama.cpp through its C interface: greedy, prompts in chunks of 512, `batch` sequences stepping together."""

    def __init__(
        self, path: str, prompt: int, new: int, batch: int, threads: int, flash: bool, vocabulary: int
    ) -> None:
        from llama_cpp import llama_cpp as c

        self.c, self.prompt, self.new, self.vocabulary = c, prompt, new, vocabulary
        c.llama_backend_init()
        model_params = c.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = c.llama_model_load_from_file(path.encode(), model_params)
        params = c.llama_context_default_params()
        params.n_ctx = -(-(prompt + new) // 256) * 256 * batch
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = threads
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = 1 if flash else 0
        else:
            params.flash_attn = flash
        self.context = c.llama_init_from_model(self.model, params)
        if not self.model or not self.context:
            raise SystemExit("llama.cpp could not load the model that was written for it")
        self.batch = c.llama_batch_init(512, 0, 1)
        self.prompts = np.random.default_rng(0).integers(0, vocabulary, (batch, prompt))
        self.last = [0] * batch

    def step(self, tokens: list[int], positions: list[int], sequences: list[int], wanted: list[int]) -> list[int]:
        """One llama_decode; the most likely token of each wanted row."""
        b = self.batch
        b.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            b.token[i], b.pos[i] = token, position
            b.n_seq_id[i], b.seq_id[i][0] = 1, sequence
            b.logits[i] = 0
        for i in wanted:
            b.logits[i] = 1
        if self.c.llama_decode(self.context, b):
            raise SystemExit("llama_decode failed")
        rows = (self.c.llama_get_logits_ith(self.context, i) for i in wanted)
        found = [int(np.ctypeslib.as_array(row, (self.vocabulary,)).argmax()) for row in rows]
        self.c.llama_synchronize(self.context)
        return found

    def prefill(self, batch: int) -> float:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)
        started = time.perf_counter()
        for sequence in range(batch):
            for start in range(0, self.prompt, 512):
                part = self.prompts[sequence, start : start + 512].tolist()
                stop = start + len(part)
                wanted = [len(part) - 1] if stop == self.prompt else []
                found = self.step(part, list(range(start, stop)), [sequence] * len(part), wanted)
                if found:
                    self.last[sequence] = found[0]
        return time.perf_counter() - started

    def decode(self, batch: int) -> float:
        tokens, every = self.last[:batch], list(range(batch))
        started = time.perf_counter()
        for position in range(self.prompt, self.prompt + self.new):
            tokens = self.step(tokens, [position] * batch, every, every)
        return time.perf_counter() - started


def work(order: dict[str, Any]) -> None:
    """Load what `order` says, then answer [call, batch] lines on stdin with seconds on stdout."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    config = order.pop("config")
    llama = Llama(vocabulary=config["vocab_size"], **order)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        call, batch = json.loads(line)
        print(getattr(llama, call)(batch), file=answers, flush=True)


# --- the side that runs hasten


class Peer:
    """A worker process as something that hasten's bench can time."""

    def __init__(self, python: str, order: dict[str, Any], work: Any) -> None:
        self.work, self.prompt, self.new = work, order["prompt"], order["new"]
        self._process = subprocess.Popen(
            [python, __file__, "--worker", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._read()

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit("error: the llama.cpp worker died; run it by hand with --worker to see why")
        return line

    def _call(self, name: str, batch: int) -> float:
        assert self._process.stdin
        print(json.dumps([name, batch]), file=self._process.stdin, flush=True)
        return float(self._read())

    def prefill(self, batch: int) -> float:
        return self._call("prefill", batch)

    def decode(self, batch: int) -> float:
        return self._call("decode", batch)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def compare(options: argparse.Namespace, kind: str, folder: Path) -> list[dict[str, Any]]:
    """One row for each engine and batch size."""
    from hasten import checkpoint
    from hasten.bench import latency

    config = json.loads(options.config.read_text())
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / f"{kind}.gguf"
    write = [options.llama_python, __file__, "--write", json.dumps([config, kind, str(path)])]
    read = int(subprocess.run(write, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])

    model = checkpoint.open(str(folder), weights=False)
    weights = checkpoint.random_weights(model.graph, FORMATS[kind])
    sizes = {"prompt": options.prompt, "new": options.new, "threads": options.threads}
    ours = latency.load(model.graph, weights, options.batch, **sizes)
    theirs = replace(ours.work, step_bytes=read, kv_bytes=2)
    order = {"config": config, "path": str(path), "batch": max(options.batch), **sizes}
    peers = {
        f"llama.cpp {kind}{' flash' if flash else ''}": Peer(options.llama_python, {**order, "flash": flash}, theirs)
        for flash in (False, True)
    }
    names = [*peers, f"hasten {FORMATS[kind]}"]
    print(
        f"{kind}: a step reads {read / 2**20:,.0f} MiB there, {ours.work.step_bytes / 2**20:,.0f} here", file=sys.stderr
    )
    timed = latency.time_in_turn([*peers.values(), ours], options.batch, threads=options.threads, rounds=options.rounds)
    for peer in peers.values():
        peer.close()
    path.unlink()
    rows = []
    for runs, times in timed:
        mine = times[-1]
        for name, run, taken in zip(names, runs, times, strict=True):
            ratios = {
                part: latency.ratio([getattr(a, part) / getattr(b, part) for a, b in zip(taken, mine, strict=True)])
                for part in ("prefill", "decode", "first_token")
            }
            rows.append({"engine": name, **asdict(run), "hasten_ratio": {k: asdict(r) for k, r in ratios.items()}})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'engine':<22}{'batch':>6}{'prefill tok/s':>15}{'limit':>7}{'decode tok/s':>14}{'limit':>7}", end="")
    print(f"{'hasten is, prefill':>24}{'decode':>24}")
    for row in rows:
        print(
            f"{row['engine']:<22}{row['batch']:>6}{row['prefill_tokens_per_second']:>15,.1f}"
            f"{row['prefill_share_of_limit']:>7.0%}{row['decode_tokens_per_second']:>14,.1f}"
            f"{row['decode_share_of_limit']:>7.0%}",
            *(f"{r['median']:>8.2f}x ({r['low']:.2f}-{r['high']:.2f})" for r in list(row["hasten_ratio"].values())[:2]),
        )
    limits = rows[-1]["limits"]
    print(
        f"limits: memory {limits['memory_read_gbs']:.1f} GB/s, int8 {limits['int8_gmacs']:.0f} GMAC/s, "
        f"bf16 {limits['bf16_gmacs']:.0f} GMAC/s, {limits['threads']} threads"
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(json.loads(sys.argv[2]))
    if sys.argv[1:2] == ["--write"]:
        config, kind, path = json.loads(sys.argv[2])
        return print(write_gguf(config, kind, Path(path)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config.json of a llama, mistral or qwen2 model")
    parser.add_argument("--types", default="q4_0,q8_0", type=lambda text: text.split(","))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batch", default="1,4,8", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--work", type=Path, help="where the GGUF is written for a while (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    options = parser.parse_args()
    rows = []
    for kind in options.types:
        folder = Path(tempfile.mkdtemp(dir=options.work))
        try:
            rows += compare(options, kind, folder)
        finally:
            shutil.rmtree(folder)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
