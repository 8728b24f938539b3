"""Fields of a config.json, read with their type and range checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from hasten.errors import ConfigError, ContextError
from hasten.graph.functions import ActivationKind

ACTIVATIONS: dict[str, ActivationKind] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class Fields:
    """A config.json with its architecture's defaults laid under it. A field that is null stays null."""

    def __init__(self, config: dict[str, Any], defaults: dict[str, Any]) -> None:
        self._values = {**defaults, **config}
        self.model_type = str(config.get("model_type"))

    def fail(self, name: str, must: str, hint: str | None = None) -> ConfigError:
        shown = repr(self._values.get(name))
        return ConfigError(f"config.json: {name} is {shown[:80]}, must be {must}", hint)

    def value(self, name: str) -> Any:
        """The raw value; None where it is missing or null."""
        return self._values.get(name)

    def optional_integer(self, name: str, minimum: int = 1, maximum: int = 1 << 30) -> int | None:
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.fail(name, f"an integer from {minimum} to {maximum}")
        return value

    def integer(self, name: str, minimum: int = 1, maximum: int = 1 << 30) -> int:
        value = self.optional_integer(name, minimum, maximum)
        if value is None:
            raise ConfigError(f"config.json: {name} is missing")
        return value

    def optional_number(self, name: str) -> float | None:
        """A positive finite number."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.fail(name, "a positive number")
        return float(value)

    def number(self, name: str) -> float:
        value = self.optional_number(name)
        if value is None:
            raise ConfigError(f"config.json: {name} is missing")
        return value

    def flag(self, name: str) -> bool:
        """True or false; null and missing are false."""
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return bool(value)

    def only(self, name: str, *accepted: object) -> None:
        """Refuse any value but these, null and missing: what would otherwise be computed wrongly without a word."""
        value = self.value(name)
        if value is not None and not any(value is a or (value == a and type(value) is type(a)) for a in accepted):
            expected = " or ".join(repr(a) for a in accepted) or "absent"
            raise self.fail(name, f"{expected} for {self.model_type}")

    def activation(self, name: str) -> ActivationKind:
        value = self.value(name)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.fail(name, "an activation hasten knows", f"known activations: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def layer_types(self, default: Sequence[str]) -> tuple[str, ...]:
        """For each layer `full_attention` or `sliding_attention`; `default` where the config does not say."""
        value = self.value("layer_types")
        if value is None:
            return tuple(default)
        known = ("full_attention", "sliding_attention")
        if not isinstance(value, list) or len(value) != len(default) or any(v not in known for v in value):
            raise self.fail("layer_types", f"a list of {len(default)} of {' or '.join(known)}")
        return tuple(cast(list[str], value))

    def windows(self, layer_types: Sequence[str], window: int | None) -> list[int | None]:
        """Each layer's attention window; a layer that slides needs one."""
        if "sliding_attention" in layer_types and window is None:
            raise ConfigError(
                "config.json: layer_types has sliding_attention, but sliding_window is absent or switched off"
            )
        return [window if t == "sliding_attention" else None for t in layer_types]


def refuse_unsupported(config: dict[str, Any]) -> None:
    """Raise ConfigError for what no architecture here can run, whatever its type."""
    if config.get("quantization_config") is not None:
        quantization = config["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"config.json: quantization_config ({method}) is not supported: the weights are already quantised",
            "start from the original f32, f16 or bf16 checkpoint",
        )
    for name in EXPERTS:
        if config.get(name):
            raise ConfigError(f"config.json: {name} is {config[name]}: mixtures of experts are not supported")
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value is not None and str(value).removeprefix("torch.") not in ("float32", "float16", "bfloat16", "auto"):
            raise ConfigError(f"config.json: {name} is '{value}', must be float32, float16 or bfloat16")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    max_positions: int
    eps: float
    tied: bool
    activation: ActivationKind

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim


def read_shape(fields: Fields, context: int | None, activation: str = "hidden_act") -> Shape:
    """Sizes under the names every decoder's config uses. Raises ConfigError, or ContextError for a context too long."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", maximum=1 << 16)
    kv_heads = fields.optional_integer("num_key_value_heads", maximum=1 << 16) or heads
    head_dim = fields.optional_integer("head_dim", maximum=1 << 16)
    if head_dim is None:
        if hidden % heads:
            raise ConfigError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    if heads % kv_heads:
        raise ConfigError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    max_positions = fields.integer("max_position_embeddings")
    if context is not None and context < 1:
        raise ContextError(f"a context of {context} tokens is impossible")
    return Shape(
        hidden=hidden,
        layers=fields.integer("num_hidden_layers", maximum=10_000),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.integer("intermediate_size"),
        vocabulary=fields.integer("vocab_size"),
        context=context or max_positions,
        max_positions=max_positions,
        eps=fields.number("rms_norm_eps"),
        tied=fields.flag("tie_word_embeddings"),
        activation=fields.activation(activation),
    )
