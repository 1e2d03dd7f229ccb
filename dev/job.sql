/* worker_spi--1.0.sql */

-- complain if script is sourced in psql, rather than via CREATE EXTENSION
\echo Use "CREATE EXTENSION worker_spi" to load this file. \quit

CREATE FUNCTION worker_spi_launch(
    index pg_catalog.int4,
    dboid pg_catalog.oid DEFAULT 0,
    roleoid pg_catalog.oid DEFAULT 0,
    flags pg_catalog.text[] DEFAULT '{}',
    interruptible pg_catalog.bool DEFAULT false)
RETURNS pg_catalog.int4
AS 'MODULE_PATHNAME'
LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION worker_spi_launch(pg_catalog.int4, pg_catalog.oid,
    pg_catalog.oid, pg_catalog.text[], pg_catalog.bool)
IS 'start a worker on schema<index>.policies and return its pid';

CREATE FUNCTION worker_spi_run(
    index pg_catalog.int4,
    dboid pg_catalog.oid DEFAULT 0,
    wait pg_catalog.bool DEFAULT true)
RETURNS pg_catalog.bool
AS 'MODULE_PATHNAME'
LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION worker_spi_run(pg_catalog.int4, pg_catalog.oid,
    pg_catalog.bool)
IS 'have a worker run a cycle now, and wait until all that was committed is done';

CREATE FUNCTION worker_spi_stop(
    index pg_catalog.int4,
    dboid pg_catalog.oid DEFAULT 0)
RETURNS pg_catalog.bool
AS 'MODULE_PATHNAME'
LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION worker_spi_stop(pg_catalog.int4, pg_catalog.oid)
IS 'end a worker, and wait until its process has exited';

-- Reads shared memory and catalogs, and changes nothing, so any process may.
-- The columns' types are the library's, their names are the view's.
CREATE FUNCTION worker_spi_get_workers(
    OUT index pg_catalog.int4,
    OUT kind pg_catalog.text,
    OUT datid pg_catalog.oid,
    OUT listed_name pg_catalog.text,
    OUT rolid pg_catalog.oid,
    OUT pid pg_catalog.int4,
    OUT state pg_catalog.text,
    OUT worker_start pg_catalog.timestamptz,
    OUT done_until pg_catalog.timestamptz,
    OUT left_out pg_catalog.int8,
    OUT cycle_count pg_catalog.int8,
    OUT deleted_rows pg_catalog.int8,
    OUT last_cycle_time pg_catalog.timestamptz,
    OUT last_cycle_ms pg_catalog.float8,
    OUT failed_count pg_catalog.int8,
    OUT last_failed_time pg_catalog.timestamptz,
    OUT last_error pg_catalog.text,
    OUT last_sqlstate pg_catalog.text,
    OUT next_cycle_time pg_catalog.timestamptz,
    OUT restart_count pg_catalog.int8)
RETURNS SETOF pg_catalog.record
AS 'MODULE_PATHNAME'
LANGUAGE C STRICT VOLATILE PARALLEL SAFE;

COMMENT ON FUNCTION worker_spi_get_workers()
IS 'rows of the view worker_spi_workers, with OIDs instead of names';

CREATE VIEW worker_spi_workers AS
    SELECT w.index, w.kind,
           COALESCE(d.datname, CAST(w.listed_name AS pg_catalog.name)) AS datname,
           r.rolname, w.pid, w.state, w.worker_start, w.done_until,
           w.left_out, w.cycle_count, w.deleted_rows, w.last_cycle_time,
           w.last_cycle_ms, w.failed_count, w.last_failed_time, w.last_error,
           w.last_sqlstate, w.next_cycle_time, w.restart_count
    FROM worker_spi_get_workers() AS w
    LEFT JOIN pg_catalog.pg_database AS d
        ON d.oid OPERATOR(pg_catalog.=) w.datid
    LEFT JOIN pg_catalog.pg_roles AS r
        ON r.oid OPERATOR(pg_catalog.=) w.rolid;

COMMENT ON VIEW worker_spi_workers
IS 'one row for each registered worker, with what it did last';
COMMENT ON COLUMN worker_spi_workers.index
IS 'N of the table schemaN.policies';
COMMENT ON COLUMN worker_spi_workers.kind
IS 'static or dynamic';
COMMENT ON COLUMN worker_spi_workers.datname
IS 'database that the worker serves';
COMMENT ON COLUMN worker_spi_workers.rolname
IS 'role that the worker acts for';
COMMENT ON COLUMN worker_spi_workers.pid
IS 'process id; null if there is no process';
COMMENT ON COLUMN worker_spi_workers.state
IS 'starting, idle, busy, backoff, down (the server will start it), stopped, or missing (the server has not registered it)';
COMMENT ON COLUMN worker_spi_workers.worker_start
IS 'start of the current or last process';
COMMENT ON COLUMN worker_spi_workers.done_until
IS 'what was committed by then is done, or left out';
COMMENT ON COLUMN worker_spi_workers.left_out
IS 'policies that have failed and are to be tried again';
COMMENT ON COLUMN worker_spi_workers.cycle_count
IS 'cycles that deleted something';
COMMENT ON COLUMN worker_spi_workers.deleted_rows
IS 'rows deleted';
COMMENT ON COLUMN worker_spi_workers.last_cycle_time
IS 'end of the last cycle that deleted something';
COMMENT ON COLUMN worker_spi_workers.last_cycle_ms
IS 'how long that cycle took, in milliseconds';
COMMENT ON COLUMN worker_spi_workers.failed_count
IS 'failed cycles, and errors that ended the process';
COMMENT ON COLUMN worker_spi_workers.last_failed_time
IS 'time of the last error';
COMMENT ON COLUMN worker_spi_workers.last_error
IS 'message of the last error, of a policy too';
COMMENT ON COLUMN worker_spi_workers.last_sqlstate
IS 'SQLSTATE of the last error';
COMMENT ON COLUMN worker_spi_workers.next_cycle_time
IS 'when the next cycle is due';
COMMENT ON COLUMN worker_spi_workers.restart_count
IS 'processes started after the first';

-- A worker holds a slot of the whole server and acts for its role, so who may
-- have one is for the administrator to say.
REVOKE ALL ON FUNCTION worker_spi_launch(pg_catalog.int4, pg_catalog.oid,
    pg_catalog.oid, pg_catalog.text[], pg_catalog.bool) FROM PUBLIC;
REVOKE ALL ON FUNCTION worker_spi_run(pg_catalog.int4, pg_catalog.oid,
    pg_catalog.bool) FROM PUBLIC;
REVOKE ALL ON FUNCTION worker_spi_stop(pg_catalog.int4, pg_catalog.oid)
    FROM PUBLIC;
REVOKE ALL ON FUNCTION worker_spi_get_workers() FROM PUBLIC;
REVOKE ALL ON worker_spi_workers FROM PUBLIC;

-- The view shows error messages of other roles' tables.
GRANT EXECUTE ON FUNCTION worker_spi_get_workers() TO pg_read_all_stats;
GRANT SELECT ON worker_spi_workers TO pg_read_all_stats;
