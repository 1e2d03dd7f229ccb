--
-- Tables with key columns, which a unique index of the totals declares: each
-- combination of keys is a counter of its own.
-- Runs in any server, preloaded or not, and gives the same output in both.
--
CREATE EXTENSION worker_spi;

-- Have a worker fold what is there, and end it.
CREATE PROCEDURE fold_once(index int) LANGUAGE plpgsql AS $$
DECLARE
    here oid := (SELECT oid FROM pg_database WHERE datname = current_database());
    deadline timestamptz := clock_timestamp() + interval '2 minutes';
    worker int;
    deltas boolean;
BEGIN
    worker := worker_spi_launch(index, here, 10);
    LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM ONLY schema%s.counted)', index)
            INTO deltas;
        EXIT WHEN NOT deltas;
        IF clock_timestamp() > deadline THEN
            RAISE EXCEPTION 'worker % did not fold', index;
        END IF;
        COMMIT;
    END LOOP;
    IF current_setting('worker_spi.total_workers', true) IS NOT NULL THEN
        PERFORM worker_spi_stop(index, here);
    ELSE
        PERFORM pg_terminate_backend(worker, 120000);
    END IF;
END
$$;

\pset null NULL

-- two keys, either of which may be NULL
CREATE SCHEMA schema4101
    CREATE TABLE counted (type text, value bigint NOT NULL, page text, day date)
    CREATE TABLE total (UNIQUE NULLS NOT DISTINCT (page, day)) INHERITS (counted);
INSERT INTO schema4101.counted VALUES
    ('delta', 1, 'a', '2026-01-01'), ('delta', 2, 'a', '2026-01-01'),
    ('delta', 4, 'a', '2026-01-02'), ('delta', 8, 'b', '2026-01-01'),
    ('delta', 16, 'a', NULL), ('delta', 32, 'a', NULL),
    ('delta', 64, NULL, '2026-01-01'), ('delta', 128, NULL, NULL),
    ('delta', 256, NULL, NULL), ('delta', 512, '', NULL);
CALL fold_once(4101);
SELECT * FROM schema4101.counted ORDER BY page COLLATE "C", day;
-- and again: the same totals grow, a new one appears, the others stay
INSERT INTO schema4101.counted VALUES
    ('delta', 1000, 'a', '2026-01-01'), ('delta', 1000, 'a', NULL),
    ('delta', 1000, NULL, NULL), ('delta', 1000, 'c', NULL);
CALL fold_once(4101);
SELECT * FROM schema4101.counted ORDER BY page COLLATE "C", day;

-- names that need quotes, and names that mean something in a fold
CREATE SCHEMA schema4102
    CREATE TABLE counted ("Page" text, "select" int, "a ""b"" c" int, rows int,
                          value2 int, k1 int, k2 int, type text, value bigint,
                          type2 text, deltas int, totals int, total int,
                          excluded int, ctid2 int, "$1" int, "Type" text,
                          "Value" int, count int, sum int, max int,
                          counted int)
    CREATE TABLE total (
        UNIQUE NULLS NOT DISTINCT ("Page", "select", "a ""b"" c", rows, value2, k1,
                                   k2, type2, deltas, totals, total, excluded,
                                   ctid2, "$1", "Type", "Value", count, sum, max,
                                   counted))
        INHERITS (counted);
INSERT INTO schema4102.counted
SELECT 'p', 1, 2, 3, 4, 5, 6, 'delta', i, 't', 7, 8, 9, 10, 11, 12, 'delta', 13,
       14, 15, 16, i % 2
FROM generate_series(1, 10) i;
CALL fold_once(4102);
SELECT * FROM schema4102.counted ORDER BY counted;

-- columns that are no keys: dropped ones and generated ones
CREATE SCHEMA schema4103
    CREATE TABLE counted (gone1 int, type text, gone2 text NOT NULL, page text,
                          value bigint, gone3 int,
                          double bigint GENERATED ALWAYS AS (value * 2) STORED);
ALTER TABLE schema4103.counted DROP gone1, DROP gone2, DROP gone3;
CREATE TABLE schema4103.total (UNIQUE NULLS NOT DISTINCT (page))
    INHERITS (schema4103.counted);
INSERT INTO schema4103.counted (type, page, value)
VALUES ('delta', 'a', 1), ('delta', 'b', 2), ('delta', 'a', 3);
CALL fold_once(4103);
SELECT type, page, value, double FROM schema4103.counted ORDER BY page;

-- a generated column alone makes no keys
CREATE SCHEMA schema4104
    CREATE TABLE counted (type text, value bigint,
                          double bigint GENERATED ALWAYS AS (value * 2) STORED);
INSERT INTO schema4104.counted (type, value) VALUES ('delta', 1), ('delta', 2);
CALL fold_once(4104);
SELECT * FROM schema4104.counted;

