"""generate, chat, eval and inspect, from the real entry point, on a small random model."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import small_model

from hasten import LLM, SamplingParams, checkpoint
from hasten.cli.cache import size_in_bytes
from hasten.cli.main import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_model.write(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 10)
    return path


def fails(arguments: list[str], capsys: Captured) -> str:
    """stderr of a command that must refuse its input, properly."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert shown.err.startswith("error: ")
    return shown.err


# --- generate


def test_generate_writes_text_to_stdout_and_figures_to_stderr(model: str, capsys: Captured) -> None:
    assert main(["generate", model, "-p", "abc", "-n", "12", "--temperature", "0", "--ignore-eos"]) == 0
    shown = capsys.readouterr()
    (expected,) = LLM(model).generate("abc", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert shown.out == expected.outputs[0].text + "\n"
    assert shown.err.startswith("3 tokens of prompt, 12 written (length); first after ")


def test_generate_json(model: str, capsys: Captured) -> None:
    arguments = ["generate", model, "-p", "abc", "-n", "12", "--seed", "7", "--top-k", "30", "--json", "--ignore-eos"]
    documents = []
    for _ in range(2):
        assert main(arguments) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        documents.append(json.loads(shown.out))
    first, second = documents
    assert (first["tokens"], first["prompt_tokens"], first["seed"], first["finish_reason"]) == (12, 3, 7, "length")
    assert first["text"] == second["text"]
    assert first["ttft_ms"] > 0
    assert first["decode_tokens_per_second"] > 0


def test_generate_takes_what_the_model_says_and_flags_before_it(tmp_path: Path, capsys: Captured) -> None:
    directory = small_model.write(tmp_path / "greedy")
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": False}))

    def written(*flags: str) -> set[str]:
        texts = set()
        for seed in ("1", "2", "3"):
            assert main(["generate", str(directory), "-p", "abc", "-n", "12", "--seed", seed, *flags]) == 0
            texts.add(capsys.readouterr().out)
        return texts

    assert len(written()) == 1
    assert len(written("--temperature", "1")) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", "x", "--temperature", "-1"], "temperature is -1.0, must be 0, or between"),
        (["-p", "x", "--top-p", "1.5"], "top_p is 1.5"),
        (["-p", "x", "-n", "0"], "max_tokens is 0"),
        (["-p", "x", "--context", "4000"], "a context of 4000 tokens is more than the model's 2048"),
        (["-p", "x" * 70, "--context", "64"], "the prompt has 70 tokens; the context holds 64"),
        (["-p", "x", "--threads", "-2"], "threads is -2"),
        (["-p", "x", "--threads", "99999999999"], "threads is 99999999999"),
        (["-p", "x", "--top-k", "99999999999"], "top_k is 99999999999"),
        (["-p", "x", "--temperature", "1e-37"], "temperature is 1e-37"),
    ],
)
def test_generate_refuses(flags: list[str], message: str, model: str, capsys: Captured) -> None:
    assert message in fails(["generate", model, *flags], capsys)


@pytest.mark.parametrize("command", [["generate", "-p", "x"], ["eval", "--data", "/dev/null"], ["inspect"], ["chat"]])
def test_a_missing_model(command: list[str], tmp_path: Path, text: Path, capsys: Captured) -> None:
    arguments = [a if a != "/dev/null" else str(text) for a in command]
    assert "there is no model at" in fails([*arguments, str(tmp_path / "none")], capsys)


def test_a_mistyped_path_is_not_sent_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hasten.checkpoint.hub.fetch", lambda *_: pytest.fail("the hub was asked"))
    (tmp_path / "build").mkdir()
    for source in ("build/demo-fast2", "./demo-fast2", "../x/y", "a/b/c", "/x/y"):
        assert f"there is no model at '{source}'" in fails(["inspect", source], capsys)


# --- eval


