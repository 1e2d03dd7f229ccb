# dev/new makes an extension that builds without a warning, is loaded beside
# worker_spi, does its job as the contract with worker.c asks for, and survives
# what worker_spi survives.  What doc/worker.md names in the source is there.
#
# Waits for: a worker's state, error, pid, next cycle or what it has left out in
# its view; a sleep that a trigger or psql has begun; the end of what
# worker_spi_fold() or its like in the new extension does.

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
command_fails([ 'dev/new', $_, $folder ], "so is $_, which a file has")
  foreach qw(worker_spi slot postgres);
ok(!-e $folder, 'and nothing is made');
my ($said, $err);
ok(IPC::Run::run([ 'dev/new', 'purge', $folder ], '>', \$said, '2>', \$err),
	'a new extension is made')
  or BAIL_OUT($err);
like(
	$said,
	qr/make install.*\n\tpurge\.total_workers = 0\n.*no worker by itself.*CREATE EXTENSION purge;.*job\.c/s,
	'and it is said what to do next');
command_fails([ 'dev/new', 'purge', $folder ],
	'a folder that is there is left alone');

my @files = sort map { s{.*/}{}r } glob "$folder/*";
is_deeply(
	\@files,
	[
		qw(LICENSE Makefile job.c purge--1.0.sql purge.c purge.control
		  purge.h slot.c worker.c)
	],
	'it has what a worker needs');

# Words that have nothing to do in it, as a part of others too.  A latch may be
# woken; a commit wakes nobody.
my $forbidden = qr/worker[-_ ]?spi|fold|delta|counted|total(?!_workers)|counters\s\*
	|wake_|_wake|_woken|\bwake\b(?!\s+those)|SlotHint|sooner|purge[_.]notify/ix;
my @leftovers;
my $lines = 0;
foreach my $file (grep { $_ ne 'LICENSE' } @files)
{
	foreach my $line (split /\n/, slurp_file("$folder/$file"))
	{
		$lines++;
		next if $line eq ' * Copyright (c) 2026, worker_spi contributors';
		push @leftovers, "$file: $line"
		  if $line =~ $forbidden || $line =~ /\bcommit wants\b/;
	}
}
is(join("\n", @leftovers), '', 'and no word about us or about counters');
cmp_ok($lines, '>', 2000, 'in all of its files');

