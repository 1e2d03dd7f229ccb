# What a fold does to the table: which tables are adopted and which refused,
# what becomes of NULLs, of sums that are zero, negative or too large, and that
# sum(value) is the true count in every snapshot.  A large backlog is folded in
# several transactions, and whatever happens to the table between two of them,
# worker_spi_fold() returns when nothing that was committed before is left.
#
# It waits for worker_spi_fold(), for lock waits in pg_locks where the worker
# is held up in its cycle, and for the statistics of the server.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# Nothing but the worker is to write WAL or take transaction ids by itself.
my $node = new_node('semantics', <<EOC);
worker_spi.total_workers = 1
autovacuum = off
autovacuum_naptime = 1
wal_level = minimal
max_wal_senders = 0
checkpoint_timeout = 1h
max_wal_size = 10GB
shared_buffers = 128MB
EOC

sub folds
{
	my ($test) = @_;
	is(fold($node, 1), 't', $test);
	return;
}

# Columns as the worker makes them.
my $own_columns =
  "(type text NOT NULL DEFAULT 'delta', value bigint NOT NULL)";

# All indexes of the worker's table, one per line.
sub indexes
{
	return $node->safe_psql('postgres',
		"SELECT indexrelid::regclass FROM pg_index WHERE indrelid = 'schema1.counted'::regclass"
	);
}

# ------------------------------------------------------------------------
# The worker's own table
# ------------------------------------------------------------------------
folds('the worker answers');
my $pid = worker($node, 1, 'pid');
is( $node->safe_psql('postgres', <<'EOC'),
SELECT attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid)
FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE attrelid = 'schema1.counted'::regclass AND attnum > 0 ORDER BY attnum;
SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = 'schema1.counted'::regclass;
EOC
	"type|text|t|'delta'::text\nvalue|bigint|t|\n"
	  . "CREATE UNIQUE INDEX counted_type_idx ON schema1.counted USING btree (type)"
	  . " WHERE (type = 'total'::text)",
	'the worker has made its table and index');
is(rows($node, 1), '', 'an empty table stays empty');
$node->safe_psql('postgres', <<'EOC');
INSERT INTO schema1.counted VALUES ('delta', 1), ('sum', 2);
INSERT INTO schema1.counted (value) VALUES (4);
EOC
folds('deltas without a total are folded, whatever their type says');
is(rows($node, 1), 'total|7', 'the total that was missing was made');

# Who may insert values writes deltas and nothing else.
$node->safe_psql('postgres', <<'EOC');
CREATE ROLE regress_client LOGIN;
GRANT USAGE ON SCHEMA schema1 TO regress_client;
GRANT INSERT (value) ON schema1.counted TO regress_client;
EOC
my @client = (extra_params => [ '-U', 'regress_client' ]);
$node->safe_psql('postgres',
	'INSERT INTO schema1.counted (value) VALUES (10)', @client);
error_is($node, 'postgres', $_, '42501', qr/permission denied/,
	"with INSERT (value) alone there is no way to: $_", @client)
  foreach
  "INSERT INTO schema1.counted (type, value) VALUES ('total', 1)",
  'UPDATE schema1.counted SET value = 0', 'DELETE FROM schema1.counted',
  'SELECT sum(value) FROM schema1.counted';
folds('its delta is folded');
is(rows($node, 1), 'total|17', 'into the total');
$node->safe_psql('postgres', 'DELETE FROM schema1.counted');
folds('nothing is folded where there is nothing');
is(rows($node, 1), '', 'a total that was deleted is not made again without deltas');

