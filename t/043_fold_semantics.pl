# What a fold does: deltas become sums, in whatever way they are folded, and at
# every instant sum(value) is the true count, whoever else writes to the totals.
# Races that are lost are run again in another way.  A large backlog is folded in
# several transactions, called shares; whatever happens to the tables between two
# of them, nothing is lost, and a share that takes too long is done in smaller ones.
#
# It waits for worker_spi_fold(), for lock waits where the worker is held up in its
# cycle, and for the statistics of the server.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('semantics', <<EOC);
worker_spi.total_workers = 1
autovacuum = off
autovacuum_naptime = 1
EOC
my $columns = "type text NOT NULL DEFAULT 'delta', value bigint NOT NULL";
my $fold = 'SELECT worker_spi_fold(1)';

sub sql
{
	my ($sql) = @_;
	return $node->safe_psql('postgres', $sql);
}

folds($node, 1, 'the worker makes its own tables');

# ------------------------------------------------------------------------
# Deltas, sums and NULLs
# ------------------------------------------------------------------------

sql(<<'EOC');
INSERT INTO schema1.counted VALUES ('delta', 1), ('total', 2);
INSERT INTO schema1.counted (value) VALUES (4);
EOC
folds($node, 1, 'deltas without a total are folded, whatever their type says');
is(rows($node, 1, 'type, value, tableoid::regclass'), 'total|7|schema1.total', 'the total that was missing is made');

# Who may insert writes deltas and nothing else.
sql(<<'EOC');
CREATE ROLE regress_client LOGIN;
GRANT USAGE ON SCHEMA schema1 TO regress_client;
GRANT INSERT ON schema1.counted TO regress_client;
INSERT INTO schema1.counted (value) VALUES (1000);
EOC
my @client = (extra_params => [ '-U', 'regress_client' ]);
$node->safe_psql('postgres', q(INSERT INTO schema1.counted VALUES ('total', 10)), @client);
error_is($node, 'postgres', $_, '42501', qr/permission denied/, "with INSERT alone there is no way to: $_", @client)
  foreach
  q(INSERT INTO schema1.total VALUES ('total', 1)), q(INSERT INTO schema1.stuck VALUES ('total', 1)),
  'UPDATE schema1.counted SET value = 0', 'DELETE FROM schema1.counted', 'TRUNCATE schema1.counted',
  'SELECT sum(value) FROM schema1.counted';
folds($node, 1, 'all deltas are folded');
is(rows($node, 1), 'total|1017', 'into the total');
sql('DELETE FROM schema1.counted');
folds($node, 1, 'nothing is folded where there is nothing');
is(rows($node, 1), '', 'a total that was deleted is not made again without deltas');

foreach my $type ('bigint', 'integer')
{
	my ($min, $max) = $type eq 'bigint' ? ('-9223372036854775808', '9223372036854775807') : (-2147483648, 2147483647);

	new_table($node, 1, "CREATE TABLE %t (type text, value $type)");
	foreach my $test (
		[ 'nothing but NULLs, without a total', [ 'NULL', 'NULL' ], 0 ],
		[ 'deltas that sum to 0',               [ -7, 7, 'NULL' ],  0 ],
		[ 'a negative sum',                     [ -10, 3 ],         -7 ],
		[ 'back over zero',                     [ 8, 'NULL', -1 ],  0 ],
		[ 'the largest number',                 [ $max, 0 ],        $max ],
		[ 'a sum that fits, though not that of some of them', [ $max, 1, "-$max", -1, "-$max" ], 0 ],
		[ 'the smallest number', [$min], $min ],
		[ 'NULLs',               ['NULL'], $min ])
	{
		my ($name, $deltas, $sum) = @$test;
		my $folded = worker($node, 1, 'folded_rows');

		sql('INSERT INTO schema1.counted (value) VALUES ' . join(', ', map { "($_)" } @$deltas));
		folds($node, 1, "$type: $name");
		is(rows($node, 1), "total|$sum", 'the total is right');
		is(worker($node, 1, 'folded_rows'), $folded + @$deltas, 'and the rows are counted');
	}
	sql('UPDATE schema1.total SET value = NULL; INSERT INTO schema1.counted VALUES (NULL, 5)');
	folds($node, 1, "$type: a total that is NULL");
	is(rows($node, 1), 'total|5', 'counts as 0');
}

# ------------------------------------------------------------------------
# Three ways to fold
# ------------------------------------------------------------------------

