# An existing table of counters becomes the totals of a worker by ALTER TABLE ...
# INHERIT, while clients update it, others insert deltas and others read, and is
# given back, to the last count of each key: its contents, name, schema, indexes
# and readers are what they were.  Also shown: what else is adopted (the worker's
# own tables with keys, a table of the sample, totals with NULLs, with columns in
# another order, with foreign keys), when INHERIT fails, and what to do then.
#
# Clients go on until they are told to stop.  The test waits for what they have
# written, for worker_spi_fold(), and for lock waits.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('adoption', <<EOC);
worker_spi.total_workers = 1
autovacuum = off
# that of clients: a process may be kept from its core for longer than it is
deadlock_timeout = 1min
EOC

folds($node, 1, 'the worker makes its own tables');

# ------------------------------------------------------------------------
# A table of counters, its readers and its clients
# ------------------------------------------------------------------------

$node->safe_psql('postgres', <<'EOC');
CREATE ROLE shop LOGIN;
CREATE ROLE clerk LOGIN;
GRANT shop TO CURRENT_USER;
CREATE SCHEMA "My Stats" AUTHORIZATION shop;
GRANT ALL ON SCHEMA schema1 TO shop;

-- Its columns come in an order of their own, and one is gone.
SET ROLE shop;
CREATE TABLE "My Stats"."Page Count" (
	id bigserial UNIQUE, gone int, last_seen timestamptz NOT NULL DEFAULT '-infinity',
	note text, day date, "Hits" bigint DEFAULT 0, page text,
	PRIMARY KEY (page, day)) WITH (fillfactor = 70);
ALTER TABLE "My Stats"."Page Count" DROP gone;
CREATE INDEX hot ON "My Stats"."Page Count" (day, "Hits" DESC);
COMMENT ON TABLE "My Stats"."Page Count" IS 'counters';
GRANT SELECT ON "My Stats"."Page Count" TO clerk;
GRANT USAGE ON SCHEMA "My Stats" TO clerk;
CREATE VIEW "My Stats".top AS SELECT page, sum("Hits") AS hits FROM "My Stats"."Page Count" GROUP BY page;
CREATE FUNCTION "My Stats".hits(text) RETURNS bigint LANGUAGE sql
	AS 'SELECT sum("Hits")::bigint FROM "My Stats"."Page Count" WHERE page = $1';
CREATE TABLE "My Stats".alarm (page text, day date, FOREIGN KEY (page, day) REFERENCES "My Stats"."Page Count");
INSERT INTO "My Stats"."Page Count" (page, day, "Hits", last_seen, note)
	SELECT 'p' || p, date '2026-01-01' + d, 1000 * p + d, '2026-01-01', 'of old'
	FROM generate_series(1, 20) AS p, generate_series(0, 1) AS d;
INSERT INTO "My Stats".alarm VALUES ('p1', '2026-01-01');
RESET ROLE;

-- What everybody has counted, and what they are to go on with.
CREATE TABLE ledger AS
	SELECT page, day, "Hits" AS hits, last_seen AS at, 'before' AS client FROM "My Stats"."Page Count";
CREATE TABLE control AS SELECT true AS updating, true AS inserting, true AS reading, true AS folding;
CREATE TABLE read (what text);
GRANT ALL ON ledger, control, read TO shop;
GRANT SELECT ON ledger TO clerk;
EOC

my $procedures = <<'EOC';
-- Update so many totals in each transaction, the one with the greatest name first.
CREATE PROCEDURE update_totals(totals int) LANGUAGE plpgsql AS $$
DECLARE
	p text;
	d date;
	t timestamptz;
BEGIN
	WHILE (SELECT updating FROM control) LOOP
		d := date '2026-01-01' + (random() * 2)::int;
		t := timestamptz '2026-02-01' + random() * interval '1 day';
		FOR p IN SELECT DISTINCT 'p' || (random() * 25)::int FROM generate_series(1, totals) ORDER BY 1 DESC LOOP
			UPDATE "My Stats"."Page Count" SET "Hits" = "Hits" + 1, last_seen = greatest(last_seen, t)
			WHERE page = p AND day = d;
			IF FOUND THEN
				INSERT INTO ledger VALUES (p, d, 1, t, 'update');
			END IF;
		END LOOP;
		COMMIT;
	END LOOP;
