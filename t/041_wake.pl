# worker_spi_wake(): an AFTER INSERT trigger on schemaN.counted has worker N
# fold soon after the commit.  Naptime is an hour here, so whatever is folded
# was folded because of a wake.  That a worker was not woken shows in its
# next_fold_time, which stays the same only if it has neither folded nor is
# about to; it is looked at after another worker, woken later, has folded.
# That the insert took place at all is told by a second trigger, at DEBUG1.
# It is a hint, and never fails a writer, wherever and however it is called.  A
# worker that nobody wakes hardly ever does so by itself.
#
# It waits for counters and states in the view, and, to see an idle worker sleep,
# for the clock.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('wake', <<EOC);
worker_spi.total_workers = 4
max_prepared_transactions = 5
track_commit_timestamp = on
autovacuum = off
EOC

my $trigger =
  'AFTER INSERT ON schema%d.counted FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();';
foreach my $index (1 .. 3)
{
	folds($node, $index);
	$node->safe_psql('postgres', 'CREATE TRIGGER wake ' . sprintf($trigger, $index));
}

# Worker 4 has nothing to do: how often has its process gone to sleep by now?
# Each time that it wakes it does so once.
my $idle_since = $node->safe_psql('postgres', 'SELECT clock_timestamp()');
my $idle_status = "/proc/" . worker($node, 4, 'pid') . "/status";

sub sleeps
{
	slurp_file($idle_status) =~ /^voluntary_ctxt_switches:\s*(\d+)/m or die;
	return $1;
}
my $sleeps_before = -r $idle_status ? sleeps() : undef;

$node->safe_psql('postgres', <<'EOC');
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS
	$$ BEGIN RAISE DEBUG 'inserted into %', TG_RELID::regclass; RETURN NULL; END $$;
CREATE TRIGGER tell AFTER INSERT ON schema1.counted
	FOR EACH STATEMENT EXECUTE FUNCTION tell();
EOC

# Wait until a worker has folded $folds times, naps, and is not to fold again
# for almost an hour.  The time of its next fold must be that of this nap, not of
# the one before: it is an hour after a moment that the last cycle had behind it.
sub wait_for_folds
{
	my ($index, $folds) = @_;
	$node->poll_query_until('postgres', <<EOC)
SELECT fold_count >= $folds AND state = 'idle'
	AND next_fold_time > clock_timestamp() + interval '50 minutes'
	AND next_fold_time >= folded_until + interval '1 hour'
FROM worker_spi_workers WHERE index = $index
EOC
	  or die "worker $index has not folded, or does not nap";
	return;
}

# When a worker has done what it had to, how often it has folded and when it
# will again.
sub settled
{
	my ($index) = @_;
	wait_for_folds($index, 0);
	return split / /, worker($node, $index, "fold_count || ' ' || next_fold_time"), 2;
}

# $sql, run in one session, wakes each of the workers once.
sub wakes
{
	my ($sql, $test, $indexes, %params) = @_;
	$indexes //= [1];
	my %folds;

	foreach my $index (@$indexes)
	{
		my ($folds) = settled($index);
		$folds{$index} = $folds + 1;
	}
	$node->safe_psql('postgres', $sql, %params);
	foreach my $index (@$indexes)
	{
		wait_for_folds($index, $folds{$index});
		is( worker(
				$node,
				$index,
				"fold_count, (SELECT count(*) FROM ONLY schema$index.counted)"
			),
			"$folds{$index}|0",
			"$test: worker $index folds all, once");
	}
	return;
}

