"""What becomes of rows that Kafka refuses, by topic. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from outbox_relay.retry import Backoff


@dataclass(frozen=True, slots=True)
class Policy:
    """Of one topic. ``block``: later rows of a key wait for the one that was refused, until it is sent or discarded."""

    max_attempts: int = 10
    block: bool = True


@dataclass(frozen=True, slots=True)
class Policies:
    """``topics``: exceptions, by name or by a prefix that ends in ``*``; a name wins, then the longest prefix."""

    backoff: Backoff
    default: Policy = Policy()
    topics: Mapping[str, Policy] = field(default_factory=dict)

    def of(self, topic: str) -> Policy:
        if topic in self.topics:
            return self.topics[topic]
        prefixes = [name for name in self.topics if name.endswith("*") and topic.startswith(name[:-1])]
        return self.topics[max(prefixes, key=len)] if prefixes else self.default
