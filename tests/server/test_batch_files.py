"""The files of a batch: what is refused before anything is loaded, and what an end at any moment leaves behind."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from server.batches import EMBEDDINGS, read, request, run, without_company, write

from hasten import LLM
from hasten.cli.main import main
from hasten.errors import InputError, OutputError
from hasten.server import batch_input
from hasten.server.batch_input import Requests
from hasten.server.batch_output import Results

GOOD = json.dumps(request("good", prompt="a")).encode()


def changed(**changes: Any) -> bytes:
    line = {**request("other", prompt="a"), **changes}
    return json.dumps({k: v for k, v in line.items() if v is not ...}).encode()


WRONG = {
    "no JSON": (b"{", "line 2 is not JSON: Expecting property name"),
    "two objects": (GOOD + GOOD, "line 2 is not JSON: Extra data"),
    "no number": (b'{"custom_id": NaN}', "line 2 is not JSON: NaN is not a number that JSON has"),
    "no object": (b"[1]", "line 2 is a JSON list, must be an object"),
    "not UTF-8": (b'{"custom_id": "\xff"}', r"line 2 is not UTF-8 text \(byte 16\)"),
    "binary": (b"\x00\x01\x02", "line 2 is not JSON"),
    "nested": (b'{"custom_id": "a", "body": ' + b"[" * 300 + b"]" * 300 + b"}", "line 2 is nested too deeply"),
    "deep": (b"[" * 100_000, "line 2 is nested too deeply"),
    "long": (b'"' + b"a" * (1 << 20) + b'"', "line 2 is longer than 524288 bytes"),
    "digits": (b'{"custom_id": ' + b"1" * 5000 + b"}", "line 2 is not JSON"),
    "no id": (changed(custom_id=...), "line 2 has no custom_id"),
    "no body": (changed(body=...), "line 2 has no body"),
    "empty id": (changed(custom_id=""), "line 2 has a custom_id that is no text of 1 to 512 characters"),
    "id of another type": (changed(custom_id=7), "line 2 has a custom_id that is no text"),
    "long id": (changed(custom_id="a" * 513), "line 2 has a custom_id that is no text"),
    "half a character": (changed(custom_id="\ud800"), "line 2 has a custom_id that is no text"),
    "same id": (changed(custom_id="good"), "line 2 has the custom_id 'good', which line 1 has already"),
    "method": (changed(method="GET"), "line 2 has the method 'GET', must be 'POST'"),
    "url": (changed(url="/v1/models"), "line 2 has the url '/v1/models'; known: /v1/chat/completions, "),
    "url of another type": (changed(url=["/v1/completions"]), "line 2 has the url"),
    "body": (changed(body="a"), "line 2 has a body that is a JSON text, must be an object"),
    "unknown": (changed(colour="red"), "line 2 has an unknown field 'colour'; known: custom_id, method, url, body"),
    "other model": (changed(body={"model": "gpt"}), "line 2 asks for the model 'gpt'; this batch is answered by demo"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_line_is_named_before_anything_is_loaded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_input, "LINE_BYTES", 1 << 19)
    line, said = WRONG[case]
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + changed(custom_id="last") + b"\n")
    with pytest.raises(InputError, match=said) as error:
        Requests(path, ["demo"])
    assert error.value.message.startswith(f"{path}: line 2 ")


def test_blank_lines_a_mark_at_the_beginning_and_a_missing_end_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\n  \n" + changed(custom_id="last"))
    requests = Requests(path, ["demo"])
    assert [(line.custom_id, line.number) for line in requests.read(requests.ids == b"")] == [("good", 1), ("last", 4)]
    assert [requests.index(name) for name in ("good", "last", "none")] == [0, 1, None]


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"\n\n")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (
        ("none", "is missing"),
        ("empty", "holds no request"),
        ("pipe", "not a regular file"),
        (".", "not a regular file"),
    ):
        with pytest.raises(InputError, match=said):
            Requests(tmp_path / name, ["demo"])


def test_outputs_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "in.jsonl", [request("a", prompt="a")])
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "second.partial")
    (tmp_path / "other").write_text("mine\n")
    for name, said in (
        ("in.jsonl", "is the input: it would be written over"),
        ("link", "is the input: it would be written over"),
        ("second", "second.partial is the input"),
        ("folder", "exists and is not a file"),
        ("none/out", "none is no directory"),
        ("other", "exists, and is not the whole answer to"),
    ):
        assert main(["batch", "demo", str(path), "-o", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "other").read_text() == "mine\n"
    kept = ["folder", "in.jsonl", "link", "other", "second.partial"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_needs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else found(name))
    assert main(["batch", "demo", "in.jsonl", "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: hasten batch needs fastapi\nhint: pip install 'hasten[serve]'\n"


def some(path: Path, count: int = 10) -> Path:
    return write(path, [request(str(i), prompt="def read", seed=i, max_tokens=4) for i in range(count)])


class Stopped(Exception):
    """Ends a run as any error would."""


def interrupted(llm: LLM, path: Path, out: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Run until `after` answers are written; what the partial file then holds."""
    add = Results.add

    def stopping(self: Results, *answer: Any) -> None:
        if self.count == after:
            raise Stopped
        add(self, *answer)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", stopping)
        with pytest.raises(Stopped):
            run(llm, path, out)
    partial = out.with_name(out.name + ".partial").read_bytes()
    assert partial.count(b"\n") == after
    return partial


