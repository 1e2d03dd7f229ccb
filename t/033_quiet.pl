# A static worker that cannot connect is patient: from one try to the next it
# takes longer and longer, and so few lines in the log.  That is a wait of the
# process that the server has started, before it connects; a reload, a stop and a
# shutdown end it at once.
#
# One server has a worker whose database is missing, another one whose role may not
# log in.  The times that are compared are those of lines in the log.  It waits for
# such lines, for processes that the view does not show, and for states in the view.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);
use Time::Local qw(timegm);
use t::WorkerSpi;

my $database = new_node('database', <<'EOC');
worker_spi.total_workers = 1
worker_spi.database = 'nosuch'
EOC
my $role = new_node('role', <<'EOC');
worker_spi.total_workers = 1
EOC
$role->safe_psql('postgres', <<'EOC');
CREATE ROLE regress_nologin SUPERUSER NOLOGIN;
ALTER SYSTEM SET worker_spi.role = 'regress_nologin';
SELECT pg_reload_conf();
EOC

my $no_database = qr/FATAL:  database "nosuch" does not exist/;
my $no_login = qr/FATAL:  role "regress_nologin" is not permitted to log in/;

# The tries of a server's worker to connect since $offset in the log: when each
# failed, and the process.
sub tries
{
	my ($node, $failure, $offset) = @_;
	my @tries;

	foreach (grep { $_ =~ $failure } server_lines($node, $offset))
	{
		/^(\d+)-(\d+)-(\d+) (\d+):(\d+):(\d+)(\.\d+) [^\[]*\[(\d+)\]/
		  or die "no time: $_";
		push @tries, { time => timegm($6, $5, $4, $3, $2 - 1, $1) + $7, pid => $8 };
	}
	return @tries;
}

# The process that a server has for its worker, connected or not, or nothing.
sub process
{
	my ($node) = @_;
	my ($postmaster) =
	  slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/;

	foreach my $dir (glob '/proc/[0-9]*')
	{
		my ($stat, $title) = ('', '');

		# It may have ended meanwhile.
		eval {
			$stat = slurp_file("$dir/stat") // '';
			$title = slurp_file("$dir/cmdline") // '';
		};
		return $dir =~ s{.*/}{}r
		  if $stat =~ /^\d+ \(.*\) [^Z] $postmaster /s
		  && $title =~ /worker_spi worker 1\b/;
	}
	return;
}

# Wait until the server has started a process for its worker, and return its pid.
sub wait_for_process
{
	my ($node) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;
	my $pid;

	until (defined($pid = process($node)))
	{
		die 'the worker has no process' if time() > $end;
		usleep(50_000);
	}
	return $pid;
}

# Let a worker fail five times since $offset in the log, so that the next wait is
# 15 s and the restart interval; return the last try and the process that waits.
sub wait_for_long_wait
{
	my ($node, $failure, $offset) = @_;

	$node->wait_for_log(qr/(?:$failure.*){5}/s, $offset);
	my $last = (tries($node, $failure, $offset))[4];
	$node->wait_for_log(qr/\(PID $last->{pid}\) exited with exit code 1/, $offset);
	return ($last, wait_for_process($node));
}

# ------------------------------------------------------------------------
# Longer and longer
# ------------------------------------------------------------------------
my (%last, %pid);
foreach my $case ([ $database, $no_database, '3D000' ], [ $role, $no_login, '28000' ])
{
	my ($node, $failure, $sqlstate) = @$case;
	my $name = $node->name;

	($last{$name}, $pid{$name}) = wait_for_long_wait($node, $failure, 0);
	is( worker($node, 1, 'state, pid, last_sqlstate'),
		"down||$sqlstate",
		"$name: a process that waits before it connects shows as down");

	my @tries = tries($node, $failure, 0);
	foreach my $gap (0 .. 3)
	{
		# The log has milliseconds.
		cmp_ok(
			$tries[ $gap + 1 ]{time} - $tries[$gap]{time},
			'>', 2**$gap - 0.002,
			"$name: try $gap is followed by another after " . 2**$gap . ' s, not before');
	}
	foreach my $pid (map { $_->{pid} } @tries)
	{
		my @lines = grep { /\[$pid\]|\(PID $pid\)/ } server_lines($node, 0);
		is(scalar(@lines), 2, "$name: a try has two lines in the log")
		  or diag(join "\n", @lines);
	}
}
error_is($role, 'postgres', 'SELECT worker_spi_fold(1)', '55000',
	qr/worker with index 1 is not running/, 'one that waits to connect cannot fold');

# ------------------------------------------------------------------------
# A shutdown ends the wait
# ------------------------------------------------------------------------
my $offset = -s $role->logfile;
$role->stop('fast');
is(scalar(tries($role, $no_login, $offset)),
	0, 'at shutdown, a process that waits does not try before it ends');
ok($role->log_contains(qr/\[$pid{role}\] FATAL:  terminating background worker "worker_spi"/, $offset),
	'it is terminated in its wait');
my $role_offset = -s $role->logfile;
$role->start;

# ------------------------------------------------------------------------
# A reload ends the wait
# ------------------------------------------------------------------------

# On a busy machine the reload may come when the time has come; but the next wait is
# twice as long.
my ($try, $waited, $patience);
for ($patience = 16; $patience <= 64; $patience *= 2)
{
	$offset = -s $database->logfile;
	$database->reload;
	$database->wait_for_log($no_database, $offset);
	($try) = tries($database, $no_database, $offset);
	$waited = $try->{time} - $last{database}{time};
	$last{database} = $try;
	$database->wait_for_log(qr/\(PID $try->{pid}\) exited with exit code 1/, $offset);
	last if $try->{pid} == $pid{database} && $waited < $patience;
	$pid{database} = wait_for_process($database);
}
is($try->{pid}, $pid{database}, 'after a reload the process that waits tries to connect');
cmp_ok($waited, '<', $patience, 'and not only when its time has come');

# The next one would have at least half a minute to wait.
my $pid = wait_for_process($database);
$database->safe_psql('postgres', 'CREATE DATABASE nosuch');
$database->reload;
wait_for_state($database, 1, 'idle');
is(worker($database, 1, 'pid, datname'), "$pid|nosuch",
	'when the database is there and a reload comes, the process that waits connects');
$database->safe_psql('nosuch', 'INSERT INTO schema1.counted (value) VALUES (7)');
folds($database, 1, 'it folds', 'nosuch');
is(rows($database, 1, undef, 'nosuch'), 'total|7', 'the tables that it has made');

# ------------------------------------------------------------------------
# A stop ends the wait
# ------------------------------------------------------------------------
(undef, $pid) = wait_for_long_wait($role, $no_login, $role_offset);
$offset = -s $role->logfile;
is($role->safe_psql('postgres', 'SELECT worker_spi_stop(1)'),
	't', 'a worker whose process waits is stopped');
is(process($role), undef, 'its process has ended when the stop returns');
is(scalar(tries($role, $no_login, $offset)), 0, 'and has not tried before');
is(worker($role, 1, 'state'), 'stopped', 'the view shows it as stopped');
error_is($role, 'postgres', 'SELECT worker_spi_launch(1)', '28000',
	qr/not permitted to log in/, 'a launch does not wait, but fails');
is(worker($role, 1, 'state'), 'stopped', 'and leaves it stopped');
$role->safe_psql('postgres', 'ALTER ROLE regress_nologin LOGIN');
like($role->safe_psql('postgres', 'SELECT worker_spi_launch(1)'),
	qr/^\d+$/, 'when the role may log in, it is launched');
folds($role, 1);

foreach my $node ($database, $role)
{
	ok( !$node->log_contains(qr/TRAP:|PANIC:|terminated by signal/),
		'no process has crashed: ' . $node->name);
	$node->stop;
}
done_testing();
