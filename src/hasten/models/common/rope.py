"""Rotary frequencies with every scaling that configs state, as transformers computes them (in float32)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import ConfigError, ContextError
from hasten.models.common.fields import Fields, Shape

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rotation:
    """frequencies[i] turns the pair (i, i + n) of each head; cos and sin are multiplied by `factor`."""

    frequencies: tuple[float, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class Parameters:
    """A config's rope parameters, gathered from either generation of field names."""

    values: dict[str, Any]
    dim: int
    """Features of a head that turn."""
    context: int
    max_positions: int

    def number(self, name: str, default: float | None = None, minimum: float = 0.0) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum < value < 1e30:
            raise ConfigError(f"config.json: rope parameter {name} is {value!r}, must be a number above {minimum}")
        return float(value)

    def factors(self, name: str) -> Float32:
        value = self.values.get(name)
        valid = isinstance(value, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < 1e30 for v in value
        )
        if not valid or len(value or ()) != self.dim // 2:
            raise ConfigError(f"config.json: rope parameter {name} must be a list of {self.dim // 2} positive numbers")
        return np.array(value, dtype=np.float32)

    def wavelengths(self, base: float | None = None) -> Float32:
        """base^(2i / dim), [dim / 2]."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        return np.asarray(np.float32(base or self.number("rope_theta")) ** exponents, dtype=np.float32)

    def frequencies(self, base: float | None = None) -> Float32:
        return np.asarray(np.float32(1) / self.wavelengths(base), dtype=np.float32)


def _default(p: Parameters) -> tuple[Float32, float]:
    return p.frequencies(), 1.0


def _linear(p: Parameters) -> tuple[Float32, float]:
    return np.asarray(p.frequencies() / np.float32(p.number("factor"))), 1.0


def _dynamic(p: Parameters) -> tuple[Float32, float]:
    """NTK-aware scaling of the base, for the context the graph is built for."""
    factor, length = p.number("factor"), max(p.context, p.max_positions)
    if p.dim <= 2:
        raise ConfigError("config.json: rope type 'dynamic' needs more than two rotary features a head")
    stretch = (factor * length / p.max_positions - (factor - 1)) ** (p.dim / (p.dim - 2))
    return p.frequencies(p.number("rope_theta") * stretch), 1.0


def _llama3(p: Parameters) -> tuple[Float32, float]:
    frequencies = p.frequencies()
    factor, low, high = p.number("factor"), p.number("low_freq_factor"), p.number("high_freq_factor")
    if high <= low:
        raise ConfigError(f"config.json: rope high_freq_factor {high} must be above low_freq_factor {low}")
    original = p.number("original_max_position_embeddings")
    turns = original * frequencies / (2 * math.pi)  # over the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - smooth) * frequencies / factor + smooth * frequencies).astype(np.float32), 1.0


def _yarn(p: Parameters) -> tuple[Float32, float]:
    """Peng et al. 2023 (arXiv:2309.00071)."""
    original = p.number("original_max_position_embeddings")
    factor = p.number("factor", p.max_positions / original)
    base = p.number("rope_theta")
    truncate = p.values.get("truncate", True)

    def correction(turns: float) -> float:
        return p.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction(p.number("beta_fast", 32.0)), correction(p.number("beta_slow", 1.0))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, p.dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(p.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    wavelengths = p.wavelengths()
    frequencies = ramp / (factor * wavelengths) + (1 - ramp) / wavelengths

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scale = 1.0
    if p.values.get("attention_factor") is not None:
        scale = p.number("attention_factor")
    elif p.values.get("mscale") and p.values.get("mscale_all_dim"):
        scale = magnitude(p.number("mscale")) / magnitude(p.number("mscale_all_dim"))
    else:
        scale = magnitude(1.0)
    return frequencies.astype(np.float32), scale


def _longrope(p: Parameters) -> tuple[Float32, float]:
    """Ding et al. 2024 (arXiv:2402.13753): the long factors where the context exceeds the original one."""
    original = p.number("original_max_position_embeddings")
    short, long = p.factors("short_factor"), p.factors("long_factor")
    factor = p.number("factor", p.max_positions / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    chosen = long if p.context > original else short
    return np.asarray(p.frequencies() / chosen), p.number("attention_factor", default)


KINDS: dict[str, Callable[[Parameters], tuple[Float32, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
USED = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
ANYWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


def read_rope(
    fields: Fields,
    shape: Shape,
    *,
    layer_type: str | None = None,
    theta: float = 10_000.0,
    kinds: tuple[str, ...] = tuple(KINDS),
    aliases: dict[str, str] | None = None,
    partial: bool = False,
    parameters: dict[str, Any] | None = None,
) -> Rotation:
    """The rotation that a config asks for: `rope_parameters` (transformers 5, with an entry for each layer type where
    `layer_type` is given), or `rope_theta` and `rope_scaling` (transformers 4), or `parameters` where the caller has
    gathered them. `theta` is the architecture's default base, `kinds` the scalings it may use.
    """
    values = dict(parameters if parameters is not None else _gather(fields, layer_type))
    if values.get("rope_theta") is None:
        values["rope_theta"] = fields.number("rope_theta") if fields.value("rope_theta") is not None else theta
    values.setdefault("partial_rotary_factor", fields.value("partial_rotary_factor"))
    kind = values.get("rope_type") or values.get("type") or "default"
    kind = (aliases or {}).get(kind, kind) if isinstance(kind, str) else kind
    if kind not in kinds:
        raise ConfigError(
            f"config.json: rope type '{kind}' is not supported for {fields.model_type}",
            f"supported rope types: {', '.join(kinds)}",
        )
    unknown = set(values) - ANYWHERE - USED[kind]
    if unknown:
        raise ConfigError(f"config.json: rope parameter {sorted(unknown)[0]} is unknown for rope type '{kind}'")
    if fields.value("original_max_position_embeddings") is not None:
        values["original_max_position_embeddings"] = fields.value("original_max_position_embeddings")
    values.setdefault("original_max_position_embeddings", shape.max_positions)
    if shape.context > shape.max_positions and kind != "dynamic":
        raise ContextError(
            f"a context of {shape.context} tokens is more than the model's {shape.max_positions}",
            f"ask for at most {shape.max_positions}",
        )
    p = Parameters(values, _rotary_dim(values, shape, partial), shape.context, shape.max_positions)
    return _rotation(kind, p)


def _rotation(kind: str, p: Parameters) -> Rotation:
    try:
        with np.errstate(all="ignore"):
            frequencies, factor = KINDS[kind](p)
    except (ArithmeticError, ValueError):  # logarithms of what is no wavelength
        frequencies, factor = np.full(1, np.nan, np.float32), 1.0
    if not np.isfinite(frequencies).all() or not math.isfinite(factor):
        raise ConfigError(f"config.json: the parameters of rope type '{kind}' give frequencies that are no numbers")
    return Rotation(tuple(float(f) for f in frequencies), float(factor))


def _gather(fields: Fields, layer_type: str | None) -> dict[str, Any]:
    """rope_scaling where it is given, else rope_parameters, or its part for `layer_type`."""
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.value(name)
        if not value:
            continue
        if not isinstance(value, dict):
            raise fields.fail(name, "an object or null")
        nested = {k: v for k, v in value.items() if isinstance(v, dict)}
        if not nested:
            return value
        if layer_type not in nested:
            raise fields.fail(name, f"one set of rope parameters for {fields.model_type}, not one for each layer type")
        return nested[layer_type]
    return {}


def _rotary_dim(values: dict[str, Any], shape: Shape, partial: bool) -> int:
    share = values.get("partial_rotary_factor")
    if share is None:
        share = 1.0
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(f"config.json: partial_rotary_factor is {share!r}, must be above 0 and at most 1")
    if share != 1 and not partial:
        raise ConfigError(f"config.json: partial_rotary_factor is {share}: this architecture turns whole heads")
    dim = int(shape.head_dim * share)
    if dim < 2 or dim % 2:
        raise ConfigError(f"config.json: {dim} rotary features a head (head_dim {shape.head_dim}), must be even")
    return dim
