# One bad counter never stops the rest.  Sums that do not fit, keys that an
# index or a constraint refuses, totals that somebody holds locked: they stay,
# the count stays right, and all else is folded in the same cycle.  What is
# stuck is counted, named once in the log, and folded without anybody's help
# when the cause is gone.  Errors that are no fault of the data fail the cycle.
#
# What has to happen by itself is waited for in the view and in the table;
# everything else is done when worker_spi_fold() returns.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('stuck', <<EOC);
worker_spi.total_workers = 1
worker_spi.notify = on
autovacuum = off
EOC
my $keyed = <<'EOC';
CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL, k text NOT NULL
	CONSTRAINT good CHECK (type <> 'total' OR k NOT LIKE 'bad%'));
CREATE UNIQUE INDEX ON %t (k) WHERE type = 'total';
EOC
my $max = '9223372036854775807';
my $fold = 'SELECT worker_spi_fold(1)';

fold($node, 1);

# What worker 1 says of the rows it cannot fold: their number, and whether the
# cycle failed.  It may be in the next cycle, which tries them again, by now.
sub stuck
{
	return worker($node, 1, "stuck_rows, state = 'backoff'");
}

# How often a pattern is in the log since $offset.
sub in_log
{
	my ($offset, $pattern) = @_;
	my @found = slurp_file($node->logfile, $offset) =~ /$pattern/g;
	return scalar(@found);
}

# Deltas in worker 1's table.
sub deltas
{
	return $node->safe_psql('postgres',
		"SELECT count(*) FROM schema1.counted WHERE type IS DISTINCT FROM 'total'");
}

# ------------------------------------------------------------------------
# Each kind of bad key, among a thousand good ones
# ------------------------------------------------------------------------

