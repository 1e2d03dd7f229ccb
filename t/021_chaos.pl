# Clients count without a pause, each in one transaction in the tables of two
# workers and in a ledger, while faults of all kinds hit workers, backends, the server,
# the tables and the settings in random order.  The second table has a thousand
# skewed keys, and NULLs among them.  In every snapshot both tables have to agree
# with the ledger to the last count of each key, and in the end one fold of each has
# to leave nothing but totals.
#
# WORKER_SPI_CHAOS_SECONDS is how long this goes on (each kind of fault comes at
# least once), WORKER_SPI_CHAOS_SEED repeats the order of an earlier run.
#
# It waits for what each fault is to bring about, in the view, the table or
# the log, and goes on when the writers have.

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
worker_spi.total_workers = 2
restart_after_crash = on
log_statement = none
EOC

my $make_trigger = <<EOS;
CREATE OR REPLACE TRIGGER wake AFTER INSERT ON schema1.counted
EXECUTE FUNCTION worker_spi_wake();
EOS
$node->poll_query_until('postgres',
	q(SELECT to_regclass('schema1.counted') IS NOT NULL AND to_regclass('schema2.counted') IS NOT NULL)
) or die 'the workers make no tables';

new_table($node, 2, <<EOS);
CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL, page text, day int);
CREATE UNIQUE INDEX by_key ON %t (page, day) NULLS NOT DISTINCT WHERE type = 'total'
EOS

# What is moved aside while the table is dropped counts as well.
$node->safe_psql('postgres', <<EOS);
CREATE TABLE ledger (id bigserial, value bigint NOT NULL, page text, day int);
CREATE TABLE aside (value bigint NOT NULL);
CREATE ROLE regress_denied LOGIN;
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN IF current_setting(''application_name'') LIKE ''worker_spi%'' THEN RETURN NULL; END IF; RETURN coalesce(NEW, OLD); END';
$make_trigger
EOS

# ------------------------------------------------------------------------
# The writers: pgbench, started again whenever it has lost all its clients.
# ------------------------------------------------------------------------

my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/count.sql", <<'EOS');
\set value random(-1000, 1000)
\set page random_zipfian(1, 100, 1.2)
\set day random(1, 10)
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', :value);
INSERT INTO schema2.counted VALUES ('delta', :value, nullif('p' || :page, 'p3'), nullif(:day, 3));
INSERT INTO ledger (value, page, day) VALUES (:value, nullif('p' || :page, 'p3'), nullif(:day, 3));
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

# ------------------------------------------------------------------------
# What is true at all times.
# ------------------------------------------------------------------------

my $snapshots = 0;
my @wrong;

# The sum of all values, each with a weight of its key, so that none that is booked
# on another key goes unnoticed.
my $by_key = "COALESCE(sum(value::numeric * (COALESCE(substr(page, 2)::int, 0) * 11 + COALESCE(day, 0) + 1)), 0)";

