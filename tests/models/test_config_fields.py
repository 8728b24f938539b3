"""Configs that would silently be computed wrongly are refused, naming the field."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny

from hasten import models
from hasten.errors import ConfigError, ContextError, HastenError
from hasten.models.common.rope import KINDS

LLAMA = tiny.CONFIGS["llama"]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": 0}, "hidden_size is 0, must be an integer from 1"),
    ("llama", {"hidden_size": "32"}, "hidden_size is '32'"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"hidden_size": True}, "hidden_size is True"),
    ("llama", {"hidden_size": 30, "num_attention_heads": 4}, "hidden_size 30 is no multiple"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    ("llama", {"head_dim": 7}, "7 rotary features a head"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, must be a positive number"),
    ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ("llama", {"hidden_act": "laplace"}, "hidden_act is 'laplace', must be an activation hasten knows"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, must be true or false"),
    ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes'"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved is True"),
    ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("llama", {"layer_types": ["full_attention"]}, "layer_types is .*, must be a list of 2"),
    ("llama", {"num_local_experts": 8}, "num_local_experts is 8: mixtures of experts"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
    ("llama", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'"),
    ("llama", {"dtype": "int8"}, "dtype is 'int8', must be float32, float16 or bfloat16"),
    ("llama", {"rope_theta": 0}, "rope_theta is 0"),
    ("llama", {"rope_scaling": {"rope_type": "mrope"}}, "rope type 'mrope' is not supported"),
    ("llama", {"rope_scaling": {"type": ["yarn"]}}, "rope type"),
    ("llama", {"rope_scaling": [4.0]}, "rope_scaling is"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope parameter factor is None"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": -2}}, "rope parameter factor is -2"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
    ("llama", {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    (
        "llama",
        {"rope_scaling": {"type": "llama3", **tiny.LLAMA3, "low_freq_factor": 4.0}},
        "high_freq_factor 4.0 must be above low_freq_factor 4.0",
    ),
    ("llama", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor must be a list of 4"),
    (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1}},
        "rope type 'yarn' give frequencies that are no numbers",
    ),
    ("llama", {"rope_theta": 10**400}, "rope_theta is 1000"),
    ("phi3", {"original_max_position_embeddings": 1, "rope_scaling": {"type": "su", **tiny.LONGROPE}}, "no numbers"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "not one for each layer type"),
    ("mistral", {"attention_bias": True}, "attention_bias is True, must be False for mistral"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window is absent or switched off"),
    ("qwen2", {"attention_bias": False}, "attention_bias is False, must be True for qwen2"),
    ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "rope type 'mrope'"),
    ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, "layer_types"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported for phi3"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias is True"),
    ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
    ("gemma2", {"sliding_window": None}, "sliding_window is absent"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, must be absent"),
    ("gemma3_text", {"rope_parameters": {"chunked_attention": {}}}, "rope_parameters"),
    ("gemma3", {"text_config": None}, "text_config is missing"),
    ("gemma3", {"text_config": {"model_type": "gemma2"}}, "text_config has model_type 'gemma2'"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is"),
    ("smollm3", {"no_rope_layers": [2, 0, 0, 1]}, "no_rope_layers is"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
]


@pytest.mark.parametrize(("case", "fields", "message"), REFUSED, ids=lambda v: str(v)[:60])
def test_refused_by_name(case: str, fields: dict[str, Any], message: str) -> None:
    models.build(tiny.CONFIGS[case])
    with pytest.raises(ConfigError, match=message):
        models.build({**tiny.CONFIGS[case], **fields})


def test_unknown_type_names_what_works() -> None:
    for config in ({"model_type": "mamba"}, {}, {"model_type": None}, {"model_type": "common"}, {"model_type": "../x"}):
        with pytest.raises(ConfigError, match="is not supported") as refused:
            models.build(config)
        assert "llama, mistral" in str(refused.value.hint)


def test_unknown_rope_type_names_what_works() -> None:
    with pytest.raises(ConfigError) as refused:
        models.build({**LLAMA, "rope_scaling": {"rope_type": "su"}})
    assert all(kind in str(refused.value.hint) for kind in KINDS)


def test_context_longer_than_the_model() -> None:
    with pytest.raises(ContextError, match="65 tokens is more than the model's 64"):
        models.build(LLAMA, 65)
    assert models.build(LLAMA, 64).context == 64
    assert models.build(LLAMA, 10).context == 10


def test_harmless_fields_are_accepted() -> None:
    extra = {"pretraining_tp": 2, "use_cache": False, "auto_map": {"AutoModel": "evil.Model"}, "architectures": None}
    assert models.build({**LLAMA, **extra}) == models.build(LLAMA)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(tiny.CONFIGS)))
def test_any_field_replaced_by_anything_builds_or_is_refused(data: st.DataObject, name: str) -> None:
    """Never anything but a graph or a typed error, whatever one field holds."""
    config = dict(tiny.CONFIGS[name])
    field = data.draw(st.sampled_from([*sorted(set(config) - {"num_hidden_layers"}), "rope_parameters", "layer_types"]))
    config[field] = data.draw(values)
    with contextlib.suppress(HastenError):
        models.build(config)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_rope_parameter_replaced_by_anything(data: st.DataObject, kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, **tiny.LONGROPE, **tiny.LLAMA3}
    used = {"linear": ["factor"], "dynamic": ["factor"], "llama3": list(tiny.LLAMA3), "longrope": list(tiny.LONGROPE)}
    wanted = {"rope_type", "rope_theta", *used.get(kind, ["factor"] if kind == "yarn" else [])}
    rope = {k: v for k, v in rope.items() if k in wanted}
    models.build({**LLAMA, "rope_parameters": rope})
    rope[data.draw(st.sampled_from(sorted(rope)))] = data.draw(values)
    with contextlib.suppress(HastenError):
        models.build({**LLAMA, "rope_parameters": rope})
