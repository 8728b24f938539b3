"""Chat templates: published ones render or are refused with a typed error; hostile ones are stopped."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint import making
from support import need_shared_data, shared_data

from hasten.checkpoint import Tokenizer, chat
from hasten.errors import CheckpointError, HastenError, InputError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye now"},
]
VALUES: dict[str, Any] = {
    "messages": MESSAGES[1:],
    "tools": None,
    "documents": None,
    "add_generation_prompt": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
}


def published() -> list[Path]:
    folder = shared_data("tokenizers", "chat_templates")
    return sorted(folder.glob("*.jinja")) if folder else []


# These fail without tools or functions, or (MiroThinker) assign to what is no namespace, in transformers too.
REFUSED = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "MiroThinker",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "fireworks-ai-llama-3-firefunction-v2",
}


@pytest.mark.parametrize("path", published(), ids=lambda p: p.stem)
def test_published_templates_render_or_are_refused(path: Path) -> None:
    template = path.read_text(encoding="utf-8")
    if path.stem in REFUSED:
        with pytest.raises(CheckpointError, match="the chat template failed"):
            chat.render(template, VALUES)
    else:
        prompt = chat.render(template, VALUES)
        assert prompt.index("Hi there") < prompt.index("Bye now")


@pytest.mark.parametrize(
    "name", ["meta-llama-Llama-3.2-3B-Instruct", "Qwen-Qwen2.5-7B-Instruct", "google-gemma-2-2b-it", "Qwen-Qwen3-0.6B"]
)
@pytest.mark.filterwarnings("ignore")
def test_same_prompt_as_transformers(name: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = (need_shared_data("tokenizers", "chat_templates") / f"{name}.jinja").read_text(encoding="utf-8")
    for prompted in (True, False):
        theirs = utils.render_jinja_template(
            [VALUES["messages"]],
            chat_template=template,
            add_generation_prompt=prompted,
            bos_token="<s>",
            eos_token="</s>",
        )[0][0]
        assert chat.render(template, {**VALUES, "add_generation_prompt": prompted}) == theirs


def test_generation_blocks_and_loop_controls() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert chat.render(template, VALUES) == "Hello"
    assert chat.render("{{ messages | tojson }}", {"messages": [{"a": "<é>"}]}) == '[{"a": "<é>"}]'
    assert len(chat.render("{{ strftime_now('%Y') }}", {})) == 4


def test_a_template_may_refuse_messages() -> None:
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        chat.render("{{ raise_exception('roles must alternate') }}", VALUES)


BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = messages|tojson %}{% set y = range(9999)|list %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [1] * 10**10 }}",
    "{{ 'x'|center(10**10) }}",
    "{{ 'x'.center(10**10) }}",
    "{{ 'x'.ljust(100000000000) }}",
    "{{ '%100000000000d' % 1 }}",
    "{{ '%*d' % (100000000000, 1) }}",
    "{{ '{:>100000000000}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=100000000000) }}",
    "{{ 'a'|replace('a', 'b'*100000)|replace('b', 'c'*100000) }}",
    "{{ 'a'.replace('a', 'b'*100000).replace('b', 'c'*100000) }}",
    "{{ (['a'*1000000] * 100000)|join }}",
    "{{ ''.join(['a'*1000000] * 100000) }}",
    "{{ ('a\n'*8000000)|indent(99999) }}",
    "{{ 9**99999999 }}",
    "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    "{{ ('a\n' * 7000000)|wordwrap(2) }}",
]


@pytest.mark.parametrize("template", BOMBS, ids=lambda t: t[:50])
def test_bombs_are_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="the chat template asks for"):
        chat.render(template, VALUES)
    assert time.monotonic() - begun < 8


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ strftime_now.__globals__['sys'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ lipsum(99999, True, 90000, 99999) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ nothing.at.all }}",
    "{% for %}",
    "{{ unclosed",
    "{" * 5000,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "x" * (chat.LARGEST_TEMPLATE + 1),
]


@pytest.mark.parametrize("template", ESCAPES, ids=lambda t: t[:50])
def test_escapes_and_nonsense_are_refused(template: str) -> None:
    with pytest.raises(CheckpointError, match="the chat template"):
        chat.render(template, VALUES)


@pytest.mark.parametrize(
    "template",
    ["{{ messages.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ '{0.__class__}'.format(messages) }}"],
)
def test_what_is_inside_python_is_not_shown(template: str) -> None:
    assert chat.render(template, VALUES) == ""


def test_where_templates_are_kept(tmp_path: Path) -> None:
    making.directory(tmp_path)
    assert not Tokenizer(tmp_path).has_chat_template
    with pytest.raises(CheckpointError, match="has no chat template"):
        Tokenizer(tmp_path).apply_chat_template(MESSAGES)

    config = {"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).apply_chat_template(MESSAGES) == "<s>Be brief."

    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with {{ tools|length }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer(tmp_path).apply_chat_template(MESSAGES) == "plain"
    assert Tokenizer(tmp_path).apply_chat_template(MESSAGES, tools=[{"name": "f"}]) == "with 1"

    (tmp_path / "chat_template.jinja").write_text("{% if add_generation_prompt %}go{% endif %}{{ extra }}")
    assert Tokenizer(tmp_path).apply_chat_template(MESSAGES, extra="!") == "go!"
    assert Tokenizer(tmp_path).apply_chat_template(MESSAGES, add_generation_prompt=False) == ""


def test_messages_are_not_changed() -> None:
    before = json.dumps(MESSAGES)
    for path in published()[:5]:
        try:
            chat.render(path.read_text(encoding="utf-8"), VALUES)
        except HastenError:
            continue
    assert json.dumps(MESSAGES) == before
