"""What answers look like, as JSON schemas for the OpenAPI description. Tests hold every answer against them."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TRUTH: Schema = {"type": "boolean"}
LOGPROB: Schema = {"type": "number", "maximum": 0}


def made(needed: dict[str, Schema], /, **others: Schema) -> Schema:
    """An object that has all of `needed`, and may have the others."""
    return {"type": "object", "properties": {**needed, **others}, "required": list(needed)}


def several(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def constant(value: str) -> Schema:
    return {"const": value}


ERROR = made({"error": made({"message": TEXT, "type": TEXT, "param": maybe(TEXT), "code": maybe(TEXT)})})
USAGE = made(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
    prompt_tokens_details=made({"cached_tokens": COUNT}),
)
FINISH: Schema = {"enum": ["stop", "length", "tool_calls"]}
"""Of whole answers: one that was aborted has no reader."""
STOP_REASON = maybe({"type": ["string", "integer"]})
LOGPROBS = made(
    {
        "tokens": several(TEXT),
        "token_logprobs": several(maybe(LOGPROB)),
        "top_logprobs": several(maybe({"type": "object", "additionalProperties": LOGPROB})),
        "text_offset": several(COUNT),
    }
)
PROMPT_LOGPROB = made({"logprob": LOGPROB, "rank": maybe({"type": "integer", "minimum": 1}), "decoded_token": TEXT})
COMPLETION = made(
    {
        "id": TEXT,
        "object": constant("text_completion"),
        "created": COUNT,
        "model": TEXT,
        "choices": several(
            made(
                {"index": COUNT, "text": TEXT, "logprobs": maybe(LOGPROBS), "finish_reason": FINISH},
                stop_reason=STOP_REASON,
                prompt_logprobs=several(maybe({"type": "object", "additionalProperties": PROMPT_LOGPROB})),
            )
        ),
        "usage": USAGE,
    }
)
TOKEN = {"token": TEXT, "logprob": LOGPROB, "bytes": maybe(several({"type": "integer", "minimum": 0, "maximum": 255}))}
TOOL_CALL = made({"id": TEXT, "type": constant("function"), "function": made({"name": TEXT, "arguments": TEXT})})
MESSAGE = made(
    {"role": constant("assistant"), "content": maybe(TEXT)}, reasoning_content=TEXT, tool_calls=several(TOOL_CALL)
)
CHAT_COMPLETION = made(
    {
        "id": TEXT,
        "object": constant("chat.completion"),
        "created": COUNT,
        "model": TEXT,
        "choices": several(
            made(
                {
                    "index": COUNT,
                    "message": MESSAGE,
                    "logprobs": maybe(
                        made({"content": several(made({**TOKEN, "top_logprobs": several(made(TOKEN))}))})
                    ),
                    "finish_reason": FINISH,
                },
                stop_reason=STOP_REASON,
            )
        ),
        "usage": USAGE,
    }
)
MODEL = made(
    {
        "id": TEXT,
        "object": constant("model"),
        "created": COUNT,
        "owned_by": constant("hasten"),
        "root": TEXT,
        "max_model_len": COUNT,
        "chat": TRUTH,
    }
)
MODELS = made({"object": constant("list"), "data": several(MODEL)})
TOKENS = made({"count": COUNT, "max_model_len": COUNT, "tokens": several(COUNT)}, token_strs=several(maybe(TEXT)))
DETOKENIZED = made({"prompt": TEXT})
HEALTH = made(
    {
        "ok": TRUTH,
        "status": {"enum": ["serving", "draining", "failed", "stopped", "stalled"]},
        "restarts": COUNT,
        "cause": maybe(TEXT),
        "running": COUNT,
        "waiting": COUNT,
        "heartbeat_seconds": {"type": "number", "minimum": 0},
    }
)


def gives(schema: Schema, *, streams: bool = False) -> Schema:
    """A route's 200, for its `responses`: JSON, or events where a request asks for a stream."""
    content: Schema = {"application/json": {"schema": schema}}
    if streams:
        content["text/event-stream"] = {"schema": TEXT}
    return {"description": "the answer", "content": content}
