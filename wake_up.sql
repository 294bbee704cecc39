-- Optional: wakes idle relays when a row is written. Without it they look for rows each relay.poll_ceiling_seconds.
-- Apply after schema.sql, as the owner of its tables, with its schema first on the search_path. For a schema and a table
-- that a configuration names: outbox-relay schema print --wake-up --config FILE. To be rid of it:
--
--     DROP TRIGGER outbox_wake ON outbox;
--
-- What it costs a writer: a look at outbox_relay for each INSERT, and, only while a relay listens, a NOTIFY, for which
-- PostgreSQL lets transactions commit one after another. Relays listen while little is written. A transaction that has it can't be prepared (PREPARE
-- TRANSACTION): leave this out where writers do that.
DO $make$ BEGIN
    -- It runs with its owner's rights, so that writers need none, and so each name in it has its schema.
    EXECUTE format($sql$
        CREATE OR REPLACE FUNCTION %1$I.outbox_wake() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS $wake$
        BEGIN
            IF EXISTS (SELECT FROM %1$I.outbox_relay WHERE listens) THEN
                -- At most once a transaction, since they are all alike.
                PERFORM pg_notify('outbox_' || TG_RELID, '');
            END IF;
            RETURN NULL;
        END $wake$
    $sql$, (SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.oid = 'outbox_relay'::regclass));
END $make$;

CREATE OR REPLACE TRIGGER outbox_wake AFTER INSERT ON outbox FOR EACH STATEMENT EXECUTE FUNCTION outbox_wake();
