"""When refused rows make their topic wait as a whole.

Rows at fault are found one by one, each by a new producer and several requests, and what is claimed beside them waits
meanwhile. So a topic that refuses row after row, and takes none, is left alone like one that can't be written to. How
many are found in one claim depends on how fast Kafka answers; therefore they are counted across claims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from outbox_relay.message import Delivered, Outcome, Retry, Scope

#: Refused rows, each another one, since the topic last took a row.
MANY_REFUSED = 10


class RefusedTopics:
    """What one lane has seen refused."""

    def __init__(self) -> None:
        self._ids: dict[str, set[int]] = {}  # by topic, of rows refused since it last took one; fewer than many

    def among(self, outcomes: Sequence[Outcome], is_suspect: Callable[[str], bool]) -> dict[str, Retry]:
        """By topic that is to wait an example of what was refused, of the outcomes of one claim.

        ``is_suspect``: the topic has waited already, took nothing since, and was tried with all its rows: one that is
        refused is enough.
        """
        retries = [outcome for outcome in outcomes if isinstance(outcome, Retry)]
        if not retries and not self._ids:
            return {}
        taken = {outcome.record.topic for outcome in outcomes if isinstance(outcome, Delivered)}
        for topic in taken:
            self._ids.pop(topic, None)
        refused: dict[str, Retry] = {}
        for retry in retries:
            topic = retry.record.topic
            if retry.scope is Scope.TOPIC:
                refused.setdefault(topic, retry)
            elif topic not in taken and topic not in refused:
                ids = self._ids.setdefault(topic, set())
                ids.add(retry.record.id)
                if len(ids) >= MANY_REFUSED or is_suspect(topic):
                    refused[topic] = retry
        for topic in refused:
            self._ids.pop(topic, None)
        return refused
