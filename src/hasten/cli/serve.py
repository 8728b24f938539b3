"""`hasten serve`: an OpenAI-compatible server, with a playground at its root."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hasten
from hasten.cli.cache import Room
from hasten.cli.options import argument, group, option
from hasten.cli.progress import reporter
from hasten.errors import DependencyError, InputError

if TYPE_CHECKING:
    from hasten.engine.llm import LLM
    from hasten.server.config import Config, Served

HELP = "serve a model to OpenAI's clients"
NEEDS = ("fastapi", "uvicorn", "prometheus_client")
KEY_VARIABLE = "HASTEN_API_KEY"
SCORE_ROWS = 64


@dataclass(frozen=True)
class Options:
    model: str = argument(help="directory, hub id, hasten artifact or demo")
    host: str = option("127.0.0.1", help="address to listen at; 0.0.0.0 is every one that this machine has")
    port: int = option(8000, help="0: any free one")
    name: str | None = option(None, help="what clients call the model (default: as it is named here)")
    api_key: tuple[str, ...] = option(
        (), help=f"keys that clients may show, parted by commas (default: those in {KEY_VARIABLE}, or none)"
    )
    context: int | None = option(
        None, help="tokens that prompt and answer may have (default: the model's, at most 4096)"
    )
    max_batch: int = option(16, help="answers computed together; more wait")
    max_queue: int = option(256, help="answers that may wait; more are refused with 429")
    cache: Room = group(Room)
    threads: int = option(0, help="0: one a core")
    drain_seconds: float = option(30.0, help="that running answers have to end after SIGTERM")
    stall_seconds: float = option(120.0, help="without a step while there is work, after which /health fails")


def run(options: Options) -> None:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(f"hasten serve needs {', '.join(missing)}", "pip install 'hasten[serve]'")
    if options.max_queue < 0:
        raise InputError(f"max_queue is {options.max_queue}, must be 0 or more")
    if not 0 <= options.port < 65536:
        raise InputError(f"port is {options.port}, must be between 0 and 65535")
    for name, seconds in (("drain_seconds", options.drain_seconds), ("stall_seconds", options.stall_seconds)):
        if not 0 < seconds < 1e9:
            raise InputError(f"{name} is {seconds}, must be above 0")
    from hasten.engine.llm import LLM
    from hasten.server.app import create_app
    from hasten.server.run import bind
    from hasten.server.run import run as serve
    from hasten.server.service import Service, ServiceLimits

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    bound = bind(options.host, options.port)  # before anything is loaded
    with bound:
        with reporter() as report:
            llm = LLM(
                options.model,
                context=options.context,
                max_batch=options.max_batch,
                threads=options.threads,
                kv_format=options.cache.kv_format,
                memory=options.cache.budget,
                score_rows=SCORE_ROWS,
                report=report,
            )
        config = configuration(llm, options, bound.getsockname()[0])
        limits = ServiceLimits(options.max_queue, options.stall_seconds)
        app = create_app(Service(llm.make_engine, limits), config)
        serve(app, bound, options.drain_seconds)


def configuration(llm: LLM, options: Options, address: str) -> Config:
    """What the server at `address` says of `llm`, and who may ask it."""
    from hasten.server.config import Config

    keys = options.api_key or tuple(k for k in os.environ.get(KEY_VARIABLE, "").split(",") if k)
    if any(not key.isascii() or key != key.strip() or not key for key in keys):
        raise InputError("an API key must be plain ASCII without spaces around it")
    known = served(llm, options.model, options.name)
    hosts = frozenset() if keys else local_names(options.host, address)
    return Config(known, keys, hosts, version=hasten.__version__)


def local_names(host: str, address: str) -> frozenset[str]:
    """What browsers of this machine call a server that only they can reach; empty where others can reach it too."""
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return frozenset()
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower(), address})


def served(llm: LLM, model: str, name: str | None) -> Served:
    """`llm` as requests see it: under `name` where there is one, and as `model` was named here."""
    from hasten.server.config import Served

    return Served(
        names=names(model, name),
        tokenizer=llm.tokenizer,
        context=llm.program.limits.context,
        vocabulary=llm.model.graph.vocabulary,
        generation=llm.model.generation,
        template=llm.tokenizer.chat_template,
        created=int(time.time()),
    )


def names(model: str, name: str | None) -> tuple[str, ...]:
    """What requests may call the model; the first is what answers say. A folder is called by its own name."""
    given = Path(model)
    own = given.resolve().name if given.is_dir() else model
    return tuple(dict.fromkeys([name or own or model, own or model, model]))
