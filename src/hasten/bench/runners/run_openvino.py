"""OpenVINO through its own runtime, on the stateful model that optimum-intel exports; and that export."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import protocol

MODEL = "openvino_model.xml"


def export(checkpoint: str, out: str) -> dict[str, Any]:
    """A Hugging Face directory as OpenVINO's files, weights as they are."""
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, load_in_8bit=False)
    model.save_pretrained(out)
    return {}


def compress(source: str, out: str, bits: int, group: int, all_layers: bool) -> dict[str, Any]:
    """`export`ed files with weights compressed by nncf, symmetric, as optimum-intel has it done."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(Path(source) / MODEL))
    if bits == 4:
        mode = nncf.CompressWeightsMode.INT4_SYM
        model = nncf.compress_weights(model, mode=mode, ratio=1.0, group_size=group, all_layers=all_layers)
    elif bits == 8:
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    Path(out).mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, str(Path(out) / MODEL))
    return {"bytes": (Path(out) / MODEL).with_suffix(".bin").stat().st_size}


class OpenVINO(protocol.Engine):
    def export(self, **arguments: Any) -> dict[str, Any]:
        return export(**arguments)

    def compress(self, **arguments: Any) -> dict[str, Any]:
        return compress(**arguments)

    def load(self, path: str, threads: int, **_: Any) -> dict[str, Any]:
        import openvino

        started = time.perf_counter()
        core = openvino.Core()
        model = core.read_model(str(Path(path) / MODEL))
        only_last_row(model)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self.compiled = core.compile_model(model, "CPU", settings)
        self.request = self.compiled.create_infer_request()
        self.inputs = {name for port in self.compiled.inputs for name in port.names}
        self.vocabulary = self.compiled.output(0).partial_shape[2].get_length()
        return {"seconds": time.perf_counter() - started, "version": f"openvino {openvino.__version__}"}

    def run(self, tokens: Any, past: int) -> Any:
        """Feed [batch, tokens] after `past` tokens; the most likely next token of each, [batch, 1]."""
        batch, count = tokens.shape
        given = {
            "input_ids": tokens,
            "attention_mask": np.ones((batch, past + count), np.int64),
            "position_ids": np.broadcast_to(np.arange(past, past + count), (batch, count)).astype(np.int64),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        self.request.infer({k: v for k, v in given.items() if k in self.inputs}, share_inputs=True)
        return self.request.get_output_tensor(0).data[:, -1:].argmax(axis=-1)

    def prompt(self, tokens: list[int]) -> None:
        self.request.reset_state()
        self.run(np.array([tokens], np.int64), 0)

    def fill(self, batch: int, depth: int) -> None:
        """A short prompt's states, repeated up to `depth`: what a step costs does not hang on their values."""
        self.request.reset_state()
        given = protocol.random_tokens(min(depth, 128), self.vocabulary)
        self.last = self.run(np.array([given] * batch, np.int64), 0)
        self.states = {}
        for state in self.request.query_state():
            short = np.array(state.state.data)  # [batch, heads, tokens, head_dim]
            if short.ndim != 4 or short.shape[2] != len(given):
                raise RuntimeError(f"a state of shape {list(short.shape)} is no cache of {len(given)} tokens")
            repeats = -(-depth // len(given))
            self.states[state.name] = np.ascontiguousarray(np.tile(short, (1, 1, repeats, 1))[:, :, :depth])

    def rewind(self, batch: int, depth: int) -> None:
        import openvino

        for state in self.request.query_state():
            state.state = openvino.Tensor(self.states[state.name])
        self.at = depth

    def steps(self, batch: int, depth: int, new: int) -> None:
        tokens = self.last
        for _ in range(new):
            tokens = self.run(tokens, self.at)
            self.at += 1


def only_last_row(model: Any) -> None:
    """Logits of the last token alone, as OpenVINO GenAI has it (apply_slice_before_matmul_transformation)."""
    from openvino import opset13 as ops

    last = model.output(0).get_node().input_value(0).get_node()
    while last.get_type_name() in ("Convert", "Reshape") and last.get_input_size():
        last = last.input_value(0).get_node()
    if last.get_type_name() != "MatMul":
        return
    hidden = last.input_value(0)
    ends = (np.array([v], np.int64) for v in (-1, np.iinfo(np.int64).max, 1, 1))
    last.input(0).replace_source_output(ops.slice(hidden, *(ops.constant(v) for v in ends)).output(0))
    model.validate_nodes_and_infer_types()


if __name__ == "__main__":
    sys.exit(protocol.serve(OpenVINO()))
