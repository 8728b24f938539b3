"""Hypothesis strategies for graphs of any shape: values read never, once or often, ops in any order."""

from hypothesis import strategies as st

from hasten.graph.graph import TOKENS, Graph, GraphBuilder
from hasten.graph.ops import Activation, Add, Attention, Embed, Gate, Linear, Multiply, Norm, Rope, SelectRows, Softcap

HEAD, WIDE = 4, 8
SINGLE = ("norm", "head_norm", "linear", "rope", "activation", "multiply", "softcap")
KINDS = (*SINGLE, *SINGLE[:4], "add", "add", "gate", "gate", "swiglu", "attention", "attention")


@st.composite
def graphs(draw: st.DrawFn, steps: int = 16) -> Graph:
    """Up to `steps` draws; each reads recent values more often than old ones, so that chains which fuse do occur."""
    builder = GraphBuilder(context=16, vocabulary=5, hidden=WIDE)
    widths = {builder.add(Embed(), "embed", TOKENS, weights=(builder.weight("table", 5, WIDE),)): WIDE}
    recent = st.integers(0, 3) | st.integers(0, 30)

    def pick(width: int | None = None) -> str:
        fitting = [v for v, w in widths.items() if width in (None, w)]
        return fitting[-1 - min(draw(recent), len(fitting) - 1)] if fitting else linear(pick(), width or WIDE)

    def add(op: object, *inputs: str, weights: tuple[str, ...] = (), width: int | None = None) -> str:
        name = builder.add(op, f"v{len(widths)}", *inputs, weights=weights)
        widths[name] = width or widths[inputs[0]]
        return name

    def linear(x: str, width: int) -> str:
        bias, name = draw(st.booleans()), f"w{len(widths)}"
        weights = (builder.weight(name, width, widths[x]),) + ((builder.weight(f"{name}.b", width),) if bias else ())
        return add(Linear(bias), x, weights=weights, width=width)

    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=steps)):
        x = pick()
        other = pick(widths[x]) if kind in ("add", "gate") else x
        match kind:
            case "norm":
                add(Norm(), x, weights=(builder.weight(f"n{len(widths)}", widths[x]),))
            case "head_norm":
                add(Norm(heads=widths[x] // HEAD), x, weights=(builder.weight(f"n{len(widths)}", HEAD),))
            case "linear":
                linear(x, draw(st.sampled_from([HEAD, WIDE])))
            case "rope":
                add(Rope(widths[x] // HEAD, HEAD, draw(st.sampled_from([(1.0, 0.1), (0.5,)]))), x)
            case "attention":
                add(Attention(2, 1, HEAD, 0.5, len(widths)), pick(WIDE), pick(HEAD), pick(HEAD), width=WIDE)
            case "swiglu":
                add(Gate("silu"), linear(x, WIDE), linear(x, WIDE))
            case _:
                simple = {"add": Add(), "gate": Gate("silu"), "activation": Activation("relu"), "softcap": Softcap(2.0)}
                add(simple.get(kind, Multiply(0.5)), x, *([other] if kind in ("add", "gate") else []))
    last = list(widths)[-1]
    return builder.finish(add(SelectRows(), last) if draw(st.booleans()) else last)
