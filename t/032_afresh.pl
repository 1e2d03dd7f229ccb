# What a session takes over only when it starts does not outlive its cause: a
# worker that has failed seven times in a row ends, and another process takes its
# place, with the delay, the counters and the error of the one before.  So one
# that was started while its database, its role, or that role in that database
# was read-only folds again by itself when this is over.
#
# It does so only where it can help and is no nuisance: not for an error that the
# user has to mend, not twice in ten minutes, not with a restart interval of more
# than a minute, not without preload.
#
# The delays between failures add up to two minutes, which are those of this test;
# worker_spi_fold() makes the failures come sooner, where there is a view.  It
# waits for counters and pids in the view, for tables to be folded by workers that
# nobody calls, and without preload for lines of the log.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# ------------------------------------------------------------------------
# Without preload: the failures come by themselves, while the others are looked
# at.
# ------------------------------------------------------------------------
my $plain = PostgreSQL::Test::Cluster->new('plain');
bless $plain, 't::WorkerSpi::Node';
$plain->init;
$plain->append_conf('postgresql.conf', "max_worker_processes = 8\n");
$plain->start;
$plain->safe_psql('postgres', 'CREATE EXTENSION worker_spi');
my $plain_pid = $plain->safe_psql('postgres', 'SELECT worker_spi_launch(1)');
wait_for_fold($plain, 1);

# SQL: folds of the tables in a schema fail with an SQLSTATE, and say so.
sub refuse
{
	my ($schema, $sqlstate) = @_;
	return <<EOC;
CREATE FUNCTION $schema.refuse() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	RAISE LOG 'refused';
	RAISE SQLSTATE '$sqlstate';
END
\$\$;
CREATE TRIGGER refuse AFTER DELETE ON $schema.counted EXECUTE FUNCTION $schema.refuse();
ALTER TABLE $schema.counted ENABLE ALWAYS TRIGGER refuse;
INSERT INTO $schema.counted VALUES ('delta', 7);
EOC
}

# A worker without preload has no order to come sooner but a first cycle.
$plain->safe_psql('postgres', refuse('schema1', '58030'));
$plain->safe_psql('postgres', "SELECT pg_terminate_backend($plain_pid, 60000)");
$plain_pid = $plain->safe_psql('postgres', 'SELECT worker_spi_launch(1)');

# ------------------------------------------------------------------------
# With preload
# ------------------------------------------------------------------------
my $node = new_node('afresh', <<'EOC');
worker_spi.total_workers = 1
worker_spi.database = 'by_database'
EOC
$node->safe_psql('postgres', "CREATE DATABASE $_")
  foreach ('by_database', 'by_role', 'by_both');
$node->safe_psql('postgres', <<'EOC');
CREATE ROLE regress_by_role SUPERUSER LOGIN;
CREATE ROLE regress_by_both SUPERUSER LOGIN;
SELECT worker_spi_launch(2, d.oid, r.oid) FROM pg_database AS d, pg_roles AS r
WHERE datname = 'by_role' AND rolname = 'regress_by_role';
SELECT worker_spi_launch(3, d.oid, r.oid) FROM pg_database AS d, pg_roles AS r
WHERE datname = 'by_both' AND rolname = 'regress_by_both';
SELECT worker_spi_launch(4);
SELECT worker_spi_launch(5);
SELECT worker_spi_launch(6);
EOC
my @workers = (
	{ index => 1, db => 'by_database', who => 'DATABASE by_database' },
	{ index => 2, db => 'by_role', who => 'ROLE regress_by_role' },
	{ index => 3, db => 'by_both', who => 'ROLE regress_by_both IN DATABASE by_both' });

# A static worker waits for its database, until it is told of it.
$node->reload;
wait_for_state($node, $_, 'idle') for (1 .. 6);

# Worker 6 has nothing to do for as long as this test runs.  How often it has woken:
my %idle = (pid => worker($node, 6, 'pid'), since => time());

sub wakes
{
	my ($wakes) =
	  slurp_file("/proc/$idle{pid}/status") =~ /^voluntary_ctxt_switches:\s+(\d+)/m;
	return $wakes;
}
$idle{wakes} = wakes() if -e "/proc/$idle{pid}/status";

