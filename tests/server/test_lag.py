"""Readers that lag behind get fewer, larger deltas, of however many choices and prompts; and turns are no progress."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from server.serving import eventually, serve

from hasten import LLM
from hasten.server.service import ServiceLimits
from hasten.server.streams import merged
from hasten.server.ticket import Delta, EngineFault, Ticket


def delta(index: int, token: int, end: bool = False) -> Delta:
    return Delta(index, f"{token},", [token], [float(token)], [[(token, 0.0)]], "length" if end else None)


def ticket(choices: int = 1) -> Ticket:
    return Ticket(asyncio.get_running_loop(), choices, lambda ticket: None)


def test_interleaved_choices_join() -> None:
    async def read() -> list[Delta]:
        made = ticket(3)
        for token in range(50):
            for index in range(3):
                made.push(delta(index, 100 * index + token, token == 49))
        return [d async for d in made]

    found = asyncio.run(read())
    assert [d.index for d in found] == [0, 1, 2]
    for d in found:
        assert d.token_ids == [100 * d.index + token for token in range(50)]
        assert d.text == "".join(f"{token}," for token in d.token_ids)
        assert (len(d.logprobs), len(d.top), d.finish_reason) == (50, 50, "length")


def test_what_was_read_is_not_changed_any_more() -> None:
    async def read() -> list[list[int]]:
        made, read = ticket(2), []
        for token in range(4):
            made.push(delta(0, token, token == 3))
            made.push(delta(1, token, token == 3))
            read.append(await anext(made))
        read += [d async for d in made]
        return [[d.index, *d.token_ids] for d in read]

    assert asyncio.run(read()) == [[0, 0], [1, 0, 1], [0, 1, 2], [1, 2, 3], [0, 3]]


def test_a_fault_comes_after_what_was_there() -> None:
    async def read() -> list[int]:
        made = ticket(2)
        for item in (delta(0, 1), delta(1, 2), delta(0, 3), EngineFault("x")):
            made.push(item)
        read = (await anext(made)).token_ids + (await anext(made)).token_ids
        with pytest.raises(EngineFault):
            await anext(made)
        assert made.ended
        return read

    assert asyncio.run(read()) == [1, 3, 2]


def test_several_prompts_join_too() -> None:
    async def read() -> list[tuple[int, list[int]]]:
        made = [ticket(), ticket(), ticket()]
        answers = merged(made)
        made[1].push(delta(0, 0))
        read = [await anext(answers)]
        for token in range(1, 30):
            for one in made:
                one.push(delta(0, token, token == 29))
            await asyncio.sleep(0)  # the time in which something might copy ahead
        read += [item async for item in answers]
        return [(number, d.token_ids) for number, d in read]

    first, *rest = asyncio.run(read())
    assert first == (1, [0])
    assert sorted(rest) == [(n, list(range(1, 30))) for n in range(3)]


def test_several_prompts_are_waited_for() -> None:
    async def read() -> list[tuple[int, list[int]]]:
        made = [ticket(), ticket()]
        read = []

        async def reader() -> None:
            async for number, d in merged(made):
                read.append((number, d.token_ids))

        task = asyncio.ensure_future(reader())
        for token, number in enumerate((0, 1, 1, 0, 0)):
            await asyncio.sleep(0.01)
            made[number].push(delta(0, token, token in (2, 4)))
        await asyncio.wait_for(task, 5)
        return read

    assert asyncio.run(read()) == [(0, [0]), (1, [1]), (1, [2]), (0, [3]), (0, [4])]


def test_a_fault_of_one_prompt_ends_all() -> None:
    async def read() -> None:
        made = [ticket(), ticket()]
        asyncio.get_running_loop().call_later(0.01, made[1].push, EngineFault("x"))
        async for _ in merged(made):
            pass

    with pytest.raises(EngineFault):
        asyncio.run(read())


def test_going_round_without_computing_is_no_sign_of_life(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(llm, service_limits=ServiceLimits(stall_seconds=0.3)) as server, ThreadPoolExecutor(1) as pool:
        scheduler = server.service.engine.scheduler
        plan = scheduler.plan
        monkeypatch.setattr(scheduler, "plan", list)
        stuck = pool.submit(server.post, "/v1/completions", {"prompt": "def read", "max_tokens": 3})
        try:
            eventually(lambda: server.service.active == 1)
            eventually(lambda: server.get("/health").status_code == 503)
            assert server.get("/health").json()["status"] == "stalled"
        finally:
            scheduler.plan = plan
        assert stuck.result().status_code == 200
        assert server.get("/health").status_code == 200
