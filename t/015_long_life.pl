# A worker that lives long neither grows nor holds anything back: its memory
# is flat over WORKER_SPI_CYCLES cycles (1000 if that is not set), each of
# which folds a delta, and it has no transaction open while it naps.
#
# It waits for worker_spi_fold() in each round, and for the worker's account
# of its memory in the log.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $cycles = $ENV{WORKER_SPI_CYCLES} || 1000;
my $node = new_node('long_life', <<'EOC');
worker_spi.total_workers = 1
worker_spi.log_folds = off
EOC

# In each round one delta is inserted and folded.  Of ten rounds, one fails
# first, and in another the delta is stuck first; each hundredth changes the
# tables: errors and plans made anew are where memory would be forgotten.
$node->safe_psql('postgres', <<'EOQ');
CREATE PROCEDURE rounds(n int) LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. n LOOP
		INSERT INTO schema1.counted VALUES ('delta', 1);
		IF i % 10 = 0 THEN
			ALTER TABLE schema1.counted RENAME value TO amount;
			COMMIT;
			BEGIN
				PERFORM worker_spi_fold(1);
				RAISE 'the fold did not fail';
			EXCEPTION WHEN invalid_table_definition THEN
				NULL;
			END;
			ALTER TABLE schema1.counted RENAME amount TO value;
		END IF;
		IF i % 10 = 5 THEN
			ALTER TABLE schema1.total ADD CONSTRAINT none CHECK (value < 0) NOT VALID;
			COMMIT;
			BEGIN
				PERFORM worker_spi_fold(1);
				RAISE 'the fold did not fail';
			EXCEPTION WHEN check_violation THEN
				NULL;
			END;
			ALTER TABLE schema1.total DROP CONSTRAINT none;
		END IF;
		IF i % 100 = 0 THEN
			ALTER TABLE schema1.counted ALTER COLUMN value TYPE integer;
			COMMIT;
			PERFORM worker_spi_fold(1);
			ALTER TABLE schema1.counted ALTER COLUMN value TYPE bigint;
		END IF;
		COMMIT;
		PERFORM worker_spi_fold(1);
		COMMIT;
	END LOOP;
END
$$;
EOQ

wait_for_state($node, 1, 'idle');
my $pid = worker($node, 1, 'pid');

# Private resident memory of the worker in kB: without what it shares with
# other processes, which grows as it touches more of the server's buffers.
sub resident
{
	my ($size, $resident, $shared) =
	  split(/ /, slurp_file("/proc/$pid/statm"));
	return ($resident - $shared) * 4;
}

# What the worker's memory contexts hold, in bytes, by its own account.
sub allocated
{
	my $offset = -s $node->logfile;
	$node->safe_psql('postgres', "SELECT pg_log_backend_memory_contexts($pid)");
	$node->wait_for_log(qr/\[$pid\] LOG:  Grand total: \d+ bytes/, $offset);
	my ($bytes, $used) = slurp_file($node->logfile, $offset) =~
	  /Grand total: (\d+) bytes in \d+ blocks; \d+ free \(\d+ chunks\); (\d+) used/;
	return ($bytes, $used);
}

my $first = int($cycles / 5);
$node->safe_psql('postgres', "CALL rounds($first)",
	timeout => 3600);
my $resident_before = resident();
my ($bytes_before, $used_before) = allocated();

my $rest = $cycles - $first;
$node->safe_psql('postgres', "CALL rounds($rest)", timeout => 3600);
my $resident_after = resident();
my ($bytes_after, $used_after) = allocated();

note("after $first cycles: $resident_before kB resident, "
	  . "$bytes_before bytes allocated, $used_before used");
note("after $cycles cycles: $resident_after kB resident, "
	  . "$bytes_after bytes allocated, $used_after used");

cmp_ok($resident_after, '<=', $resident_before * 1.05 + 1024,
	"resident memory is flat over $cycles cycles");

# One block of a memory context may be needed more or less; what leaks would
# leak in each cycle.
cmp_ok($bytes_after - $bytes_before,
	'<', 64 * 1024, "memory contexts are flat over $cycles cycles");
cmp_ok($used_after - $used_before,
	'<', 32 * 1024, "what is used in them is flat over $cycles cycles");

is(worker($node, 1, 'pid'), $pid, 'it was one process all the time');
is(rows($node, 1), "total|$cycles", 'and it has counted right');
cmp_ok(worker($node, 1, 'fold_count'),
	'>=', $cycles, 'in as many cycles as were asked for');
cmp_ok(worker($node, 1, 'failed_count'),
	'>=', int($cycles / 10) - 1, 'errors among them');

is( $node->safe_psql(
		'postgres',
		"SELECT state, backend_xid IS NULL, backend_xmin IS NULL, xact_start IS NULL FROM pg_stat_activity WHERE pid = $pid"
	),
	'idle|t|t|t',
	'no transaction and no snapshot is open while it naps');
is( $node->safe_psql(
		'postgres',
		"SELECT count(*) FROM pg_locks WHERE pid = $pid AND locktype IN ('relation', 'virtualxid', 'transactionid')"
	),
	'0',
	'and no lock that a transaction would have is held');

$node->stop;
done_testing();