END $$;

-- Insert deltas, some for totals that are not there.
CREATE PROCEDURE insert_deltas() LANGUAGE plpgsql AS $$
DECLARE
	p text;
	d date;
	t timestamptz;
BEGIN
	WHILE (SELECT inserting FROM control) LOOP
		p := 'p' || (random() * 25)::int;
		d := date '2026-01-01' + (random() * 2)::int;
		t := timestamptz '2026-02-01' + random() * interval '1 day';
		INSERT INTO schema1.counted (page, day, "Hits", last_seen) VALUES (p, d, 10, t);
		INSERT INTO ledger VALUES (p, d, 10, t, 'insert');
		COMMIT;
	END LOOP;
END $$;

-- Look at everything in one snapshot.
CREATE PROCEDURE read_all() LANGUAGE plpgsql AS $$
BEGIN
	WHILE (SELECT reading FROM control) LOOP
		IF EXISTS (
			SELECT FROM
				(SELECT page, day, sum("Hits") AS hits, max(last_seen) AS at FROM schema1.counted GROUP BY page, day) AS c
				FULL JOIN (SELECT page, day, sum(hits) AS hits, max(at) AS at FROM ledger GROUP BY page, day) AS l
				USING (page, day)
			WHERE (c.hits, c.at) IS DISTINCT FROM (l.hits, l.at)) THEN
			RAISE 'a snapshot has wrong counts';
		END IF;
		INSERT INTO read VALUES ('all');
		COMMIT;
	END LOOP;
END $$;

-- May a fold have to leave something for later?  Then the worker may start afresh
-- after some of them.
CREATE PROCEDURE fold_all(later boolean) LANGUAGE plpgsql AS $$
BEGIN
	WHILE (SELECT folding FROM control) LOOP
		BEGIN
			IF NOT worker_spi_fold(1) THEN
				RAISE 'there is no worker';
			END IF;
		EXCEPTION WHEN lock_not_available OR object_not_in_prerequisite_state THEN
			IF NOT later THEN
				RAISE;
			END IF;
		END;
		COMMIT;
	END LOOP;
END $$;
EOC
$node->safe_psql('postgres', $procedures);

# What a reader and the catalogs say of the table, but for its contents.
my $identity = <<'EOC';
SELECT oid, relname, relnamespace::regnamespace, relowner::regrole, relfilenode, relacl, reloptions, relhasindex
FROM pg_class WHERE oid = '"My Stats"."Page Count"'::regclass;
SELECT attnum, attname, atttypid::regtype, attnotnull, attisdropped, attislocal, attinhcount, pg_get_expr(adbin, adrelid)
FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE attrelid = '"My Stats"."Page Count"'::regclass AND attnum > 0 ORDER BY attnum;
SELECT indexrelid, pg_get_indexdef(indexrelid), indisvalid FROM pg_index WHERE indrelid = '"My Stats"."Page Count"'::regclass ORDER BY 1;
SELECT conname, pg_get_constraintdef(oid), conislocal, coninhcount FROM pg_constraint WHERE conrelid = '"My Stats"."Page Count"'::regclass ORDER BY 1;
SELECT obj_description('"My Stats"."Page Count"'::regclass);
SELECT pg_get_viewdef('"My Stats".top'::regclass);
EOC

# How many keys of the table do not have what the ledger says.
my $wrong_totals = <<'EOC';
SELECT count(*) FROM
	(SELECT page, day, "Hits" AS hits, last_seen AS at FROM "My Stats"."Page Count") AS c
	FULL JOIN (SELECT page, day, sum(hits) AS hits, max(at) AS at FROM ledger GROUP BY page, day) AS l
	USING (page, day)
WHERE (c.hits, c.at) IS DISTINCT FROM (l.hits, l.at);
EOC

sub rows_of
{
	my ($client) = @_;
	return $node->safe_psql('postgres',
		"SELECT count(*) FROM ledger WHERE client = '$client'");
}