# Which way a share took, as long as nothing is stuck, is in the statement that
# deletes its deltas; what was rolled back leaves no trace.
sql(<<'EOC');
CREATE TABLE ways (way text);
CREATE FUNCTION note_way() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO public.ways
		SELECT CASE WHEN query LIKE 'DELETE %' THEN 'fast' WHEN query LIKE '%ctid = ANY ($5)%' THEN 'careful' ELSE 'safe' END
		FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid();
	RETURN NULL;
END $$;
EOC

# The columns of the children are in another order than those of counted; the totals
# have some of their own.
sub tables_of_mixed_order
{
	sql(<<'EOC');
BEGIN;
DROP TABLE IF EXISTS schema1.stuck, schema1.total, schema1.counted, ledger;
TRUNCATE ways;
CREATE TABLE schema1.counted (gone int, k text, value bigint, l int NOT NULL, seen date NOT NULL DEFAULT '-infinity', type text);
ALTER TABLE schema1.counted DROP gone;
CREATE TABLE schema1.total (gone text, id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, l int NOT NULL, note text DEFAULT 'new', value bigint,
	seen date NOT NULL DEFAULT '-infinity', type text, more int, k text,
	UNIQUE NULLS NOT DISTINCT (l, k), CONSTRAINT good CHECK (k <> 'bad'));
ALTER TABLE schema1.total DROP gone, INHERIT schema1.counted;
CREATE TABLE schema1.stuck (since timestamptz, type text, l int NOT NULL, reason text, gone int, k text, seen date NOT NULL DEFAULT '-infinity', sqlstate text, value bigint);
ALTER TABLE schema1.stuck DROP gone, INHERIT schema1.counted;
CREATE TABLE ledger (k text, l int, value bigint, seen date);
CREATE TRIGGER note_way AFTER DELETE ON schema1.counted EXECUTE FUNCTION note_way();
ALTER TABLE schema1.counted ENABLE ALWAYS TRIGGER note_way;
COMMIT;
EOC
	return;
}
my $insert = <<'EOC';
WITH new AS (INSERT INTO ledger
	SELECT nullif('k' || n % 7, 'k3'), n % 5, n, date '2024-01-01' + n % 20 FROM generate_series(1, 1000) AS n RETURNING *)
INSERT INTO schema1.counted (k, l, value, seen) TABLE new;
EOC

# How many totals are not what the ledger says.
my $differences = <<'EOC';
SELECT count(*) FROM (SELECT k, l, sum(value) AS value, max(seen) AS seen FROM ledger GROUP BY k, l) AS expected
FULL JOIN (SELECT k, l, value, seen FROM schema1.total) AS total USING (l, value, seen)
WHERE expected.k IS DISTINCT FROM total.k OR expected IS NULL OR total IS NULL;
EOC

tables_of_mixed_order();
sql($insert);
folds($node, 1, 'the fast way');
is(sql('SELECT DISTINCT way FROM ways'), 'fast', 'has been taken');
is(sql($differences), 0, 'all totals are right');
my $ids = "SELECT count(*), sum(id * (l + 10 * coalesce(ascii(right(k, 1)), 0))), count(note) FROM schema1.total WHERE id <= 35";
my $before = sql($ids);

sql("INSERT INTO schema1.counted (k, l, value) VALUES ('bad', 1, 1); TRUNCATE ways");
error_is($node, 'postgres', $fold, '23514', qr/"good"/, 'a key is stuck');
is(sql('SELECT DISTINCT way FROM ways'), 'careful', 'which is found out carefully');
sql("$insert TRUNCATE ways");
error_is($node, 'postgres', $fold, '23514', qr/"good"/, 'the safe way');
is(sql('SELECT count(*) FROM ways'), '1', 'has been taken, with all keys at once');
is(sql($differences), 0, 'all totals are right');

{
	my $holder = $node->background_psql('postgres');
	$holder->query_safe('BEGIN; SELECT FROM schema1.total WHERE k IS NULL AND l = 1 FOR UPDATE');
	sql("$insert TRUNCATE ways");
	error_is($node, 'postgres', $fold, '55P03', qr/could not fold all/, 'the careful way');
	is(sql('SELECT DISTINCT way FROM ways'), 'careful', 'has been taken');
	is(sql($differences), 2, 'all totals but the one that is locked are right');
	$holder->quit;
}
error_is($node, 'postgres', $fold, '23514', qr/"good"/, 'that one as well');
is(sql($differences), 0, 'when it is free');
sql(q(INSERT INTO ledger SELECT k, l, value, seen FROM schema1.stuck; ALTER TABLE schema1.total DROP CONSTRAINT good));
folds($node, 1, 'and what was stuck');
is(sql($differences), 0, 'is folded right');
is(sql($ids), $before, 'columns of their own are as they were');

