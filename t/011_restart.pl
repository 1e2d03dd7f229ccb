# Workers come back: terminated ones after the restart interval, all of them
# at once after a crash, with the right state in the view; and those that can
# never work again give up with one line in the log.
#
# It waits for pids, states and counters in the view, for tables to be folded
# by workers that nobody calls, and for the server's own lines in the log
# after a crash.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# ------------------------------------------------------------------------
# After a crash, with a restart interval that is longer than this test
# ------------------------------------------------------------------------
my $node = new_node('crash', <<'EOC');
worker_spi.total_workers = 3
worker_spi.restart_interval = 600
restart_after_crash = on
EOC

wait_for_state($node, $_, 'idle') for (1 .. 3);
$node->safe_psql('postgres', 'CREATE DATABASE other');
my $other = database_oid($node, 'other');
$node->safe_psql('postgres', 'SELECT worker_spi_launch(7)');
$node->safe_psql('postgres', "SELECT worker_spi_launch(1, $other)");
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(2)'),
	't', 'a static worker is stopped');

# What should be in the view before and after, whoever crashes.
my $registered = <<'EOQ';
SELECT index, kind, datname, rolname, state
FROM worker_spi_workers ORDER BY index, datname
EOQ
my $expected = <<'EOE';
1|dynamic|other|postgres|idle
1|static|postgres|postgres|idle
2|static|postgres|postgres|stopped
3|static|postgres|postgres|idle
7|dynamic|postgres|postgres|idle
EOE
chomp $expected;

foreach my $who ('a worker', 'another backend')
{
	my $victim = $node->background_psql('postgres');
	my $pid =
	  $who eq 'a worker'
	  ? worker($node, 3, 'pid')
	  : $victim->query_safe('SELECT pg_backend_pid()');

	$node->safe_psql('postgres', <<'EOQ');
INSERT INTO schema1.counted VALUES ('delta', 1);
INSERT INTO schema3.counted VALUES ('delta', 1);
INSERT INTO schema7.counted VALUES ('delta', 1);
EOQ
	crash($node, $pid) or die "$who did not crash";

	# With the interval of ten minutes, this succeeds only if they start at
	# once; each folds what the crash left behind.
	foreach my $index (1, 3, 7)
	{
		$node->poll_query_until('postgres',
			"SELECT count(*) = 1 AND min(type) = 'total' FROM schema$index.counted")
		  or die "worker $index did not fold after the crash";
	}
	$node->poll_query_until('postgres', <<'EOQ') or die 'workers are not idle';
SELECT count(*) = 4 FROM worker_spi_workers WHERE state = 'idle'
EOQ
	is($node->safe_psql('postgres', $registered),
		$expected,
		"$who crashed: all workers but the stopped one are back at once");
	is( process_count($node),
		'4',
		"$who crashed: and there are no others");
	is( $node->safe_psql(
			'postgres', <<'EOQ'),
SELECT count(*) = 4 FROM worker_spi_workers AS w
JOIN pg_stat_activity AS a USING (pid)
WHERE a.backend_start >= now() - interval '1 minute'
  AND abs(extract(epoch FROM w.worker_start - a.backend_start)) < 10
  AND a.datname = w.datname AND restart_count = 0
EOQ
		't',
		"$who crashed: the view shows the new processes");
	eval { $victim->quit };
}

is(total($node, $_), '2', "nothing is lost by the crashes: worker $_")
  for (1, 3, 7);
error_is($node, 'postgres', 'SELECT worker_spi_fold(2)',
	'55000', qr/./, 'the stopped worker stays stopped after the crashes');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(7)'),
	't', 'a dynamic worker that survived a crash can be stopped');
is( $node->safe_psql('postgres', 'SELECT worker_spi_launch(2) > 0'), 't',
	'and can be launched again');
is(worker($node, 2, 'kind'), 'static', 'as the static one that it was');

