# Dump and restore, also over the tables of a worker that runs; pg_upgrade; and the
# move from the sample's one-argument worker_spi_launch() and integer table.
#
# It waits for launches and for worker_spi_fold(), and for the state of the
# workers of a new server.

use strict;
use warnings FATAL => 'all';

use Cwd ();
use File::Temp ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('old');
wait_for_state($node, $_, 'idle') foreach 1, 2;

# ------------------------------------------------------------------------
# Dump and restore
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<EOQ);
CREATE ROLE regress_reader LOGIN;
GRANT EXECUTE ON FUNCTION worker_spi_fold TO regress_reader;
GRANT SELECT ON worker_spi_workers TO regress_reader;
CREATE DATABASE restored;
CREATE SCHEMA schema5
	CREATE TABLE counted (type text, value bigint, page text)
	CREATE TABLE total (UNIQUE NULLS NOT DISTINCT (page)) INHERITS (counted);
INSERT INTO schema5.counted VALUES ('delta', 1, 'a'), ('delta', 2, NULL);
INSERT INTO schema1.counted SELECT 'delta', i FROM generate_series(1, 10) i;
SELECT worker_spi_launch(5), worker_spi_fold(5), worker_spi_fold(1);
CREATE TRIGGER wake AFTER INSERT ON schema5.counted
	FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();
EOQ
# deltas that are not folded, and some that cannot be, when the dump is made
$node->safe_psql('postgres', <<EOQ);
INSERT INTO schema1.counted VALUES ('delta', 100);
INSERT INTO schema5.counted
SELECT 'delta', 9223372036854775807, 'large' FROM generate_series(1, 2);
EOQ
error_is($node, 'postgres', 'SELECT worker_spi_fold(5)', '22003', qr/./,
	'one key is stuck');

my $tables = <<EOQ;
SELECT tableoid::regclass::text, type, value, '' AS page FROM schema1.counted
UNION ALL SELECT tableoid::regclass::text, type, value, page FROM schema5.counted
ORDER BY 1, 2, 3;
SELECT sqlstate, reason, since FROM schema5.stuck;
SELECT c.oid::regclass::text, reloptions, relreplident, inhparent::regclass,
	pg_get_indexdef(indexrelid)
FROM pg_class c
	LEFT JOIN pg_inherits ON inhrelid = c.oid
	LEFT JOIN pg_index ON indrelid = c.oid
WHERE relnamespace IN ('schema1'::regnamespace, 'schema5'::regnamespace)
	AND relkind = 'r'
ORDER BY 1;
SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = 'schema1.counted'::regclass;
SELECT has_function_privilege('regress_reader', 'worker_spi_fold(int, oid, bool)', 'EXECUTE'),
	has_table_privilege('regress_reader', 'worker_spi_workers', 'SELECT'),
	has_function_privilege('regress_reader', 'worker_spi_stop(int, oid)', 'EXECUTE');
EOQ
my $original = $node->safe_psql('postgres', $tables);
my $dump = $PostgreSQL::Test::Utils::tmp_check . '/worker_spi.dump';
$node->command_ok([ 'pg_dump', '-Fc', '-f', $dump, 'postgres' ],
	'a database with the extension is dumped');
$node->command_ok(
	[ 'pg_restore', '--exit-on-error', '-d', 'restored', $dump ],
	'and restored');
is($node->safe_psql('restored', $tables),
	$original, 'with its tables, indexes, options and grants');
my $restored = database_oid($node, 'restored');
is( $node->safe_psql(
		'restored',
		"SELECT worker_spi_launch(n, $restored) > 0 FROM (VALUES (1), (5)) AS v (n)"),
	"t\nt",
	'workers adopt the restored tables');
folds($node, 1, 'one folds', 'restored');
is($node->safe_psql('restored', 'TABLE schema1.counted'),
	'total|155', 'what was in the dump');
error_is($node, 'restored', 'SELECT worker_spi_fold(5)', '22003', qr/./,
	'what was stuck is stuck here, too');