# A worker fails until it has done so $times times since it last went through, with
# nothing but $sqlstate.  It tries by itself, too, so it may have ended meanwhile.
sub fails
{
	my ($server, $worker, $times, $sqlstate) = @_;
	my $db = $worker->{db} // 'postgres';
	my @errors;

	$worker->{failed_count} //= worker($server, $worker->{index}, 'failed_count');
	my $wanted = $worker->{failed_count} + $times;
	while (worker($server, $worker->{index}, 'failed_count') < $wanted)
	{
		my ($ret, $out, $err) = $server->psql(
			'postgres',
			"\\set VERBOSITY verbose\nSELECT worker_spi_fold($worker->{index}, oid) FROM pg_database WHERE datname = '$db'"
		);
		push @errors, $err
		  if $err !~ /ERROR:  $sqlstate: |ERROR:  55000: .* is not running/;
		die 'it does not fail' if $ret == 0 || @errors > 10;
	}
	is(join("\n", @errors), '',
		"worker $worker->{index}: whoever waits for a cycle that fails is told why");
	return;
}

# Another process has taken the place of the last, which has failed.
sub starts_afresh
{
	my ($worker) = @_;
	my $index = $worker->{index};

	$node->poll_query_until('postgres',
		"SELECT pid <> $worker->{pid} AND state = 'backoff' FROM worker_spi_workers WHERE index = $index"
	) or die "worker $index does not start afresh";
	$worker->{pid} = worker($node, $index, 'pid');
	return;
}

# ------------------------------------------------------------------------
# Defaults that a session takes over when it starts
# ------------------------------------------------------------------------
my $offset = -s $node->logfile;
foreach my $worker (@workers)
{
	my ($index, $db) = @$worker{qw(index db)};
	my $pid = worker($node, $index, 'pid');

	# A process that is there does not take it over.  The one that is started
	# then does.
	$node->safe_psql('postgres',
		"ALTER $worker->{who} SET default_transaction_read_only = on");
	$node->safe_psql($db, <<EOC);
SET default_transaction_read_only = off;
INSERT INTO schema$index.counted VALUES ('delta', 1);
EOC
	folds($node, $index, "$worker->{who}: nothing of it reaches a process that runs", $db);
	$node->safe_psql($db, <<EOC);
SET default_transaction_read_only = off;
INSERT INTO schema$index.counted VALUES ('delta', 41);
EOC

	# The view counts its end as well as the failed cycles that follow.
	$worker->{failed_count} = worker($node, $index, 'failed_count + 1');
	$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
	$node->poll_query_until('postgres',
		"SELECT pid <> $pid AND last_sqlstate = '25006' FROM worker_spi_workers WHERE index = $index"
	) or die "worker $index does not fail";
	pass("$worker->{who}: the next one cannot write");
	$node->safe_psql('postgres',
		"ALTER $worker->{who} RESET default_transaction_read_only");
	@$worker{qw(pid restarts)} = split /\|/, worker($node, $index, 'pid, restart_count');
}
foreach my $worker (@workers)
{
	my $index = $worker->{index};

	fails($node, $worker, 7, '25006');
	starts_afresh($worker);
	is(worker($node, $index, 'restart_count') - $worker->{restarts},
		1, "$worker->{who}: after seven failures the worker is started again");
	is( worker($node, $index,
			"failed_count - $worker->{failed_count}, last_sqlstate, last_error LIKE 'cannot execute % in a read-only transaction'"
		),
		'7|25006|t',
		"$worker->{who}: and the view says of what the last one failed");
	is( worker($node, $index,
			"extract(epoch FROM next_fold_time - last_failed_time) BETWEEN 52 AND 61"),
		't',
		"$worker->{who}: and the delay is still a minute");
	is( scalar(grep { /worker $index starts afresh after 7 failures/ }
			  server_lines($node, $offset)),
		1,
		"$worker->{who}: which the log says");
}

# ------------------------------------------------------------------------
# What the user has to mend: class 42, but for want of a privilege
# ------------------------------------------------------------------------
my %missing = (index => 4, pid => worker($node, 4, 'pid'));
$node->safe_psql('postgres', 'ALTER SCHEMA schema4 RENAME TO pages');
fails($node, \%missing, 9, '42P01');
wait_for_state($node, 4, 'backoff');
is(worker($node, 4, 'pid, restart_count'), "$missing{pid}|0",
	'a missing table ends no process');
