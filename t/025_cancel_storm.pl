# Nothing that is raised in a worker ends it.  Two sessions cancel every worker
# a few hundred times a second, at random moments; a third fills the server's
# lock table and empties it again; then all of them at once.  Meanwhile others
# count, with the wake trigger and without a delay, and ask for folds.  The
# restart interval is an hour, so that no exit can hide: each worker has to be
# the same process after it all, and its tables have to agree with the ledger to
# the last count.  Worker 4 has a key that is refused, so it folds carefully all
# the time: nothing but that key may get stuck, and for no other reason.
#
# WORKER_SPI_STORM_SECONDS is how long this goes on, in all, or longer: each storm
# lasts until cycles of all workers were hit.
#
# It waits for failed cycles in the view, for the sessions to end, and then for
# worker_spi_fold().

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $seconds = $ENV{WORKER_SPI_STORM_SECONDS} // 6;
$PostgreSQL::Test::Utils::timeout_default += $seconds;

# Few locks in all, so that one session can have them.
my $node = new_node('storm', <<'EOC');
worker_spi.restart_interval = 3600
worker_spi.total_workers = 2
worker_spi.wake_delay = 0
max_worker_processes = 8
max_connections = 20
max_locks_per_transaction = 10
restart_after_crash = on
log_statement = none
EOC
my @workers = (1 .. 4);

# Workers 3 and 4 are dynamic ones.
$node->safe_psql('postgres', <<'EOC');
CREATE SCHEMA schema4;
CREATE TABLE schema4.counted (type text NOT NULL, value bigint NOT NULL,
	page int NOT NULL DEFAULT floor(random() * 10));
CREATE TABLE schema4.total (PRIMARY KEY (page), CONSTRAINT refused CHECK (page <> 3))
	INHERITS (schema4.counted);
SELECT worker_spi_launch(i) FROM generate_series(3, 4) AS i;
EOC
foreach my $index (@workers)
{
	folds($node, $index);
	$node->safe_psql('postgres', <<EOC);
CREATE TRIGGER wake AFTER INSERT ON schema$index.counted
	FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();
CREATE TABLE ledger$index (value bigint);
EOC
}

$node->safe_psql('postgres', <<'EOC');
CREATE TABLE done ();
CREATE TABLE before (index int, failed_count bigint);

-- Cancel all workers, and pause for up to 5 ms, until it is done.  Like the next
-- one, it answers how often: a row of a table would need a lock.
CREATE PROCEDURE cancel_workers(INOUT cancels bigint) LANGUAGE plpgsql AS $$
DECLARE
	n bigint;
BEGIN
	WHILE NOT EXISTS (SELECT FROM done) LOOP
		BEGIN
			SELECT count(pg_cancel_backend(pid)) INTO n FROM pg_stat_activity
			WHERE backend_type LIKE 'worker\_spi%';
			cancels := cancels + n;
		EXCEPTION WHEN out_of_memory THEN
			NULL;
		END;
		COMMIT;
		PERFORM pg_sleep(random() * 0.005);
	END LOOP;
END
$$;

-- Take locks until there are no more, keep them for a moment, and let go.  A
-- cycle that wants one tries again, with less to do, before it fails.  Nobody can connect then, so all the sessions have to be there.
CREATE PROCEDURE fill_lock_table(sessions int, INOUT filled bigint)
LANGUAGE plpgsql AS $$
BEGIN
	WHILE (SELECT count(*) FROM pg_stat_activity
		   WHERE application_name LIKE 'session\_%') < sessions LOOP
		COMMIT;
	END LOOP;
	WHILE NOT EXISTS (SELECT FROM done) LOOP
		BEGIN
			PERFORM pg_advisory_lock(i) FROM generate_series(1, 1000000) AS i;
		EXCEPTION WHEN out_of_memory THEN
			filled := filled + 1;
		END;
		PERFORM pg_sleep(random() * 0.2);
		PERFORM pg_advisory_unlock_all();
		COMMIT;
		PERFORM pg_sleep(random() * 0.02);
	END LOOP;
END
$$;

-- Wait until the time is over and cycles of all workers were hit, and end the
-- storm.  A worker that has ended is not hit any more.
CREATE PROCEDURE end_storm(seconds float8, timeout float8) LANGUAGE plpgsql AS $$
DECLARE
	start timestamptz := clock_timestamp();
	hit boolean := false;
	ended boolean := false;
BEGIN
	WHILE NOT ended LOOP
		BEGIN
			hit := clock_timestamp() > start + seconds * interval '1 s'
				AND (SELECT bool_and(w.failed_count > b.failed_count)
						OR bool_or(pid IS NULL)
					 FROM worker_spi_workers AS w JOIN before AS b USING (index));
			IF hit OR clock_timestamp() > start + timeout * interval '1 s' THEN
				INSERT INTO done DEFAULT VALUES;
				ended := true;
			END IF;
		EXCEPTION WHEN out_of_memory THEN
			NULL;
		END;
		COMMIT;
		PERFORM pg_sleep(0.01);
	END LOOP;
	IF NOT hit THEN
		RAISE 'no cycle was hit';
	END IF;
