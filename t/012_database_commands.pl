# Commands that need a database to themselves are not held up by workers that
# nap or fold in it; and dropping schemas or the extension under the workers
# ends in no deadlock and leaves them at work.
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

# Wait until both static workers nap in a database.
sub wait_for_workers
{
	my ($db) = @_;
	$node->poll_query_until('postgres', <<EOQ)
SELECT count(*) = 2 AND bool_and(w.state = 'idle' AND a.datname = '$db')
FROM worker_spi_workers AS w JOIN pg_stat_activity AS a USING (pid)
WHERE kind = 'static'
EOQ
	  or die "no static workers in $db";
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
	[ 'DROP DATABASE', 'DROP DATABASE busy', 'CREATE DATABASE busy' ],
	[
		'DROP DATABASE ... FORCE',
		'DROP DATABASE busy WITH (FORCE)',
		'CREATE DATABASE busy'
	]);

foreach my $command (@commands)
{
	my ($name, $sql, $undo) = @$command;

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
	wait_for_workers('busy');
	is( $node->safe_psql(
			'postgres',
			"SELECT string_agg(index || ' ' || kind, ', ' ORDER BY index) FROM worker_spi_workers"
		),
		'1 static, 2 static',
		"$name: static workers are back, the interruptible one is gone for good"
	);
	$node->safe_psql('busy', "INSERT INTO schema1.counted VALUES ('delta', 1)");
	fold($node, 1, 'busy');
	is( $node->safe_psql(
			'busy',
			"SELECT count(*) FROM schema1.counted WHERE type = 'delta'"),
		'0',
		"$name: and fold");
}

# One that is not interruptible stays: a user has asked for that.  The server
# gives up after five seconds; meanwhile the test goes on.
my $dboid = database_oid($node, 'copy');
$node->safe_psql('postgres', "SELECT worker_spi_launch(3, $dboid)");
my $drop = $node->background_psql('postgres', on_error_stop => 0);
$drop->query_until(qr/start/,
	"\\set VERBOSITY verbose\n\\echo start\nDROP DATABASE copy;\n\\echo end\n");

# ------------------------------------------------------------------------
# While a worker folds a million deltas.  A trigger that computes for a while
# makes each of its transactions slow, or it would be over too soon.
# ------------------------------------------------------------------------
new_table($node, 1, <<'EOQ', 'busy');
CREATE TABLE %t (type text, value bigint);
INSERT INTO %t SELECT 'delta', 1 FROM generate_series(1, 1000000);
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM count(*) FROM generate_series(1, 2000000);
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
$node->safe_psql('postgres', 'ALTER DATABASE was_busy RENAME TO busy');
is( $node->safe_psql(
		'busy', <<'EOQ'),
SELECT sum(value), count(*) BETWEEN 2 AND 999999,
       count(*) FILTER (WHERE type = 'total') FROM schema1.counted
EOQ
	'1000000|t|1',
	'it came in the middle of the fold, and nothing is lost');

# The worker goes on with the rest.
wait_for_state($node, 1, 'folding');
succeeds('DROP DATABASE busy',
	'DROP DATABASE of the database does not wait for a fold');
$node->safe_psql('postgres', 'CREATE DATABASE busy');
wait_for_workers('busy');

# A worker that waits for a lock lets other databases be dropped as well.  The
# gate holds it without a timeout.
$node->safe_psql('postgres', 'CREATE DATABASE other');
my $failed = worker($node, 1, 'failed_count');
$busy = database_oid($node, 'busy');
fold($node, 1, 'busy');
add_gate($node, 1, 42, 'busy');
my $locker = $node->background_psql('busy');
$locker->query_safe('INSERT INTO schema1.counted (value) VALUES (1)');
$locker->query_safe('SELECT pg_advisory_lock(42)');
$node->safe_psql('postgres', "SELECT worker_spi_fold(1, $busy, wait => false)");
my $waits =
  "SELECT count(*) = 1 FROM worker_spi_workers JOIN pg_locks USING (pid) WHERE index = 1 AND NOT granted";
$node->poll_query_until('postgres', $waits) or die 'worker 1 does not wait';
$node->safe_psql('postgres', 'DROP DATABASE other');
is($node->safe_psql('postgres', $waits) . worker($node, 1, 'failed_count'),
	"t$failed", 'DROP DATABASE of another database does not wait for a worker that waits');
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

# The table must be there again, with deltas that were folded, each time.
$node->safe_psql('postgres', <<'EOQ');
DO $$
BEGIN
	FOR i IN 1 .. 100 LOOP
		LOOP
			BEGIN
				EXIT WHEN EXISTS (SELECT FROM schema1.counted WHERE type = 'total');
			EXCEPTION WHEN undefined_table OR invalid_schema_name THEN
				NULL;
			END;
			COMMIT;
		END LOOP;
		DROP SCHEMA schema1 CASCADE;
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
is($node->safe_psql('postgres', 'SELECT worker_spi_fold(1)'),
	't', 'the worker makes the table again');
is(worker($node, 1, 'pid'), $pid, 'the worker is the same process as before');

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
	"SELECT count(*) = 1 AND min(type) = 'total' AND min(value) = 5 FROM schema1.counted"
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
