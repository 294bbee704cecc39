"""Handle once on Redis, where the effects aren't in PostgreSQL: a mail, a call to somebody else's service.

    inbox = RedisInbox(Redis.from_url("redis://localhost"), "mails", lease_seconds=60, keep_seconds=7 * 24 * 3600)

    claim = await inbox.claim(message)
    if isinstance(claim, Busy):
        ...  # another holds it and may still fail: come again later, and don't commit the message's offset until then
    elif isinstance(claim, Claimed):
        try:
            await send_mail(message)
        except BaseException:
            await inbox.release(claim)
            raise
        await inbox.done(claim)

**What it promises.** At most one holder at a time whose lease hasn't run out; what was marked as done isn't claimed
again while that is kept; and a message whose holder died is free once the lease has run out. Each of these is one step
of Redis, never a look and then a write.

**What is weaker than PostgreSQL, and why.** The effect and the mark are in two places, which can't commit together:

    effects of a message <= 1 + crashes between effect and ``done`` + leases that ran out on a handler still at work

and one more for each time that Redis loses what it had answered: a failover to a replica that lagged, a crash before
its log was on disk (``appendfsync everysec``), a key evicted for want of memory (``maxmemory-policy`` other than
``noeviction``), a clock that jumped ahead. A handler that failed after its effect, and is released, counts as a crash.

Where one effect too many hurts, have whoever brings it about tell repeats, too: give it the message's id, as an
idempotency key, or the claim's ``token``. That grows with each claim of a message, so whoever has seen a higher one can
refuse a holder that overran its lease.

Needs the extra ``redis``, and Redis 5 or later, or Valkey. Each statement concerns one key, so a cluster will do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from secrets import token_hex
from typing import TypeAlias
from urllib.parse import quote

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from outbox_relay.errors import ClaimLostError
from outbox_relay.inbox.ids import ConsumedMessage, MessageId, id_of
from outbox_relay.inbox.names import checked_name

# A message is a hash with these fields: token, of the last claim, and asked, which call that was; until, when its lease
# runs out, in milliseconds by the clock of Redis; done. The lease isn't the key's own expiry, since the token must
# outlive it to grow.

# A client asks again where an answer was lost. So each statement, when it comes twice, does what it did, and says so.

_CLAIM = """\
-- claim
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('HEXISTS', KEYS[1], 'done') == 1 then
    return {0, 0}
end
local left = tonumber(redis.call('HGET', KEYS[1], 'until') or 0) - now
if left > 0 then
    if redis.call('HGET', KEYS[1], 'asked') == ARGV[3] then
        return {2, tonumber(redis.call('HGET', KEYS[1], 'token'))}
    end
    return {1, left}
end
local token = redis.call('HINCRBY', KEYS[1], 'token', 1)
redis.call('HSET', KEYS[1], 'until', now + ARGV[1], 'asked', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {2, token}
"""

_DONE = """\
-- done
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
    return 0
end
redis.call('HSET', KEYS[1], 'done', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

_RELEASE = """\
-- release
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] or redis.call('HEXISTS', KEYS[1], 'done') == 1 then
    return 0
end
redis.call('HSET', KEYS[1], 'until', 0)
return 1
"""


@dataclass(frozen=True, slots=True)
class Claimed:
    """The message is the caller's until its lease runs out. ``token`` grows with each claim of the message."""

    token: int
    message_id: str
    _key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Busy:
    """Another holds the message, for ``lease_seconds`` more at most. It isn't handled yet, and that one may fail."""

    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Done:
    """The message was handled."""


Claim: TypeAlias = Claimed | Busy | Done


class RedisInbox:
    """What one consumer holds and has handled. It keeps nothing in memory: any number of them, in any process, are one.

    ``consumer`` and ``message_id`` are as for :class:`~outbox_relay.inbox.postgres.Inbox`.

    ``lease_seconds``: longer than a handler ever takes. A message whose holder died waits for so long.
    ``keep_seconds``: longer than a repeat may be late, as for ``Inbox.prune``; so long after it was done a message is
    kept, and takes memory, some 200 bytes and its id. ``prefix`` begins each key.

    Raises ValueError for a time that isn't positive, a lease above ``keep_seconds``, or a name that can't be one.
    """

    def __init__(
        self,
        redis: Redis | RedisCluster,
        consumer: str,
        *,
        lease_seconds: float,
        keep_seconds: float,
        message_id: MessageId | None = None,
        prefix: str = "inbox",
    ) -> None:
        if not 0 < lease_seconds <= keep_seconds:
            raise ValueError(
                f"lease_seconds ({lease_seconds:g}) must be above 0, and keep_seconds ({keep_seconds:g}) not below it"
            )
        # Quoted, so that no two consumers and ids make the same key.
        self._prefix = f"{prefix}:{quote(checked_name(consumer), safe='')}:"
        self._lease_ms = max(1, round(lease_seconds * 1000))
        self._keep_ms = max(1, round(keep_seconds * 1000))
        self._message_id = message_id
        self._claim = redis.register_script(_CLAIM)
        self._done = redis.register_script(_DONE)
        self._release = redis.register_script(_RELEASE)

    async def claim(self, message: ConsumedMessage) -> Claim:
        """Claim the message, unless it is done, or another holds it.

        Raises MissingMessageIdError, and the errors of the client, which asks again before it gives up: then it may be
        claimed, and nobody knows, until the lease runs out.
        """
        id_ = id_of(message, self._message_id)
        key = self._prefix + id_
        state, number = await self._claim(keys=[key], args=[self._lease_ms, self._keep_ms, token_hex(8)])
        if state == 0:
            return Done()
        return Busy(number / 1000) if state == 1 else Claimed(number, id_, key)

    async def done(self, claim: Claimed) -> None:
        """The message was handled: it isn't claimed again while that is kept. To be called after the effect.

        Also where the lease has run out, if nobody has claimed the message since. Raises ClaimLostError if somebody
        has, or the key is gone: then the effect may come twice. May be called again where the answer was lost.
        """
        if not await self._done(keys=[claim._key], args=[claim.token, self._keep_ms]):
            raise ClaimLostError(
                f"message {claim.message_id!r} is no longer held by its claim {claim.token}: the handler took longer"
                " than its lease, and another may have handled it too; make lease_seconds longer than a handler takes"
            )

    async def release(self, claim: Claimed) -> bool:
        """The message wasn't handled: it is free at once. False, and nothing changes, where another holds or did it."""
        return bool(await self._release(keys=[claim._key], args=[claim.token]))