-- key columns of many types; 1.0 and 1.00 are the same key
CREATE SCHEMA schema4105;
CREATE TYPE schema4105.color AS ENUM ('red', 'green');
CREATE DOMAIN schema4105.level AS int CHECK (VALUE > 0);
CREATE TABLE schema4105.counted (
    type text, value bigint,
    n numeric, d date, u uuid, c schema4105.color, a int[], b boolean,
    f float8, ts timestamptz, bpc char(5), i inet, j jsonb, r int4range,
    l schema4105.level, t text COLLATE "C");
CREATE TABLE schema4105.total (
    UNIQUE NULLS NOT DISTINCT (n, d, u, c, a, b, f, ts, bpc, i, j, r, l, t))
    INHERITS (schema4105.counted);
INSERT INTO schema4105.counted
SELECT 'delta', value, n, d, '00000000-0000-0000-0000-000000000001', c::schema4105.color,
       a, true, 1.5, '2026-01-01 00:00:00+00', 'x', '127.0.0.1', j, '[1,5)', 1, 't'
FROM (VALUES
    (1, 1.0, date '2026-01-01', 'red', '{1,2}'::int[], '{"k": 1}'::jsonb),
    (2, 1.00, '2026-01-01', 'red', '{1,2}', '{"k": 1}'),
    (4, 1.01, '2026-01-01', 'red', '{1,2}', '{"k": 1}'),
    (8, 1.0, 'infinity', 'red', '{1,2}', '{"k": 1}'),
    (16, 1.0, '2026-01-01', 'green', '{1,2}', '{"k": 1}'),
    (32, 1.0, '2026-01-01', 'red', '{2,1}', '{"k": 1}'),
    (64, 1.0, '2026-01-01', 'red', '{NULL}', '{"k": 1}'),
    (128, 1.0, '2026-01-01', 'red', '{NULL}', '{"k": 1}'),
    (256, 'NaN', '2026-01-01', 'red', '{}', '{"k": 1}'),
    (512, 'NaN', '2026-01-01', 'red', '{}', '{"k": 2}'))
    AS v (value, n, d, c, a, j);
CALL fold_once(4105);
SELECT type, value, trim_scale(n) AS n, d, c, a, j FROM schema4105.counted
ORDER BY value;

-- totals that were there before, in a column of type integer
CREATE SCHEMA schema4106
    CREATE TABLE counted (type text CHECK (type IN ('total', 'delta')),
                          value integer, page text)
    CREATE TABLE total (UNIQUE NULLS NOT DISTINCT (page)) INHERITS (counted);
INSERT INTO schema4106.total VALUES
    ('total', 100, 'a'), ('total', NULL, 'b'), ('total', 7, NULL);
INSERT INTO schema4106.counted VALUES
    ('delta', 1, 'a'), ('delta', 2, 'b'), ('delta', NULL, 'a'),
    ('delta', 3, NULL), ('delta', NULL, 'c');
CALL fold_once(4106);
SELECT * FROM schema4106.counted ORDER BY page;

-- The index may have any name, order of its columns, and more to carry; the
-- totals may have another name, and more columns.
CREATE SCHEMA schema4107
    CREATE TABLE counted (page text, day date, hits integer NOT NULL DEFAULT 0,
                          seen date NOT NULL DEFAULT '-infinity')
    CREATE TABLE "My Totals" (id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
                              note text DEFAULT 'new')
        INHERITS (counted);
CREATE UNIQUE INDEX "My Index" ON schema4107."My Totals" (day, page) INCLUDE (id)
    NULLS NOT DISTINCT;
INSERT INTO schema4107.counted VALUES
    ('a', NULL, 1, '2026-01-01'), ('a', NULL, 2, '2026-01-02'), (NULL, NULL, 3, DEFAULT);
CALL fold_once(4107);
SELECT page, day, hits, seen, note, id > 0 AS has_id
FROM schema4107."My Totals" ORDER BY page;

-- many keys, and deltas that come to nothing
CREATE SCHEMA schema4108
    CREATE TABLE counted (type text, value bigint, page int NOT NULL)
    CREATE TABLE total (PRIMARY KEY (page)) INHERITS (counted);
INSERT INTO schema4108.counted
SELECT 'delta', i % 7 - 3, i % 1000 FROM generate_series(1, 7000) i;
CREATE TEMPORARY TABLE truth AS
    SELECT page, sum(value) AS value FROM schema4108.counted GROUP BY page;
CALL fold_once(4108);
SELECT count(*), count(DISTINCT page), sum(value) FROM schema4108.counted;
SELECT count(*) AS wrong
FROM truth FULL JOIN schema4108.counted USING (page)
WHERE truth.value IS DISTINCT FROM counted.value;

DROP TABLE truth;
SET client_min_messages = warning;
DROP SCHEMA schema4101, schema4102, schema4103, schema4104, schema4105,
    schema4106, schema4107, schema4108 CASCADE;
DROP EXTENSION worker_spi;
DROP PROCEDURE fold_once;
