"""Weight formats: how numbers are stored. Methods choose numbers; formats store them; kernels multiply them.

One family a file (`dense.py`, `integer.py`, `codebook.py`); the file's name is its registration. A format's name is the
same in recipes, flags and reports: f32, bf16, f16, int8-g64, int4-g128, codebook4-g64. Byte layouts: native/core.h.
"""

from __future__ import annotations

from hasten.formats.base import Format, Weight, get, names

__all__ = ["Format", "Weight", "get", "names"]
