# Errors stay inside the worker.  Whatever makes a fold fail, the same process
# lives on, no delta is lost, the failure is logged once however often it is
# met again, the retries come at growing intervals, and folding goes on by
# itself when the cause is gone.
#
# It waits for worker_spi_fold(), for states and counters in the view, and
# for the lock that a worker is to wait for in pg_stat_activity.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# Small WAL segments, because the limit on the size of files that stands for
# a full disk must leave room for them.
my $node = new_node('errors', <<'EOC', extra => ['--wal-segsize=1']);
worker_spi.total_workers = 15
autovacuum = off
EOC

# How many errors process $pid has written to the log since $offset.
sub errors_in_log
{
	my ($pid, $offset) = @_;
	return scalar grep { / ERROR: / } server_lines($node, $offset, $pid);
}

# What the view says of worker $index while it waits after its failure number
# $failed: SQLSTATE, how often it failed in all, and the delay in seconds.
sub backoff
{
	my ($index, $failed) = @_;
	my $where = "index = $index AND state = 'backoff' AND failed_count >= $failed";

	for (;;)
	{
		$node->poll_query_until('postgres',
			"SELECT count(*) = 1 FROM worker_spi_workers WHERE $where")
		  or die "worker $index did not back off";
		my $row = $node->safe_psql('postgres', <<EOQ);
SELECT last_sqlstate, failed_count,
       extract(epoch FROM next_fold_time - last_failed_time)
FROM worker_spi_workers WHERE $where
EOQ

		# Empty if the worker has just begun to try again.
		return split(/\|/, $row) if $row ne '';
	}
}

# Is this the delay after so many failures in a row?  It is up to an eighth
# shorter than the power of two.  The worker needs a moment from the failure
# to the nap; half of the delay is more than enough.
sub delay_is_right
{
	my ($delay, $failures) = @_;
	my $full = 2**($failures - 1);
	return $delay >= $full * 7 / 8 && $delay < $full * 1.5;
}

# Wait until worker $index has folded everything by itself, and see that it is
# the same process as before and that the total is right.
sub recovers
{
	my ($index, $pid, $total, $test) = @_;

	$node->poll_query_until('postgres', <<EOQ)
SELECT count(*) = 1 AND min(value) = $total AND
       (SELECT state = 'idle' FROM worker_spi_workers WHERE index = $index)
FROM schema$index.counted
EOQ
	  or die "worker $index did not fold again after: $test";
	is(worker($node, $index, 'pid'), $pid,
		"$test: the same process folds again, by itself, and nothing is lost");
	return;
}

# Start with total 100 and one delta, so that a cycle has something to lose.
sub prepare
{
	my ($index) = @_;
	$node->safe_psql('postgres', <<EOQ);
DELETE FROM schema$index.counted;
INSERT INTO schema$index.total VALUES ('total', 100);
INSERT INTO schema$index.counted VALUES ('delta', 7);
EOQ
	return;
}

wait_for_state($node, $_, 'idle') for (1 .. 15);

