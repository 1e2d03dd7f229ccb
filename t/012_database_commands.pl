# Commands that need a database to themselves are not held up by workers that
# nap or fold in it, whichever way they fold; and dropping schemas or the
# extension under the workers ends in no deadlock, and does not end the workers.
# What is dropped they do not make again, but say that it is missing.
#
# It waits for states in the view and for the ends of the commands.  That these
# succeed is what is tested: where nobody steps aside, the server waits for five
# seconds, and then they fail.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('commands', <<'EOC');
worker_spi.total_workers = 2
worker_spi.database = 'busy'
autovacuum = off
EOC

# $sql succeeds.
sub succeeds
{
	my ($sql, $test) = @_;
	my ($ret, $out, $err) = $node->psql('postgres', $sql);

	is($ret, 0, $test) or diag($err);
	return;
}

# Wait until both static workers nap in a database, in this state.
sub wait_for_workers
{
	my ($db, $state) = @_;
	$state //= 'idle';
	$node->poll_query_until('postgres', <<EOQ)
SELECT count(*) = 2 AND bool_and(w.state = '$state' AND a.datname = '$db')
FROM worker_spi_workers AS w JOIN pg_stat_activity AS a USING (pid)
WHERE kind = 'static'
EOQ
	  or die "no static workers in $db that are $state";
	return;
}

# A database was made anew, and its static workers are back in it.  They make no
# tables there before they are launched again.
sub launch_again
{
	my ($db, $test) = @_;
	my $oid = database_oid($node, $db);

	wait_for_workers($db, 'backoff');
	is( $node->safe_psql(
			'postgres',
			"SELECT string_agg(index || ' ' || last_sqlstate || ' ' || last_error, ', ' ORDER BY index) FROM worker_spi_workers WHERE kind = 'static'"
		),
		join(', ', map { qq($_ 42P01 table "$db.schema$_.counted" does not exist) } 1, 2),
		"$test: workers of a database made anew say what is missing");
	is( $node->safe_psql(
			$db, "SELECT count(*) FROM pg_class WHERE relname = 'counted'"),
		'0',
		"$test: and do not make it");
	foreach my $index (1, 2)
	{
		is( $node->safe_psql(
				'postgres',
				"SELECT worker_spi_stop($index, $oid), worker_spi_launch($index, $oid) > 0"
			),
			't|t',
			"$test: worker $index makes it when it is launched again");
	}
	wait_for_workers($db);
	return;
}

# ------------------------------------------------------------------------
# While workers nap: two static ones and one that is interruptible
# ------------------------------------------------------------------------
$node->safe_psql('postgres', 'CREATE DATABASE busy; CREATE DATABASE other');

my $tablespace = $node->basedir . '/tablespace';
mkdir $tablespace;
$node->safe_psql('postgres', "CREATE TABLESPACE elsewhere LOCATION '$tablespace'");

my @commands = (
	[ 'CREATE DATABASE ... TEMPLATE', 'CREATE DATABASE copy TEMPLATE busy' ],
	[ 'SET TABLESPACE', 'ALTER DATABASE busy SET TABLESPACE elsewhere' ],
	[
		'RENAME',
		'ALTER DATABASE busy RENAME TO was_busy',
		'ALTER DATABASE was_busy RENAME TO busy'
	],
	[
		'DROP DATABASE',
		'DROP DATABASE busy',
		'CREATE DATABASE busy', 'anew'
	],
	[
		'DROP DATABASE ... FORCE',
		'DROP DATABASE busy WITH (FORCE)',
		'CREATE DATABASE busy', 'anew'
	]);