# A slot is cleaned up by its own process only: one that is told to go while
# it starts must not take shared memory, and so the server, with it.
my $survivor = $node->background_psql('postgres');
my $locker = $node->background_psql('postgres');
$locker->query_safe('CREATE SCHEMA schema9');
$locker->query_safe('CREATE TABLE schema9.counted (type text, value bigint)');
$locker->query_safe('BEGIN; LOCK TABLE schema9.counted');
for (1 .. 3)
{
	my $launcher = $node->background_psql('postgres', on_error_stop => 0);

	# It waits for the table, and so does the caller for it, until it gives up:
	# then it is launched again.
	$launcher->query_until(qr/start/, <<'EOQ');
\echo start
DO $$
BEGIN
	LOOP
		BEGIN
			PERFORM worker_spi_launch(9);
		EXCEPTION WHEN lock_not_available THEN
			NULL;
		END;
	END LOOP;
END
$$;
EOQ
	$node->poll_query_until('postgres', <<'EOQ') or die 'worker 9 does not start';
SELECT count(pg_terminate_backend(pid)) = 1
FROM worker_spi_workers JOIN pg_locks USING (pid) WHERE index = 9 AND NOT granted
EOQ
	$node->poll_query_until('postgres',
		'SELECT count(*) = 0 FROM worker_spi_workers WHERE index = 9')
	  or die 'worker 9 is still there';
	$launcher->quit;
}
$locker->query_safe('COMMIT');
$locker->quit;
is($node->safe_psql('postgres', 'SELECT worker_spi_launch(9) > 0'),
	't', 'a worker that was terminated while it started leaves its slot behind');
is($survivor->query_safe('SELECT 1'),
	'1', 'and no crash: sessions live on');
$survivor->quit;

# ------------------------------------------------------------------------
# Stop and start in each mode
# ------------------------------------------------------------------------
my $sum = 2;
foreach my $mode ('smart', 'fast', 'immediate')
{
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted VALUES ('delta', 10)");
	$sum += 10;
	$node->stop($mode);
	$node->start;
	$node->poll_query_until('postgres',
		"SELECT count(*) = 1 AND min(type) = 'total' AND min(value) = $sum FROM schema1.counted")
	  or die "backlog was not folded after $mode shutdown";
	wait_for_state($node, 2, 'idle');
	is( $node->safe_psql(
			'postgres',
			"SELECT string_agg(index::text, ' ' ORDER BY index) FROM worker_spi_workers WHERE kind = 'static'"
		),
		'1 2 3',
		"$mode shutdown: the backlog is folded, and stopped workers are back");
}
is( $node->safe_psql(
		'postgres', "SELECT count(*) FROM worker_spi_workers WHERE kind = 'dynamic'"),
	'0',
	'dynamic workers end with the server');
$node->stop;

# ------------------------------------------------------------------------
# pg_upgrade
# ------------------------------------------------------------------------
command_ok(
	[
		'pg_ctl', '-w', '-D', $node->data_dir, '-l', $node->logfile,
		'-o', '-b', 'start'
	],
	'the server starts in binary upgrade mode');
is( process_count($node),
	'0',
	'no worker runs in binary upgrade mode');
error_is($node, 'postgres', 'TABLE worker_spi_workers', '55000', qr/./,
	'none is registered either');
command_ok([ 'pg_ctl', '-D', $node->data_dir, '-m', 'fast', 'stop' ],
	'and nothing keeps the server from stopping');

# ------------------------------------------------------------------------
# Termination, with a restart interval of one second
# ------------------------------------------------------------------------
$node = new_node('restart', <<'EOC');
worker_spi.total_workers = 1
max_worker_processes = 5
EOC
wait_for_state($node, 1, 'idle');
$node->safe_psql('postgres', 'SELECT worker_spi_launch(2)');

