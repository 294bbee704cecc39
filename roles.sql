-- Two roles with the least that they need: one for applications that write messages, one for the relay.
-- Apply after schema.sql, as the owner of its tables, with its schema first on the search_path. Then grant them to the
-- users that log in: GRANT outbox_writer TO orders_service; GRANT outbox_relay TO relay;

CREATE ROLE outbox_writer NOLOGIN;
CREATE ROLE outbox_relay NOLOGIN;

-- A writer can't read the messages of others, nor choose the id, which makes the order, nor mark anything as sent.
GRANT INSERT (event_id, topic, key, type, payload, headers) ON outbox TO outbox_writer;

-- The relay can't write a message, nor change or delete one: of a row it sets sent_at alone.
GRANT SELECT, UPDATE (sent_at) ON outbox TO outbox_relay;
-- Its own book-keeping: who lives, and who owns what.
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_relay TO outbox_relay;
GRANT SELECT, UPDATE (owner, epoch, taken_at) ON outbox_slot TO outbox_relay;
GRANT SELECT ON outbox_layout TO outbox_relay;
