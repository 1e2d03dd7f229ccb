# dev/new makes an extension that builds without a warning, is loaded beside
# worker_spi, does its job, and survives what worker_spi survives.
#
# Waits for: a worker's state, error, pid or next cycle in its view; a sleep that
# a trigger or psql has begun; the end of what worker_spi_fold() or its like in
# the new extension does.

use strict;
use warnings FATAL => 'all';

use File::Copy qw(copy);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use t::WorkerSpi;

# Make and its options for us are not for the make below.
my $pg_config = $ENV{PG_CONFIG} // 'pg_config';
delete @ENV{qw(MAKEFLAGS MAKELEVEL MFLAGS MAKEOVERRIDES COPT)};

my $folder = PostgreSQL::Test::Utils::tempdir() . '/purge';

# ------------------------------------------------------------------------
# Making it
# ------------------------------------------------------------------------

command_fails([ 'dev/new', 'Purge!', $folder ],
	'a name that no extension can have is refused');
command_fails([ 'dev/new', 'worker_spi', $folder ], 'so is our own');
ok(!-e $folder, 'and nothing is made');
command_ok([ 'dev/new', 'purge', $folder ], 'a new extension is made');
command_fails([ 'dev/new', 'purge', $folder ],
	'a folder that is there is left alone');

my @files = sort map { s{.*/}{}r } glob "$folder/*";
is_deeply(
	\@files,
	[
		qw(LICENSE Makefile fold.c purge--1.0.sql purge.c purge.control
		  purge.h slot.c worker.c)
	],
	'it has what a worker needs');

my @leftovers;
foreach my $file (grep { $_ ne 'LICENSE' } @files)
{
	foreach my $line (split /\n/, slurp_file("$folder/$file"))
	{
		next if $line =~ /Copyright/;
		push @leftovers, "$file: $line"
		  if $line =~ /worker_spi/i
		  || $line =~ /WorkerSpi|\b(?:deltas?|counted|folds|folded|folding)\b/
		  || $line =~ /\b(?:log_folds|notify)\b/;
	}
}
is(join("\n", @leftovers), '', 'and no word about us or about counters');

my ($out, $err);
my $built = IPC::Run::run(
	[
		'make', '-s', '-C', $folder, "PG_CONFIG=$pg_config", 'with_llvm=no',
		'COPT=-Wall -Wextra -Werror -Wno-unused-parameter -Wno-sign-compare'
	],
	'<', \undef, '>', \$out, '2>', \$err);
ok($built, 'it builds without a warning') or BAIL_OUT($err);

# ------------------------------------------------------------------------
# Loading it
# ------------------------------------------------------------------------

my $node = new_node('new', <<EOC);
shared_preload_libraries = 'worker_spi, purge'
dynamic_library_path = '\$libdir:$folder'
restart_after_crash = on
autovacuum = off
purge.database = 'postgres, doomed'
purge.total_workers = 1
purge.naptime = 3600
purge.restart_interval = 1
EOC

# Run purge's cycle, and wait for it.
sub run_purge
{
	my ($index) = @_;
	return $node->safe_psql('postgres', "SELECT purge_run($index)");
}

# One column of purge's worker $index in database $db.
sub purge_worker
{
	my ($index, $column, $db) = @_;
	$db //= 'postgres';
	return $node->safe_psql('postgres',
		"SELECT $column FROM purge_workers WHERE index = $index AND datname = '$db'"
	);
}

# Wait until this is true of purge's worker $index.
sub wait_for_purge
{
	my ($index, $condition, $db) = @_;
	$db //= 'postgres';
	$node->poll_query_until('postgres',
		"SELECT $condition FROM purge_workers WHERE index = $index AND datname = '$db'"
	) or die "worker $index of purge in $db: never $condition";
	return;
}