$node->safe_psql('restored', <<EOQ);
INSERT INTO schema5.counted VALUES ('delta', 10, 'a'), ('delta', 10, NULL),
	('delta', -9223372036854775807, 'large');
EOQ
folds($node, 5, 'until a delta makes good for it', 'restored');
is( $node->safe_psql(
		'restored', 'SELECT * FROM schema5.counted ORDER BY page'),
	"total|11|a\ntotal|9223372036854775807|large\ntotal|12|",
	'all goes into the totals that were in the dump');
is(total($node, 1), '155', 'the original is as it was');

# ------------------------------------------------------------------------
# Over the tables of a worker that runs
# ------------------------------------------------------------------------
# A session has them fold without a pause.
$node->safe_psql('restored', "INSERT INTO schema1.counted VALUES ('delta', 1000)");
my $pid = worker($node, 1, 'pid', 'restored');
my $asker = start_psql($node, 'postgres', 'asker', <<EOQ);
DO \$\$
BEGIN
	LOOP
		PERFORM worker_spi_fold(1, $restored, wait => false),
			worker_spi_fold(5, $restored, wait => false);
		COMMIT;
	END LOOP;
END
\$\$
EOQ
$node->poll_query_until('postgres',
	"SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'asker' AND state = 'active'")
  or die 'nobody asks for folds';
$node->command_ok(
	[ 'pg_restore', '--exit-on-error', '--clean', '-d', 'restored', $dump ],
	'the dump is restored once more, over tables that workers fold');
$node->safe_psql('postgres',
	"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'asker'");
finish_psql($asker);
folds($node, 1, 'the worker goes on', 'restored');
is($node->safe_psql('restored', 'TABLE schema1.counted'),
	'total|155', 'from the same count');
is( $node->safe_psql('restored', 'SELECT sum(value), count(*) FROM schema5.stuck'),
	'18446744073709551614|2', 'what is stuck is as it was');
is(worker($node, 1, 'pid', 'restored'), $pid, 'by the same process');

# Rows alone: what they say of themselves is where they go.
is( $node->safe_psql('restored', 'SELECT worker_spi_stop(1), worker_spi_stop(5)'),
	't|t', 'for a restore of data alone the workers are stopped');
$node->safe_psql('restored', 'TRUNCATE schema1.counted, schema5.counted');
$node->command_ok(
	[ 'pg_restore', '--exit-on-error', '--data-only', '-d', 'restored', $dump ],
	'and the data are restored');
is($node->safe_psql('restored', $tables),
	$original, 'each table has the rows that it had');
is( $node->safe_psql('restored',
		'SELECT worker_spi_launch(1) > 0, worker_spi_launch(5) > 0'),
	't|t', 'the workers are launched again');
folds($node, 1, 'and fold', 'restored');
is($node->safe_psql('restored', 'TABLE schema1.counted'), 'total|155', 'to the same count');

# ------------------------------------------------------------------------
# What psql shows of it
# ------------------------------------------------------------------------
my $extension = $node->safe_psql('restored', '\\dx+ worker_spi');
like($extension, qr/^\Q$_\E$/m, "\\dx+ shows $_")
  foreach 'function worker_spi_fold(integer,oid,boolean)',
  'function worker_spi_get_workers()',
  'function worker_spi_launch(integer,oid,oid,text[],boolean)',
  'function worker_spi_stop(integer,oid)', 'function worker_spi_wake()',
  'view worker_spi_workers';
my $table = $node->safe_psql('restored',
	"\\pset tuples_only off\n\\d+ schema1.counted");
like($table, $_, "\\d+ shows the restored table: $_")
  foreach qr/^type\|text\|\|not null\|'delta'::text\|/m,
  qr/^value\|bigint\|\|not null\|\|/m,
  qr/^Child tables:\s+schema1\.stuck,?\s+schema1\.total$/m,
  qr/^Replica Identity: FULL$/m,
  qr/autovacuum_vacuum_scale_factor=0/;

