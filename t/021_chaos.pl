# Clients count without a pause, each in one transaction in the worker's table
# and in a ledger, while faults of all kinds hit workers, backends, the server,
# the table and the settings in random order.  In every snapshot the table has
# to agree with the ledger to the last count, and in the end one fold has to
# leave nothing but the total.
#
# WORKER_SPI_CHAOS_SECONDS is how long this goes on (each kind of fault comes at
# least once), WORKER_SPI_CHAOS_SEED repeats the order of an earlier run.

use strict;
use warnings FATAL => 'all';

use IPC::Run ();
use List::Util qw(shuffle);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);
use t::WorkerSpi;

my $seconds = $ENV{WORKER_SPI_CHAOS_SECONDS} // 15;
my $seed = $ENV{WORKER_SPI_CHAOS_SEED} // int(rand(2**31));
srand($seed);
diag("chaos for $seconds s with WORKER_SPI_CHAOS_SEED=$seed");

my $node = new_node('chaos', <<EOC);
worker_spi.naptime = 1
worker_spi.total_workers = 1
restart_after_crash = on
log_statement = none
EOC

my $make_trigger = <<EOS;
CREATE OR REPLACE TRIGGER wake AFTER INSERT ON schema1.counted
EXECUTE FUNCTION worker_spi_wake();
EOS
$node->poll_query_until('postgres',
	q(SELECT to_regclass('schema1.counted') IS NOT NULL))
  or die 'the worker makes no table';

# What is moved aside while the table is dropped counts as well.
$node->safe_psql('postgres', <<EOS);
CREATE TABLE ledger (id bigserial, value bigint NOT NULL);
CREATE TABLE aside (value bigint NOT NULL);
$make_trigger
EOS

# ---------------------------------------------------------------------------
# The writers: pgbench, started again whenever it has lost all its clients.
# ---------------------------------------------------------------------------

my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/count.sql", <<'EOS');
\set value random(-1000, 1000)
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', :value);
INSERT INTO ledger (value) VALUES (:value);
END;
EOS
my @writers;
foreach my $n (1 .. 2)
{
	push @writers,
	  IPC::Run::start(
		[
			'sh', '-c',
			'while [ -d "$1" ] && [ ! -e "$1/stop" ]; do PGAPPNAME=writer "$2" -n -R 200 -c 2 -T 1'
			  . ' -f "$1/count.sql" -h "$3" -p "$4" postgres; done',
			'writer', $dir, $node->installed_command('pgbench'),
			$node->host, $node->port
		],
		'<', \undef, '>', '/dev/null', '2>', '/dev/null');
}

# ---------------------------------------------------------------------------
# What is true at all times.
# ---------------------------------------------------------------------------

my $snapshots = 0;
my @wrong;

# Compare the table with the ledger, in one snapshot; returns how far the
# ledger has got.
sub compare
{
	my $row = $node->safe_psql('postgres', <<EOS);
SELECT t.sum, l.sum, (SELECT last_value FROM ledger_id_seq)
FROM (SELECT COALESCE(sum(value), 0) AS sum
	  FROM (TABLE aside UNION ALL SELECT value FROM schema1.counted) AS a) AS t,
	 (SELECT COALESCE(sum(value), 0) AS sum FROM ledger) AS l
EOS
	my ($table, $ledger, $last) = split /\|/, $row;

	$snapshots++;
	push @wrong, "$table, not $ledger" if $table ne $ledger;
	return $last;
}

# Let the writers go on for a while, and look all the time.  A crash leaves a
# gap of up to 32 in the sequence.
sub let_write
{
	my $enough = compare() + 50 + int(rand(100));
	my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;

	while (compare() < $enough)
	{
		die 'the writers do not get on' if time > $deadline;
	}
	return;
}

sub run { return $node->safe_psql('postgres', $_[0]); }

# The process of the worker, as soon as there is one.
sub worker_pid
{
	$node->poll_query_until('postgres', <<EOS) or die 'the worker does not come back';
SELECT pid IS NOT NULL FROM worker_spi_workers WHERE index = 1
EOS
	return worker($node, 1, 'pid');
}

