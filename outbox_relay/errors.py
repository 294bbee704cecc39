"""The errors of the project: one base class, and each message says what to do."""

from __future__ import annotations


class OutboxRelayError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(OutboxRelayError):
    """The configuration can't be used; ``problems`` has one line for each mistake."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class InvalidMessageError(OutboxRelayError, ValueError):
    """A message that Kafka or the outbox table would refuse."""


class NotInTransactionError(OutboxRelayError):
    """A message was added, or handled, outside a transaction, so it could not share its fate with the domain rows."""


class InTransactionError(OutboxRelayError):
    """What commits by itself was given a connection that is in somebody's transaction."""


class MissingMessageIdError(OutboxRelayError):
    """A consumed message has no id, or none that can be used, so it can't be told from its repeats."""


class NoHandlerError(OutboxRelayError):
    """A consumed message is of a topic and a type for which a consumer has no handler."""


class UnguardedMessageError(OutboxRelayError):
    """A consumed message lacks what the state guard goes by, so it can't be told whether it comes late."""


class ClaimLostError(OutboxRelayError):
    """A consumer handled a message for longer than it held it, so that another may have handled it too."""


class PartitionLostError(OutboxRelayError):
    """A consumer handled a message of a partition that another has taken since, or that it never took."""


class PartitionBusyError(OutboxRelayError):
    """The last owner of a partition has a transaction open for longer than the next waits; nothing was changed."""


class OffsetGoneError(OutboxRelayError):
    """Kafka doesn't have the offset that a consumer is to go on from, so messages may be missing."""


class PassedOverError(OutboxRelayError):
    """A consumer goes on although a message before isn't handled, which would then never be."""


class SchemaError(OutboxRelayError):
    """The outbox schema is missing, or of a version that this release can't work with."""


class RefusedError(OutboxRelayError):
    """What an operator asked for can't be done to what is there; nothing was changed."""


class NotPermittedError(OutboxRelayError):
    """The role that a command logged in with may not do what it was asked to; nothing was changed."""


class SourceUnavailableError(OutboxRelayError):
    """The database could not be reached, or did not answer in time; nothing was lost, try again later."""

    #: When it was asked, by ``time.monotonic()``; None where nobody noted it.
    asked_at: float | None = None


class SourceRefusedError(SourceUnavailableError):
    """The database refuses this relay, or isn't believed: somebody has to mend what the message names."""


class PublisherUnavailableError(OutboxRelayError):
    """Kafka could not be reached; nothing was lost, try again later."""


class ServerError(OutboxRelayError):
    """A local server for the demo or the tests could not be started."""


class DemoError(OutboxRelayError):
    """The demo could not be carried to its end, so it shows nothing."""


class CheckError(OutboxRelayError):
    """A check could not be carried out to its end, so it says nothing about the data."""
