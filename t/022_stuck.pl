# One bad counter never stops the rest.  Sums that do not fit, and keys that an
# index, a constraint or code of the owner's refuses, are moved to stuck: the count
# stays right, all else is folded in the same cycle, and what is stuck is folded
# without anybody's help when the cause is gone.  What somebody holds locked stays
# where it is.  An error that all keys have is the table's, and moves nothing.
#
# What has to happen by itself is waited for in the view and in the tables;
# everything else is done when worker_spi_fold() returns.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('stuck', <<EOC);
worker_spi.total_workers = 1
worker_spi.wake_delay = 0
restart_after_crash = on
autovacuum = off
EOC
my $columns = "type text NOT NULL DEFAULT 'delta', value bigint NOT NULL";
my $max = '9223372036854775807';
my $fold = 'SELECT worker_spi_fold(1)';

sub sql
{
	my ($sql) = @_;
	return $node->safe_psql('postgres', $sql);
}

# Tables with a key k, of which the totals refuse those like 'bad%'.
sub keyed_tables
{
	new_table($node, 1, "CREATE TABLE %t ($columns, k text NOT NULL)",
		key => q(PRIMARY KEY (k), CONSTRAINT good CHECK (k NOT LIKE 'bad%')));
	return;
}

# Code of the owner's for each row that is written to this table.
sub add_code
{
	my ($table, $code) = @_;
	sql(<<EOC);
CREATE OR REPLACE FUNCTION code() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	$code
	RETURN NULL;
END \$\$;
CREATE TRIGGER code AFTER INSERT OR UPDATE ON schema1.$table FOR EACH ROW EXECUTE FUNCTION code();
ALTER TABLE schema1.$table ENABLE ALWAYS TRIGGER code;
EOC
	return;
}

# A fold fails with this error.
sub fails
{
	my ($sqlstate, $pattern, $test) = @_;
	error_is($node, 'postgres', $fold, $sqlstate, $pattern, $test);
	return;
}

# How often a pattern is in the log since $offset.
sub in_log
{
	my ($offset, $pattern) = @_;
	my @found = slurp_file($node->logfile, $offset) =~ /$pattern/g;
	return scalar(@found);
}

# All rows in stuck.
sub stuck
{
	my ($columns) = @_;
	$columns //= 'left(k, 7), value, sqlstate';
	return sql("SELECT $columns FROM schema1.stuck ORDER BY 1, 2");
}

# Have what is stuck tried so often that the next try is a minute away.
sub make_patient
{
	my ($sqlstate) = @_;
	fails($sqlstate, qr/./, "try $_") foreach 1 .. 7;
	wait_for_nap($node, 1);
	return;
}

# ------------------------------------------------------------------------
# Without keys: there is one counter, and all its deltas are judged together
# ------------------------------------------------------------------------

folds($node, 1, 'the worker makes its own tables');
sql("INSERT INTO schema1.counted (value) VALUES ($max - 1)");
folds($node, 1, 'a large total is folded');
my $offset = -s $node->logfile;
my $until = worker($node, 1, 'folded_until');
sql("INSERT INTO schema1.counted VALUES ('of mine', 3), ('total', 4)");
fails('22003', qr/bigint out of range/, 'a total that does not fit is an error');
is( rows($node, 1, 'value, type, tableoid::regclass'),
	"7|delta|schema1.stuck\n9223372036854775806|total|schema1.total",
	'its deltas are stuck, in one row');
is(stuck('sqlstate, reason, since < now()'), '22003|bigint out of range|t', 'which says why');
is(total($node, 1), '9223372036854775813', 'and the sum is right');
wait_for_state($node, 1, 'idle');
is( worker($node, 1, "stuck_rows, failed_count, last_sqlstate, last_error, folded_until > '$until'"),
	'1|0|22003|bigint out of range|t',
	'the view says so, though no cycle has failed');
is(in_log($offset, qr/LOG:  worker_spi worker 1: the count in postgres\.schema1\.counted is stuck: bigint out of range \(SQLSTATE 22003\)/),
	1, 'and the log once');

# More than a row can hold, and then less.
sql("INSERT INTO schema1.counted (value) VALUES ($max), ($max), ($max - 5)");
fails('22003', qr/bigint out of range/, 'what joins it does not fit in one row');
is( sql("SELECT count(*), sum(value) = 3 * numeric '$max' + 2, count(DISTINCT since) FROM schema1.stuck"),
	'4|t|1', 'so it is split, into as few as hold it');