# A table with rows past their date, and others.
sub make_rows
{
	my ($index, $db) = @_;
	$node->safe_psql($db // 'postgres', <<EOC);
SET client_min_messages = warning;
CREATE SCHEMA IF NOT EXISTS schema$index;
CREATE TABLE IF NOT EXISTS schema$index.expiring
	(what text, expires timestamptz);
INSERT INTO schema$index.expiring
	SELECT 'past', now() - interval '1 s' FROM generate_series(1, 2500);
INSERT INTO schema$index.expiring VALUES ('future', now() + interval '1 day'),
	('never', NULL), ('last', 'infinity');
EOC
	return;
}

# What is left of it.
sub rows_left
{
	my ($index, $db) = @_;
	return $node->safe_psql($db // 'postgres',
		"SELECT string_agg(DISTINCT what, ' ' ORDER BY what)
		 FROM schema$index.expiring");
}

# Before 18, an extension has to be where its server looks for it, and that may
# not be ours to write to.  Its script does the same.
if ($node->pg_version >= 18)
{
	my $share = PostgreSQL::Test::Utils::tempdir();
	mkdir "$share/extension" or die "$share/extension: $!";
	copy("$folder/$_", "$share/extension/$_") or die "$_: $!"
	  foreach 'purge.control', 'purge--1.0.sql';
	$node->append_conf('postgresql.conf',
		"extension_control_path = '\$system:$share'\n");
	$node->reload;
	$node->safe_psql('postgres', 'CREATE EXTENSION purge');
}
else
{
	my $script = slurp_file("$folder/purge--1.0.sql");
	$script =~ s/^\\echo.*$//m;
	$script =~ s/MODULE_PATHNAME/purge/g;
	$node->safe_psql('postgres', $script);
}

# ------------------------------------------------------------------------
# Doing its job
# ------------------------------------------------------------------------

$node->safe_psql('postgres', 'CREATE SCHEMA schema5');
error_is($node, 'postgres', 'SELECT purge_launch(5)', '42P01',
	qr/relation "schema5.expiring" does not exist/,
	'without its table, a worker is not launched');
is(purge_worker(5, 'count(*)'), '0', 'and nothing is left of it');

make_rows(5);
my $pid = $node->safe_psql('postgres', 'SELECT purge_launch(5)');
is( $node->safe_psql(
		'postgres',
		"SELECT backend_type, application_name, datname FROM pg_stat_activity
		 WHERE pid = $pid"),
	'purge dynamic|purge dynamic worker 5|postgres',
	'a worker has been launched');
is(run_purge(5), 't', 'it runs when it is told to');
is(rows_left(5), 'future last never', 'and has deleted what was past its date');
is(purge_worker(5, 'kind, state, pid, done_rows, failed_count'),
	"dynamic|idle|$pid|2500|0", 'the view says so');

wait_for_state($node, 1, 'idle');
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 7)");
fold($node, 1);
is(rows($node, 1), 'total|7', 'worker_spi folds in the same server');
is($node->safe_psql('postgres', 'SELECT count(*) FROM worker_spi_workers'),
	'2', 'and neither shows the workers of the other');

# ------------------------------------------------------------------------
# Surviving
# ------------------------------------------------------------------------

# An error in its SQL.
make_rows(5);
$node->safe_psql('postgres',
	'ALTER TABLE schema5.expiring RENAME expires TO until');
error_is($node, 'postgres', 'SELECT purge_run(5)', '42703',
	qr/column "expires" does not exist/, 'an error in its SQL is passed on');
wait_for_purge(5, "state = 'backoff'");
is(purge_worker(5, 'pid, failed_count > 0, last_sqlstate'),
	"$pid|t|42703", 'it backs off, and lives');
$node->safe_psql('postgres',
	'ALTER TABLE schema5.expiring RENAME until TO expires');
is(run_purge(5), 't', 'without the cause, it goes on');
is(rows_left(5), 'future last never', 'and does its job');

# A cancel, while its statement runs, which sleeps the first time.
$node->safe_psql('postgres', <<'EOC');
CREATE SEQUENCE schema5.tries;
CREATE FUNCTION schema5.wait() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF pg_catalog.nextval('schema5.tries') OPERATOR(pg_catalog.=) 1 THEN
		PERFORM pg_catalog.pg_sleep(3600);
	END IF;
	RETURN old;
END $$;
CREATE TRIGGER wait BEFORE DELETE ON schema5.expiring
	FOR EACH ROW EXECUTE FUNCTION schema5.wait();
EOC
make_rows(5);
$node->safe_psql('postgres', 'SELECT purge_run(5, 0, false)');
$node->poll_query_until('postgres',
	"SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = $pid")
  or die 'the statement did not begin';
$node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)");
wait_for_purge(5, "last_sqlstate = '57014'");
is(run_purge(5), 't', 'after a cancel it goes on');
is(rows_left(5), 'future last never', 'and does its job');
is(purge_worker(5, 'pid'), $pid, 'as the same process');

# A reload.
wait_for_purge(5, "state = 'idle'");
$node->append_conf('postgresql.conf', "purge.naptime = 60\n");
$node->reload;
wait_for_purge(5, "next_cycle_time < now() + interval '61 s'");
pass('it obeys a reload while it naps');
$node->append_conf('postgresql.conf', "purge.naptime = 3600\n");
$node->reload;
wait_for_purge(5, "next_cycle_time > now() + interval '61 s'");

# A terminate.
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
wait_for_purge(5, "pid <> $pid AND state = 'idle'");
make_rows(5);
is(run_purge(5), 't', 'after a terminate it is back');
is(rows_left(5), 'future last never', 'and does its job');

# A crash of another backend.
my $victim = start_psql($node, 'postgres', 'victim', 'SELECT pg_sleep(3600)');
$node->poll_query_until('postgres',
	"SELECT wait_event = 'PgSleep' FROM pg_stat_activity
	 WHERE application_name = 'victim'")
  or die 'the victim did not begin';
ok( crash(
		$node,
		$node->safe_psql('postgres',
			"SELECT pid FROM pg_stat_activity WHERE application_name = 'victim'"
		)),
	'another backend crashes');
finish_psql($victim);
wait_for_purge(5, "state = 'idle'");
make_rows(5);
is(run_purge(5), 't', 'it is back');
is(rows_left(5), 'future last never', 'and does its job');
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 1)");
wait_for_state($node, 1, 'idle');
fold($node, 1);
is(rows($node, 1), 'total|8', 'as do those of worker_spi');

# DROP DATABASE, which a static worker gives way to.
foreach my $time ('first', 'second')
{
	$node->safe_psql('postgres', 'CREATE DATABASE doomed');
	make_rows(1, 'doomed');
	wait_for_purge(1, "state = 'idle'", 'doomed');
	is( $node->safe_psql(
			'postgres',
			"SELECT purge_run(1, oid) FROM pg_database WHERE datname = 'doomed'"),
		't',
		"a static worker serves a database when it is there for the $time time");
	is(rows_left(1, 'doomed'), 'future last never', 'and does its job');
	$node->safe_psql('postgres', 'DROP DATABASE doomed');
	pass('it gives way to DROP DATABASE');
}

$node->stop;
done_testing();
