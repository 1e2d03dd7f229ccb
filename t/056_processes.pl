# Processes of all kinds, on a server that wants more workers than it has room for,
# and after reloads of settings that say how many there are.  Where the server starts
# each process anew, as on Windows, or built with EXEC_BACKEND, each loads the library
# by itself, computes how much shared memory it has asked for, and ends if that is
# not what the postmaster has.
#
# It waits for workers in the view, and for what the processes have done.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# The launcher for logical replication has a slot, too.
my $node = new_node('processes', <<'EOC', allows_streaming => 1);
max_worker_processes = 5
worker_spi.total_workers = 4
worker_spi.database = 'postgres, other'
autovacuum_naptime = 1
restart_after_crash = on
EOC
$node->safe_psql('postgres', 'CREATE DATABASE other');
wait_for_state($node, $_, 'idle', 'postgres') foreach 1 .. 4;

my $size = "SELECT size, allocated_size FROM pg_shmem_allocations WHERE name = 'worker_spi'";
my $allocated = $node->safe_psql('postgres', $size);
like($allocated, qr/^\d+\|\d+$/, 'the server has memory for workers');
my $offset = -s $node->logfile;

sub all_kinds
{
	my ($when) = @_;

	is($node->safe_psql('postgres', $size), $allocated, "$when: a client");

	my $pid = worker($node, 1, 'pid', 'postgres');
	$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
	$node->poll_query_until('postgres',
		"SELECT pid <> $pid AND state = 'idle' FROM worker_spi_workers WHERE index = 1 AND datname = 'postgres'"
	) or die 'worker 1 does not come back';
	$node->safe_psql('postgres', 'INSERT INTO schema1.counted (value) VALUES (1)');
	is( $node->safe_psql('postgres', 'SELECT worker_spi_fold(1)'),
		't', "$when: a static worker");

	is( $node->safe_psql('postgres', 'SELECT worker_spi_stop(2), worker_spi_launch(9) > 0, worker_spi_fold(9), worker_spi_stop(9)'),
		't|t|t|t', "$when: a dynamic worker");
	my $parallel = $node->pg_version >= 16 ? 'debug_parallel_query' : 'force_parallel_mode';
	like( $node->safe_psql('postgres', "SET $parallel = on; EXPLAIN (ANALYZE) SELECT count(*) FROM pg_class"),
		qr/Workers Launched: 1/, "$when: a parallel worker");
	is( $node->safe_psql('postgres', 'SELECT worker_spi_launch(2) > 0, worker_spi_fold(2)'),
		't|t', "$when: a static worker that was stopped");

	my $vacuums = "SELECT autovacuum_count FROM pg_stat_user_tables WHERE relname = 'vacuumed'";
	$node->safe_psql('postgres', <<'EOQ');
DROP TABLE IF EXISTS vacuumed;
CREATE TABLE vacuumed WITH (autovacuum_vacuum_threshold = 1) AS SELECT generate_series(1, 1000) AS i;
DELETE FROM vacuumed;
EOQ
	ok($node->poll_query_until('postgres', "SELECT ($vacuums) > 0"), "$when: autovacuum");

	$node->command_like(
		[ 'psql', '-XAtq', '-d', $node->connstr('postgres') . ' replication=database', '-c', 'IDENTIFY_SYSTEM' ],
		qr/^\d+\|/, "$when: a sender of WAL");
	return;
}

all_kinds('too few slots');

$node->append_conf('postgresql.conf', <<'EOC');
max_worker_processes = 50
worker_spi.total_workers = 1
worker_spi.database = 'other, postgres, template1, third'
worker_spi.restart_interval = 7
EOC
$node->reload;
$node->poll_query_until('postgres',
	"SELECT count(*) > 0 FROM worker_spi_workers WHERE datname = 'third' AND state = 'missing'")
  or die 'the settings were not read';
all_kinds('after a reload');

my $victim = $node->background_psql('postgres');
crash($node, $victim->query_safe('SELECT pg_backend_pid()')) or die 'there was no crash';
eval { $victim->quit };
wait_for_state($node, $_, 'idle', 'postgres') foreach 1 .. 4;
all_kinds('after a crash');

ok(!$node->log_contains(qr/ShmemIndex|PANIC|TRAP/, $offset), 'all have found the same memory');
$node->stop;
done_testing();
