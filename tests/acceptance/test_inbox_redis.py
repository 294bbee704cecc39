"""Handling once on a real Redis: as few effects as stated, counted where they happen, whatever fails in between."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from uuid import uuid4

import pytest
import redis.exceptions
from redis.asyncio import Redis

from outbox_relay.errors import ClaimLostError, MissingMessageIdError
from outbox_relay.inbox.redis import Busy, Claimed, Done, RedisInbox
from tests.consumed import record
from tests.redis_server import RedisServer
from tests.waiting import eventually

HOUR = 3600.0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if given := os.environ.get("REDIS_URL"):
        yield given
        return
    with RedisServer.start() as server:
        yield server.url


@pytest.fixture(params=[False, True], ids=["bytes", "text"])
async def client(url: str, request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    """One that answers in bytes, and one that answers in text."""
    async with Redis.from_url(url, decode_responses=request.param) as client:
        yield client


@pytest.fixture
def consumer() -> str:
    """Of this test alone, as all share the server."""
    return f"mails-{uuid4().hex}"


def inbox_of(client: Redis, consumer: str, *, lease_seconds: float = HOUR, keep_seconds: float = HOUR) -> RedisInbox:
    return RedisInbox(client, consumer, lease_seconds=lease_seconds, keep_seconds=keep_seconds)


async def claimed(inbox: RedisInbox, id_: str = "m1") -> Claimed:
    claim = await inbox.claim(record(id_))
    assert isinstance(claim, Claimed)
    return claim


async def lease_runs_out(client: Redis, consumer: str, id_: str = "m1") -> None:
    """As by the passing of time."""
    await client.hset(f"inbox:{consumer}:{id_}", "until", "1")


# -- what a claim is


async def test_what_is_done_is_not_claimed_again(client: Redis, consumer: str) -> None:
    inbox = inbox_of(client, consumer)
    claim = await claimed(inbox)
    assert (claim.token, claim.message_id) == (1, "m1")
    await inbox.done(claim)
    assert [await inbox.claim(record("m1")) for _ in range(2)] == [Done(), Done()]
    # As where the answer to the first was lost.
    await inbox.done(claim)
    assert await inbox.claim(record("m1")) == Done()


async def test_what_another_holds_is_busy(client: Redis, consumer: str) -> None:
    inbox = inbox_of(client, consumer)
    await claimed(inbox)
    found = await inbox_of(client, consumer, lease_seconds=1).claim(record("m1"))
    assert isinstance(found, Busy)
    assert HOUR - 300 < found.lease_seconds <= HOUR


async def test_what_is_released_is_free_at_once(client: Redis, consumer: str) -> None:
    inbox = inbox_of(client, consumer)
    first = await claimed(inbox)
    assert await inbox.release(first)
    assert (await claimed(inbox)).token == 2


async def test_what_its_holder_left_is_free_once_the_lease_has_run_out(client: Redis, consumer: str) -> None:
    inbox = inbox_of(client, consumer, lease_seconds=0.05)
    await claimed(inbox)

    async def claims() -> Claimed | None:
        found = await inbox.claim(record("m1"))
        return found if isinstance(found, Claimed) else None

    assert (await eventually(claims, "the lease runs out")).token == 2


async def test_who_has_overrun_its_lease_can_neither_mark_nor_release(client: Redis, consumer: str) -> None:
    inbox = inbox_of(client, consumer)
    slow = await claimed(inbox)
    await lease_runs_out(client, consumer)
    second = await claimed(inbox)
    with pytest.raises(ClaimLostError, match=r"'m1' is no longer held by its claim 1: .* make lease_seconds longer"):
        await inbox.done(slow)
    assert not await inbox.release(slow)
    assert isinstance(await inbox.claim(record("m1")), Busy)
    await inbox.done(second)
    assert not await inbox.release(second)
    assert await inbox.claim(record("m1")) == Done()


async def test_who_has_overrun_its_lease_may_mark_what_nobody_claimed_since(client: Redis, consumer: str) -> None:
    inbox = inbox_of(client, consumer)
    slow = await claimed(inbox)
    await lease_runs_out(client, consumer)
    await inbox.done(slow)
    assert await inbox.claim(record("m1")) == Done()


async def test_tokens_grow_with_each_claim(client: Redis, consumer: str) -> None:
    inbox = inbox_of(client, consumer)
    tokens = []
    for n in range(6):
        claim = await claimed(inbox)
        tokens.append(claim.token)
        await (inbox.release(claim) if n % 2 else lease_runs_out(client, consumer))
    assert tokens == [1, 2, 3, 4, 5, 6]


async def test_messages_and_consumers_are_told_apart(client: Redis, consumer: str) -> None:
    await claimed(inbox_of(client, f"{consumer}:a"), "b")
    await claimed(inbox_of(client, consumer), "a:b")
    await claimed(inbox_of(client, consumer), "b")
    with pytest.raises(MissingMessageIdError):
        await inbox_of(client, consumer).claim(record())
    by_key = RedisInbox(
        client, consumer, lease_seconds=HOUR, keep_seconds=HOUR, message_id=lambda m: m.key.decode(), prefix="another"
    )
    await claimed(by_key, "b")
    assert isinstance(await by_key.claim(record("c")), Busy)


async def test_what_was_done_is_forgotten_once_it_is_kept_no_longer(client: Redis, consumer: str) -> None:
    key = f"inbox:{consumer}:m1"
    inbox = inbox_of(client, consumer, lease_seconds=1, keep_seconds=1_000)
    claim = await claimed(inbox)
    # While it is held, too, so that nothing stays for ever where a holder died.
    assert 1_000 - 300 < await client.ttl(key) <= 1_000
    await client.expire(key, 5_000)
    await inbox.done(claim)
    assert 1_000 - 300 < await client.ttl(key) <= 1_000
    short = inbox_of(client, consumer, lease_seconds=0.001, keep_seconds=0.05)
    await short.done(claim)

    async def claims() -> bool:
        return isinstance(await inbox.claim(record("m1")), Claimed)

    await eventually(claims, "it is forgotten")


@pytest.mark.parametrize(("lease_seconds", "keep_seconds"), [(0, 1), (-1, 1), (2, 1), (float("nan"), 1)])
async def test_times_that_can_not_be_are_refused(
    client: Redis, consumer: str, lease_seconds: float, keep_seconds: float
) -> None:
    with pytest.raises(ValueError, match=r"lease_seconds .* must be above 0, and keep_seconds .* not below it"):
        inbox_of(client, consumer, lease_seconds=lease_seconds, keep_seconds=keep_seconds)


async def test_a_server_that_has_forgotten_the_scripts_is_told_them_again(client: Redis, consumer: str) -> None:
    inbox = inbox_of(client, consumer)
    claim = await claimed(inbox)
    await client.script_flush()
    await inbox.done(claim)
    assert await inbox.claim(record("m1")) == Done()


class RedisThatAsksTwice(Redis):
    """As a client does whose first answer was lost on the way."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        await super().execute_command(*args, **options)
        return await super().execute_command(*args, **options)


