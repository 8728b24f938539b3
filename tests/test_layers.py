"""The house has floors (docs/structure.md): a package imports only from floors below its own, lazy imports included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "hasten"

# Bottom first; rooms on one floor never import each other. `_native` is the C++ core: it knows no Python.
# `__init__` is the face, which hands names on from below (`from hasten import LLM`); only the command line is above.
FLOORS = (
    {"_native"},
    {"errors"},
    {"formats"},
    {"graph"},
    {"backends", "models"},
    {"checkpoint", "demo"},
    {"engine", "compress"},
    {"server", "evaluate", "bench"},
    {"search"},
    {"cluster"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Optional or slow to import: only inside the functions that use them.
HEAVY = {"torch", "transformers", "scipy", "matplotlib", "jax", "highspy", "rich", "llguidance"}

# Bookkeeping that must be testable in milliseconds (engine/scheduler.py and engine/blocks.py know no numbers).
PURE = ("engine/scheduler.py", "engine/blocks.py")


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported anywhere in a module of `package`.

    `from hasten.a import b` yields `hasten.a.b`; `importlib.import_module` and `__import__` count where their
    argument begins with a literal.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                up = parents[: len(parents) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            literal = leading_text(node.args[0])
            if called in {"import_module", "__import__"} and literal:
                yield node.lineno, literal


def leading_text(node: ast.expr) -> str:
    """The literal text that an expression begins with: of "a.b" and of f"a.{name}"."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def room_of(name: str) -> str | None:
    """The room that a dotted name lives in; None for what is not ours. What is no room is a name of the face."""
    parts = name.rstrip(".").split(".")
    if parts[0] != "hasten":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"


def violations(package: Path) -> list[str]:
    """What breaks the floors below `package` (a directory laid out like src/hasten), one line each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        room = relative.parts[0].removesuffix(".py")
        dotted = ".".join(["hasten", *relative.parts[:-1]])
        if room not in FLOOR:
            found.append(f"{relative}: '{room}' has no floor; give it one in tests/test_layers.py")
            continue
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), dotted):
            other = room_of(name)
            if other is not None and other != room and FLOOR[other] >= FLOOR[room]:
                found.append(f"{relative}:{line}: {room} (floor {FLOOR[room]}) imports {name}")
    return found


def top_level_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name.split(".")[0] for node in body for _, name in imports(node, "hasten")}


def test_floors_hold() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "blamed"),
    [
        ("graph/bad.py", "import hasten.models.llama", "hasten.models.llama"),
        ("graph/bad.py", "from hasten import engine", "hasten.engine"),
        ("graph/bad.py", "from hasten import LLM", "hasten.LLM"),
        ("graph/bad.py", "import hasten", "hasten"),
        ("graph/bad.py", "def f():\n    from hasten.cli.main import main", "hasten.cli.main.main"),
        ("graph/bad.py", "from ..checkpoint import open", "hasten.checkpoint.open"),
        ("graph/bad.py", "import importlib\nimportlib.import_module(f'hasten.cli.{1}')", "hasten.cli."),
        (
            "graph/bad.py",
            "if TYPE_CHECKING:\n    from hasten.backends.batch import Batch",
            "hasten.backends.batch.Batch",
        ),
        ("backends/bad.py", "from hasten.models import llama", "hasten.models.llama"),
        ("compress/methods/bad.py", "from ...engine import llm", "hasten.engine.llm"),
        ("evaluate/bad.py", "from hasten.bench import latency", "hasten.bench.latency"),
        ("__init__.py", "def f():\n    from hasten.cli.main import main", "hasten.cli.main.main"),
        ("attic/bad.py", "x = 1", "'attic' has no floor"),
    ],
)
def test_violations_are_seen(tmp_path: Path, file: str, source: str, blamed: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1
    assert blamed in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("graph/good.py", "from hasten.errors import HastenError\nfrom hasten.formats.base import Weight"),
        ("graph/good.py", "from . import ops\nfrom .ops import Op\nimport hasten.graph.ops\nfrom hasten import errors"),
        (
            "cli/good.py",
            "def f():\n    from hasten import LLM\n    import hasten\n    import numpy, hasten.search.report",
        ),
        ("bench/good.py", "from hasten import _native\nimport importlib\nimportlib.import_module('json')"),
        ("__init__.py", "def __getattr__(name):\n    from hasten.engine.llm import LLM\n    return LLM"),
    ],
)
def test_the_allowed_is_allowed(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert violations(tmp_path) == []


def test_every_room_has_one_floor() -> None:
    assert sum(len(rooms) for rooms in FLOORS) == len(FLOOR)


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    heavy = {str(p.relative_to(PACKAGE)): top_level_imports(p) & HEAVY for p in PACKAGE.rglob("*.py")}
    assert {path: names for path, names in heavy.items() if names} == {}


@pytest.mark.parametrize("file", PURE)
def test_bookkeeping_knows_no_numerics(file: str) -> None:
    path = PACKAGE / file
    if not path.exists():
        pytest.skip(f"{file} is not written yet")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    roots = {name.split(".")[0] for _, name in imports(tree, "hasten.engine")}
    rooms = {room_of(name) for _, name in imports(tree, "hasten.engine")}
    assert not roots & {"numpy", "torch"}
    assert not rooms & {"backends", "_native"}