# ------------------------------------------------------------------------
# Races that are lost
# ------------------------------------------------------------------------

# The first statements that write totals fail as if they had lost a race.
tables_of_mixed_order();
sql(<<'EOC');
CREATE SEQUENCE races;
CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF nextval('public.races') <= TG_ARGV[1]::int THEN
		RAISE 'lost' USING ERRCODE = TG_ARGV[0];
	END IF;
	RETURN NULL;
END $$;
EOC
my $failed = worker($node, 1, 'failed_count');
foreach my $test (
	(map { [ $_, 1, 'safe' ], [ $_, 2, 'careful' ] } '40001', '40P01', '23505'),
	[ '55P03', 1, 'careful' ], [ '23514', 1, 'careful' ])
{
	my ($sqlstate, $times, $way) = @$test;

	sql(<<EOC);
CREATE OR REPLACE TRIGGER lose AFTER INSERT OR UPDATE ON schema1.total EXECUTE FUNCTION lose('$sqlstate', $times);
ALTER TABLE schema1.total ENABLE ALWAYS TRIGGER lose;
SELECT setval('races', 1, false);
TRUNCATE ways;
$insert
EOC
	folds($node, 1, "after $sqlstate, $times times, the fold goes through");
	is(sql('SELECT DISTINCT way FROM ways'), $way, "in the $way way");
	is(sql($differences) . worker($node, 1, 'stuck_rows'), '00', 'all totals are right, and nothing is stuck');
}
is(worker($node, 1, 'failed_count'), $failed, 'no cycle has failed');

# Clients that update, make and delete totals all the time, beside those that insert
# deltas.  Each statement writes the same to the ledger.  A reader whose snapshot does
# not agree with the ledger, or with itself after more folds, divides by zero.
new_table($node, 1, "CREATE TABLE %t ($columns, k int NOT NULL)", key => 'PRIMARY KEY (k)',
	total => 'DROP TABLE ledger; CREATE TABLE ledger (k int, value bigint)');
folds($node, 1, 'other tables are taken');
my $random = "\\set v random(-1000, 1000)\n\\set k random(1, 5)\n";
my $count = worker($node, 1, 'fold_count');
my $bench = start_pgbench(
	$node,
	[ '-c', 5, '-t', 300 ],
	[ $random . "WITH w AS (INSERT INTO schema1.counted (value, k) VALUES (:v, :k)) INSERT INTO ledger VALUES (:k, :v);\n", 6 ],
	[ $random . "WITH w AS (UPDATE schema1.total SET value = value + :v WHERE k = :k RETURNING k) INSERT INTO ledger SELECT k, :v FROM w;\n", 4 ],
	[ $random . "WITH w AS (INSERT INTO schema1.total VALUES ('total', :v, :k) ON CONFLICT (k) DO UPDATE SET value = total.value + excluded.value) INSERT INTO ledger VALUES (:k, :v);\n", 2 ],
	[ $random . "WITH w AS (DELETE FROM schema1.total WHERE k = :k RETURNING value) INSERT INTO ledger SELECT :k, -value FROM w;\n", 1 ],
	[ "SELECT worker_spi_fold(1, wait => false);\n", 3 ],
	[ <<'EOC', 2 ]);
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SELECT coalesce(sum(value), 0) AS counted FROM schema1.counted \gset
SELECT coalesce(sum(value), 0) AS ledger FROM ledger \gset
SELECT worker_spi_fold(1, wait => false);
SELECT coalesce(sum(value), 0) AS again FROM schema1.counted \gset
END;
SELECT 1 / (:counted = :ledger AND :counted = :again)::int;
EOC
my (undef, $err, $success) = finish_psql($bench);
ok($success, 'in no snapshot is sum(value) wrong, while others write and the worker folds') or diag($err);
is(worker($node, 1, "failed_count = $failed OR last_sqlstate = '55P03'"),
	't', 'no cycle has failed, unless this machine stood still');
