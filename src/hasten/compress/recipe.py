"""A recipe says by hand which matrix gets which format:

    tensors:
      - match: "*.mlp.*"          # a glob over tensor names; the first rule that matches wins
        format: int4-g64          # or "original": leave it as it is
        method: clip              # optional: the format's best method otherwise (gptq, where it can)
      - match: "*"
        format: int8-g64

Matrices that no rule matches stay as they are. Another key, `structure`, changes the model's shape
(structure_recipe.py), `fold: [awq]` names what is folded into the weights before they are packed (folds/), and
`cache: int8`, or a list with a format for each layer, says what the cache of keys and values is served in.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from hasten import formats
from hasten.backends.cache import FORMATS, KvFormat
from hasten.compress import methods, structure_recipe
from hasten.compress.structure_recipe import StructureRecipe
from hasten.errors import FormatError, InputError

ORIGINAL = "original"
KEYS = ("match", "format", "method")
EXAMPLE = 'write:\ntensors:\n  - match: "*"\n    format: int8-g64'


@dataclass(frozen=True)
class Choice:
    """What becomes of one matrix. `format` "original" leaves it alone, and then `method` is "original" too."""

    format: str
    method: str

    @property
    def is_original(self) -> bool:
        return self.format == ORIGINAL


KEEP = Choice(ORIGINAL, ORIGINAL)


@dataclass(frozen=True)
class Rule:
    match: str
    choice: Choice


@dataclass(frozen=True)
class Recipe:
    rules: tuple[Rule, ...]
    structure: StructureRecipe | None = None
    folds: tuple[str, ...] = ()
    cache: KvFormat = "auto"

    def assign(self, names: Sequence[str]) -> dict[str, Choice]:
        """Tensor name -> choice, by the first rule that matches.

        Raises InputError for a rule that matches nothing, or nothing that earlier rules have left.
        """
        left = set(names)
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.match) for name in names):
                near = difflib.get_close_matches(rule.match, names, 1, 0.0)
                hint = f"a tensor is called '{near[0]}'; * stands for any characters" if near else None
                raise InputError(f"the recipe's pattern '{rule.match}' matches no matrix of this model", hint)
            mine = {name for name in left if fnmatchcase(name, rule.match)}
            if not mine and [r.match for r in self.rules].count(rule.match) > 1:
                raise InputError(f"the recipe has the pattern '{rule.match}' twice", "leave out one of the rules")
            if not mine:
                raise InputError(
                    f"the recipe's pattern '{rule.match}' comes too late: earlier rules take all that it matches",
                    "the first rule that matches wins; put the narrower pattern first",
                )
            left -= mine
        return {name: next((r.choice for r in self.rules if fnmatchcase(name, r.match)), KEEP) for name in names}


def read(path: Path) -> Recipe:
    """Raises InputError naming the file, and the rule that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"the recipe {path} is not UTF-8 text") from None
    try:
        return parse(text)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", error.hint) from None


def parse(text: str) -> Recipe:
    """YAML text -> Recipe. Raises InputError."""
    try:
        document = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"this is not YAML: {' '.join(str(error).split())}", EXAMPLE) from None
    except RecursionError:
        raise InputError("this is not a recipe: it is nested too deeply", EXAMPLE) from None
    if not isinstance(document, dict) or not {"tensors", "structure", "cache"} & set(document):
        raise InputError("a recipe is a mapping with one of the keys 'tensors', 'structure' and 'cache'", EXAMPLE)
    unknown = [key for key in document if key not in ("tensors", "structure", "fold", "cache")]
    if unknown:
        raise InputError(f"unknown key '{unknown[0]}' in the recipe", "its keys: tensors, structure, fold and cache")
    named = document.get("fold", [])
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named) or len(set(named)) < len(named):
        raise InputError(f"'fold' is {named!r}, must be a list of different names", "write fold: [awq]")
    structure = structure_recipe.parse(document["structure"]) if "structure" in document else None
    cache = _cache(document["cache"]) if "cache" in document else "auto"
    if "tensors" not in document:
        return Recipe((), structure, tuple(named), cache)
    rules = document["tensors"]
    if not isinstance(rules, list) or not rules:
        raise InputError("'tensors' must be a list of rules, at least one", EXAMPLE)
    return Recipe(tuple(_rule(rule, number) for number, rule in enumerate(rules, 1)), structure, tuple(named), cache)


def _cache(named: Any) -> KvFormat:
    names = named if isinstance(named, list) else [named]
    if not names or not all(name in FORMATS for name in names):
        raise InputError(
            f"'cache' is {named!r}, must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or a list of one for each layer"
        )
    return tuple(names) if isinstance(named, list) else str(named)


def _rule(rule: Any, number: int) -> Rule:
    if not isinstance(rule, dict):
        raise InputError(f"rule {number} must be a mapping with the keys {', '.join(KEYS)}", EXAMPLE)
    for key, value in rule.items():
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(KEYS)}"
            raise InputError(f"rule {number} has the unknown key '{key}'", hint)
        if not isinstance(value, str):
            raise InputError(f"rule {number}: '{key}' must be text, not {value!r}", "put it in quotes")
    for key in KEYS[:2]:
        if key not in rule:
            raise InputError(f"rule {number} lacks the key '{key}'", EXAMPLE)
    return Rule(rule["match"], _choice(rule, number))


def _choice(rule: dict[str, str], number: int) -> Choice:
    name, method = rule["format"], rule.get("method")
    if name == ORIGINAL:
        if method not in (None, ORIGINAL):
            raise InputError(f"rule {number}: format 'original' takes no method, not '{method}'")
        return KEEP
    try:
        format = formats.get(name)
        method = method or methods.best_for(format)
        supported = methods.get(method).supports(format)
    except (FormatError, InputError) as error:
        raise InputError(f"rule {number}: {error.message}", error.hint) from None
    if not supported:
        best = methods.best_for(format)
        raise InputError(f"rule {number}: method '{method}' cannot make {name}", f"'{best}' can")
    return Choice(name, method)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice: the second would silently win."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' stands twice", key.start_mark)
        seen.add(str(key.value))
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