# $sql does not wake worker 1, although it inserts into its table.  It may fail.
# If only a part of it is rolled back, the worker may be woken in vain.
sub does_not_wake
{
	my ($sql, $test, $db, $in_vain) = @_;
	my @before = settled(1);
	my ($ret, $out, $err) = do
	{
		local $ENV{PGOPTIONS} = '-c client_min_messages=debug1';
		$node->psql($db // 'postgres', $sql, on_error_stop => 0);
	};
	die "nothing was inserted: $err"
	  if !$db
	  && $sql =~ /INTO schema1\.counted\b/
	  && $err !~ /DEBUG:  inserted into schema1\.counted/;

	# Worker 2 is woken later than worker 1 would have been.
	my $folds = $node->safe_psql('postgres', <<'EOC');
SELECT fold_count + 1 FROM worker_spi_workers WHERE index = 2;
INSERT INTO schema2.counted VALUES ('delta', 1);
EOC
	wait_for_folds(2, $folds);
	if ($in_vain)
	{
		is(worker($node, 1, 'fold_count'),
			(split / /, $before[0])[0], "$test: worker 1 folds nothing");
		return;
	}
	is(worker($node, 1, "fold_count || ' ' || next_fold_time"),
		"@before", "$test: worker 1 is not woken");
	return;
}

# ------------------------------------------------------------------------
# Not before wake_delay
# ------------------------------------------------------------------------
my @delays;
foreach my $n (1 .. 5)
{
	my ($folds) = settled(1);
	my $xid = $node->safe_psql('postgres', <<'EOC');
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 1);
SELECT pg_current_xact_id();
COMMIT;
EOC
	wait_for_folds(1, $folds + 1);

	# Both times are the server's.
	push @delays, $node->safe_psql('postgres', <<EOC);
SELECT 1000 * extract(epoch FROM last_fold_time - pg_xact_commit_timestamp('$xid'::xid))
FROM worker_spi_workers WHERE index = 1;
EOC
}
@delays = sort { $a <=> $b } @delays;
note("from commit to fold: @delays ms");

cmp_ok($delays[0], '>=', 50, 'each commit is folded after wake_delay');
is(total($node, 1), 5, 'the count is right');

# ------------------------------------------------------------------------
# Ways to insert
# ------------------------------------------------------------------------
wakes(
	"INSERT INTO schema1.counted SELECT 'delta', n FROM generate_series(1, 1000) AS n",
	'INSERT ... SELECT');
wakes("COPY schema1.counted FROM STDIN;\ndelta\t1\ndelta\t2\n\\.\n", 'COPY');
wakes(
	"INSERT INTO schema1.counted VALUES ('delta', 1) ON CONFLICT DO NOTHING",
	'INSERT ... ON CONFLICT DO NOTHING');
wakes(
	"WITH i AS (INSERT INTO schema1.counted VALUES ('delta', 1)) SELECT 1",
	'INSERT in a CTE');
wakes(<<'EOC', 'MERGE');
MERGE INTO schema1.counted USING (VALUES (5)) AS v (n) ON false
WHEN NOT MATCHED THEN INSERT VALUES ('delta', n);
EOC
wakes(<<'EOC', 'INSERT in a plpgsql function');
CREATE FUNCTION hit(n int) RETURNS void LANGUAGE plpgsql AS
	$$ BEGIN INSERT INTO schema1.counted VALUES ('delta', n); END $$;
SELECT hit(n) FROM generate_series(1, 10) AS n;
EOC
wakes(<<'EOC', 'INSERT through a view');
CREATE VIEW hits AS SELECT type, value FROM schema1.counted;
INSERT INTO hits VALUES ('delta', 1);
EOC
wakes(<<'EOC', 'a prepared statement');
PREPARE hit AS INSERT INTO schema1.counted VALUES ('delta', $1);
EXECUTE hit(1);
EOC

# A parallel worker that ends neither wakes nor forgets.
my $parallel =
  $node->pg_version >= 16 ? 'debug_parallel_query' : 'force_parallel_mode';
wakes(
	"SET $parallel = on; BEGIN; INSERT INTO schema1.counted VALUES ('delta', 1); SELECT count(*) FROM pg_class; COMMIT;",
	'INSERT in the leader of a parallel query');
does_not_wake(
	"SET $parallel = on; BEGIN; INSERT INTO schema1.counted VALUES ('delta', 1); SELECT count(*) FROM pg_class; ROLLBACK;",
	'INSERT in the leader of a parallel query, rolled back');

