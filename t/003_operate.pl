# Operating workers: worker_spi_fold() as a barrier, worker_spi_stop() wherever
# the worker is, what the view and NOTIFY tell, and many sessions at once.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

use t::WorkerSpi;

my $node = new_node('operate', "autovacuum = off\n");
wait_for_state($node, $_, 'idle') foreach 1, 2;
my $holder = $node->background_psql('postgres');

#
# Fold as a barrier, while four sessions insert
#
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
		INSERT INTO seen SELECT ctid, xmin FROM schema1.counted
			WHERE type = 'delta';
		rounds := rounds + FOUND::int;
		COMMIT;
		PERFORM worker_spi_fold(1);
		committed_left := committed_left OR EXISTS (
			SELECT FROM schema1.counted AS t JOIN seen ON c = t.ctid AND x = t.xmin
			WHERE type = 'delta');
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
is( $node->safe_psql(
		'postgres',
		'SELECT worker_spi_fold(99), worker_spi_fold(99, wait => false), worker_spi_stop(99)'),
	'f|f|f',
	'there is no worker 99');

#
# Many who wait, one cycle.  In a database where nobody else works, each of
# the worker's cycles without a delta is one commit.  A stopped process reads no
# requests.
#
$node->safe_psql('postgres', 'CREATE DATABASE quiet');
my $quiet = $node->safe_psql('postgres',
	"SELECT oid FROM pg_database WHERE datname = 'quiet'");
$node->safe_psql('postgres', "SELECT worker_spi_launch(3, $quiet)");
$node->safe_psql('quiet', "INSERT INTO schema3.counted VALUES ('delta', 1)");
$node->poll_query_until('postgres',
	"SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = 'quiet'")
  or die 'somebody else is in the database';
$node->safe_psql('postgres', "SELECT worker_spi_fold(3, $quiet)");
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
is($node->safe_psql('postgres', $commits),
	$before + 1, 'one cycle has served them all');
is($node->safe_psql('postgres', "SELECT worker_spi_fold(3, $quiet)"),
	't', 'and the next fold works as before');

#
# Errors
#
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES ('delta', 9223372036854775807)");
my $offset = -s $node->logfile;
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)',
	'22003', qr/bigint out of range/,
	'whoever waits gets the error of the cycle');
is( $node->safe_psql(
		'postgres',
		'SELECT state, last_error, last_sqlstate, failed_count > 0,
			last_failed_time BETWEEN worker_start AND now(),
			next_fold_time < last_failed_time + interval \'61 seconds\'
		 FROM worker_spi_workers WHERE index = 1'),
	'backoff|bigint out of range|22003|t|t|t',
	'which is in the view, with the time of the next try');
ok($node->log_contains(qr/ERROR:  bigint out of range/, $offset),
	'and in the log');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM schema1.counted WHERE type = 'delta'"),
	'1',
	'the delta is kept');
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES ('delta', -9223372036854775807)");
is($node->safe_psql('postgres', 'SELECT worker_spi_fold(1)'),
	't', 'when the sum fits, the next fold works');
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|4001', 'with the right total');

#
# A worker that is terminated
#
my $counters = 'fold_count, folded_rows, last_fold_time, last_fold_ms';
$before = worker($node, 1, $counters);
my $start = worker($node, 1, 'worker_start');
$pid = worker($node, 1, 'pid');
$holder->query_safe("BEGIN; LOCK TABLE schema1.counted IN ACCESS EXCLUSIVE MODE");
my $waiter = start_psql($node, 'postgres', 'waiter', 'SELECT worker_spi_fold(1)');
wait_for_psql($waiter);
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
like(
	(finish_psql($waiter))[1],
	qr/ERROR:  55000: worker with index 1 is not running.*HINT:/s,
	'whoever waits for a worker that is terminated gets an error');
