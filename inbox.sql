-- outbox-relay inbox, version 1: for consumers that handle a message once. Apply with `outbox-relay schema apply --inbox`
-- or psql, to the database that a consumer's effects are in; it needs no outbox there.
--
-- A consumer's role needs:
--
--     GRANT SELECT, INSERT ON inbox TO …;
--     GRANT SELECT, UPDATE (handled_at), DELETE ON inbox TO …;   -- whoever prunes it
--     GRANT SELECT, INSERT, UPDATE ON inbox_state TO …;
--     GRANT SELECT, INSERT, UPDATE ON inbox_offset TO …;

-- The messages that were handled. A row is inserted in the transaction of the message's effects, so both are there or
-- neither. Not partitioned: its unique key would have to contain the column that it is partitioned by.
CREATE TABLE inbox (
    -- Whoever handles a message once: each consumer of a topic has a name of its own.
    -- COLLATE "C": equal means equal byte for byte, and comparing is cheap.
    consumer   text        COLLATE "C" NOT NULL,
    message_id text        COLLATE "C" NOT NULL,
    -- When the transaction began that handled it.
    handled_at timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT inbox_pkey PRIMARY KEY (consumer, message_id)
) WITH (
    -- Each message leaves a dead row when it is pruned. Vacuuming reads all of both indexes, so not too often; what is
    -- dead lies where pruning begins to look, so not too rarely either.
    autovacuum_vacuum_scale_factor = 0.05,
    -- Space is kept for the next rows. Giving it back takes a lock that consumers wait for.
    vacuum_truncate = off
);

-- What is old enough to be pruned.
CREATE INDEX inbox_handled ON inbox (consumer, handled_at);

-- How far a consumer has come with an aggregate, or with a key of a topic: see outbox_relay.inbox.guard.
CREATE TABLE inbox_state (
    consumer  text   COLLATE "C" NOT NULL,
    aggregate text   COLLATE "C" NOT NULL,
    version   bigint NOT NULL,

    CONSTRAINT inbox_state_pkey PRIMARY KEY (consumer, aggregate)
);

-- How far a consumer has come with a partition, where it keeps that here instead of ids: see outbox_relay.inbox.offsets.
CREATE TABLE inbox_offset (
    consumer    text    COLLATE "C" NOT NULL,
    topic       text    COLLATE "C" NOT NULL,
    partition   integer NOT NULL,
    next_offset bigint  NOT NULL,
    -- Drawn anew by whoever takes the partition; whoever had it before is refused.
    owner       uuid    NOT NULL,

    CONSTRAINT inbox_offset_pkey PRIMARY KEY (consumer, topic, partition)
) WITH (
    -- A row is rewritten with each batch, and its place is free again soon.
    fillfactor = 50
);

-- By which a later release knows what it finds.
COMMENT ON TABLE inbox IS 'outbox-relay inbox, version 1';
