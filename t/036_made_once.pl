# Tables are made after a server start, a launch, or a reload that gives a worker
# another database, until a process has once found or made all three.  Whatever
# goes away after that is an error, until it is back: it is not made again by the
# process that is there, by the next one, after a crash, or in a database that was
# made anew.  So a renamed schema does not heal into an empty one.
#
# It waits for worker_spi_fold(), for states and pids in the view, and for the
# server's own lines in the log after a crash.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('made_once', <<'EOC');
worker_spi.total_workers = 2
worker_spi.database = 'app'
restart_after_crash = on
log_statement = none
EOC
my %offset;

# The tables of worker $index, as the catalog has them.
sub tables
{
	my ($index, $db) = @_;
	return $node->safe_psql($db // 'app',
		"SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE relnamespace = to_regnamespace('schema$index') AND relkind = 'r'"
	);
}

# The tables that worker $index has made since the last time that this was asked,
# as the log has them.
sub made
{
	my ($index) = @_;
	my $offset = $offset{$index} // 0;

	$offset{$index} = -s $node->logfile;
	return join ' ', map { /worker $index made table (\S+)/ ? $1 : () }
	  server_lines($node, $offset);
}

# Worker $index fails for want of a table, and has made none.
sub misses
{
	my ($index, $table, $test, $db) = @_;
	$db //= 'app';
	my $before = tables($index, $db);

	error_is(
		$node, 'postgres',
		"SELECT worker_spi_fold($index, oid) FROM pg_database WHERE datname = '$db'",
		'42P01',
		qr/table "$db\.schema$index\.$table" does not exist.*HINT:  To have it made, stop the worker and launch it again\./s,
		"$test: the error says what is missing, and how to have it made");
	is(tables($index, $db) . made($index), $before, "$test: nothing is made");
	return;
}

# Worker $index has made these tables, has said so, and folds.
sub makes
{
	my ($index, $tables, $test, $db) = @_;
	$db //= 'app';

	wait_for_state($node, $index, 'idle', $db);
	is(made($index), join(' ', map { "$db.schema$index.$_" } split(/ /, $tables)),
		"$test: the log says what was made");
	is(tables($index, $db), 'counted stuck total', "$test: all three are there");
	$node->safe_psql($db, "INSERT INTO schema$index.counted (value) VALUES (1)");
	folds($node, $index, "$test: the worker folds", $db);
	return;
}

sub stop
{
	my ($index, $db) = @_;
	$db //= 'app';
	return $node->safe_psql('postgres',
		"SELECT worker_spi_stop($index, oid) FROM pg_database WHERE datname = '$db'");
}

sub launch
{
	my ($index, $db) = @_;
	$db //= 'app';
	return $node->safe_psql('postgres',
		"SELECT worker_spi_launch($index, oid) FROM pg_database WHERE datname = '$db'");
}

# Have the server start another process for worker $index.
sub next_process
{
	my ($index, $state) = @_;
	my $pid = worker($node, $index, 'pid', 'app');

	$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
	$node->poll_query_until('postgres',
		"SELECT count(*) = 1 FROM worker_spi_workers WHERE index = $index AND datname = 'app' AND pid <> $pid AND state = '$state'"
	) or die "worker $index does not come back";
	return;
}

# ------------------------------------------------------------------------
# A database that comes later than the server
# ------------------------------------------------------------------------
$node->safe_psql('postgres', 'CREATE DATABASE app; CREATE DATABASE other; CREATE DATABASE doomed');
$node->reload;
makes($_, 'counted total stuck', "worker $_, started with the server") for (1 .. 2);
launch(3);
makes(3, 'counted total stuck', 'worker 3, launched');

# ------------------------------------------------------------------------
# What is made is ordinary: logged, heap, and no load on autovacuum
# ------------------------------------------------------------------------
is( $node->safe_psql(
		'app', <<'EOC'),
SELECT string_agg(concat_ws(' ', relname, relpersistence, amname, relreplident, nullif(reloptions::text, '')), ', ' ORDER BY relname)
FROM pg_class JOIN pg_am ON pg_am.oid = relam
WHERE relnamespace = 'schema1'::regnamespace AND relkind = 'r'
EOC
	'counted p heap f {autovacuum_vacuum_scale_factor=0,autovacuum_vacuum_threshold=10000,autovacuum_vacuum_cost_delay=0,autovacuum_analyze_threshold=2147483647}'
	  . ', stuck p heap f, total p heap d {fillfactor=50}',
	'the tables are logged, with a replica identity, and settings for what they are');

# ------------------------------------------------------------------------
# Each table, a rename of the schema, and a schema that is gone
# ------------------------------------------------------------------------
my %gone = (
	'counted dropped' =>
	  [ 'counted', 'DROP TABLE schema1.stuck, schema1.total, schema1.counted', undef ],
	'total dropped' => [
		'total', 'DROP TABLE schema1.total',
		'CREATE TABLE schema1.total (PRIMARY KEY (type)) INHERITS (schema1.counted)'
	],
	'stuck dropped' => [
		'stuck',
		'DROP TABLE schema1.stuck',
		'CREATE TABLE schema1.stuck (sqlstate text, reason text, since timestamptz) INHERITS (schema1.counted)'
	],
	'schema renamed' =>
	  [ 'counted', 'ALTER SCHEMA schema1 RENAME TO pages', 'ALTER SCHEMA pages RENAME TO schema1' ],
	'schema renamed, and an empty one made' => [
		'counted',
		'ALTER SCHEMA schema1 RENAME TO pages; CREATE SCHEMA schema1',
		'DROP SCHEMA schema1; ALTER SCHEMA pages RENAME TO schema1'
	],
	'schema dropped' => [ 'counted', 'DROP SCHEMA schema1 CASCADE', undef ]);