# Who may insert may wake, and needs no right on the function.
$node->safe_psql('postgres', <<'EOC');
CREATE ROLE regress_writer LOGIN;
GRANT USAGE ON SCHEMA schema1 TO regress_writer;
GRANT INSERT ON schema1.counted TO regress_writer;
EOC
wakes(
	"INSERT INTO schema1.counted VALUES ('delta', 1)",
	'INSERT by a role that may do nothing else',
	[1],
	extra_params => [ '-U', 'regress_writer' ]);
error_is(
	$node, 'postgres',
	'SET ROLE regress_writer; SELECT worker_spi_wake();',
	'42501',
	qr/permission denied for function worker_spi_wake/,
	'the function itself is not for everybody');
$node->safe_psql('postgres', <<'EOC');
CREATE ROLE regress_owner;
CREATE SCHEMA schema5;
CREATE TABLE schema5.counted (type text, value bigint);
ALTER TABLE schema5.counted OWNER TO regress_owner;
GRANT USAGE ON SCHEMA schema5 TO regress_owner;
EOC
my $create =
  'SET ROLE regress_owner; CREATE TRIGGER wake ' . sprintf($trigger, 5);
error_is(
	$node, 'postgres', $create, '42501',
	qr/permission denied for function worker_spi_wake/,
	'an owner may not make the trigger without EXECUTE on the function');
is( $node->safe_psql(
		'postgres',
		"GRANT EXECUTE ON FUNCTION worker_spi_wake() TO regress_owner; $create; SELECT 1"
	),
	1,
	'and may with it');

# ------------------------------------------------------------------------
# Transactions
# ------------------------------------------------------------------------
wakes(<<'EOC', 'several statements and tables', [ 1, 2, 3 ]);
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 1);
INSERT INTO schema2.counted VALUES ('delta', 1), ('delta', 2);
INSERT INTO schema1.counted VALUES ('delta', 2);
INSERT INTO schema3.counted VALUES ('delta', 1);
INSERT INTO schema2.counted VALUES ('delta', 3);
COMMIT;
EOC
does_not_wake(<<'EOC', 'ROLLBACK');
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 1);
ROLLBACK;
SELECT 1;
EOC
does_not_wake(<<'EOC', 'a statement that fails after the insert');
DO $$
BEGIN
	INSERT INTO schema1.counted VALUES ('delta', 1);
	RAISE division_by_zero;
END $$;
SELECT 1;
EOC
$node->safe_psql('postgres',
	'CREATE TABLE deferred (a int UNIQUE DEFERRABLE INITIALLY DEFERRED)');
does_not_wake(<<'EOC', 'a transaction that fails at COMMIT');
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 1);
INSERT INTO deferred VALUES (1), (1);
COMMIT;
SELECT 1;
EOC
does_not_wake(
	<<'EOC', 'a transaction whose backend is terminated');
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 1);
SELECT pg_terminate_backend(pg_backend_pid());
EOC
does_not_wake(<<'EOC', 'a savepoint rolled back', undef, 1);
BEGIN;
SAVEPOINT a;
INSERT INTO schema1.counted VALUES ('delta', 1);
ROLLBACK TO a;
COMMIT;
EOC
does_not_wake(<<'EOC', 'a savepoint released in one rolled back', undef, 1);
BEGIN;
SAVEPOINT a;
SAVEPOINT b;
SAVEPOINT c;
INSERT INTO schema1.counted VALUES ('delta', 1);
RELEASE c;
RELEASE b;
ROLLBACK TO a;
SAVEPOINT d;
RELEASE d;
COMMIT;
EOC
does_not_wake(<<'EOC', 'an exception block that fails', undef, 1);
DO $$
BEGIN
	BEGIN
		INSERT INTO schema1.counted VALUES ('delta', 1);
		RAISE division_by_zero;
	EXCEPTION WHEN division_by_zero THEN
		NULL;
	END;
