"""The C++ core (native/binding*.cpp), which says its types in docstrings."""

from typing import Any

def __getattr__(name: str) -> Any: ...