foreach my $command (@commands)
{
	my ($name, $sql, $undo, $anew) = @$command;

	wait_for_workers('busy');
	my $dboid = database_oid($node, 'busy');
	$node->safe_psql('postgres',
		"SELECT worker_spi_launch(3, $dboid, interruptible => true)");
	is( $node->safe_psql(
			'postgres',
			"SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'worker_spi%' AND datname = 'busy'"
		),
		'3',
		"$name: three workers nap in the database");
	succeeds($sql, "$name: succeeds");
	$node->safe_psql('postgres', $undo) if $undo;
	wait_for_workers('busy', $anew ? 'backoff' : 'idle');
	is( $node->safe_psql(
			'postgres',
			"SELECT string_agg(index || ' ' || kind, ', ' ORDER BY index) FROM worker_spi_workers"
		),
		'1 static, 2 static',
		"$name: static workers are back, the interruptible one is gone for good"
	);
	launch_again('busy', $name) if $anew;
	$node->safe_psql('busy', "INSERT INTO schema1.counted VALUES ('delta', 1)");
	folds($node, 1, "$name: and fold", 'busy');
	is(deltas($node, 1, 'busy'), '0', "$name: all that there is");
}

# One that is not interruptible stays: a user has asked for that.  The server
# gives up after five seconds; meanwhile the test goes on.
my $dboid = database_oid($node, 'copy');
$node->safe_psql('postgres', "SELECT worker_spi_launch(3, $dboid)");
my $drop = $node->background_psql('postgres', on_error_stop => 0);
$drop->query_until(qr/start/,
	"\\set VERBOSITY verbose\n\\echo start\nDROP DATABASE copy;\n\\echo end\n");

# ------------------------------------------------------------------------
# While a worker folds a backlog.  A trigger makes each of its transactions last
# for a second, whatever the machine, and few rows in a block make them many.
# ------------------------------------------------------------------------
new_table($node, 1, <<'EOQ', db => 'busy');
CREATE TABLE %t (type text, value bigint) WITH (fillfactor = 10);
INSERT INTO %t SELECT 'delta', 1 FROM generate_series(1, 200000);
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_sleep(1);
	RETURN NULL;
END
$$;
CREATE TRIGGER slow AFTER DELETE ON %t EXECUTE FUNCTION slow();
ALTER TABLE %t ENABLE ALWAYS TRIGGER slow
EOQ
my $before = worker($node, 1, 'folded_rows');
my $busy = database_oid($node, 'busy');
$node->safe_psql('postgres', "SELECT worker_spi_fold(1, $busy, wait => false)");
$node->poll_query_until('postgres',
	"SELECT folded_rows > $before FROM worker_spi_workers WHERE index = 1")
  or die 'worker 1 does not fold';

succeeds('DROP DATABASE other',
	'DROP DATABASE of another database does not wait for a fold');
is(worker($node, 1, 'state'), 'folding', 'which was still going on');

succeeds('ALTER DATABASE busy RENAME TO was_busy',
	'RENAME of the database does not wait for a fold');
is( $node->safe_psql(
		'was_busy', <<'EOQ'),
SELECT sum(value), (SELECT count(*) BETWEEN 1 AND 199999 FROM ONLY schema1.counted),
       (SELECT count(*) FROM schema1.total) FROM schema1.counted
EOQ
	'200000|t|1',
	'it came in the middle of the fold, and nothing is lost');
$node->safe_psql('postgres', 'ALTER DATABASE was_busy RENAME TO busy');

# The worker goes on with the rest.
wait_for_state($node, 1, 'folding');
succeeds('DROP DATABASE busy',
	'DROP DATABASE of the database does not wait for a fold');
$node->safe_psql('postgres', 'CREATE DATABASE busy');
launch_again('busy', 'after a fold');

# ------------------------------------------------------------------------
# While careful shares fail, one after the other: a constraint of the totals
# thinks about each key for a while, and refuses it.
# ------------------------------------------------------------------------
my $refuse_keys = <<'EOQ';
CREATE TABLE %t (page int NOT NULL, value bigint NOT NULL);
INSERT INTO %t SELECT n, 1 FROM generate_series(1, 200) AS n;
CREATE FUNCTION refuse() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_sleep(0.7);
	RAISE numeric_value_out_of_range;
