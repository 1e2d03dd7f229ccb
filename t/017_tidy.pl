# After a backlog, totals come to the front of the table, whatever room the
# table has and wherever the server knows of it, so that a vacuum makes the
# table small again; and that comes to an end.
#
# It waits for worker_spi_fold(), which returns when the cycle is over.

use strict;
use warnings FATAL => 'all';

use List::Util qw(max);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('tidy', <<'EOC');
worker_spi.total_workers = 1
autovacuum = off
EOC

# A cycle comes to its end, if only after a while.
sub fold_ends
{
	my ($test) = @_;
	my ($ret, $out, $err) = $node->psql('postgres',
		"SET statement_timeout = '60s'; SELECT worker_spi_fold(1)");
	is("$out$err", 't', $test);
	return;
}

# More totals than one transaction moves, all of them behind their deltas.
my ($deltas, $keys) = (300_000, 25_000);

foreach ([ 100, 'VACUUM' ], [ 90, '' ], [ 50, '' ], [ 50, 'VACUUM' ], [ 10, 'VACUUM' ])
{
	my ($fillfactor, $vacuum) = @$_;
	my $case = "fill factor $fillfactor" . ($vacuum && ', vacuumed');

	new_table($node, 1, <<EOC);
CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL, page int NOT NULL)
	WITH (fillfactor = $fillfactor);
CREATE UNIQUE INDEX ON %t (page) WHERE type = 'total'
EOC

	# The snapshot keeps the room of the deltas from being used again.  A vacuum
	# after it makes all of that known, in front and behind.
	my $holder = $node->background_psql('postgres');
	$holder->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1');
	$node->safe_psql('postgres', <<EOC);
INSERT INTO schema1.counted (value, page) SELECT 1, n % $keys FROM generate_series(1, $deltas) AS n
EOC
	fold_ends("$case: a backlog is folded");
	$holder->query_safe('COMMIT');
	$holder->quit;
	$node->safe_psql('postgres', 'VACUUM schema1.counted') if $vacuum;
	my $large = $node->safe_psql('postgres', "SELECT pg_relation_size('schema1.counted')");

	# What has to hold the totals is measured by their index, which grows with
	# each transaction that a slow machine takes for the backlog.
	my $front = 4 * $node->safe_psql('postgres', "SELECT pg_relation_size('schema1.counted_page_idx')");

	fold_ends('the next cycle comes to its end');
	is(total($node, 1), $deltas, 'the count is right');
	is( $node->safe_psql(
			'postgres',
			"SELECT count(*), min(value), max(value) FROM schema1.counted WHERE type = 'total'"),
		"$keys|12|12",
		'and so is each of the totals');

	$node->safe_psql('postgres', 'VACUUM schema1.counted');
	my $size = $node->safe_psql('postgres', "SELECT pg_relation_size('schema1.counted')");
	note("$size of $large bytes are left");

	# Where there is room for a few rows on a page only, they stay.
	cmp_ok($size, '<=', $fillfactor > 10 ? max(16 << 20, $front) : $large, 'the table is small');

	$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)') foreach 1 .. 2;
	my $wal = $node->safe_psql('postgres', 'SELECT pg_current_wal_insert_lsn()');
	$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)') foreach 1 .. 3;
	is( $node->safe_psql('postgres',
			"SELECT pg_current_wal_insert_lsn() - '$wal' < 10000"),
		't', 'cycles with nothing to do move nothing');
}

$node->stop;
done_testing();
