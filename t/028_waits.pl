# Nobody waits without end: not a launch or a fold whose worker waits for the
# caller, not workers whose tables' code waits for each other, and not a caller
# who is cancelled or terminated at any moment of a launch.  And a worker that
# works on a long backlog, waits for a lock or fails in ever new words is no
# less attentive, and no more talkative, than one that naps.
#
# WORKER_SPI_LAUNCHES is how often a launch is cancelled and how often it is not.
#
# It waits for states in the view, for what others wait for, and for the ends
# of the sessions.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $launches = $ENV{WORKER_SPI_LAUNCHES} // 10;

my $node = new_node('waits', "log_statement = none\n");
$node->safe_psql('postgres', 'CREATE DATABASE other');
my $other = database_oid($node, 'other');

# ------------------------------------------------------------------------
# The caller's own locks
# ------------------------------------------------------------------------
my %in_the_way = (
	'renamed the database' => 'ALTER DATABASE other RENAME TO another',
	'made the schema' => 'CREATE SCHEMA schema5',
	'made the table' =>
	  'CREATE SCHEMA schema5; CREATE TABLE schema5.counted (type text, value bigint)',
	'locked the table' => 'LOCK TABLE schema6.counted');
$node->safe_psql('other',
	'CREATE SCHEMA schema6; CREATE TABLE schema6.counted (type text NOT NULL, value bigint NOT NULL)'
);
foreach my $deed (sort keys %in_the_way)
{
	my $db = $deed =~ /database/ ? 'postgres' : 'other';
	my $index = $deed =~ /locked/ ? 6 : 5;

	$node->safe_psql($db, 'CREATE EXTENSION IF NOT EXISTS worker_spi');
	error_is($node, $db,
		"BEGIN; $in_the_way{$deed}; SELECT worker_spi_launch($index, $other);",
		'55P03', qr/ERROR/, "a launch by one who has $deed comes to an end");
	nothing_left($node, $index, 'and nothing is left of it');
}