$node->safe_psql('postgres', 'ALTER SCHEMA pages RENAME TO schema4');
folds($node, 4, 'and the same process folds when it is back');

my %denied = (index => 5, pid => worker($node, 5, 'pid'));
$node->safe_psql('postgres', refuse('schema5', '42501'));
fails($node, \%denied, 7, '42501');
starts_afresh(\%denied);
is(worker($node, 5, 'restart_count'), '1', 'a privilege that is missing does');

# ------------------------------------------------------------------------
# Not twice in ten minutes
# ------------------------------------------------------------------------
fails($node, \%denied, 16, '42501');
wait_for_state($node, 5, 'backoff');
is(worker($node, 5, 'pid, restart_count'), "$denied{pid}|1",
	'one that has started afresh does not do so again after as many failures');
$node->safe_psql('postgres', 'ALTER TABLE schema5.counted DISABLE TRIGGER refuse');
folds($node, 5, 'it folds when the cause is gone');
delete $denied{failed_count};
$node->safe_psql('postgres', <<'EOC');
INSERT INTO schema5.counted VALUES ('delta', 1);
ALTER TABLE schema5.counted ENABLE ALWAYS TRIGGER refuse;
EOC
fails($node, \%denied, 8, '42501');
wait_for_state($node, 5, 'backoff');
is(worker($node, 5, 'pid, restart_count'), "$denied{pid}|1",
	'nor after seven failures of another time');

# ------------------------------------------------------------------------
# Not where the server would start the next one late
# ------------------------------------------------------------------------
my $slow = new_node('slow', <<'EOC');
worker_spi.total_workers = 1
worker_spi.restart_interval = 61
EOC
wait_for_state($slow, 1, 'idle');
my %slow = (index => 1, pid => worker($slow, 1, 'pid'));
$slow->safe_psql('postgres', refuse('schema1', '58030'));
fails($slow, \%slow, 9, '58030');
wait_for_state($slow, 1, 'backoff');
is(worker($slow, 1, 'pid, restart_count'), "$slow{pid}|0",
	'with a long restart interval no process ends');
$slow->stop;

# ------------------------------------------------------------------------
# By themselves
# ------------------------------------------------------------------------
foreach my $worker (@workers)
{
	my ($index, $db) = @$worker{qw(index db)};

	wait_for_fold($node, $index, $db);
	wait_for_state($node, $index, 'idle');
	is(rows($node, $index, undef, $db),
		'total|42', "$worker->{who}: what was left is folded, and nobody has called");
	is( worker($node, $index,
			"pid, restart_count - $worker->{restarts}, failed_count - $worker->{failed_count}"),
		"$worker->{pid}|1|7",
		"$worker->{who}: by the process that has started afresh");
}

# After its seventh failure the worker without preload naps, as after any other.
$plain->wait_for_log(qr/(refused.*){7}/s);
$plain->poll_query_until('postgres',
	"SELECT count(*) = 0 OR bool_and(wait_event_type = 'Extension') FROM pg_stat_activity WHERE pid = $plain_pid"
) or die 'the worker without preload does not nap';
is( $plain->safe_psql(
		'postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE pid = $plain_pid AND wait_event_type = 'Extension'"
	),
	'1',
	'without preload no process ends');
$plain->safe_psql('postgres', 'ALTER TABLE schema1.counted DISABLE TRIGGER refuse');

SKIP:
{
	skip 'no /proc', 2 if !defined $idle{wakes};
	is(worker($node, 6, 'pid'), $idle{pid}, 'a worker with nothing to do goes on');
	my $seconds = time() - $idle{since};
	cmp_ok(wakes() - $idle{wakes}, '<=', $seconds + 10,
		"and has woken once a second at most, for $seconds seconds");
}

foreach my $server ($node, $slow, $plain)
{
	ok( !$server->log_contains(qr/TRAP:|PANIC:|terminated by signal/),
		'no process has crashed: ' . $server->name);
}
$plain->stop;
$node->stop;
done_testing();