@pytest.mark.parametrize("torn", [b"", b'{"id": "batch_req', b"\0" * 5000, b'{"id": 5}\n', b"again"])
def test_what_was_written_counts_and_a_torn_end_is_cut_off(
    torn: bytes, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = some(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    before = interrupted(llm, path, out, 4, monkeypatch)
    torn = before.splitlines(keepends=True)[1] if torn == b"again" else torn
    (tmp_path / "out.jsonl.partial").write_bytes(before + torn)
    summary = run(llm, path, out)
    assert (summary.answered, summary.statuses) == (6, {200: 10})
    assert out.read_bytes().startswith(before)
    assert sorted(line["custom_id"] for line in read(out)) == sorted(map(str, range(10)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_another_input_or_model_is_refused(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = some(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    before = interrupted(llm, path, out, 4, monkeypatch)
    with pytest.raises(OutputError, match=r"out\.jsonl\.partial was begun with another model$") as error:
        run(llm, path, out, model="other")
    assert error.value.hint == "give what it was begun with, or give --restart to begin anew"
    path.write_bytes(path.read_bytes().replace(b"def read", b"def load"))
    with pytest.raises(OutputError, match="was begun with another input and another model"):
        run(llm, path, out, model="other")
    (tmp_path / "out.jsonl.partial.json").unlink()
    with pytest.raises(OutputError, match=r"\.partial is there, but .*\.json does not say of what"):
        run(llm, path, out)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before


def test_restart_drops_what_is_there_but_an_output_only_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = some(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    command = ["batch", "demo", str(path), "-o", str(out), "--threads", "1", "--context", "512", "--json"]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["output"] == str(out)
    assert (summary["lines"], summary["answered"], summary["statuses"]) == (3, 3, {"200": 3})
    assert summary["completion_tokens"] == 12
    assert summary["tokens_per_second"] == pytest.approx(12 / summary["seconds"])
    first = out.read_bytes()

    assert main(command) == 0
    shown = capsys.readouterr()
    assert "already holds the answer to every line" in shown.err
    assert json.loads(shown.out) == {**summary, "answered": 0, "seconds": 0, "tokens_per_second": 0}
    assert out.read_bytes() == first

    some(path, 4)
    assert main(command) == 2
    assert "is not the whole answer to" in capsys.readouterr().err
    assert main([*command, "--name", "gpt", "--restart"]) == 0
    assert {line["response"]["body"]["model"] for line in read(out)} == {"gpt"}
    assert len(read(out)) == 4


def test_a_file_that_changes_while_it_is_answered(tmp_path: Path) -> None:
    path = some(tmp_path / "in.jsonl", 30)
    whole = path.read_bytes()
    for changed in (
        whole.replace(b'"29"', b'"xx"'),
        whole + GOOD + b"\n",
        whole[:-60],
        whole.replace(b"read", b"load"),
    ):
        path.write_bytes(whole)
        requests = Requests(path, ["demo"])
        path.write_bytes(changed)
        with pytest.raises(InputError, match=r"in\.jsonl(: line 30 is not JSON| was changed while it was answered)"):
            list(requests.read(requests.ids == b""))


def test_two_runs_cannot_write_one_output(llm: LLM, tmp_path: Path) -> None:
    path, out = some(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    with (
        Results(out, Requests(path, ["demo"]), {}),
        pytest.raises(OutputError, match=r"another run is writing .*out\.jsonl"),
    ):
        run(llm, path, out)
    assert run(llm, path, out).answered == 10


def test_a_full_disk_keeps_what_is_written(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = some(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    really, lines = os.write, 0

    def full(handle: int, data: memoryview) -> int:
        nonlocal lines
        lines += data[:1] == b"{" and len(data) > 100
        if lines > 3:
            if len(data) < 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return really(handle, data[:-50])
        return really(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr("hasten.server.batch_output.os.write", full)
        with pytest.raises(OutputError, match=r"cannot write .*partial: No space left on device") as error:
            run(llm, path, out)
    assert error.value.hint == "3 of 10 answers are kept; when that is mended, the same command continues"
    assert len(read(tmp_path / "out.jsonl.partial")) == 3  # and no torn line after them
    assert run(llm, path, out).answered == 7


def process(path: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hasten", "batch", "demo", str(path), "-o", str(out), "--max-batch", "2"]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*command, "--threads", "1", "--context", "512"], stderr=subprocess.PIPE, text=True, env=here
    )


def work(path: Path) -> Path:
    """Some seconds of it, short and long answers mixed, with some that are refused."""
    lengths = random.Random(1).choices((3, 30, 150), k=60)
    lines = [
        request(str(i), prompt="def read", max_tokens=n, ignore_eos=True, seed=i, temperature=i % 2)
        for i, n in enumerate(lengths)
    ]
    return write(path, [*lines[:30], request("refused", EMBEDDINGS), *lines[30:]])


def wait_for_bytes(started: subprocess.Popen[str], partial: Path, size: int) -> None:
    while started.poll() is None and (not partial.exists() or partial.stat().st_size < size):
        time.sleep(0.005)


def test_killed_again_and_again_nothing_is_lost_or_done_twice(llm: LLM, tmp_path: Path) -> None:
    path, out, partial = work(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    calm = tmp_path / "calm.jsonl"
    assert run(llm, path, calm).statuses == {200: 60, 400: 1}
    kills, before = 0, b""
    for _ in range(10):
        with process(path, out) as started:
            if kills < 4:
                wait_for_bytes(started, partial, len(before) + 1 + kills * calm.stat().st_size // 16)
                started.kill()
            words = started.communicate(timeout=120)[1]
        if started.returncode == 0:
            break
        assert started.returncode == -signal.SIGKILL, words
        assert not out.exists()
        kills += 1
        after = partial.read_bytes()
        kept = after[: after.rfind(b"\n") + 1]
        assert kept.startswith(before), "an answer was lost"
        before = kept
    assert kills >= 3
    assert out.read_bytes().startswith(before)
    answers, expected = read(out), read(calm)
    assert len(answers) == len(expected) == 61
    keyed = {line["custom_id"]: without_company(line) for line in answers}
    assert keyed == {line["custom_id"]: without_company(line) for line in expected}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calm.jsonl", "in.jsonl", "out.jsonl"]


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out, partial = work(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with process(path, out) as started:
        wait_for_bytes(started, partial, 1)
        started.send_signal(signal.SIGINT)
        words = started.communicate(timeout=60)[1]
    assert started.returncode == 130
    done = len(read(partial))
    expected = f"note: {done} of 61 lines are answered; the same command, given again, continues\ninterrupted\n"
    assert words.endswith(expected)
    assert "Traceback" not in words
    assert not out.exists()
    assert main(["batch", "demo", str(path), "-o", str(out), "--threads", "1", "--context", "512"]) == 0
    assert f"continuing: {done} of 61 lines are answered already" in capsys.readouterr().err
    assert len({line["custom_id"] for line in read(out)}) == len(read(out)) == 61
