"""What becomes of rows that Kafka refuses, by topic. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from outbox_relay.retry import Backoff

#: Kafka's limit.
MOST_TOPIC_CHARACTERS = 249


@dataclass(frozen=True, slots=True)
class Policy:
    """Of one topic. ``block``: later rows of a key wait for the one that was refused, until it is sent or discarded."""

    max_attempts: int = 10
    block: bool = True
    #: Where a copy of a dead row goes, ``{topic}`` being its own; None: nowhere.
    dead_letters: str | None = None

    def dead_letter_topic(self, topic: str) -> str | None:
        """None too where Kafka takes no name so long."""
        name = "" if self.dead_letters is None else self.dead_letters.replace("{topic}", topic)
        return name if 0 < len(name) <= MOST_TOPIC_CHARACTERS else None


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
