"""How the chosen candidate does on text of another domain than the one it was chosen on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hasten import checkpoint
from hasten.compress.calibrate import Weights
from hasten.errors import InputError
from hasten.search import quality, texts
from hasten.search.job import Job
from hasten.search.refine import facts
from hasten.search.trials import Trials

TOKENS = 8192
FEWEST = 512
ENGLISH = "Python's language reference (English)"
Json = dict[str, Any]


def sources(job: Job) -> list[tuple[str, str]]:
    """(name, text) of each other domain: the user's file, or what is built in and was not searched on."""
    if job.settings.other:
        return [(str(job.settings.other), texts.beginning(job.settings.other))]
    found = [(ENGLISH, english())]
    if job.settings.eval or job.settings.calibration:
        found.append((texts.BUILT_IN, checkpoint.demo_text("final")))
    return [(name, text) for name, text in found if text]


def english() -> str:
    """Prose that comes with Python, where it was installed with its help."""
    try:
        from pydoc_data import topics
    except ImportError:
        return ""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def check(job: Job) -> None:
    """Raises InputError for a file that cannot be used, before anything takes long."""
    if job.settings.other:
        ((name, text),) = sources(job)
        tokens = job.model.tokenizer.encode(text[: 64 * FEWEST], special=False)
        if len(tokens) < FEWEST:
            raise InputError(f"the text of another domain, {name}, is too short: {len(tokens)} tokens of {FEWEST}")


def measure(job: Job, choices: Any, weights: Weights, each: float, trials: Trials) -> list[Json]:
    """Perplexity, its growth with its interval, divergence and agreement on each; what there is time for."""
    found = []
    for name, text in sources(job):
        ids = texts.encode(job.model.tokenizer, text[: 16 * TOKENS])[:TOKENS]
        if len(ids) < FEWEST or job.clock.left() < 2 * each * len(ids):
            continue
        windows = texts.split(ids, job.texts.context)

        def make(name: str = name, windows: Any = windows) -> Json:
            report = lambda _, done, total: job.report(f"scoring {name}", done, total)  # noqa: E731
            graph, original = job.reference
            score = quality.score(job.graph, weights, windows, original, job.threads, report, graph, job.kv_formats)
            if score is None:
                return {"tokens": sum(len(w) - 1 for w in windows)}
            assert score.reference_logprobs is not None
            growth = quality.ratio_reading(score.reference_logprobs, score.logprobs)
            before = sum(float(w.sum(dtype="f8")) for w in score.reference_logprobs) / score.tokens
            return {
                "log_perplexity": -before,
                "growth": asdict(growth),
                "kl_divergence": score.kl_divergence,
                "top1_agreement": score.top1_agreement,
                "tokens": score.tokens,
            }

        key = [job.key, texts.digest(windows), facts(choices), job.kv_formats]
        found.append({"text": name, **trials.measure("other", key, make)})
    return found