END $$;
EOC
does_not_wake(<<'EOC', 'an insert of another transaction of the session');
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 1);
ROLLBACK;
INSERT INTO schema2.counted VALUES ('delta', 1);
EOC
wakes(<<'EOC', 'a savepoint released');
BEGIN;
SAVEPOINT a;
SAVEPOINT b;
INSERT INTO schema1.counted VALUES ('delta', 1);
RELEASE b;
RELEASE a;
COMMIT;
EOC
wakes(<<'EOC', 'a savepoint open at COMMIT');
BEGIN;
SAVEPOINT a;
INSERT INTO schema1.counted VALUES ('delta', 1);
SAVEPOINT b;
COMMIT;
EOC
wakes(<<'EOC', 'an insert before a savepoint rolled back', [ 1, 3 ]);
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 1);
SAVEPOINT a;
INSERT INTO schema1.counted VALUES ('delta', 10);
INSERT INTO schema2.counted VALUES ('delta', 10);
ROLLBACK TO a;
INSERT INTO schema3.counted VALUES ('delta', 1);
COMMIT;
EOC
wakes(<<'EOC', 'an insert after a savepoint rolled back');
BEGIN;
SAVEPOINT a;
INSERT INTO schema1.counted VALUES ('delta', 10);
ROLLBACK TO a;
INSERT INTO schema1.counted VALUES ('delta', 1);
COMMIT;
EOC
wakes(<<'EOC', 'a released savepoint between two rolled back');
BEGIN;
SAVEPOINT a;
INSERT INTO schema1.counted VALUES ('delta', 10);
ROLLBACK TO a;
SAVEPOINT b;
INSERT INTO schema1.counted VALUES ('delta', 1);
RELEASE b;
SAVEPOINT c;
INSERT INTO schema1.counted VALUES ('delta', 10);
ROLLBACK TO c;
COMMIT;
EOC
wakes(<<'EOC', 'exception blocks, one of which fails');
DO $$
BEGIN
	FOR i IN 1..3 LOOP
		BEGIN
			INSERT INTO schema1.counted VALUES ('delta', 1);
			IF i <> 2 THEN
				RAISE division_by_zero;
			END IF;
		EXCEPTION WHEN division_by_zero THEN
			NULL;
		END;
	END LOOP;
END $$;
EOC
wakes(<<'EOC', 'COMMIT in a DO block, then ROLLBACK');
DO $$
BEGIN
	INSERT INTO schema1.counted VALUES ('delta', 1);
	COMMIT;
	INSERT INTO schema1.counted VALUES ('delta', 10);
	ROLLBACK;
END $$;
EOC
wakes(<<'EOC', 'COMMIT AND CHAIN');
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 1);
COMMIT AND CHAIN;
INSERT INTO schema1.counted VALUES ('delta', 10);
ROLLBACK;
EOC

# Two-phase commit: the naptime is what is left.
does_not_wake(<<'EOC', 'PREPARE TRANSACTION');
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 1000000);
PREPARE TRANSACTION 'p1';
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 2000000);
PREPARE TRANSACTION 'p2';
SELECT 1;
EOC
my $sum = total($node, 1);
is( $node->safe_psql('postgres', <<'EOC'),
COMMIT PREPARED 'p1';
ROLLBACK PREPARED 'p2';
SELECT worker_spi_fold(1);
SELECT type, value FROM schema1.counted;
EOC
	"t\ntotal|" . ($sum + 1000000),
	'of prepared transactions, what was committed is folded and nothing else'
);

# ------------------------------------------------------------------------
# The worker itself
# ------------------------------------------------------------------------
settled(1);
$node->safe_psql('postgres', "DELETE FROM schema1.counted");
wakes("INSERT INTO schema1.counted VALUES ('delta', 1)",
	'an insert where the total is missing');
does_not_wake('SELECT 1', 'the insert of a total, by the worker');

# The other table's worker is woken by what the first one inserts into it.
$node->safe_psql('postgres', <<'EOC');
CREATE FUNCTION roll_up() RETURNS trigger LANGUAGE plpgsql AS
	$$ BEGIN INSERT INTO schema3.counted VALUES ('delta', 1); RETURN NULL; END $$;