$holder->query_safe('ROLLBACK');
$node->poll_query_until('postgres',
	"SELECT state = 'idle' AND restart_count = 1 FROM worker_spi_workers
	 WHERE index = 1")
  or die 'worker 1 did not come back';
is(worker($node, 1, "pid <> $pid AND worker_start > '$start'"),
	't', 'the server has started it again');
is(worker($node, 1, $counters), $before, 'it has kept its counters');
is(worker($node, 2, 'restart_count'), '0', 'the other was not restarted');

#
# A long cycle.  The trigger holds it up, for as long as somebody has the
# advisory lock, in the transaction that brings the total above 150,000.
#
$node->safe_psql('postgres', <<EOQ);
CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	WHILE new.type = 'total' AND new.value > 150000 AND EXISTS (
		SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42)
	LOOP
	END LOOP;
	RETURN NULL;
END
\$\$;
TRUNCATE schema2.counted;
CREATE TRIGGER gate AFTER INSERT OR UPDATE ON schema2.counted
	FOR EACH ROW WHEN (new.type = 'total') EXECUTE FUNCTION gate();
INSERT INTO schema2.counted SELECT 'delta', 1 FROM generate_series(1, 300000);
EOQ
$holder->query_safe('SELECT pg_advisory_lock(42)');
$before = worker($node, 2, 'fold_count');
$node->safe_psql('postgres', 'SELECT worker_spi_fold(2, wait => false)');
$node->poll_query_until('postgres', <<EOQ) or die 'the gate was not reached';
SELECT query LIKE '%schema2.counted%' AND a.state = 'active'
	AND backend_xid IS NOT NULL AND folded_rows > 0
FROM worker_spi_workers JOIN pg_stat_activity AS a USING (pid) WHERE index = 2
EOQ
is(worker($node, 2, "state, folded_rows BETWEEN 1 AND 299999, fold_count - $before"),
	'folding|t|0', 'the view shows the progress of a long cycle');
is(worker($node, 2, 'folded_rows'),
	$node->safe_psql('postgres',
		"SELECT value FROM schema2.counted WHERE type = 'total'"),
	'which is what it has committed');
is(total($node, 2), '300000', 'and the sum is right in the midst of it');

# stop it there
$pid = worker($node, 2, 'pid');
my $began = time;
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(2)'),
	't', 'a worker can be stopped while it folds');
cmp_ok(time - $began, '<', 4, 'within 2 seconds (twice that is allowed here)');
ok(!kill(0, $pid), 'and then its process is gone');
nothing_left($node, 2, 'and its registration');
is(total($node, 2), '300000', 'the sum is right');
cmp_ok(
	$node->safe_psql(
		'postgres', "SELECT count(*) FROM schema2.counted WHERE type = 'delta'"),
	'>', 0, 'though not all is folded');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(2), worker_spi_fold(2)'),
	'f|f', 'there is no such worker any more');