# ------------------------------------------------------------------------
# Causes that come with one command and go with another; each has a worker of
# its own, and they fail side by side.
# ------------------------------------------------------------------------
my @cases = (
	{
		name => 'table replaced by a view',
		break => 'ALTER TABLE %s RENAME TO aside;'
		  . ' CREATE VIEW %s AS SELECT * FROM %sx',
		mend => 'DROP VIEW %s; ALTER TABLE %sx RENAME TO counted',
		sqlstate => '42809',
		total => 107
	},
	{
		name => 'column type changed',
		break => 'ALTER TABLE %s ALTER COLUMN value TYPE numeric',
		mend => 'ALTER TABLE %s ALTER COLUMN value TYPE bigint',
		sqlstate => '42P16',
		total => 107
	},
	{
		name => 'column renamed',
		break => 'ALTER TABLE %s RENAME COLUMN value TO amount',
		mend => 'ALTER TABLE %s RENAME COLUMN amount TO value',
		sqlstate => '42P16',
		total => 107
	},
	{
		name => 'trigger that raises an error',
		break => 'CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql'
		  . q{ AS $$BEGIN RAISE 'not today' USING ERRCODE = '58030'; END$$;}
		  . ' CREATE TRIGGER refuse AFTER DELETE ON %s EXECUTE FUNCTION public.refuse();'
		  . ' ALTER TABLE %s ENABLE ALWAYS TRIGGER refuse',
		mend => 'DROP TRIGGER refuse ON %s',
		sqlstate => '58030',
		total => 107
	},
	{
		name => 'column that is no key',
		break => 'ALTER TABLE %s ADD COLUMN page text',
		mend => 'ALTER TABLE %s DROP COLUMN page',
		sqlstate => '42P16',
		total => 107
	},
	{
		name => 'table renamed',
		break => 'ALTER TABLE %s RENAME TO aside',
		mend => 'ALTER TABLE %sx RENAME TO counted',
		sqlstate => '42P01',
		total => 107
	},
	{
		name => 'totals renamed, and others in their place',
		break => 'ALTER TABLE %n.total RENAME TO old_total;'
		  . ' ALTER TABLE %n.old_total NO INHERIT %s;'
		  . ' CREATE TABLE %n.total (LIKE %n.old_total INCLUDING ALL)',
		mend => 'DROP TABLE %n.total; ALTER TABLE %n.old_total INHERIT %s',
		sqlstate => '42P07',
		total => 107
	},
	{
		name => 'totals dropped',
		break => 'DROP TABLE %n.total',
		mend => 'CREATE TABLE %n.total (PRIMARY KEY (type)) INHERITS (%s)',
		sqlstate => '42P01',
		total => 7
	},
	{
		name => 'table of what is stuck dropped',
		break => 'DROP TABLE %n.stuck',
		mend => 'CREATE TABLE %n.stuck (sqlstate text, reason text, since timestamptz) INHERITS (%s)',
		sqlstate => '42P01',
		total => 107
	},
	{
		name => 'rule',
		break => 'CREATE RULE keep AS ON DELETE TO %s DO INSTEAD NOTHING',
		mend => 'DROP RULE keep ON %s',
		sqlstate => '42809',
		total => 107
	},
	{
		name => 'table locked by another session',
		session => 'LOCK TABLE %s IN ACCESS EXCLUSIVE MODE',
		sqlstate => '55P03',
		total => 107
	});

# %s is the worker's table, %sx the name to which a case has moved it, %n the
# schema.
sub fill_in
{
	my ($sql, $index) = @_;
	$sql =~ s/%n/schema$index/g;
	$sql =~ s/%sx/schema$index.aside/g;
	$sql =~ s/%s/schema$index.counted/g;
	return $sql;
}

my $offset = -s $node->logfile;
my $index = 0;
my @quick = grep { $_->{break} } @cases;
my @locks = grep { $_->{session} } @cases;

# See that a case has failed at least $wanted times, and how.
sub check_failure
{
	my ($case, $wanted) = @_;
	my ($sqlstate, $failed, $delay) = backoff($case->{index}, $wanted);

	is($sqlstate, $case->{sqlstate},
		"$case->{name}: the view shows backoff and the SQLSTATE");
	ok(delay_is_right($delay, $failed),
		"$case->{name}: the delay has doubled with each failure")
	  or diag("delay $delay s after $failed failures");
	is(errors_in_log($case->{pid}, $offset),
		1, "$case->{name}: all failures together are one ERROR in the log");
	return;
}

sub check_recovery
{
	my ($case) = @_;

	recovers($case->{index}, $case->{pid}, $case->{total}, $case->{name});
	is(errors_in_log($case->{pid}, $offset),
		1, "$case->{name}: recovery adds no ERROR to the log");
	return;
}

foreach my $case (@cases)
{
	$case->{index} = ++$index;
	$case->{pid} = worker($node, $index, 'pid');
	prepare($index);
}

# Each call is a retry at once.
foreach my $case (@quick)
{
	$node->safe_psql('postgres', fill_in($case->{break}, $case->{index}));
	error_is($node, 'postgres', "SELECT worker_spi_fold($case->{index})",
		$case->{sqlstate}, qr/./,
		"$case->{name}: worker_spi_fold() raises the worker's error")
	  for (1 .. 3);
	check_failure($case, 3);
	$node->safe_psql('postgres', fill_in($case->{mend}, $case->{index}));
}

check_recovery($_) foreach (@quick);

# This one fails whenever its lock_timeout is over.
foreach my $case (@locks)
{
	$case->{psql} = $node->background_psql('postgres');
	$case->{psql}
	  ->query_safe('BEGIN; ' . fill_in($case->{session}, $case->{index}));
	$node->safe_psql('postgres',
		"SELECT worker_spi_fold($case->{index}, wait => false)");
}
check_failure($_, 2) foreach (@locks);
foreach my $case (@locks)
{
	$case->{psql}->query_safe('COMMIT');
	$case->{psql}->quit;
}
check_recovery($_) foreach (@locks);

