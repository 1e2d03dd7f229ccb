# Pause and resume: a static worker that is stopped stays in the view, and
# stopped, until it is launched again, whatever happens to the server short of a
# restart; and then it is the static worker that it was.
#
# It waits for worker_spi_stop() and worker_spi_launch(), which return when it
# is done, and after a crash for the other worker to be back.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# What comes back by itself within this test comes back at once.
my $node = new_node('pause', <<'EOC');
worker_spi.total_workers = 2
worker_spi.restart_interval = 600
restart_after_crash = on
EOC
folds($node, $_) foreach 1, 2;
my $pid = worker($node, 1, 'pid');

# Worker 1 is stopped, and nothing else.
sub is_stopped
{
	my ($test) = @_;
	is(worker($node, 1, 'kind, datname, state, pid'),
		'static|postgres|stopped|', "$test: stopped");
	is( $node->safe_psql(
			'postgres', "SELECT application_name FROM pg_stat_activity WHERE backend_type LIKE 'worker\\_spi%'"
		),
		'worker_spi worker 2',
		"$test: only the other has a process");
	return;
}

# ------------------------------------------------------------------------
# Stop
# ------------------------------------------------------------------------
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(1)'),
	't', 'a static worker is stopped');
ok(!kill(0, $pid), 'its process is gone when the call returns');
is_stopped('after a stop');
my ($ret, $out, $err) = $node->psql('postgres', 'SELECT worker_spi_stop(1)');
is($out, 'f', 'it cannot be stopped twice');
like($err, qr/^\S*\s*WARNING:  there is no worker with index 1 in database "postgres"/,
	'which a warning says');
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '55000',
	qr/index 1/, 'it does not fold');
error_is($node, 'postgres', 'SELECT worker_spi_fold(1, wait => false)',
	'55000', qr/index 1/, 'nor when nobody waits');
$node->safe_psql('postgres', <<'EOC');
CREATE TRIGGER wake AFTER INSERT ON schema1.counted
	FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();
INSERT INTO schema1.counted (value) VALUES (1);
EOC
folds($node, 2, 'the other one folds');
is(rows($node, 1), 'delta|1', 'an insert wakes nobody');

# ------------------------------------------------------------------------
# Whatever happens
# ------------------------------------------------------------------------
my $victim = $node->background_psql('postgres');
crash($node, $victim->query_safe('SELECT pg_backend_pid()')) or die 'no crash';
eval { $victim->quit };
wait_for_state($node, 2, 'idle');
is_stopped('after a crash of another backend');
crash($node, worker($node, 2, 'pid')) or die 'no crash';
wait_for_state($node, 2, 'idle');
is_stopped('after a crash of another worker');
is(rows($node, 1), 'delta|1', 'nothing was folded');

reload_settings($node, "worker_spi.log_folds = off", 2);
is_stopped('after a reload');
folds($node, 2, 'the other one folds');

# ------------------------------------------------------------------------
# Launches that start nothing
# ------------------------------------------------------------------------
foreach my $arguments ('roleoid => 10', "flags => '{ALLOWCONN}'",
	'interruptible => true')
{
	error_is($node, 'postgres', "SELECT worker_spi_launch(1, $arguments)",
		'22023', qr/./, "it cannot be launched with $arguments");
	is_stopped("after a launch with $arguments");
}

$node->safe_psql('postgres', <<'EOC');
CREATE ROLE regress_stranger LOGIN;
GRANT EXECUTE ON FUNCTION worker_spi_launch TO regress_stranger;
EOC
error_is($node, 'postgres', 'SELECT worker_spi_launch(1)',
	'42501', qr/./, 'who may not act as its role cannot launch it',
	extra_params => [ '-U', 'regress_stranger' ]);
is_stopped('after a launch by a stranger');

$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema1.counted RENAME TO aside;
CREATE VIEW schema1.counted AS TABLE schema1.aside;
EOC
error_is($node, 'postgres', 'SELECT worker_spi_launch(1)', '42809',
	qr/"postgres\.schema1\.counted"/, 'a launch that fails raises the error of the worker');
is_stopped('after a launch that failed');
is(worker($node, 1, 'last_sqlstate'), '42809', 'the view says why');
$node->safe_psql('postgres', <<'EOC');
DROP VIEW schema1.counted;
ALTER TABLE schema1.aside RENAME TO counted;
EOC

my $holder = $node->background_psql('postgres');
$holder->query_safe('BEGIN; LOCK TABLE schema1.counted');
error_is($node, 'postgres',
	"SET statement_timeout = '300ms'; SELECT worker_spi_launch(1)",
	'57014', qr/./, 'a launch ends with its statement');
is_stopped('after a launch that was cancelled');
$holder->query_safe('ROLLBACK');
$holder->quit;
error_is($node, 'postgres',
	'BEGIN; LOCK TABLE schema1.counted; SELECT worker_spi_launch(1)',
	'55P03', qr/HINT:.*commit/s,
	'a launch in the way of which its caller stands gives up');
is_stopped('after a launch that gave up');

# ------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------
$pid = $node->safe_psql('postgres', 'SELECT worker_spi_launch(1)');
is(worker($node, 1, 'kind, pid'), "static|$pid", 'it is launched, as before');
folds($node, 1, 'it folds');
is(rows($node, 1), 'total|1', 'what came while it was stopped');
is( $node->safe_psql(
		'postgres',
		"SELECT backend_type, application_name FROM pg_stat_activity WHERE pid = $pid"
	),
	'worker_spi|worker_spi worker 1',
	'under its name');
error_is($node, 'postgres', 'SELECT worker_spi_launch(1)', '42710', qr/./,
	'a second launch is refused');

is( $node->safe_psql(
		'postgres', 'SELECT worker_spi_stop(1), worker_spi_launch(1) > 0,
			worker_spi_stop(1), worker_spi_launch(1) > 0, worker_spi_fold(1)'),
	't|t|t|t|t',
	'stop and launch, again and again');

# It is a static worker in all respects: a crash brings it back.
$victim = $node->background_psql('postgres');
crash($node, $victim->query_safe('SELECT pg_backend_pid()')) or die 'no crash';
eval { $victim->quit };
wait_for_state($node, $_, 'idle') foreach 1, 2;
is(worker($node, 1, 'kind'), 'static', 'one that was launched survives a crash');
$node->safe_psql('postgres', 'INSERT INTO schema1.counted (value) VALUES (1)');
wait_for_fold($node, 1);
is(rows($node, 1), 'total|2', 'and is woken again');

# and so does its own end, although this takes the restart interval
$node->safe_psql('postgres',
	'SELECT pg_terminate_backend(pid) FROM worker_spi_workers WHERE index = 1');
wait_for_state($node, 1, 'down');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(1)'),
	't', 'one that is down can be stopped');
is_stopped('after that');

$pid = launch_20_at_once($node, 1);
is(worker($node, 1, 'kind, pid'), "static|$pid", 'of 20 at once one starts it');

# ------------------------------------------------------------------------
# A restart of the server
# ------------------------------------------------------------------------
$node->safe_psql('postgres', 'SELECT worker_spi_stop(1)');
$node->safe_psql('postgres', 'INSERT INTO schema1.counted (value) VALUES (1)');
$node->restart;
wait_for_fold($node, 1);
is(rows($node, 1), 'total|3', 'a restart of the server starts it as well');

$node->stop;
done_testing();
