# Workers are quiet on a standby, and fold when it is promoted, whatever their
# naptime and restart_interval: both are an hour.
#
# The standby has a worker more than the primary, whose tables are made then.
#
# It waits for the standby to catch up, and for the tables to be folded after
# the promotion.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $primary = new_node('primary', <<'EOC', allows_streaming => 1);
worker_spi.total_workers = 2
worker_spi.restart_interval = 3600
max_worker_processes = 8
EOC
wait_for_state($primary, $_, 'idle') for (1 .. 2);

$primary->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->append_conf('postgresql.conf', 'worker_spi.total_workers = 3');
$standby->start;

# Deltas for both workers, which the primary does not fold.
$primary->safe_psql('postgres', <<'EOQ');
INSERT INTO schema1.counted SELECT 'delta', 1 FROM generate_series(1, 100);
INSERT INTO schema2.counted SELECT 'delta', 2 FROM generate_series(1, 100);
EOQ
$primary->wait_for_catchup($standby, 'replay', $primary->lsn('insert'));

# ------------------------------------------------------------------------
# On the standby
# ------------------------------------------------------------------------
is(deltas($standby, 1), '100', 'the standby has the deltas');
is(total($standby, 1), '100', 'and reads the count');
is( process_count($standby),
	'0',
	'no worker runs on a standby');
is( $standby->safe_psql(
		'postgres', 'SELECT index, state, pid FROM worker_spi_workers ORDER BY 1'
	),
	"1|down|\n2|down|\n3|down|",
	'the view shows static workers that have yet to start');

# Either would wait for the promotion if it were not refused.
foreach my $function ('launch(4)', 'fold(1)')
{
	error_is(
		$standby, 'postgres',
		"SET statement_timeout = '20s'; SELECT worker_spi_$function",
		'55000', qr/recovery is in progress/,
		"worker_spi_$function is refused on a standby");
}
is( $standby->safe_psql(
		'postgres', 'SELECT count(*) FROM worker_spi_workers'),
	'3',
	'a refused launch leaves nothing in the view');

# The two above are errors of clients, whose lines have the name of this file.
my @lines = slurp_file($standby->logfile) =~
  /^.*\[\d+\] (?:WARNING|ERROR|FATAL|PANIC):  .*$/mg;
is(join("\n", @lines), '', 'the log of the standby has no errors of the server');
unlike(slurp_file($standby->logfile),
	qr/worker_spi worker \d|background worker "worker_spi/,
	'nor a line about workers');

# ------------------------------------------------------------------------
# Promoted
# ------------------------------------------------------------------------

my $offset = -s $standby->logfile;
$standby->promote;
$standby->poll_query_until('postgres', <<'EOQ') or die 'nothing was folded';
SELECT count(*) = 2 AND sum(value) = 300
FROM (TABLE schema1.counted UNION ALL TABLE schema2.counted) AS both_tables
WHERE NOT EXISTS (SELECT FROM ONLY schema1.counted)
  AND NOT EXISTS (SELECT FROM ONLY schema2.counted)
EOQ
pass('workers fold after the promotion, without a restart');
$standby->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES ('delta', 1)");
folds($standby, 1, 'worker_spi_fold() works after the promotion');
is(rows($standby, 1), 'total|101', 'and nothing is lost');
wait_for_state($standby, 3, 'idle');
$standby->safe_psql('postgres',
	"INSERT INTO schema3.counted VALUES ('delta', 1)");
folds($standby, 3, 'a worker that the primary does not have makes its tables');
is(rows($standby, 3), 'total|1', 'and folds');
is($standby->safe_psql('postgres', 'SELECT worker_spi_launch(4) > 0'),
	't', 'worker_spi_launch() works after the promotion');
@lines = slurp_file($standby->logfile, $offset) =~
  /^.*\[\d+\] (?:WARNING|ERROR|FATAL|PANIC):  .*worker.*$/mg;
is(join("\n", @lines), '', 'the promotion gave no errors of workers');

is(deltas($primary, 1), '100', 'the primary was left alone');

$standby->stop;
$primary->stop;

done_testing();
