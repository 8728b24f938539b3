"""Weight formats: how numbers are stored. Methods choose numbers; formats store them; kernels multiply them.

One family a file (`dense.py`, `integer.py`, `codebook.py`, `sparse.py`); the file's name is its registration.
A format's name is the same in recipes, flags and reports: f32, bf16, f16, int8-g64, int4-g128, int1-g32,
codebook3-g64, sparse8-g64. Byte layouts: native/core.h.
"""

from __future__ import annotations

from hasten.formats.base import Format, Weight, get, names

__all__ = ["Format", "Weight", "get", "names"]
