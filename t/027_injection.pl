# Processes that fail, or are ended, between two lines of the protocol of a
# launch, a stop and an exit: before they are connected, after their first commit
# and before they have told, and after they have left their slot.
#
# It needs a server that was built with injection points, 18 or later.  It waits
# for processes to stop at such a point, for the ends of sessions, and for states
# in the view.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('injection', 'worker_spi.total_workers = 1');
if ($node->safe_psql('postgres', <<'EOC') ne 't')
SELECT current_setting('server_version_num')::int >= 180000
	AND EXISTS (SELECT FROM pg_available_extensions WHERE name = 'injection_points')
EOC
{
	$node->stop;
	plan skip_all => 'a server without injection points';
}
$node->safe_psql('postgres', 'CREATE EXTENSION injection_points');
wait_for_state($node, 1, 'idle');

sub attach
{
	my ($point, $action) = @_;
	$node->safe_psql('postgres',
		"SELECT injection_points_attach('worker-spi-$point', '$action')");
	return;
}

# Nobody stops here any more; whoever has, goes on.
sub detach
{
	my ($point, $waits) = @_;
	$node->safe_psql('postgres',
		"SELECT injection_points_detach('worker-spi-$point')");
	$node->safe_psql('postgres',
		"SELECT injection_points_wakeup('worker-spi-$point')")
	  if $waits;
	return;
}

# Before it is connected, a process has its slot, and no more.
sub wait_for_point
{
	my ($point) = @_;
	$node->poll_query_until('postgres', $point eq 'attached'
		? "SELECT count(*) = 1 FROM worker_spi_workers WHERE index = 2 AND pid IS NOT NULL"
		: "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'worker-spi-$point'")
	  or die "no process stops at $point";
	return;
}

# ------------------------------------------------------------------------
# Launching
# ------------------------------------------------------------------------
foreach my $point ('attached', 'not-yet-ready')
{
	attach($point, 'error');
	error_is($node, 'postgres', 'SELECT worker_spi_launch(2)', 'XX000',
		qr/error triggered for injection point/,
		"$point: the error of the process is that of the launch");
	nothing_left($node, 2, "$point: and nothing is left of it");
	detach($point);

	# A launcher that goes away while the process is just there.
	foreach my $how ('cancel', 'terminate')
	{
		attach($point, 'wait');
		my $launch = start_psql($node, 'postgres', 'launch', 'SELECT worker_spi_launch(2)');
		wait_for_point($point);
		is( $node->safe_psql('postgres',
				"SELECT pg_${how}_backend(pid) FROM pg_stat_activity WHERE application_name = 'launch'"),
			't',
			"$point: $how the launch");
		my (undef, $err) = finish_psql($launch);
		like($err, $how eq 'cancel' ? qr/57014/ : qr/57P01/, "$point: it ends");
		$node->poll_query_until('postgres',
			"SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'launch'")
		  or die 'the launcher does not end';
		nothing_left($node, 2, "$point: with nothing left");
		detach($point);
	}
}
like($node->safe_psql('postgres', 'SELECT worker_spi_launch(2)'),
	qr/^\d+$/, 'after all that, a launch succeeds');
folds($node, 2, 'and the worker folds');

# ------------------------------------------------------------------------
# A static worker that somebody else launches first
# ------------------------------------------------------------------------
$node->safe_psql('postgres', 'SELECT worker_spi_stop(1)');
my $late = start_psql($node, 'postgres', 'late', <<'EOC');
SELECT injection_points_set_local();
SELECT injection_points_attach('worker-spi-checked', 'wait');
SELECT worker_spi_launch(1);
EOC
wait_for_point('checked');
like($node->safe_psql('postgres', 'SELECT worker_spi_launch(1)'),
	qr/^\d+$/, 'launched while another launch has seen it stopped');
detach('checked', 1);
like((finish_psql($late))[1], qr/ERROR:  42710: a worker with index 1 already runs/,
	'which learns that it runs');

# ------------------------------------------------------------------------
# A static worker that cannot start
# ------------------------------------------------------------------------
attach('attached', 'error');
$node->safe_psql('postgres',
	'SELECT pg_terminate_backend(pid) FROM worker_spi_workers WHERE index = 1');
$node->poll_query_until('postgres',
	"SELECT failed_count >= 3 AND state = 'down' FROM worker_spi_workers WHERE index = 1")
  or die 'worker 1 does not fail';
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '55000',
	qr/not running/, 'a fold learns that there is no process');
detach('attached');
wait_for_state($node, 1, 'idle');
folds($node, 1, 'it is back when it can');

# ------------------------------------------------------------------------
# Exit
# ------------------------------------------------------------------------

# What goes wrong after the slot was left does the slot no harm.
attach('detached', 'error');
my $pid = worker($node, 1, 'pid');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
wait_for_restart($node, 1, $pid);
folds($node, 1, 'a worker is back after an error in its exit');
detach('detached');

# The next worker of an index may be there before the process of the last has
# gone.  A stop waits for that, and ends nobody else.
attach('detached', 'wait');
my $stop = start_psql($node, 'postgres', 'stop', 'SELECT worker_spi_stop(2)');
wait_for_point('detached');
$pid = $node->safe_psql('postgres', 'SELECT worker_spi_launch(2)');
is(worker($node, 2, 'pid'), $pid, 'a new worker is there before the old one has gone');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE application_name = 'stop' AND state = 'active'"),
	'1',
	'and the stop waits for that one');
detach('detached', 1);
is(join('', finish_psql($stop)), 't1', 'it returns when the process has gone');
folds($node, 2, 'the new worker folds');
is(worker($node, 2, 'pid'), $pid, 'as the same process');

$node->stop;
done_testing();
