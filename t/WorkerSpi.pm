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

our @EXPORT = qw(new_node reload_settings crash server_lines database_oid
  new_table add_gate total rows deltas fold folds wait_for_fold
  worker wait_for_state wait_for_nap wait_for_restart process_count
  nothing_left launch_20_at_once
  error_is start_psql wait_for_psql finish_psql start_pgbench);

# ------------------------------------------------------------------------
# Servers
# ------------------------------------------------------------------------

# Where dev/test has put a faster initdb.
$ENV{PATH} = "$ENV{WORKER_SPI_BIN}:$ENV{PATH}" if defined $ENV{WORKER_SPI_BIN};

# A started server with the extension in database postgres.  $conf is appended
# to its configuration; naptime is an hour unless it says otherwise, so that
# nothing is folded but by worker_spi_fold(), or at a worker's start.
sub new_node
{
	my ($name, $conf, %init) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);

	bless $node, 't::WorkerSpi::Node';
	$node->init(%init);
	$node->append_conf('postgresql.conf', <<EOC . ($conf // ''));
shared_preload_libraries = 'worker_spi'
max_worker_processes = 32
statement_timeout = 10min
worker_spi.naptime = 3600
worker_spi.restart_interval = 1
EOC
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION worker_spi');
	return $node;
}

# Change the configuration, and wait until the workers with these indexes have
# read it, those that are missing aside.  They must be napping, and $conf must not
# change the naptime: a naptime changed along with it is how they can be seen to.
my $naptime = 3600;

sub reload_settings
{
	my ($node, $conf, @indexes) = @_;
	my $list = join ', ', @indexes;

	$node->poll_query_until('postgres',
		"SELECT count(DISTINCT index) = @{[ scalar @indexes ]} AND bool_and(state = 'idle')
		 FROM worker_spi_workers WHERE index IN ($list) AND state <> 'missing'")
	  or die "workers $list do not nap";
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

# Kill process $pid as a crash would, and wait until the server is back.
# Returns false if the process has ended by itself before that.  The server
# needs restart_after_crash.
sub crash
{
	my ($node, $pid) = @_;
	my $offset = -s $node->logfile;

	return 0 unless $pid && kill('KILL', $pid);

	# It may have been about to exit.  When it is gone, the postmaster knows
	# what it died of before it lets anybody else in.
	my $tries = 10 * $PostgreSQL::Test::Utils::timeout_default;
	do { $node->poll_query_until('postgres', 'SELECT true') }
	  while (kill(0, $pid) && $tries--);
	$node->poll_query_until('postgres', 'SELECT true');
	return 0
	  unless slurp_file($node->logfile, $offset) =~
	  /\(PID $pid\) was terminated by signal 9/;
	$node->wait_for_log(qr/all server processes terminated; reinitializing/,
		$offset);
	$node->wait_for_log(qr/database system is ready to accept connections/,
		$offset);
	return 1;
}

# Lines in the log since $offset that were not written for a client, or only
# those of process $pid.  The lines of clients have the name of the test in
# front of the level.
sub server_lines
{
	my ($node, $offset, $pid) = @_;
	my $log = slurp_file($node->logfile, $offset);
	$pid //= '\d+';
	my @lines = $log =~ /^.*\[$pid\] (?:LOG|WARNING|ERROR|FATAL|PANIC):  .*$/mg;
	return @lines;
}

# The OID of a database.
sub database_oid
{
	my ($node, $db) = @_;
	return $node->safe_psql('postgres',
		"SELECT oid FROM pg_database WHERE datname = '$db'");
}

# ------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------

# Put other tables in place of those of worker $index, in one transaction, so
# that the worker never finds them missing.  $definition makes counted; in it,
# %t is that table and %s its schema.  %params may have
#
#	key		what the totals have besides, by default PRIMARY KEY (type)
#	total	SQL that makes the totals, or changes them after they were made
#			with a key
#	db		the database, by default postgres
sub new_table
{
	my ($node, $index, $definition, %params) = @_;
	my $key = $params{key} // 'PRIMARY KEY (type)';
	my $make_total =
	  ($params{total} // '') =~ /\bINHERIT/
	  ? ''
	  : "CREATE TABLE %s.total ($key) INHERITS (%t) WITH (fillfactor = 50);";
	my $sql = <<EOC;
BEGIN;
DROP TABLE IF EXISTS %s.stuck, %s.total, %t;
$definition;
$make_total
@{[ $params{total} // '' ]};
CREATE TABLE %s.stuck (sqlstate text, reason text, since timestamptz) INHERITS (%t);
COMMIT;
EOC
	$sql =~ s/%t/schema$index.counted/g;
	$sql =~ s/%s/schema$index/g;
	$node->safe_psql($params{db} // 'postgres', $sql);
	return;
}

# Add a gate to the table of worker $index: whoever deletes from it waits as
# long as a session holds the advisory lock $key, however short its lock_timeout.
# A fold fires what the owner has enabled ALWAYS.
sub add_gate
{
	my ($node, $index, $key, $db) = @_;
	$node->safe_psql($db // 'postgres', <<EOC);
CREATE OR REPLACE FUNCTION gate_$key() RETURNS trigger LANGUAGE plpgsql
SET lock_timeout = 0 AS \$\$
BEGIN
	PERFORM pg_catalog.pg_advisory_xact_lock_shared($key);
	RETURN NULL;
END
\$\$;
CREATE TRIGGER gate_$key AFTER DELETE ON schema$index.counted EXECUTE FUNCTION gate_$key();
ALTER TABLE schema$index.counted ENABLE ALWAYS TRIGGER gate_$key;
EOC
	return;
}

# The sum over a worker's tables, which is the count at any time.
sub total
{
	my ($node, $index, $db) = @_;
	return $node->safe_psql($db // 'postgres',
		"SELECT sum(value) FROM schema$index.counted");
}

# All rows of a worker's tables, as "type|value" or with these columns, in the
# order of these columns.
sub rows
{
	my ($node, $index, $columns, $db) = @_;
	my $order = $columns // 'type, value';
	$columns //= "coalesce(type, 'NULL'), coalesce(value::text, 'NULL')";
	return $node->safe_psql($db // 'postgres',
		"SELECT $columns FROM schema$index.counted ORDER BY $order");
}

# The number of deltas that are not yet folded, those that are stuck aside.
sub deltas
{
	my ($node, $index, $db) = @_;
	return $node->safe_psql($db // 'postgres',
		"SELECT count(*) FROM ONLY schema$index.counted");
}

# Worker $index folds, and all goes through.
sub folds
{
	my ($node, $index, $test, $db) = @_;
	is(fold($node, $index, $db), 't', $test // "worker $index folds");
	return;
}

# Have worker $index fold, and wait until it has; what worker_spi_fold() says,
# which is to be checked where it matters: see folds().  An error is the end of
# the test.
sub fold
{
	my ($node, $index, $db) = @_;
	$db //= 'postgres';
	return $node->safe_psql('postgres',
		"SELECT worker_spi_fold($index, oid) FROM pg_database WHERE datname = '$db'"
	);
}

# Wait until the tables of worker $index are there, with no delta in them, nor in
# stuck.  The worker does so by itself: nobody tells it to.
sub wait_for_fold
{
	my ($node, $index, $db) = @_;
	$node->poll_query_until($db // 'postgres',
		"SELECT NOT EXISTS (SELECT FROM ONLY schema$index.counted) AND NOT EXISTS (SELECT FROM schema$index.stuck)"
	) or die "worker $index did not fold";
	return;
}

# ------------------------------------------------------------------------
# Workers
# ------------------------------------------------------------------------

# One column of worker $index in the view, or several; of the one in database
# $db, if there are others.
sub worker
{
	my ($node, $index, $column, $db) = @_;
	my $where = "index = $index";
	$where .= " AND datname = '$db'" if defined $db;
	return $node->safe_psql('postgres',
		"SELECT $column FROM worker_spi_workers WHERE $where");
}

# Wait until worker $index is in a state; all of that index, if there are several
# and no database is given.
sub wait_for_state
{
	my ($node, $index, $state, $db) = @_;
	my $where = "index = $index";
	$where .= " AND datname = '$db'" if defined $db;
	$node->poll_query_until('postgres',
		"SELECT count(*) > 0 AND bool_and(state = '$state') FROM worker_spi_workers WHERE $where"
	) or die "worker $index did not become $state";
	return;
}

# Wait until the process of worker $index sleeps.  Whoever waits for a cycle has the
# answer, and the view shows the worker as idle, before the cycle is reported in
# the server's statistics.
sub wait_for_nap
{
	my ($node, $index) = @_;
	$node->poll_query_until('postgres',
		"SELECT wait_event_type = 'Extension' FROM worker_spi_workers JOIN pg_stat_activity USING (pid) WHERE index = $index"
	) or die "worker $index does not nap";
	return;
}

# Wait until worker $index naps as another process than $pid, and return that
# one's pid.
sub wait_for_restart
{
	my ($node, $index, $pid) = @_;
	$node->poll_query_until('postgres', <<EOC)
SELECT count(*) = 1 FROM worker_spi_workers
WHERE index = $index AND pid <> $pid AND state = 'idle'
EOC
	  or die "worker $index did not come back";
	return worker($node, $index, 'pid');
}

# How many processes of ours there are, as the server knows them.
sub process_count
{
	my ($node) = @_;
	return $node->safe_psql('postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'worker\\_spi%'"
	);
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
	my (@pids, @duplicates, @others);

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
		push @{ $err =~ /ERROR:  42710: a worker with index $index already runs/
			? \@duplicates : \@others }, $err if $err;
	}
	$starter->quit;
	is(scalar(@pids), 1, 'of 20 launches at once one gets a worker');
	is(scalar(@duplicates), 19, 'and 19 learn that there is one')
	  or diag(@others);
	return $pids[0];
}

# ------------------------------------------------------------------------
# Sessions
# ------------------------------------------------------------------------

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

# Start psql with $sql in the background, under an application_name by which
# others can find its server process; @options are psql's.
sub start_psql
{
	my ($node, $db, $name, $sql, @options) = @_;
	my %session = (node => $node, name => $name, out => '', err => '');

	$session{run} = IPC::Run::start(
		[
			$node->installed_command('psql'), '-XAtq', @options,
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

# Wait for the end of a session; what it put out, its errors, and whether it
# has succeeded.
sub finish_psql
{
	my ($session) = @_;
	my $success = $session->{run}->finish;

	chomp($session->{out}, $session->{err});
	return ($session->{out}, $session->{err}, $success);
}

# Start pgbench with these options on a script, or on several, which are given
# as [ script, weight ].  Its end is that of a session, see finish_psql().
my $scripts = 0;

sub start_pgbench
{
	my ($node, $options, @scripts) = @_;
	my %session = (node => $node, name => 'pgbench', out => '', err => '');
	my @files;

	foreach my $script (@scripts)
	{
		my ($sql, $weight) = ref $script ? @$script : ($script, 1);
		my $file = $node->basedir . '/script' . ++$scripts . '.sql';

		append_to_file($file, $sql);
		push @files, '-f', "$file\@$weight";
	}
	$session{run} = IPC::Run::start(
		[
			$node->installed_command('pgbench'), '-n', @$options, @files,
			$node->connstr('postgres')
		],
		'<', \undef, '>', \$session{out}, '2>', \$session{err},
		IPC::Run::timeout(10 * $PostgreSQL::Test::Utils::timeout_default));
	return \%session;
}

# ------------------------------------------------------------------------
# A server that is asked again and again by one session: to start a psql each
# time takes more of the machine than all that is waited for.
# ------------------------------------------------------------------------

package t::WorkerSpi::Node;

use parent -norequire, 'PostgreSQL::Test::Cluster';

use Time::HiRes qw(time usleep);

# A session that lasts, in which each query has its time, and not all together.
sub background_psql
{
	my ($self, @arguments) = @_;
	my $session = $self->SUPER::background_psql(@arguments);

	$session->set_query_timer_restart;
	return $session;
}

# Wait until $sql returns $expected, by default 't'; returns false if it does not
# in time.  Errors, of the connection too, mean that it does not yet.
sub poll_query_until
{
	my ($self, $db, $sql, $expected) = @_;
	my $found = qr/^\Q${\($expected \/\/ 't')}\E$/m;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;
	my ($psql, $timer, $in);
	my ($out, $err) = ('', '');

	$sql =~ s/[;\s]+\z//;
	local $SIG{PIPE} = 'IGNORE';
	while (time() < $end)
	{
		if (!$psql)
		{
			$timer = IPC::Run::timer($end - time());
			$psql = IPC::Run::start(
				[ $self->installed_command('psql'), '-XAtq', '-d', $self->connstr($db) ],
				'<', \$in, '>', \$out, '2>', \$err, $timer);
		}
		($out, $err) = ('', '');
		$in = "$sql;\n\\echo asked\n";
		eval {
			$psql->pump
			  until $out =~ /^asked$/m || $timer->is_expired || !$psql->pumpable;
		};

		# It has ended if it cannot connect, or if the server has.
		if ($out =~ $found || $out !~ /^asked$/m)
		{
			$psql->kill_kill if $timer->is_expired;
			eval { $psql->finish };
			undef $psql;
		}
		return 1 if $out =~ $found;
		usleep(50_000);
	}
	Test::More::diag("waited in vain for: $sql\nlast output: $out$err");
	eval { $psql->finish } if $psql;
	return 0;
}

1;