END
$$;

-- Count, in the table and in the ledger or in neither.  A worker that has
-- failed does not heed a wake, so each tenth time it is asked to fold.
CREATE PROCEDURE count_things(index int) LANGUAGE plpgsql AS $$
DECLARE
	n bigint := 0;
BEGIN
	WHILE NOT EXISTS (SELECT FROM done) LOOP
		n := n + 1;
		BEGIN
			EXECUTE format('INSERT INTO ledger%s VALUES (%s)', index, n);
			EXECUTE format('INSERT INTO schema%s.counted (type, value) VALUES (''delta'', %s)',
				index, n);
		EXCEPTION WHEN out_of_memory THEN
			NULL;
		END;
		COMMIT;
		IF n % 10 = 0 THEN
			BEGIN
				PERFORM worker_spi_fold(index, wait => n % 20 = 0);
			EXCEPTION WHEN query_canceled OR OTHERS THEN
				NULL;
			END;
			COMMIT;
		END IF;
	END LOOP;
END
$$;
EOC

sub pids
{
	return $node->safe_psql('postgres',
		"SELECT string_agg(index || ' is ' || coalesce(pid::text, 'gone'), ', ' ORDER BY index) FROM worker_spi_workers"
	);
}
my $pids = pids();

foreach my $storm (
	[ 'cancels', 2, 0 ],
	[ 'a full lock table', 0, 1 ],
	[ 'cancels and a full lock table', 2, 1 ])
{
	my ($name, $cancellers, $fillers) = @$storm;
	my $before = worker($node, 1, 'failed_count');
	$node->safe_psql('postgres', <<EOC);
TRUNCATE done, before;
INSERT INTO before SELECT index, failed_count FROM worker_spi_workers;
EOC
	my $timeout = $seconds + $PostgreSQL::Test::Utils::timeout_default / 2;
	my $nsessions = $cancellers + $fillers + @workers + 1;
	my @calls = (
		"CALL end_storm($seconds / 3.0, $timeout)",
		('CALL cancel_workers(0)') x $cancellers,
		("CALL fill_lock_table($nsessions, 0)") x $fillers,
		map { "CALL count_things($_)" } @workers);
	my $n = 0;
	my @sessions =
	  map { start_psql($node, 'postgres', 'session_' . ++$n, $_) } @calls;

	my @ends = map { [ finish_psql($_) ] } @sessions;
	is(join('', map { $_->[1] } @ends), '', "$name: the sessions have no errors of their own");
	is(pids(), $pids, "$name: no worker has ended");
	is( $node->safe_psql(
			'postgres', 'SELECT sum(restart_count) FROM worker_spi_workers'),
		'0',
		"$name: nor been started again");

	foreach my $index (@workers)
	{
		my ($ret, $out, $err) =
		  $node->psql('postgres', "SELECT worker_spi_fold($index)");
		like("$out$err", $index == 4 ? qr/constraint "refused"/ : qr/^t$/,
			"$name: worker $index folds");
		is( $node->safe_psql(
				'postgres',
				"SELECT (SELECT count(*) FROM ONLY schema$index.counted), sum(value) - (SELECT sum(value) FROM ledger$index) FROM schema$index.counted"
			),
			'0|0',
			"$name: and has lost nothing");
	}
	is( $node->safe_psql('postgres',
			'SELECT (SELECT count(*) FROM schema1.stuck), (SELECT count(*) FROM schema2.stuck), (SELECT count(*) FROM schema3.stuck)'
		),
		'0|0|0',
		"$name: nothing got stuck");
	is( $node->safe_psql('postgres', 'SELECT DISTINCT page, sqlstate FROM schema4.stuck'),
		'3|23514',
		"$name: but what is refused, for that reason");

	my @counts = grep { $_ ne '' } map { $_->[0] } @ends;
	note("$name: cancels, and times the lock table was full, @counts; "
		  . (worker($node, 1, 'failed_count') - $before)
		  . ' failed cycles of worker 1');
}

$node->safe_psql('postgres', 'ALTER TABLE schema4.total DROP CONSTRAINT refused');
folds($node, 4, 'what was refused is folded when it no longer is');
is( $node->safe_psql('postgres',
		'SELECT sum(value) - (SELECT sum(value) FROM ledger4) FROM schema4.total'),
	'0',
	'to the last count');
ok( !$node->log_contains(qr/is stuck: .*SQLSTATE (?!23514)/),
	'the log has named no key as stuck for another reason');
ok(!$node->log_contains(qr/TRAP:|PANIC:|terminated by signal/),
	'no process has crashed');
$node->stop;
done_testing();