# Wait until such clients have written this many more rows.
sub wait_for_rows
{
	my ($client, $more) = @_;
	my $until = rows_of($client) + $more;

	$node->poll_query_until('postgres',
		"SELECT count(*) >= $until FROM ledger WHERE client = '$client'")
	  or die "clients that $client do not go on";
	return;
}

# Tell clients to stop, and wait for their ends.
sub stop_clients
{
	my ($flag, $test, @clients) = @_;

	$node->safe_psql('postgres', "UPDATE control SET $flag = false");
	foreach my $client (@clients)
	{
		my (undef, $err, $success) = finish_psql($client);
		ok($success, "$test: $client->{name}") or diag($err);
	}
	return;
}

# ------------------------------------------------------------------------
# Adopted
# ------------------------------------------------------------------------

my @updaters = map {
	start_psql($node, 'postgres', "update_$_",
		'CALL update_totals(1)', '-U', 'shop')
} 1 .. 4;
wait_for_rows('update', 100);

is(total($node, 1), '', 'the worker\'s own tables are empty');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(1)'), 't', 'the worker is stopped');

# Its tables are in the way, and go in one command.
error_is($node, 'postgres', 'DROP TABLE schema1.counted', '2BP01',
	qr/schema1\.total.*schema1\.stuck/s, 'counted is not dropped alone');

# The owner of the table does it; a column that may be NULL is in the way.
my $adopt = <<'EOC';
BEGIN;
DROP TABLE schema1.stuck, schema1.total, schema1.counted;
SET ROLE shop;
CREATE TABLE schema1.counted (page text NOT NULL, day date NOT NULL,
	"Hits" bigint NOT NULL DEFAULT 0, last_seen timestamptz NOT NULL DEFAULT '-infinity');
%s
ALTER TABLE "My Stats"."Page Count" INHERIT schema1.counted;
ALTER TABLE schema1.counted REPLICA IDENTITY FULL;
COMMIT;
EOC
error_is($node, 'postgres', sprintf($adopt, ''), '42804', qr/column "Hits" in child table .*must be marked NOT NULL/,
	'INHERIT fails where a column is NOT NULL in the deltas alone');
is($node->safe_psql('postgres', q(SELECT to_regclass('schema1.total') IS NOT NULL)), 't',
	'and leaves all as it was');
$node->safe_psql('postgres', 'ALTER TABLE "My Stats"."Page Count" ALTER "Hits" SET NOT NULL');
my $identity_before = $node->safe_psql('postgres', $identity);
my $notes_before = $node->safe_psql('postgres', q(SELECT count(*) FROM "My Stats"."Page Count" WHERE note = 'of old' AND id <= 40));

$node->safe_psql('postgres', sprintf($adopt, ''));
$node->safe_psql('postgres', 'SELECT worker_spi_launch(1)');
is( $node->safe_psql('postgres', <<'EOC'),
SELECT inhrelid::regclass, relowner::regrole FROM pg_inherits JOIN pg_class ON oid = inhrelid
WHERE inhparent = 'schema1.counted'::regclass ORDER BY 1::text;
EOC
	"\"My Stats\".\"Page Count\"|shop\nschema1.stuck|shop",
	'launch takes it for the totals, and makes stuck, as their owner');
wait_for_rows('update', 100);

my @inserters = map {
	start_psql($node, 'postgres', "insert_$_",
		'CALL insert_deltas()', '-U', 'shop')
} 1 .. 2;
my $reader = start_psql($node, 'postgres', 'read', 'CALL read_all()');
my $folder = start_psql($node, 'postgres', 'fold', 'CALL fold_all(false)');
my $folds = worker($node, 1, 'fold_count');

foreach (1 .. 3)
{
	wait_for_rows('update', 200);
	wait_for_rows('insert', 200);
}
$node->poll_query_until('postgres',
	"SELECT fold_count > $folds + 20 FROM worker_spi_workers WHERE index = 1")
  or die 'the worker does not fold';
$node->poll_query_until('postgres', 'SELECT count(*) > 20 FROM read')
  or die 'nobody reads';
is(worker($node, 1, 'failed_count, stuck_rows'), '0|0', 'beside clients that update, no fold fails');

