"""Other engines' points, from a report of `hasten bench --against`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hasten.errors import InputError

HINT = "give the report.json that `hasten bench MODEL --against PEER --output FOLDER` writes"
LARGEST = 1 << 26
Json = dict[str, Any]


def read(path: Path) -> Json:
    """{"parameters", "machine", "points": [{"engine", "bytes", "decode"}]} of decoding one sequence.

    Raises InputError where the file is no such report.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} is too large for a report of a bench", HINT)
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", HINT) from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not valid JSON", HINT) from None
    try:
        engines, workloads = document["engines"], document["workloads"]
        parameters, machine = int(document["model"]["parameters"]), str(document["machine"]["cpu"])
        decode = next((w["engines"] for w in workloads if w["name"] == "decode-1"), None)
        if decode is None:
            raise InputError(f"{path} has not measured decode-1", "run that workload too: --workloads decode-1")
        points = []
        for name, figures in decode.items():
            if "median" in figures:
                rate, size = float(figures["median"]), float(engines[name]["step_bytes"])
                if not (0 < rate < math.inf and 0 < size < math.inf):
                    raise InputError(
                        f"{path}: the figures of {name} make no sense: {rate} tokens/s, {size} bytes", HINT
                    )
                points.append({"engine": str(name), "bytes": size, "decode": rate})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no report of `hasten bench --against`: {error!r} is wrong in it", HINT) from None
    if not points:
        raise InputError(f"{path} has no engine's figure for decode-1", HINT)
    return {"parameters": parameters, "machine": machine, "points": points}
