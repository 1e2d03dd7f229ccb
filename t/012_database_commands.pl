# Commands that need a database to themselves are not held up by workers that
# nap or fold in it; and dropping schemas or the extension under the workers
# ends in no deadlock and leaves them at work.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);
use t::WorkerSpi;

# What may take a second gets two here, since the machine may be busy; without
# a worker that steps aside, the server waits for five and gives up.
my $bound = 2;

my $node = new_node('commands', <<'EOC');
worker_spi.total_workers = 2
worker_spi.database = 'busy'
autovacuum = off
EOC

sub oid_of
{
	my ($db) = @_;
	return $node->safe_psql('postgres',
		"SELECT oid FROM pg_database WHERE datname = '$db'");
}

# $sql succeeds within the bound, plus what it takes without a worker.
sub is_quick
{
	my ($sql, $test, $extra) = @_;
	my $start = time();
	my ($ret, $out, $err) = $node->psql('postgres', $sql);
	my $took = time() - $start;

	ok($ret == 0 && $took < $bound + ($extra // 0), $test)
	  or diag("$took s, $err");
	return $took;
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
my $copying = time();
$node->safe_psql('postgres',
	'CREATE DATABASE busy; CREATE DATABASE other TEMPLATE busy');
$copying = time() - $copying;

my $tablespace = $node->basedir . '/tablespace';
mkdir $tablespace;
$node->safe_psql('postgres', "CREATE TABLESPACE elsewhere LOCATION '$tablespace'");

my @commands = (
	[
		'CREATE DATABASE ... TEMPLATE', 'CREATE DATABASE copy TEMPLATE busy',
		undef, $copying
	],
	[
		'SET TABLESPACE', 'ALTER DATABASE busy SET TABLESPACE elsewhere',
		undef, $copying
	],
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
	my ($name, $sql, $undo, $extra) = @$command;

	wait_for_workers('busy');
	my $dboid = oid_of('busy');
	$node->safe_psql('postgres',
		"SELECT worker_spi_launch(3, $dboid, interruptible => true)");
	is( $node->safe_psql(
			'postgres',
			"SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'worker_spi%' AND datname = 'busy'"
		),
		'3',
		"$name: three workers nap in the database");
	is_quick($sql, "$name: succeeds in short time", $extra);
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
	$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
	is( $node->safe_psql(
			'busy',
			"SELECT count(*) FROM schema1.counted WHERE type = 'delta'"),
		'0',
		"$name: and fold");
}

# One that is not interruptible stays: a user has asked for that.  The server
# gives up after five seconds; meanwhile the test goes on.
my $dboid = oid_of('copy');
$node->safe_psql('postgres', "SELECT worker_spi_launch(3, $dboid)");
my $drop = $node->background_psql('postgres', on_error_stop => 0);
$drop->query_until(qr/start/,
	"\\set VERBOSITY verbose\n\\echo start\nDROP DATABASE copy;\n\\echo end\n");

# ------------------------------------------------------------------------
# While a worker folds a million deltas.  A trigger that computes for a while
# makes each of its transactions slow, or it would be over too soon.
# ------------------------------------------------------------------------
$node->safe_psql('busy', <<'EOQ');
DROP TABLE schema1.counted;
CREATE TABLE schema1.counted (type text, value bigint);
INSERT INTO schema1.counted SELECT 'delta', 1 FROM generate_series(1, 1000000);
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM count(*) FROM generate_series(1, 2000000);
	RETURN NULL;
END
$$;
CREATE TRIGGER slow AFTER DELETE ON schema1.counted EXECUTE FUNCTION slow();
EOQ
my $before = worker($node, 1, 'folded_rows');
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1, wait => false)');
$node->poll_query_until('postgres',
	"SELECT folded_rows > $before FROM worker_spi_workers WHERE index = 1")
  or die 'worker 1 does not fold';

is_quick('DROP DATABASE other',
	'DROP DATABASE of another database does not wait for a fold');
is(worker($node, 1, 'state'), 'folding', 'which was still going on');

is_quick('ALTER DATABASE busy RENAME TO was_busy',
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
is_quick('DROP DATABASE busy',
	'DROP DATABASE of the database does not wait for a fold');
$node->safe_psql('postgres', 'CREATE DATABASE busy');
wait_for_workers('busy');

# A worker that waits for a lock lets other databases be dropped as well; its
# lock_timeout would end the wait, but no earlier than after two seconds.
$node->safe_psql('postgres', 'CREATE DATABASE other');
my $failed = worker($node, 1, 'failed_count');
my $locker = $node->background_psql('busy');
$locker->query_safe('BEGIN; LOCK TABLE schema1.counted');
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1, wait => false)');
my $waits =
  "SELECT count(*) = 1 FROM worker_spi_workers JOIN pg_locks USING (pid) WHERE index = 1 AND NOT granted";
$node->poll_query_until('postgres', $waits) or die 'worker 1 does not wait';
$node->safe_psql('postgres', 'DROP DATABASE other');
is($node->safe_psql('postgres', $waits) . worker($node, 1, 'failed_count'),
	"t$failed", 'DROP DATABASE of another database does not wait for a worker that waits');
$locker->query_safe('COMMIT');
$locker->quit;

$drop->query_until(qr/end/, '');
like($drop->{stderr}, qr/ERROR:  55006: .*being accessed by other users/,
	'DROP DATABASE fails on a dynamic worker that is not interruptible');
$drop->quit;
is($node->safe_psql('postgres', "SELECT worker_spi_stop(3, $dboid)"),
	't', 'which is still there');
is_quick('DROP DATABASE copy', 'the database can be dropped when it has been stopped');
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
