"""Gemma 3 as published with its vision tower: the text model inside it. Images are not read."""

from __future__ import annotations

from typing import Any

from hasten.errors import ConfigError
from hasten.graph.graph import Graph
from hasten.models import gemma3_text
from hasten.models.common.fields import refuse_unsupported

# transformers has kept the text model under two names.
RENAMED = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def build(config: dict[str, Any], context: int | None = None) -> Graph:
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError("config.json: text_config is missing, gemma3 keeps its language model's fields there")
    if text.get("model_type", "gemma3_text") != "gemma3_text":
        raise ConfigError(f"config.json: text_config has model_type '{text['model_type']}', must be 'gemma3_text'")
    refuse_unsupported(text)
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return gemma3_text.build({"model_type": "gemma3_text", **tied, **text}, context)