END
$$
EOQ
foreach my $command (
	[ 'RENAME', 'ALTER DATABASE busy RENAME TO was_busy', 'was_busy' ],
	[ 'CREATE DATABASE ... TEMPLATE', 'CREATE DATABASE other TEMPLATE busy', 'other' ],
	[ 'SET TABLESPACE', 'ALTER DATABASE busy SET TABLESPACE elsewhere', 'busy' ],
	[ 'DROP DATABASE', 'DROP DATABASE busy' ])
{
	my ($name, $sql, $db) = @$command;

	$busy = database_oid($node, 'busy');
	$node->safe_psql('busy', 'DROP FUNCTION IF EXISTS refuse() CASCADE');
	new_table($node, 1, $refuse_keys,
		key => 'PRIMARY KEY (page)',
		total => 'ALTER TABLE %s.total ADD CONSTRAINT refused CHECK (refuse())',
		db => 'busy');
	$node->safe_psql('postgres',
		"SELECT worker_spi_fold(1, $busy, wait => false)");

	# It has seen a key fail, and is at the next.
	$node->poll_query_until('postgres',
		"SELECT count(*) = 1 FROM worker_spi_workers JOIN pg_stat_activity USING (pid) WHERE index = 1 AND wait_event = 'PgSleep' AND query LIKE '%ctid = ANY (\$5)%'"
	) or die 'worker 1 does not fold carefully';
	succeeds($sql, "$name does not wait for shares that fail");
	is($node->safe_psql($db, 'SELECT sum(value) FROM schema1.counted'),
		'200', "$name: and nothing is lost")
	  if $db;
	if ($name eq 'RENAME')
	{
		$node->safe_psql('postgres', 'ALTER DATABASE was_busy RENAME TO busy');
	}
	elsif ($name eq 'CREATE DATABASE ... TEMPLATE')
	{
		$node->safe_psql('postgres', 'DROP DATABASE other');
	}
	wait_for_state($node, 1, 'folding') if $db;
}
$node->safe_psql('postgres', 'CREATE DATABASE busy');
launch_again('busy', 'after careful shares');

# A worker that waits for a lock lets other databases be dropped as well.  The
# gate holds it without a timeout.
$node->safe_psql('postgres', 'CREATE DATABASE other');
my $failed = worker($node, 1, 'failed_count');
$busy = database_oid($node, 'busy');
folds($node, 1, undef, 'busy');
add_gate($node, 1, 42, 'busy');
my $locker = $node->background_psql('busy');
$locker->query_safe('INSERT INTO schema1.counted (value) VALUES (1)');
$locker->query_safe('SELECT pg_advisory_lock(42)');
$node->safe_psql('postgres', "SELECT worker_spi_fold(1, $busy, wait => false)");
my $waits =
  "SELECT count(*) = 1 FROM worker_spi_workers JOIN pg_locks USING (pid) WHERE index = 1 AND NOT granted";
$node->poll_query_until('postgres', $waits) or die 'worker 1 does not wait';
$node->safe_psql('postgres', 'DROP DATABASE other');

# Now and then it gives a share up, and begins anew.
$node->poll_query_until('postgres', $waits) or die 'worker 1 waits no more';
is(worker($node, 1, 'failed_count'), $failed,
	'DROP DATABASE of another database does not wait for a worker that waits');
$locker->query_safe('SELECT pg_advisory_unlock(42)');
$locker->quit;

$drop->query_until(qr/end/, '');
like($drop->{stderr}, qr/ERROR:  55006: .*being accessed by other users/,
	'DROP DATABASE fails on a dynamic worker that is not interruptible');
$drop->quit;
is($node->safe_psql('postgres', "SELECT worker_spi_stop(3, $dboid)"),
	't', 'which is still there');
succeeds('DROP DATABASE copy', 'the database can be dropped when it has been stopped');
$node->stop;

# ------------------------------------------------------------------------
# DROP SCHEMA a hundred times, while sessions insert and the worker folds
# without a pause
# ------------------------------------------------------------------------
$node = new_node('drop', <<'EOC');
worker_spi.total_workers = 1
worker_spi.log_folds = off
log_statement = none
EOC
wait_for_state($node, 1, 'idle');
$node->safe_psql('postgres', <<'EOQ');
CREATE TABLE done ();
CREATE PROCEDURE load() LANGUAGE plpgsql AS $$
BEGIN
	WHILE NOT EXISTS (SELECT FROM done) LOOP
		BEGIN
			INSERT INTO schema1.counted VALUES ('delta', 1);
		EXCEPTION WHEN undefined_table OR invalid_schema_name THEN
			NULL;
		END;
		COMMIT;
		PERFORM worker_spi_fold(1, wait => false);
	END LOOP;
