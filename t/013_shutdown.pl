# Workers end when the server does: a fast shutdown is not held up by one that
# naps, folds, or waits, and none outlives a postmaster that was killed.
#
# It waits for states and counters in the view, for lock waits in pg_locks,
# and for the ends of processes.  A worker that held the server up would do so for
# ever, or until it had folded all, which shows.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);
use t::WorkerSpi;

# Streaming is allowed because commits wait for standbys only then; its small
# shared_buffers are undone.
my $node = new_node('shutdown', <<'EOC', allows_streaming => 1);
worker_spi.total_workers = 2
max_prepared_transactions = 1
shared_buffers = 128MB
max_wal_size = 1GB
EOC

# The server stops, and is started again.
sub stops_fast
{
	my ($test) = @_;

	ok($node->stop('fast', fail_ok => 1), "fast shutdown $test");
	$node->start;
	return;
}

# Is the process gone?  A zombie is: its parent is what does not look.
sub is_gone
{
	my ($pid) = @_;
	my $stat;

	return 1 unless open(my $fh, '<', "/proc/$pid/stat");
	$stat = <$fh>;
	close $fh;
	return !defined $stat || $stat =~ /^\d+ \(.*\) [ZX] /s;
}

# Kill the postmaster, and see its workers go.  Then wait for everything else, so
# that the server can be started again.
sub postmaster_dies
{
	my ($test) = @_;
	my @workers = split /\n/, $node->safe_psql('postgres',
		"SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'worker_spi%'");
	my @all = split /\n/, $node->safe_psql('postgres',
		'SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()');
	my ($postmaster) =
	  slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	is(scalar(@workers), 2, "two workers run $test");
	$node->kill9;
	usleep(10_000) while ((grep { !is_gone($_) } @workers) && time() < $end);
	is(scalar(grep { !is_gone($_) } @workers),
		0, "no worker outlives the postmaster that was killed $test");

	# A new postmaster takes even a zombie for one that runs.
	usleep(10_000)
	  while ((kill(0, $postmaster) || grep { !is_gone($_) } @all) && time() < $end);
	die 'processes of the killed server are left' if time() >= $end;
	return;
}

# Let worker 1 fold a million deltas, and slowly: a trigger computes for a
# while in each of its transactions.  The checkpoint leaves little to do for
# the one at shutdown.
sub start_folding
{
	new_table($node, 1, <<'EOQ');
CREATE TABLE %t (type text, value bigint);
INSERT INTO %t SELECT 'delta', 1 FROM generate_series(1, 1000000);
CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM count(*) FROM generate_series(1, 3000000);
	RETURN NULL;
END
$$;
CREATE TRIGGER slow AFTER DELETE ON %t EXECUTE FUNCTION slow();
ALTER TABLE %t ENABLE ALWAYS TRIGGER slow
EOQ
	$node->safe_psql('postgres', 'CHECKPOINT');
	continue_folding();
	return;
}

# What the worker folds when it starts is also slow, then.
sub continue_folding
{
	my $before = worker($node, 1, 'folded_rows');

	$node->safe_psql('postgres', 'SELECT worker_spi_fold(1, wait => false)');
	$node->poll_query_until('postgres',
		"SELECT folded_rows > $before FROM worker_spi_workers WHERE index = 1")
	  or die 'worker 1 does not fold';
	return;
}

# A million in all, some of them still deltas.
sub stopped_in_the_middle
{
	my ($test) = @_;
	is( $node->safe_psql(
			'postgres',
			'SELECT (SELECT sum(value) FROM schema1.counted), (SELECT value < 1000000 FROM schema1.total), EXISTS (SELECT FROM ONLY schema1.counted)'
		),
		'1000000|t|t',
		"$test came in the middle of the fold, and nothing is lost");
	return;
}

# ------------------------------------------------------------------------
# Fast shutdown
# ------------------------------------------------------------------------
wait_for_state($node, $_, 'idle') for (1 .. 2);
stops_fast('while workers nap');

