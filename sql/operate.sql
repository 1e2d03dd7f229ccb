--
-- Operating workers: fold, stop, the view, and tables that are refused at the
-- launch.  All of this needs worker_spi in shared_preload_libraries; the first
-- statements show what happens without.
--
CREATE EXTENSION worker_spi;

SELECT oid AS dboid FROM pg_database WHERE datname = current_database() \gset

CREATE FUNCTION try(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    message text;
    detail text;
    hint text;
    result text;
BEGIN
    EXECUTE statement INTO result;
    RETURN coalesce(result, 'NULL');
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT,
        detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
    RETURN SQLSTATE || ' ' || message
        || CASE WHEN detail <> '' THEN E'\nDETAIL: ' || detail ELSE '' END
        || CASE WHEN hint <> '' THEN E'\nHINT: ' || hint ELSE '' END;
END
$$;

SELECT try(format('SELECT worker_spi_fold(4201, %s)', :dboid));
SELECT try(format('SELECT worker_spi_fold(4201, %s, false)', :dboid));
SELECT try(format('SELECT worker_spi_stop(4201, %s)', :dboid));
SELECT try('SELECT count(*) FROM worker_spi_workers WHERE index = 4201');

SELECT name, vartype, unit, min_val, max_val, boot_val, context, short_desc
FROM pg_settings
WHERE name IN ('worker_spi.total_workers', 'worker_spi.restart_interval')
ORDER BY name COLLATE "C";

SELECT current_setting('worker_spi.total_workers', true) IS NULL AS not_preloaded \gset
\if :not_preloaded
DROP FUNCTION try;
DROP EXTENSION worker_spi;
\quit
\endif

SELECT try('SELECT worker_spi_fold(4201, 4294967295)');
SELECT try('SELECT worker_spi_stop(4201, 4294967295)');

-- A launch returns when the table is there.
SELECT worker_spi_launch(4201, :dboid, 10) AS pid \gset
INSERT INTO schema4201.counted VALUES ('delta', 1), ('delta', 2), ('delta', 3);
SELECT worker_spi_fold(4201, :dboid);
SELECT * FROM schema4201.counted;
INSERT INTO schema4201.counted VALUES ('delta', 10);
SELECT worker_spi_fold(4201, :dboid, wait => true);
SELECT worker_spi_fold(4201, :dboid);
SELECT * FROM schema4201.counted;

\pset null NULL
\x on
SELECT index, kind, datname = current_database() AS here,
       rolname = (SELECT rolname FROM pg_roles WHERE oid = 10) AS superuser,
       pid = :pid AS same_pid, state, worker_start < now() AS started,
       folded_until BETWEEN worker_start AND now() AS folded_until, stuck_rows,
       fold_count, folded_rows, last_fold_time BETWEEN worker_start AND now()
       AS folded, last_fold_ms > 0 AS took_time, failed_count, last_failed_time,
       last_error, last_sqlstate, next_fold_time > now() AS has_next,
       restart_count
FROM worker_spi_workers WHERE index = 4201;
\x off

-- What is not committed is not folded.
BEGIN;
INSERT INTO schema4201.counted VALUES ('delta', 100);
SELECT worker_spi_fold(4201, :dboid);
SELECT * FROM schema4201.counted ORDER BY value;
ROLLBACK;

-- What does not fit is stuck: its error is the caller's, and it is folded when
-- it can be.
INSERT INTO schema4201.counted VALUES ('delta', 9223372036854775807), ('delta', 1);
SELECT try(format('SELECT worker_spi_fold(4201, %s)', :dboid)) LIKE '22003 %' AS stuck;
SELECT * FROM schema4201.counted ORDER BY value;
SELECT type, value, sqlstate, reason, since < clock_timestamp() AS since
FROM schema4201.stuck ORDER BY value;
SELECT count(*) FROM ONLY schema4201.counted;
SELECT state, stuck_rows, failed_count, last_sqlstate, last_error <> '' AS told
FROM worker_spi_workers WHERE index = 4201;
INSERT INTO schema4201.counted VALUES ('delta', -18);
SELECT worker_spi_fold(4201, :dboid);
SELECT * FROM schema4201.counted;
SELECT state, stuck_rows FROM worker_spi_workers WHERE index = 4201;

-- An error of the cycle is the caller's, too, and nothing is folded.
ALTER TABLE schema4201.counted RENAME value TO amount;
INSERT INTO schema4201.counted VALUES ('delta', -9223372036854775800);
SELECT try(format('SELECT worker_spi_fold(4201, %s)', :dboid)) LIKE '42P16 %' AS failed;
SELECT state, failed_count > 0 AS failed, last_sqlstate
FROM worker_spi_workers WHERE index = 4201;
ALTER TABLE schema4201.counted RENAME amount TO value;
SELECT worker_spi_fold(4201, :dboid);
SELECT * FROM schema4201.counted;

-- A commit wakes the worker before its nap is over.
TRUNCATE schema4201.counted;        -- the totals, too
CREATE TRIGGER wake AFTER INSERT ON schema4201.counted
    FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();
SELECT next_fold_time AS due FROM worker_spi_workers WHERE index = 4201 \gset
INSERT INTO schema4201.counted VALUES ('delta', 1), ('delta', 2);
DO $$
DECLARE
    deadline timestamptz := clock_timestamp() + interval '2 minutes';
BEGIN
    WHILE EXISTS (SELECT FROM ONLY schema4201.counted) LOOP
        IF clock_timestamp() > deadline THEN
            RAISE EXCEPTION 'not folded';
        END IF;
        COMMIT;
    END LOOP;
END
$$;
SELECT * FROM schema4201.counted;
SELECT worker_spi_fold(4201, :dboid);
SELECT last_fold_time < :'due' AS woken FROM worker_spi_workers WHERE index = 4201;

-- Who may: members of the worker's role that have EXECUTE.
CREATE ROLE regress_worker_spi_member LOGIN;
CREATE ROLE regress_worker_spi_stranger LOGIN;
CREATE ROLE regress_worker_spi_owner LOGIN;
GRANT regress_worker_spi_owner TO regress_worker_spi_member;
GRANT EXECUTE ON FUNCTION worker_spi_launch, worker_spi_fold, worker_spi_stop
    TO regress_worker_spi_member, regress_worker_spi_stranger;
CREATE SCHEMA schema4202 AUTHORIZATION regress_worker_spi_owner;
SELECT 'regress_worker_spi_owner'::regrole::oid AS owner \gset
SET ROLE regress_worker_spi_stranger;
SELECT try(format('SELECT worker_spi_launch(4202, %s, %s)', :dboid, :owner));
SET ROLE regress_worker_spi_member;
SELECT worker_spi_launch(4202, :dboid, :owner) IS NOT NULL AS launched;
SELECT worker_spi_fold(4202, :dboid);
SELECT try('SELECT count(*) FROM worker_spi_workers');
SET ROLE regress_worker_spi_stranger;
SELECT try(format('SELECT worker_spi_fold(4202, %s)', :dboid));
SELECT try(format('SELECT worker_spi_fold(4202, %s, false)', :dboid));
SELECT try(format('SELECT worker_spi_stop(4202, %s)', :dboid));
SELECT try(format('SELECT worker_spi_stop(4201, %s)', :dboid)) LIKE '42501 %' AS refused;
RESET ROLE;
GRANT pg_read_all_stats TO regress_worker_spi_stranger;
SET ROLE regress_worker_spi_stranger;
SELECT index, kind, rolname, state FROM worker_spi_workers
WHERE index IN (4201, 4202) AND rolname LIKE 'regress_%';
SET ROLE regress_worker_spi_member;
SELECT worker_spi_stop(4202, :dboid);
SELECT worker_spi_stop(4202, :dboid);
SELECT worker_spi_fold(4202, :dboid);
RESET ROLE;

-- A stopped worker is gone, and its index free.
SELECT worker_spi_stop(4201, :dboid);
SELECT worker_spi_stop(4201, :dboid);
SELECT worker_spi_fold(4201, :dboid);
SELECT worker_spi_fold(4201, :dboid, false);
SELECT count(*) FROM pg_stat_activity WHERE pid = :pid;
SELECT worker_spi_launch(4201, :dboid, 10) <> :pid AS "another process";
SELECT fold_count, restart_count FROM worker_spi_workers WHERE index = 4201;
SELECT worker_spi_stop(4201, :dboid);

-- Tables that cannot be folded: the launch says why, and leaves no worker.
CREATE PROCEDURE refuse(definition text) LANGUAGE plpgsql AS $$
BEGIN
    DROP SCHEMA IF EXISTS schema4203 CASCADE;
    CREATE SCHEMA schema4203;
    EXECUTE definition;
    COMMIT;
    RAISE INFO '%', try('SELECT worker_spi_launch(4203)');
END
$$;
SET client_min_messages = warning;
CALL refuse('CREATE VIEW schema4203.counted AS SELECT text ''delta'' AS type, 1::bigint AS value');
CALL refuse('CREATE TABLE schema4203.counted (type text, value bigint) PARTITION BY LIST (type)');
CALL refuse('CREATE TABLE schema4203.counted (type varchar, value bigint)');
CALL refuse('CREATE TABLE schema4203.counted (type text, value numeric)');
CALL refuse('CREATE TABLE schema4203.counted (type text, "Value" bigint)');
CALL refuse('CREATE TABLE schema4203.counted (value bigint)');
CALL refuse('CREATE TABLE schema4203.counted ()');
CALL refuse('CREATE TABLE schema4203.counted (type text, value bigint);
    CREATE RULE keep AS ON DELETE TO schema4203.counted DO INSTEAD NOTHING');
-- what is in the way of a table that is missing
CALL refuse('CREATE TABLE schema4203.counted (type text, value bigint);
    CREATE TABLE schema4203.total (type text, value bigint)');
CALL refuse('CREATE TABLE schema4203.counted (type text, value bigint);
    CREATE TABLE schema4203.one () INHERITS (schema4203.counted);
    CREATE TABLE schema4203.two () INHERITS (schema4203.counted)');
-- columns that nobody has declared to be keys; the hint is how
CALL refuse('CREATE TABLE schema4203.counted (type text, value bigint, page text)');
CALL refuse('CREATE TABLE schema4203.counted (value bigint, "My Page" text NOT NULL, day date NOT NULL)');
CALL refuse('CREATE TABLE schema4203.counted (value bigint, page text NOT NULL, bytes bigint DEFAULT 0)');
CALL refuse('CREATE TABLE schema4203.counted (type text, value bigint, doc json)');
-- indexes that do not declare what they would have to
CALL refuse('CREATE TABLE schema4203.counted (type text, value bigint, page text);
    CREATE TABLE schema4203.total (PRIMARY KEY (type)) INHERITS (schema4203.counted)');
CALL refuse('CREATE TABLE schema4203.counted (type text, value bigint, page text);
    CREATE TABLE schema4203.total (UNIQUE (page)) INHERITS (schema4203.counted)');
CALL refuse('CREATE TABLE schema4203.counted (type text, value bigint, a text);
    CREATE TABLE schema4203.total () INHERITS (schema4203.counted);
    CREATE UNIQUE INDEX ON schema4203.total (lower(a)) NULLS NOT DISTINCT');
CALL refuse('CREATE TABLE schema4203.counted (type text, value bigint);
    CREATE TABLE schema4203.total (PRIMARY KEY (value)) INHERITS (schema4203.counted)');
CALL refuse('CREATE TABLE schema4203.counted (type text, value bigint, a int, b int);
    CREATE TABLE schema4203.total () INHERITS (schema4203.counted);
    CREATE UNIQUE INDEX one ON schema4203.total (a, b) NULLS NOT DISTINCT;
    CREATE UNIQUE INDEX two ON schema4203.total (b) NULLS NOT DISTINCT');
SELECT count(*) FROM worker_spi_workers WHERE index = 4203;
SELECT count(*) FROM pg_stat_activity
WHERE application_name = 'worker_spi dynamic worker 4203';

-- A column that is added while a worker runs is refused as well, until it is
-- declared to be a key.
DROP SCHEMA schema4203 CASCADE;
SELECT worker_spi_launch(4203, :dboid, 10) IS NOT NULL AS launched;
INSERT INTO schema4203.counted VALUES ('delta', 5);
SELECT worker_spi_fold(4203, :dboid);
ALTER TABLE schema4203.counted ADD page text NOT NULL DEFAULT '(before)';
INSERT INTO schema4203.counted VALUES ('delta', 1, 'a'), ('delta', 2), ('delta', 3, 'a');
SELECT try(format('SELECT worker_spi_fold(4203, %s)', :dboid));
SELECT sum(value) FROM schema4203.counted;
ALTER TABLE schema4203.total DROP CONSTRAINT total_pkey, ADD PRIMARY KEY (page);
SELECT worker_spi_fold(4203, :dboid);
SELECT * FROM schema4203.counted ORDER BY page;
SELECT worker_spi_stop(4203, :dboid);

SELECT count(*) FROM worker_spi_workers WHERE index BETWEEN 4201 AND 4203;
DROP SCHEMA schema4201, schema4202, schema4203 CASCADE;
DROP EXTENSION worker_spi;
DROP FUNCTION try;
DROP PROCEDURE refuse;
DROP ROLE regress_worker_spi_member, regress_worker_spi_stranger,
    regress_worker_spi_owner;