# Take part in a crash: kill a process the hard way and wait until the server
# has come back.
sub crash
{
	my ($pid) = @_;
	my $offset = -s $node->logfile;

	return 0 unless $pid && kill('KILL', $pid);

	# It may have been about to exit.  When it is gone, the postmaster knows
	# what it died of before it lets anybody else in.
	my $tries = 10 * $PostgreSQL::Test::Utils::timeout_default;
	do { $node->psql('postgres', 'SELECT 1') } while (kill(0, $pid) && $tries--);
	$node->psql('postgres', 'SELECT 1');
	return 0
	  unless substr(slurp_file($node->logfile), $offset) =~
	  /\(PID $pid\) was terminated by signal 9/;
	$node->wait_for_log(qr/all server processes terminated; reinitializing/,
		$offset);
	$node->wait_for_log(qr/database system is ready to accept connections/,
		$offset);
	return 1;
}

sub restart
{
	my ($mode) = @_;
	$node->stop($mode);
	$node->start;
	return 1;
}

# Change a setting, let everybody see it, do something and take it back.
sub with_setting
{
	my ($name, $value, $between) = @_;

	run("ALTER SYSTEM SET $name = $value; SELECT pg_reload_conf()");
	$node->poll_query_until('postgres',
		"SELECT setting = '$value' FROM pg_settings WHERE name = '$name'")
	  or die "$name does not change";
	$between->();
	run("BEGIN READ WRITE; COMMIT; ALTER SYSTEM RESET $name");
	run('SELECT pg_reload_conf()');
	return 1;
}

# ---------------------------------------------------------------------------
# The faults.  Each returns whether it has hit what it was to hit.
# ---------------------------------------------------------------------------

