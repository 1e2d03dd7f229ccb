--
-- What the extension consists of, who may use it, which mistakes are refused,
-- and the life of one worker.  Runs in any server, preloaded or not, and gives
-- the same output in both.
--
CREATE EXTENSION worker_spi;

SELECT oid AS dboid FROM pg_database WHERE datname = current_database() \gset

-- what it consists of
SELECT pg_describe_object(classid, objid, 0) AS object
FROM pg_depend
WHERE refclassid = 'pg_extension'::regclass
  AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'worker_spi')
  AND deptype = 'e' AND classid IN ('pg_proc'::regclass, 'pg_class'::regclass)
ORDER BY pg_describe_object(classid, objid, 0) COLLATE "C";

SELECT proname, pg_get_function_arguments(oid) AS arguments,
       pg_get_function_result(oid) AS result, proisstrict, provolatile,
       proparallel, obj_description(oid, 'pg_proc') IS NOT NULL AS described
FROM pg_proc
WHERE proname LIKE 'worker\_spi\_%' AND proname <> 'worker_spi_get_workers'
ORDER BY proname COLLATE "C";

SELECT attname, atttypid::regtype
FROM pg_attribute
WHERE attrelid = 'worker_spi_workers'::regclass AND attnum > 0
ORDER BY attnum;

-- what a statement comes to, with the SQLSTATE of its error
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

-- Wait until a condition holds.  Each look at it has a transaction of its own.
CREATE PROCEDURE wait_until(condition text) LANGUAGE plpgsql AS $$
DECLARE
    deadline timestamptz := clock_timestamp() + interval '2 minutes';
    holds boolean;
BEGIN
    LOOP
        EXECUTE 'SELECT ' || condition INTO holds;
        EXIT WHEN holds;
        IF clock_timestamp() > deadline THEN
            RAISE EXCEPTION 'still not true: %', condition;
        END IF;
        COMMIT;
    END LOOP;
END
$$;

-- End a worker.  Without preload there is no worker_spi_stop(), and no restart;
-- a launch has returned when the process was started, so it may yet get its name.
CREATE PROCEDURE end_worker(index int) LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('worker_spi.total_workers', true) IS NOT NULL THEN
        PERFORM worker_spi_stop(index, oid)
        FROM pg_database WHERE datname = current_database();
    ELSE
        CALL wait_until(format('EXISTS (SELECT FROM pg_stat_activity WHERE application_name = %L)',
                               'worker_spi dynamic worker ' || index));
        PERFORM pg_terminate_backend(pid, 120000)
        FROM pg_stat_activity
        WHERE datname = current_database()
          AND application_name = 'worker_spi dynamic worker ' || index;
    END IF;
END
$$;

-- NULL arguments
\pset null NULL
SELECT worker_spi_launch(NULL), worker_spi_launch(4001, NULL),
       worker_spi_launch(4001, roleoid => NULL),
       worker_spi_launch(4001, flags => NULL),
       worker_spi_launch(4001, interruptible => NULL);
SELECT worker_spi_fold(NULL), worker_spi_fold(4001, NULL),
       worker_spi_fold(4001, wait => NULL), worker_spi_stop(NULL),
       worker_spi_stop(4001, NULL);
SELECT count(*) FROM pg_stat_activity
WHERE application_name = 'worker_spi dynamic worker 4001';

-- settings that are there in any case
SELECT name, vartype, unit, min_val, max_val, boot_val, context, short_desc
FROM pg_settings
WHERE name LIKE 'worker\_spi.%'
  AND name NOT IN ('worker_spi.total_workers', 'worker_spi.restart_interval')
ORDER BY name COLLATE "C";
SELECT try('SET worker_spi.naptime = 1');
SELECT try('SET worker_spi.nonsense = 1');

-- arguments that are refused
SELECT try('SELECT worker_spi_launch(-1)');
SELECT try('SELECT worker_spi_launch(-2147483648)');
SELECT try('SELECT worker_spi_fold(-1)');
SELECT try('SELECT worker_spi_stop(-1)');
SELECT try('SELECT worker_spi_launch(4001, 4294967295)');
SELECT try(format('SELECT worker_spi_launch(4001, %s, 4294967295)', :dboid));
SELECT try(format('SELECT worker_spi_launch(4001, %s, flags => %L)',
                  :dboid, flags))
FROM unnest(ARRAY['{NOSUCH}', '{ALLOWCONN,NOSUCH}', '{allowconn}', '{""}',
                  '{NULL}', '{ALLOWCONN,NULL}', '{{ALLOWCONN},{ALLOWCONN}}'])
     AS flags;

-- A function of another version's script has other arguments.
CREATE FUNCTION other_launch(int4) RETURNS int4
    AS '$libdir/worker_spi', 'worker_spi_launch' LANGUAGE C STRICT;