async def test_a_question_that_is_asked_again_has_the_same_answer(url: str, consumer: str) -> None:
    async with RedisThatAsksTwice.from_url(url) as client:
        inbox = inbox_of(client, consumer)
        first = await claimed(inbox)
        assert first.token == 1
        assert isinstance(await inbox.claim(record("m1")), Busy)
        assert await inbox.release(first)
        second = await claimed(inbox)
        assert second.token == 2
        await inbox.done(second)
        assert await inbox.claim(record("m1")) == Done()


async def test_a_server_that_is_gone_is_an_error_and_no_claim() -> None:
    with RedisServer.start() as server:
        async with Redis.from_url(server.url) as client:
            inbox = inbox_of(client, "mails")
            claim = await claimed(inbox)
            server.stop()
            for asked in (inbox.claim(record("m2")), inbox.done(claim), inbox.release(claim)):
                with pytest.raises(redis.exceptions.ConnectionError):
                    await asked


# -- how many effects a message has


@dataclass
class Effects:
    """Where the effects happen: no inbox knows of it. ``steps`` is called after each step of a handler."""

    messages: list[str] = field(default_factory=list)
    done: Callable[[str], Awaitable[None]] | None = None

    async def after(self, step: str) -> None:
        if self.done is not None:
            await self.done(step)


#: Handles a message once, and says whether it need not come again.
Handler: TypeAlias = Callable[[Redis, str, str, Effects], Awaitable[bool]]


async def by_the_book(client: Redis, consumer: str, id_: str, effects: Effects) -> bool:
    inbox = inbox_of(client, consumer)
    claim = await inbox.claim(record(id_))
    if not isinstance(claim, Claimed):
        return isinstance(claim, Done)
    await effects.after("claimed")
    effects.messages.append(id_)
    await effects.after("effected")
    await inbox.done(claim)
    await effects.after("done")
    return True


async def look_then_write(client: Redis, consumer: str, id_: str, effects: Effects) -> bool:
    """Broken: another may come between the look and the write."""
    if await client.exists(f"{consumer}:{id_}"):
        return True
    await effects.after("claimed")
    await client.set(f"{consumer}:{id_}", "done")
    effects.messages.append(id_)
    await effects.after("effected")
    await effects.after("done")
    return True


