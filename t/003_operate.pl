# Operating workers: worker_spi_fold() as a barrier, worker_spi_stop() wherever
# the worker is, what the view and NOTIFY tell, and many sessions at once.
#
# It waits for worker_spi_fold() and worker_spi_stop(); sessions that are to
# wait for a worker are seen to in pg_stat_activity before the test goes on.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('operate', "autovacuum = off\n");
wait_for_state($node, $_, 'idle') foreach 1, 2;
my $holder = $node->background_psql('postgres');

# ------------------------------------------------------------------------
# Fold as a barrier, while four sessions insert
# ------------------------------------------------------------------------
$holder->query_safe('SELECT pg_advisory_lock(1)');
my @writers = map {
	start_psql($node, 'postgres', "writer_$_", <<EOQ) } 1 .. 4;
DO \$\$
BEGIN
	PERFORM pg_advisory_lock_shared(1);
	FOR i IN 1..1000 LOOP
		INSERT INTO schema1.counted VALUES ('delta', 1);
		COMMIT;
	END LOOP;
END
\$\$
EOQ
wait_for_psql(@writers);
$holder->query_safe('SELECT pg_advisory_unlock(1)');
$node->safe_psql('postgres', <<EOQ);
CREATE TABLE result (rounds int, committed_left boolean, decreased boolean);
CREATE TABLE seen (c tid, x xid);
DO \$\$
DECLARE
	before bigint := 0;
	after bigint;
	committed_left boolean := false;
	decreased boolean := false;
	rounds int := 0;
BEGIN
	LOOP
		INSERT INTO seen SELECT ctid, xmin FROM ONLY schema1.counted;
		rounds := rounds + FOUND::int;
		COMMIT;
		PERFORM worker_spi_fold(1);
		committed_left := committed_left OR EXISTS (
			SELECT FROM ONLY schema1.counted AS t JOIN seen ON c = t.ctid AND x = t.xmin);
		SELECT coalesce(sum(value), 0) INTO after FROM schema1.counted;
		decreased := decreased OR after < before;
		before := after;
		TRUNCATE seen;
		COMMIT;
		EXIT WHEN NOT EXISTS (SELECT FROM pg_stat_activity
			WHERE application_name LIKE 'writer%');
	END LOOP;
	INSERT INTO result VALUES (rounds, committed_left, decreased);
END
\$\$
EOQ
cmp_ok($node->safe_psql('postgres', 'SELECT rounds FROM result'),
	'>', 0, 'folds while four sessions insert');
is($node->safe_psql('postgres', 'SELECT committed_left FROM result'),
	'f', 'what was committed before a fold is folded after it');
is($node->safe_psql('postgres', 'SELECT decreased FROM result'),
	'f', 'and no sum is below one seen before');
is((finish_psql($_))[1], '', 'a writer is not disturbed') foreach @writers;
is($node->safe_psql('postgres', 'SELECT worker_spi_fold(1)'),
	't', 'a last fold');
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|4000', 'leaves the count of all that was inserted');
my $fold_count = worker($node, 1, 'fold_count');
is(worker($node, 1, 'folded_rows'), '4000', 'and the view the number of rows');

# without waiting
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 1)");
is($node->safe_psql('postgres', 'SELECT worker_spi_fold(1, wait => false)'),
	't', 'a fold that is not waited for');
$node->poll_query_until('postgres',
	"SELECT fold_count = $fold_count + 1 FROM worker_spi_workers WHERE index = 1")
  or die 'no fold';
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|4001', 'is done nevertheless');

# ------------------------------------------------------------------------
# Nobody
# ------------------------------------------------------------------------
$node->safe_psql('postgres', 'CREATE DATABASE quiet');
my $quiet = database_oid($node, 'quiet');
foreach my $case ([ '99', 99, 'postgres' ], [ "1, $quiet", 1, 'quiet' ])
{
	my ($worker, $index, $db) = @$case;
	foreach my $call ("worker_spi_fold($worker)",
		"worker_spi_fold($worker, wait => false)", "worker_spi_stop($worker)")
	{
		my ($ret, $out, $err) = $node->psql('postgres', "SELECT $call");
		is($out, 'f', "there is no such worker: $call");
		like($err, qr/WARNING:  there is no worker with index $index in database "$db"$/m,
			'as a warning says');
	}
}