stop_clients('updating', 'a client that updates never fails', @updaters);
stop_clients('folding', 'every fold went through', $folder);

# Whoever updates several totals at once may block a fold that blocks him.  It is the
# fold that gives way, and it comes again.
$node->safe_psql('postgres', 'UPDATE control SET updating = true, folding = true');
@updaters = map {
	start_psql($node, 'postgres', "update_$_",
		'CALL update_totals(5)', '-U', 'shop')
} 1 .. 3;
$folder = start_psql($node, 'postgres', 'fold', 'CALL fold_all(true)');
$folds = worker($node, 1, 'fold_count + failed_count');
$node->poll_query_until('postgres',
	"SELECT fold_count + failed_count > $folds + 5 FROM worker_spi_workers WHERE index = 1")
  or die 'the worker does not fold';
wait_for_rows('update', 500);
stop_clients('updating', 'a client that updates several totals never fails', @updaters);
stop_clients('folding', 'nor does a fold for another reason', $folder);
$node->poll_query_until('postgres',
	"SELECT state IN ('idle', 'backoff') FROM worker_spi_workers WHERE index = 1")
  or die 'the worker does not come back';
folds($node, 1, 'and when they are gone all goes through');

# These are still there when the table is given back.
$node->safe_psql('postgres', 'UPDATE control SET updating = true');
@updaters = map {
	start_psql($node, 'postgres', "update_$_",
		'CALL update_totals(1)', '-U', 'shop')
} 1 .. 2;
wait_for_rows('update', 200);

# As those see it who read it, or refer to it.
is( $node->safe_psql('postgres', <<'EOC', extra_params => [ '-U', 'shop' ]),
SELECT "My Stats".hits('p1') > 2001, count(*) > 20 FROM "My Stats".top;
DELETE FROM "My Stats".alarm RETURNING page, day;
INSERT INTO "My Stats".alarm VALUES ('p1', '2026-01-01');
EOC
	"t|t\np1|2026-01-01", 'who reads the table finds it where it was');

# ------------------------------------------------------------------------
# And back
# ------------------------------------------------------------------------

stop_clients('inserting', 'a client that inserts never fails', @inserters);
stop_clients('reading', 'at every instant every count was right', $reader);
folds($node, 1, 'what is left is folded');
is( $node->safe_psql('postgres',
		'SELECT (SELECT count(*) FROM ONLY schema1.counted), (SELECT count(*) FROM schema1.stuck)'
	),
	'0|0', 'nothing is left, and nothing stuck');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(1)'), 't', 'the worker is stopped');
$node->safe_psql('postgres', <<'EOC');
SET ROLE shop;
BEGIN;
ALTER TABLE "My Stats"."Page Count" NO INHERIT schema1.counted;
DROP TABLE schema1.stuck, schema1.counted;
COMMIT;
EOC
wait_for_rows('update', 200);
stop_clients('updating', 'a client that updates has noticed nothing', @updaters);
is($node->safe_psql('postgres', $wrong_totals), '0', 'each total has the last count');
is($node->safe_psql('postgres', $identity), $identity_before,
	'the table is what it was, its indexes and constraints as well');
is( $node->safe_psql('postgres', q(SELECT count(*) FROM "My Stats"."Page Count" WHERE note = 'of old' AND id <= 40)),
	$notes_before, 'with the contents of its own columns');
is( $node->safe_psql('postgres', 'SELECT count(*) = count(DISTINCT id), count(*) > 40 FROM "My Stats"."Page Count"'),
	't|t', 'and new totals got theirs');
is( $node->safe_psql('postgres',
		'SELECT sum("Hits") = (SELECT sum(hits) FROM ledger) FROM "My Stats"."Page Count"',
		extra_params => [ '-U', 'clerk' ]),
	't', 'who might read it still may');

