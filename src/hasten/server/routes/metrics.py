"""GET /metrics: figures of the engine and of answers, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response

from hasten.server.answers import TEXT
from hasten.server.app import REFUSALS, Context
from hasten.server.stats import Histogram


def register(app: FastAPI) -> None:
    registry = CollectorRegistry()
    registry.register(_Collector(app.state.context))
    app.state.metrics = registry
    app.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {"schema": TEXT}}}, **REFUSALS},
        response_class=PlainTextResponse,
    )(metrics)


async def metrics(request: Request) -> Response:
    """Text in Prometheus' form."""
    return Response(generate_latest(request.app.state.metrics), media_type=CONTENT_TYPE_LATEST)


class _Collector:
    """Reads the service's figures when they are asked for; counting them costs the engine nothing more."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        service = self._context.service
        health, blocks, stats = service.health(), service.engine.blocks, service.stats
        yield GaugeMetricFamily("hasten_healthy", "1 while requests are answered", float(health.ok))
        yield GaugeMetricFamily("hasten_requests_running", "Choices that are being computed", health.running)
        yield GaugeMetricFamily("hasten_requests_waiting", "Choices that wait for their turn", health.waiting)
        used = 1 - blocks.free / blocks.count
        yield GaugeMetricFamily("hasten_kv_cache_usage_ratio", "Part of the KV cache that requests hold", used)
        for name, help, value in (
            ("hasten_prompt_tokens", "Tokens of prompts taken on", stats.prompt_tokens),
            ("hasten_generated_tokens", "Tokens written", stats.generated_tokens),
            ("hasten_prefix_lookup_tokens", "Tokens looked for in the KV cache", stats.looked_up),
            ("hasten_prefix_hit_tokens", "Tokens found in the KV cache", stats.cached_tokens),
            ("hasten_preemptions", "Choices that gave their cache up and began again", stats.preemptions),
            ("hasten_requests_refused", "Requests that met a full queue", stats.refused),
            ("hasten_engine_faults", "Failures of the engine", stats.faults),
            ("hasten_engine_restarts", "Engines started anew after a failure", service.restarts),
        ):
            yield CounterMetricFamily(name, help, value)
        ended = CounterMetricFamily("hasten_choices_finished", "Choices by why they ended", labels=["reason"])
        for reason, count in dict(stats.finished).items():
            ended.add_metric([reason], count)
        yield ended
        answers = CounterMetricFamily(
            "hasten_http_responses", "Answers by route and status", labels=["route", "status"]
        )
        for (route, status), count in dict(self._context.answers).items():
            answers.add_metric([route, str(status)], count)
        yield answers
        yield _histogram("hasten_time_to_first_token_seconds", "From request to first token", stats.first_token)
        yield _histogram("hasten_inter_token_seconds", "From one token to the next", stats.between_tokens)
        yield _histogram("hasten_request_seconds", "From request to its end", stats.request)


def _histogram(name: str, help: str, found: Histogram) -> HistogramMetricFamily:
    total, buckets = 0, []
    for bound, count in zip([*found.bounds, float("inf")], list(found.counts), strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
    return HistogramMetricFamily(name, help, buckets=buckets, sum_value=found.sum)
