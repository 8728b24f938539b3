"""What clients may send, field by field. Nothing unknown is ignored: each field is read, or refused by its name.

`null` is the same as leaving a field out. Checks that could meet millions of elements stop at the first wrong one.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    StrictInt,
    StrictStr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hasten.server.errors import RequestError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        """One error for the first unknown field, where extra="forbid" would make one for each of a million."""
        if isinstance(data, dict):
            unknown = next((name for name in data if name not in cls.model_fields), None)
            if unknown is not None:
                raise PydanticCustomError("unknown_field", "unknown field '{name}'", {"name": str(unknown)[:100]})
        return data


class First(FailFast):
    """Lists end at their first wrong element; hashable, as unions of annotated types must be."""

    __hash__ = object.__hash__


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{message}", {"message": message})


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _prompt(value: Any) -> Any:
    several = isinstance(value, list) and len(value) > 0
    if isinstance(value, str) or _is_ids(value):
        return value
    if several and (all(isinstance(item, str) for item in value) or all(_is_ids(item) for item in value)):
        return value
    raise _wrong("must be a text, a list of texts, a list of token ids, or a list of such lists")


def _texts(value: Any) -> Any:
    if value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return value
    raise _wrong("must be a text or a list of texts")


def _bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _wrong("must be an object of token ids and biases")
    made = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise _wrong(f"'{token[:30]}' is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise _wrong("a bias must be a number between -100 and 100")
        made[int(token)] = float(bias)
    return made


def _content(value: Any) -> Any:
    """A text, or parts of text, which become one."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong('must be a text or a list of {"type": "text", "text": ...}')
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise _wrong(f"a part is of type '{kind[:30]}': this model reads only text")
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise _wrong('each part must be {"type": "text", "text": ...}')
    return "\n".join(part["text"] for part in value)


_TEXT_OR_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
_IDS_SCHEMA = {"type": "array", "items": {"type": "integer"}}
Ids = Annotated[list[StrictInt], First()]
Words = Annotated[list[StrictStr], First()]
Prompt = Annotated[
    Any,
    AfterValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {**_IDS_SCHEMA, "minItems": 1},
                {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
            ]
        }
    ),
]
Texts = Annotated[Any, AfterValidator(_texts), WithJsonSchema(_TEXT_OR_TEXTS)]
Bias = Annotated[
    Any,
    AfterValidator(_bias),
    WithJsonSchema({"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}),
]
Content = Annotated[
    Any,
    AfterValidator(_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
                {"type": "null"},
            ]
        }
    ),
]
Object = dict[str, Any]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generation(Strict):
    """What both kinds of completion share."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Bias = None
    bad_words: Words | None = None
    allowed_token_ids: Ids | None = None
    seed: int | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: Texts = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    response_format: Object | None = None
    structured_outputs: Object | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    cache_salt: str | None = None
    user: str | None = None
    """Read, and of no effect."""


class CompletionRequest(Generation):
    prompt: Prompt
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: Annotated[list[Object], First()] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    """The last four are in what OpenAI's client sends back of an answer; of no effect."""


class ChatRequest(Generation):
    messages: Annotated[list[Message], First()]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[Object], First()] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Object | None = None
    store: bool | None = None
    metadata: Object | None = None
    service_tier: str | None = None
    """The last three: read, and of no effect."""


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], First()] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise _wrong("give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Ids


Body = TypeVar("Body", bound=Strict)


def parse(raw: bytes, model: type[Body]) -> Body:
    """A request's body as `model`. Raises RequestError, naming the field that is wrong."""
    try:
        document = json.loads(raw, parse_constant=no_constant)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("the body holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, bytes that are no UTF-8, numbers of thousands of digits
        raise RequestError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise RequestError("the body must be a JSON object")
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise _first_error(error) from None


def no_constant(name: str) -> None:
    """For json.loads: raise ValueError for NaN and the infinities, which are no JSON."""
    raise ValueError(f"{name} is not a number that JSON has")


def _first_error(error: ValidationError) -> RequestError:
    found = error.errors(include_url=False, include_context=True, include_input=False)
    first = found[0]
    path = [*first["loc"]]
    if first["type"] == "unknown_field":
        path.append(first["ctx"]["name"])
        name = _dotted(path)
        return RequestError(f"unknown field '{name}'", name, code="unknown_parameter")
    # A union's errors are those of each of its kinds: one for each, in the words of pydantic.
    reasons = dict.fromkeys(e["msg"] for e in found if e["loc"][:1] == first["loc"][:1])
    field = _dotted(path[:1] if len(reasons) > 1 else path)
    return RequestError(f"{field + ': ' if field else ''}{' or '.join(reasons)}", field or None)


def _dotted(path: list[Any]) -> str:
    """('messages', 0, 'role') -> messages[0].role"""
    made = ""
    for part in path:
        made += f"[{part}]" if isinstance(part, int) else f".{part}" if made else str(part)
    return made