# A worker that is started again while somebody has its database.
# If it was back already, the other has to wait for it, in vain.
$node->safe_psql('postgres', "SELECT worker_spi_launch(7, $other)");
my $owner = $node->background_psql('postgres', on_error_stop => 0);
my $pid;
foreach (1 .. 10)
{
	$node->poll_query_until('postgres',
		'SELECT pid IS NOT NULL FROM worker_spi_workers WHERE index = 7')
	  or die 'worker 7 does not come back';
	$pid = worker($node, 7, 'pid');
	$owner->{stderr} = '';
	$owner->query("SELECT pg_terminate_backend($pid, 60000);
BEGIN; ALTER DATABASE other RENAME TO another;");
	last if $owner->{stderr} !~ /ERROR/;
	$owner->query('ROLLBACK');
}
$node->poll_query_until('postgres', <<'EOC') or die 'worker 7 does not connect';
SELECT count(*) > 0 FROM worker_spi_workers JOIN pg_locks USING (pid)
WHERE index = 7 AND NOT granted
EOC
$pid = worker($node, 7, 'pid');

# Cancels find nothing to end there.
$node->safe_psql('postgres', <<EOC);
DO \$\$
BEGIN
	FOR i IN 1 .. 20 LOOP
		PERFORM pg_cancel_backend($pid), pg_sleep(random() * 0.01);
	END LOOP;
END \$\$
EOC
is(worker($node, 7, 'pid'), $pid, 'a cancel does not end a worker that connects');
$owner->query("SAVEPOINT a; SELECT worker_spi_fold(7, $other);");
like($owner->{stderr}, qr/worker with index 7 waits for a lock that this transaction holds/,
	'a fold by one who has the database comes to an end');
is($owner->query("ROLLBACK TO a; SELECT worker_spi_stop(7, $other);"),
	't', 'and so does a stop');
$owner->query('ROLLBACK');
$owner->quit;
nothing_left($node, 7, 'of that worker nothing is left');

# ------------------------------------------------------------------------
# Workers that wait for each other
# ------------------------------------------------------------------------
foreach my $index (1, 2)
{
	my $peer = 3 - $index;

	folds($node, $index);
	$node->safe_psql('postgres', <<EOC);
INSERT INTO schema$index.counted VALUES ('delta', 1);
ALTER TABLE schema$index.counted
	ADD CONSTRAINT ask CHECK (type <> 'total' OR public.worker_spi_fold($peer)) NOT VALID;
EOC
}
my @asking = map {
	start_psql($node, 'postgres', "asking_$_", "SELECT worker_spi_fold($_)")
} 1, 2;
my @errors = map { (finish_psql($_))[1] } @asking;
is(scalar(grep { /55000: a worker of worker_spi cannot wait for a worker/ } @errors),
	2, 'workers that wait for each other do not do so for long')
  or diag("@errors");
foreach my $index (1, 2)
{
	$node->safe_psql('postgres', "ALTER TABLE schema$index.counted DROP CONSTRAINT ask");
	folds($node, $index, "and worker $index folds again");
	is(rows($node, $index), 'total|1', 'once');
}

# ------------------------------------------------------------------------
# Launches that are cancelled or terminated, at random moments
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOC');
CREATE TABLE done ();
CREATE TABLE launches (outcome text, left_over bigint);

-- Launch again and again; whatever comes of it, it is all or nothing.
CREATE PROCEDURE launch_often() LANGUAGE plpgsql AS $$
DECLARE
	result text;
	pid int;
BEGIN
	WHILE NOT EXISTS (SELECT FROM done) LOOP
		pid := NULL;
		BEGIN
			pid := worker_spi_launch(8);
			result := 'launched';
		EXCEPTION WHEN query_canceled OR OTHERS THEN
			-- a cancel may come when the launch has just gone well
			result := CASE WHEN pid IS NULL THEN SQLSTATE ELSE 'launched' END;
		END;
		BEGIN
			INSERT INTO launches SELECT result, count(*) FROM worker_spi_workers
			WHERE index = 8;
			PERFORM worker_spi_stop(8);
		EXCEPTION WHEN query_canceled THEN
			PERFORM worker_spi_stop(8);
		END;
		COMMIT;
	END LOOP;
END
$$;

-- Cancel those, or their worker, or terminate them.
CREATE PROCEDURE disturb() LANGUAGE plpgsql AS $$
BEGIN
	WHILE NOT EXISTS (SELECT FROM done) LOOP
		PERFORM CASE WHEN random() < 0.05 THEN pg_terminate_backend(pid)
			ELSE pg_cancel_backend(pid) END
		FROM pg_stat_activity
		WHERE (application_name = 'launcher' OR pid IN
			(SELECT pid FROM worker_spi_workers WHERE index = 8))
			AND random() < 0.3;
		COMMIT;
		PERFORM pg_sleep(random() * 0.05);
	END LOOP;
END
$$;
EOC
my $disturber = start_psql($node, 'postgres', 'disturber', 'CALL disturb()');
my $tries = 0;
my $outcomes =
  q(SELECT count(*) FILTER (WHERE outcome = 'launched') >= %1$d AND count(*) FILTER (WHERE outcome = '57014') >= %1$d FROM launches);
while ($node->safe_psql('postgres', sprintf($outcomes, $launches)) ne 't')
{
	die 'launches are not cancelled, or always' if ++$tries > 50 * $launches;

	# Sooner or later it is terminated.
	my $launcher = start_psql($node, 'postgres', 'launcher', 'CALL launch_often()');
	finish_psql($launcher);
	$node->poll_query_until('postgres', <<'EOC') or die 'a worker is left behind';
SELECT count(*) = 0 OR bool_and(worker_spi_stop(8)) FROM worker_spi_workers
WHERE index = 8
EOC
}
$node->safe_psql('postgres', 'INSERT INTO done DEFAULT VALUES');
finish_psql($disturber);
is( $node->safe_psql(
		'postgres',
		q(SELECT count(*) FROM launches WHERE outcome <> 'launched' AND left_over > 0)
	),
	'0',
	'a launch that was disturbed leaves nothing behind');
nothing_left($node, 8, 'not in the end either');
note($node->safe_psql('postgres',
	'SELECT outcome, count(*) FROM launches GROUP BY 1 ORDER BY 1'));
is($node->safe_psql('postgres', 'SELECT worker_spi_launch(8) > 0'),
	't', 'and the next launch succeeds');

# ------------------------------------------------------------------------
# A long backlog
# ------------------------------------------------------------------------

# Each transaction says in the log which settings it has, and waits as long as
# there is a gate.
new_table($node, 1, <<'EOC');
CREATE FUNCTION %s.gate() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	RAISE LOG 'the delay is %', current_setting('worker_spi.wake_delay');
	WHILE EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory') LOOP
		PERFORM pg_sleep(0.01);
	END LOOP;
	RETURN true;
END
$$;
CREATE TABLE %t (type text NOT NULL, value bigint NOT NULL) WITH (fillfactor = 10);
INSERT INTO %t SELECT 'delta', 1 FROM generate_series(1, 30000);
ALTER TABLE %t ADD CHECK (type <> 'total' OR %s.gate())
EOC
my $gate = $node->background_psql('postgres');
$gate->query_safe('SELECT pg_advisory_lock(1)');
my $offset = -s $node->logfile;
my $folding = start_psql($node, 'postgres', 'folding', 'SELECT worker_spi_fold(1)');
$node->wait_for_log(qr/the delay is 50ms/, $offset);
$node->append_conf('postgresql.conf', 'worker_spi.wake_delay = 77');
$node->reload;
$node->poll_query_until('postgres',
	q(SELECT current_setting('worker_spi.wake_delay') = '77ms'))
  or die 'there was no reload';
$gate->quit;
is((finish_psql($folding))[0], 't', 'a long backlog is folded');
like(
	slurp_file($node->logfile, $offset),
	qr/the delay is 50ms.*the delay is 77ms.*count in postgres\.schema1\.counted is now 30000\n/s,
	'and settings are read between two of its transactions');

# ------------------------------------------------------------------------
# Errors in ever new words
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOC');
CREATE FUNCTION schema2.fail() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	RAISE SQLSTATE '42501' USING MESSAGE = 'not now: ' || random();
END
$$;
INSERT INTO schema2.counted VALUES ('delta', 1);
ALTER TABLE schema2.counted
	ADD CONSTRAINT fails CHECK (type <> 'total' OR schema2.fail()) NOT VALID;
EOC
$offset = -s $node->logfile;
$pid = worker($node, 2, 'pid');
error_is($node, 'postgres', 'SELECT worker_spi_fold(2)',
	'42501', qr/not now: /, 'a cycle fails')
  foreach 1 .. 5;
$node->safe_psql('postgres', 'ALTER TABLE schema2.counted DROP CONSTRAINT fails');
is($node->safe_psql('postgres', 'SELECT count(*) FROM schema2.stuck'),
	'0', 'by no fault of its deltas');
folds($node, 2, 'the next goes through');
is(scalar(grep { /not now/ } server_lines($node, $offset, $pid)),
	1, 'and the log has one line of all these errors');

# ------------------------------------------------------------------------
# Without a postmaster there is nobody to wait for
# ------------------------------------------------------------------------
ok( !$node->log_contains(qr/TRAP:|PANIC:|terminated by signal/),
	'no process has crashed');
$node->stop;
foreach my $call ('worker_spi_fold(1)', 'worker_spi_launch(8)')
{
	my ($out, $err) = ('', '');
	my $sql = "SELECT $call\n";

	IPC::Run::run(
		[
			$node->installed_command('postgres'), '--single', '-D',
			$node->data_dir, 'postgres'
		],
		'<', \$sql, '>', \$out, '2>', \$err,
		IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
	like($err, qr/ERROR:  background workers do not run in single-user mode/,
		"$call fails in single-user mode");
}
done_testing();
