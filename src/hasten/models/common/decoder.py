"""The parts of a decoder, each written into a graph under the name its tensor has in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from hasten.graph.graph import TOKENS, Graph, GraphBuilder
from hasten.graph.ops import Add, Attention, Embed, Gate, Linear, Norm, Rope, SelectRows, Softcap
from hasten.models.common.fields import Shape
from hasten.models.common.rope import Rotation


class Decoder:
    """Writes a decoder's graph: embed, then blocks, then finish.

    `fused` says where a checkpoint keeps several projections as one tensor: projection -> (tensor, first row).
    `norm_offset` is what every norm adds to its weight (1 for Gemma).
    """

    def __init__(
        self, shape: Shape, *, norm_offset: float = 0.0, fused: Mapping[str, tuple[str, int]] | None = None
    ) -> None:
        self.shape = shape
        self.norm_offset = norm_offset
        self.fused = fused or {}
        self.graph = GraphBuilder(context=shape.context, vocabulary=shape.vocabulary, hidden=shape.hidden)

    def embed(self, scale: float = 1.0) -> str:
        table = self.graph.weight("model.embed_tokens.weight", self.shape.vocabulary, self.shape.hidden)
        return self.graph.add(Embed(scale), "embed", TOKENS, weights=(table,))

    def norm(self, x: str, name: str, tensor: str, width: int, heads: int = 1) -> str:
        weight = self.graph.weight(f"{tensor}.weight", width // heads)
        op = Norm("rms", self.shape.eps, heads, self.norm_offset)
        return self.graph.add(op, name, x, weights=(weight,))

    def finish(self, x: str, softcap: float | None = None) -> Graph:
        """Final norm and head over the rows whose logits are wanted."""
        rows = self.graph.add(SelectRows(), "rows", x)
        normed = self.norm(rows, "norm", "model.norm", self.shape.hidden)
        head = "model.embed_tokens.weight" if self.shape.tied else "lm_head.weight"
        weight = self.graph.weight(head, self.shape.vocabulary, self.shape.hidden)
        logits = self.graph.add(Linear(), "logits", normed, weights=(weight,))
        if softcap is not None:
            logits = self.graph.add(Softcap(softcap), "capped_logits", logits)
        return self.graph.finish(logits)


class Block:
    """One transformer block. A value is called `blocks.I.PART`, its weight `model.layers.I.PART.weight`."""

    def __init__(self, decoder: Decoder, index: int, x: str) -> None:
        self.decoder, self.shape, self.graph = decoder, decoder.shape, decoder.graph
        self.index, self.input = index, x
        self._start = self.graph.begin_block()

    def end(self, x: str) -> str:
        self.graph.end_block(self._start, self.input, x)
        return x

    def name(self, part: str) -> str:
        return f"blocks.{self.index}.{part}"

    def tensor(self, part: str) -> str:
        return f"model.layers.{self.index}.{part}"

    def norm(self, x: str, part: str, width: int | None = None, heads: int = 1) -> str:
        return self.decoder.norm(x, self.name(part), self.tensor(part), width or self.shape.hidden, heads)

    def add(self, x: str, y: str, part: str) -> str:
        return self.graph.add(Add(), self.name(part), x, y)

    def linear(self, x: str, part: str, out: int, width: int, bias: bool = False) -> str:
        name = f"{self.tensor(part)}.weight"
        if part in self.decoder.fused:
            tensor, start = self.decoder.fused[part]
            source, rows = f"{self.tensor(tensor)}.weight", (start, start + out)
            weights = [self.graph.weight(name, out, width, source=source, rows=rows)]
        else:
            weights = [self.graph.weight(name, out, width)]
        if bias:
            weights.append(self.graph.weight(f"{self.tensor(part)}.bias", out))
        return self.graph.add(Linear(bias), self.name(part), x, weights=tuple(weights))

    def rope(self, x: str, part: str, heads: int, rotation: Rotation | None) -> str:
        if rotation is None:
            return x
        op = Rope(heads, self.shape.head_dim, rotation.frequencies, rotation.factor)
        return self.graph.add(op, self.name(part), x)

    def attention(
        self,
        x: str,
        rotation: Rotation | None,
        *,
        bias: bool = False,
        output_bias: bool = False,
        qk_norm: str | None = None,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> str:
        """Projections, rope, attention and output projection.

        `qk_norm` normalises q and k before rope: "head" each head with one weight (qwen3), "whole" their whole width
        (olmo2). `rotation` None leaves rope out.
        """
        s = self.shape
        q = self.linear(x, "self_attn.q_proj", s.query_width, s.hidden, bias)
        k = self.linear(x, "self_attn.k_proj", s.key_width, s.hidden, bias)
        v = self.linear(x, "self_attn.v_proj", s.key_width, s.hidden, bias)
        if qk_norm is not None:
            q = self.norm(q, "self_attn.q_norm", s.query_width, s.heads if qk_norm == "head" else 1)
            k = self.norm(k, "self_attn.k_norm", s.key_width, s.kv_heads if qk_norm == "head" else 1)
        q = self.rope(q, "self_attn.q_rope", s.heads, rotation)
        k = self.rope(k, "self_attn.k_rope", s.kv_heads, rotation)
        op = Attention(
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            scale=s.head_dim**-0.5 if scale is None else scale,
            layer=self.index,
            window=window if window is not None and window < s.context else None,
            softcap=softcap,
        )
        attended = self.graph.add(op, self.name("self_attn.attention"), q, k, v)
        return self.linear(attended, "self_attn.o_proj", s.hidden, s.query_width, output_bias)

    def feed_forward(self, x: str, *, bias: bool = False) -> str:
        """down(activation(gate(x)) * up(x))"""
        s = self.shape
        gate = self.linear(x, "mlp.gate_proj", s.intermediate, s.hidden, bias)
        up = self.linear(x, "mlp.up_proj", s.intermediate, s.hidden, bias)
        gated = self.graph.add(Gate(s.activation), self.name("mlp.gated"), gate, up)
        return self.linear(gated, "mlp.down_proj", s.hidden, s.intermediate, bias)