# Sums
foreach my $test (
	[ 'deltas that sum to 0, without a total', [ 5, -5 ],       0 ],
	[ 'deltas that sum to 0',                  [ -7, 7 ],       0 ],
	[ 'a single delta of 0',                   [0],             0 ],
	[ 'a negative sum',                        [ -10, 3 ],      -7 ],
	[ 'back over zero',                        [ 1, 20 ],       14 ],
	[ 'the largest bigint',                    [ '9223372036854775793' ], '9223372036854775807' ],
	[
		'deltas the sum of which fits, though not the sum of some of them',
		[ '9223372036854775807', 1, '-9223372036854775808', '-9223372036854775807' ],
		0
	],
	[ 'the smallest bigint', ['-9223372036854775808'], '-9223372036854775808' ])
{
	my ($name, $deltas, $sum) = @$test;
	my $folded = worker($node, 1, 'folded_rows');
	$node->safe_psql('postgres',
		'INSERT INTO schema1.counted VALUES '
		  . join(', ', map { "('delta', '$_')" } @$deltas));
	folds("the worker folds $name");
	is(rows($node, 1), "total|$sum", "the total is right with $name");
	is(worker($node, 1, 'folded_rows'),
		$folded + @$deltas, "the rows are counted with $name");
}

# Too large: that delta is stuck, all else is folded, and nothing is lost.
foreach my $test ([ 'bigint', '9223372036854775807' ], [ 'integer', '2147483647' ])
{
	my ($type, $max) = @$test;
	new_table($node, 1, "CREATE TABLE schema1.counted (type text, value $type)");
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted VALUES ('total', $max), ('delta', 1)");
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)',
		'22003', qr/./, "a total that does not fit $type is an error");
	is(rows($node, 1), "delta|1\ntotal|$max", "the delta to $type is kept");
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted VALUES ('delta', $max)");
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)',
		'22003', qr/./, "deltas whose sum does not fit $type are as well");
	is(worker($node, 1, 'state, stuck_rows'),
		'idle|2', "both deltas are known to be stuck: $type");
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted VALUES ('delta', -$max), ('delta', -2)");
	is( $node->safe_psql(
			'postgres', 'SELECT worker_spi_fold(1); TABLE schema1.counted'),
		"t\ntotal|" . ($type eq 'bigint' ? '9223372036854775806' : '2147483646'),
		"once the sum fits $type, all is folded");
}

# ------------------------------------------------------------------------
# Tables that are adopted
# ------------------------------------------------------------------------

# As older versions of the sample made it, with rows that it could have.
new_table($node, 1, <<'EOC');
CREATE TABLE schema1.counted (
	type text CHECK (type IN ('total', 'delta')),
	value integer);
CREATE UNIQUE INDEX counted_unique_total ON schema1.counted (type) WHERE type = 'total';
INSERT INTO schema1.counted VALUES
	('total', NULL), ('delta', NULL), ('delta', 5), (NULL, 7), ('delta', 6), (NULL, NULL)
EOC
folds('the table of the sample is adopted');
is(rows($node, 1), 'total|18',
	'NULL values count as 0, and rows without a type are deltas');
is(indexes(), 'schema1.counted_unique_total', 'the index of the sample serves');
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES ('delta', NULL), ('delta', NULL)");
folds('nothing but NULLs is folded');
is(rows($node, 1), 'total|18', 'to nothing');
$node->safe_psql('postgres',
	"DELETE FROM schema1.counted; INSERT INTO schema1.counted VALUES ('delta', NULL)"
);
folds('a NULL without a total is folded');
is(rows($node, 1), 'total|0', 'to 0');

# Columns in another order, rows of another type, no index.
new_table($node, 1, <<'EOC');
CREATE TABLE schema1.counted (gone date, value bigint, type text);
ALTER TABLE schema1.counted DROP COLUMN gone;
INSERT INTO schema1.counted VALUES (1, 'delta'), (10, 'total'), (100, 'other'), (2, 'delta'), (3, 'Delta')
EOC
folds('a table without an index is adopted');
is(rows($node, 1), 'total|116', 'whatever the type of its rows');
is(indexes(), 'schema1.counted_type_idx', 'the index is made');

