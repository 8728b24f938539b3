"""The page at the root, in a real browser without a window. HASTEN_PICTURES names a folder to keep screenshots in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from server.browser import EXECUTABLE, Browser
from server.serving import Server, eventually, serve

from hasten import LLM

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no chromium here")


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    with serve(llm) as running:
        yield running


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


def picture(browser: Browser, tmp_path: Path, name: str) -> None:
    browser.picture(Path(os.environ.get("HASTEN_PICTURES") or tmp_path) / f"{name}.png")


def say(browser: Browser, text: str) -> None:
    browser.run("document.getElementById('text').focus()")
    browser.write(text)
    browser.enter()


IDLE = "document.getElementById('send').textContent === 'Send' && document.querySelectorAll('.assistant footer').length"


@pytest.mark.parametrize(("name", "width", "dark"), [("wide", 1200, False), ("phone", 390, True)])
def test_a_conversation(server: Server, browser: Browser, tmp_path: Path, name: str, width: int, dark: bool) -> None:
    browser.open(server.url, width, 800, dark)
    browser.until("document.getElementById('model').textContent.startsWith('demo')")
    picture(browser, tmp_path, f"{name}-empty")
    browser.run("for (const [k, v] of [['max_tokens', 60], ['seed', 3]]) document.getElementById(k).value = v")
    say(browser, "Read a file")
    browser.until(IDLE)
    said = browser.run("document.querySelector('.assistant div').textContent")
    how = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "max_tokens": 60, "seed": 3}
    messages = [{"role": "user", "content": "Read a file"}]
    (wanted,) = server.post("/v1/chat/completions", {"messages": messages, **how}).json()["choices"]
    assert said == wanted["message"]["content"]
    live = browser.run("document.getElementById('live').textContent")
    assert "first token after" in live
    assert "tokens/s" in live
    browser.point(".token:nth-child(5)")
    browser.until("getComputedStyle(document.getElementById('tip')).display === 'block'")
    rows = browser.run("[...document.querySelectorAll('#tip div')].map((d) => d.textContent)")
    assert len(rows) >= 5
    assert all(row.endswith("%") for row in rows)
    picture(browser, tmp_path, f"{name}-answer")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the window"
    if name == "phone":
        browser.point("#panel", click=True)
        assert browser.run("getComputedStyle(document.getElementById('settings')).display") == "block"
        picture(browser, tmp_path, "phone-settings")
    assert browser.errors == []


def test_stop(server: Server, browser: Browser, tmp_path: Path) -> None:
    browser.open(server.url)
    browser.run("document.getElementById('max_tokens').value = 450")
    before = server.service.stats.finished["abort"]
    say(browser, "Write for ever")
    browser.until("document.querySelectorAll('.token').length > 2")
    picture(browser, tmp_path, "wide-running")
    browser.point("#send", click=True)
    browser.until(IDLE)
    eventually(server.idle)
    assert server.service.stats.finished["abort"] == before + 1
    assert "stopped by you" in browser.run("document.querySelector('.assistant footer').textContent")


def test_continuing_a_text_and_colours(server: Server, browser: Browser, tmp_path: Path) -> None:
    browser.open(server.url, dark=True)
    browser.run(
        "for (const [k, v] of [['mode', 'complete'], ['max_tokens', 80], ['seed', 1]]) $(k).value = v;"
        "$('shades').checked = true; show()"
    )
    say(browser, "def read_config(path):")
    browser.until(IDLE)
    assert browser.run("document.querySelectorAll('.token').length") > 40
    picture(browser, tmp_path, "wide-colours")
    assert browser.errors == []


def test_what_the_server_refuses_is_shown(server: Server, browser: Browser, tmp_path: Path) -> None:
    browser.open(server.url)
    browser.run("document.getElementById('max_tokens').value = 10")
    say(browser, "word " * 700)
    browser.until("document.querySelectorAll('.error').length")
    assert "the context holds 512" in browser.run("document.querySelector('.error').textContent")
    browser.until("!running")
    assert browser.run("document.getElementById('live').textContent") == "", "there is nothing to wait for"
    picture(browser, tmp_path, "wide-refused")


def test_what_a_model_writes_is_no_markup(server: Server, browser: Browser) -> None:
    browser.open(server.url)
    browser.run("window.hit = 0; add(document.querySelector('#talk'), '<img src=x onerror=hit=1>', [])")
    assert browser.run("document.querySelectorAll('#talk img').length") == 0
