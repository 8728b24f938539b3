"""What is read off a step, and how long weights and outputs live."""

import contextlib
import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from programs import TOKENS_OF, batch, limits, pack, sampling
from support import random_arrays, tiny_graph

from hasten import formats
from hasten.backends import native
from hasten.errors import BackendError, InputError
from hasten.graph.graph import TOKENS, GraphBuilder
from hasten.graph.ops import Embed, Linear, SelectRows


@pytest.fixture(scope="module")
def small():
    graph = tiny_graph(vocabulary=50)
    return graph, pack(graph, random_arrays(graph), "int8-g32")


def log_softmax(x):
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_outputs_agree_with_the_logits(small):
    program = native.compile(*small, limits())
    out = program.step(batch(TOKENS_OF, rows=[7, 39, 0]))
    logits = out.logits()
    assert logits.shape == (3, 50)
    np.testing.assert_array_equal(out.argmax(), logits.argmax(axis=1))
    targets = np.array([0, 49, 13], np.int32)
    np.testing.assert_allclose(out.score(targets), log_softmax(logits)[np.arange(3), targets], rtol=1e-5)
    other = native.compile(*small, limits()).step(batch(TOKENS_OF[::-1].copy(), rows=[7, 39, 0]))
    p, q = log_softmax(other.logits()), log_softmax(logits)
    np.testing.assert_allclose(out.divergence(other), (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-4)


def test_the_largest_of_a_wide_vocabulary_is_the_lowest_of_its_equals():
    g = GraphBuilder(context=8, vocabulary=70000, hidden=4)
    x = g.add(Embed(), "x", TOKENS, weights=(g.weight("table", 70000, 4),))
    graph = g.finish(g.add(Linear(), "logits", g.add(SelectRows(), "r", x), weights=("table",)))
    table = np.zeros((70000, 4), np.float32)
    for token, places in enumerate([(69999,), (16384, 16385, 60000), (3, 16383)]):
        table[list(places), token] = 1.0
        table[token, token] = 0.5
    out = native.compile(graph, {"table": formats.get("f32").pack(table)}, limits(context=8)).step(batch([0, 1, 2]))
    np.testing.assert_array_equal(out.argmax(), [69999, 16384, 3])


def test_sampling_reports_the_models_own_distribution(small):
    out = native.compile(*small, limits()).step(batch(TOKENS_OF, rows=[7, 39, 0]))
    greedy = out.sample(sampling(3, logprobs=4))
    np.testing.assert_array_equal(greedy.tokens, out.argmax())
    np.testing.assert_array_equal(greedy.logprobs, out.score(greedy.tokens))
    order = np.argsort(-out.logits(), axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(greedy.top_tokens, order)
    np.testing.assert_array_equal(greedy.top_logprobs[:, 0], greedy.logprobs)
    penalised = out.sample(sampling(3, presence=100.0, history=[greedy.tokens[i : i + 1] for i in range(3)]))
    assert (penalised.tokens != greedy.tokens).all()
    np.testing.assert_array_equal(penalised.logprobs, out.score(penalised.tokens))


def test_draws_follow_the_distribution(small):
    out = native.compile(*small, limits()).step(batch(TOKENS_OF, rows=[7]))
    draws = [int(out.sample(sampling(1, temperature=1, position=i)).tokens[0]) for i in range(4000)]
    expected = np.exp(log_softmax(out.logits()))[0]
    found = np.bincount(draws, minlength=50) / len(draws)
    assert np.abs(found - expected).max() < 4 * 0.5 / np.sqrt(len(draws))


def test_outputs_end_with_the_next_step(small):
    program = native.compile(*small, limits())
    first = program.step(batch(TOKENS_OF))
    second = program.step(batch(TOKENS_OF[:3]))
    for read in (first.logits, first.argmax, lambda: second.divergence(first)):
        with pytest.raises(BackendError, match="has taken another step"):
            read()
    assert second.logits().shape == (3, 50)


def test_outputs_are_not_read_while_another_thread_steps():
    graph = tiny_graph(vocabulary=30000)
    weights = pack(graph, random_arrays(graph))
    program = native.compile(graph, weights, limits(), isa="scalar")  # the slowest: there is time to be met in a step
    program.step(batch(TOKENS_OF[:3]))
    other = native.compile(graph, weights, limits())
    other.step(batch(TOKENS_OF[:3]))
    enough = threading.Event()

    def work():
        while not enough.is_set():
            with contextlib.suppress(RuntimeError):  # where a reader was in it
                program.step(batch(TOKENS_OF))

    core, wide = program._native, np.empty((3, 30000), np.float32)
    places = program._values[graph.output][0]
    reads = {
        "rows": lambda: core.output_rows,
        "copy": lambda: core.copy_value(places, wide),
        "argmax": lambda: core.argmax(np.empty(3, np.int32)),
        "score": lambda: core.score(np.zeros(3, np.int32), np.empty(3, np.float32)),
        "divergence": lambda: core.divergence(other._native, np.empty(3)),
        "reference": lambda: other._native.divergence(core, np.empty(3)),
    }
    stepping = threading.Thread(target=work)
    stepping.start()
    refused, until = {}, time.monotonic() + 30
    while refused.keys() != reads.keys() and time.monotonic() < until:
        for name in reads.keys() - refused.keys():
            try:
                reads[name]()
            except RuntimeError as error:
                refused[name] = str(error)
            except ValueError:  # between two steps: there are more rows than asked for
                pass
            time.sleep(0.001)  # without it, a reader that is always in it could keep the steps out
    enough.set()
    stepping.join()
    assert refused == dict.fromkeys(reads, "a program runs one step at a time; another thread is in it")
    program.step(batch(TOKENS_OF))
    out = np.empty(40)
    core.divergence(core, out)  # a program beside itself is in use once
    assert (out == 0).all()


STARVED = """
import resource, sys
sys.path[:0] = {paths!r}
import numpy as np
from programs import TOKENS_OF, batch, limits, pack
from support import random_arrays, tiny_graph
from hasten.backends import native
graph = tiny_graph(vocabulary=50)
weights = pack(graph, random_arrays(graph))
wanted = native.compile(graph, weights, limits(threads=1)).step(batch(TOKENS_OF)).logits()
program = native.compile(graph, weights, limits(threads=3))
kept = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), kept[1]))
try:
    program.step(batch(TOKENS_OF))
except (RuntimeError, MemoryError):
    refused = True
resource.setrlimit(resource.RLIMIT_AS, kept)
assert refused
assert program._native.output_rows == 0
np.testing.assert_array_equal(program.step(batch(TOKENS_OF)).logits(), wanted)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_a_step_whose_threads_could_not_start_leaves_nothing_half_done():
    script = STARVED.format(paths=sys.path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_step_may_want_no_rows(small):
    program = native.compile(*small, limits(), keep=["blocks.1.out"])
    out = program.step(batch(TOKENS_OF, rows=[]))
    assert out.logits().shape == (0, 50)
    assert out.argmax().shape == (0,)
    assert out.sample(sampling(0)).tokens.shape == (0,)
    assert out.value("blocks.1.out").shape == (40, 24)


def test_weights_live_as_long_as_their_program():
    graph = tiny_graph()
    weights = pack(graph, random_arrays(graph), "int4-g32")
    program = native.compile(graph, weights, limits())
    expected = program.step(batch(TOKENS_OF)).logits()
    del weights
    gc.collect()
    junk = [np.full(5000, 7, np.uint8) for _ in range(200)]
    np.testing.assert_array_equal(program.step(batch(TOKENS_OF)).logits(), expected)
    assert junk


def test_weights_are_read_where_they_lie():
    graph = tiny_graph(tied=False)
    weights = pack(graph, random_arrays(graph))
    program = native.compile(graph, weights, limits())
    weights["head.weight"].arrays["codes"][:] = 0
    assert not program.step(batch(TOKENS_OF)).logits().any()


def test_memory_adds_up(small):
    graph, weights = small
    found = native.compile(graph, weights, limits(kv_format="bf16")).memory()
    packed = sum(w.nbytes for w in weights.values())
    assert found["weights"] == packed
    assert found["kv_cache"] == 2 * 2 * 6 * 16 * 2 * 8 * 2  # layers, k and v, blocks, tokens, heads, features, bytes
    assert 48 * 24 * 4 < found["buffers"] < 4 << 20


# Vocabulary of 40000: beyond top_k 1024, or 2048 candidates, filters are cut by all threads.
DRAWS = [
    {"temperature": 0},
    {"temperature": 0, "presence": 9},
    {},
    {"temperature": 0.7, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    {"top_k": 5000, "top_p": 0.9},
    {"top_p": 0.95},
    {"top_p": 0.99, "temperature": 50},
    {"typical_p": 0.4},
    {"top_k": 7, "typical_p": 0.8, "repetition": 1.5, "frequency": 0.3},
    {"top_p": 0.9, "bias": {5: 3.0, 20000: 9.0}, "banned": [1, 17000]},
    {"typical_p": 0.9, "allowed": range(0, 40000, 3)},
    {"allowed": [39999, 12], "banned": [39999]},
    {"allowed": [12], "banned": [12]},
]


def drawn_as(rows):
    """A row each for `rows` of DRAWS, in one batch."""
    how = sampling(len(rows), logprobs=3)
    how.typical_p = np.ones(len(rows), np.float32)
    how.bias_tokens, how.bias, how.banned, how.allowed, how.history = [], [], [], [], []
    for row, which in enumerate(rows):
        given = {"temperature": 1, "seed": 7 * which, "position": which} | DRAWS[which]
        for name in given.keys() - {"bias", "banned", "allowed"}:
            getattr(how, name)[row] = given[name]
        bias, mask = given.get("bias", {}), np.zeros(40000 // 8, np.uint8)
        for token in given.get("allowed", ()):
            mask[token // 8] |= 1 << token % 8
        how.bias_tokens.append(np.array(list(bias), np.int32))
        how.bias.append(np.array(list(bias.values()), np.float32))
        how.banned.append(np.array(given.get("banned", []), np.int32))
        how.allowed.append(mask.view(np.uint32) if "allowed" in given else np.zeros(0, np.uint32))
        how.history.append(np.array([3, 9, 20001, 9], np.int32))
        how.prompt_length[row] = 2
    return how


def of_row(drawn, row):
    return b"".join(x[row].tobytes() for x in (drawn.tokens, drawn.logprobs, drawn.top_tokens, drawn.top_logprobs))


@pytest.fixture(scope="module")
def large():
    graph = tiny_graph(vocabulary=40000)
    weights = pack(graph, random_arrays(graph))

    def step(threads, rows):
        program = native.compile(graph, weights, limits(threads=threads))
        return program.step(batch(TOKENS_OF, rows=rows))

    return step


def test_every_kind_of_draw_has_the_same_bits_alone_in_company_and_on_any_number_of_threads(large):
    kinds = list(range(len(DRAWS)))
    alone = large(1, [39])
    expected = [of_row(alone.sample(drawn_as([kind])), 0) for kind in kinds]
    for threads in (1, 2, 5):
        one, many = large(threads, [39]), large(threads, [39] * len(kinds))
        assert [of_row(one.sample(drawn_as([kind])), 0) for kind in kinds] == expected
        together = many.sample(drawn_as(kinds))
        assert [of_row(together, row) for row in kinds] == expected
        turned = many.sample(drawn_as(kinds[::-1]))  # what a row's scratch held before is another's now
        assert [of_row(turned, row) for row in kinds] == expected[::-1]
    assert len(set(expected)) > 8


def test_constraints_that_do_not_fit_are_refused(large):
    out = large(1, [39])
    for field, value, message in [
        ("banned", [np.array([40000], np.int32)], "token 40000 of a ban is not in the vocabulary of 40000"),
        ("bias_tokens", [np.array([-1], np.int32)], "1 tokens"),
        (
            "allowed",
            [np.zeros(1249, np.uint32)],
            "a mask of 1249 words for a vocabulary of 40000 tokens, must have 1250",
        ),
        ("allowed", [], "sampling has 0 entries for 1 wanted rows"),
        ("typical_p", np.ones(2, np.float32), "sampling has 2 entries"),
        ("typical_p", np.ones(1), "typical_p is float64"),
        ("banned", [np.zeros(1)], "history, bias_tokens and banned must be lists"),
    ]:
        how = sampling(1)
        setattr(how, field, value)
        with pytest.raises(InputError, match=message):
            out.sample(how)


def test_one_row_of_a_large_vocabulary_has_the_same_bits_on_any_number_of_threads():
    graph = tiny_graph(vocabulary=40000)
    weights = pack(graph, random_arrays(graph))
    found = []
    for threads in (1, 2, 5):
        out = native.compile(graph, weights, limits(threads=threads)).step(batch(TOKENS_OF, rows=[39]))
        greedy = out.sample(sampling(1, temperature=0, logprobs=3))
        found.append((out.argmax(), out.score(greedy.tokens), greedy.logprobs, greedy.top_logprobs))
    for other in found:
        assert [x.tobytes() for x in other] == [x.tobytes() for x in found[0]]
    likeliest, score, logprob, _ = found[0]
    logits = out.logits()[0].astype(np.float64)
    assert likeliest[0] == logits.argmax()
    assert score[0] == logprob[0]
    assert score[0] == pytest.approx(
        logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max(), abs=2e-6
    )