async def done_before_the_effect(client: Redis, consumer: str, id_: str, effects: Effects) -> bool:
    """Broken: in one step, but the message counts as handled before it is."""
    if not await client.set(f"{consumer}:{id_}", "done", nx=True):
        return True
    await effects.after("claimed")
    effects.messages.append(id_)
    await effects.after("effected")
    await effects.after("done")
    return True


async def effects_at_once(client: Redis, consumer: str, handler: Handler) -> int:
    """How many effects a message has that comes to ten consumers at once; each waits for all that claim."""
    effects = Effects()
    looked = 0

    async def done(step: str) -> None:
        nonlocal looked
        if step == "claimed":
            looked += 1
            # Until all that will come have come: whoever was told to wait, or that it is done, has returned.
            await eventually(lambda: looked + returned >= 10, "all have asked")

    returned = 0
    effects.done = done

    async def come() -> None:
        nonlocal returned
        await handler(client, consumer, "m1", effects)
        returned += 1

    async with asyncio.timeout(60):
        await asyncio.gather(*(come() for _ in range(10)))
    return len(effects.messages)


async def test_a_message_that_comes_to_many_at_once_has_one_effect(client: Redis, consumer: str) -> None:
    assert await effects_at_once(client, consumer, by_the_book) == 1


async def test_consumers_that_look_and_then_write_are_caught(client: Redis, consumer: str) -> None:
    assert await effects_at_once(client, consumer, look_then_write) == 10


class HandlerDied(Exception):
    """It comes no further than here."""


async def effects_after_a_crash(client: Redis, consumer: str, handler: Handler, step: str) -> int:
    """How many effects a message has whose handler dies after a step, and which then comes until it need not."""

    async def die(done: str) -> None:
        if done == step:
            raise HandlerDied

    effects = Effects(done=die)
    with contextlib.suppress(HandlerDied):
        await handler(client, consumer, "m1", effects)
    effects.done = None
    await lease_runs_out(client, consumer)
    while not await handler(client, consumer, "m1", effects):
        pass
    return len(effects.messages)


STEPS = ("claimed", "effected", "done")


async def test_a_crash_costs_one_more_effect_only_between_effect_and_done(client: Redis, consumer: str) -> None:
    found = {step: await effects_after_a_crash(client, f"{consumer}-{step}", by_the_book, step) for step in STEPS}
    assert found == {"claimed": 1, "effected": 2, "done": 1}


async def test_a_message_that_is_done_before_its_effect_is_caught(client: Redis, consumer: str) -> None:
    found = {
        step: await effects_after_a_crash(client, f"{consumer}-{step}", done_before_the_effect, step) for step in STEPS
    }
    assert found["claimed"] == 0


async def test_each_lease_that_is_overrun_costs_one_more_effect_at_most(client: Redis, consumer: str) -> None:
    effects = Effects()
    overruns = 3
    holders: list[asyncio.Task[bool]] = []
    go_on = asyncio.Event()

    async def overrun(step: str) -> None:
        if step == "claimed":
            held.set()
            await go_on.wait()

    effects.done = overrun
    for _ in range(overruns + 1):
        held = asyncio.Event()
        holders.append(asyncio.create_task(by_the_book(client, consumer, "m1", effects)))
        async with asyncio.timeout(30):
            await held.wait()
        await lease_runs_out(client, consumer)
    go_on.set()
    async with asyncio.timeout(30):
        ended = await asyncio.gather(*holders, return_exceptions=True)
    # The last of them holds it, so it alone may say that it is done.
    assert [type(end) for end in ended] == [ClaimLostError] * overruns + [bool]
    assert len(effects.messages) == 1 + overruns
    assert await inbox_of(client, consumer).claim(record("m1")) == Done()


HOLDER = """
import asyncio, sys
from redis.asyncio import Redis
from outbox_relay.inbox.redis import RedisInbox
from tests.consumed import record

async def main(url, consumer):
    async with Redis.from_url(url) as client:
        inbox = RedisInbox(client, consumer, lease_seconds=0.2, keep_seconds=3600)
        print((await inbox.claim(record("m1"))).token, flush=True)
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_holder_that_is_killed_frees_the_message_after_its_lease(
    url: str, client: Redis, consumer: str
) -> None:
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, url, consumer, stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"1\n"
    holder.send_signal(signal.SIGKILL)
    await holder.wait()
    effects = Effects()

    async def handled() -> bool:
        return await by_the_book(client, consumer, "m1", effects)

    await eventually(handled, "the lease runs out")
    assert effects.messages == ["m1"]
    assert await inbox_of(client, consumer).claim(record("m1")) == Done()
