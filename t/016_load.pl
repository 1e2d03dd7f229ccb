# Many at once: a hundred static workers in one server, a backlog of a million
# deltas, and thirty sessions that launch and stop workers at the same time.
#
# It waits for states in the view, for worker_spi_fold(), and for the
# sessions to end.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);
use t::WorkerSpi;

# Workers need no connection slot.  The server's own launcher for logical
# replication takes one of the worker slots, so 19 are left for dynamic ones.
my $start = time();
my $node = new_node('load', <<'EOC');
worker_spi.total_workers = 100
max_worker_processes = 120
max_connections = 40
autovacuum = off
EOC
$node->poll_query_until('postgres', <<'EOQ') or die 'not all workers are idle';
SELECT count(*) = 100 AND bool_and(state = 'idle') FROM worker_spi_workers
EOQ
note(sprintf '100 workers ready after %.1f s, initdb included', time() - $start);

# This session notices if the server restarts after a crash.
my $survivor = $node->background_psql('postgres');

# ------------------------------------------------------------------------
# A hundred static workers
# ------------------------------------------------------------------------
$start = time();
is( $node->safe_psql(
		'postgres', <<'EOQ'),
SELECT format('INSERT INTO schema%s.counted VALUES (%L, %s)', i, 'delta', i)
FROM generate_series(1, 100) AS i \gexec
SELECT count(*) FROM generate_series(1, 100) AS i, worker_spi_fold(i, wait => false) AS f WHERE f;
SELECT count(*) FROM generate_series(1, 100) AS i, worker_spi_fold(i) AS f WHERE f;
SELECT format('SELECT 1 FROM schema%s.counted HAVING count(*) <> 1 OR min(type) <> %L OR sum(value) <> %s', i, 'total', i)
FROM generate_series(1, 100) AS i \gexec
EOQ
	"100\n100",
	'a hundred workers fold, each its own table');
note(sprintf '100 workers folded after %.1f s', time() - $start);

is( $node->safe_psql(
		'postgres',
		"SELECT count(DISTINCT pid), sum(fold_count), sum(failed_count) FROM worker_spi_workers"
	),
	'100|100|0',
	'each in one cycle, without an error');

my @pids = split /\n/,
  $node->safe_psql('postgres', 'SELECT pid FROM worker_spi_workers');
my $kb = 0;
foreach my $pid (@pids)
{
	my ($size, $resident, $shared) =
	  split(/ /, slurp_file("/proc/$pid/statm"));
	$kb += ($resident - $shared) * 4;
}
note(sprintf '%.1f MB of its own for each worker', $kb / 1024 / 100);
cmp_ok($kb / 1024 / 100, '<', 16, 'memory of a worker is that of a small session');

# ------------------------------------------------------------------------
# A large backlog is folded in short transactions.  A trigger of the table
# notes each of them, and what the view says meanwhile.
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOQ');
CREATE TABLE folds (xid xid8, rows bigint, seen bigint);
CREATE FUNCTION note_fold() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO public.folds
		SELECT pg_current_xact_id(), (SELECT count(*) FROM gone), folded_rows
		FROM public.worker_spi_workers WHERE index = 1;
	RETURN NULL;
END
$$;
CREATE TRIGGER note_fold AFTER DELETE ON schema1.counted
	REFERENCING OLD TABLE AS gone EXECUTE FUNCTION note_fold();
ALTER TABLE schema1.counted ENABLE ALWAYS TRIGGER note_fold;
INSERT INTO schema1.counted SELECT 'delta', 1 FROM generate_series(1, 1000000);
SELECT worker_spi_fold(1);
EOQ
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|1000001', 'a million deltas are folded');
is($node->safe_psql('postgres', 'SELECT sum(rows) FROM folds'),
	'1000000', 'each of them once');
is( $node->safe_psql(
		'postgres',
		'SELECT count(DISTINCT xid) >= 3 AND max(rows) <= 600000 FROM folds'),
	't',
	'in several transactions, none of which has more than a part');
is( $node->safe_psql(
		'postgres',
		'SELECT count(DISTINCT seen) = count(DISTINCT xid) FROM folds'),
	't',
	'and the view shows how far it is');
is(worker($node, 1, 'fold_count'), '2', 'all that is one cycle');