# ------------------------------------------------------------------------
# Many who wait, one cycle.  In a database where nobody else works, each of
# the worker's cycles without a delta is one commit.  A stopped process reads no
# requests.
# ------------------------------------------------------------------------
$node->safe_psql('postgres', "SELECT worker_spi_launch(3, $quiet)");
$node->safe_psql('quiet', "INSERT INTO schema3.counted VALUES ('delta', 1)");
$node->poll_query_until('postgres',
	"SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = 'quiet'")
  or die 'somebody else is in the database';
folds($node, 3, 'a worker folds in a database of its own', 'quiet');
wait_for_nap($node, 3);
my $pid = worker($node, 3, 'pid');
my $commits =
  "SELECT xact_commit FROM pg_stat_database WHERE datname = 'quiet'";
my $before = $node->safe_psql('postgres', $commits);
kill 'STOP', $pid or die "kill: $!";
my @waiters = map {
	start_psql($node, 'postgres', "waiter_$_",
		"SELECT worker_spi_fold(3, $quiet)")
} 1 .. 10;
wait_for_psql(@waiters);

# one of them does not want to wait any longer
$node->safe_psql('postgres',
	"SELECT pg_cancel_backend(pid) FROM pg_stat_activity
	 WHERE application_name = 'waiter_1'");
like((finish_psql(shift @waiters))[1],
	qr/57014: canceling/, 'a caller that waits can be cancelled');
kill 'CONT', $pid or die "kill: $!";
is(join(' ', map { (finish_psql($_))[0] } @waiters),
	join(' ', ('t') x 9), 'the others get their fold');
wait_for_nap($node, 3);
is($node->safe_psql('postgres', $commits),
	$before + 1, 'one cycle has served them all');
is($node->safe_psql('postgres', "SELECT worker_spi_fold(3, $quiet)"),
	't', 'and the next fold works as before');

# ------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES ('delta', 9223372036854775807)");
my $offset = -s $node->logfile;
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)',
	'22003', qr/./, 'whoever waits gets the error of what cannot be folded');
is( worker(
		$node, 1,
		"state, last_sqlstate, last_error <> '', stuck_rows, failed_count"),
	'idle|22003|t|1|0',
	'which is in the view, and no failure of the cycle');
ok( $node->log_contains(
		qr/LOG:  worker_spi worker 1: the count in postgres\.schema1\.counted is stuck: bigint out of range \(SQLSTATE 22003\)$/m,
		$offset),
	'and in the log');
is(deltas($node, 1), '0', 'the delta is in nobody\'s way');
is( $node->safe_psql(
		'postgres',
		'SELECT type, value, sqlstate, reason, since <= now() FROM schema1.stuck'),
	'delta|9223372036854775807|22003|bigint out of range|t',
	'but kept, with what is wrong with it');
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES ('delta', -9223372036854775807)");
is($node->safe_psql('postgres', 'SELECT worker_spi_fold(1)'),
	't', 'when the sum fits, the next fold works');
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|4001', 'with the right total');
is(worker($node, 1, 'stuck_rows'), '0', 'and nothing is stuck any more');
ok( $node->log_contains(
		qr/LOG:  worker_spi worker 1: the count in postgres\.schema1\.counted is no longer stuck$/m,
		$offset),
	'as the log says');

$node->safe_psql('postgres', <<EOQ);
ALTER TABLE schema1.counted RENAME value TO amount;
INSERT INTO schema1.counted VALUES ('delta', 1);
EOQ
$offset = -s $node->logfile;
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)',
	'42P16', qr/"postgres\.schema1\.counted" has no measure/,
	'whoever waits gets the error of the cycle');