# Compare the tables with the ledger, in one snapshot; returns how far the
# ledger has got.
sub compare
{
	my $row = $node->safe_psql('postgres', <<EOS);
SELECT t.sum, u.by_key, l.sum, l.by_key, (SELECT last_value FROM ledger_id_seq)
FROM (SELECT COALESCE(sum(value), 0) AS sum
	  FROM (TABLE aside UNION ALL SELECT value FROM schema1.counted) AS a) AS t,
	 (SELECT $by_key AS by_key FROM schema2.counted) AS u,
	 (SELECT COALESCE(sum(value), 0) AS sum, $by_key AS by_key FROM ledger) AS l
EOS
	my ($table, $other, $ledger, $by_key, $last) = split /\|/, $row;

	$snapshots++;
	push @wrong, "$table and $other, not $ledger and $by_key"
	  if $table ne $ledger || $other ne $by_key;
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

# The process of a worker, the first if not said, as soon as there is one.
sub worker_pid
{
	my $index = $_[0] // 1;

	$node->poll_query_until('postgres', <<EOS) or die 'the worker does not come back';
SELECT pid IS NOT NULL FROM worker_spi_workers WHERE index = $index
EOS
	return worker($node, $index, 'pid');
}

# Run what asks a worker for a fold; returns its output, or nothing if the
# worker is about to go, so that there is none to ask.
sub run_with_worker
{
	my ($sql, $index) = @_;

	worker_pid($index);
	my ($ret, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$sql",
		on_error_stop => 1);
	die $err if $ret != 0 && $err !~ /ERROR:  55000: worker with index \d is not running/;
	return $ret == 0 ? $out : '';
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

# ------------------------------------------------------------------------
# The faults.  Each returns whether it has hit what it was to hit.
# ------------------------------------------------------------------------

my %faults = (
	'worker terminated' => sub {
		my $pid = worker_pid();
		return run("SELECT pg_terminate_backend($pid)") eq 't';
	},
	'worker cancelled' => sub {
		my $pid = worker_pid();
		return run_with_worker(<<EOS) eq 't';
SELECT worker_spi_fold(1, wait => false) \\gset
SELECT pg_cancel_backend($pid)
EOS
	},
	'worker cancelled in a burst' => sub {
		my $pid = worker_pid();
		return run(<<EOS) > 0;
CREATE TEMP TABLE cancels (n bigint);
DO \$\$
BEGIN
	FOR i IN 1 .. 200 LOOP
		PERFORM worker_spi_fold(1, wait => false)
		FROM worker_spi_workers WHERE index = 1 AND pid IS NOT NULL;
		INSERT INTO cancels SELECT count(*)
		FROM (SELECT pg_cancel_backend(pid) AS ok FROM worker_spi_workers
			  WHERE index = 1) AS c WHERE ok;
		COMMIT;
	END LOOP;
END \$\$;
SELECT sum(n) FROM cancels
EOS
	},
	'worker stopped and launched' => sub {
		return 0 unless run('SELECT worker_spi_stop(2)') eq 't';
		let_write();
		return run('SELECT worker_spi_launch(2)') > 0;
	},

	# A delta that does not fit is stuck until another makes it good.
	'delta stuck' => sub {
		my $put = <<EOS;
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', %1);
INSERT INTO schema2.counted VALUES ('delta', %1);
INSERT INTO ledger (value) VALUES (%1);
COMMIT;
EOS
		run($put =~ s/%1/9223372036854775807/gr);
		run($put =~ s/%1/1000000/gr);
		let_write();
		my (undef, undef, $err) = $node->psql('postgres',
			"\\set VERBOSITY verbose\nSELECT worker_spi_fold(1)");
		run($put =~ s/%1/-9223372036854775807/gr);
		run($put =~ s/%1/-1000000/gr);
		return $err =~ /22003/;
	},
	'trigger made and dropped' => sub {
		run(<<EOS);
CREATE TRIGGER refuse BEFORE INSERT OR UPDATE OR DELETE ON schema1.counted
	FOR EACH ROW EXECUTE FUNCTION refuse();
EOS
		let_write();
		run('DROP TRIGGER refuse ON schema1.counted');
		return 1;
	},
	'database commands denied' => sub {
		$node->psql('template1', <<EOS, extra_params => [ '-U', 'regress_denied' ]);
DO \$\$
BEGIN
	FOR i IN 1 .. 200 LOOP
		BEGIN
			ALTER DATABASE postgres RENAME TO taken;
		EXCEPTION WHEN insufficient_privilege THEN
			NULL;
		END;
	END LOOP;
END \$\$
EOS
		return 1;
	},

	# Until somebody has met it.  The locks are released before the session ends:
	# psql does not wait for its server process.
	'lock table full' => sub {
		my $offset = -s $node->logfile;
		$node->psql('postgres', <<EOS);
DO \$\$
BEGIN
	PERFORM pg_advisory_lock(i) FROM generate_series(1, 1000000) AS i;
EXCEPTION WHEN out_of_memory THEN
	PERFORM pg_sleep(0.2);
END \$\$;
SELECT pg_advisory_unlock_all();
EOS
		return slurp_file($node->logfile, $offset) =~ /out of shared memory/;
	},
	'worker killed' => sub { return crash($node, worker_pid()); },
	# The youngest, which is not about to end anyway.
	'client process killed' => sub {
		return crash($node, run(<<EOS));
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
		return run_with_worker(<<EOS) eq 'waits';
DO \$\$
BEGIN
	LOCK TABLE schema1.counted;
	PERFORM worker_spi_fold(1, wait => false);
	LOOP
		EXIT WHEN EXISTS (SELECT FROM pg_locks
			WHERE relation = 'schema1.counted'::regclass AND NOT granted);
	END LOOP;
END \$\$;
SELECT 'waits'
EOS
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
	'index made and dropped concurrently' => sub {
		run('CREATE UNIQUE INDEX CONCURRENTLY another ON schema1.counted (type) WHERE type = $$total$$');
		let_write();
		run('DROP INDEX CONCURRENTLY schema1.another');
		return 1;
	},
	'table rewritten' => sub { run('VACUUM FULL schema1.counted'); return 1; },
	'table with keys rewritten' => sub { run('VACUUM FULL schema2.counted'); return 1; },
	'index on keys rebuilt' => sub { run('REINDEX INDEX CONCURRENTLY schema2.by_key'); return 1; },
	'keys refused' => sub {
		run(q(ALTER TABLE schema2.counted ADD CONSTRAINT refused
			CHECK (type <> 'total' OR page NOT LIKE 'p_' AND day <> 7) NOT VALID));
		let_write();
		my (undef, undef, $err) = $node->psql('postgres',
			"\\set VERBOSITY verbose\nSELECT worker_spi_fold(2)");
		run('ALTER TABLE schema2.counted DROP CONSTRAINT refused');
		return $err =~ /23514/;
	},
	'totals locked' => sub {
		return run_with_worker(<<EOS, 2) eq 'waits';
DO \$\$
BEGIN
	LOOP
		PERFORM FROM schema2.counted WHERE type = 'total' AND (page = 'p1' OR day IS NULL) FOR UPDATE;
		EXIT WHEN FOUND;
	END LOOP;
	PERFORM worker_spi_fold(2, wait => false);
	LOOP
		EXIT WHEN EXISTS (SELECT FROM pg_locks
			WHERE locktype = 'transactionid' AND NOT granted);
	END LOOP;
END \$\$;
SELECT 'waits'
EOS
	},
	'table altered' => sub {
		run('ALTER TABLE schema1.counted ALTER value TYPE bigint USING value + 0');
		return 1;
	},
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
INSERT INTO schema2.counted VALUES ('delta', 1);
INSERT INTO ledger (value) VALUES (1);
COMMIT;
EOS
				$node->psql('postgres', 'SELECT worker_spi_fold(1)');
				compare();
			});
	});

