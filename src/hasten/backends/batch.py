"""What goes into a step and what comes out: the contract between engine and backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hasten.backends.cache import KvFormat

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
UInt32 = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Limits:
    """Sizes a program is compiled for. Buffers are planned once from these."""

    context: int = 2048
    """Longest sequence in tokens; rope that depends on length is fixed by the graph's own context."""
    max_tokens: int = 512
    """Tokens in one step, all sequences together."""
    max_sequences: int = 16
    max_rows: int = 16
    """Rows whose logits one step may want."""
    block_size: int = 32
    """Tokens in a block of the KV cache; a multiple of 16."""
    kv_blocks: int = 64
    """Blocks in the KV cache, shared by all sequences."""
    kv_format: KvFormat = "bf16"
    """"bf16", "int8" (a scale for each token and head), "int4" (a scale and a centre) or "f32"; or one of them for each
    cache slot of the whole model, also where the graph is cut from it."""
    threads: int = 0
    """0: one for each core that affinity and container limits leave."""


@dataclass
class Batch:
    """Ragged and flat: sequence s owns rows starts[s]:starts[s+1] of tokens and positions.

    Positions of a sequence are consecutive; everything before its first position is already in the cache blocks that
    its row of block_tables names. Prefill, chunked prefill, decode and verification differ only in their spans.
    """

    tokens: Int32  # [tokens]
    positions: Int32  # [tokens]
    starts: Int32  # [sequences + 1]
    block_tables: Int32  # [sequences, blocks]; -1 past a sequence's end
    rows: Int32  # [rows] indices into tokens whose logits are wanted
    hidden: Float32 | None = None  # [tokens, width] for graphs that begin with Input


@dataclass
class SamplingBatch:
    """How to draw each wanted row's token. Arrays are [rows] unless said otherwise; lists have an array a row, empty
    where the row has none.

    In this order: bias is added, penalties are taken, bans are set; temperature divides; top_k, top_p, min_p and
    typical_p each leave out of what the one before left. Where bans leave nothing, the likeliest allowed token stands
    for the draw, as if nothing else were banned.
    """

    temperature: Float32  # 0: greedy
    top_k: Int32  # 0: all
    top_p: Float32  # 1: all
    min_p: Float32  # 0: all
    repetition: Float32  # 1: none; over prompt and output (Keskar et al. 2019)
    presence: Float32  # 0: none; over output
    frequency: Float32  # 0: none; over output
    seed: npt.NDArray[np.uint64]
    position: npt.NDArray[np.int64]  # of the token being drawn: the key of its randomness
    history: list[Int32]  # per row: prompt and output tokens, needed where a penalty is set (else empty)
    prompt_length: Int32  # how many of history are prompt
    logprobs: int = 0  # top log-probabilities wanted, the most any row asks
    typical_p: Float32 | None = None  # 1 or None: all (locally typical sampling, Meister et al. 2022)
    bias_tokens: list[Int32] | None = None  # per row
    bias: list[Float32] | None = None  # per row: added to the logits of bias_tokens
    banned: list[Int32] | None = None  # per row: tokens that are not drawn
    allowed: list[UInt32] | None = None  # per row: [ceil(vocabulary / 32)], a bit a token, lowest first; empty: all


@dataclass
class Sampled:
    """tokens [rows]; logprobs [rows] of those tokens and top [rows, n], of the model's own distribution (before
    bias, penalties, bans, temperature and filters), so that a token's value is the same float wherever it appears."""

    tokens: Int32
    logprobs: Float32
    top_tokens: Int32
    top_logprobs: Float32


class Outputs(Protocol):
    """Handle on a step's results, valid until the program's next step."""

    def logits(self) -> Float32: ...  # [rows, vocabulary], a copy
    def score(self, targets: Int32) -> Float32: ...  # [rows] log-probability of each row's target
    def argmax(self) -> Int32: ...  # [rows]
    def divergence(self, reference: Outputs) -> npt.NDArray[np.float64]: ...  # [rows] KL(reference || this), nats
    def sample(self, sampling: SamplingBatch) -> Sampled: ...
    def value(self, name: str) -> Float32: ...  # [tokens or rows, width] of a kept value, a copy


class Program(Protocol):
    """A compiled graph with its weights and cache."""

    limits: Limits

    def step(self, batch: Batch) -> Outputs: ...
    def memory(self) -> dict[str, int]: ...  # bytes: weights, kv_cache, buffers
