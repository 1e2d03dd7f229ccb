# The view is the one place to alert on.  One query shows every worker that is
# late, failing, absent or stopped, and never one that is healthy, at whatever
# naptime.  folded_until says up to when deltas are in a total or known to be
# stuck.
#
# It waits for states in the view and for worker_spi_fold().

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('view', <<'EOC');
worker_spi.total_workers = 6
worker_spi.restart_interval = 3600
EOC
fold($node, $_) foreach 1 .. 6;

# The query, with the time of asking and the minute of patience as arguments.
$node->safe_psql('postgres', <<'EOC');
CREATE FUNCTION alerts(at timestamptz DEFAULT clock_timestamp(),
	patience interval DEFAULT '1 minute') RETURNS SETOF int
LANGUAGE sql AS $$
	SELECT index FROM worker_spi_workers
	WHERE folded_until < at - current_setting('worker_spi.naptime')::interval - patience
	   OR state IN ('backoff', 'down', 'stopped')
	ORDER BY index
$$;
EOC

sub alerts
{
	my ($arguments) = @_;
	return $node->safe_psql('postgres',
		'SELECT string_agg(i::text, $$ $$) FROM alerts(' . ($arguments // '') . ') AS i');
}

# ------------------------------------------------------------------------
# folded_until
# ------------------------------------------------------------------------
my $ask = 'SELECT folded_until FROM worker_spi_workers WHERE index = 1';
my @times = split /\n/, $node->safe_psql('postgres', <<"EOC");
INSERT INTO schema1.counted (value) VALUES (1);
SELECT clock_timestamp();
SELECT worker_spi_fold(1) \\gset
$ask;
SELECT clock_timestamp();
SELECT worker_spi_fold(1) \\gset
$ask;
SELECT clock_timestamp();
EOC
is( $node->safe_psql(
		'postgres',
		"SELECT bool_and(t > before) FROM (SELECT t, lag(t) OVER (ORDER BY n) AS before FROM unnest('{"
		  . join(',', map { qq("$_") } @times)
		  . "}'::timestamptz[]) WITH ORDINALITY AS u (t, n)) AS v"),
	't',
	'folded_until is in the cycle that was waited for, whether it found anything or not'
) or diag("@times");

# What is not committed at the time is not covered.
my $writer = $node->background_psql('postgres');
$writer->query_safe('BEGIN; INSERT INTO schema1.counted (value) VALUES (2)');
fold($node, 1);
$writer->query_safe('COMMIT');
is( $node->safe_psql(
		'postgres',
		"SELECT count(*), folded_until < clock_timestamp() FROM schema1.counted, worker_spi_workers WHERE index = 1 AND type = 'delta' GROUP BY 2"
	),
	'1|t',
	'a delta committed after it is still there');
$writer->quit;

# What is stuck is not waited for.
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted (value) VALUES (9223372036854775807), (1)");
my $before = $node->safe_psql('postgres', 'SELECT clock_timestamp()');
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '22003', qr/./,
	'a delta does not fit');
is( worker(
		$node, 1,
		"folded_until > '$before', stuck_rows > 0, state, last_sqlstate, last_error <> '', failed_count"
	),
	't|t|idle|22003|t|0',
	'it is stuck, and the rest folded, so the worker is not late');
is(alerts(), '', 'and raises no alert by itself');
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted (value) VALUES (-9223372036854775807)");
fold($node, 1);
is(worker($node, 1, 'stuck_rows'), '0', 'until it fits');

# ------------------------------------------------------------------------
# Healthy: no alert, at any naptime, up to the moment of the next cycle
# ------------------------------------------------------------------------
foreach my $naptime (3600, 1)
{
	$node->append_conf('postgresql.conf', "worker_spi.naptime = $naptime");
	$node->reload;
	$node->poll_query_until('postgres', <<EOC) or die 'naptime was not taken over';
SELECT current_setting('worker_spi.naptime')::interval = interval '$naptime s'
	AND bool_and(next_fold_time - folded_until < interval '$naptime s' + interval '5 s')
	AND bool_and(next_fold_time - folded_until > interval '$naptime s' / 2)
FROM worker_spi_workers
EOC
	is(alerts(), '', "naptime $naptime: no healthy worker raises an alert");
	is(alerts("(SELECT max(next_fold_time) FROM worker_spi_workers)"),
		'', "naptime $naptime: nor will it until its next cycle");
	is( $node->safe_psql(
			'postgres',
			"SELECT count(*) FROM alerts(clock_timestamp() + interval '$naptime s' + interval '2 minutes')"
		),
		'6',
		"naptime $naptime: without that cycle all would");
}

# ------------------------------------------------------------------------
# In trouble, at a naptime of a second: 2 is late, held up in its fold; 3 fails;
# 4 is absent; 5 is stopped.  1 and 6 are healthy all the time.
# ------------------------------------------------------------------------
add_gate($node, 2, 42);
my $holder = $node->background_psql('postgres');
$holder->query_safe('SELECT pg_advisory_lock(42)');
$node->safe_psql('postgres', 'INSERT INTO schema2.counted (value) VALUES (1)');
wait_for_state($node, 2, 'folding');
is(alerts() =~ s/\b2\b//r, '', 'a fold of some seconds raises no alert');

my $until = worker($node, 3, 'folded_until');
$node->safe_psql('postgres', 'ALTER TABLE schema3.counted RENAME value TO amount');
error_is($node, 'postgres', 'SELECT worker_spi_fold(3)', '42703', qr/./,
	'a worker fails');
wait_for_state($node, 3, 'backoff');

my $pid = worker($node, 4, 'pid');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
wait_for_state($node, 4, 'down');
is(worker($node, 4, 'pid'), '', 'a worker has no process');

$node->safe_psql('postgres', 'SELECT worker_spi_stop(5)');
is(worker($node, 5, 'state, pid'), 'stopped|', 'a worker is stopped');

$node->poll_query_until('postgres', <<'EOC') or die 'worker 2 is not late';
SELECT count(*) = 1 FROM alerts(patience => '2 s') AS i WHERE i = 2
EOC
pass('a worker that is held up is late');
is( $node->safe_psql(
		'postgres',
		"SELECT string_agg(i::text, ' ' ORDER BY i) FROM alerts(patience => '2 s') AS i WHERE i BETWEEN 2 AND 5"
	),
	'2 3 4 5',
	'the one query shows who is late, fails, is absent, or stopped');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM alerts() AS i WHERE i IN (1, 6)"),
	'0',
	'and not who is healthy');

$node->safe_psql('postgres', "ALTER TABLE schema3.counted RENAME amount TO value");
fold($node, 3);
$holder->query_safe('SELECT pg_advisory_unlock(42)');
$holder->quit;
fold($node, 2);
$node->safe_psql('postgres', 'SELECT worker_spi_launch(5)');
$node->poll_query_until('postgres',
	"SELECT string_agg(i::text, ' ') = '4' FROM alerts(patience => '20 s') AS i")
  or die 'alerts do not end';
pass('when the trouble is over so are the alerts');

# ------------------------------------------------------------------------
# A worker that never had a cycle
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOC');
BEGIN;
DROP SCHEMA schema6 CASCADE;
CREATE SCHEMA schema6;
CREATE VIEW schema6.counted AS SELECT 1 AS value;
COMMIT;
EOC
$node->restart;
wait_for_state($node, 6, 'backoff');
is(worker($node, 6, 'folded_until, fold_count, last_sqlstate'),
	'-infinity|0|42809', 'without a cycle, folded_until is minus infinity');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM alerts(patience => '1000 years') AS i WHERE i = 6"),
	'1',
	'which is late in any case');

$node->stop;
done_testing();
