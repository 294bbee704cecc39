"""Whose fault it is when Kafka doesn't take a batch: one table over every error of aiokafka. Pure.

``docs/errors.md`` says of each what happens and what to do; a test holds it, and this table, to the classes that there
are, so that a new release of aiokafka brings none along unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from aiokafka import errors as kafka


class Fault(Enum):
    """Only a fault of the row costs an attempt, and only after the row was refused alone."""

    ROW = "row"  #: Kafka looked at the records and refused one of them
    UNCLEAR = "unclear"  #: the row's if its partition takes others meanwhile, else its topic's
    TOPIC = "topic"  #: it can't be written to: it waits, and is tried now and then; other topics flow
    PRODUCER = "producer"  #: of its numbering, nobody's fault: with a new producer the batch is sent again at once
    #: Before anything else is sent a new producer is made: if that fails, all waits; if not, the topic alone does.
    INFRASTRUCTURE = "infrastructure"


class InvalidRecordError(kafka.BrokerResponseError):  # type: ignore[misc]
    """A record fails a check of the broker: a compacted topic and no key, for example. aiokafka has no class for it."""

    errno = 87
    message = "INVALID_RECORD"


_ROW = (
    kafka.RecordTooLargeError,  # said by the publisher, of a record that no broker with usual settings takes
    kafka.MessageSizeTooLargeError,
    kafka.RecordListTooLargeError,
    kafka.CorruptRecordException,
    kafka.InvalidTimestampError,
    kafka.UnsupportedForMessageFormatError,
    kafka.PolicyViolationError,
    InvalidRecordError,
)

#: An unexpected error in the broker (-1), or a code that aiokafka has no class for. A record may have provoked it, or
#: the broker is in trouble; that others are taken tells which.
_UNCLEAR = (kafka.UnknownError,)

_TOPIC = (
    kafka.UnknownTopicOrPartitionError,
    kafka.LeaderNotAvailableError,
    kafka.NotLeaderForPartitionError,
    kafka.ReplicaNotAvailableError,
    kafka.InvalidTopicError,
    kafka.NotEnoughReplicasError,
    kafka.NotEnoughReplicasAfterAppendError,
    kafka.TopicAuthorizationFailedError,
    kafka.InvalidPartitionsError,
    kafka.KafkaStorageError,
    kafka.LogDirNotFound,
    kafka.ReassignmentInProgress,
)

_PRODUCER = (
    kafka.OutOfOrderSequenceNumber,
    kafka.DuplicateSequenceNumber,
    kafka.InvalidProducerEpoch,
    kafka.InvalidProducerIdMapping,
    kafka.UnknownProducerId,
    kafka.ProducerFenced,
    kafka.ProducerClosed,
    kafka.InvalidTxnState,
    kafka.ConcurrentTransactions,
    kafka.TransactionCoordinatorFenced,
)

_INFRASTRUCTURE = (
    TimeoutError,
    OSError,
    # The base classes: what a part of aiokafka says that has no better name for it.
    kafka.KafkaError,
    kafka.BrokerResponseError,
    kafka.NoBrokersAvailable,
    kafka.NodeNotReadyError,
    kafka.KafkaProtocolError,
    kafka.CorrelationIdError,
    kafka.Cancelled,
    kafka.TooManyInFlightRequests,
    kafka.StaleMetadata,
    kafka.MetadataEmptyBrokerList,
    kafka.UnrecognizedBrokerVersion,
    kafka.IncompatibleBrokerVersion,
    kafka.AuthenticationMethodNotSupported,
    kafka.AuthenticationFailedError,
    kafka.KafkaUnavailableError,
    kafka.KafkaTimeoutError,
    kafka.KafkaConnectionError,
    kafka.QuotaViolationError,
    kafka.RequestTimedOutError,
    kafka.BrokerNotAvailableError,
    kafka.ClusterAuthorizationFailedError,
    kafka.TransactionalIdAuthorizationFailed,
    kafka.UnsupportedSaslMechanismError,
    kafka.IllegalSaslStateError,
    kafka.UnsupportedVersionError,
    kafka.SecurityDisabled,
    kafka.SaslAuthenticationFailed,
    kafka.DelegationTokenExpired,
    kafka.ListenerNotFound,
)

#: Of requests that a relay doesn't make (groups, offsets, fetches, administration), or of arguments that it doesn't
#: give. One that comes all the same is a defect, in here or in aiokafka, and no row's fault.
NEVER = (
    kafka.IllegalStateError,
    kafka.IllegalArgumentError,
    kafka.CommitFailedError,
    kafka.UnsupportedCodecError,
    kafka.KafkaConfigurationError,
    kafka.NoOffsetForPartitionError,
    kafka.NoError,
    kafka.OffsetOutOfRangeError,
    kafka.InvalidFetchRequestError,
    kafka.StaleControllerEpochError,
    kafka.OffsetMetadataTooLargeError,
    kafka.StaleLeaderEpochCodeError,
    kafka.GroupLoadInProgressError,
    kafka.GroupCoordinatorNotAvailableError,
    kafka.NotCoordinatorForGroupError,
    kafka.InvalidRequiredAcksError,
    kafka.IllegalGenerationError,
    kafka.InconsistentGroupProtocolError,
    kafka.InvalidGroupIdError,
    kafka.UnknownMemberIdError,
    kafka.InvalidSessionTimeoutError,
    kafka.RebalanceInProgressError,
    kafka.InvalidCommitOffsetSizeError,
    kafka.GroupAuthorizationFailedError,
    kafka.TopicAlreadyExistsError,
    kafka.InvalidReplicationFactorError,
    kafka.InvalidReplicationAssignmentError,
    kafka.InvalidConfigurationError,
    kafka.NotControllerError,
    kafka.InvalidRequestError,
    kafka.InvalidTransactionTimeout,
    kafka.OperationNotAttempted,
    kafka.DelegationTokenAuthDisabled,
    kafka.DelegationTokenNotFound,
    kafka.DelegationTokenOwnerMismatch,
    kafka.DelegationTokenRequestNotAllowed,
    kafka.DelegationTokenAuthorizationFailed,
    kafka.InvalidPrincipalType,
    kafka.NonEmptyGroup,
    kafka.GroupIdNotFound,
    kafka.FetchSessionIdNotFound,
    kafka.InvalidFetchSessionEpoch,
    kafka.MemberIdRequired,
)

FAULTS: Mapping[type[BaseException], Fault] = {
    **dict.fromkeys(_ROW, Fault.ROW),
    **dict.fromkeys(_UNCLEAR, Fault.UNCLEAR),
    **dict.fromkeys(_TOPIC, Fault.TOPIC),
    **dict.fromkeys(_PRODUCER, Fault.PRODUCER),
    **dict.fromkeys(_INFRASTRUCTURE, Fault.INFRASTRUCTURE),
    **dict.fromkeys(NEVER, Fault.INFRASTRUCTURE),
}

_TOO_LARGE = "the record is larger than the topic takes: raise its {}, or store less in payload"
_ADVICE: Mapping[type[BaseException], str] = {
    kafka.RecordTooLargeError: "brokers take no request as large as the record (100 MiB): store less in it",
    kafka.MessageSizeTooLargeError: _TOO_LARGE.format("max.message.bytes"),
    kafka.RecordListTooLargeError: _TOO_LARGE.format("segment.bytes"),
    kafka.InvalidTimestampError: (
        "a record carries the time of publishing, and the topic takes none of now: "
        "look at its message.timestamp.before.max.ms and message.timestamp.after.max.ms, and at both clocks"
    ),
    kafka.PolicyViolationError: "a policy of the brokers refuses the record; the broker's log says which",
    InvalidRecordError: "a check of the broker fails: a compacted topic refuses a record without a key",
    kafka.UnknownError: "Kafka refuses, and its client has no name for the reason; the broker's log has it",
    kafka.TopicAuthorizationFailedError: "grant this relay's user Write on the topic",
    kafka.UnknownTopicOrPartitionError: (
        "create the topic (the relay never does), or grant this relay's user Describe on it"
    ),
    kafka.LeaderNotAvailableError: "a partition has no leader: is the broker with its replicas up?",
    kafka.NotEnoughReplicasError: (
        "a partition has fewer replicas in sync than the topic's min.insync.replicas: are all its brokers up?"
    ),
    TimeoutError: "Kafka is there, but a partition doesn't answer: is the broker that leads it in trouble?",
}


def fault_of(error: BaseException) -> Fault:
    """Of a class that isn't in the table: what its base class is."""
    return next((FAULTS[each] for each in type(error).__mro__ if each in FAULTS), Fault.INFRASTRUCTURE)


def name_of(error: BaseException) -> str:
    return type(error).__name__


def advice_on(error: BaseException) -> str:
    """What an operator can do, in one sentence."""
    return _ADVICE.get(type(error)) or f"{error}; the broker's log says more"