foreach my $case ([ 1, 'static' ], [ 2, 'dynamic' ])
{
	my ($index, $kind) = @$case;
	my $pid = worker($node, $index, 'pid');
	my $start = worker($node, $index, 'worker_start');
	my $ended = $node->safe_psql(
		'postgres', <<EOQ);
INSERT INTO schema$index.counted VALUES ('delta', 4);
SELECT clock_timestamp() FROM pg_terminate_backend($pid);
EOQ

	wait_for_restart($node, $index, $pid);
	wait_for_fold($node, $index);
	is( $node->safe_psql(
			'postgres', <<EOQ),
SELECT worker_start - '$ended' >= interval '1 s', restart_count, kind
FROM worker_spi_workers WHERE index = $index
EOQ
		"t|1|$kind",
		"a terminated $kind worker is back, not before the restart interval");
	is($node->safe_psql('postgres', "TABLE schema$index.counted"),
		'total|4', "and the $kind worker folds what was left");
}

# ------------------------------------------------------------------------
# Dynamic workers that have nothing to come back to
# ------------------------------------------------------------------------
$node->safe_psql('postgres', 'CREATE DATABASE doomed');
$node->safe_psql('postgres', 'CREATE ROLE regress_doomed LOGIN SUPERUSER');
my $doomed = database_oid($node, 'doomed');
my $role = $node->safe_psql('postgres',
	"SELECT oid FROM pg_roles WHERE rolname = 'regress_doomed'");

# The server's own launcher for logical replication has the fifth slot.
my $dbpid = $node->safe_psql('postgres', "SELECT worker_spi_launch(3, $doomed)");
my $rolepid =
  $node->safe_psql('postgres', "SELECT worker_spi_launch(4, 0, $role)");
error_is($node, 'postgres', 'SELECT worker_spi_launch(5)',
	'53400', qr/"max_worker_processes", which is 5/,
	'all slots are taken, and the error says what to change');

my $offset = -s $node->logfile;
$node->safe_psql('postgres', 'DROP DATABASE doomed WITH (FORCE)');
$node->poll_query_until('postgres',
	'SELECT count(*) = 0 FROM worker_spi_workers WHERE index = 3')
  or die 'worker 3 has not given up';
my @fatal = grep { /FATAL/ && /database/ } server_lines($node, $offset);
is(scalar(@fatal), 1,
	'a dynamic worker gives up with one line when its database is gone')
  or diag(join("\n", @fatal));
$node->poll_query_until('postgres', 'SELECT worker_spi_launch(5) > 0')
  or die 'the slot is not free';
pass('and its slot is free for another');

$offset = -s $node->logfile;
$node->safe_psql('postgres',
	'REASSIGN OWNED BY regress_doomed TO postgres; DROP ROLE regress_doomed');
$node->psql('postgres', 'SELECT worker_spi_fold(4)');
$node->poll_query_until('postgres',
	'SELECT count(*) = 0 FROM worker_spi_workers WHERE index = 4')
  or die 'worker 4 has not given up';
@fatal = grep { /FATAL/ } server_lines($node, $offset);
is(scalar(@fatal), 1,
	'a dynamic worker gives up with one line when its role is gone')
  or diag(join("\n", @fatal));
$node->poll_query_until('postgres', 'SELECT worker_spi_launch(6) > 0')
  or die 'the slot is not free';
pass('and its slot is free for another');

# ------------------------------------------------------------------------
# A static worker whose database does not exist
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOQ');
SELECT worker_spi_stop(i) FROM unnest('{2,5,6}'::int[]) AS i;
ALTER SYSTEM SET worker_spi.database = 'later';
SELECT pg_reload_conf();
EOQ
$node->poll_query_until('postgres',
	"SELECT last_sqlstate = '3D000' FROM worker_spi_workers WHERE index = 1")
  or die 'worker 1 did not try to connect';

$offset = -s $node->logfile;
my $count = worker($node, 1, 'restart_count');
my $since = time();
$node->poll_query_until('postgres',
	"SELECT restart_count >= $count + 3 FROM worker_spi_workers WHERE index = 1")
  or die 'worker 1 does not try again';