# Two totals: which of them is the count is not for the worker to say.
new_table($node, 1, <<'EOC');
CREATE TABLE schema1.counted (type text, value bigint);
INSERT INTO schema1.counted VALUES ('total', 1), ('delta', 10), ('total', 100)
EOC
error_is(
	$node, 'postgres', 'SELECT worker_spi_fold(1)', '23505',
	qr/./, 'a table with two totals is refused');
is(rows($node, 1), "delta|10\ntotal|1\ntotal|100", 'with all its rows kept');
$node->safe_psql('postgres',
	"UPDATE schema1.counted SET type = 'delta' WHERE value = 1");
folds('and folded once there is one total');
is(rows($node, 1), 'total|111', 'of all rows');

my $unlogged_offset = -s $node->logfile;
new_table($node, 1, "CREATE UNLOGGED TABLE schema1.counted $own_columns");
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES ('delta', 1)");
folds('an unlogged table is adopted');
is( $node->safe_psql(
		'postgres',
		"SELECT relpersistence, value FROM pg_class, schema1.counted WHERE oid = 'schema1.counted'::regclass"
	),
	'u|1',
	'and stays unlogged');
folds('once more');
is( scalar(
		grep { /WARNING:  .*schema1\.counted/ }
		  server_lines($node, $unlogged_offset)),
	1,
	'with one warning');

# A child table is none of the worker's business.
new_table($node, 1, <<"EOC");
CREATE TABLE schema1.counted $own_columns;
CREATE TABLE child () INHERITS (schema1.counted);
INSERT INTO schema1.counted VALUES ('delta', 1), ('delta', 2);
INSERT INTO child VALUES ('delta', 10), ('total', 20)
EOC
folds('a table with a child is folded');
is(rows($node, 1), "delta|10\ntotal|3\ntotal|20", 'and the child is let be');
$node->safe_psql('postgres', 'DROP TABLE child');

# ------------------------------------------------------------------------
# Tables that are refused
# ------------------------------------------------------------------------
my $not_ordinary = qr/"schema7\.counted"/;
foreach my $test (
	[
		'a view', '42809', $not_ordinary,
		"CREATE VIEW schema7.counted AS SELECT 'delta'::text AS type, 1::bigint AS value"
	],
	[
		'a materialized view', '42809',
		$not_ordinary,
		"CREATE MATERIALIZED VIEW schema7.counted AS SELECT 'delta'::text AS type, 1::bigint AS value"
	],
	[
		'a foreign table',
		'42809',
		$not_ordinary,
		'CREATE FOREIGN DATA WRAPPER dummy; CREATE SERVER dummy FOREIGN DATA WRAPPER dummy;'
		  . ' CREATE FOREIGN TABLE schema7.counted (type text, value bigint) SERVER dummy'
	],
	[
		'a sequence', '42809', $not_ordinary,
		'CREATE SEQUENCE schema7.counted'
	],
	[
		'a partitioned table',
		'42809',
		$not_ordinary,
		'CREATE TABLE schema7.counted (type text, value bigint) PARTITION BY LIST (type)'
	],
	[
		'an index', '42809', $not_ordinary,
		'CREATE TABLE schema7.t (a int); CREATE INDEX counted ON schema7.t (a)'
	],
	[
		'a composite type', '42809',
		$not_ordinary,
		'CREATE TYPE schema7.counted AS (type text, value bigint)'
	],
	[
		'no column type', '42703',
		qr/"schema7\.counted".*"type"/,
		'CREATE TABLE schema7.counted (kind text, value bigint)'
	],
	[
		'no column value',
		'42703',
		qr/"schema7\.counted".*"value"/,
		'CREATE TABLE schema7.counted (type text, "Value" bigint)'
	],
	[
		'a dropped column value',
		'42703',
		qr/"schema7\.counted".*"value"/,
		'CREATE TABLE schema7.counted (type text, value bigint, k int); ALTER TABLE schema7.counted DROP value'
	],
	[
		'no column at all', '42703',
		qr/"schema7\.counted".*"type"/,
		'CREATE TABLE schema7.counted ()'
	],
	[
		'a type of varchar',
		'42804',
		qr/"type".*"schema7\.counted"/s,
		'CREATE TABLE schema7.counted (type varchar(10), value bigint)'
	],
	[
		'a type of a domain',
		'42804',
		qr/"type".*"schema7\.counted"/s,
		'CREATE DOMAIN schema7.kind AS text; CREATE TABLE schema7.counted (type schema7.kind, value bigint)'
	],
	[
		'a value of numeric',
		'42804',
		qr/"value".*"schema7\.counted"/s,
		'CREATE TABLE schema7.counted (type text, value numeric)'
	],
	[
		'a value of smallint',
		'42804',
		qr/"value".*"schema7\.counted"/s,
		'CREATE TABLE schema7.counted (type text, value smallint)'
	],
	[
		'a generated value',
		'42P16',
		qr/"value".*"schema7\.counted"/,
		'CREATE TABLE schema7.counted (type text, a int, value bigint GENERATED ALWAYS AS (a + 1) STORED)'
	],
	[
		'a generated type',
		'42P16',
		qr/"type".*"schema7\.counted"/,
		"CREATE TABLE schema7.counted (value bigint, type text GENERATED ALWAYS AS ('delta') STORED)"
	],
	[
		'a rule',
		'42809',
		qr/"schema7\.counted".*rule/,
		'CREATE TABLE schema7.counted (type text, value bigint);'
		  . ' CREATE RULE r AS ON DELETE TO schema7.counted DO INSTEAD NOTHING'
	])
{
	my ($name, $sqlstate, $pattern, $create) = @$test;
	$node->safe_psql('postgres', "CREATE SCHEMA schema7; $create");
	error_is($node, 'postgres', 'SELECT worker_spi_launch(7)',
		$sqlstate, $pattern, "refused: $name");
	$node->safe_psql('postgres', 'DROP SCHEMA schema7 CASCADE');
}
is($node->safe_psql('postgres', 'SELECT count(*) FROM worker_spi_workers'),
	1, 'none of these has left a worker');