# The functions that doc/worker.md names, each with its file.
my @missing;
my $named = 0;
my $doc = slurp_file('doc/worker.md');
while ($doc =~ /((?:`\w+\(\)`(?:, | and )?)+) in `([\w.\/]+)`/g)
{
	my ($functions, $file) = ($1, $2);
	foreach my $function ($functions =~ /(\w+)\(\)/g)
	{
		$named++;
		push @missing, "$function in $file"
		  unless slurp_file($file) =~ /^\Q$function\E\(/m;
	}
}
is(join("\n", @missing), '', 'doc/worker.md names functions where they are');
cmp_ok($named, '>', 50, 'many of them');

my $out;
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

# Its static worker has a database that is made further down.
my $node = new_node('new', <<EOC);
shared_preload_libraries = 'worker_spi, purge'
dynamic_library_path = '\$libdir:$folder'
restart_after_crash = on
autovacuum = off
purge.database = 'doomed'
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

# One column of purge's worker $index in database $db, or several.
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

# Make the list of policies of worker $index, as dev/new shows it.
sub make_policies
{
	my ($index, $db) = @_;
	$node->safe_psql($db // 'postgres', <<EOC);
SET client_min_messages = warning;
CREATE SCHEMA IF NOT EXISTS schema$index;
CREATE TABLE schema$index.policies (tab regclass PRIMARY KEY,
	age_column name NOT NULL, max_age interval NOT NULL,
	batch integer NOT NULL DEFAULT 1000);
EOC
	return;
}

# Make a table with a policy of worker $index, but without rows.
sub make_table
{
	my ($index, $table, $db) = @_;
	$node->safe_psql($db // 'postgres', <<EOC);
CREATE TABLE $table (what text, at timestamptz);
INSERT INTO schema$index.policies VALUES ('$table', 'at', '1 hour');
EOC
	return;
}

# Insert rows, 2500 of them past their age.
sub insert_rows
{
	my ($table, $db) = @_;
	$node->safe_psql($db // 'postgres', <<EOC);
TRUNCATE $table;
INSERT INTO $table
	SELECT 'old', now() - interval '1 hour 1 second' FROM generate_series(1, 2500);
INSERT INTO $table VALUES ('new', now()), ('always', NULL), ('last', 'infinity');
EOC
	return;
}

# What is left of them.
sub rows_left
{
	my ($table, $db) = @_;
	return $node->safe_psql($db // 'postgres',
		"SELECT string_agg(DISTINCT what, ' ' ORDER BY what) FROM $table");
}
my $all_old_gone = 'always last new';

# Worker 5 has all that is past its age in app.a deleted, when it is told to.
sub does_its_job
{
	my ($test) = @_;
	insert_rows('app.a');
	is(run_purge(5), 't', "$test, it runs");
	is(rows_left('app.a'), $all_old_gone, 'and does its job');
	return;
}

# How often purge has written this into the server's log.
sub logged
{
	my ($line) = @_;
	my $log = slurp_file($node->logfile);
	return scalar(() = $log =~ /LOG:  purge dynamic worker \d+ \Q$line\E/g);
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

# What dev/new has said to type.
my ($commands) = $said =~ /CREATE EXTENSION purge;\n(.*?)\n\n/s;
like($node->safe_psql('postgres', $commands),
	qr/\A\d+\nt\n(?:.*\n)*7\|dynamic\|postgres\|/, 'what dev/new shows, works');
is($node->safe_psql('postgres', 'SELECT purge_stop(7)'), 't', 'and is over');

# What a trigger sees while purge deletes; its second half is what the settings
# are to be.
$node->safe_psql('postgres', <<'EOC');
CREATE ROLE alice;
CREATE ROLE bob LOGIN;
CREATE SCHEMA app;
GRANT ALL ON SCHEMA app TO alice, bob;
CREATE TABLE app.seen (tab name, rows int, who name, xid text,
	settings text);
GRANT ALL ON app.seen TO PUBLIC;
CREATE FUNCTION app.see() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	n int := 1;
BEGIN
	IF tg_level OPERATOR(pg_catalog.=) 'STATEMENT' THEN
		n := (SELECT count(*) FROM gone);
	END IF;
	IF n OPERATOR(pg_catalog.=) 0 THEN
		RETURN NULL;
	END IF;
	INSERT INTO app.seen VALUES (tg_table_name, n, current_user,
		pg_catalog.pg_current_xact_id(),
		pg_catalog.concat_ws('|', pg_catalog.current_setting('search_path'),
			pg_catalog.current_setting('transaction_isolation'),
			pg_catalog.current_setting('synchronous_commit')));
	SET search_path = app;
	RETURN NULL;
END $$;
CREATE SCHEMA schema5;
EOC

error_is($node, 'postgres', 'SELECT purge_launch(5)', '42P01',
	qr/HINT:  CREATE TABLE schema5\.policies \(/,
	'without its list, a worker is not launched, and it is said how to make it');
is(purge_worker(5, 'count(*)'), '0', 'and nothing is left of it');

make_policies(5);
make_table(5, 'app.a');
insert_rows('app.a');
$node->safe_psql('postgres', <<EOC);
CREATE TRIGGER see AFTER DELETE ON app.a REFERENCING OLD TABLE AS gone
	EXECUTE FUNCTION app.see();
ALTER TABLE app.a OWNER TO alice;
ALTER DATABASE postgres SET default_transaction_isolation = 'serializable';
EOC
my $pid = $node->safe_psql('postgres', 'SELECT purge_launch(5)');
is( $node->safe_psql(
		'postgres',
		"SELECT backend_type, application_name, datname FROM pg_stat_activity
		 WHERE pid = $pid"),
	'purge dynamic|purge dynamic worker 5|postgres',
	'a worker has been launched');
is(run_purge(5), 't', 'it runs when it is told to');
is(rows_left('app.a'), $all_old_gone, 'and has deleted what was past its age');
is( purge_worker(
		5, 'kind, state, pid, deleted_rows, left_out, failed_count'),
	"dynamic|idle|$pid|2500|0|0",
	'the view says so');
is( $node->safe_psql(
		'postgres',
		'SELECT max(rows), sum(rows), count(DISTINCT xid) FROM app.seen'),
	'1000|2500|3',
	'it deletes in batches, each in a transaction of its own');
is( $node->safe_psql(
		'postgres', 'SELECT DISTINCT who, settings FROM app.seen'),
	'alice|pg_catalog, pg_temp|read committed|off',
	'as the owner of the table, with its own settings');
$node->safe_psql('postgres',
	'ALTER DATABASE postgres RESET default_transaction_isolation');

is($node->safe_psql('postgres', <<EOC), 't|t', 'a cycle that finds nothing');
SELECT pg_current_xact_id() AS before, purge_run(5) AS ran \\gset
SELECT :'ran', pg_current_xact_id()::text::bigint = :before + 1;
EOC

# ------------------------------------------------------------------------
# One that fails
# ------------------------------------------------------------------------

# In the order of the list it comes between two others.
make_table(5, 'app.b');
make_table(5, 'app.c');
$node->safe_psql('postgres', 'ALTER TABLE app.b RENAME at TO since');
insert_rows("app.$_") foreach qw(a b c);
error_is($node, 'postgres', 'SELECT purge_run(5)', '42703',
	qr/column "at" does not exist/, 'the error of a policy is passed on');
is(rows_left('app.a'), $all_old_gone, 'but what comes before it is done');
is(rows_left('app.c'), $all_old_gone, 'and what comes after it');
is( purge_worker(5, 'state, pid, left_out, failed_count, last_sqlstate'),
	"idle|$pid|1|0|42703",
	'no cycle has failed, and the view says what is left out');
insert_rows('app.c');
error_is($node, 'postgres', 'SELECT purge_run(5)', '42703',
	qr/column "at" does not exist/, 'who asks has it tried again at once');
is(rows_left('app.c'), $all_old_gone, 'with all else done');
is(logged('leaves out app.b: column "at" does not exist (SQLSTATE 42703)'),
	1, 'it is named in the log once');

# Nobody asks any more.
$node->safe_psql('postgres', 'ALTER TABLE app.b RENAME since TO at');
wait_for_purge(5, 'left_out = 0');
is(rows_left('app.b'), $all_old_gone, 'without the cause, it is done by itself');
is(logged('no longer leaves out app.b'), 1, 'and so says the log');
is(run_purge(5), 't', 'nothing is left to be passed on');

# What the policies name that is no ordinary table, or nothing.
$node->safe_psql('postgres', <<EOC);
CREATE VIEW app.view AS SELECT * FROM app.a;
CREATE TABLE app.parts (LIKE app.a) PARTITION BY LIST (what);
CREATE TABLE app.ruled (LIKE app.a);
CREATE RULE r AS ON DELETE TO app.ruled DO INSTEAD DELETE FROM app.a;
CREATE TABLE app.dropped (LIKE app.a);
CREATE TABLE app.ageless (LIKE app.a);
INSERT INTO schema5.policies SELECT c, 'at', '1 hour'
	FROM unnest('{app.view,app.parts,app.ruled,app.dropped,app.ageless}'::regclass[]) AS c;
UPDATE schema5.policies SET age_column = 'what' WHERE tab = 'app.ageless'::regclass;
EOC
my $dropped = $node->safe_psql('postgres', "SELECT 'app.dropped'::regclass::oid");
$node->safe_psql('postgres', 'DROP TABLE app.dropped');
insert_rows('app.c');
insert_rows('app.a');
error_is($node, 'postgres', 'SELECT purge_run(5)', '42809',
	qr/"view" is not an ordinary table/, 'of several errors the first is passed on');
is(purge_worker(5, 'left_out'), '5', 'all of these are left out');
foreach my $table (qw(view parts ruled))
{
	is( logged(
			qq(leaves out app.$table: "$table" is not an ordinary table without rules (SQLSTATE 42809))
		),
		1,
		"$table: what is no ordinary table");
}
is( logged(
		"leaves out $dropped: there is no table with OID $dropped (SQLSTATE 42P01)"
	),
	1,
	'a table that was dropped');
is( logged(
		'leaves out app.ageless: operator does not exist: text < timestamp with time zone (SQLSTATE 42883)'
	),
	1,
	'a column without an age');
is(rows_left('app.a') . rows_left('app.c'), $all_old_gone x 2, 'the others are done');

# A policy that was deleted is forgotten.
$node->safe_psql('postgres',
	"DELETE FROM schema5.policies WHERE tab NOT IN ('app.a'::regclass, 'app.b', 'app.c')");
is(run_purge(5), 't', 'what is no longer in the list is no longer left out');
is(purge_worker(5, 'left_out'), '0', 'and so says the view');

# An error that is the fault of no policy ends the cycle, the first time.  One that
# comes again at the same policy stops no other.  What is left out is back when a
# whole cycle has gone through it, not a batch.
$node->safe_psql('postgres', <<'EOC');
CREATE FUNCTION app.shut() RETURNS trigger LANGUAGE plpgsql AS
	$$ BEGIN RAISE SQLSTATE '53100' USING MESSAGE = 'full', DETAIL = 'the disk'; END $$;
CREATE TRIGGER shut AFTER DELETE ON app.b FOR EACH ROW
	WHEN (old.what = 'last') EXECUTE FUNCTION app.shut();
UPDATE schema5.policies SET batch = 100 WHERE tab = 'app.b'::regclass;
EOC
my $insert_last = <<'EOC';
BEGIN;
TRUNCATE app.b;
INSERT INTO app.b SELECT 'old', '-infinity' FROM generate_series(1, 250);
INSERT INTO app.b VALUES ('last', '-infinity');
COMMIT;
EOC
$node->safe_psql('postgres', $insert_last);
insert_rows('app.c');
my $failed = purge_worker(5, 'failed_count');
error_is($node, 'postgres', 'SELECT purge_run(5)', '53100', qr/full/,
	'what may be the fault of no policy');
is(purge_worker(5, "failed_count > $failed"), 't', 'ends the cycle');
error_is($node, 'postgres', 'SELECT purge_run(5)', '53100', qr/full/,
	'when it comes again at the same policy');
is(purge_worker(5, 'left_out'), '1', 'that one is left out');
is(rows_left('app.c'), $all_old_gone, 'and the next one done');
$node->safe_psql('postgres', $insert_last);
error_is($node, 'postgres', 'SELECT purge_run(5)', '53100', qr/full/,
	'a batch that goes through before the one that fails');
is(logged('leaves out app.b: full (SQLSTATE 53100)'), 1, 'is no news to the log');
like(slurp_file($node->logfile),
	qr/purge dynamic worker 5 leaves out app\.b: full.*\n.*DETAIL:  the disk/,
	'which has the details');
is(logged('no longer leaves out app.b'), 1, 'nor is the policy back');
$node->safe_psql('postgres', 'DROP TRIGGER shut ON app.b');
is(run_purge(5), 't', 'without the cause');
is(logged('no longer leaves out app.b'), 2, 'it is');
$node->safe_psql('postgres',
	"INSERT INTO schema5.policies VALUES ('app.ageless', 'what', '1 hour')");
error_is($node, 'postgres', 'SELECT purge_run(5)', '42883',
	qr/operator does not exist/, 'until it is in the list again');
is( logged(
		'leaves out app.ageless: operator does not exist: text < timestamp with time zone (SQLSTATE 42883)'
	),
	2,
	'and that is news to the log');
$node->safe_psql('postgres',
	"DELETE FROM schema5.policies WHERE tab = 'app.ageless'::regclass");
wait_for_purge(5, 'left_out = 0');

# ------------------------------------------------------------------------
# Other people
# ------------------------------------------------------------------------

# Bob has a list of his own, and wants Alice's rows deleted.
make_policies(6);
$node->safe_psql('postgres', <<EOC);
ALTER TABLE schema6.policies OWNER TO bob;
GRANT USAGE ON SCHEMA schema6 TO bob;
INSERT INTO schema6.policies VALUES ('app.a', 'at', '0');
SELECT purge_launch(6);
EOC
error_is($node, 'postgres', 'SELECT purge_run(6)', '42501',
	qr/owner of "postgres\.schema6\.policies" cannot act as the owner of "a"/,
	'a policy reaches no further than its owner');
$node->safe_psql('postgres', 'GRANT alice TO bob');
is(run_purge(6), 't', 'who may act as the owner of a table may have a policy for it');
is(rows_left('app.a'), 'always last', 'which is obeyed');
is($node->safe_psql('postgres', 'SELECT purge_stop(6)'), 't', 'it is stopped');
error_is($node, 'postgres',
	"SELECT purge_launch(5, 0, 'bob'::regrole)", '42710', qr/already runs/,
	'there is one worker of an index');
make_policies(8);
$node->safe_psql('postgres', 'GRANT USAGE ON SCHEMA schema8 TO bob');
error_is($node, 'postgres',
	"SELECT purge_launch(8, 0, 'bob'::regrole)", '42501',
	qr/worker cannot act as the owner of "policies"/,
	'a worker acts only as those that its role may act as');

# A deferred constraint trigger, and one that wants to be somebody else.
$node->safe_psql('postgres', <<'EOC');
CREATE CONSTRAINT TRIGGER later AFTER DELETE ON app.a
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION app.see();
DROP TRIGGER see ON app.a;
EOC
does_its_job('with a deferred trigger');
is( $node->safe_psql('postgres', 'SELECT DISTINCT who FROM app.seen'),
	'alice', 'which is fired as the owner');
$node->safe_psql('postgres', <<'EOC');
DROP TRIGGER later ON app.a;
CREATE FUNCTION app.rise() RETURNS trigger LANGUAGE plpgsql AS
	$$ BEGIN SET ROLE NONE; RETURN NULL; END $$;
CREATE TRIGGER rise AFTER DELETE ON app.a EXECUTE FUNCTION app.rise();
EOC
insert_rows('app.a');
error_is($node, 'postgres', 'SELECT purge_run(5)', '42501',
	qr/cannot set parameter "role" within security-restricted operation/,
	'code of a table cannot be anybody but its owner');
$node->safe_psql('postgres', 'DROP TRIGGER rise ON app.a');
wait_for_purge(5, 'left_out = 0');

# A row that somebody holds.
insert_rows('app.a');
my $holder = $node->background_psql('postgres');
$holder->query_safe(
	"BEGIN; SELECT FROM app.a WHERE what = 'old' LIMIT 1 FOR UPDATE");
is(run_purge(5), 't', 'nobody is waited for');
is($node->safe_psql('postgres', "SELECT count(*) FROM app.a WHERE what = 'old'"),
	'1', 'and what somebody holds stays');
$holder->query_safe('COMMIT');
$holder->quit;
is(run_purge(5), 't', 'for the next cycle');
is(rows_left('app.a'), $all_old_gone, 'which deletes it');

# A race that is lost some times, and one that is lost each time.
$node->safe_psql('postgres', <<'EOC');
CREATE SEQUENCE app.races;
GRANT ALL ON app.races TO PUBLIC;
CREATE FUNCTION app.race() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF pg_catalog.nextval('app.races') OPERATOR(pg_catalog.<=) tg_argv[0]::pg_catalog.int8 THEN
		RAISE SQLSTATE '40001';
	END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER race AFTER DELETE ON app.a EXECUTE FUNCTION app.race('3');
EOC
does_its_job('after a race that was lost three times');
is(logged('leaves out app.a: 40001'), 0, 'and nothing is left out');
$node->safe_psql('postgres', <<'EOC');
DROP TRIGGER race ON app.a;
CREATE TRIGGER race AFTER DELETE ON app.a EXECUTE FUNCTION app.race('1000000000');
ALTER SEQUENCE app.races RESTART;
EOC
insert_rows("app.$_") foreach qw(a c);
error_is($node, 'postgres', 'SELECT purge_run(5)', '40001', qr/40001/,
	'a race that is lost again and again does not go on for ever');
is(rows_left('app.c'), $all_old_gone, 'nor does it hold up the others');
$node->safe_psql('postgres', 'DROP TRIGGER race ON app.a');
wait_for_purge(5, 'left_out = 0');

# ------------------------------------------------------------------------
# Beside worker_spi
# ------------------------------------------------------------------------

wait_for_state($node, 1, 'idle');
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 7)");
folds($node, 1, 'worker_spi folds in the same server');
is(rows($node, 1), 'total|7', 'what there is to fold');
is($node->safe_psql('postgres', 'SELECT count(*) FROM worker_spi_workers'),
	'2', 'it shows its own workers');
is( $node->safe_psql(
		'postgres', 'SELECT index, kind FROM purge_workers ORDER BY index'),
	"1|static\n5|dynamic",
	'and so does the new one');

# ------------------------------------------------------------------------
# Surviving
# ------------------------------------------------------------------------

# An error in the list itself.
insert_rows('app.a');
$node->safe_psql('postgres',
	'ALTER TABLE schema5.policies RENAME tab TO what');
error_is($node, 'postgres', 'SELECT purge_run(5)', '42703',
	qr/column "tab" does not exist/, 'an error in the list is passed on');
wait_for_purge(5, "state = 'backoff'");
is(purge_worker(5, 'pid, failed_count > 0, last_sqlstate'),
	"$pid|t|42703", 'the cycle has failed, and the worker lives');
$node->safe_psql('postgres',
	'ALTER TABLE schema5.policies RENAME what TO tab');
does_its_job('without the cause');
$node->safe_psql('postgres', <<EOC);
ALTER TABLE schema5.policies RENAME TO list;
CREATE VIEW schema5.policies AS TABLE schema5.list;
EOC
error_is($node, 'postgres', 'SELECT purge_run(5)', '42809',
	qr/"policies" is not an ordinary table without rules/,
	'a list that is no ordinary table is refused');
$node->safe_psql('postgres', <<EOC);
DROP VIEW schema5.policies;
ALTER TABLE schema5.list RENAME TO policies;
EOC
does_its_job('with its list');

# A cancel, while its statement runs, which sleeps the first time.
$node->safe_psql('postgres', <<'EOC');
CREATE SEQUENCE app.tries;
GRANT ALL ON app.tries TO PUBLIC;
CREATE FUNCTION app.wait() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF pg_catalog.nextval('app.tries') OPERATOR(pg_catalog.=) 1 THEN
		PERFORM pg_catalog.pg_sleep(3600);
	END IF;
	RETURN old;
END $$;
CREATE TRIGGER wait BEFORE DELETE ON app.a
	FOR EACH ROW EXECUTE FUNCTION app.wait();
EOC

# Have the worker sleep in the middle of its job.
sub begin_to_sleep
{
	insert_rows('app.a');
	$node->safe_psql('postgres', 'ALTER SEQUENCE app.tries RESTART');
	$node->safe_psql('postgres', 'SELECT purge_run(5, 0, false)');
	$node->poll_query_until('postgres',
		"SELECT wait_event = 'PgSleep' FROM pg_stat_activity JOIN purge_workers USING (pid) WHERE index = 5"
	) or die 'the statement did not begin';
	return;
}

begin_to_sleep();
$node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)");
wait_for_purge(5, "last_sqlstate = '57014'");
is(purge_worker(5, 'left_out'), '0', 'a cancel is the fault of no policy');
does_its_job('after a cancel');
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

# A terminate, and a stop, in the middle of its job.
begin_to_sleep();
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
wait_for_purge(5, "pid <> $pid AND state = 'idle'");
does_its_job('after a terminate');
begin_to_sleep();
is($node->safe_psql('postgres', 'SELECT purge_stop(5)'), 't', 'it can be stopped');
is(purge_worker(5, 'count(*)'), '0', 'and nothing is left of it');
$node->safe_psql('postgres', 'SELECT purge_launch(5)');
does_its_job('launched again');

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
does_its_job('after that');
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 1)");
wait_for_state($node, 1, 'idle');
folds($node, 1, 'as does worker_spi');
is(rows($node, 1), 'total|8', 'what there is to fold');

# DROP DATABASE, which a static worker gives way to.  A reload has it look at once
# for a database that was missing.
foreach my $time ('first', 'second')
{
	$node->safe_psql('postgres', 'CREATE DATABASE doomed');
	$node->safe_psql('doomed', 'CREATE SCHEMA app');
	make_policies(1, 'doomed');
	make_table(1, 'app.a', 'doomed');
	$node->reload;
	wait_for_purge(1, "state = 'idle'", 'doomed');
	insert_rows('app.a', 'doomed');
	is( $node->safe_psql(
			'postgres',
			"SELECT purge_run(1, oid) FROM pg_database WHERE datname = 'doomed'"),
		't',
		"a static worker serves a database when it is there for the $time time");
	is(rows_left('app.a', 'doomed'), $all_old_gone, 'and does its job');
	$node->safe_psql('postgres', 'DROP DATABASE doomed');
	pass('it gives way to DROP DATABASE');
}

# No static workers at all.
$node->append_conf('postgresql.conf', "purge.total_workers = 0\n");
$node->restart;
is($node->safe_psql('postgres', 'SELECT count(*) FROM purge_workers'),
	'0', 'with total_workers = 0 the server starts no worker');
$node->safe_psql('postgres', 'SELECT purge_launch(5)');
does_its_job('launched by hand');

$node->stop;
done_testing();
