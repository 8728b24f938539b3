from __future__ import annotations

import pytest
from support import need_shared_data

from hasten import checkpoint
from hasten.bench.peak import peak_memory
from hasten.errors import BackendError


def test_peak_holds_weights_and_cache() -> None:
    source = str(need_shared_data("models", "stories260K-hf"))
    small = peak_memory(source, prompt=8, new=2)
    large = peak_memory(source, prompt=448, new=2, batch=32)
    model = checkpoint.open(source)
    weights = sum(w.nbytes for w in model.weights().values())
    assert weights < small < 1 << 30
    # 31 more caches of 448 tokens and more, each 5 layers of 4 heads of 8 keys and values in float32.
    assert 15e6 < large - small < 300e6


def test_failure_is_told() -> None:
    with pytest.raises(BackendError, match=r"no/such/model failed: .*no model at 'no/such/model'"):
        peak_memory("no/such/model")
