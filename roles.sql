-- Roles with the least that they need: one for applications that write messages, one for the relay, one more for a
-- relay that deletes messages, and one for those who decide what becomes of messages that Kafka refuses.
-- Apply after schema.sql, as the owner of its tables, with its schema first on the search_path. For a schema and a table
-- that a configuration names: outbox-relay schema print --roles --config FILE. Then grant them to the users that log in:
--
--     GRANT outbox_writer TO orders_service;
--     GRANT outbox_relay TO relay;
--     GRANT outbox_pruner TO relay;          -- only with relay.retention_hours, or relay.after_publish = "delete"
--     GRANT outbox_operator TO somebody;

-- Roles belong to the whole server: another database of it may have them already.
DO $$ BEGIN
    IF to_regrole('outbox_writer') IS NULL THEN CREATE ROLE outbox_writer NOLOGIN; END IF;
    IF to_regrole('outbox_relay') IS NULL THEN CREATE ROLE outbox_relay NOLOGIN; END IF;
    IF to_regrole('outbox_pruner') IS NULL THEN CREATE ROLE outbox_pruner NOLOGIN; END IF;
    IF to_regrole('outbox_operator') IS NULL THEN CREATE ROLE outbox_operator NOLOGIN; END IF;
END $$;

-- A writer can't read the messages of others, nor choose the id, which makes the order, nor mark anything as sent.
GRANT INSERT (event_id, topic, key, type, payload, headers) ON outbox TO outbox_writer;

-- The relay can't write a message, nor change or delete one: of a row it says whether it is sent or waits.
GRANT SELECT, UPDATE (sent_at, parked_at) ON outbox TO outbox_relay;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_parked TO outbox_relay;
GRANT SELECT ON outbox_pause TO outbox_relay;
-- Its own book-keeping: who lives, and who owns what.
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_relay TO outbox_relay;
GRANT SELECT, UPDATE (owner, epoch, taken_at) ON outbox_slot TO outbox_relay;
GRANT SELECT ON outbox_layout TO outbox_relay;

-- Only where relay.retention_hours is set, or relay.after_publish is "delete", does the relay delete what was sent or
-- discarded, and says until when it did. Then its user needs this role too.
GRANT DELETE ON outbox TO outbox_pruner;
GRANT UPDATE (pruned_until) ON outbox_layout TO outbox_pruner;

-- An operator can correct a message that was refused, send one again, and let topics wait; each command leaves a row that
-- its role can't change afterwards.
GRANT SELECT, INSERT, UPDATE (topic, headers, payload) ON outbox TO outbox_operator;
GRANT SELECT, UPDATE (topic, state, attempts, due_at, parked_at) ON outbox_parked TO outbox_operator;
GRANT SELECT, INSERT, DELETE ON outbox_pause TO outbox_operator;
GRANT SELECT, INSERT ON outbox_audit TO outbox_operator;
-- For the lock that keeps a command and a relay apart.
GRANT SELECT, UPDATE (taken_at) ON outbox_slot TO outbox_operator;
GRANT SELECT ON outbox_relay, outbox_layout TO outbox_operator;
