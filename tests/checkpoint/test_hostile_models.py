"""Model directories that try to run code, and files whose headers lie: nothing is executed, everything is refused."""

from __future__ import annotations

import ast
import json
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint import making
from checkpoint.making import safetensors_bytes
from models import tiny

from hasten import LLM, SamplingParams, checkpoint
from hasten.checkpoint import safetensors
from hasten.cli.main import main
from hasten.errors import CheckpointError, InputError

SOURCES = Path(checkpoint.__file__).parents[1]
RUNS_CODE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"}
NOT_OURS = "bench/runners"
"""They load peers in environments of their own."""


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    """What arrives by a socket or a file is data: no module here could make it run."""
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        where = str(path.relative_to(SOURCES))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call):
                found += [f"{where}: {call}" for call in _dangerous(node) if NOT_OURS not in where]
            found += [f"{where}: imports {name}" for name in names if name.partition(".")[0] in RUNS_CODE]
            found += [f"{where}: imports {name}" for name in names if name.startswith("multiprocessing.connection")]
    assert found == []


def _dangerous(call: ast.Call) -> list[str]:
    name, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "torch.load"):
        return [name]
    if name in ("yaml.load", "yaml.load_all") and "Loader" not in {
        **given,
        **dict.fromkeys(["Loader"] * (len(call.args) > 1)),
    }:
        return [name]
    return [f"{name}({key}={value})" for key, value in given.items() if (key, value) in CAREFUL]


CAREFUL = {("allow_pickle", "True"), ("shell", "True"), ("trust_remote_code", "True"), ("weights_only", "False")}


def test_yaml_is_read_as_data(tmp_path: Path) -> None:
    from hasten.compress import recipe

    canary = tmp_path / "canary"
    text = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]"
    with pytest.raises(InputError, match="constructor"):
        recipe.parse(text)
    assert not canary.exists()


class Payload:
    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._canary,)