# The same for a worker that runs.
new_table($node, 1, 
	"CREATE VIEW schema1.counted AS SELECT 'delta'::text AS type, 1::bigint AS value"
);
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42809',
	qr/"schema1\.counted"/,
	'a view in place of the table is refused by a worker that runs');
$node->safe_psql('postgres', 'DROP VIEW schema1.counted');
folds('without it, the worker makes its table');
$node->safe_psql('postgres', <<'EOC');
INSERT INTO schema1.counted VALUES ('delta', 5);
CREATE RULE r AS ON DELETE TO schema1.counted DO INSTEAD NOTHING;
EOC
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42809',
	qr/"schema1\.counted".*rule/,
	'a rule that is made later is refused as well');
$node->safe_psql('postgres', 'DROP RULE r ON schema1.counted');
folds('without it, the worker folds');
is(rows($node, 1), 'total|5', 'what was kept');

# ------------------------------------------------------------------------
# A cycle that finds nothing
# ------------------------------------------------------------------------

# What the last fold has left to be cleaned up must not be mistaken for it.
my $offset = -s $node->logfile;
is( $node->safe_psql('postgres', <<'EOC'),
VACUUM schema1.counted;
CHECKPOINT;
SELECT worker_spi_fold(1);
SELECT fold_count AS folds, last_fold_time AS time FROM worker_spi_workers WHERE index = 1 \gset
SELECT pg_current_wal_insert_lsn() AS lsn, pg_snapshot_xmax(pg_current_snapshot()) AS xid \gset
SELECT worker_spi_fold(1), worker_spi_fold(1), worker_spi_fold(1);
SELECT pg_current_wal_insert_lsn() = :'lsn', pg_snapshot_xmax(pg_current_snapshot()) = :'xid';
SELECT fold_count = :folds, last_fold_time = :'time' FROM worker_spi_workers WHERE index = 1;
EOC
	"t\nt|t|t\nt|t\nt|t",
	'cycles without deltas write no WAL, take no transaction id and are not counted'
);
unlike(
	slurp_file($node->logfile, $offset),
	qr/worker_spi worker 1:/,
	'nor do they write to the log');

