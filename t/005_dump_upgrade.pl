# Dump and restore, pg_upgrade, and the move from the sample's one-argument
# worker_spi_launch() and integer table.
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
	CREATE UNIQUE INDEX ON counted (page) NULLS NOT DISTINCT WHERE type = 'total';
INSERT INTO schema5.counted VALUES ('delta', 1, 'a'), ('delta', 2, NULL);
INSERT INTO schema1.counted SELECT 'delta', i FROM generate_series(1, 10) i;
SELECT worker_spi_launch(5), worker_spi_fold(5), worker_spi_fold(1);
CREATE TRIGGER wake AFTER INSERT ON schema5.counted
	FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();
EOQ
# a delta that is not folded when the dump is made
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 100)");

my $tables = <<EOQ;
SELECT 1 AS n, type, value, '' AS page FROM schema1.counted
UNION ALL SELECT 5, type, value, page FROM schema5.counted ORDER BY n, value;
SELECT n.nspname, c.reloptions, pg_get_indexdef(i.indexrelid)
FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
	JOIN pg_index i ON indrelid = c.oid
WHERE relname = 'counted' ORDER BY 1;
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
		"SELECT worker_spi_launch(n, $restored) > 0, worker_spi_fold(n, $restored)
		 FROM (VALUES (1), (5)) AS v (n)"),
	"t|t\nt|t",
	'workers adopt the restored tables');
is($node->safe_psql('restored', 'TABLE schema1.counted'),
	'total|155', 'and fold what was in the dump');
$node->safe_psql('restored',
	"INSERT INTO schema5.counted VALUES ('delta', 10, 'a'), ('delta', 10, NULL)");
$node->safe_psql('restored', "SELECT worker_spi_fold(5, $restored)");
is( $node->safe_psql(
		'restored', 'SELECT * FROM schema5.counted ORDER BY page'),
	"total|11|a\ntotal|12|",
	'into the totals that were in it');
is(total($node, 1), '155', 'the original is as it was');

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
  qr/"counted_type_idx" UNIQUE, btree \(type\) WHERE type = 'total'::text/,
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
		"SELECT pg_get_indexdef(indexrelid) FROM pg_index
		 WHERE indrelid = 'schema4.counted'::regclass"),
	"CREATE UNIQUE INDEX counted_unique_total ON schema4.counted USING btree (type) WHERE (type = 'total'::text)",
	'and its index');
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
is( $new->safe_psql('postgres',
		'SELECT worker_spi_launch(5) > 0, worker_spi_fold(5)'),
	't|t',
	'and the functions work');

done_testing();