# The first of them may be of the attempt before.
my @lines = server_lines($node, $offset);
my $attempts = worker($node, 1, 'restart_count') - $count;
cmp_ok(scalar(@lines), '<=', 2 * ($attempts + 1),
	'a static worker without a database logs two lines for each attempt')
  or diag(join("\n", @lines));
cmp_ok($attempts, '<=', time() - $since + 2,
	'and tries once in a restart interval');
is(worker($node, 1, 'last_error'),
	'database "later" does not exist', 'and the view says why');

$node->safe_psql('postgres', 'CREATE DATABASE later');
my $later = database_oid($node, 'later');
wait_for_fold($node, 1, 'later');
wait_for_state($node, 1, 'idle');
pass('it works as soon as the database is created');

# ------------------------------------------------------------------------
# A worker that is stopped between two of its processes: the server starts one
# more for it, which must leave alone who has its slot by then.  The server does
# nothing while its first process is held.
# ------------------------------------------------------------------------
my $session = $node->background_psql('postgres');
my ($postmaster) = slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/;
kill('STOP', $postmaster);
my $stopped = eval {
	$session->query_safe(<<EOQ);
SELECT pg_terminate_backend(pid) FROM worker_spi_workers WHERE index = 1;
DO \$\$
BEGIN
	WHILE EXISTS (SELECT FROM worker_spi_workers WHERE index = 1 AND pid IS NOT NULL) LOOP
		PERFORM pg_sleep(0.01);
	END LOOP;
END \$\$;
SELECT worker_spi_stop(1, $later)
EOQ
};
kill('CONT', $postmaster);
is($stopped, "t\nt", 'a worker is stopped while it has no process');
$session->quit;
my $pid = $node->safe_psql('postgres', 'SELECT worker_spi_launch(8)');

# All slots can be taken as soon as that last process has come and gone.
$node->safe_psql('postgres', 'SELECT worker_spi_launch(i) FROM generate_series(9, 10) AS i');
$node->poll_query_until('postgres', 'SELECT worker_spi_launch(11) > 0')
  or die 'the stopped worker still has a slot of the server';
is( $node->safe_psql(
		'postgres',
		"SELECT string_agg(index || kind, ' ' ORDER BY index) FROM worker_spi_workers WHERE state = 'idle'"
	),
	'8dynamic 9dynamic 10dynamic 11dynamic',
	'it does not come back');
is( $node->safe_psql(
		'postgres', 'SELECT worker_spi_fold(8), worker_spi_fold(9)')
	  . worker($node, 8, 'pid'),
	"t|t$pid",
	'and the one that has its slot since goes on');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(8)'),
	't', 'and can be stopped');
$node->stop;

# ------------------------------------------------------------------------
# More static workers than the server has slots for
# ------------------------------------------------------------------------
$node->append_conf('postgresql.conf', <<'EOC');
worker_spi.total_workers = 8
max_worker_processes = 4
EOC
$offset = -s $node->logfile;
$node->start;
wait_for_state($node, $_, 'idle') for (1 .. 3);
is( process_count($node),
	'3',
	'with too few slots, as many static workers run as there is room for');
is( $node->safe_psql(
		'postgres', <<'EOQ'),
SELECT string_agg(index::text, ' ' ORDER BY index), count(pid)
FROM worker_spi_workers WHERE state = 'missing'
EOQ
	'4 5 6 7 8|0',
	'and the view shows the others as missing');
@lines = grep { /max_worker_processes/ } server_lines($node, $offset);
is(scalar(grep { / WARNING: / } @lines), 1, 'which the log warns of');
is(scalar(@lines), 1, 'once');
like($lines[0], qr/\b9\b/, 'with the number that all would need');
ok(!$node->log_contains(qr/too many background workers/, $offset),
	'and none is refused by the server');
$node->stop;

done_testing();