# ------------------------------------------------------------------------
# Statistics and autovacuum
# ------------------------------------------------------------------------
$node->safe_psql('postgres', 'DROP TABLE schema1.counted');
folds('the worker makes its table again');
is( $node->safe_psql('postgres',
		"SELECT 'autovacuum_vacuum_scale_factor=0' = ANY (reloptions) FROM pg_class WHERE oid = 'schema1.counted'::regclass"
	),
	't',
	'with settings for autovacuum that suit a queue');
$node->safe_psql('postgres', <<'EOC');
INSERT INTO schema1.counted SELECT 'delta', 1 FROM generate_series(1, 11000);
SELECT worker_spi_fold(1);
INSERT INTO schema1.counted VALUES ('delta', 1);
SELECT worker_spi_fold(1);
EOC
$node->poll_query_until('postgres', <<'EOC')
SELECT n_tup_del = 11001 AND n_tup_upd >= 1 AND n_dead_tup > 11000
FROM pg_stat_user_tables WHERE relid = 'schema1.counted'::regclass
EOC
  or die 'statistics are not reported';
$node->safe_psql('postgres',
	'ALTER SYSTEM SET autovacuum = on; SELECT pg_reload_conf()');
$node->poll_query_until('postgres',
	"SELECT autovacuum_count > 0 FROM pg_stat_user_tables WHERE relid = 'schema1.counted'::regclass"
) or die 'autovacuum has not come';
$node->safe_psql('postgres',
	'ALTER SYSTEM SET autovacuum = off; SELECT pg_reload_conf()');
pass('autovacuum comes when deltas were folded, though the table is small');

# ------------------------------------------------------------------------
# Every snapshot
# ------------------------------------------------------------------------

# Writers, folds and readers at the same time.  The ledger is written in the
# same transactions as the table.  A reader whose snapshot does not agree with
# the ledger, or with itself after more folds, divides by zero.
new_table($node, 1, "CREATE TABLE schema1.counted $own_columns");
$node->safe_psql('postgres', <<'EOC');
CREATE TABLE ledger (value bigint);
INSERT INTO ledger VALUES (1);
INSERT INTO schema1.counted VALUES ('delta', 1);
EOC
my %scripts = (
	write => <<'EOC',
\set v random(-1000, 1000)
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', :v);
INSERT INTO ledger VALUES (:v);
END;
EOC
	fold => "SELECT worker_spi_fold(1);\n",
	read => <<'EOC');
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SELECT sum(value) AS counted FROM schema1.counted \gset
SELECT sum(value) AS ledger FROM ledger \gset
SELECT worker_spi_fold(1);
SELECT sum(value) AS again FROM schema1.counted \gset
END;
SELECT 1 / (:counted = :ledger AND :counted = :again)::int;
EOC
my $folds = worker($node, 1, 'fold_count');
my $bench = start_pgbench($node, [ '-c', 5, '-t', 400 ],
	[ $scripts{write}, 6 ], [ $scripts{fold}, 1 ], [ $scripts{read}, 2 ]);
my (undef, $bench_err, $success) = finish_psql($bench);
ok($success,
	'in no snapshot is sum(value) wrong, while others write and the worker folds')
  or diag($bench_err);
cmp_ok(worker($node, 1, 'fold_count') - $folds,
	'>', 50, 'there were many folds meanwhile');
folds('what is left is folded');
is( rows($node, 1),
	'total|' . $node->safe_psql('postgres', 'SELECT sum(value) FROM ledger'),
	'and the total is that of the ledger');

# ------------------------------------------------------------------------
# Many deltas, and a table that is rewritten while they are folded
# ------------------------------------------------------------------------