# Once more, and nothing has to be made ready.
is( $node->safe_psql('postgres', <<'EOC'),
SET ROLE shop;
BEGIN;
CREATE TABLE schema1.counted (LIKE "My Stats"."Page Count" INCLUDING DEFAULTS);
ALTER TABLE schema1.counted DROP id, DROP note;
ALTER TABLE "My Stats"."Page Count" INHERIT schema1.counted;
COMMIT;
RESET ROLE;
SELECT worker_spi_launch(1) > 0;
INSERT INTO schema1.counted (page, day, "Hits") VALUES ('p1', '2026-01-01', 7), ('new', '2026-01-01', 8);
INSERT INTO ledger VALUES ('p1', '2026-01-01', 7, '-infinity', 'insert'), ('new', '2026-01-01', 8, '-infinity', 'insert');
SELECT worker_spi_fold(1);
EOC
	"t\nt", 'a table that was given back is adopted again');
is($node->safe_psql('postgres', $wrong_totals), '0', 'and goes on with its totals');

# ------------------------------------------------------------------------
# Locks: who updates a total and holds it
# ------------------------------------------------------------------------

# The adoption waits for whoever is in the middle of an update, and takes a moment.
{
	my $holder = $node->background_psql('postgres');
	$node->safe_psql('postgres', <<'EOC');
CREATE SCHEMA schema2;
CREATE TABLE held (k text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
INSERT INTO held VALUES ('a', 1), ('b', 1), ('c', 1);
CREATE TABLE schema2.counted (LIKE held INCLUDING DEFAULTS);
EOC
	$holder->query_safe("BEGIN; UPDATE held SET n = n + 1 WHERE k = 'a'");
	my $adoption = start_psql($node, 'postgres', 'adopt', 'ALTER TABLE held INHERIT schema2.counted');
	wait_for_psql($adoption);
	$holder->query_safe("UPDATE held SET n = n + 1 WHERE k = 'b'; COMMIT");
	ok((finish_psql($adoption))[2], 'a client in the middle of an update goes on, and INHERIT waits for it');

	# One total is held: all others are folded, and that one later.
	$node->safe_psql('postgres', 'SELECT worker_spi_launch(2)');
	$holder->query_safe("BEGIN; UPDATE held SET n = n + 10 WHERE k = 'a'");
	$node->safe_psql('postgres', "INSERT INTO schema2.counted VALUES ('a', 100), ('b', 100), ('d', 100)");
	error_is($node, 'postgres', 'SELECT worker_spi_fold(2)', '55P03', qr/locked/, 'a total that a client holds is not waited for');
	is(rows($node, 2, 'k, n'), "a|2\na|100\nb|102\nc|1\nd|100", 'all others are folded');
	is(deltas($node, 2), 1, 'and its delta stays');
	$holder->query_safe("UPDATE held SET n = n + 10 WHERE k = 'c'; COMMIT");
	wait_for_fold($node, 2);
	is(rows($node, 2, 'k, n'), "a|112\nb|102\nc|11\nd|100", 'until the client has committed');
	$holder->quit;
	is($node->safe_psql('postgres', 'SELECT worker_spi_stop(2)'), 't', 'that worker is stopped');
}

# ------------------------------------------------------------------------
# When INHERIT fails
# ------------------------------------------------------------------------

foreach my $test (
	[ 'a column is missing', 'k text PRIMARY KEY', '42804', qr/missing column "n"/,
		'ALTER TABLE refused ADD n bigint NOT NULL DEFAULT 0' ],
	[ 'a column may be NULL', 'k text PRIMARY KEY, n bigint DEFAULT 0', '42804', qr/column "n" .*must be marked NOT NULL/,
		'ALTER TABLE refused ALTER n SET NOT NULL' ],
	[ 'a column has another type', 'k text PRIMARY KEY, n integer NOT NULL DEFAULT 0', '42804', qr/different type for column "n"/,
		'ALTER TABLE refused ALTER n TYPE bigint' ],
	[ 'a column has another collation', 'k text COLLATE "POSIX" PRIMARY KEY, n bigint NOT NULL DEFAULT 0', '42P21', qr/different collation for column "k"/,
		'ALTER TABLE refused ALTER k TYPE text' ],
	[ 'a row trigger has a transition table', 'k text PRIMARY KEY, n bigint NOT NULL DEFAULT 0', '0A000', qr/trigger "rowwise"/,
		'DROP TRIGGER rowwise ON refused', <<'EOC' ])
CREATE FUNCTION rowwise() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER rowwise AFTER DELETE ON refused REFERENCING OLD TABLE AS gone FOR EACH ROW EXECUTE FUNCTION rowwise();
EOC
{
	my ($name, $definition, $sqlstate, $pattern, $cure, $more) = @$test;

	$node->safe_psql('postgres', <<EOC . ($more // ''));
DROP TABLE schema2.counted CASCADE;
DROP TABLE IF EXISTS refused, held;
CREATE TABLE schema2.counted (k text NOT NULL, n bigint NOT NULL DEFAULT 0);
CREATE TABLE refused ($definition);
INSERT INTO refused (k) VALUES ('a');
INSERT INTO schema2.counted VALUES ('a', 1), ('b', 2);
EOC
	error_is($node, 'postgres', 'ALTER TABLE refused INHERIT schema2.counted', $sqlstate, $pattern,
		"INHERIT fails: $name");
	is( $node->safe_psql('postgres', <<EOC),
$cure;
ALTER TABLE refused INHERIT schema2.counted;
SELECT worker_spi_launch(2) > 0;
SELECT worker_spi_fold(2);
SELECT k, n, tableoid::regclass FROM schema2.counted ORDER BY k;
SELECT worker_spi_stop(2);
EOC
		"t\nt\na|1|refused\nb|2|refused\nt", 'that is mended, and the deltas that wait are folded');
}

# Constraints that were named before are as they were: the type of a measure can
# still be changed, which descends.
is( $node->safe_psql('postgres', <<EOC),
DROP TABLE schema2.stuck, schema2.counted, refused;
CREATE TABLE schema2.counted (k text NOT NULL, n integer NOT NULL DEFAULT 0);
CREATE TABLE mine (k text PRIMARY KEY, n integer NOT NULL DEFAULT 0);
@{[ $node->pg_version >= 18 ? 'ALTER TABLE mine RENAME CONSTRAINT mine_n_not_null TO counted_n_not_null;' : '' ]}
ALTER TABLE mine INHERIT schema2.counted;
SELECT worker_spi_launch(2) > 0;
INSERT INTO schema2.counted VALUES ('a', 2147483647);
SELECT worker_spi_fold(2);
EOC
	"t\nt", 'a table with a small measure is adopted');
$node->safe_psql('postgres', q(INSERT INTO schema2.counted VALUES ('a', 1)));
error_is($node, 'postgres', 'SELECT worker_spi_fold(2)', '22003', qr/out of range/, 'and gets full');
is( $node->safe_psql('postgres', <<'EOC'),
ALTER TABLE schema2.counted ALTER n TYPE bigint;
SELECT worker_spi_fold(2);
SELECT k, n, pg_typeof(n) FROM mine;
SELECT worker_spi_stop(2);
EOC
	"t\na|2147483648|bigint\nt", 'a larger type, for all three tables, is the cure');

# ------------------------------------------------------------------------
# NULLs, views and foreign keys
# ------------------------------------------------------------------------

is( $node->safe_psql('postgres', <<'EOC'),
DROP TABLE schema2.stuck, mine, schema2.counted;
CREATE TABLE mine (n int, value integer, k text, UNIQUE NULLS NOT DISTINCT (k, n));
INSERT INTO mine VALUES (1, NULL, 'a'), (NULL, 10, 'a'), (NULL, NULL, NULL);
CREATE TABLE schema2.counted (k text, n int, value integer);
ALTER TABLE mine INHERIT schema2.counted;
SELECT worker_spi_launch(2) > 0;
INSERT INTO schema2.counted VALUES ('a', 1, 5), ('a', NULL, 6), (NULL, NULL, 7), (NULL, 1, 8), (NULL, NULL, NULL);
SELECT worker_spi_fold(2);
SELECT k, n, value FROM mine ORDER BY k, n;
SELECT worker_spi_stop(2);
EOC
	"t\nt\na|1|5\na||16\n|1|8\n||7\nt", 'totals may have NULL keys, and NULL as a count');

# Unless its index takes NULLs for distinct.
is( $node->safe_psql('postgres', <<'EOC'),
DROP TABLE schema2.stuck;
ALTER TABLE mine DROP CONSTRAINT mine_k_n_key, ADD UNIQUE (k, n);
SELECT sum(value) FROM schema2.counted;
EOC
	'36', 'the index of a table as it often is');
error_is($node, 'postgres', 'SELECT worker_spi_launch(2)', '42P16', qr/index "mine_k_n_key".*NULLs for distinct/s,
	'is refused');
is( $node->safe_psql('postgres', <<'EOC'),
ALTER TABLE mine ADD UNIQUE NULLS NOT DISTINCT (k, n), DROP CONSTRAINT mine_k_n_key;
INSERT INTO schema2.counted VALUES (NULL, NULL, 1);
SELECT worker_spi_launch(2) > 0;
SELECT worker_spi_fold(2);
SELECT value FROM mine WHERE k IS NULL AND n IS NULL;
SELECT worker_spi_stop(2);
EOC
	"t\nt\n8\nt", 'and another one taken');

# Views: on the table they show what is folded, on counted all.
is( $node->safe_psql('postgres', <<'EOC'),
DROP TABLE schema2.stuck, mine, schema2.counted;
CREATE TABLE page (id int PRIMARY KEY);
INSERT INTO page VALUES (1), (2);
CREATE TABLE hits (page int REFERENCES page ON DELETE CASCADE, n bigint NOT NULL DEFAULT 0, PRIMARY KEY (page) INCLUDE (n));
INSERT INTO hits VALUES (1, 100);
CREATE TABLE alarm (page int REFERENCES hits ON UPDATE CASCADE ON DELETE SET NULL);
INSERT INTO alarm VALUES (1);
CREATE VIEW folded AS SELECT * FROM hits;
CREATE MATERIALIZED VIEW kept AS SELECT * FROM hits;
CREATE TABLE schema2.counted (n bigint NOT NULL DEFAULT 0, page int NOT NULL);
CREATE VIEW exact AS SELECT page, sum(n) AS n FROM schema2.counted GROUP BY page;
ALTER TABLE hits INHERIT schema2.counted;
SELECT worker_spi_launch(2) > 0;
INSERT INTO schema2.counted VALUES (1, 1), (10, 2);
SELECT 'folded', * FROM folded UNION ALL SELECT 'exact', * FROM exact ORDER BY 1, 2;
SELECT worker_spi_fold(2);
REFRESH MATERIALIZED VIEW kept;
SELECT 'folded', * FROM folded UNION ALL SELECT 'exact', * FROM exact UNION ALL SELECT 'kept', * FROM kept ORDER BY 1, 2;
EOC
	join("\n", 't', 'exact|1|101', 'exact|2|10', 'folded|1|100', 't',
		'exact|1|101', 'exact|2|10', 'folded|1|101', 'folded|2|10', 'kept|1|101', 'kept|2|10'),
	'views over the table and over counted show what they should');

# The foreign key of the totals holds, and each key that it refuses is stuck until it
# is mended.
$node->safe_psql('postgres', 'INSERT INTO schema2.counted VALUES (5, 1), (7, 3)');
error_is($node, 'postgres', 'SELECT worker_spi_fold(2)', '23503', qr/"hits_page_fkey"/,
	'a key that the foreign key of the totals refuses is an error');
is(rows($node, 2, 'page, n, tableoid::regclass'), "1|106|hits\n2|10|hits\n3|7|schema2.stuck",
	'it is stuck, and the others folded');
is( $node->safe_psql('postgres', <<'EOC'),
INSERT INTO page VALUES (3);
SELECT worker_spi_fold(2);
SELECT page, n FROM hits ORDER BY page;
SELECT page FROM alarm;
DELETE FROM page WHERE id = 1;
SELECT page IS NULL FROM alarm;
SELECT page, n FROM exact ORDER BY page;
EOC
	"t\n1|106\n2|10\n3|7\n1\nt\n2|10\n3|7",
	'what it refers to is made, and what refers to the totals still does');

# ------------------------------------------------------------------------
# The worker's own tables get keys
# ------------------------------------------------------------------------

# As one types it.
is( $node->safe_psql('postgres', <<'EOC'),
SELECT worker_spi_launch(3) > 0;
INSERT INTO schema3.counted (value) VALUES (20), (22);
SELECT worker_spi_fold(3);
INSERT INTO schema3.counted (value) VALUES (8);
BEGIN;
ALTER TABLE schema3.counted ADD page text NOT NULL DEFAULT '(before)', ADD day date NOT NULL DEFAULT '-infinity',
	ADD hits integer NOT NULL DEFAULT 0;
ALTER TABLE schema3.counted ALTER page DROP DEFAULT, ALTER day DROP DEFAULT;
ALTER TABLE schema3.total DROP CONSTRAINT total_pkey, ADD PRIMARY KEY (page, day);
COMMIT;
INSERT INTO schema3.counted (value, page, day, hits) VALUES (1, '/', '2026-01-01', 1), (2, '/', '2026-01-01', 1), (4, '/', '2026-01-02', 1);
SELECT worker_spi_fold(3);
SELECT page, day, value, hits, tableoid::regclass FROM schema3.counted ORDER BY value;
EOC
	"t\nt\nt\n/|2026-01-01|3|2|schema3.total\n/|2026-01-02|4|1|schema3.total\n(before)|-infinity|50|0|schema3.total",
	'a worker\'s own tables get keys while it runs');
error_is($node, 'postgres', 'INSERT INTO schema3.counted (value) VALUES (1)', '23502', qr/"page"/,
	'and clients that know nothing of them are told');

# As the hint says.
$node->safe_psql('postgres', <<'EOC');
SELECT worker_spi_launch(4);
INSERT INTO schema4.counted (value) VALUES (40), (2);
SELECT worker_spi_fold(4);
ALTER TABLE schema4.counted ADD "Page" text NOT NULL DEFAULT '(before)', ADD n int;
ALTER TABLE schema4.counted ALTER "Page" DROP DEFAULT;
INSERT INTO schema4.counted (value, "Page", n) VALUES (1, 'a', NULL), (2, 'a', NULL), (4, 'a', 1);
EOC
{
	my (undef, undef, $err) = $node->psql('postgres', 'SELECT worker_spi_fold(4)');
	my ($command) = $err =~ /HINT:.*?(ALTER TABLE [^\n]*)/;
	is( $command,
		'ALTER TABLE schema4.total DROP CONSTRAINT total_pkey, ADD UNIQUE NULLS NOT DISTINCT ("Page", n)',
		'the hint is the complete command');
	is( $node->safe_psql('postgres', <<EOC),
$command;
SELECT worker_spi_fold(4);
SELECT "Page", n, value FROM schema4.total ORDER BY value;
SELECT sum(value) FROM schema4.counted;
EOC
		"t\na||3\na|1|4\n(before)||42\n49", 'which the worker takes as well');
}

# ------------------------------------------------------------------------
# A table of the sample
# ------------------------------------------------------------------------

$node->safe_psql('postgres', <<'EOC');
CREATE SCHEMA schema6;
CREATE TABLE schema6.counted (type text CHECK (type IN ('total', 'delta')), value integer);
CREATE UNIQUE INDEX counted_unique_total ON schema6.counted (type) WHERE type = 'total';
INSERT INTO schema6.counted VALUES ('total', 40), ('delta', 1), ('delta', NULL), (NULL, 1);
SELECT worker_spi_launch(6);
EOC
folds($node, 6, 'a table of the sample is folded');
is(rows($node, 6, 'tableoid::regclass, type, value'), 'schema6.total|total|42', 'its total among the deltas');
$node->safe_psql('postgres', "INSERT INTO schema6.counted VALUES ('delta', 2147483647), ('total', 1)");
error_is($node, 'postgres', 'SELECT worker_spi_fold(6)', '22003', qr/integer out of range/,
	'its integers get full');
is( $node->safe_psql('postgres', <<'EOC'),
ALTER TABLE schema6.counted ALTER value TYPE bigint;
SELECT worker_spi_fold(6);
TABLE schema6.counted;
EOC
	"t\ntotal|2147483690", 'a larger type is the cure');
error_is($node, 'postgres', "INSERT INTO schema6.counted VALUES ('other', 1)", '23514', qr/counted_type_check/,
	'and its constraint still holds');

$node->stop;
done_testing();