END
$$;
EOQ
my $pid = worker($node, 1, 'pid');
my @load = map { $node->background_psql('postgres') } (1 .. 2);
$_->query_until(qr/start/, "\\echo start\nCALL load();\n\\echo finished\n") foreach (@load);

# Each time the worker has folded into the tables, and has then found that they
# are missing.  They are made again by hand.
$node->safe_psql('postgres', <<'EOQ');
DO $$
DECLARE
	failed bigint;
BEGIN
	FOR i IN 1 .. 100 LOOP
		LOOP
			EXIT WHEN EXISTS (SELECT FROM schema1.total);
			COMMIT;
		END LOOP;
		SELECT failed_count INTO failed FROM worker_spi_workers WHERE index = 1;
		DROP SCHEMA schema1 CASCADE;
		COMMIT;
		LOOP
			EXIT WHEN EXISTS (SELECT FROM worker_spi_workers
				WHERE index = 1 AND failed_count > failed AND last_sqlstate = '42P01');
			COMMIT;
		END LOOP;
		CREATE SCHEMA schema1;
		CREATE TABLE schema1.counted (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL);
		CREATE TABLE schema1.total (PRIMARY KEY (type)) INHERITS (schema1.counted);
		CREATE TABLE schema1.stuck (sqlstate text, reason text, since timestamptz)
			INHERITS (schema1.counted);
		COMMIT;
	END LOOP;
END
$$;
INSERT INTO done DEFAULT VALUES;
EOQ
$_->query_until(qr/finished/, '') foreach (@load);
$_->quit foreach (@load);

is( $node->safe_psql(
		'postgres', 'SELECT sum(deadlocks) FROM pg_stat_database'),
	'0',
	'a schema is dropped a hundred times under load without a deadlock');
ok(!$node->log_contains('deadlock detected'), 'the log has none either');
folds($node, 1, 'the worker folds into tables that are there again');
is(worker($node, 1, 'pid'), $pid, 'the worker is the same process as before');

$node->safe_psql('postgres', 'DROP SCHEMA schema1 CASCADE');
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P01',
	qr/table "postgres\.schema1\.counted" does not exist\n.*HINT:  .*stop .*launch /s,
	'after DROP SCHEMA the worker says what is missing, and how to have it made');
is( $node->safe_psql('postgres', "SELECT to_regnamespace('schema1') IS NULL"),
	't', 'and makes nothing');
is( $node->safe_psql(
		'postgres',
		'SELECT worker_spi_stop(1), worker_spi_launch(1) > 0, worker_spi_fold(1)'
	),
	't|t|t',
	'but when it is launched again');
is( $node->safe_psql('postgres', "SELECT to_regclass('schema1.counted')"),
	'schema1.counted', 'it does');
$pid = worker($node, 1, 'pid');

# ------------------------------------------------------------------------
# DROP EXTENSION: the workers need none of it
# ------------------------------------------------------------------------
$node->append_conf('postgresql.conf', 'worker_spi.naptime = 1');
$node->reload;
my $offset = -s $node->logfile;
$node->safe_psql('postgres', <<'EOQ');
TRUNCATE schema1.counted;
DROP EXTENSION worker_spi;
INSERT INTO schema1.counted VALUES ('delta', 5);
EOQ
$node->poll_query_until('postgres',
	"SELECT count(*) = 1 AND min(value) = 5 FROM schema1.total"
) or die 'worker 1 does not fold without the extension';
is( $node->safe_psql(
		'postgres',
		"SELECT pid FROM pg_stat_activity WHERE backend_type = 'worker_spi'"),
	$pid,
	'after DROP EXTENSION the same worker goes on');
$node->safe_psql('postgres', 'CREATE EXTENSION worker_spi');
is(worker($node, 1, 'pid'), $pid, 'after CREATE EXTENSION it is in the view again');
unlike(slurp_file($node->logfile, $offset),
	qr/ERROR/, 'neither is an error for anybody');
$node->stop;

done_testing();