# A static worker that was stopped stays away for longer than the server takes
# to restart one that ends after it.
$node->safe_psql('postgres', 'SELECT pg_terminate_backend(pid) FROM worker_spi_workers WHERE index = 1');
$node->poll_query_until('postgres',
	"SELECT state = 'idle' AND restart_count = 2 FROM worker_spi_workers
	 WHERE index = 1")
  or die 'worker 1 did not come back';
nothing_left($node, 2, 'a stopped static worker is not restarted');

# Its index is free.  The launched worker goes on where the other was stopped.
$holder->query_safe('SELECT pg_advisory_unlock(42)');
is( $node->safe_psql(
		'postgres', 'SELECT worker_spi_launch(2) > 0, worker_spi_fold(2)'),
	't|t',
	'its index can be launched');
is(worker($node, 2, 'kind, restart_count, fold_count'),
	'dynamic|0|1', 'as a new worker');
is($node->safe_psql('postgres', 'TABLE schema2.counted'),
	'total|300000', 'which folds the rest');

# while it waits for a lock
$holder->query_safe("BEGIN; LOCK TABLE schema2.counted IN ACCESS EXCLUSIVE MODE");
$node->safe_psql('postgres', 'SELECT worker_spi_fold(2, wait => false)');
$node->poll_query_until('postgres',
	"SELECT wait_event_type = 'Lock'
	 FROM worker_spi_workers JOIN pg_stat_activity USING (pid) WHERE index = 2")
  or die 'worker 2 does not wait for the lock';
$pid = worker($node, 2, 'pid');
$offset = -s $node->logfile;
$began = time;
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(2)'),
	't', 'a worker can be stopped while it waits for a lock');
cmp_ok(time - $began, '<', 4, 'within 2 seconds (twice that is allowed here)');
ok(!$node->log_contains(qr/lock timeout/, $offset),
	'without waiting until it gives up');
ok(!kill(0, $pid), 'and then its process is gone');
$holder->query_safe('ROLLBACK');

# Somebody who waits for a fold learns that the worker was stopped.
$pid = $node->safe_psql('postgres', 'SELECT worker_spi_launch(2)');
$node->safe_psql('postgres', 'SELECT worker_spi_fold(2)');
kill 'STOP', $pid or die "kill: $!";
$waiter = start_psql($node, 'postgres', 'waiter', 'SELECT worker_spi_fold(2)');
wait_for_psql($waiter);
my $stopper = start_psql($node, 'postgres', 'stopper', 'SELECT worker_spi_stop(2)');
wait_for_psql($stopper);
kill 'CONT', $pid or die "kill: $!";
is((finish_psql($stopper))[0], 't', 'a worker is stopped with a fold to do');
like((finish_psql($waiter))[1],
	qr/ERROR:  55000: worker with index 2 is not running/,
	'whoever waits for the fold gets an error');

#
# NOTIFY.  Notifications come in the order of their commits, so that all of
# the worker's are there when the session's own is.
#
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
is( notifications(2, "SELECT 'delta', 1 FROM generate_series(1, 300000)"),
	'schema2.counted 300000, end',
	'and one only for a cycle of several transactions');
$node->safe_psql('postgres', <<EOQ);
BEGIN;
DROP TABLE schema2.counted;
CREATE TABLE schema2.counted (type text, value bigint, page int);
COMMIT;
EOQ
is( notifications(2, "SELECT 'delta', 1, i % 12 FROM generate_series(1, 100) i"),
	'schema2.counted, end',
	'with keys it names the table alone');
is(notifications(2, "SELECT 'delta', 1, 1 WHERE false"),
	'end', 'a cycle that folds nothing notifies nobody');

#
# Stop a worker that the server has yet to restart
#
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
	'static|postgres|starting',
	'a worker that the server is to restart is still registered');
error_is($node, 'postgres', 'SELECT worker_spi_launch(2)',
	'42710', qr/index 2 already runs/, 'its index is taken');
error_is($node, 'postgres', 'SELECT worker_spi_fold(2)',
	'55000', qr/not running.*HINT:.*3600 seconds/s,
	'a fold does not wait for its return');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(2)'),
	't', 'it can be stopped');
nothing_left($node, 2, 'and then it is gone');
is($node->safe_psql('postgres', 'SELECT worker_spi_launch(2) > 0'),
	't', 'and its index free');
$node->safe_psql('postgres',
	'SELECT pg_terminate_backend(pid) FROM worker_spi_workers WHERE index = 2');
$node->poll_query_until('postgres',
	'SELECT pid IS NULL FROM worker_spi_workers WHERE index = 2')
  or die 'worker 2 did not end';
is( $node->safe_psql('postgres',
		'SELECT worker_spi_stop(2), worker_spi_launch(2) > 0, worker_spi_stop(2)'),
	't|t|t',
	'the same with a dynamic one');

#
# Fifty sessions
#
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
		'SELECT count(*) FILTER (WHERE index <> 1) FROM worker_spi_workers'),
	'0',
	'no registration is left of it');
is( $node->safe_psql(
		'postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'worker_spi%'"),
	'1',
	'nor a process');
is( $node->safe_psql(
		'postgres', 'SELECT worker_spi_launch(10) > 0, worker_spi_fold(10),
			worker_spi_stop(10), worker_spi_fold(1)'),
	't|t|t|t',
	'and everything works as before');

$holder->quit;
done_testing();