# ------------------------------------------------------------------------
# The sample's worker_spi 1.0 has a function with one argument.
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<EOQ);
CREATE DATABASE sample;
\\c sample
CREATE FUNCTION worker_spi_launch(pg_catalog.int4) RETURNS pg_catalog.int4 STRICT
	AS '\$libdir/worker_spi' LANGUAGE C;
CREATE SCHEMA schema4;
CREATE TABLE schema4.counted (
	type text CHECK (type IN ('total', 'delta')), value integer);
CREATE UNIQUE INDEX counted_unique_total ON schema4.counted (type)
	WHERE type = 'total';
INSERT INTO schema4.counted VALUES ('total', 1000), ('delta', 30), ('delta', 7);
EOQ
my $sample = database_oid($node, 'sample');
error_is($node, 'sample', 'SELECT worker_spi_launch(4)',
	'42P13', qr/HINT:.*DROP EXTENSION worker_spi/s,
	'a function made for another library is refused, not run');
nothing_left($node, 4, 'and starts no worker');
$node->safe_psql('sample',
	'DROP FUNCTION worker_spi_launch(int4); CREATE EXTENSION worker_spi');
is( $node->safe_psql(
		'sample',
		"SELECT worker_spi_launch(4, $sample) > 0, worker_spi_fold(4, $sample)"),
	't|t',
	'with the extension in its place a worker adopts the old table');
is($node->safe_psql('sample', 'TABLE schema4.counted'),
	'total|1037', 'with its total and its deltas');
is( $node->safe_psql(
		'sample',
		"SELECT type, value, pg_typeof(value) FROM schema4.total"),
	'total|1037|integer',
	'which are deltas of a table of totals now');
# all the ways in which versions of the sample are called
is( $node->safe_psql(
		'postgres', "SELECT worker_spi_launch(21) > 0,
			worker_spi_launch(22, $sample, 0) > 0,
			worker_spi_launch(23, $sample, 10) > 0,
			worker_spi_launch(24, $sample, 10, '{}') > 0,
			worker_spi_launch(25, $sample, 10, '{ALLOWCONN}') > 0,
			worker_spi_launch(26, $sample, 10, '{}', false) > 0"),
	't|t|t|t|t|t',
	'calls written for any version of the sample work');

# ------------------------------------------------------------------------
# pg_upgrade, which starts both servers with their libraries.  A worker that
# started would make its table in a database that must be empty.
# ------------------------------------------------------------------------
my $new = PostgreSQL::Test::Cluster->new('new');
$new->init;
$new->append_conf('postgresql.conf', <<EOC);
shared_preload_libraries = 'worker_spi'
max_worker_processes = 32
worker_spi.naptime = 3600
EOC
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES ('delta', 1000)");
$node->stop;

# sockets need a short path, and pg_upgrade writes where it is started
my $home = Cwd::getcwd();
my $folder = File::Temp::tempdir(CLEANUP => 1);
chdir $folder or die "chdir: $!";
my $bindir = $node->config_data('--bindir');
my @upgrade = (
	'pg_upgrade',
	'-b', $bindir, '-B', $bindir,
	'-d', $node->data_dir, '-D', $new->data_dir,
	'-p', $node->port, '-P', $new->port,
	'-s', $folder);
command_ok([ @upgrade, '--check' ],
	'pg_upgrade finds nothing amiss with the library in both clusters');
command_ok(\@upgrade, 'and upgrades');
chdir $home or die "chdir: $!";

$new->start;
$new->poll_query_until('postgres',
	'SELECT folded_rows = 2 FROM worker_spi_workers WHERE index = 1')
  or die 'worker 1 did not fold';
pass('the new server\'s worker folds what the old one has left');
is($new->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|1155', 'and goes on from its total');
is($new->safe_psql('sample', 'TABLE schema4.counted'),
	'total|1037', 'other tables have been moved as well');
is($new->safe_psql('postgres', 'SELECT worker_spi_launch(5) > 0'),
	't', 'the functions work');
error_is($new, 'postgres', 'SELECT worker_spi_fold(5)', '22003', qr/./,
	'and what was stuck still is');

done_testing();
