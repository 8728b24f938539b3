from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.bench import peers, workloads
from hasten.bench.peers import common
from hasten.bench.peers.common import Environment, PeerError, Runner, Workload
from hasten.errors import InputError

RUNNER = """
import sys
sys.path.insert(0, {runners!r})
import protocol

class Toy(protocol.Engine):
    def load(self, **_):
        self.vocabulary, self.log = 10, []
        print("libraries print on stdout")
        return {{"seconds": 0.0}}
    def prompt(self, tokens):
        self.log.append(["prompt", len(tokens)])
    def fill(self, batch, depth):
        self.log.append(["fill", batch, depth])
    def rewind(self, batch, depth):
        self.log.append(["rewind", batch, depth])
    def steps(self, batch, depth, new):
        self.log.append(["steps", batch, depth, new])
    def seen(self):
        return {{"log": self.log}}
    def wrong(self):
        raise ValueError("a reason\\nand more")
    def die(self):
        print("Error: the end", file=sys.stderr, flush=True)
        sys.exit(3)

protocol.serve(Toy())
"""


def nothing(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def runner(tmp_path: Path) -> Any:
    script = tmp_path / "toy.py"
    script.write_text(RUNNER.format(runners=str(common.RUNNERS)))
    made = Runner(sys.executable, str(script), tmp_path / "log", {}, nothing, "toy")
    yield made
    made.close()


def test_a_runner_answers_and_fills_caches_once(runner: Runner) -> None:
    runner.call("load")
    assert runner.call("prefill", tokens=7, least=0.0)["repeats"] == 1
    runner.call("decode", batch=2, depth=5, new=3, least=0.0)
    runner.call("decode", batch=2, depth=5, new=3, least=0.0)
    runner.call("decode", batch=1, depth=5, new=3, least=0.0)
    step = [["rewind", 2, 5], ["steps", 2, 5, 3]]
    assert runner.call("seen")["log"] == [
        ["prompt", 7], ["fill", 2, 5], *step, *step, ["fill", 1, 5], ["rewind", 1, 5], ["steps", 1, 5, 3],
    ]  # fmt: skip
    assert runner.call("peak")["bytes"] > 1 << 20


def test_errors_and_death_are_told_apart(runner: Runner) -> None:
    with pytest.raises(PeerError, match=r"^ValueError: a reason$"):
        runner.call("wrong")
    runner.call("load")
    with pytest.raises(PeerError, match="toy died with status 3: Error: the end"):
        runner.call("die")
    with pytest.raises(PeerError, match="toy died"):
        runner.call("load")


def test_a_failed_install_says_why_and_is_tried_again(tmp_path: Path) -> None:
    home = Environment(tmp_path / "peer")
    calls: list[int] = []

    class Peer:
        @staticmethod
        def version(home: Environment) -> str:
            return home.version_of("pip")

        @staticmethod
        def install(home: Environment) -> None:
            calls.append(1)
            code = "import sys; print('one'); print('ERROR: no such thing'); print('last'); sys.exit(len(sys.argv) - 1)"
            home.run([sys.executable, "-c", code, *(["x"] if len(calls) == 1 else [])], "installing")

    with pytest.raises(PeerError, match=r"ERROR: no such thing \(see .*install.log\)"):
        common.install(Peer, home)
    assert not home.ready.exists()
    home.python.parent.mkdir(parents=True)
    home.python.symlink_to(sys.executable)
    assert set(common.install(Peer, home)) == {"version"}
    common.install(Peer, home)
    assert len(calls) == 2  # installed once, reused after


@pytest.mark.parametrize("name", peers.names())
def test_every_peer_keeps_the_contract(name: str) -> None:
    peer = peers.get(name)
    for bits in (4, 8, 16):
        found = peer.variants(bits)
        assert found[0].mix == "alike"
        assert len({v.name for v in found}) == len(found)
        for kind in ("prefill", "decode", "depth", "ttft-warm", "ttft-cold"):
            assert all(isinstance(c, dict) for v in found for c in peer.choices(Workload(kind, kind), v))
    assert (common.RUNNERS / f"run_{name.replace('.', '_')}.py").exists()


def test_the_names_are_those_of_the_files() -> None:
    assert peers.names() == ["llama.cpp", "openvino", "transformers"]
    with pytest.raises(InputError, match="no such peer: vllm"):
        peers.get("vllm")


def test_workloads() -> None:
    assert workloads.parse("prefill-512") == Workload("prefill-512", "prefill", tokens=512)
    assert workloads.parse("decode-4").batch == 4
    assert workloads.parse("depth-4096").depth == 4096
    fitting, left_out = workloads.choose((), 1024)
    assert left_out == ["prefill-2048", "depth-4096", "depth-16384"]
    assert len(fitting) + len(left_out) == len(workloads.ALL)
    for wrong in ("prefill", "prefill-0", "decode-x", "speed", "depth--1"):
        with pytest.raises(InputError, match="no such workload"):
            workloads.parse(wrong)
    with pytest.raises(InputError, match="holds none"):
        workloads.choose(("prefill-512",), 256)


def state(cells: int, layers: int, row: int, transposed: bool) -> bytes:
    """A state as llama.cpp writes it (llama_kv_cache::state_write): key c of layer l is l * 16 + c in every byte."""
    parts = [struct.pack("<IiII", 0x6667, 0, 1, cells)]
    parts += [struct.pack("<iIi", position, 1, 0) for position in range(cells)]
    parts.append(struct.pack("<II", transposed, layers))
    for layer in range(layers):
        parts.append(struct.pack("<iQ", 1, row))
        parts += [bytes([layer * 16 + cell]) * row for cell in range(cells)]
    for layer in range(layers):
        if transposed:
            parts.append(struct.pack("<iII", 1, 2, row // 2))
            parts += [bytes([layer * 16 + cell]) * 2 for _ in range(row // 2) for cell in range(cells)]
        else:
            parts.append(struct.pack("<iQ", 1, row))
            parts += [bytes([layer * 16 + cell]) * row for cell in range(cells)]
    return b"".join(parts)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stretched_state_repeats_its_cells(transposed: bool) -> None:
    spec = importlib.util.spec_from_file_location("llama_state", common.RUNNERS / "llama_state.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    short = state(4, 2, 6, transposed)
    long = module.stretched(short, 10)
    assert len(long) == len(state(10, 2, 6, transposed))
    assert module.stretched(short, 4) == short
    begin = 16 + 10 * 12 + 8 + 12
    keys = np.frombuffer(bytes(long[begin : begin + 60]), np.uint8).reshape(10, 6)
    assert keys[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert (keys == keys[:, :1]).all()
    for wrong in (short[:-1], short + b"x", b"", struct.pack("<IiII", 1, 0, 2, 4) + short[16:]):
        assert module.stretched(wrong, 10) is None


def test_protocol_needs_no_more_than_numpy() -> None:
    text = (common.RUNNERS / "protocol.py").read_text()
    assert "hasten" not in json.dumps([line for line in text.splitlines() if "import" in line])