# ------------------------------------------------------------------------
# Chaos, and order after it.
# ------------------------------------------------------------------------

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
foreach my $index (1, 2)
{
	$node->poll_query_until('postgres', "SELECT worker_spi_fold($index)")
	  or die "worker $index does not fold in the end";
}

diag("survived $survived{$_} times: $_") foreach sort keys %survived;
diag("compared $snapshots snapshots, " . compare() . ' transactions');
is("@wrong", '', 'the table agreed with the ledger in each snapshot');
is( run(<<EOS),
SELECT count(*), min(type), sum(value) = (SELECT sum(value) FROM ledger)
FROM schema1.counted
EOS
	'1|total|t',
	'in the end nothing is left of the first table but the total, and it is that of the ledger');
is( run(<<EOS),
SELECT count(*) FROM (
	SELECT 'total', page, day, sum(value) FROM ledger GROUP BY page, day
	EXCEPT ALL SELECT type, page, day, value FROM schema2.counted) AS missing
UNION ALL SELECT count(*) FROM (
	SELECT type, page, day, value FROM schema2.counted
	EXCEPT ALL SELECT 'total', page, day, sum(value) FROM ledger GROUP BY page, day) AS wrong
EOS
	"0\n0",
	'nor of the second but a total for each key, and they are those of the ledger');
ok( !$node->log_contains(qr/TRAP:|PANIC:|terminated by signal (?!9)/),
	'no process has crashed but those that were killed');

$node->stop;
done_testing();