cmp_ok(worker($node, 1, 'fold_count'), '>', $count + 20, 'there were many');
folds($node, 1, 'what is left is folded');
is( sql('SELECT k, sum(value) FROM ledger GROUP BY k HAVING sum(value) <> 0 EXCEPT SELECT k, value FROM schema1.total'),
	'', 'and all totals are right');
is(sql('SELECT count(*) FROM schema1.counted'), sql('SELECT count(*) FROM schema1.total'), 'with nothing left');

# ------------------------------------------------------------------------
# Many deltas, and what happens between two shares
# ------------------------------------------------------------------------

# Some 1,500 blocks of deltas, more than a new process takes at once.  A trigger
# notes each share.  After the first $free of them it waits for us to let go of an
# advisory lock; the function's own setting is there because the worker's lock_timeout
# may be short for a slow machine.  If it waits for more than 3 s, the share is given
# up and is done in smaller ones, which wait as well.
my $rows = 6000;
sql(<<'EOC');
CREATE TABLE shares (rows bigint);
CREATE FUNCTION note_share() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = 0 AS $$
BEGIN
	IF (SELECT count(*) FROM public.shares) >= TG_ARGV[0]::int THEN
		PERFORM pg_advisory_xact_lock_shared(42);
	END IF;
	INSERT INTO public.shares SELECT count(*) FROM gone;
	RETURN NULL;
END $$;
EOC

# Have a new process of the worker fold such tables, and call $meanwhile while it waits.
sub fold_and_meanwhile
{
	my ($free, $meanwhile) = @_;
	my $gate = $node->background_psql('postgres');

	$gate->query_safe('SELECT pg_advisory_lock(42)');
	sql('SELECT worker_spi_stop(1)');
	new_table($node, 1, <<EOC);
CREATE TABLE %t ($columns);
CREATE TRIGGER note AFTER DELETE ON %t REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION note_share('$free');
ALTER TABLE %t ENABLE ALWAYS TRIGGER note;
TRUNCATE shares;
INSERT INTO %t SELECT repeat('x', 1900), 1 FROM generate_series(1, $rows)
EOC
	sql('SELECT worker_spi_launch(1)');
	$node->poll_query_until('postgres',
		"SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted)")
	  or die 'the worker does not wait in its share';
	$meanwhile->($gate);
	$gate->quit;
	return;
}

# Run $sql between the first share and the second.  Nobody has asked the worker to fold:
# one cycle has to do.
sub disturb
{
	my ($sql) = @_;

	fold_and_meanwhile(
		0,
		sub {
			my ($gate) = @_;

			# It waits for the share; or, if that was given up meanwhile, it is done.
			$gate->query_safe('SELECT pg_advisory_lock(43)');
			my $disturbing = start_psql($node, 'postgres', 'disturbing',
				'SELECT pg_advisory_lock(43)', '-c', $sql);
			wait_for_psql($disturbing);
			$gate->query_safe('SELECT pg_advisory_unlock_all()');
			(undef, my $err, my $done) = finish_psql($disturbing);
			ok($done, "done between two shares: $sql") or diag($err);
		});
	return;
}

foreach my $sql (
	'VACUUM FULL schema1.counted',
	'CREATE INDEX by_type ON schema1.counted (type); CLUSTER schema1.counted USING by_type',
	'ALTER TABLE schema1.counted SET UNLOGGED',
	'ALTER TABLE schema1.counted ALTER value TYPE integer',
	'ALTER TABLE schema1.counted ADD hits bigint NOT NULL DEFAULT 0, ADD twice bigint GENERATED ALWAYS AS (value * 2) STORED',
	'VACUUM FULL schema1.total',
	'REINDEX TABLE schema1.total')
{
	disturb($sql);
	wait_for_fold($node, 1);
	is(sql('SELECT type, value FROM schema1.counted'), "total|$rows", 'all is folded, and once');
	is(sql('SELECT count(*) > 1, sum(rows) FROM shares'), "t|$rows", 'in several shares');
}

disturb('TRUNCATE ONLY schema1.counted');
wait_for_fold($node, 1);
is(rows($node, 1), sql(q(SELECT 'total|' || sum(rows) FROM shares)), 'what was truncated is gone, and no more');

