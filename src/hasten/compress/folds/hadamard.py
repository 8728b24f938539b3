"""Hadamard rotation: the residual stream, and each head's values, in a basis in which no feature stands out.

Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456), with the rotations that fold into weights: norms' weights go into
the linears after them, and then a root-mean-square norm does not notice an orthogonal matrix. Where a width is no power
of two the matrix is the product of a Hadamard matrix and a random orthogonal one. Where the graph does not allow a
rotation of the stream (a tied head, a norm after a block, layer norms), only values are rotated.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hasten.compress.folds import Choices, Float32, KnownInputs, New, Read, chain
from hasten.compress.methods import Needs
from hasten.errors import ConfigError
from hasten.graph.graph import TOKENS, Graph, Node
from hasten.graph.ops import Add, Embed, Linear, Norm, SelectRows
from hasten.graph.sites import attention_site

WHOLE = True
NEEDS: Needs = "nothing"
Float64 = npt.NDArray[np.float64]


def fold(graph: Graph, read: Read, inputs: KnownInputs, choices: Choices) -> New:
    new = values_rotated(graph, read)
    try:
        stream = Stream(graph)
    except ConfigError:
        return new
    return new | stream.rotated(chain(read, new), matrix(graph.hidden))


def matrix(size: int, seed: int = 0) -> Float64:
    """An orthogonal matrix [size, size], all of whose entries are of about one size."""
    power = size & -size
    rng = np.random.default_rng(seed)
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    odd, upper = np.linalg.qr(rng.normal(size=(size // power, size // power)))
    odd = odd * np.sign(np.diagonal(upper))
    signs = rng.choice([-1.0, 1.0], size)
    made: Float64 = np.kron(odd, hadamard / power**0.5) * signs[:, None]
    return made


def values_rotated(graph: Graph, read: Read) -> New:
    """Each head's values by one matrix, undone by the columns of the output projection."""
    new: New = {}
    for index in range(len(graph.blocks)):
        try:
            site = attention_site(graph, index)
        except ConfigError:
            continue
        if len(site.ways[2]) > 1:
            continue
        turn = matrix(site.op.head_dim)
        values, output = site.ways[2][0], site.output
        for name in values.weights:  # [kv heads * head_dim, in], and a bias
            own = read(name).astype(np.float64)
            heads = own.reshape(site.op.kv_heads, site.op.head_dim, -1)
            new[name] = np.einsum("hdi,de->hei", heads, turn).reshape(own.shape).astype(np.float32)
        own = read(output.weights[0]).astype(np.float64)
        heads = own.reshape(len(own), site.op.heads, site.op.head_dim)
        new[output.weights[0]] = (heads @ turn).reshape(own.shape).astype(np.float32)
    return new


class Stream:
    """The residual stream: the tables and linears that write into it, and the linears that read it behind a norm.

    Raises ConfigError naming the node that a rotation could not pass.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._makers = {value: node for node in graph.nodes for value in node.outputs}
        self.stream: set[str] = set()
        self.writers: list[Node] = []
        self.norms: dict[str, list[Node]] = {}
        for node in graph.nodes:
            self._look(node)
        used = [w for node in graph.nodes for w in node.weights]
        touched = [*self.writers, *(n for own in self.norms.values() for n in own)]
        for name in (w for node in touched for w in node.weights):
            if used.count(name) > 1:
                raise ConfigError(f"tensor '{name}' is used in more places than one")

    def _look(self, node: Node) -> None:
        """Nodes come in order, so what makes a value has been looked at before."""
        reads = [value for value in node.inputs if value in self.stream]
        if isinstance(node.op, Embed) and node.inputs == (TOKENS,):
            self.writers.append(node)
            self.stream.update(node.outputs)
        elif isinstance(node.op, Add) and reads:
            for value in node.inputs:
                if value not in self.stream:
                    self._written(self._makers[value])
            self.stream.update(node.outputs)
        elif isinstance(node.op, SelectRows) and reads:
            self.stream.update(node.outputs)
        elif isinstance(node.op, Norm) and node.op.kind == "rms" and node.op.heads == 1 and reads:
            readers = [n for n in self.graph.nodes if node.outputs[0] in n.inputs]
            if not all(isinstance(n.op, Linear) for n in readers) or self.graph.output in node.outputs:
                raise ConfigError(f"{node.name} is read by more than linears")
            self.norms[node.name] = [node, *readers]
        elif reads:
            raise ConfigError(f"{node.name} reads the residual stream without a norm")

    def _written(self, node: Node) -> None:
        if not isinstance(node.op, Linear):
            raise ConfigError(f"{node.name} stands between a linear and the residual stream")
        self.writers.append(node)

    def rotated(self, read: Read, turn: Float64) -> New:
        new: New = {}
        for node in self.writers:
            table = isinstance(node.op, Embed)
            for place, name in enumerate(node.weights):
                own = read(name).astype(np.float64)
                new[name] = _float(own @ turn if table or place else turn.T @ own)  # a bias is a row
        for norm, *linears in self.norms.values():
            assert isinstance(norm.op, Norm)
            gain = read(norm.weights[0]).astype(np.float64) + norm.op.offset
            new[norm.weights[0]] = np.full(len(gain), 1 - norm.op.offset, np.float32)
            for node in linears:
                name = node.weights[0]
                new[name] = _float(chain(read, new)(name).astype(np.float64) * gain @ turn)
        return new


def _float(values: Float64) -> Float32:
    return values.astype(np.float32)