is( worker(
		$node, 1,
		"state, last_sqlstate, failed_count > 0,
			last_failed_time BETWEEN worker_start AND now()"),
	'backoff|42P16|t|t',
	'which is in the view');
$node->poll_query_until('postgres', <<EOQ) or die 'no next try';
SELECT next_fold_time BETWEEN last_failed_time
	AND last_failed_time + interval '61 seconds'
FROM worker_spi_workers WHERE index = 1
EOQ
pass('with the time of the next try');
ok($node->log_contains(qr/ERROR:  table "postgres\.schema1\.counted" has no measure$/m, $offset),
	'and in the log');
$node->safe_psql('postgres',
	'ALTER TABLE schema1.counted RENAME amount TO value');
is($node->safe_psql('postgres', 'SELECT worker_spi_fold(1)'),
	't', 'with the column, the next fold works');
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|4002', 'and nothing is lost');

# ------------------------------------------------------------------------
# A worker that is terminated
# ------------------------------------------------------------------------
my $counters = 'fold_count, folded_rows, last_fold_time, last_fold_ms';
$before = worker($node, 1, $counters);
my $start = worker($node, 1, 'worker_start');
$pid = worker($node, 1, 'pid');
add_gate($node, 1, 43);
$node->safe_psql('postgres', 'INSERT INTO schema1.counted (value) VALUES (1)');
$holder->query_safe('SELECT pg_advisory_lock(43)');
my $waiter = start_psql($node, 'postgres', 'waiter', 'SELECT worker_spi_fold(1)');
wait_for_psql($waiter);
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
like(
	(finish_psql($waiter))[1],
	qr/ERROR:  55000: /,
	'whoever waits for a worker that is terminated gets an error');
$holder->query_safe('SELECT pg_advisory_unlock(43)');
$node->poll_query_until('postgres',
	"SELECT state = 'idle' AND restart_count = 1 FROM worker_spi_workers
	 WHERE index = 1")
  or die 'worker 1 did not come back';
folds($node, 1);
is(worker($node, 1, "pid <> $pid AND worker_start > '$start'"),
	't', 'the server has started it again');
is(worker($node, 1, $counters =~ s/, last.*//r),
	join('|', map { $_ + 1 } (split /\|/, $before)[ 0, 1 ]),
	'it has kept its counters, and folded what was left');
is(worker($node, 2, 'restart_count'), '0', 'the other was not restarted');

# ------------------------------------------------------------------------
# A long cycle.  The trigger holds it up, for as long as somebody has the
# advisory lock 42, in the transaction that brings the total above 200,000, and
# shows by lock 45 that it is there.  The first share takes 1024 blocks at most,
# which have fewer rows.
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<EOQ);
CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	IF new.value > 200000 THEN
		PERFORM pg_advisory_xact_lock(45);
		WHILE EXISTS (
			SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42)
		LOOP
		END LOOP;
	END IF;
	RETURN NULL;
END
\$\$;
TRUNCATE schema2.counted;
CREATE TRIGGER gate AFTER INSERT OR UPDATE ON schema2.total
	FOR EACH ROW EXECUTE FUNCTION gate();
ALTER TABLE schema2.total ENABLE ALWAYS TRIGGER gate;
INSERT INTO schema2.counted SELECT 'delta', 1 FROM generate_series(1, 300000);
EOQ
$holder->query_safe('SELECT pg_advisory_lock(42)');
$before = worker($node, 2, 'fold_count');
$node->safe_psql('postgres', 'SELECT worker_spi_fold(2, wait => false)');
$node->poll_query_until('postgres', <<EOQ) or die 'the gate was not reached';
SELECT query LIKE '%schema2.counted%' AND a.state = 'active'
	AND backend_xid IS NOT NULL AND objid = 45
FROM worker_spi_workers JOIN pg_stat_activity AS a USING (pid)
	JOIN pg_locks USING (pid)
WHERE index = 2 AND locktype = 'advisory'
EOQ
is(worker($node, 2, "state, folded_rows BETWEEN 1 AND 299999, fold_count - $before"),
	'folding|t|0', 'the view shows the progress of a long cycle');
is(worker($node, 2, 'folded_rows = (SELECT value FROM schema2.total)'),
	't', 'which is what it has committed');
is(total($node, 2), '300000', 'and the sum is right in the midst of it');

# stop it there
$pid = worker($node, 2, 'pid');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(2)'),
	't', 'a worker can be stopped while it folds');
ok(!kill(0, $pid), 'and then its process is gone');
is(worker($node, 2, 'kind, state, pid'), 'static|stopped|',
	'it stays in the view, since it is a static one');
is(total($node, 2), '300000', 'the sum is right');
cmp_ok(deltas($node, 2), '>', 0, 'though not all is folded');
error_is($node, 'postgres', 'SELECT worker_spi_fold(2)', '55000', qr/./,
	'it does not fold any more');

# A static worker that was stopped stays away for longer than the server takes
# to restart one that ends after it.
$node->safe_psql('postgres', 'SELECT pg_terminate_backend(pid) FROM worker_spi_workers WHERE index = 1');
$node->poll_query_until('postgres',
	"SELECT state = 'idle' AND restart_count = 2 FROM worker_spi_workers
	 WHERE index = 1")
  or die 'worker 1 did not come back';
is(worker($node, 2, 'state, pid'),
	'stopped|', 'a stopped static worker is not restarted');

# Launched again, it goes on where it was stopped.
$holder->query_safe('SELECT pg_advisory_unlock(42)');
is( $node->safe_psql(
		'postgres', 'SELECT worker_spi_launch(2) > 0, worker_spi_fold(2)'),
	't|t',
	'it can be launched');
is(worker($node, 2, 'kind'), 'static', 'and is the static one again');
is($node->safe_psql('postgres', 'TABLE schema2.counted'),
	'total|300000', 'which folds the rest');

# While it waits for a lock, for as long as that takes
add_gate($node, 2, 44);
$holder->query_safe('SELECT pg_advisory_lock(44)');
$node->safe_psql('postgres', <<EOQ);
INSERT INTO schema2.counted (value) VALUES (1);
SELECT worker_spi_fold(2, wait => false);
EOQ
$node->poll_query_until('postgres',
	"SELECT wait_event_type = 'Lock'
	 FROM worker_spi_workers JOIN pg_stat_activity USING (pid) WHERE index = 2")
  or die 'worker 2 does not wait for the lock';
$pid = worker($node, 2, 'pid');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(2)'),
	't', 'a worker can be stopped while it waits for a lock');
ok(!kill(0, $pid), 'and then its process is gone');
$holder->query_safe('SELECT pg_advisory_unlock(44)');

# Somebody who waits for a fold learns that the worker was stopped.
$pid = $node->safe_psql('postgres', 'SELECT worker_spi_launch(2)');
folds($node, 2, 'a worker that was stopped with a delta left folds it');
kill 'STOP', $pid or die "kill: $!";
$waiter = start_psql($node, 'postgres', 'waiter', 'SELECT worker_spi_fold(2)');
wait_for_psql($waiter);
my $stopper = start_psql($node, 'postgres', 'stopper', 'SELECT worker_spi_stop(2)');
wait_for_psql($stopper);
kill 'CONT', $pid or die "kill: $!";
is((finish_psql($stopper))[0], 't', 'a worker is stopped with a fold to do');
like((finish_psql($waiter))[1],
	qr/ERROR:  55000: /,
	'whoever waits for the fold gets an error');

# ------------------------------------------------------------------------
# NOTIFY.  Notifications come in the order of their commits, so that all of
# the worker's are there when the session's own is.
# ------------------------------------------------------------------------
sub notifications
{
	my ($index, $insert) = @_;
	my ($ret, $out, $err) = $node->psql('postgres', <<EOQ, on_error_die => 1);
LISTEN worker_spi;
INSERT INTO schema$index.counted $insert;
SELECT worker_spi_fold($index);
NOTIFY worker_spi, 'end';
EOQ
	return join ', ',
	  $out =~ /^Asynchronous notification "worker_spi" with payload "(.*)" received/mg;
}
$node->safe_psql('postgres',
	'SELECT worker_spi_launch(2); TRUNCATE schema1.counted, schema2.counted');
is(notifications(1, "VALUES ('delta', 17)"),
	'end', 'by default there are no notifications');
reload_settings($node, 'worker_spi.notify = on', 1, 2);
is(notifications(1, "VALUES ('delta', 10), ('delta', -10)"),
	'schema1.counted 17, end', 'with notify on there is one for each fold');
like(
	notifications(2, "SELECT 'delta', 1 FROM generate_series(1, 300000)"),
	qr/^(schema2\.counted \d+, )+schema2\.counted 300000, end$/,
	'and one for each transaction of a long one');
new_table($node, 2, 'CREATE TABLE %t (type text, value bigint, page int NOT NULL)',
	key => 'PRIMARY KEY (page)');
is( notifications(2, "SELECT 'delta', 1, i % 12 FROM generate_series(1, 100) i"),
	'schema2.counted, end',
	'with keys it names the table alone');
is(notifications(2, "SELECT 'delta', 1, 1 WHERE false"),
	'end', 'a cycle that folds nothing notifies nobody');

# ------------------------------------------------------------------------
# Stop a worker that the server has yet to restart
# ------------------------------------------------------------------------
$node->safe_psql('postgres', 'SELECT worker_spi_stop(2)');
$node->append_conf('postgresql.conf', 'worker_spi.restart_interval = 3600');
$node->restart;
wait_for_state($node, $_, 'idle') foreach 1, 2;
is(worker($node, 2, 'kind, restart_count'),
	'static|0', 'a stopped static worker is back after a restart of the server');
$node->safe_psql('postgres',
	'SELECT pg_terminate_backend(pid) FROM worker_spi_workers WHERE index = 2');
$node->poll_query_until('postgres',
	'SELECT pid IS NULL FROM worker_spi_workers WHERE index = 2')
  or die 'worker 2 did not end';
is(worker($node, 2, 'kind, datname, state'),
	'static|postgres|down',
	'a worker that the server is to restart is down');
error_is($node, 'postgres', 'SELECT worker_spi_launch(2)',
	'42710', qr/index 2 already runs/, 'its index is taken');
error_is($node, 'postgres', 'SELECT worker_spi_fold(2)',
	'55000', qr/./, 'a fold does not wait for its return');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(2)'),
	't', 'it can be stopped');
is(worker($node, 2, 'state, pid'), 'stopped|', 'which it then is');
is($node->safe_psql('postgres', 'SELECT worker_spi_launch(2) > 0'),
	't', 'and launched');

$node->safe_psql('postgres', 'SELECT worker_spi_launch(5)');
$node->safe_psql('postgres',
	'SELECT pg_terminate_backend(pid) FROM worker_spi_workers WHERE index = 5');
$node->poll_query_until('postgres',
	'SELECT pid IS NULL FROM worker_spi_workers WHERE index = 5')
  or die 'worker 5 did not end';
is(worker($node, 5, 'kind, state'), 'dynamic|down', 'so is a dynamic one');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(5)'),
	't', 'which can be stopped');
