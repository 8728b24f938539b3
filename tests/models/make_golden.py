"""Write golden.npz: logits of transformers, in float32, for every case of tiny.py.

    python tests/models/make_golden.py        # needs torch and transformers

Run it again after adding a case; the file holds only the rows that tiny.ROWS names.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
GOLDEN = Path(__file__).with_name("golden.npz")


def transformers_logits(config: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocabulary] of transformers' own model with the weights of tiny.py."""
    import torch
    from models import tiny
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = copy.deepcopy(config.get("text_config", config))  # transformers writes into what it is given
    theirs = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(tiny.tensor(name, tuple(parameter.shape))))
        logits: np.ndarray = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    return logits


def main() -> None:
    from models import tiny

    golden = {n: transformers_logits(c, tiny.TOKENS)[tiny.ROWS] for n, c in tiny.CONFIGS.items()}
    np.savez_compressed(GOLDEN, **golden)
    print(f"wrote {GOLDEN.name}: {len(golden)} cases, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
