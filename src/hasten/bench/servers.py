"""Engines as servers under one load: N clients, each of which sends its next request when its last is answered.

Every engine gets the same prompts in the same round, and others in the next, so that no cache of prefixes helps.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.bench.load import client, run, summary
from hasten.bench.load.arrivals import Load, Schedule, planned
from hasten.bench.load.prompts import Bodies, Prompts, id_pieces
from hasten.bench.peers.common import PeerError, Report, Workload, last_words
from hasten.errors import HastenError

SHORTEST = 128
"""Tokens of a prompt; the longest is the workload's."""
IDS = (10, 1000)
PER_CLIENT, LEAST = 2, 6
"""Requests of each client in a round, and of all clients together at least; to try a setting, one each."""
START_SECONDS, ANSWER_SECONDS = 300.0, 600.0


def requests(workload: Workload, turn: int = 1) -> int:
    """Of all clients together, in a round; `turn` 0 tries a setting."""
    return max(LEAST, PER_CLIENT * workload.batch) if turn else workload.batch


def load(workload: Workload, turn: int) -> Load:
    """The load of one round; another `turn` has other prompts."""
    lengths, count = (SHORTEST, workload.tokens), requests(workload, turn)
    return Load(clients=workload.batch, prompt=lengths, new=workload.new, limit=count, seed=1 + turn)


def prompts(wanted: Load) -> Prompts:
    """What the load's requests say, as texts of token ids."""
    return Prompts(id_pieces(*IDS), seed=wanted.seed)


class Server:
    """A process that serves at a port of this machine, which `command` names as {port}. Raises PeerError.

    Its output goes to the file `log`.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, report: Report) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._log, self._name, self._report = log, Path(command[0]).name, report
        given = [part.replace("{port}", str(self._port)) for part in command]
        with open(log, "ab") as out:
            try:
                self._process = subprocess.Popen(
                    given, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **environment}
                )
            except OSError as error:
                raise PeerError(f"{command[0]} cannot be started: {error.strerror}") from None
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        """Until it answers."""
        started = time.monotonic()
        while time.monotonic() - started < START_SECONDS:
            if self._process.poll() is not None:
                words = last_words(self._log.read_text(errors="replace")[-4000:])
                raise PeerError(f"its server ended with status {self._process.returncode}: {words}")
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health") as answer,
            ):
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise PeerError(f"its server does not answer after {START_SECONDS:g} s")

    def measure(self, workload: Workload, turn: int) -> dict[str, Any]:
        """{"seconds", "latency_ms"} of one round of the load. Raises PeerError where a request fails."""
        try:
            return asyncio.run(self._measure(workload, turn))
        except HastenError as error:
            raise PeerError(f"its server does not do what was asked: {error.message}") from None

    async def _measure(self, workload: Workload, turn: int) -> dict[str, Any]:
        target = client.parse_url(f"http://127.0.0.1:{self._port}")
        wanted = load(workload, turn)
        bodies = Bodies(prompts(wanted), await client.first_model(target))
        result = await run.drive(
            target,
            wanted,
            planned(Schedule(wanted)),
            bodies,
            endpoint="/completions",
            timeout=ANSWER_SECONDS,
            warmup=1,
            report=self._report,
        )
        found = summary.summarise(result, {})
        if found["requests"]["completed"] != wanted.limit or found["tokens"]["short_answers"]:
            raise PeerError(f"not all answers came whole: {found['requests']}, {found['errors']}")
        return {"seconds": found["seconds"], "latency_ms": found["latency_ms"]}

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