CREATE TRIGGER roll_up AFTER UPDATE ON schema1.total
	FOR EACH STATEMENT EXECUTE FUNCTION roll_up();
ALTER TABLE schema1.total ENABLE ALWAYS TRIGGER roll_up;
EOC
wakes("INSERT INTO schema1.counted VALUES ('delta', 1)",
	'a worker that inserts into the table of another', [ 1, 3 ]);
$node->safe_psql('postgres', 'DROP TRIGGER roll_up ON schema1.total');

# A wake is not a reason to try again what has just failed.
$node->safe_psql('postgres', 'ALTER TABLE schema1.counted ADD page text');
foreach my $n (1 .. 7)
{
	$node->psql('postgres', 'SELECT worker_spi_fold(1)');
}
wait_for_state($node, 1, 'backoff');
my $backoff = worker($node, 1, "failed_count || ' ' || next_fold_time");
my $folds = worker($node, 2, 'fold_count') + 1;
$node->safe_psql('postgres', <<'EOC');
INSERT INTO schema1.counted VALUES ('delta', 1);
INSERT INTO schema2.counted VALUES ('delta', 1);
EOC
wait_for_folds(2, $folds);
is(worker($node, 1, "failed_count || ' ' || next_fold_time"),
	$backoff, 'a wake during backoff does not shorten it');
is( $node->safe_psql('postgres', <<'EOC'),
ALTER TABLE schema1.counted DROP COLUMN page;
SELECT worker_spi_fold(1);
SELECT type, value FROM schema1.counted;
EOC
	"t\ntotal|3",
	'after that, nothing is lost');
wakes("INSERT INTO schema1.counted VALUES ('delta', 1)",
	'a worker that has recovered');

# A lock that was in the way may be gone, so there it is: a wake does not wait for
# the time that the view shows, which is far away after some failures.
my $holder = $node->background_psql('postgres');
$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema1.counted DISABLE TRIGGER wake;
INSERT INTO schema1.counted VALUES ('delta', 100);
ALTER TABLE schema1.counted ENABLE TRIGGER wake;
EOC
$holder->query_safe('BEGIN; SELECT FROM ONLY schema1.counted FOR UPDATE');

sub wake_ends_backoff
{
	my ($test) = @_;
	my ($next, $failed, $rows) = split /\|/,
	  worker($node, 1, 'next_fold_time, failed_count, folded_rows');

	is($node->safe_psql('postgres', "SELECT '$next' > clock_timestamp() + interval '10 s'"),
		't', "$test: the next cycle is far away");
	$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 1)");
	$node->poll_query_until('postgres',
		"SELECT folded_rows > $rows AND failed_count > $failed AND state = 'backoff' FROM worker_spi_workers WHERE index = 1"
	) or die 'worker 1 was not woken';
	is(worker($node, 1, "last_failed_time < '$next', last_sqlstate"),
		't|55P03', "$test: a wake starts it at once");
	is(deltas($node, 1), '1', "$test: and all is folded but what is locked");
	return;
}

foreach my $n (1 .. 6)
{
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '55P03', qr/./,
		"a delta is locked: failure $n");
}
my $pid = worker($node, 1, 'pid');
wake_ends_backoff('after six failures');

# That was the seventh, after which another process goes on.
$node->poll_query_until('postgres',
	"SELECT pid <> $pid AND state = 'backoff' FROM worker_spi_workers WHERE index = 1")
  or die 'worker 1 does not start afresh';
wake_ends_backoff('in a process that has started afresh');
$holder->query_safe('COMMIT');
$holder->quit;
my $next = worker($node, 1, 'next_fold_time');
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 1)");
wait_for_fold($node, 1);
settled(1);
is( worker($node, 1, "last_fold_time < '$next'") . ' ' . rows($node, 1),
	't total|107', 'when the lock is gone, a wake has all folded');

# ------------------------------------------------------------------------
# No worker
# ------------------------------------------------------------------------
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(3)'),
	't', 'worker 3 is stopped');