sql("INSERT INTO schema1.counted (value) VALUES (-$max)");
fails('22003', qr/bigint out of range/, 'a delta makes some of it good');
is(stuck("count(*), sum(value) = 2 * numeric '$max' + 2"), '3|t', 'and there are fewer');
sql("INSERT INTO schema1.counted (value) VALUES (-$max), (-$max), (-1)");
folds($node, 1, 'others make all of it good');
is(rows($node, 1), "total|$max", 'and the total is right');
is(in_log($offset, qr/ is stuck: /), 1, 'nothing else was news to the log');
is(in_log($offset, qr/LOG:  worker_spi worker 1: the count in postgres\.schema1\.counted is no longer stuck/),
	1, 'but that it is over');
is(worker($node, 1, 'stuck_rows, failed_count'), '0|0', 'and nothing is stuck');

# ------------------------------------------------------------------------
# With keys: each kind of bad one, among a hundred good ones
# ------------------------------------------------------------------------

keyed_tables();
add_code('total', q(IF NEW.k = 'cursed' THEN RAISE 'a curse'; END IF;));
sql(<<'EOC');
CREATE DOMAIN nice AS text CHECK (VALUE <> 'ugly');
ALTER TABLE schema1.total ADD nice nice GENERATED ALWAYS AS (k) STORED;
EOC
my $long = q((SELECT string_agg(md5(n::text), '') FROM generate_series(1, 300) AS n));
my $round = 0;
foreach my $test (
	[ 'a sum that does not fit', '22003', qr/bigint out of range/,
		"'over'", [ $max, 1 ], "over|4611686018427387904|22003\nover|4611686018427387904|22003",
		"INSERT INTO schema1.counted (value, k) VALUES (-$max, 'over')", 'over|1' ],
	[ 'a key that a constraint refuses', '23514', qr/violates check constraint "good"/,
		"'bad'", [ 1, 2 ], 'bad|3|23514', 'ALTER TABLE schema1.total DROP CONSTRAINT good', 'bad|3' ],
	[ 'a key that a domain refuses', '23514', qr/value for domain (public\.)?nice violates/,
		"'ugly'", [ 1, 2 ], 'ugly|3|23514', q(UPDATE schema1.stuck SET k = 'pretty'), 'pretty|3' ],
	[ 'a key that code refuses', 'P0001', qr/a curse/,
		"'cursed'", [ 1, 2 ], 'cursed|3|P0001', 'DROP TRIGGER code ON schema1.total', 'cursed|3' ],
	[ 'a key that is too long for an index', '54000', qr/index row/,
		$long, [3], 'c4ca423|3|54000', 'DELETE FROM schema1.stuck', '' ])
{
	my ($name, $sqlstate, $pattern, $key, $values, $stuck, $cure, $total) = @$test;
	my $good = q(INSERT INTO schema1.counted (value, k) SELECT 1, 'k' || n % 100 FROM generate_series(1, 5000) AS n);

	$offset = -s $node->logfile;
	$round++;
	sql(join('; ', $good, (map { "INSERT INTO schema1.counted (value, k) VALUES ($_, $key)" } @$values), $good));
	my $sum = total($node, 1);
	fails($sqlstate, $pattern, "a fold raises the error of $name");
	is(stuck(), $stuck, "$name is stuck");
	is( sql(q(SELECT count(*), min(value), max(value) FROM schema1.total WHERE k LIKE 'k%')) . '|' . deltas($node, 1),
		join('|', 100, 100 * $round, 100 * $round, 0), 'and all else is folded');
	is(total($node, 1), $sum, 'the sum is as it was');
	is( worker($node, 1, 'stuck_rows, failed_count, last_sqlstate'),
		split(/\n/, $stuck) . "|0|$sqlstate", 'the view says so');
	fails($sqlstate, $pattern, 'the next fold tries it again');
	is(stuck(), $stuck, 'and leaves it as it was');
	is( in_log($offset, qr/LOG: .*: key \([^\n]* of postgres\.schema1\.counted is stuck: .*\(SQLSTATE $sqlstate\)/),
		1, 'the log has named it once');
	sql($cure);
	folds($node, 1, "$name is cured by " . ($cure =~ s/ .*//r));
	is(sql(q(SELECT k, value FROM schema1.total WHERE k NOT LIKE 'k%')), $total, 'and folded right');
	is(in_log($offset, qr/ is no longer stuck|: nothing of .* is stuck any more/), 1, 'which the log says once');
	is(worker($node, 1, 'stuck_rows, failed_count'), '0|0', 'and nothing is stuck');
	sql(q(DELETE FROM schema1.total WHERE k NOT LIKE 'k%'));
}

# ------------------------------------------------------------------------
# What joins a key that is stuck
# ------------------------------------------------------------------------

# Equal keys need not be identical; NULLs are equal.
sql(<<'EOC');
DO $$ BEGIN CREATE EXTENSION citext; EXCEPTION WHEN OTHERS THEN CREATE DOMAIN citext AS text; END $$;
DO $$ BEGIN CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
EXCEPTION WHEN OTHERS THEN NULL; END $$;
EOC
my @types = ([ 'numeric', '1.0', '1.00', '2' ], [ 'text', 'NULL', 'NULL', q('NULL') ], [ 'float8', q('-0'), q('0'), '1' ]);
push @types, [ 'citext', q('A'), q('a'), q('b') ]
  if sql(q(SELECT to_regtype('citext') IS NOT NULL AND typtype = 'b' FROM pg_type WHERE typname = 'citext')) eq 't';
push @types, [ 'text COLLATE nocase', q('A'), q('a'), q('b') ]
  if sql(q(SELECT to_regcollation('nocase') IS NOT NULL)) eq 't';
foreach my $test (@types)
{
	my ($type, $first, $equal, $other) = @$test;

	new_table($node, 1, "CREATE TABLE %t ($columns, k $type)",
		key => 'UNIQUE NULLS NOT DISTINCT (k), CONSTRAINT small CHECK (value < 100)');
	$offset = -s $node->logfile;
	sql("INSERT INTO schema1.counted (value, k) VALUES (99, $first), (1, $equal)");
	fails('23514', qr/"small"/, "a key of type $type is stuck");
	sql("INSERT INTO schema1.counted (value, k) VALUES (2, $equal), (4, $first), (8, $other)");
	fails('23514', qr/"small"/, 'and again');
	is( sql('SELECT value, tableoid::regclass FROM schema1.counted ORDER BY value'),
		"8|schema1.total\n106|schema1.stuck", "$type: it is joined by what is equal, and by nothing else");
	is(in_log($offset, qr/ is stuck: /), 1, 'and is one key for the log');
	sql('ALTER TABLE schema1.total DROP CONSTRAINT small');
	folds($node, 1, "$type: without the cause all is folded");
	is(sql('SELECT value FROM schema1.total ORDER BY value'), "8\n106", 'into two totals');
}

# While nothing is tried again, each share adds a row.
keyed_tables();
sql(<<'EOC');
CREATE TRIGGER wake AFTER INSERT ON schema1.counted EXECUTE FUNCTION worker_spi_wake();
INSERT INTO schema1.counted (value, k) VALUES (1, 'bad');
EOC
fails('23514', qr/"good"/, 'a key is stuck');
sql("INSERT INTO schema1.counted (value, k) VALUES ($max, 'over'), ($max, 'over')");
make_patient('23514');
my $refusal = 'new row for relation "total" violates check constraint "good"';
my $since = sql(q(SELECT since FROM schema1.stuck WHERE k = 'bad'));
foreach my $n (1, 2)
{
	sql("INSERT INTO schema1.counted VALUES ('mine', 10, 'bad'), ('total', 20, 'bad'), ('delta', 40, 'good')");
	$node->poll_query_until('postgres', 'SELECT NOT EXISTS (SELECT FROM ONLY schema1.counted)')
	  or die 'the worker was not woken';
	is( sql(q(SELECT value, type, sqlstate, reason FROM schema1.stuck WHERE k = 'bad' ORDER BY value)),
		join("\n", map { "$_|delta|23514|$refusal" } 1, (30) x $n),
		'deltas that join a key are one row a share, which says what the first says');
	is(sql(q(SELECT DISTINCT since FROM schema1.stuck WHERE k = 'bad')), $since, 'since when it is stuck');
}
is(sql(q(SELECT value FROM schema1.total WHERE k = 'good')), '80', 'and nothing else joins it');
fails('23514', qr/"good"/, 'when it is tried again');
is(sql(q(SELECT value, since FROM schema1.stuck WHERE k = 'bad')), "61|$since", 'there is one row, since the same time');
is(sql(q(SELECT count(*) FROM schema1.stuck WHERE k = 'over')), 2, 'and what takes two has two');

# ------------------------------------------------------------------------
# When it is tried again, and a restart meanwhile
# ------------------------------------------------------------------------

# The delay doubles.  How long it is can be seen from below; from above only as
# far as the worker is not to have tried by itself too often.
keyed_tables();
sql(q(INSERT INTO schema1.counted (value, k) VALUES (1, 'bad')));
foreach my $try (1 .. 8)
{
	my $delay = $try < 7 ? 2**($try - 1) : 60;
	my $limit = $try < 5 ? 50 : 60;

	is( scalar($node->psql('postgres', <<EOC, on_error_stop => 0)), 0, "try $try: the next one is $delay s later");
SELECT clock_timestamp() AS before \\gset
SELECT worker_spi_fold(1);
\\set ON_ERROR_STOP 1
SELECT 1 / (next_fold_time >= timestamptz :'before' + interval '$delay s'
	AND next_fold_time <= clock_timestamp() + interval '$limit s')::int FROM worker_spi_workers;
EOC
}
wait_for_state($node, 1, 'idle');
is(worker($node, 1, 'failed_count'), 0, 'no cycle has failed');

# The process and the server may go: stuck is a table.
$offset = -s $node->logfile;
my $pid = worker($node, 1, 'pid');
my $n = 0;
foreach my $test (
	[ 'a restart of the worker', sub { sql("SELECT pg_terminate_backend($pid)") } ],
	[ 'a crash', sub { ok(crash($node, $pid), 'the worker crashes') } ],
	[ 'a restart of the server', sub { $node->restart } ])
{
	my ($name, $restart) = @$test;

	$n++;
	sql(q(INSERT INTO schema1.counted (value, k) VALUES (1, 'bad'), (1, 'good')));
	$restart->();
	$pid = wait_for_restart($node, 1, $pid);
	is(sql('SELECT k, sum(value), tableoid::regclass FROM schema1.counted GROUP BY 1, 3 ORDER BY 1'),
		'bad|' . ($n + 1) . "|schema1.stuck\ngood|$n|schema1.total", "after $name the worker goes on as before");
	cmp_ok(worker($node, 1, 'stuck_rows'), '>', 0, "and the view shows what is stuck: $name");
}
is(in_log($offset, qr/ is stuck: /), 0, 'that is no news to the log');
sql('ALTER TABLE schema1.total DROP CONSTRAINT good');
wait_for_fold($node, 1);
is(rows($node, 1, 'k, value, type'), "bad|4|total\ngood|3|total", 'without the cause all is folded, without help');

# So it is when rows in stuck are mended or deleted.
keyed_tables();
sql(q(INSERT INTO schema1.counted (value, k) VALUES (1, 'bad'), (2, 'bad too'), (4, 'bad as well')));
fails('23514', qr/"good"/, 'three keys are stuck');
sql(q(UPDATE schema1.stuck SET k = 'good', value = 3 WHERE k = 'bad'; DELETE FROM schema1.stuck WHERE k = 'bad too'));
$node->poll_query_until('postgres', q(SELECT EXISTS (SELECT FROM schema1.total WHERE k = 'good')))
  or die 'what was mended is not folded';
is(rows($node, 1, 'k, value, type'), "bad as well|4|delta\ngood|3|total", 'what is mended is folded, without help');
$offset = -s $node->logfile;
sql('DELETE FROM schema1.stuck');
$node->poll_query_until('postgres', 'SELECT stuck_rows = 0 FROM worker_spi_workers')
  or die 'it is not noticed that stuck is empty';
ok($node->log_contains(qr/nothing of postgres\.schema1\.counted is stuck any more/, $offset), 'and that all else is deleted is noticed');
folds($node, 1, 'then nothing is left');

# ------------------------------------------------------------------------
# Locks
# ------------------------------------------------------------------------

# Totals and deltas that somebody holds, and totals that are not yet committed.
keyed_tables();
sql(<<'EOC');
INSERT INTO schema1.counted (value, k) SELECT 1, 'k' || n FROM generate_series(0, 99) AS n;
INSERT INTO schema1.counted (value, k) VALUES (1, 'bad');
EOC
make_patient('23514');
{
	my $holder = $node->background_psql('postgres');

	sql(q(INSERT INTO schema1.counted (value, k) VALUES (7, 'held')));
	$holder->query_safe(<<'EOC');
BEGIN;
SELECT FROM schema1.total WHERE k IN ('k5', 'k7') FOR UPDATE;
SELECT FROM ONLY schema1.counted WHERE k = 'held' FOR UPDATE;
INSERT INTO schema1.total VALUES ('total', 100, 'new');
EOC
	sql(<<'EOC');
INSERT INTO schema1.counted (value, k) SELECT 1, 'k' || n % 100 FROM generate_series(1, 1000) AS n;
INSERT INTO schema1.counted (value, k) VALUES (1, 'new'), (2, 'held'), (1, 'bad');
EOC
	my $failed = worker($node, 1, 'failed_count');
	$offset = -s $node->logfile;
	fails('55P03', qr/could not fold all of "postgres\.schema1\.counted".*All else is folded/s,
		'a fold raises that rows are locked, before what is stuck');
	is( sql('SELECT k, sum(value) FROM ONLY schema1.counted GROUP BY k ORDER BY k'),
		"held|7\nk5|10\nk7|10\nnew|1", 'they stay where they are');
	is( sql(q(SELECT sum(value) FROM schema1.total WHERE k <> 'new')), 100 + 980 + 2, 'and all else is folded');
	is(stuck(), 'bad|2|23514', 'or joins what is stuck');
	cmp_ok(worker($node, 1, 'failed_count'), '>', $failed, 'the cycle has failed');
	like(slurp_file($node->logfile, $offset), qr/folded 981 rows into/, 'and what it has folded is told');
	$holder->query_safe('COMMIT');
	$holder->quit;
	$node->poll_query_until('postgres', 'SELECT NOT EXISTS (SELECT FROM ONLY schema1.counted)')
	  or die 'the rows that were locked are not folded';
	is(sql(q(SELECT k, value FROM schema1.total WHERE k IN ('held', 'new', 'k5', 'k7') ORDER BY k)),
		"held|9\nk5|11\nk7|11\nnew|101", 'once they are free, they are folded without help');
}

# A lock on the table.
{
	my $holder = $node->background_psql('postgres');

	sql(q(INSERT INTO schema1.counted (value, k) VALUES (1, 'k1')));
	$holder->query_safe('BEGIN; LOCK TABLE schema1.counted IN SHARE MODE');
	fails('55P03', qr/lock timeout/, 'a lock on the table fails the cycle');
	is(stuck() . '|' . deltas($node, 1), 'bad|2|23514|1', 'which moves nothing');
	$holder->quit;
}
fails('23514', qr/"good"/, 'without it all is well, but for what was stuck');

# ------------------------------------------------------------------------
# Errors of the table, and of many keys
# ------------------------------------------------------------------------

# Of all keys, whatever is stuck already.  Those of the classes 22, 23 and 54 are
# the keys'; those of a few others are never.
foreach my $test (
	[ 'that all keys have',                      q(RAISE 'curse'),                                          'P0001', 0 ],
	[ 'that the server has, over one key alone', q(IF NEW.k = 'k0' THEN RAISE SQLSTATE 'XX000'; END IF),      'XX000', 0 ],
	[ 'that differs from key to key',            q(RAISE 'curse' USING ERRCODE = 'P010' || right(NEW.k, 1)), '23514', 3 ],
	[ 'of data that all keys have',              q(RAISE SQLSTATE '22000'),                                  '23514', 3 ])
{
	my ($name, $code, $sqlstate, $moved) = @$test;

	keyed_tables();
	sql(q(INSERT INTO schema1.counted (value, k) VALUES (1, 'bad')));
	fails('23514', qr/"good"/, 'a key is stuck');
	my $failed = worker($node, 1, 'failed_count');
	add_code('total', "$code;");
	sql(q(INSERT INTO schema1.counted (value, k) SELECT n, 'k' || n % 3 FROM generate_series(1, 30) AS n));
	fails($sqlstate, qr/./, "an error $name");
	is( deltas($node, 1) . '|' . stuck('count(*), sum(value)'),
		$moved ? '0|4|466' : '30|1|1', $moved ? 'moves each key' : 'moves nothing');
	cmp_ok(worker($node, 1, 'failed_count'), $moved ? '==' : '>', $failed,
		$moved ? 'and fails no cycle' : 'and fails the cycle');
	is(total($node, 1), 466, 'the sum is as it was');
	sql('DROP TRIGGER code ON schema1.total');
	$node->poll_query_until('postgres', 'SELECT sum(value) = 465 FROM schema1.total')
	  or die "not folded: $name";
	is(stuck(), 'bad|1|23514', 'without it all is folded, without help, but for what was stuck');
}

# What cannot even be moved.
keyed_tables();
add_code('stuck', q(IF NEW.k = 'bad nail' THEN RAISE 'nailed down'; END IF;));
sql(q(INSERT INTO schema1.counted (value, k) VALUES (1, 'bad'), (2, 'bad nail'), (2, 'bad nail'), (4, 'good')));
my $failed = worker($node, 1, 'failed_count');
$until = worker($node, 1, 'folded_until');
fails('P0001', qr/nailed down/, 'what cannot be moved fails the cycle');
is(rows($node, 1, 'k, value, tableoid::regclass'),
	"bad|1|schema1.stuck\nbad nail|2|schema1.counted\nbad nail|2|schema1.counted\ngood|4|schema1.total",
	'and stays; all else is folded, or moved');
cmp_ok(worker($node, 1, 'failed_count'), '>', $failed, 'the cycle has failed');
is(worker($node, 1, 'folded_until'), $until, 'and not folded until any later time');
sql('DROP TRIGGER code ON schema1.stuck');
$node->poll_query_until('postgres', 'SELECT NOT EXISTS (SELECT FROM ONLY schema1.counted)')
  or die 'what was nailed down is not moved';
is(stuck(), "bad|1|23514\nbad nai|4|23514", 'without the cause it is moved as well');

# A thousand keys at once.
keyed_tables();
sql(<<EOC);
INSERT INTO schema1.total SELECT 'total', 1, 'over' || n FROM generate_series(0, 999) AS n;
INSERT INTO schema1.counted (value, k)
	SELECT CASE WHEN n % 25 = 0 THEN $max ELSE 1 END,
		CASE WHEN n % 25 = 0 THEN 'over' || n / 25 % 1000 ELSE 'k' || n % 777 END
	FROM generate_series(1, 25000) AS n;
EOC
$offset = -s $node->logfile;
my $sum = total($node, 1);
fails('22003', qr/bigint out of range/, 'a thousand keys overflow at once');
is(stuck('count(*), count(DISTINCT k)') . '|' . deltas($node, 1), '1000|1000|0', 'and no others are stuck');
is(total($node, 1), $sum, 'the sum is as it was');
is(in_log($offset, qr/ is stuck: /), 10, 'the log names ten of them');
is(in_log($offset, qr/LOG: .*the same of 990 more keys of postgres\.schema1\.counted/), 1, 'and counts the rest');
sql('UPDATE schema1.stuck SET value = 1');
wait_for_fold($node, 1);
is(sql('SELECT count(*), sum(value) FROM schema1.total'), '1777|26000', 'when they fit, they are folded without help');
is(in_log($offset, qr/ is no longer stuck/), 10, 'ten are named');
is(in_log($offset, qr/the same of 990 more keys/), 2, 'and the rest counted');

# ------------------------------------------------------------------------
# In no snapshot is the sum wrong, while keys get stuck and come free
# ------------------------------------------------------------------------

keyed_tables();
my $bench = start_pgbench(
	$node,
	[ '-c', 3, '-t', 150 ],
	[ "\\set k random(1, 20)\nINSERT INTO schema1.counted (value, k) VALUES (1, 'k:k'), (-1, 'bad:k');\n", 4 ],
	[ "SELECT 1 / (sum(value) = 0)::int FROM schema1.counted;\n", 4 ],
	[ "ALTER TABLE schema1.total DROP CONSTRAINT IF EXISTS good;\n", 1 ],
	[ "ALTER TABLE schema1.total DROP CONSTRAINT IF EXISTS good, ADD CONSTRAINT good CHECK (k NOT LIKE 'bad%') NOT VALID;\n", 1 ],
	[ "SELECT worker_spi_fold(1, wait => false);\n", 4 ]);
my (undef, $err, $success) = finish_psql($bench);
ok($success, 'in no snapshot is the sum wrong while keys get stuck and come free') or diag($err);
sql('ALTER TABLE schema1.total DROP CONSTRAINT IF EXISTS good');
folds($node, 1, 'when they are free for good, all are folded');
is(sql('SELECT sum(value), count(*) FROM schema1.counted') . '|' . sql('SELECT count(*) FROM schema1.total'),
	'0|40|40', 'and the sum is right at the end');

$node->stop;
done_testing();