# The delay starts from one second again, and a new failure is logged again.
{
	my $case = $cases[2];
	my $before = worker($node, $case->{index}, 'failed_count');

	prepare($case->{index});
	$node->safe_psql('postgres', fill_in($case->{break}, $case->{index}));
	error_is($node, 'postgres', "SELECT worker_spi_fold($case->{index})",
		$case->{sqlstate}, qr/value/, 'the same failure comes back after a success');
	my ($sqlstate, $failed, $delay) = backoff($case->{index}, $before + 1);
	ok(delay_is_right($delay, $failed - $before),
		'a success has reset the delay')
	  or diag("delay $delay s");
	is(errors_in_log($case->{pid}, $offset), 2,
		'and it is logged anew');
	$node->safe_psql('postgres', fill_in($case->{mend}, $case->{index}));
	recovers($case->{index}, $case->{pid}, 107, 'second time');
}

# ------------------------------------------------------------------------
# pg_cancel_backend()
# ------------------------------------------------------------------------
my $pid = worker($node, 13, 'pid');
my $failed = worker($node, 13, 'failed_count');

is($node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)"),
	't', 'an idle worker is cancelled');
prepare(13);
folds($node, 13, 'a cancel that came during the nap does not spoil the next cycle');
is(worker($node, 13, 'failed_count'), $failed, 'and is no failure');
is(worker($node, 13, 'pid'), $pid, 'and does not end the worker');

# The gate keeps the worker in its fold for as long as the test needs.
prepare(13);
add_gate($node, 13, 13);
$offset = -s $node->logfile;
my $psql = $node->background_psql('postgres');
$psql->query_safe('SELECT pg_advisory_lock(13)');
$node->safe_psql('postgres', 'SELECT worker_spi_fold(13, wait => false)');
$node->poll_query_until('postgres',
	"SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $pid")
  or die 'worker 13 does not wait for the lock';
$node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)");
$node->poll_query_until('postgres',
	"SELECT failed_count > $failed FROM worker_spi_workers WHERE index = 13")
  or die 'worker 13 does not fail';
is(worker($node, 13, 'last_sqlstate'), '57014', 'a fold is cancelled');
$psql->query_safe('SELECT pg_advisory_unlock(13)');
$psql->quit;
recovers(13, $pid, 107, 'cancelled fold');
is(errors_in_log($pid, $offset), 1, 'a cancelled fold is one ERROR in the log');

# ------------------------------------------------------------------------
# Serialization failure and deadlock: the other session has won, and the
# worker tries again at once, in the safe way, so nobody sees a failure.
# ------------------------------------------------------------------------

# SQL: wait until worker 14 waits for a lock.
my $until_worker_waits = <<'EOQ';
	LOOP
		EXIT WHEN EXISTS (
			SELECT FROM pg_locks JOIN worker_spi_workers USING (pid)
			WHERE index = 14 AND NOT granted);
	END LOOP;
EOQ

$pid = worker($node, 14, 'pid');
prepare(14);
$failed = worker($node, 14, 'failed_count');
$offset = -s $node->logfile;

# The worker waits for the total row, which then changes under its snapshot.
$psql = $node->background_psql('postgres', on_error_stop => 0);
$psql->query_until(
	qr/start/, <<EOQ);
\\echo start
DO \$\$
BEGIN
	UPDATE schema14.total SET value = value + 1000;
	PERFORM worker_spi_fold(14, wait => false);
	$until_worker_waits
	COMMIT;
END
\$\$;
EOQ
$node->poll_query_until('postgres',
	"SELECT wait_event_type = 'Lock' OR (SELECT count(*) = 1 FROM schema14.counted) FROM pg_stat_activity WHERE pid = $pid"
) or die 'worker 14 does not fold';
folds($node, 14, 'serialization failure: worker_spi_fold() gets the result of the retry');
$psql->quit;
is($node->safe_psql('postgres', 'SELECT value FROM schema14.counted'),
	'1107', 'serialization failure: both changes of the total are there');
is(worker($node, 14, 'failed_count'),
	$failed, 'serialization failure: the retry at once makes it no failed cycle');
is(errors_in_log($pid, $offset),
	0, 'serialization failure: nothing in the log');