# ------------------------------------------------------------------------
# Thirty sessions launch and stop: half of them workers of their own, half of
# them the same five.  More workers than there are slots are asked for.
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOQ');
CREATE TABLE outcomes (outcome text);
CREATE PROCEDURE launch_and_stop(session int, rounds int) LANGUAGE plpgsql AS $$
DECLARE
	own boolean := session % 2 = 0;
	n int;
	p int;
	stopped boolean;
	outcome text;
BEGIN
	FOR i IN 1 .. rounds LOOP
		n := CASE WHEN own THEN 300 + session ELSE 200 + (session + i) % 5 END;
		p := NULL;
		outcome := 'launched';
		BEGIN
			p := worker_spi_launch(n);
		EXCEPTION
			WHEN duplicate_object THEN
				outcome := 'duplicate';
			WHEN configuration_limit_exceeded THEN
				outcome := 'no slot';
			WHEN object_not_in_prerequisite_state THEN
				outcome := 'stopped at once';
			WHEN others THEN
				outcome := format('launch: %s %s', SQLSTATE, SQLERRM);
		END;
		INSERT INTO outcomes VALUES (outcome);
		COMMIT;

		-- Somebody else may stop a shared worker before it is ready, or before
		-- it has folded.
		outcome := 'folded';
		BEGIN
			IF NOT worker_spi_fold(n) THEN
				outcome := 'not there';
			END IF;
		EXCEPTION
			WHEN object_not_in_prerequisite_state THEN
				outcome := 'stopped';
			WHEN others THEN
				outcome := format('fold: %s %s', SQLSTATE, SQLERRM);
		END;
		IF p IS NOT NULL AND own AND outcome <> 'folded' THEN
			outcome := 'own worker: ' || outcome;
		END IF;
		INSERT INTO outcomes VALUES (outcome);
		COMMIT;

		stopped := worker_spi_stop(n);
		IF own AND stopped <> (p IS NOT NULL) THEN
			INSERT INTO outcomes VALUES ('own worker: lost');
		END IF;
		IF own AND (pg_stat_file('/proc/' || p || '/stat', true)).size IS NOT NULL THEN
			INSERT INTO outcomes VALUES ('own worker: alive after stop');
		END IF;
		COMMIT;
	END LOOP;
END
$$;
EOQ

$start = time();
my @sessions = map {
	start_psql($node, 'postgres', "session_$_", "CALL launch_and_stop($_, 10)",
		'-c', 'SET client_min_messages = error')
} 1 .. 30;
my $complaints = join '', map { (finish_psql($_))[1] } @sessions;
is($complaints, '', 'thirty sessions launch and stop workers without a complaint');
note(sprintf '300 rounds of 30 sessions took %.1f s', time() - $start);

my $outcomes = $node->safe_psql('postgres',
	'SELECT outcome, count(*) FROM outcomes GROUP BY 1 ORDER BY 1');
note($outcomes);
is( $node->safe_psql(
		'postgres', <<'EOQ'),
SELECT DISTINCT outcome FROM outcomes
WHERE outcome NOT IN ('launched', 'duplicate', 'no slot', 'stopped at once', 'folded', 'not there', 'stopped')
EOQ
	'',
	'sessions that launch and stop at once get what the contract says, or success'
);
is( $node->safe_psql(
		'postgres',
		"SELECT count(*) FILTER (WHERE outcome = 'launched') > 0 FROM outcomes"
	),
	't',
	'and there were workers to launch and to stop');
is( $node->safe_psql(
		'postgres', "SELECT count(*) FROM worker_spi_workers WHERE kind = 'dynamic'"),
	'0',
	'no worker is left in the view');
is( $node->safe_psql(
		'postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'worker_spi dynamic'"
	),
	'0',
	'no process is left');
is( $node->safe_psql(
		'postgres',
		'SELECT count(worker_spi_launch(i)) FROM generate_series(401, 419) AS i'
	),
	'19',
	'no registration is left: all slots can be taken again');
error_is($node, 'postgres', 'SELECT worker_spi_launch(420)', '53400',
	qr/"max_worker_processes", which is 120/, 'and no more than these');

is($survivor->query_safe('SELECT 1'),
	'1', 'the server did not restart: stopping a worker kills nobody');
$survivor->quit;
is( $node->safe_psql(
		'postgres',
		"SELECT count(*), sum(failed_count), sum(restart_count) FROM worker_spi_workers WHERE kind = 'static'"
	),
	'100|0|0',
	'the static workers have noticed nothing');

$node->stop;
done_testing();