CREATE FUNCTION other_launch(int4, oid, oid, text[]) RETURNS int4
    AS '$libdir/worker_spi', 'worker_spi_launch' LANGUAGE C STRICT;
CREATE FUNCTION other_fold(int4) RETURNS bool
    AS '$libdir/worker_spi', 'worker_spi_run' LANGUAGE C STRICT;
CREATE FUNCTION other_stop(int4) RETURNS bool
    AS '$libdir/worker_spi', 'worker_spi_stop' LANGUAGE C STRICT;
SELECT try('SELECT other_launch(4001)');
SELECT try('SELECT other_launch(4001, 0, 0, ''{}'')');
SELECT try('SELECT other_fold(4001)');
SELECT try('SELECT other_stop(4001)');
DROP FUNCTION other_launch(int4), other_launch(int4, oid, oid, text[]),
    other_fold(int4), other_stop(int4);

-- worker_spi_wake() is for triggers, and on a table that no worker can have it
-- does nothing.
SELECT try('SELECT worker_spi_wake()');
CREATE SCHEMA schema04001
    CREATE TABLE counted (type text, value bigint)
    CREATE TRIGGER wake AFTER INSERT ON counted
        FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();
INSERT INTO schema04001.counted VALUES ('delta', 1);
SELECT * FROM schema04001.counted;
SET client_min_messages = warning;
DROP SCHEMA schema04001 CASCADE;

-- A role has what it was granted: at first, nothing.
CREATE ROLE regress_worker_spi_user LOGIN;
CREATE ROLE regress_worker_spi_other LOGIN;
SET ROLE regress_worker_spi_user;
SELECT try('SELECT worker_spi_launch(4001)');
SELECT try('SELECT worker_spi_fold(4001)');
SELECT try('SELECT worker_spi_stop(4001)');
SELECT try('SELECT worker_spi_wake()');
SELECT try('SELECT count(*) FROM worker_spi_workers');
SELECT try('SELECT count(*) FROM worker_spi_get_workers()');
RESET ROLE;

-- Then it may launch, but only as itself, and without the flags.
GRANT EXECUTE ON FUNCTION worker_spi_launch TO regress_worker_spi_user;
SELECT 'regress_worker_spi_user'::regrole::oid AS self,
       'regress_worker_spi_other'::regrole::oid AS other \gset
SET ROLE regress_worker_spi_user;
SELECT try(format('SELECT worker_spi_launch(4001, %s, 10)', :dboid)) ~ '^42501 permission denied for a worker of role ' AS refused;
SELECT try(format('SELECT worker_spi_launch(4001, %s, %s)', :dboid, :other));
SELECT try(format('SELECT worker_spi_launch(4001, %s, %s, ''{ALLOWCONN}'')',
                  :dboid, :self));
RESET ROLE;

-- It makes its tables as the schema's owner.
CREATE SCHEMA schema4001 AUTHORIZATION regress_worker_spi_user;
SET ROLE regress_worker_spi_user;
SELECT worker_spi_launch(index => 4001, dboid => :dboid, roleoid => :self) AS pid \gset
RESET ROLE;
CALL wait_until('to_regclass(''schema4001.stuck'') IS NOT NULL');
SELECT oid::regclass AS table, relowner::regrole, relreplident, reloptions
FROM pg_class
WHERE relnamespace = 'schema4001'::regnamespace AND relkind = 'r'
ORDER BY oid;
SELECT inhrelid::regclass AS child, inhparent::regclass AS parent
FROM pg_inherits WHERE inhparent = 'schema4001.counted'::regclass
ORDER BY inhrelid;
SELECT attname, atttypid::regtype, attnotnull, pg_get_expr(adbin, adrelid)
FROM pg_attribute
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE attrelid = 'schema4001.stuck'::regclass AND attnum > 0
ORDER BY attnum;
SELECT pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'schema4001'::regnamespace AND contype = 'c';
SELECT pg_get_indexdef(indexrelid) FROM pg_index
WHERE indrelid IN (SELECT oid FROM pg_class
                   WHERE relnamespace = 'schema4001'::regnamespace);
CALL wait_until('EXISTS (SELECT FROM pg_stat_activity
    WHERE application_name = ''worker_spi dynamic worker 4001''
      AND wait_event_type = ''Extension'' AND state = ''idle'')');
SELECT backend_type, application_name, state, usename, backend_xmin, xact_start,
       datname = current_database() AS here
FROM pg_stat_activity WHERE pid = :pid;

-- a second one is refused, whoever asks
SELECT try(format('SELECT worker_spi_launch(4001, %s)', :dboid));
SET ROLE regress_worker_spi_user;
SELECT try(format('SELECT worker_spi_launch(4001, %s)', :dboid));
RESET ROLE;
SELECT pid = :pid AS "same worker" FROM pg_stat_activity
WHERE application_name = 'worker_spi dynamic worker 4001';
CALL end_worker(4001);
SELECT count(*) FROM pg_stat_activity
WHERE application_name = 'worker_spi dynamic worker 4001';

