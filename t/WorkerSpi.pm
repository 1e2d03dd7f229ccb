# What the TAP tests have in common: a server with worker_spi, and ways to ask
# its workers for what they did without ever sleeping.

package t::WorkerSpi;

use strict;
use warnings FATAL => 'all';

use Exporter 'import';
use IPC::Run ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

our @EXPORT = qw(new_node error_is total wait_for_state worker
  launch_20_at_once start_psql wait_for_psql finish_psql reload_settings nothing_left);

# A started server with the extension in database postgres.  $conf is appended
# to its configuration; naptime is an hour unless it says otherwise, so that
# nothing is folded but by worker_spi_fold(), or at a worker's start.
sub new_node
{
	my ($name, $conf, %init) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init(%init);
	$node->append_conf('postgresql.conf', <<EOC . ($conf // ''));
shared_preload_libraries = 'worker_spi'
max_worker_processes = 32
worker_spi.naptime = 3600
worker_spi.restart_interval = 1
EOC
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION worker_spi');
	return $node;
}

# $sql fails with this SQLSTATE, and with a message, detail or hint like
# $pattern.
sub error_is
{
	my ($node, $db, $sql, $sqlstate, $pattern, $test, %params) = @_;
	my ($ret, $out, $err) =
	  $node->psql($db, "\\set VERBOSITY verbose\n$sql", on_error_stop => 1, %params);

	my $ok = $ret != 0 && $err =~ /ERROR:  $sqlstate: / && $err =~ $pattern;
	ok($ok, $test) or diag("wanted $sqlstate and $pattern, got: $err");
	return;
}

# The sum over a worker's table, which is the count at any time.
sub total
{
	my ($node, $index, $db) = @_;
	return $node->safe_psql($db // 'postgres',
		"SELECT sum(value) FROM schema$index.counted");
}

# One column of worker $index in the view.
sub worker
{
	my ($node, $index, $column) = @_;
	return $node->safe_psql('postgres',
		"SELECT $column FROM worker_spi_workers WHERE index = $index");
}

# Wait until worker $index is in a state.
sub wait_for_state
{
	my ($node, $index, $state) = @_;
	$node->poll_query_until('postgres',
		"SELECT state = '$state' FROM worker_spi_workers WHERE index = $index")
	  or die "worker $index did not become $state";
	return;
}

# Start psql with $sql in the background, under an application_name by which
# others can find its server process.
sub start_psql
{
	my ($node, $db, $name, $sql) = @_;
	my %session = (node => $node, name => $name, out => '', err => '');

	$session{run} = IPC::Run::start(
		[
			$node->installed_command('psql'), '-XAtq',
			'-v', 'ON_ERROR_STOP=1',
			'-v', 'VERBOSITY=verbose',
			'-d', $node->connstr($db) . " application_name=$name",
			'-c', $sql
		],
		'<', \undef, '>', \$session{out}, '2>', \$session{err},
		IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
	return \%session;
}

# Wait until all these sessions wait: for a lock, for a worker, or for the
# postmaster to start one.
sub wait_for_psql
{
	my (@sessions) = @_;
	my $names = join ', ', map { "'$_->{name}'" } @sessions;

	$sessions[0]{node}->poll_query_until('postgres',
		"SELECT count(*) = " . @sessions . " FROM pg_stat_activity
		 WHERE application_name IN ($names)
		 AND wait_event_type IN ('Lock', 'Extension', 'IPC')")
	  or die "$names did not get to wait";
	return;
}

# Wait for the end of a session; what it put out, and its errors.
sub finish_psql
{
	my ($session) = @_;

	$session->{run}->finish;
	chomp($session->{out}, $session->{err});
	return ($session->{out}, $session->{err});
}

# Change the configuration, and wait until the workers with these indexes have
# read it.  They must be napping, and $conf must not change the naptime: a
# naptime changed along with it is how they can be seen to.
my $naptime = 3600;

sub reload_settings
{
	my ($node, $conf, @indexes) = @_;
	my $list = join ', ', @indexes;

	wait_for_state($node, $_, 'idle') foreach @indexes;
	my $before = $node->safe_psql('postgres',
		"SELECT max(next_fold_time) FROM worker_spi_workers
		 WHERE index IN ($list)");
	$naptime += 60;
	$node->append_conf('postgresql.conf',
		"$conf\nworker_spi.naptime = $naptime\n");
	$node->reload;
	$node->poll_query_until('postgres',
		"SELECT min(next_fold_time) > '$before' FROM worker_spi_workers
		 WHERE index IN ($list)")
	  or die 'workers did not read their settings';
	return;
}

# Neither a registration nor a process of worker $index is left.
sub nothing_left
{
	my ($node, $index, $test) = @_;

	is( $node->safe_psql(
			'postgres',
			"SELECT (SELECT count(*) FROM worker_spi_workers
					 WHERE index = $index),
				(SELECT count(*) FROM pg_stat_activity
				 WHERE backend_type LIKE 'worker\\_spi%'
				 AND (application_name LIKE '% worker $index'
					OR application_name = ''))"),
		'0|0', $test);
	return;
}

# 20 sessions launch worker $index at the same time; the pid of the winner's.
sub launch_20_at_once
{
	my ($node, $index) = @_;
	my $starter = $node->background_psql('postgres');
	my (@pids, @duplicates);

	$starter->query_safe('SELECT pg_advisory_lock(1)');
	my @sessions = map {
		start_psql($node, 'postgres', "launch_$_",
			"SELECT pg_advisory_lock_shared(1); SELECT worker_spi_launch($index)"
		)
	} 1 .. 20;
	wait_for_psql(@sessions);
	$starter->query_safe('SELECT pg_advisory_unlock(1)');
	foreach my $session (@sessions)
	{
		my ($out, $err) = finish_psql($session);
		push @pids, $1 if $out =~ /^(\d+)$/m;
		push @duplicates, $err
		  if $err =~ /ERROR:  42710: a worker with index $index already runs/;
	}
	$starter->quit;
	is(scalar(@pids), 1, 'of 20 launches at once one gets a worker');
	is(scalar(@duplicates), 19, 'and 19 learn that there is one');
	return $pids[0];
}

1;