# The worker waits for a row that the other session holds, which then wants one
# that the worker holds.  The other session's check for deadlocks never comes, so
# it is the worker that has to give up.
prepare(14);
$node->safe_psql('postgres', <<EOQ);
DO \$\$
BEGIN
	SET LOCAL deadlock_timeout = '1h';
	PERFORM FROM ONLY schema14.counted FOR UPDATE;
	PERFORM worker_spi_fold(14, wait => false);
	$until_worker_waits
	UPDATE schema14.total SET value = value + 1000;
END
\$\$;
EOQ
pass('a session that the worker blocks, and that blocks the worker, goes on');
folds($node, 14, 'deadlock: the worker tries again');
is($node->safe_psql('postgres', 'SELECT value FROM schema14.counted'),
	'1107', 'deadlock: both changes of the total are there');
is(worker($node, 14, 'pid'), $pid, 'deadlock: the worker lives');

# ------------------------------------------------------------------------
# default_transaction_read_only comes and goes by reload.  It is met by a
# worker that has to write: an idle one does not fail.
# ------------------------------------------------------------------------
$pid = worker($node, 14, 'pid');
prepare(14);
$offset = -s $node->logfile;
$failed = worker($node, 14, 'failed_count');
$node->append_conf('postgresql.conf', 'default_transaction_read_only = on');
$node->reload;

# Cycles that come before the worker has seen the reload still fold, so each
# has something to fold.
for (1 .. 1000)
{
	last if worker($node, 14, 'state') eq 'backoff';
	$node->safe_psql('postgres', <<'EOQ');
SET default_transaction_read_only = off;
INSERT INTO schema14.counted VALUES ('delta', 0);
SELECT worker_spi_fold(14, wait => false);
EOQ
}
error_is($node, 'postgres', 'SELECT worker_spi_fold(14)',
	'25006', qr/read-only transaction/,
	'read-only transactions: worker_spi_fold() raises the error');
(my $sqlstate, $failed, my $delay) = backoff(14, $failed + 2);
is($sqlstate, '25006', 'read-only transactions: the worker backs off');
is(errors_in_log($pid, $offset),
	1, 'read-only transactions: several failures are one ERROR in the log');
$node->adjust_conf('postgresql.conf', 'default_transaction_read_only', 'off');
$node->reload;
recovers(14, $pid, 107, 'read-only transactions');

# A schema goes away, and comes back while somebody else has one of its name.
# ------------------------------------------------------------------------
$pid = worker($node, 15, 'pid');
prepare(15);
$offset = -s $node->logfile;
$node->safe_psql('postgres', 'ALTER SCHEMA schema15 RENAME TO pages');
error_is($node, 'postgres', 'SELECT worker_spi_fold(15)',
	'42P01', qr/table "postgres\.schema15\.counted" does not exist.*stop the worker and launch it again/s,
	'a renamed schema is an error, which says how to have the tables made');
$node->safe_psql('postgres', <<'EOQ');
CREATE SCHEMA schema15;
INSERT INTO pages.counted VALUES ('delta', 1);
EOQ
error_is($node, 'postgres', 'SELECT worker_spi_fold(15)',
	'42P01', qr/does not exist/, 'also with an empty one in its place');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM pg_class WHERE relnamespace = 'schema15'::regnamespace"),
	'0',
	'where nothing is made');
is( $node->safe_psql('postgres', 'SELECT type, value FROM pages.counted ORDER BY value'),
	"delta|1\ndelta|7\ntotal|100",
	'and what was renamed is left alone');
$node->safe_psql('postgres', 'DROP SCHEMA schema15; ALTER SCHEMA pages RENAME TO schema15');
recovers(15, $pid, 108, 'schema renamed');
is(errors_in_log($pid, $offset), 1, 'schema renamed: one ERROR in the log');