def test_eval_json_has_exactly_these_keys(model: str, text: Path, capsys: Captured) -> None:
    assert main(["eval", model, "--data", str(text), "--context", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["perplexity", "ci95", "tokens", "kl_divergence", "top1_agreement", "perplexity_ratio"]
    assert found["kl_divergence"] is None
    tokens = len(text.read_text())  # one a byte
    windows = -(-tokens // 64)
    assert found["tokens"] == tokens - windows
    assert found["ci95"][0] < found["perplexity"] < found["ci95"][1]


def test_eval_with_a_reference(model: str, text: Path, tmp_path: Path, capsys: Captured) -> None:
    other = str(small_model.write(tmp_path / "other", seed=1))
    assert main(["eval", model, "--data", str(text), "--reference", other, "--json"]) == 0
    apart = json.loads(capsys.readouterr().out)
    assert apart["kl_divergence"] > 0.1
    assert apart["top1_agreement"] < 0.9
    assert main(["eval", other, "--data", str(text), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    estimate, low, high = apart["perplexity_ratio"]
    assert alone["perplexity_ratio"] is None
    assert estimate == pytest.approx(apart["perplexity"] / alone["perplexity"], rel=1e-4)
    assert low <= estimate <= high
    assert main(["eval", model, "--data", str(text), "--reference", model]) == 0
    shown = capsys.readouterr().out
    assert "kl divergence   0.000000 nats" in shown
    assert "top-1 agreement 100.00%" in shown
    assert "growth          +0.00%" in shown


def test_eval_measures_what_an_int8_cache_costs(model: str, text: Path, capsys: Captured) -> None:
    arguments = ["eval", model, "--data", str(text), "--reference", model, "--json"]
    assert main([*arguments, "--kv-format", "int8"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["kl_divergence"] < 0.01  # the reference keeps what it is served with


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", [], "is empty"),
        (b"\x7fELF\0\0", [], "is binary"),
        (b"\xff\xfe\xfd", [], "is not UTF-8"),
        (b"x", [], "the text is too short: 1 tokens"),
        (b"fine text", ["--context", "5000"], "a context of 5000 tokens is more than the model's 2048"),
        (b"fine text", ["--context", "1"], "a context of 1 tokens scores nothing"),
    ],
)
def test_eval_refuses(
    content: bytes, flags: list[str], message: str, model: str, tmp_path: Path, capsys: Captured
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert message in fails(["eval", model, "--data", str(path), *flags], capsys)


def test_eval_without_a_file(model: str, tmp_path: Path, capsys: Captured) -> None:
    assert "No such file" in fails(["eval", model, "--data", str(tmp_path / "none")], capsys)


def test_eval_says_before_it_starts_that_memory_is_short(
    model: str, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("hasten.engine.memory.memory", lambda: (1 << 20, 1 << 16))
    for arguments in (["eval", model, "--data", str(text)], ["generate", model, "-p", "x"]):
        shown = fails(arguments, capsys)
        assert "64.0 KiB are available" in shown
        assert "takes less" in shown


@pytest.mark.parametrize("command", ["generate", "serve", "batch"])
@pytest.mark.parametrize("size", ["", "4", "-1GiB", "0GiB", "nanGiB", "4 G iB", "1e9GiB", "much", "١GiB"])
def test_memory_that_is_no_size(command: str, size: str, model: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "in.jsonl").write_text("")
    rest = {
        "generate": ["-p", "x"],
        "batch": [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "o")],
        "serve": ["--port", "0"],
    }
    if command != "generate":
        pytest.importorskip("fastapi")
        (tmp_path / "in.jsonl").write_text(
            json.dumps(
                {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "model": model}}
            )
            + "\n"
        )
    assert "is no size of memory" in fails([command, model, *rest[command], f"--memory={size}"], capsys)


def test_memory_is_what_a_command_may_take(model: str, capsys: Captured) -> None:
    assert main(["generate", model, "-p", "x", "-n", "2", "--context", "64", "--memory", "64 MiB"]) == 0
    capsys.readouterr()
    assert "1.5 KiB are available" in fails(["generate", model, "-p", "x", "--memory", "1.5KiB"], capsys)


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 4 << 30), ("800 mib", 800 << 20), ("1.5GB", 1_500_000_000), ("12B", 12), ("1TiB", 1 << 40)],
)
def test_sizes_of_memory(text: str, count: int) -> None:
    assert size_in_bytes(text) == count


def test_models_that_cut_text_differently_are_not_compared(
    model: str, text: Path, tmp_path: Path, capsys: Captured
) -> None:
    other = small_model.write(tmp_path / "other")
    stored = json.loads((other / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(stored))
    assert "cut this text differently" in fails(["eval", model, "--data", str(text), "--reference", str(other)], capsys)


# --- inspect


def test_inspect_json_adds_up(model: str, capsys: Captured) -> None:
    assert main(["inspect", model, "--json", "--context", "100", "--batch", "3", "--graph"]) == 0
    found = json.loads(capsys.readouterr().out)
    tensors = [*found["outside_blocks"], *(t for block in found["blocks"] for t in block)]
    assert len({t["name"] for t in tensors}) == len(tensors) == 2 + 2 * 9
    assert sum(t["bytes"] for t in tensors) == found["weight_bytes"] == found["memory"]["weights"]
    embedding = next(t for t in tensors if "embed" in t["name"])
    assert embedding == {
        "name": "model.embed_tokens.weight",
        "block": None,
        "shape": [258, 64],
        "format": "f32",
        "bits": 32 * 272 / 258,  # rows are stored in panels of 16
        "bytes": 272 * 64 * 4,
    }
    memory = found["memory"]
    assert memory["kv_cache"] == 3 * 128 * 2 * (2 * 2 * 16) * 4  # sequences, tokens, layers, keys and values, f32
    assert memory["total"] == memory["weights"] + memory["kv_cache"] + memory["buffers"]
    assert "FusedLinear" in found["graph"]["after"]
    assert "FusedLinear" not in found["graph"]["before"]


def test_inspect_predicts_an_int8_cache(model: str, capsys: Captured) -> None:
    assert main(["inspect", model, "--json", "--context", "100", "--kv-format", "int8"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["kv_format"] == "int8"
    assert memory["kv_cache"] == 128 * 2 * 2 * 2 * (16 + 2)  # tokens, layers, k and v, heads, codes and a scale
    assert "kv_format is 'int3'" in fails(["inspect", model, "--kv-format", "int3"], capsys)


def test_inspect_predicts_a_cache_chosen_by_layer(model: str, capsys: Captured) -> None:
    assert main(["inspect", model, "--json", "--context", "100", "--kv-format", "int4,bf16"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["kv_format"] == ["int4", "bf16"]
    assert memory["kv_cache"] == 128 * 2 * 2 * ((8 + 4) + 32)  # tokens, k and v, heads, a layer of each
    assert main(["inspect", model, "--kv-format", "int4,bf16"]) == 0
    assert "cache in 1 layer int4, 1 layer bf16:" in capsys.readouterr().out
    assert "is given for 3 layers, the model has 2" in fails(
        ["inspect", model, "--kv-format", "int4,bf16,int8"], capsys
    )


def test_inspect_for_people(model: str, capsys: Captured) -> None:
    assert main(["inspect", model, "--graph"]) == 0
    shown = capsys.readouterr().out
    for part in ("before fusion:", "after fusion:", "-- notes", "-- blocks 0 to 1, alike", "258 x 64", "available"):
        assert part in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "9999"], "a context of 9999 tokens is more than the model's 2048"),
        (["--context", "0"], "context is 0"),
        (["--batch", "0"], "batch is 0"),
    ],
)
def test_inspect_refuses(flags: list[str], message: str, model: str, capsys: Captured) -> None:
    assert message in fails(["inspect", model, *flags], capsys)


def test_inspect_verifies_an_artifacts_hashes(tmp_path: Path, capsys: Captured) -> None:
    plain = checkpoint.open(str(small_model.write(tmp_path / "plain")))
    fast = checkpoint.write_artifact(tmp_path / "fast", plain, plain.weights(), {}, {})
    assert "no hasten artifact" in fails(["inspect", str(tmp_path / "plain"), "--verify"], capsys)
    assert main(["inspect", str(fast), "--verify"]) == 0
    assert "every file is as hasten.json says" in capsys.readouterr().err
    weights = fast / "hasten-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-200] ^= 1
    weights.write_bytes(data)
    assert main(["inspect", str(fast)]) == 0
    capsys.readouterr()
    assert "SHA-256 differs" in fails(["inspect", str(fast), "--verify"], capsys)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["inspect", "MODEL"], ["--help"]])
def test_output_that_cannot_be_written(arguments: list[str], model: str) -> None:
    command = [sys.executable, "-m", "hasten", *(model if a == "MODEL" else a for a in arguments)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: standard output: No space left on device\n"


# --- chat


def chat(model: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured, *flags: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    assert main(["chat", model, "-n", "5", "--temperature", "0", *flags]) == 0
    return capsys.readouterr()


def test_chat_remembers_until_told_to_forget(model: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    prompts: list[str] = []
    plain = LLM.chat_prompt
    monkeypatch.setattr(LLM, "chat_prompt", lambda self, m: prompts.append(json.dumps(m)) or plain(self, m))
    chat(model, "one\n\ntwo\n/clear\nthree\n/exit\nfour\n", monkeypatch, capsys, "--system", "be brief")
    roles = [[m["role"] for m in json.loads(p)] for p in prompts]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]


def test_chat_ends_with_its_input_and_says_what_it_does_not_know(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    out, err = chat(model, "/help\nhello\n", monkeypatch, capsys)
    assert "unknown command /help: /clear forgets" in err
    assert out.endswith("\n")


def test_a_conversation_that_grows_too_long_can_begin_anew(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    said = "x" * 60 + "\nshort\n/exit\n"
    out, err = chat(model, said, monkeypatch, capsys, "--context", "64")
    assert "error: the prompt has 78 tokens; the context holds 64" in err
    assert "hint: /clear begins anew" in err
    assert out  # the short one was answered


def test_chat_needs_a_template(tmp_path: Path, capsys: Captured) -> None:
    plain = small_model.write(tmp_path / "plain", chat=False)
    shown = fails(["chat", str(plain)], capsys)
    assert "has no chat template" in shown
    assert "hint: `hasten generate`" in shown


# --- Ctrl-C


def start(*arguments: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "hasten", *arguments], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0
    )


LONG = ("-n", "2000", "--seed", "1", "--threads", "1")


def test_ctrl_c_ends_generate(model: str) -> None:
    running = start("generate", model, "-p", "abc", "--ignore-eos", *LONG)
    with running, killed_late(running):
        assert running.stdout
        assert running.stdout.read(20)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate()
    assert running.returncode == 130
    assert err == b"interrupted\n"


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(model: str) -> None:
    running = start("chat", model, *LONG, "--top-k", "20")
    with running, killed_late(running):
        assert running.stdin
        assert running.stdout
        running.stdin.write(b"hello\n")
        assert running.stdout.read(20)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(b"/clear\n/exit\n")
    assert running.returncode == 0
    assert b"(stopped)\nforgotten\n" in err
    assert b"Traceback" not in err


@contextmanager
def killed_late(running: subprocess.Popen[bytes]) -> Iterator[None]:
    """A process that hangs is killed after a minute, and the test fails."""
    timer = threading.Timer(60, running.kill)
    timer.start()
    yield
    timer.cancel()


# --- what no command can do without


@pytest.mark.parametrize("command", ["generate", "eval", "inspect", "bench", "machine"])
def test_an_instruction_set_that_is_not_here_is_one_clear_error(
    command: str, model: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"generate": [model, "-p", "x"], "eval": [model, "--data", str(text)], "machine": []}
    monkeypatch.setenv("HASTEN_ISA", "mmx")  # read once a process
    run = [sys.executable, "-m", "hasten", command, *flags.get(command, [model])]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: HASTEN_ISA=mmx is not available here")
    assert "hint: this processor runs: " in done.stderr
