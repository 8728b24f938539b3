"""`hasten export`: a model in the form that another program reads."""

from __future__ import annotations

import json as json_module
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hasten.cli.options import argument, option, required
from hasten.cli.progress import reporter

HELP = "write a model for other programs: gguf, compressed-tensors, hf or onnx"


@dataclass(frozen=True)
class Options:
    model: str = argument(help="a directory, hub id, hasten artifact, GGUF file or demo")
    to: str = required(help="gguf, compressed-tensors, hf (dense safetensors) or onnx", metavar="TARGET")
    output: Path = required("-o", help="file (gguf) or directory to write; must not exist", metavar="OUT")
    type: str | None = option(
        None, help="gguf: f32, f16, bf16, q8_0 or q4_0 for all matrices (default: what holds each exactly)"
    )
    dtype: str | None = option(None, help="hf: f32, f16 or bf16 (default: the weights' own; f16 where quantised)")
    json: bool = option(False, help="print the result as JSON")


def run(options: Options) -> None:
    from hasten import checkpoint
    from hasten.checkpoint import export

    chosen = export.Options(type=options.type, dtype=options.dtype)
    export.check_options(options.to, chosen)  # before a model is fetched
    model = checkpoint.open(options.model)
    with reporter() as report:
        written = export.export(model, options.to, options.output, chosen, report)
    notes = [*model.notes, *written.notes]
    if model.kv_formats:
        notes.append("the choice of a cache format for each layer stays behind: it is hasten's own")
    if options.json:
        facts = {"output": str(options.output), "target": options.to, "bytes": written.nbytes}
        print(json_module.dumps({**facts, "types": dict(written.types), "notes": notes}, indent=1))
        return
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    counted = ", ".join(f"{count} {kind}" for kind, count in Counter(written.types.values()).most_common())
    print(f"{export.get(options.to).KIND}: {options.output}\n{written.nbytes / 1e6:,.1f} MB; matrices: {counted}")
