"""The consumer side: a message that comes twice changes nothing the second time.

:mod:`~outbox_relay.inbox.postgres` where the effects are in PostgreSQL: exactly one each.
:mod:`~outbox_relay.inbox.offsets` the same with an offset for each partition instead of an id for each message.
:mod:`~outbox_relay.inbox.redis` where they are somewhere else: a stated bound.
:mod:`~outbox_relay.inbox.transform` where they are messages in Kafka: exactly one each, in a transaction of Kafka's.
:mod:`~outbox_relay.inbox.guard` so that late messages don't move a state backwards.
:mod:`~outbox_relay.inbox.runner` and :mod:`~outbox_relay.inbox.faststream` to tie it together.

For the relay's topics, and for any other topic of Kafka whose messages have an id.
"""

from __future__ import annotations

from outbox_relay.inbox.ids import ConsumedMessage, message_id

__all__ = ["ConsumedMessage", "message_id"]