foreach my $case (sort keys %gone)
{
	my ($table, $break, $mend) = @{ $gone{$case} };

	$node->safe_psql('app', $break);
	misses(1, $table, $case);
	next_process(1, 'backoff');
	misses(1, $table, "$case, another process");
	if ($mend)
	{
		$node->safe_psql('app', $mend);
		wait_for_state($node, 1, 'idle', 'app');
		pass("$case: when it is back, the worker goes on by itself");
	}
	else
	{
		is(stop(1), 't', "$case: the worker is stopped");
		is(tables(1), '', "$case: that makes nothing");
		launch(1);
		makes(1, 'counted total stuck', "$case, stopped and launched");
		}
}

# A launch makes what is missing, and nothing else.
$node->safe_psql('app', 'DROP TABLE schema1.stuck');
misses(1, 'stuck', 'one of three');
stop(1);
launch(1);
makes(1, 'stuck', 'one of three, stopped and launched');

# ------------------------------------------------------------------------
# A crash
# ------------------------------------------------------------------------
$node->safe_psql('app', 'DROP TABLE schema1.stuck; DROP SCHEMA schema3 CASCADE');
my $victim = $node->background_psql('postgres');
crash($node, $victim->query_safe('SELECT pg_backend_pid()')) or die 'there was no crash';
eval { $victim->quit };
wait_for_state($node, $_, 'backoff', 'app') foreach (1, 3);
misses(1, 'stuck', 'a static worker after a crash');
misses(3, 'counted', 'a dynamic worker after a crash');
is(worker($node, 2, 'state', 'app'), 'idle', 'one that misses nothing goes on');
folds($node, 2, 'and folds', 'app');

# ------------------------------------------------------------------------
# A server start
# ------------------------------------------------------------------------
$node->restart;
makes(1, 'stuck', 'after a server start');
next_process(1, 'idle');
$node->safe_psql('app', 'DROP TABLE schema1.total');
misses(1, 'total', 'nothing is missing at first, another process');
is(stop(1), 't', 'the worker is stopped');

# While a worker is stopped, its tables are anybody's.
$node->safe_psql('app', 'DROP SCHEMA schema1 CASCADE');
launch(1);
makes(1, 'counted total stuck', 'all gone while it was stopped');

# ------------------------------------------------------------------------
# A process that could not make them all leaves that to the next.
# ------------------------------------------------------------------------
$node->stop;
$node->append_conf('postgresql.conf', 'worker_spi.total_workers = 4');
$node->start;
makes($_, 'counted total stuck', "worker $_, one of more than before") for (3 .. 4);
$node->safe_psql('app', 'DROP SCHEMA schema4 CASCADE; CREATE SCHEMA schema4; CREATE VIEW schema4.counted AS SELECT 1 AS value');
$node->restart;
wait_for_state($node, 4, 'backoff', 'app');
next_process(4, 'backoff');
$node->safe_psql('app', 'DROP VIEW schema4.counted');
makes(4, 'counted total stuck', 'a view was in the way');
$node->safe_psql('app', 'DROP TABLE schema4.stuck');
misses(4, 'stuck', 'once they were made');

# ------------------------------------------------------------------------
# A database that is made anew while the workers are away
# ------------------------------------------------------------------------
my $count = $node->safe_psql('app', 'TABLE schema1.counted');
$node->safe_psql('postgres', 'DROP DATABASE app');
$node->safe_psql('postgres', 'CREATE DATABASE app');
$node->reload;
wait_for_state($node, 1, 'backoff', 'app');
misses(1, 'counted', 'a database that was made anew');
is($node->safe_psql('app', "SELECT to_regnamespace('schema1') IS NULL"),
	't', 'not even the schema is made');
stop(1);
launch(1);
makes(1, 'counted total stuck', 'a database that was made anew, stopped and launched');

# ------------------------------------------------------------------------
# A reload that gives the workers another database
# ------------------------------------------------------------------------
$node->safe_psql('app', 'DROP TABLE schema1.stuck');
misses(1, 'stuck', 'before the reload');
$node->append_conf('postgresql.conf', "worker_spi.database = 'other'");
$node->reload;
makes($_, 'counted total stuck', "worker $_, another database", 'other') for (1 .. 4);
$node->safe_psql('other', 'DROP SCHEMA schema1 CASCADE');
misses(1, 'counted', 'another database, later', 'other');

# Back in the first one, it is again another.
$node->append_conf('postgresql.conf', "worker_spi.database = 'app'");
$node->reload;
makes(1, 'stuck', 'back in the first database');

ok( !$node->log_contains(qr/TRAP:|PANIC:/), 'no process has crashed by itself');
$node->stop;
done_testing();
