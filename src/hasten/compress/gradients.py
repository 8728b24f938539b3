"""How much the loss on a text changes with each weight: for methods that prune by it. The formulas, differentiated.

It needs torch, and the whole model in float32 with its gradients: the one place in compression that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hasten.backends import reference
from hasten.backends.batch import Float32, Int32
from hasten.checkpoint import Model
from hasten.errors import CheckpointError, InputError

Report = Callable[[str, int, int], None]
COPIES = 4
"""Float32 copies of the model held at once: weights, gradients, their squares, and what a window's graph keeps."""


def mean_squares(
    model: Model, windows: Sequence[Int32], names: Sequence[str], report: Report | None = None
) -> dict[str, Float32]:
    """Matrix -> mean square over windows of the gradient of a window's mean cross-entropy, [out, in].

    Raises InputError where torch is missing, CheckpointError where a gradient is not finite.
    """
    try:
        import torch
    except ImportError:
        raise InputError("gradients need torch, which is not installed", "pip install 'hasten[train]'") from None
    weights = {name: torch.from_numpy(np.array(model.tensor(name))) for name in model.graph.weights}
    wanted = [weights[name].requires_grad_() for name in names]
    sums = [torch.zeros_like(w) for w in wanted]
    for done, window in enumerate(windows):
        if report:
            report("gradients", done, len(windows))
        tokens = torch.from_numpy(window.astype(np.int64))
        logits = reference.forward(model.graph, weights, tokens[:-1])
        loss = torch.nn.functional.cross_entropy(logits, tokens[1:])
        for total, gradient in zip(sums, torch.autograd.grad(loss, wanted), strict=True):
            total += gradient * gradient
    if report:
        report("gradients", len(windows), len(windows))
    made = {name: (total / len(windows)).numpy() for name, total in zip(names, sums, strict=True)}
    for name, values in made.items():
        if not np.isfinite(values).all():
            raise CheckpointError(f"the loss's gradient of '{name}' is not finite", "calibrate on another text")
    return made