is( $node->safe_psql('postgres', <<'EOC'),
INSERT INTO schema3.counted VALUES ('delta', 100);
SELECT count(*) FROM schema3.counted WHERE type = 'delta';
EOC
	1,
	'without a worker an insert does nothing more');
$node->safe_psql('postgres', 'CREATE DATABASE other');
does_not_wake(
	<<'EOC' . 'CREATE TRIGGER wake ' . sprintf($trigger, 1) . "INSERT INTO schema1.counted VALUES ('delta', 1)",
CREATE EXTENSION worker_spi;
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted (type text, value bigint);
EOC
	'an insert into the table of that name in another database', 'other');
is($node->safe_psql('other', 'TABLE schema1.counted'),
	'delta|1', 'where there is no worker');

# ------------------------------------------------------------------------
# Anywhere else: a hint never fails a writer, and keeps all rows
# ------------------------------------------------------------------------
foreach my $table ('public.counted', 'schema1.other', 'schema01.counted',
	'schema.counted', 'schema1x.counted', '"schema-1".counted',
	'"schema 1".counted', '"Schema1".counted', 'schema4294967297.counted',
	'schema2147483648.counted', 'schema2147483647.counted', 'schema999.counted')
{
	my ($schema, $name) = split /\./, $table;
	my $sql = <<EOC;
CREATE SCHEMA IF NOT EXISTS $schema;
CREATE TABLE $table (type text, value bigint);
CREATE TRIGGER wake AFTER INSERT ON $table FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();
INSERT INTO $table VALUES ('delta', 1);
EOC
	does_not_wake($sql, "a trigger on $table");
	is($node->safe_psql('postgres', "TABLE $table"), 'delta|1',
		"a trigger on $table fails no writer");
}
error_is($node, 'postgres', 'SELECT worker_spi_wake()',
	'39P01',
	qr/./,
	'a call that is none of a trigger is refused');

# The table of a worker, and one of nobody's, with each kind of trigger
foreach my $schema ('schema2', 'other')
{
	$node->safe_psql('postgres', <<EOC);
CREATE SCHEMA IF NOT EXISTS $schema;
CREATE TABLE IF NOT EXISTS $schema.counted (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL);
EOC
	foreach my $time ('BEFORE', 'AFTER')
	{
		foreach my $level ('ROW', 'STATEMENT')
		{
			my $events = 'INSERT OR UPDATE OR DELETE'
			  . ($level eq 'STATEMENT' ? ' OR TRUNCATE' : '');
			is( $node->safe_psql(
					'postgres', <<EOC),
BEGIN;
TRUNCATE $schema.counted;
CREATE TRIGGER hint $time $events ON $schema.counted
	FOR EACH $level EXECUTE FUNCTION worker_spi_wake();
INSERT INTO $schema.counted (value) VALUES (1), (2), (3);
COPY $schema.counted (value) FROM STDIN;
4
\\.
UPDATE ONLY $schema.counted SET value = value * 10 WHERE value > 1;
DELETE FROM ONLY $schema.counted WHERE value = 20;
SELECT string_agg(value::text, ' ' ORDER BY value) FROM $schema.counted;
TRUNCATE $schema.counted;
SELECT count(*) FROM $schema.counted;
DROP TRIGGER hint ON $schema.counted;
COMMIT;
EOC
				"1 30 40\n0",
				"a $time $level trigger on $schema.counted keeps what is written");
		}
	}
}
is( $node->safe_psql(
		'postgres', <<'EOC'),
CREATE CONSTRAINT TRIGGER hint AFTER INSERT OR UPDATE OR DELETE ON other.counted
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION worker_spi_wake();
INSERT INTO other.counted (value) VALUES (1), (2);
UPDATE other.counted SET value = 3 WHERE value = 2;
DELETE FROM other.counted WHERE value = 1;
SELECT value FROM other.counted;
CREATE VIEW other.view AS TABLE other.counted;
CREATE TRIGGER hint INSTEAD OF INSERT OR UPDATE OR DELETE ON other.view
	FOR EACH ROW EXECUTE FUNCTION worker_spi_wake();
WITH i AS (INSERT INTO other.view (value) VALUES (5) RETURNING 1),
	u AS (UPDATE other.view SET value = 5 RETURNING 1),
	d AS (DELETE FROM other.view RETURNING 1)
SELECT (SELECT count(*) FROM i), (SELECT count(*) FROM u), (SELECT count(*) FROM d);
CREATE TABLE other.parted (LIKE other.counted INCLUDING DEFAULTS) PARTITION BY LIST (value);
CREATE TABLE other.part PARTITION OF other.parted DEFAULT;
CREATE TRIGGER hint BEFORE INSERT OR UPDATE OR DELETE ON other.parted
	FOR EACH ROW EXECUTE FUNCTION worker_spi_wake();
INSERT INTO other.parted (value) VALUES (1), (2);
UPDATE other.parted SET value = 3 WHERE value = 2;
DELETE FROM other.parted WHERE value = 1;
SELECT value FROM other.parted;
EOC
	"3\n1|1|1\n3",
	'nor does one that is deferred, on a view or on a partitioned table fail a writer');