wait_for_state($node, $_, 'idle') for (1 .. 2);
start_folding();
stops_fast('while a worker folds a million rows');
stopped_in_the_middle('the shutdown');

# The fold that goes on now is in the way of what follows.
new_table($node, 1, 'CREATE TABLE %t (type text, value bigint)');
folds($node, 1);

# Key after key is slow, and fails.
$node->safe_psql('postgres', <<'EOQ');
CREATE FUNCTION refuse() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_sleep(0.5);
	RAISE SQLSTATE '22003';
END
$$;
EOQ
new_table(
	$node, 1,
	'CREATE TABLE %t (page int NOT NULL, value bigint NOT NULL);'
	  . ' INSERT INTO %t SELECT i, 1 FROM generate_series(1, 1000) AS i',
	key => 'PRIMARY KEY (page)',
	total => 'ALTER TABLE %s.total ADD CHECK (public.refuse())');
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1, wait => false)');
$node->poll_query_until('postgres', <<'EOQ') or die 'worker 1 is not slow';
SELECT count(*) = 1 FROM worker_spi_workers JOIN pg_stat_activity USING (pid)
WHERE index = 1 AND wait_event = 'PgSleep'
EOQ
stops_fast('while careful shares fail one after the other');
is(total($node, 1), '1000', 'and nothing is lost');
is($node->safe_psql('postgres', 'SELECT count(*) FROM schema1.total'),
	'0', 'and nothing was folded');
new_table($node, 1, 'CREATE TABLE %t (type text, value bigint)');
folds($node, 1);

# The lock of a prepared transaction stays when all sessions have ended.
add_gate($node, 1, 42);
$node->safe_psql('postgres', <<'EOQ');
INSERT INTO schema1.counted (value) VALUES (0);
BEGIN;
SELECT pg_advisory_xact_lock(42);
PREPARE TRANSACTION 'gate';
SELECT worker_spi_fold(1, wait => false);
EOQ
$node->poll_query_until('postgres', <<'EOQ') or die 'worker 1 does not wait';
SELECT count(*) = 1 FROM worker_spi_workers JOIN pg_locks USING (pid)
WHERE index = 1 AND NOT granted
EOQ
stops_fast('while a worker waits for a lock');
$node->safe_psql('postgres', "COMMIT PREPARED 'gate'");

# Sessions that wrote something would wait for ever with this setting.
$node->append_conf('postgresql.conf', "synchronous_standby_names = 'nobody'");
$node->reload;
$node->poll_query_until('postgres', 'SHOW synchronous_standby_names', 'nobody')
  or die 'reload was not seen';
is( $node->safe_psql(
		'postgres', <<'EOQ'),
SET synchronous_commit = local;
SET statement_timeout = '30s';
INSERT INTO schema1.counted VALUES ('delta', 5);
SELECT worker_spi_fold(1);
EOQ
	't',
	'a fold does not wait for a synchronous standby');
$node->safe_psql('postgres', <<'EOQ');
SET synchronous_commit = local;
INSERT INTO schema1.counted VALUES ('delta', 6);
SELECT worker_spi_fold(1, wait => false);
EOQ
stops_fast('while there is no synchronous standby');
is($node->safe_psql('postgres', 'SELECT sum(value) FROM schema1.counted'),
	'11', 'and nothing is lost');
$node->adjust_conf('postgresql.conf', 'synchronous_standby_names', "''");
$node->reload;

# ------------------------------------------------------------------------
# Death of the postmaster
# ------------------------------------------------------------------------
wait_for_state($node, $_, 'idle') for (1 .. 2);
postmaster_dies('while they nap');

$node->start;
wait_for_state($node, $_, 'idle') for (1 .. 2);
start_folding();
postmaster_dies('while one folds a million rows');

$node->start;
stopped_in_the_middle('the death of the postmaster');
$node->stop;

done_testing();