def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny model that also names and brings code of its own, and the file that any of it would leave."""
    folder, canary = making.directory(tmp_path / "model"), tmp_path / "canary"
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Model: pass\nclass Tokenizer: pass\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "__init__", "conftest", "config", "json"):
        (folder / f"{name}.py").write_text(code)
    names = {"AutoConfig": "configuration_evil.Model", "AutoModelForCausalLM": "modeling_evil.Model"}
    config = {
        **tiny.CONFIGS["llama"],
        "auto_map": names,
        "trust_remote_code": True,
        "custom_pipelines": {"x": {"impl": "modeling_evil.Model"}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described |= {"auto_map": {"AutoTokenizer": ["tokenization_evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    payload = pickle.dumps(Payload(canary))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "tokenizer.pkl", "model.pkl"):
        (folder / name).write_bytes(payload)
    return folder, canary


def test_the_payload_would_leave_its_mark(tmp_path: Path) -> None:
    folder, canary = hostile(tmp_path)
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert canary.exists()


def test_model_directories_that_execute_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, canary = hostile(tmp_path)
    monkeypatch.chdir(folder)
    path = list(sys.path)
    assert len(LLM(str(folder)).generate([[3, 4]], SamplingParams(max_tokens=2))[0].outputs[0].token_ids) == 2
    assert main(["inspect", str(folder)]) == 0
    assert sys.path == path
    assert not canary.exists()
    assert not {"modeling_evil", "configuration_evil", "tokenization_evil"} & set(sys.modules)


@pytest.mark.parametrize("left", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_not_read(tmp_path: Path, left: str) -> None:
    folder, canary = hostile(tmp_path)
    (folder / "model.safetensors").unlink()
    for other in folder.glob("*.p*"):
        if other.name != left and other.suffix != ".py":
            other.unlink()
    with pytest.raises(CheckpointError, match="could run code when read"):
        checkpoint.open(str(folder))
    (folder / "model.safetensors").write_bytes((folder / "training_args.bin").read_bytes())
    with pytest.raises(CheckpointError):
        checkpoint.open(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"norm.weight": "training_args.bin"}})
    )
    with pytest.raises(CheckpointError, match=r"ending in \.safetensors"):
        checkpoint.open(str(folder))
    assert not canary.exists()


def entry(begin: Any, end: Any, shape: Any = (2, 3), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = ("F32", np.arange(6, dtype=np.float32).reshape(2, 3))


def headed(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


SAFETENSORS = {
    "overlapping tensors": safetensors_bytes({"a": ONE, "b": ONE}, b=entry(12, 36)),
    "one inside another": safetensors_bytes({"a": ONE, "b": ONE}, b=entry(0, 24), a=entry(0, 48, (4, 3))),
    "the same bytes twice": safetensors_bytes({"a": ONE}, b=entry(0, 24)),
    "sizes that overflow 64 bits to nothing": safetensors_bytes({"a": ONE}, a=entry(0, 24, (2**32, 2**32, 2**32))),
    "sizes that overflow 64 bits to 24": safetensors_bytes({"a": ONE}, a=entry(0, 24, (2**63 + 3, 2))),
    "offsets beyond 64 bits": safetensors_bytes({"a": ONE}, a=entry(2**64, 2**64 + 24)),
    "negative offsets": safetensors_bytes({"a": ONE}, a=entry(-24, 0)),
    "negative dimensions whose product is right": safetensors_bytes({"a": ONE}, a=entry(0, 24, (-2, -3))),
    "an infinite dimension": headed(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 24]}}', bytes(24)),
    "no number as a dimension": headed(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 24]}}', bytes(24)),
    "a float as a dimension": safetensors_bytes({"a": ONE}, a=entry(0, 24, (2.0, 3.0))),
    "a truth value as an offset": safetensors_bytes({"a": ONE}, a=entry(False, 24)),
    "a number of ten thousand digits": headed(
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 24]}}', bytes(24)
    ),
    "a header longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "a header of the file's own length": (18).to_bytes(8, "little") + b"{}" + b" " * 8,
    "names that are no UTF-8": headed(
        b'{"\xff\xfe": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}', bytes(24)
    ),
    "a megabyte of a name": safetensors_bytes({"a": ONE, "b" * 1_000_000: ONE}, a=entry(0, 48, (4, 3))),
}


@pytest.mark.parametrize("how", SAFETENSORS)
def test_crafted_safetensors_headers(tmp_path: Path, how: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(SAFETENSORS[how])
    with pytest.raises(CheckpointError) as error:
        safetensors.File(path)
    assert len(error.value.message) < 2000


def test_half_a_character_as_a_name_is_told_in_plain_text(tmp_path: Path) -> None:
    """JSON can spell what UTF-8 cannot: an error that names it must be one that can be printed."""
    folder = making.directory(tmp_path / "model")
    made = making.tensors(tiny.CONFIGS["llama"])
    made["\ud800"] = ONE
    (folder / "model.safetensors").write_bytes(safetensors_bytes(made))
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(str(folder))
    error.value.message.encode()


def test_a_hundred_thousand_tensors_of_nothing(tmp_path: Path) -> None:
    """They cost what their header costs, and the model needs none of them."""
    folder = making.directory(tmp_path / "model")
    text = json.dumps({f"t{i}": entry(0, 0, (0,)) for i in range(100_000)}).encode()
    (folder / "model.safetensors").write_bytes(headed(text))
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(str(folder))
    assert len(error.value.message) < 1000


def gguf(tensors: int = 1, pairs: int = 0, shape: tuple[int, ...] = (6,), name: bytes = b"a") -> bytes:
    made = b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + struct.pack("<Q", len(name)) + name
    return made + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0) + bytes(64)


@pytest.mark.parametrize(
    "data",
    [
        gguf(),
        gguf(tensors=10**9),
        gguf(pairs=2**64 - 1),
        gguf(shape=(2**63, 2**63)),
        gguf(name=b"\xff\xfe"),
        b"GGUF" + b"\xff" * 40,
        b"GGUF",
    ],
)
def test_gguf_files_that_lie(tmp_path: Path, data: bytes) -> None:
    """More of them: test_gguf_reader.py. Under the name of safetensors they are refused as that."""
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(str(tmp_path / "x.gguf"))
    assert len(error.value.message) < 500
    folder = making.directory(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError):
        checkpoint.open(str(folder))