# What makes the cycle fail loses nothing.
foreach my $test (
	[
		'ALTER TABLE schema1.counted ADD page text', '42P16', qr/"page"/,
		'ALTER TABLE schema1.counted DROP page'
	],
	[
		'ALTER TABLE schema1.counted RENAME TO elsewhere', '42P01', qr/"postgres\.schema1\.counted"/,
		'ALTER TABLE schema1.elsewhere RENAME TO counted'
	],
	[
		'ALTER TABLE schema1.total ADD CHECK (value < 0) NOT VALID', '23514', qr/check constraint/,
		'ALTER TABLE schema1.total DROP CONSTRAINT total_value_check'
	])
{
	my ($sql, $sqlstate, $pattern, $cure) = @$test;
	my $counted = $sql =~ /elsewhere/ ? 'elsewhere' : 'counted';

	disturb($sql);
	error_is($node, 'postgres', $fold, $sqlstate, $pattern, 'the cycle fails, or deltas are stuck');
	is(sql("SELECT sum(value) FROM schema1.$counted"), $rows, 'nothing is lost');
	sql($cure);
	folds($node, 1, 'when that is undone, the fold goes through');
	is(rows($node, 1), "total|$rows", 'and all is folded, once');
}

# In a long cycle each share shows at once.
$count = worker($node, 1, 'fold_count');
my $folded = worker($node, 1, 'folded_rows');
fold_and_meanwhile(
	1,
	sub {
		my ($total) = sql('SELECT value FROM schema1.total');
		is(worker($node, 1, 'state, folded_rows'), 'folding|' . ($folded + $total), 'the view shows what is folded by now');
		cmp_ok($total, '<', $rows, 'which is not all');
		is(sql('SELECT sum(value) FROM schema1.counted'), $rows, 'and the sum is right in the middle');
	});
folds($node, 1, 'it goes on');
is(rows($node, 1), "total|$rows", 'to the end');
is(worker($node, 1, 'fold_count, folded_rows'), ($count + 1) . '|' . ($folded + $rows), 'of one cycle');

# A share that takes more than 3 s is given up, and done again in smaller ones.
$failed = worker($node, 1, 'failed_count');
sql(<<'EOC');
SELECT worker_spi_stop(1);
CREATE SEQUENCE slowed;
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
	$$ BEGIN PERFORM nextval('public.slowed'), pg_sleep(0.002); RETURN NULL; END $$;
CREATE TRIGGER slow AFTER DELETE ON schema1.counted FOR EACH ROW EXECUTE FUNCTION slow();
ALTER TABLE schema1.counted ENABLE ALWAYS TRIGGER slow;
TRUNCATE shares;
TRUNCATE schema1.counted;
INSERT INTO schema1.counted SELECT repeat('x', 1900), 1 FROM generate_series(1, 2000);
SELECT worker_spi_launch(1);
EOC
folds($node, 1, 'a share that takes too long');
is(sql('SELECT max(rows) <= 1000, sum(rows) FROM shares'), 't|2000', 'is done in smaller ones');
is(sql(q(SELECT nextval('slowed') > 2001)), 't', 'after it was given up');
is(rows($node, 1), 'total|2000', 'and counted once');
is(worker($node, 1, 'failed_count'), $failed, 'which fails no cycle');

# ------------------------------------------------------------------------
# Statistics and autovacuum
# ------------------------------------------------------------------------

sql('SELECT worker_spi_stop(1); DROP SCHEMA schema1 CASCADE; SELECT worker_spi_launch(1)');
sql("INSERT INTO schema1.counted SELECT 'delta', 1 FROM generate_series(1, 11000)");
folds($node, 1, 'the worker\'s own tables again');
sql('INSERT INTO schema1.counted (value) VALUES (1)');
folds($node, 1, 'and once more');
$node->poll_query_until('postgres', <<'EOC')
SELECT (SELECT n_tup_del = 11001 AND n_dead_tup > 11000 FROM pg_stat_user_tables WHERE relid = 'schema1.counted'::regclass)
	AND (SELECT n_tup_ins = 1 AND n_tup_upd >= 1 FROM pg_stat_user_tables WHERE relid = 'schema1.total'::regclass)
EOC
  or die 'statistics are not reported';
sql('ALTER SYSTEM SET autovacuum = on; SELECT pg_reload_conf()');
$node->poll_query_until('postgres',
	"SELECT autovacuum_count > 0 FROM pg_stat_user_tables WHERE relid = 'schema1.counted'::regclass")
  or die 'autovacuum has not come';
pass('autovacuum comes when deltas were folded, though the table is small');

$node->stop;
done_testing();