# One that is fired for each row wakes all the same.
$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema2.counted DISABLE TRIGGER wake;
CREATE TRIGGER each_row AFTER INSERT ON schema2.counted
	FOR EACH ROW EXECUTE FUNCTION worker_spi_wake();
EOC
wakes('INSERT INTO schema2.counted (value) VALUES (1), (2)',
	'an AFTER ROW trigger', [2]);
$node->safe_psql('postgres', <<'EOC');
DROP TRIGGER each_row ON schema2.counted;
ALTER TABLE schema2.counted ENABLE TRIGGER wake;
EOC

# ------------------------------------------------------------------------
# A session that has woken a worker before remembers where it was, and finds it
# elsewhere.
# ------------------------------------------------------------------------
my $session = $node->background_psql('postgres');

sub session_wakes
{
	my ($index, $test) = @_;
	my ($folds) = settled($index);

	$session->query_safe("INSERT INTO schema$index.counted (value) VALUES (1)");
	wait_for_folds($index, $folds + 1);
	is(deltas($node, $index), '0', $test);
	return;
}

session_wakes(1, 'a session wakes a worker');
session_wakes(1, 'and again');
$pid = worker($node, 1, 'pid');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
wait_for_restart($node, 1, $pid);
session_wakes(1, 'also as another process');

$node->safe_psql('postgres', 'SELECT worker_spi_stop(1)');
$session->query_safe('INSERT INTO schema1.counted (value) VALUES (1)');
is(deltas($node, 1), '1', 'where it is stopped the insert fails no less than ever');
$node->safe_psql('postgres', 'SELECT worker_spi_launch(1)');
session_wakes(1, 'when it was launched again the session wakes it');

# A dynamic one goes to another slot while its place is taken by somebody else.
$node->safe_psql('postgres', <<'EOC' . 'CREATE TRIGGER wake ' . sprintf($trigger, 6));
SELECT worker_spi_launch(6);
EOC
session_wakes(6, 'a session wakes a dynamic worker');
$node->safe_psql('postgres', 'SELECT worker_spi_stop(6), worker_spi_launch(7), worker_spi_launch(6)');
session_wakes(6, 'and finds it in another slot');
is(worker($node, 7, 'fold_count'), '0', 'instead of whoever took its place');
$node->safe_psql('postgres', 'SELECT worker_spi_stop(7), worker_spi_stop(6), worker_spi_launch(6)');
session_wakes(6, 'and where it was before');

# The name of the schema is what tells whom to wake.
$node->safe_psql('postgres', 'ALTER SCHEMA schema6 RENAME TO pages');
$session->query_safe('INSERT INTO pages.counted (value) VALUES (1)');
$folds = worker($node, 2, 'fold_count') + 1;
$session->query_safe('INSERT INTO schema2.counted (value) VALUES (1)');
wait_for_folds(2, $folds);
is( $node->safe_psql('postgres', 'SELECT count(*) FROM ONLY pages.counted')
	  . worker($node, 6, 'state, failed_count'),
	'1idle|0',
	'after the schema was renamed an insert goes through, and wakes nobody');