my %faults = (
	'worker terminated' => sub {
		my $pid = worker_pid();
		return run("SELECT pg_terminate_backend($pid)") eq 't';
	},
	'worker cancelled' => sub {
		my $pid = worker_pid();
		return run(<<EOS) eq 't';
SELECT worker_spi_fold(1, wait => false) \\gset
SELECT pg_cancel_backend($pid)
EOS
	},
	'worker killed' => sub { return crash(worker_pid()); },
	# The youngest, which is not about to end anyway.
	'client process killed' => sub {
		return crash(run(<<EOS));
SELECT pid FROM pg_stat_activity WHERE application_name = 'writer'
ORDER BY backend_start DESC LIMIT 1
EOS
	},
	'all clients terminated' => sub {
		return run(<<EOS) > 0;
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE application_name = 'writer'
EOS
	},
	'server restarted, fast' => sub { return restart('fast'); },
	'server restarted, immediate' => sub { return restart('immediate'); },

	# Until the worker or a client has run into it.
	'table locked' => sub {
		run(<<EOS);
DO \$\$
BEGIN
	LOCK TABLE schema1.counted;
	PERFORM worker_spi_fold(1, wait => false);
	LOOP
		EXIT WHEN EXISTS (SELECT FROM pg_locks
			WHERE relation = 'schema1.counted'::regclass AND NOT granted);
	END LOOP;
END \$\$
EOS
		return 1;
	},

	# The worker makes another, and clients count there meanwhile.
	'schema renamed away and back' => sub {
		run('ALTER SCHEMA schema1 RENAME TO away');
		$node->poll_query_until('postgres',
			q(SELECT to_regclass('schema1.counted') IS NOT NULL))
		  or die 'the worker makes no other table';
		run(<<EOS);
BEGIN;
LOCK TABLE schema1.counted;
ALTER SCHEMA schema1 RENAME TO other;
ALTER SCHEMA away RENAME TO schema1;
INSERT INTO schema1.counted SELECT 'delta', value FROM other.counted;
DROP SCHEMA other CASCADE;
COMMIT;
EOS
		return 1;
	},
	'schema dropped' => sub {
		run(<<EOS);
BEGIN;
LOCK TABLE schema1.counted;
INSERT INTO aside SELECT sum(value) FROM schema1.counted HAVING count(*) > 0;
DROP SCHEMA schema1 CASCADE;
COMMIT;
EOS
		$node->poll_query_until('postgres',
			q(SELECT to_regclass('schema1.counted') IS NOT NULL))
		  or die 'the worker makes no new table';
		let_write();
		run(<<EOS);
WITH back AS (DELETE FROM aside RETURNING value)
INSERT INTO schema1.counted SELECT 'delta', value FROM back;
EOS
		return 1;
	},
	'schema dropped and made again at once' => sub {
		run(<<EOS);
BEGIN;
LOCK TABLE schema1.counted;
CREATE TEMP TABLE kept ON COMMIT DROP AS TABLE schema1.counted;
DROP SCHEMA schema1 CASCADE;
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted (type text, value bigint);
INSERT INTO schema1.counted TABLE kept;
$make_trigger
COMMIT;
EOS
		return 1;
	},
	'index dropped' => sub {
		$node->poll_query_until('postgres', <<EOS) or die 'the worker makes no index';
SELECT count(*) = 1 FROM pg_index WHERE indrelid = 'schema1.counted'::regclass
EOS
		run(<<EOS);
DO \$\$
BEGIN
	EXECUTE (SELECT 'DROP INDEX ' || indexrelid::regclass FROM pg_index
			 WHERE indrelid = 'schema1.counted'::regclass);
END \$\$
EOS
		return 1;
	},
	'table rewritten' => sub { run('VACUUM FULL schema1.counted'); return 1; },
	'extension dropped' => sub {
		run('DROP EXTENSION worker_spi CASCADE');
		let_write();
		run("CREATE EXTENSION worker_spi; $make_trigger");
		return 1;
	},
	'naptime changed' =>
	  sub { return with_setting('worker_spi.naptime', 3, \&let_write); },
	'log_folds changed' =>
	  sub { return with_setting('worker_spi.log_folds', 'off', \&let_write); },
	'notify changed' =>
	  sub { return with_setting('worker_spi.notify', 'on', \&let_write); },
	'wake_delay changed' =>
	  sub { return with_setting('worker_spi.wake_delay', 0, \&let_write); },

	# One delta gets there all the same, and cannot be folded.
	'everything read-only' => sub {
		return with_setting(
			'default_transaction_read_only',
			'on',
			sub {
				worker_pid();
				run(<<EOS);
BEGIN READ WRITE;
INSERT INTO schema1.counted VALUES ('delta', 1);
INSERT INTO ledger (value) VALUES (1);
COMMIT;
EOS
				$node->psql('postgres', 'SELECT worker_spi_fold(1)');
				compare();
			});
	});

# ---------------------------------------------------------------------------
# Chaos, and order after it.
# ---------------------------------------------------------------------------

my %survived = map { $_ => 0 } keys %faults;
my %tried;
my $end = time + $seconds;
my @deck;

let_write();
while (time < $end || grep { $_ == 0 } values %survived)
{
	@deck = shuffle(sort keys %faults) unless @deck;
	my $fault = shift @deck;

	my $hit = $faults{$fault}->();
	note($fault . ($hit ? '' : ', and missed'));
	let_write();
	$survived{$fault}++ if $hit;
	$tried{$fault}++;
	die "never hit: $fault" if $tried{$fault} > 5 && !$survived{$fault};
}

append_to_file("$dir/stop", '');
$_->finish foreach @writers;
$node->poll_query_until('postgres', 'SELECT worker_spi_fold(1)')
  or die 'the worker does not fold in the end';

diag("survived $survived{$_} times: $_") foreach sort keys %survived;
diag("compared $snapshots snapshots, " . compare() . ' transactions');
is("@wrong", '', 'the table agreed with the ledger in each snapshot');
is( run(<<EOS),
SELECT count(*), min(type), sum(value) = (SELECT sum(value) FROM ledger)
FROM schema1.counted
EOS
	'1|total|t',
	'in the end nothing is left but the total, and it is that of the ledger');
ok( !$node->log_contains(qr/TRAP:|PANIC:|terminated by signal (?!9)/),
	'no process has crashed but those that were killed');

$node->stop;
done_testing();
