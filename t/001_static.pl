# Static workers: they start with the server, make their tables, fold, show
# themselves, cost nothing while idle, and follow a reload of their settings.
#
# It waits for states and counters in the view, for worker_spi_fold(), and
# for next_fold_time after a reload.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('static', "autovacuum = off\n");
my $superuser = $node->safe_psql('postgres',
	'SELECT rolname FROM pg_roles WHERE oid = 10');

# Wait until all that was done is in the server's statistics: a session has
# reported it before it leaves pg_stat_activity.
sub wait_for_statistics
{
	wait_for_nap($node, $_) foreach 1, 2;
	$node->poll_query_until('postgres',
		"SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'client backend'")
	  or die 'other sessions do not end';
	return;
}

# ------------------------------------------------------------------------
# Start
# ------------------------------------------------------------------------
folds($node, $_) foreach 1, 2;
wait_for_nap($node, $_) foreach 1, 2;

is( $node->safe_psql(
		'postgres',
		"SELECT index, kind, datname, rolname, pid IS NOT NULL, state,
			worker_start BETWEEN pg_postmaster_start_time() AND now(),
			folded_until BETWEEN worker_start AND now(), stuck_rows,
			fold_count, folded_rows, last_fold_time, last_fold_ms,
			failed_count, last_failed_time, last_error, last_sqlstate,
			next_fold_time BETWEEN now() + interval '50 minutes'
				AND now() + interval '1 hour', restart_count
		 FROM worker_spi_workers ORDER BY index"),
	join("\n",
		map { "$_|static|postgres|$superuser|t|idle|t|t|0|0|0|||0||||t|0" } 1, 2),
	'the view shows the two static workers of the default, with nothing done');

is( $node->safe_psql(
		'postgres',
		"SELECT backend_type, application_name, datname, usename, state,
			wait_event_type, wait_event, backend_xid IS NULL,
			backend_xmin IS NULL, xact_start IS NULL
		 FROM pg_stat_activity
		 WHERE pid IN (SELECT pid FROM worker_spi_workers)
		 ORDER BY application_name"),
	join(
		"\n",
		map {
			"worker_spi|worker_spi worker $_|postgres|$superuser|idle|Extension|"
			  . ($node->pg_version >= 17 ? 'WorkerSpiMain' : 'Extension')
			  . '|t|t|t'
		} 1, 2),
	'a napping worker is idle under its own name, and holds no snapshot');

foreach my $index (1, 2)
{
	my $table = "postgres.schema$index";
	is( join("\n", map { /LOG:  (worker_spi worker $index .*)/ ? $1 : () }
			server_lines($node, 0)),
		join("\n",
			(map { "worker_spi worker $index made table $table.$_" } 'counted', 'total', 'stuck'),
			"worker_spi worker $index initialized with $table.counted"),
		"the log says which tables worker $index has made, and that it is there");
}

is( $node->safe_psql(
		'postgres',
		"SELECT relname, attname, format_type(atttypid, atttypmod), attnotnull,
			pg_get_expr(adbin, adrelid)
		 FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
		 LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
		 WHERE relnamespace = 'schema1'::regnamespace AND relkind = 'r' AND attnum > 0
		 ORDER BY relname, attnum"),
	join("\n",
		(map { ("$_|type|text|t|'delta'::text", "$_|value|bigint|t|") } 'counted', 'stuck'),
		'stuck|sqlstate|text|f|',
		'stuck|reason|text|f|',
		'stuck|since|timestamp with time zone|f|',
		"total|type|text|t|'delta'::text",
		'total|value|bigint|t|'),
	'a worker makes its three tables');
is( $node->safe_psql(
		'postgres',
		"SELECT relname, inhparent::regclass, relreplident, relpersistence, reloptions
		 FROM pg_class LEFT JOIN pg_inherits ON inhrelid = oid
		 WHERE relnamespace = 'schema1'::regnamespace AND relkind = 'r' ORDER BY relname"),
	join("\n",
		'counted||f|p|{autovacuum_vacuum_scale_factor=0,autovacuum_vacuum_threshold=10000,'
		  . 'autovacuum_vacuum_cost_delay=0,autovacuum_analyze_threshold=2147483647}',
		'stuck|schema1.counted|f|p|',
		'total|schema1.counted|d|p|{fillfactor=50}'),
	'which are one tree, each with the options for what it holds');
is( $node->safe_psql(
		'postgres',
		"SELECT pg_get_indexdef(indexrelid), indisprimary
		 FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
		 WHERE relnamespace = 'schema1'::regnamespace"),
	'CREATE UNIQUE INDEX total_pkey ON schema1.total USING btree (type)|t',
	'only the totals have an index');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM pg_constraint
		 WHERE connamespace = 'schema1'::regnamespace AND contype NOT IN ('n', 'p')"),
	'0',
	'no constraint costs each writer its evaluation');

# ------------------------------------------------------------------------
# Fold
# ------------------------------------------------------------------------
my $offset = -s $node->logfile;
$node->safe_psql('postgres',
	'INSERT INTO schema1.counted (value) SELECT 1 FROM generate_series(1, 17)');
is($node->safe_psql('postgres', 'SELECT worker_spi_fold(1)'),
	't', 'a fold on demand');
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|17', 'leaves the total and nothing else');
like(
	slurp_file($node->logfile, $offset),
	qr/LOG:  worker_spi worker 1: count in postgres\.schema1\.counted is now 17$/m,
	'and is in the log');
wait_for_statistics();
my $changes = "SELECT relname, n_tup_ins, n_tup_upd, n_tup_del
	FROM pg_stat_user_tables WHERE schemaname = 'schema1' ORDER BY relname";
is($node->safe_psql('postgres', $changes),
	"counted|17|0|17\nstuck|0|0|0\ntotal|1|0|0",
	'and in the statistics that autovacuum goes by');

$offset = -s $node->logfile;
$node->safe_psql('postgres', <<EOQ);
INSERT INTO schema1.counted VALUES ('delta', 3), ('delta', -20);
SELECT worker_spi_fold(1);
EOQ
ok( $node->log_contains(
		qr/LOG:  worker_spi worker 1: count in postgres\.schema1\.counted is now 0$/m,
		$offset),
	'a total that comes to nothing is logged like any other');
wait_for_statistics();
is($node->safe_psql('postgres', $changes),
	"counted|19|0|19\nstuck|0|0|0\ntotal|1|1|0",
	'the statistics show the update of the total');
is( $node->safe_psql(
		'postgres',
		"SELECT fold_count, folded_rows, last_fold_time BETWEEN worker_start AND now(),
			last_fold_ms > 0, failed_count
		 FROM worker_spi_workers WHERE index = 1"),
	'2|19|t|t|0',
	'the view counts cycles and rows');

# worker 2 gets keys while it runs
$offset = -s $node->logfile;
new_table($node, 2, <<EOC, key => 'PRIMARY KEY (page)');
CREATE TABLE %t (type text, value bigint, page int NOT NULL);
INSERT INTO %t SELECT 'delta', i, i % 12 FROM generate_series(1, 1000) i
EOC
folds($node, 2);
ok( $node->log_contains(
		qr/LOG:  worker_spi worker 2: folded 1000 rows into 12 totals of postgres\.schema2\.counted$/m,
		$offset),
	'with keys the log has the number of rows and totals');

# ------------------------------------------------------------------------
# Idle cycles.  The first may still set hint bits and prune pages, so they do not
# count.
# ------------------------------------------------------------------------
my $state = 'SELECT pg_snapshot_xmax(pg_current_snapshot()), pg_current_wal_insert_lsn()';
my $idle_cycles = 'SELECT count(*) FILTER (WHERE worker_spi_fold(1)),
		count(*) FILTER (WHERE worker_spi_fold(2))
	FROM generate_series(1, 100)';
$node->safe_psql('postgres', $_) foreach $idle_cycles, $state;

# The blocks of the totals that were read.
sub blocks_of_totals
{
	wait_for_statistics();
	return $node->safe_psql('postgres',
		"SELECT relid::regclass, heap_blks_read + heap_blks_hit, idx_blks_read + idx_blks_hit
		 FROM pg_statio_user_tables WHERE relname = 'total' ORDER BY relid::regclass::text");
}
my $blocks = blocks_of_totals();
like($blocks, qr/^schema1\.total\|[1-9]\d*\|[1-9]\d*\nschema2\.total\|[1-9]\d*\|[1-9]\d*$/,
	'a fold reads blocks of the totals');
$offset = -s $node->logfile;
my $before = $node->safe_psql('postgres', $state);
is($node->safe_psql('postgres', $idle_cycles),
	'100|100', '200 cycles without a delta');
is($node->safe_psql('postgres', $state),
	$before, 'take no transaction id and write no WAL');
is(blocks_of_totals(), $blocks, 'read no block of the totals');
ok(!$node->log_contains(qr/worker_spi worker/, $offset), 'write no log line');
is(worker($node, 1, 'fold_count'), '2', 'and do not count as folds');

# ------------------------------------------------------------------------
# Reload
# ------------------------------------------------------------------------
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 1)");
$node->append_conf('postgresql.conf', 'worker_spi.naptime = 1');
$node->reload;
wait_for_fold($node, 1);
pass('a lower naptime takes effect in a nap');
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 1)");
wait_for_fold($node, 1);
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|2', 'and deltas are folded when it is over');

$node->append_conf('postgresql.conf', 'worker_spi.naptime = 2147483');
$node->reload;
$node->poll_query_until('postgres',
	"SELECT min(next_fold_time) > now() + interval '24 days' FROM worker_spi_workers")
  or die 'the longest naptime did not take effect';
pass('the longest naptime lasts more than three weeks');
$node->append_conf('postgresql.conf', 'worker_spi.naptime = 3600');
$node->reload;
$node->poll_query_until('postgres',
	"SELECT max(next_fold_time) <= now() + interval '1 hour' FROM worker_spi_workers")
  or die 'the naptime was not lowered again';

reload_settings($node, 'worker_spi.log_folds = off', 1, 2);
$offset = -s $node->logfile;
$node->safe_psql('postgres', <<EOQ);
INSERT INTO schema1.counted VALUES ('delta', 5);
INSERT INTO schema2.counted VALUES ('delta', 5, 1);
SELECT worker_spi_fold(1), worker_spi_fold(2);
EOQ
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|7', 'with log_folds off a worker folds');
ok(!$node->log_contains(qr/worker_spi worker/, $offset), 'and does not log it');
reload_settings($node, 'worker_spi.log_folds = on', 1, 2);
$offset = -s $node->logfile;
$node->safe_psql('postgres', <<EOQ);
INSERT INTO schema1.counted VALUES ('delta', 1);
SELECT worker_spi_fold(1);
EOQ
ok($node->log_contains(qr/LOG:  worker_spi worker 1: count/, $offset),
	'until it is on again');

# another database and role
$node->safe_psql('postgres', <<EOQ);
CREATE DATABASE other;
CREATE ROLE regress_static LOGIN;
GRANT CREATE ON DATABASE other TO regress_static;
EOQ
$offset = -s $node->logfile;
$node->append_conf('postgresql.conf',
	"worker_spi.database = 'other'\nworker_spi.role = 'regress_static'");
$node->reload;
$node->poll_query_until(
	'postgres', "SELECT count(*) = 2 FROM worker_spi_workers
	 WHERE datname = 'other' AND rolname = 'regress_static' AND state = 'idle'")
  or die 'workers did not move';
pass('a reload moves the static workers to another database and role');
is( $node->safe_psql('other',
		"SELECT DISTINCT relowner::regrole FROM pg_class
		 WHERE relname IN ('counted', 'total', 'stuck')"),
	'regress_static',
	'and there they work as that role');
$node->safe_psql('other', "INSERT INTO schema1.counted VALUES ('delta', 9)");
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 9)");
$node->safe_psql('other', 'CREATE EXTENSION worker_spi');
is($node->safe_psql('other', 'SELECT worker_spi_fold(1)'),
	't', 'an omitted database is that of the caller');
is($node->safe_psql('other', 'TABLE schema1.counted'),
	'total|9', 'where deltas are folded');
is(deltas($node, 1), '1', 'but no longer in the old one');
my ($ret, $out, $err) = $node->psql('postgres', 'SELECT worker_spi_fold(1)');
is($out, 'f', 'which has no such worker any more');
like($err, qr/WARNING:  there is no worker with index 1 in database "postgres"$/m,
	'as a warning says');

$node->append_conf('postgresql.conf',
	"worker_spi.database = 'postgres'\nworker_spi.role = ''");
$node->reload;
$node->poll_query_until(
	'postgres', "SELECT count(*) = 2 FROM worker_spi_workers
	 WHERE datname = 'postgres' AND rolname = '$superuser' AND state = 'idle'")
  or die 'workers did not move back';
wait_for_fold($node, 1);
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|17', 'a worker that moves back folds what has come in meanwhile');

# ------------------------------------------------------------------------
# Settings that are refused
# ------------------------------------------------------------------------
foreach my $setting (
	[ 'naptime', '0' ],
	[ 'naptime', '2147484' ],
	[ 'total_workers', '-1' ],
	[ 'total_workers', '101' ],
	[ 'restart_interval', '0' ],
	[ 'restart_interval', '3601' ],
	[ 'wake_delay', '-1' ],
	[ 'wake_delay', '10001' ])
{
	my ($name, $value) = @$setting;

	error_is($node, 'postgres',
		"ALTER SYSTEM SET worker_spi.$name = '$value'",
		'22023', qr/outside the valid range/,
		"$name cannot be $value");
}
error_is($node, 'postgres',
	"ALTER SYSTEM SET worker_spi.role = '" . 'x' x 64 . "'",
	'22023', qr/at most 63 bytes/, 'role cannot be longer than a name');
error_is($node, 'postgres', "ALTER SYSTEM SET worker_spi.database = '$_'",
	'22023', qr/worker_spi\.database/, "database cannot be '$_'")
  foreach 'a,', 'a, b, a', '"a', 'a b', ',';
error_is($node, 'postgres', "SET worker_spi.$_ = 1",
	'55P02', qr/cannot be changed/, "$_ cannot be set in a session")
  foreach 'naptime', 'log_folds', 'wake_delay', 'notify', 'total_workers',
  'restart_interval';
error_is($node, 'postgres', 'SET worker_spi.nonsense = 1',
	'42602', qr/"worker_spi" is a reserved prefix/,
	'a setting that does not exist cannot be set');

# ------------------------------------------------------------------------
# Other ways to start the server
# ------------------------------------------------------------------------
$offset = -s $node->logfile;
$node->append_conf('postgresql.conf', <<EOC);
worker_spi.total_workers = 0
worker_spi.nonsense = 1
log_min_messages = debug1
EOC
$node->restart;
ok( $node->log_contains(
		qr/WARNING:  invalid configuration parameter name "worker_spi\.nonsense", removing it/,
		$offset),
	'a misspelt setting in the configuration file is warned of');
is($node->safe_psql('postgres', 'SELECT count(*) FROM worker_spi_workers'),
	'0', 'with total_workers = 0 there are no static workers');
ok(!$node->log_contains(qr/registering background worker "worker_spi/, $offset),
	'nor are any registered');
is( $node->safe_psql(
		'postgres', 'SELECT worker_spi_launch(1) > 0, worker_spi_fold(1)'),
	't|t',
	'their indexes are free for dynamic ones');

$node->append_conf('postgresql.conf', 'worker_spi.total_workers = 3');
foreach my $libraries ('pg_stat_statements, worker_spi',
	'worker_spi, pg_stat_statements')
{
	$offset = -s $node->logfile;
	$node->append_conf('postgresql.conf',
		"shared_preload_libraries = '$libraries'");
	$node->restart;
	wait_for_state($node, $_, 'idle') foreach 1 .. 3;
	$node->safe_psql('postgres', <<EOQ);
CREATE EXTENSION IF NOT EXISTS pg_stat_statements;
INSERT INTO schema3.counted VALUES ('delta', 1);
SELECT worker_spi_fold(3);
EOQ
	is( $node->safe_psql(
			'postgres',
			"SELECT count(*) FROM ONLY schema3.counted
			 UNION ALL
			 SELECT count(*) FROM pg_stat_statements
			 WHERE query LIKE 'INSERT INTO schema3.counted%'"),
		"0\n1",
		"works together with others: shared_preload_libraries = '$libraries'");
}
ok( $node->log_contains(
		qr/registering background worker "worker_spi worker $_"/, $offset),
	"worker $_ is registered under its name") foreach 1 .. 3;

# pg_upgrade starts servers like this
$node->stop;
$offset = -s $node->logfile;
system_or_bail('pg_ctl', '-w', '-D', $node->data_dir, '-l', $node->logfile,
	'-o', '-b', 'start');
is( process_count($node),
	'0',
	'no worker runs in binary upgrade mode');
system_or_bail('pg_ctl', '-w', '-D', $node->data_dir, 'stop');
ok( !$node->log_contains(
		qr/registering background worker "worker_spi|worker_spi worker/,
		$offset),
	'nor is any registered then');

done_testing();