-- What was inserted before a worker starts is folded at once.
INSERT INTO schema4001.counted (value) SELECT i FROM generate_series(1, 100) i;
INSERT INTO schema4001.counted VALUES ('delta', -50), ('other', 0);
SELECT worker_spi_launch(4001, :dboid, 10) IS NOT NULL AS launched;
CALL wait_until('NOT EXISTS (SELECT FROM ONLY schema4001.counted)');
SELECT * FROM schema4001.counted;
CALL end_worker(4001);
INSERT INTO schema4001.counted VALUES ('delta', 1000);
SELECT sum(value) FROM schema4001.counted;
SELECT worker_spi_launch(4001, :dboid, 10) IS NOT NULL AS launched;
CALL wait_until('NOT EXISTS (SELECT FROM ONLY schema4001.counted)');
SELECT * FROM schema4001.counted;
CALL end_worker(4001);

-- Who may insert adds deltas, whatever their type says, and does nothing else.
GRANT USAGE ON SCHEMA schema4001 TO regress_worker_spi_other;
GRANT INSERT ON schema4001.counted TO regress_worker_spi_other;
SET ROLE regress_worker_spi_other;
INSERT INTO schema4001.counted VALUES ('delta', 3), ('total', 4);
SELECT try('INSERT INTO schema4001.total VALUES (''total'', 7)');
SELECT try('UPDATE schema4001.counted SET value = 0');
SELECT try('SELECT sum(value) FROM schema4001.counted');
RESET ROLE;
SELECT worker_spi_launch(4001, :dboid, 10) IS NOT NULL AS launched;
CALL wait_until('NOT EXISTS (SELECT FROM ONLY schema4001.counted)');
SELECT * FROM schema4001.counted;
CALL end_worker(4001);

-- Without a database, the one of the caller is meant.
SELECT worker_spi_launch(4001) AS pid \gset
SELECT datname = current_database() AS here FROM pg_stat_activity WHERE pid = :pid;
SELECT try('SELECT worker_spi_launch(4001)');
CALL end_worker(4001);

-- A table as older versions of the sample made it, with NULLs and no total
CREATE SCHEMA schema4002
    CREATE TABLE counted (type text CHECK (type IN ('total', 'delta')),
                          value integer)
    CREATE UNIQUE INDEX counted_unique_total ON counted (type)
        WHERE type = 'total';
INSERT INTO schema4002.counted VALUES ('delta', 3), ('delta', NULL),
    (NULL, 7), ('delta', 4), (NULL, NULL);
SELECT worker_spi_launch(4002, :dboid, 10) IS NOT NULL AS launched;
CALL wait_until('NOT EXISTS (SELECT FROM ONLY schema4002.counted)');
SELECT * FROM schema4002.counted ORDER BY type, value;
CALL end_worker(4002);

-- a total that is NULL, and deltas that are nothing but NULL
UPDATE schema4002.total SET value = NULL;
INSERT INTO schema4002.counted VALUES ('delta', NULL);
SELECT worker_spi_launch(4002, :dboid, 10) IS NOT NULL AS launched;
CALL wait_until('NOT EXISTS (SELECT FROM ONLY schema4002.counted)');
SELECT * FROM schema4002.counted ORDER BY type, value;
CALL end_worker(4002);

-- A table that is missing is made.
BEGIN;
DROP TABLE schema4002.total;
INSERT INTO schema4002.counted VALUES ('total', 5);
COMMIT;
SELECT worker_spi_launch(4002, :dboid, 10) IS NOT NULL AS launched;
CALL wait_until('NOT EXISTS (SELECT FROM ONLY schema4002.counted)');
SELECT * FROM schema4002.total;

-- A worker needs nothing of the extension but its library.
DROP EXTENSION worker_spi;
SELECT count(*) FROM pg_stat_activity
WHERE application_name = 'worker_spi dynamic worker 4002';
CREATE EXTENSION worker_spi;
CALL end_worker(4002);

-- The trigger of worker_spi_wake() does nothing where there is no worker, and
-- any role that may insert may fire it.
CREATE TRIGGER wake AFTER INSERT ON schema4002.counted
    FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();
GRANT USAGE ON SCHEMA schema4002 TO regress_worker_spi_other;
GRANT INSERT ON schema4002.counted TO regress_worker_spi_other;
SET ROLE regress_worker_spi_other;
INSERT INTO schema4002.counted VALUES ('delta', 1);
RESET ROLE;
SELECT count(*) FROM ONLY schema4002.counted;
SELECT try('DROP EXTENSION worker_spi');

DROP SCHEMA schema4001, schema4002 CASCADE;
DROP EXTENSION worker_spi;
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type LIKE 'worker\_spi%';
DROP FUNCTION try;
DROP PROCEDURE wait_until, end_worker;
DROP ROLE regress_worker_spi_user, regress_worker_spi_other;