nothing_left($node, 5, 'and then it is gone');
is( $node->safe_psql('postgres',
		'SELECT worker_spi_launch(5) > 0, worker_spi_stop(5)'),
	't|t',
	'and its index free');

# ------------------------------------------------------------------------
# Fifty sessions
# ------------------------------------------------------------------------
my @sessions = map {
	start_psql($node, 'postgres', "session_$_", <<EOQ) } 1 .. 50;
DO \$\$
BEGIN
	FOR i IN 1..4 LOOP
		BEGIN
			PERFORM worker_spi_launch(10 + ($_ + i) % 5);
		EXCEPTION WHEN OTHERS THEN
			RAISE NOTICE 'launch %', SQLSTATE;
		END;
		BEGIN
			PERFORM worker_spi_fold(10 + ($_ + i) % 5);
		EXCEPTION WHEN OTHERS THEN
			RAISE NOTICE 'fold %', SQLSTATE;
		END;
		PERFORM worker_spi_stop(10 + ($_ + i) % 5);
	END LOOP;
END
\$\$
EOQ
my %errors;
foreach my $session (@sessions)
{
	my (undef, $err) = finish_psql($session);
	$errors{$1}++ while $err =~ /NOTICE:  \S+ (\w+ \w+)$/mg;
	$errors{$1}++ while $err =~ /ERROR:  (.*)/g;
}
note explain \%errors;
# the index is taken, or another session stops the worker meanwhile
is(join(', ', grep { !/^launch (42710|55000)$|^fold 55000$/ } sort keys %errors),
	'', '50 sessions launch, fold and stop at once, and get no errors but those');
is( $node->safe_psql(
		'postgres',
		"SELECT count(*) FROM worker_spi_workers WHERE kind = 'dynamic'"),
	'0',
	'no registration is left of it');
is( process_count($node),
	'2',
	'nor a process but those of the two static workers');
is( $node->safe_psql(
		'postgres', 'SELECT worker_spi_launch(10) > 0, worker_spi_fold(10),
			worker_spi_stop(10), worker_spi_fold(1)'),
	't|t|t|t',
	'and everything works as before');

$holder->quit;
done_testing();