new_table($node, 1, $keyed);
fold($node, 1);
foreach my $test (
	[ 'a sum that does not fit', '22003', qr/bigint out of range/, $max, 'over' ],
	[ 'a key that a constraint refuses', '23514', qr/constraint "good"/, 1, 'bad' ],
	[ 'a key too long for the index', '54000', qr/index row/, 1, undef ])
{
	my ($name, $sqlstate, $pattern, $value, $key) = @$test;
	my $literal = $key ? "'$key'"
	  : "(SELECT string_agg(md5(n::text), '') FROM generate_series(1, 300) AS n)";
	my $offset = -s $node->logfile;
	my $folds = worker($node, 1, 'failed_count');

	$node->safe_psql('postgres', <<EOC);
INSERT INTO schema1.counted (value, k) SELECT 1, 'k' || n % 1000 FROM generate_series(1, 20000) AS n;
INSERT INTO schema1.counted (value, k) VALUES ($value, $literal), (1, $literal);
INSERT INTO schema1.counted (value, k) SELECT 1, 'k' || n % 1000 FROM generate_series(1, 20000) AS n;
EOC
	error_is($node, 'postgres', $fold, $sqlstate, $pattern,
		"a fold raises the error of $name");
	is(deltas(), 2, 'and has folded all others');
	is(stuck(), '2|f', 'the view counts what is left');
	is(worker($node, 1, 'last_sqlstate, failed_count'),
		"$sqlstate|$folds", 'and says why, though no cycle has failed');
	error_is($node, 'postgres', $fold, $sqlstate, $pattern,
		'the next fold tries again');
	is( in_log($offset, qr/LOG: .*key \([^\n]* of schema1\.counted is stuck: .*\(SQLSTATE $sqlstate\)/),
		1, 'the log has said so once');
	$node->safe_psql('postgres',
		"DELETE FROM schema1.counted WHERE type <> 'total'");
	is(fold($node, 1), 't', "without $name nothing is left to raise");
	is(stuck(), '0|f', 'or to count');
	is(in_log($offset, qr/is no longer stuck/), 1, 'and the log says so');
}

# All deltas of a key are judged together, wherever they are.
$node->safe_psql('postgres', <<EOC);
INSERT INTO schema1.counted (value, k) VALUES ($max, 'far'), ($max, 'far');
INSERT INTO schema1.counted (value, k) SELECT 1, 'k' || n % 1000 FROM generate_series(1, 300000) AS n;
INSERT INTO schema1.counted (value, k) VALUES (-$max, 'far');
EOC
is(fold($node, 1), 't',
	'an overflow that another delta makes good, far away, is none');
is( $node->safe_psql('postgres',
		"SELECT type, value FROM schema1.counted WHERE k = 'far'"),
	"total|$max", 'and its total is right');

# ------------------------------------------------------------------------
# Locked totals, and totals that are not yet committed
# ------------------------------------------------------------------------

{
	my $holder = $node->background_psql('postgres');
	$holder->query_safe(<<'EOC');
BEGIN;
SELECT FROM schema1.counted WHERE type = 'total' AND k IN ('k5', 'k7') FOR UPDATE;
INSERT INTO schema1.counted VALUES ('total', 100, 'new');
EOC
	$node->safe_psql('postgres', <<'EOC');
INSERT INTO schema1.counted (value, k) SELECT 1, 'k' || n % 100 FROM generate_series(1, 1000) AS n;
INSERT INTO schema1.counted (value, k) VALUES (1, 'new');
EOC
	error_is($node, 'postgres', $fold, '55P03', qr/lock timeout/,
		'a fold raises that totals are locked');
	is( $node->safe_psql('postgres',
			"SELECT k, count(*) FROM schema1.counted WHERE type <> 'total' GROUP BY k ORDER BY k"
		),
		"k5|10\nk7|10\nnew|1",
		'and has folded all the others');
	is(stuck(), '21|f', 'which the view counts');
	$holder->query_safe('COMMIT');
	wait_for_fold($node, 1);
	is( $node->safe_psql('postgres',
			"SELECT value FROM schema1.counted WHERE k = 'new'"),
		'101',
		'once they are free, the worker folds them by itself');
	$holder->quit;
}

# A lock on the table itself is not the fault of any row.
{
	my $holder = $node->background_psql('postgres');
	$holder->query_safe('BEGIN; LOCK TABLE schema1.counted IN SHARE MODE');
	error_is($node, 'postgres', $fold, '55P03', qr/lock timeout/,
		'a lock on the table fails the cycle');
	is(worker($node, 1, 'stuck_rows, last_sqlstate'),
		'0|55P03', 'and nothing is stuck');
	$holder->quit;
}
$node->poll_query_until('postgres',
	"SELECT state = 'idle' FROM worker_spi_workers")
  or die 'the worker does not recover';

# ------------------------------------------------------------------------
# A thousand at once, and more than are remembered
# ------------------------------------------------------------------------

# Each has a total, so that not even the first of its deltas fits.
new_table($node, 1, $keyed);
$node->safe_psql('postgres', <<EOC);
INSERT INTO schema1.counted SELECT 'total', 1, 'over' || n FROM generate_series(0, 999) AS n;
INSERT INTO schema1.counted (value, k)
	SELECT CASE WHEN n % 50 = 0 THEN $max ELSE 1 END,
		CASE WHEN n % 50 = 0 THEN 'over' || n / 50 % 1000 ELSE 'k' || n % 777 END
	FROM generate_series(1, 100000) AS n;
EOC
my $offset = -s $node->logfile;
my $sum = total($node, 1);
error_is($node, 'postgres', $fold, '22003', qr/bigint out of range/,
	'a thousand keys overflow at once');
is(stuck(), '2000|f', 'with all their deltas');
is(deltas(), 2000, 'and no others');
is(total($node, 1), $sum, 'and the sum is as it was');
is(in_log($offset, qr/is stuck: /), 10, 'the log names ten of them');
is(in_log($offset, qr/the same of 990 more keys/), 1, 'and counts the rest');
$node->safe_psql('postgres',
	"UPDATE schema1.counted SET value = 1 WHERE type <> 'total'");
wait_for_fold($node, 1);
is( $node->safe_psql('postgres', 'SELECT sum(value), count(*) FROM schema1.counted'),
	'101000|1777', 'when they fit, they are folded without help');

# Set aside are then whole ranges, and the count is a lower bound.
$node->safe_psql('postgres', <<EOC);
INSERT INTO schema1.counted (value, k)
	SELECT $max, 'over' || n % 3000 FROM generate_series(1, 6000) AS n;
INSERT INTO schema1.counted (value, k) SELECT 1, 'k' || n % 777 FROM generate_series(1, 777) AS n;
EOC
error_is($node, 'postgres', $fold, '22003', qr/bigint out of range/,
	$_) foreach 'more keys overflow than are remembered', 'and do so again';
cmp_ok(worker($node, 1, 'stuck_rows'), '>=', 1024, 'which the view counts');
cmp_ok(deltas(), '>=', worker($node, 1, 'stuck_rows'), 'as a lower bound');
$node->safe_psql('postgres',
	"UPDATE schema1.counted SET value = 1 WHERE k LIKE 'over%'");
wait_for_fold($node, 1);
is(fold($node, 1), 't', 'all of them are folded when they fit');
is(stuck(), '0|f', 'and none is left');

# A row that stands for one key can be deleted, and its place be taken by a delta
# of another that is stuck as well.
new_table($node, 1, $keyed);
$node->safe_psql('postgres', <<EOC);
INSERT INTO schema1.counted (value, k) SELECT v, k
FROM unnest(ARRAY['a', 'b', 'c']) AS k, unnest(ARRAY[$max, 1]) AS v;
EOC
error_is($node, 'postgres', $fold, '22003', qr/out of range/,
	'three keys are stuck');
my $place = $node->safe_psql('postgres',
	"SELECT min(ctid) FROM schema1.counted WHERE k = 'b'");
$node->safe_psql('postgres', "DELETE FROM schema1.counted WHERE k = 'b'");
$node->safe_psql('postgres', 'VACUUM schema1.counted');
$node->safe_psql('postgres', <<EOC);
DO \$\$
BEGIN
	FOR i IN 1 .. 1000 LOOP
		INSERT INTO schema1.counted (value, k) VALUES (1, 'a');
		EXIT WHEN (SELECT k FROM schema1.counted WHERE ctid = '$place') = 'a';
	END LOOP;
END \$\$;
DELETE FROM schema1.counted WHERE k = 'c' AND value = 1;
EOC
is( $node->safe_psql('postgres',
		"SELECT k FROM schema1.counted WHERE ctid = '$place'"),
	'a', 'the place of one is taken by a delta of another');
error_is($node, 'postgres', $fold, '22003', qr/out of range/,
	'that one is still stuck');
is( $node->safe_psql('postgres',
		"SELECT type, value FROM schema1.counted WHERE k = 'c'"),
	"total|$max", 'and keeps no other from being folded');
$node->safe_psql('postgres',
	"DELETE FROM schema1.counted WHERE type <> 'total'");
is(fold($node, 1), 't', 'without it nothing is stuck');

# ------------------------------------------------------------------------
# Without keys
# ------------------------------------------------------------------------

my $plain = "CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL)";
new_table($node, 1, $plain);
$node->safe_psql('postgres', <<EOC);
INSERT INTO schema1.counted (value) VALUES (1), ($max - 1), (1);
INSERT INTO schema1.counted (value) SELECT 1 FROM generate_series(1, 200000);
EOC
error_is($node, 'postgres', $fold, '22003', qr/bigint out of range/,
	'without keys, rows are folded as far as they fit');
is( $node->safe_psql('postgres',
		"SELECT type, count(*), sum(value) FROM schema1.counted GROUP BY type ORDER BY type"
	),
	"delta|200001|200001\ntotal|1|$max",
	'and the rest is left');
is(stuck(), '200001|f', 'and counted');
$node->safe_psql('postgres',
	'INSERT INTO schema1.counted (value) VALUES (-9223372036854775808)');
is(fold($node, 1), 't', 'a delta that makes it good cures it');
is(rows($node, 1), 'total|200000', 'wherever it stands');
is(stuck(), '0|f', 'and nothing is stuck');

# A row that a trigger of the owner's refuses.
$node->safe_psql('postgres', <<'EOC');
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF OLD.value = 13 THEN RAISE 'thirteen'; END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER refuse AFTER DELETE ON schema1.counted FOR EACH ROW EXECUTE FUNCTION refuse();
ALTER TABLE schema1.counted ENABLE ALWAYS TRIGGER refuse;
INSERT INTO schema1.counted (value) SELECT n % 5000 FROM generate_series(1, 10000) AS n;
EOC
$offset = -s $node->logfile;
error_is($node, 'postgres', $fold, 'P0001', qr/thirteen/,
	'single rows can be stuck as well');
is( $node->safe_psql('postgres',
		"SELECT value, count(*) FROM schema1.counted WHERE type <> 'total' GROUP BY value"
	),
	'13|2',
	'and all others are folded');
is(in_log($offset, qr/row \(\d+,\d+\) of schema1\.counted is stuck: thirteen \(SQLSTATE P0001\)/),
	2, 'the log names them by where they are');

# A rewrite moves them, and a new process knows nothing of them.
$node->safe_psql('postgres', 'VACUUM FULL schema1.counted');
error_is($node, 'postgres', $fold, 'P0001', qr/thirteen/,
	'after VACUUM FULL they are found again');
is(stuck(), '2|f', 'both');
my $pid = worker($node, 1, 'pid');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
wait_for_restart($node, 1, $pid);
error_is($node, 'postgres', $fold, 'P0001', qr/thirteen/,
	'and after a restart of the worker');
is(stuck(), '2|f', 'both, too');
$node->safe_psql('postgres', 'DROP TRIGGER refuse ON schema1.counted');
wait_for_fold($node, 1);
is(rows($node, 1), 'total|' . (200000 + 2 * 4999 * 2500),
	'and folded when nobody refuses them any more');

# ------------------------------------------------------------------------
# In no snapshot is the sum wrong, while keys get stuck and come free
# ------------------------------------------------------------------------

new_table($node, 1, $keyed);
fold($node, 1);
my $bench = start_pgbench(
	$node,
	[ '-c', 3, '-t', 150 ],
	[ "\\set k random(1, 20)\nBEGIN; INSERT INTO schema1.counted (value, k) VALUES (1, 'k:k'), (-1, 'bad:k'); END;\n", 4 ],
	[ "SELECT 1 / (sum(value) = 0)::int FROM schema1.counted;\n", 4 ],
	[ "ALTER TABLE schema1.counted DROP CONSTRAINT IF EXISTS good;\n", 1 ],
	[ "SELECT worker_spi_fold(1, wait => false);\n", 4 ]);
my ($out, $err, $success) = finish_psql($bench);
ok($success, 'in no snapshot is the sum wrong while keys are stuck') or diag($err);
is(fold($node, 1), 't', 'when they are free for good, all are folded');
is(total($node, 1), 0, 'and the sum is right at the end');

# ------------------------------------------------------------------------
# While something is stuck, a cycle still looks up the totals that it needs, and
# does not read all of them.  Only one that is to retry does.
# ------------------------------------------------------------------------

new_table($node, 1, $keyed);
$node->safe_psql('postgres', <<EOC);
INSERT INTO schema1.counted SELECT 'total', 0, 'k' || n FROM generate_series(1, 20000) AS n;
INSERT INTO schema1.counted VALUES ('total', $max, 'full'), ('delta', 1, 'full');
CREATE TRIGGER wake AFTER INSERT ON schema1.counted
	FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();
EOC

# After seven tries, the worker's own next one is a minute away.
error_is($node, 'postgres', $fold, '22003', qr/out of range/, "try $_")
  foreach 1 .. 7;
wait_for_nap($node, 1);
my $reads = "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE schemaname = 'schema1'";
my $before = $node->safe_psql('postgres', $reads);
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted (value, k) SELECT 1, 'k' || n FROM generate_series(1, 10) AS n");
$node->poll_query_until('postgres',
	"SELECT n_tup_upd >= 10 FROM pg_stat_user_tables WHERE schemaname = 'schema1'")
  or die 'the worker was not woken';
wait_for_nap($node, 1);
cmp_ok(
	$node->safe_psql('postgres', $reads) - $before, '<', 1000,
	'ten totals of 20,000 are looked up');
is(stuck(), '1|f', 'beside one that is stuck');

$node->stop;
done_testing();