# ------------------------------------------------------------------------
# Disk full: a limit on the size of files, for the worker alone.  Thousands of
# keys make it extend the totals beyond the limit, which WAL does not reach.
# ------------------------------------------------------------------------
SKIP:
{
	skip 'prlimit is not there', 8
	  if system('prlimit --version >/dev/null 2>&1') != 0;

	$node->safe_psql('postgres', <<'EOQ');
CREATE SCHEMA schema20;
CREATE TABLE schema20.counted (value bigint NOT NULL, key int NOT NULL);
CREATE TABLE schema20.total (PRIMARY KEY (key)) INHERITS (schema20.counted);
EOQ
	$pid = $node->safe_psql('postgres', 'SELECT worker_spi_launch(20)');
	$node->safe_psql('postgres', <<'EOQ');
INSERT INTO schema20.counted SELECT i, i FROM generate_series(1, 40000) AS i;
EOQ
	my $limit = 1024 * 1024;
	cmp_ok(
		$node->safe_psql(
			'postgres', "SELECT pg_relation_size('schema20.counted')"),
		'>', $limit,
		'disk full: the totals of these deltas are larger than their file may get');
	system_or_bail('prlimit', "--pid=$pid", "--fsize=$limit:");

	$offset = -s $node->logfile;
	error_is($node, 'postgres', 'SELECT worker_spi_fold(20)',
		'.....', qr/could not (extend|write)/,
		'disk full: worker_spi_fold() raises the error')
	  for (1 .. 2);
	is(errors_in_log($pid, $offset),
		1, 'disk full: two failures are one ERROR in the log');
	is( $node->safe_psql(
			'postgres', 'SELECT sum(value) FROM schema20.counted'),
		'800020000',
		'disk full: nothing is lost, nothing is counted twice');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM schema20.stuck'),
		'0', 'disk full: and nothing is stuck');
	system_or_bail('prlimit', "--pid=$pid", '--fsize=unlimited:');
	wait_for_fold($node, 20);
	is( $node->safe_psql(
			'postgres', 'SELECT count(*), sum(value) FROM schema20.total'),
		'40000|800020000',
		'disk full: all is folded by itself when there is space again');
	is(worker($node, 20, 'pid'), $pid, 'disk full: by the same process');
}

# ------------------------------------------------------------------------
# The owner of deltas may not make the other tables in the schema.
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOQ');
CREATE ROLE regress_owner;
CREATE SCHEMA schema21;
GRANT USAGE ON SCHEMA schema21 TO regress_owner;
CREATE TABLE schema21.counted (type text, value bigint);
ALTER TABLE schema21.counted OWNER TO regress_owner;
INSERT INTO schema21.counted VALUES ('delta', 14);
EOQ
error_is($node, 'postgres', 'SELECT worker_spi_launch(21)', '42501',
	qr/owner of table "postgres\.schema21\.counted".*GRANT CREATE ON SCHEMA schema21 TO regress_owner/s,
	'an owner who may not make tables is told so, and how to');
nothing_left($node, 21, 'the launch has left nothing');
$node->safe_psql('postgres', 'GRANT CREATE ON SCHEMA schema21 TO regress_owner; SELECT worker_spi_launch(21)');
folds($node, 21, 'with the privilege, the worker makes them');
is(rows($node, 21), 'total|14', 'and folds');
is( $node->safe_psql('postgres',
		"SELECT string_agg(tablename, ' ' ORDER BY tablename), min(tableowner), max(tableowner) FROM pg_tables WHERE schemaname = 'schema21'"),
	'counted stuck total|regress_owner|regress_owner',
	'and they belong to that owner');

# ------------------------------------------------------------------------
# The role of the static workers is dropped and made again.  What a process
# has connected as cannot be changed, so these are other processes.
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOQ');
CREATE ROLE regress_folder SUPERUSER LOGIN;
ALTER SYSTEM SET worker_spi.role = 'regress_folder';
SELECT pg_reload_conf();
EOQ
$node->poll_query_until('postgres', <<'EOQ') or die 'role was not taken over';
SELECT count(*) = 15 FROM pg_stat_activity
WHERE backend_type = 'worker_spi' AND usename = 'regress_folder'
EOQ
wait_for_state($node, 15, 'idle');
$pid = worker($node, 15, 'pid');
$node->safe_psql('postgres', <<'EOQ');
DROP ROLE regress_folder;
DELETE FROM schema15.counted;
INSERT INTO schema15.total VALUES ('total', 100);
INSERT INTO schema15.counted VALUES ('delta', 7);
EOQ
error_is($node, 'postgres', 'SELECT worker_spi_fold(15)',
	'55000', qr/./,
	'a dropped role ends the process of a static worker');
is(total($node, 15), '107', 'nothing is folded without the role');
$node->poll_query_until('postgres', <<'EOQ') or die 'no failed restart';
SELECT last_sqlstate = '28000' AND last_error LIKE '%regress_folder%'
FROM worker_spi_workers WHERE index = 15
EOQ
pass('a restart without the role fails, and the view says why');
$node->safe_psql('postgres', 'CREATE ROLE regress_folder SUPERUSER LOGIN');
$node->poll_query_until('postgres',
	'SELECT count(*) = 1 AND min(value) = 107 FROM schema15.counted')
  or die 'worker 15 did not come back';
isnt(worker($node, 15, 'pid'), $pid, 'with the role, a new process folds what was left');

$node->stop;
done_testing();