$node->safe_psql('postgres', 'ALTER SCHEMA pages RENAME TO schema6');
session_wakes(6, 'until it has its name again');
$session->quit;

# ------------------------------------------------------------------------
# Idle all the while
# ------------------------------------------------------------------------
SKIP:
{
	skip 'the server does not say how often a process sleeps', 1
	  unless defined $sleeps_before;

	$node->poll_query_until('postgres',
		"SELECT clock_timestamp() > '$idle_since'::timestamptz + interval '20 s'")
	  or die 'the clock stands still';
	my $sleeps = sleeps() - $sleeps_before;
	my $seconds = $node->safe_psql('postgres',
		"SELECT extract(epoch FROM clock_timestamp() - '$idle_since')");

	# A few more than one each second, for signals that are sent to all processes.
	note("in $seconds s an idle worker wakes $sleeps times");
	cmp_ok($sleeps, '<=', 1.5 * $seconds + 10,
		'an idle worker wakes once a second');
}

# ------------------------------------------------------------------------
# Streams of inserts
# ------------------------------------------------------------------------
$node->append_conf('postgresql.conf', 'worker_spi.wake_delay = 1000');
$node->restart;
settled(1);
$sum = total($node, 1);
my $start = $node->safe_psql('postgres', 'SELECT clock_timestamp()');
my ($stdout, $stderr, $success) = finish_psql(
	start_pgbench(
		$node,
		[ '-c', 2, '-T', 3 ],
		"INSERT INTO schema1.counted VALUES ('delta', 1);\n"));
die "pgbench: $stderr" unless $success;
my ($inserted) =
  $stdout =~ /number of transactions actually processed: (\d+)/;
$node->poll_query_until('postgres',
	'SELECT NOT EXISTS (SELECT FROM ONLY schema1.counted)')
  or die 'not all folded';
settled(1);
my ($at_most, $counted) = split /\|/,
  $node->safe_psql('postgres',
	"SELECT floor(extract(epoch FROM last_fold_time - '$start')) + 1, fold_count FROM worker_spi_workers WHERE index = 1"
  );
cmp_ok($counted, '<=', $at_most,
	'under a stream of inserts there is at most one fold for each wake_delay');
cmp_ok($counted, '>=', 2, 'and the stream does not put the folds off');
is(total($node, 1), $sum + $inserted, 'the count of the stream is right');

# Without a delay
$node->append_conf('postgresql.conf', 'worker_spi.wake_delay = 0');
$node->restart;
settled(1);
wakes(
	"BEGIN;\n"
	  . "INSERT INTO schema1.counted VALUES ('delta', 1), ('delta', 2), ('delta', 3);\n"
	  x 1000 . 'COMMIT;',
	'a thousand statements in one transaction, and no wake_delay');
does_not_wake('SELECT 1', 'without wake_delay, a fold');
$sum += $inserted + 6000;
foreach my $n (1 .. 20)
{
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted VALUES ('delta', 1)");
}
$node->poll_query_until('postgres',
	'SELECT NOT EXISTS (SELECT FROM ONLY schema1.counted)')
  or die 'not folded';
is(total($node, 1), $sum + 20,
	'without wake_delay, each commit is folded');

$node->stop;

# ------------------------------------------------------------------------
# Not preloaded
# ------------------------------------------------------------------------
my $plain = PostgreSQL::Test::Cluster->new('plain');
$plain->init;
$plain->start;
$plain->safe_psql('postgres', <<'EOC' . sprintf($trigger, 1));
CREATE EXTENSION worker_spi;
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted (type text, value bigint);
CREATE TRIGGER wake
EOC
is( $plain->safe_psql('postgres', <<'EOC'),
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 1);
SAVEPOINT a;
INSERT INTO schema1.counted VALUES ('delta', 2);
ROLLBACK TO a;
COMMIT;
TABLE schema1.counted;
EOC
	'delta|1',
	'without preload the trigger does nothing');
$plain->stop;

done_testing();