# The trigger notes each transaction of the worker's.  From the second on, it
# waits for us to let go of the advisory lock; the function's own setting is
# there because the worker's lock_timeout may be short for a slow machine.  One
# that is told to be slow takes its time over the first, so that the next ones
# are small.
$node->safe_psql('postgres', <<'EOC');
CREATE TABLE ranges (xid xid8, rows bigint);
CREATE FUNCTION note_range() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = 0 AS $$
BEGIN
	IF EXISTS (SELECT FROM public.ranges) THEN
		PERFORM pg_advisory_xact_lock_shared(42);
	ELSIF TG_ARGV[0] = 'slow' THEN
		PERFORM pg_sleep(0.5);
	END IF;
	INSERT INTO public.ranges SELECT pg_current_xact_id(), count(*) FROM gone;
	RETURN NULL;
END $$;
EOC

# Make a table, fill it with $deltas, and fold it, the first of them at a $pace,
# 'slow' or 'fast'.  $meanwhile is called in the worker's second transaction.
#
# A session that waits in worker_spi_fold() has a snapshot, for which VACUUM
# FULL would keep the deleted rows, and so all others in their blocks.  So
# nobody waits then, and the end of the cycle shows in the view.
#
# On a machine that stands still for most of a second, the worker gives up on the
# lock, as it should, and all begins anew.
sub fold_and_meanwhile
{
	my ($definition, $deltas, $pace, $test, $meanwhile, $tries) = @_;

	new_table($node, 1, <<EOC);
CREATE TABLE %t $definition;
TRUNCATE ranges;
$deltas;
CREATE TRIGGER note_range AFTER DELETE ON %t REFERENCING OLD TABLE AS gone
	FOR EACH STATEMENT EXECUTE FUNCTION note_range('$pace');
ALTER TABLE %t ENABLE ALWAYS TRIGGER note_range
EOC
	my $wait = $test =~ /VACUUM/ ? 'false' : 'true';
	my $folds = worker($node, 1, 'fold_count');
	my $failures = worker($node, 1, 'failed_count');
	my $gate = $node->background_psql('postgres');
	$gate->query_safe('SELECT pg_advisory_lock(42)');
	my $folding = start_psql($node, 'postgres', 'folding',
		"SELECT worker_spi_fold(1, wait => $wait)");
	$node->poll_query_until('postgres',
		"SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted)"
	) or die 'the worker does not come to its second transaction';
	$meanwhile->($gate);
	$gate->quit;
	$node->poll_query_until('postgres',
		"SELECT fold_count > $folds AND state IN ('idle', 'backoff') FROM worker_spi_workers WHERE index = 1")
	  or die "the cycle does not end: $test";
	my $answer = join('', finish_psql($folding));
	if (worker($node, 1, 'failed_count') > $failures
		&& worker($node, 1, 'last_sqlstate') eq '55P03'
		&& ($tries //= 5) > 1)
	{
		diag("once more, after a lock timeout: $test");
		fold($node, 1);
		return fold_and_meanwhile($definition, $deltas, $pace, $test, $meanwhile,
			$tries - 1);
	}
	is($answer, 't1', "the fold returns: $test");
	is(worker($node, 1, 'fold_count'), $folds + 1, "one cycle: $test");
	return;
}

# Run $sql between the second transaction of a fold and the third.  Of each new
# table the worker folds 20,000 rows at first, and then, since that was slow, fewer.
my $n = 40_000;
my $deltas = "INSERT INTO %t (type, value) SELECT 'delta', n FROM generate_series(1, $n) AS n";

sub fold_and_disturb
{
	my ($sql) = @_;
	my $file;

	fold_and_meanwhile(
		$own_columns, $deltas, 'slow', $sql,
		sub {
			my ($gate) = @_;

			$file = $node->safe_psql('postgres',
				"SELECT pg_relation_filenode('schema1.counted')");
			my $disturbing = start_psql($node, 'postgres', 'disturbing', $sql);
			wait_for_psql($disturbing);
			$gate->query_safe('SELECT pg_advisory_unlock(42)');
			(undef, my $err, my $done) = finish_psql($disturbing);
			ok($done, "done between two transactions of a fold: $sql") or diag($err);
		});
	return $file;
}

my $file = fold_and_disturb('VACUUM FULL schema1.counted');
my $sum = $n * ($n + 1) / 2;
is($node->safe_psql('postgres', 'SELECT type, value FROM schema1.counted'),
	"total|$sum", 'nothing is left to fold');
is( $node->safe_psql('postgres',
		"SELECT pg_relation_filenode('schema1.counted') <> $file"),
	't',
	'though the table was rewritten');

foreach my $sql (
	'CREATE INDEX by_value ON schema1.counted (value DESC); CLUSTER schema1.counted USING by_value',
	'ALTER TABLE schema1.counted ALTER value TYPE integer USING (value % 1000)::integer',
	'ALTER TABLE schema1.counted SET UNLOGGED',
	"ALTER TABLE schema1.counted ADD more text GENERATED ALWAYS AS (repeat(type, 5)) STORED")
{
	fold_and_disturb($sql);

	my $expected = $sum;

	# The first two transactions have folded the first r numbers by then.
	$expected = $node->safe_psql('postgres', <<EOC) if $sql =~ /TYPE/;
SELECT r * (r + 1) / 2 % 1000 + (SELECT sum(n % 1000) FROM generate_series(r + 1, $n) AS n)
FROM (SELECT sum(rows)::bigint AS r FROM (SELECT rows FROM ranges ORDER BY xid LIMIT 2) AS two) AS first;
EOC
	is(rows($node, 1, 'type, value'), "total|$expected", "and nothing is left to fold: $sql");
	is($node->safe_psql('postgres', 'SELECT count(*) > 2 FROM ranges'),
		't', "after at least one more transaction: $sql");
}

fold_and_disturb('TRUNCATE schema1.counted');
is(rows($node, 1), '', 'what was truncated is gone, with nothing made up');
fold_and_disturb('DROP TABLE schema1.counted');
is(rows($node, 1), '', 'a table that is dropped meanwhile is made again');

is(worker($node, 1, 'pid'), $pid, 'one process of the worker has done all this');

my $before = worker($node, 1, 'folded_rows');
fold_and_meanwhile(
	$own_columns,
	"INSERT INTO %t SELECT 'delta', n FROM generate_series(1, 400000) AS n",
	'fast',
	'400,000 deltas',
	sub {
		my $progress = worker($node, 1, 'folded_rows') - $before;
		cmp_ok($progress, '>', 0, 'progress shows while the cycle runs');
		cmp_ok($progress, '<', 200_000, 'of one transaction by now');
		is(worker($node, 1, 'state'), 'folding', 'and so does the state');
		is($node->safe_psql('postgres', "SELECT sum(value) FROM schema1.counted"),
			'80000200000', 'the count is right in the middle');
	});
is(rows($node, 1), 'total|80000200000', 'many deltas make one total');
is( $node->safe_psql('postgres', <<'EOC'),
SELECT count(*) = count(DISTINCT xid), count(*) >= 3, max(rows) <= 250000, sum(rows) FROM ranges;
EOC
	't|t|t|400000',
	'they were folded in several transactions, none of them large');
is(worker($node, 1, 'folded_rows'), $before + 400_000, 'and each is counted once');

# Few deltas in many blocks are folded at once, but say nothing of blocks that are
# full of them.
new_table($node, 1, "CREATE TABLE %t $own_columns; TRUNCATE ranges");
foreach (1 .. 3)
{
	$node->safe_psql('postgres', <<'EOC');
INSERT INTO schema1.counted SELECT 'delta', n FROM generate_series(1, 300000) AS n;
DELETE FROM schema1.counted WHERE type = 'delta' AND value % 300 <> 0;
EOC
	folds('a table that is all but empty is folded');
}
$node->safe_psql('postgres', <<'EOC');
CREATE TRIGGER note_range AFTER DELETE ON schema1.counted REFERENCING OLD TABLE AS gone
	FOR EACH STATEMENT EXECUTE FUNCTION note_range();
ALTER TABLE schema1.counted ENABLE ALWAYS TRIGGER note_range;
INSERT INTO schema1.counted SELECT 'delta', 1 FROM generate_series(1, 600000) AS n;
EOC
folds('then a backlog comes');
is( $node->safe_psql('postgres',
		'SELECT rows < 100000 FROM ranges ORDER BY xid LIMIT 1'),
	't',
	'and its first transaction is not large');
is(rows($node, 1), 'total|451050000', 'nothing is lost');

# Six slow transactions in a row, and then few deltas in many blocks: the worker is
# not to go on block by block.
new_table($node, 1, "CREATE TABLE %t $own_columns; TRUNCATE ranges");
$node->safe_psql('postgres', <<'EOC');
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN PERFORM pg_sleep(0.4); RETURN NULL; END';
CREATE TRIGGER slow AFTER DELETE ON schema1.counted EXECUTE FUNCTION slow();
ALTER TABLE schema1.counted ENABLE ALWAYS TRIGGER slow;
EOC
foreach (1 .. 6)
{
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted VALUES ('delta', 1)");
	folds('a slow transaction');
}
$node->safe_psql('postgres', <<'EOC');
DROP TRIGGER slow ON schema1.counted;
INSERT INTO schema1.counted SELECT 'delta', n FROM generate_series(1, 1000000) AS n;
DELETE FROM schema1.counted WHERE type = 'delta' AND value % 1000 <> 0;
CREATE TRIGGER note_range AFTER DELETE ON schema1.counted REFERENCING OLD TABLE AS gone
	FOR EACH STATEMENT EXECUTE FUNCTION note_range();
ALTER TABLE schema1.counted ENABLE ALWAYS TRIGGER note_range;
EOC
folds('few deltas in many blocks are folded');
is( $node->safe_psql('postgres', 'SELECT count(*) < 100, sum(rows) FROM ranges'),
	't|1000', 'in few transactions');

$node->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES ('delta', 1)");
folds('after all that, the worker folds');
is(rows($node, 1), 'total|500500007', 'as it should');
is(worker($node, 1, 'pid'), $pid, 'in one process');

# ------------------------------------------------------------------------
# Naptime
# ------------------------------------------------------------------------
is( $node->safe_psql('postgres', <<'EOC'),
SELECT unit, min_val, max_val, context FROM pg_settings WHERE name = 'worker_spi.naptime';
EOC
	's|1|2147483|sighup',
	'naptime has a unit and limits');
foreach my $naptime (0, 2147484, 4294967)
{
	error_is(
		$node,
		'postgres',
		"ALTER SYSTEM SET worker_spi.naptime = $naptime",
		'22023',
		qr/outside the valid range for parameter "worker_spi\.naptime" \(1( s)? \.\. 2147483( s)?\)/,
		"a naptime of $naptime is refused");
}
$node->safe_psql('postgres',
	'ALTER SYSTEM SET worker_spi.naptime = 2147483; SELECT pg_reload_conf()');
$node->poll_query_until('postgres',
	"SELECT next_fold_time > now() + interval '24 days' FROM worker_spi_workers"
) or die 'the worker does not take the new naptime';
$node->safe_psql('postgres',
	"SELECT worker_spi_fold(1); INSERT INTO schema1.counted VALUES ('delta', 1)"
);
wait_for_state($node, 1, 'idle');
is( $node->safe_psql(
		'postgres',
		"SELECT next_fold_time BETWEEN now() + interval '2147000 s' AND now() + interval '2147483 s' FROM worker_spi_workers"
	),
	't',
	'the longest naptime is as long as it says');
is(rows($node, 1), "delta|1\ntotal|500500007", 'and not at once over');

$node->stop;
done_testing();
