# The view is the one place to alert on.  One query, which README.md has, shows
# every worker that is late, fails, has stuck rows, is down, stopped or missing,
# and never one that is healthy, at whatever naptime, nor one that has met a lock.
# folded_until says up to when deltas are in a total or known to be stuck.  And
# what the view and the errors of workers do not tell.
#
# It waits for states in the view and for worker_spi_fold().

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('view', <<'EOC', allows_streaming => 1);
worker_spi.total_workers = 7
worker_spi.restart_interval = 3600
max_prepared_transactions = 1
EOC
folds($node, $_) foreach 1 .. 7;

# The query, with the time of asking and the minute of patience as arguments.
my ($query) = slurp_file('README.md') =~ /^(SELECT index, datname, state, folded_until.*?);$/ms
  or die 'README.md has no such query';
$query =~ s/\bnow\(\)/at/ or die 'the query does not say when';
$query =~ s/interval '1 minute'/patience/ or die 'the query does not say how late';
$node->safe_psql('postgres', <<EOC);
CREATE FUNCTION alerts(at timestamptz DEFAULT clock_timestamp(),
	patience interval DEFAULT '1 minute') RETURNS SETOF int
LANGUAGE sql AS \$\$
	SELECT index FROM ($query) AS q ORDER BY index
\$\$;
EOC

sub alerts
{
	my ($arguments) = @_;
	return $node->safe_psql('postgres',
		'SELECT string_agg(i::text, $$ $$) FROM alerts(' . ($arguments // '') . ') AS i');
}

# ------------------------------------------------------------------------
# folded_until
# ------------------------------------------------------------------------
my $ask = 'SELECT folded_until FROM worker_spi_workers WHERE index = 1';
my @times = split /\n/, $node->safe_psql('postgres', <<"EOC");
INSERT INTO schema1.counted (value) VALUES (1);
SELECT clock_timestamp();
SELECT worker_spi_fold(1) \\gset
$ask;
SELECT clock_timestamp();
SELECT worker_spi_fold(1) \\gset
$ask;
SELECT clock_timestamp();
EOC
is( $node->safe_psql(
		'postgres',
		"SELECT bool_and(t > before) FROM (SELECT t, lag(t) OVER (ORDER BY n) AS before FROM unnest('{"
		  . join(',', map { qq("$_") } @times)
		  . "}'::timestamptz[]) WITH ORDINALITY AS u (t, n)) AS v"),
	't',
	'folded_until is in the cycle that was waited for, whether it found anything or not'
) or diag("@times");

# What is not committed at the time is not covered.
my $writer = $node->background_psql('postgres');
$writer->query_safe('BEGIN; INSERT INTO schema1.counted (value) VALUES (2)');
folds($node, 1);
$writer->query_safe('COMMIT');
is(deltas($node, 1), '1', 'a delta committed after it is still there');
$writer->quit;

# What is stuck is not waited for.
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted (value) VALUES (9223372036854775807), (1)");
my $before = $node->safe_psql('postgres', 'SELECT clock_timestamp()');
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '22003', qr/./,
	'a delta does not fit');
is( worker(
		$node, 1,
		"folded_until > '$before', stuck_rows > 0, state, last_sqlstate, last_error <> '', failed_count"
	),
	't|t|idle|22003|t|0',
	'it is stuck, and the rest folded, so the worker is not late');
is(alerts(), '1', 'but wants attention');
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted (value) VALUES (-9223372036854775807)");
folds($node, 1);
is(worker($node, 1, 'stuck_rows') . alerts(), '0', 'until it fits');

# ------------------------------------------------------------------------
# Healthy: no alert, at any naptime, up to the moment of the next cycle
# ------------------------------------------------------------------------
foreach my $naptime (3600, 1)
{
	$node->append_conf('postgresql.conf', "worker_spi.naptime = $naptime");
	$node->reload;
	$node->poll_query_until('postgres', <<EOC) or die 'naptime was not taken over';
SELECT current_setting('worker_spi.naptime')::interval = interval '$naptime s'
	AND bool_and(next_fold_time - folded_until < interval '$naptime s' + interval '5 s')
	AND bool_and(next_fold_time - folded_until > interval '$naptime s' / 2)
FROM worker_spi_workers
EOC
	is(alerts(), '', "naptime $naptime: no healthy worker raises an alert");
	is(alerts("(SELECT max(next_fold_time) FROM worker_spi_workers)"),
		'', "naptime $naptime: nor will it until its next cycle");
	is( $node->safe_psql(
			'postgres',
			"SELECT count(*) FROM alerts(clock_timestamp() + interval '$naptime s' + interval '2 minutes')"
		),
		'7',
		"naptime $naptime: without that cycle all would");
}

# ------------------------------------------------------------------------
# A lock that was not to be had, or a few in a row, are no reason to be woken up.
# ------------------------------------------------------------------------
my $failed = worker($node, 6, 'failed_count');
my $holder = $node->background_psql('postgres');
$holder->query_safe('BEGIN; LOCK TABLE schema6.total IN SHARE MODE');
error_is($node, 'postgres', 'SELECT worker_spi_fold(6)', '55P03', qr/./,
	'a lock is not to be had in time');
foreach my $n (1 .. 3)
{
	is( $node->safe_psql(
			'postgres', <<EOC),
SELECT NOT EXISTS (SELECT FROM alerts() AS i WHERE i = 6)
	OR (SELECT failed_count >= $failed + 5 FROM worker_spi_workers WHERE index = 6)
EOC
		't',
		"failure $n raises no alert");
	$node->psql('postgres', 'SELECT worker_spi_fold(6)');
}
$holder->query_safe('COMMIT');
$holder->quit;
folds($node, 6, 'and is over');

# ------------------------------------------------------------------------
# In trouble, at a naptime of a second: 2 is late, held up in its fold; 3 fails;
# 4 is absent; 5 is stopped; 7 has stuck rows.  1 and 6 are healthy all the time.
# ------------------------------------------------------------------------
add_gate($node, 2, 42);
$holder = $node->background_psql('postgres');
$holder->query_safe('SELECT pg_advisory_lock(42)');
$node->safe_psql('postgres', 'INSERT INTO schema2.counted (value) VALUES (1)');
wait_for_state($node, 2, 'folding');
is(alerts() =~ s/\b2\b//r, '', 'a fold of some seconds raises no alert');

$node->safe_psql('postgres', 'ALTER TABLE schema3.counted RENAME value TO amount');
foreach my $n (1 .. 5)
{
	error_is($node, 'postgres', 'SELECT worker_spi_fold(3)', '42P16', qr/./,
		"a worker fails: $n");
}
$node->poll_query_until('postgres',
	"SELECT count(*) = 1 FROM alerts(patience => '1000 years') AS i WHERE i = 3")
  or die 'worker 3 raises no alert';
pass('a worker that fails again and again raises an alert, late or not');

my $pid = worker($node, 4, 'pid');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
wait_for_state($node, 4, 'down');
is(worker($node, 4, 'pid'), '', 'a worker has no process');

$node->safe_psql('postgres', 'SELECT worker_spi_stop(5)');
is(worker($node, 5, 'state, pid'), 'stopped|', 'a worker is stopped');

$node->safe_psql('postgres', <<'EOC');
INSERT INTO schema7.counted (value) VALUES (9223372036854775807), (1);
EOC
$node->poll_query_until('postgres',
	'SELECT stuck_rows > 0 FROM worker_spi_workers WHERE index = 7')
  or die 'nothing of worker 7 is stuck';

$node->poll_query_until('postgres', <<'EOC') or die 'worker 2 is not late';
SELECT count(*) = 1 FROM alerts(patience => '2 s') AS i WHERE i = 2
EOC
pass('a worker that is held up is late');
ok( $node->poll_query_until(
		'postgres',
		"SELECT string_agg(i::text, ' ' ORDER BY i) FROM alerts(patience => '2 s') AS i WHERE i NOT IN (1, 6)",
		'2 3 4 5 7'),
	'the one query shows who is late, fails, is absent, is stopped, or has stuck rows');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM alerts() AS i WHERE i IN (1, 6)"),
	'0',
	'and not who is healthy');

$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema3.counted RENAME amount TO value;
INSERT INTO schema7.counted (value) VALUES (-9223372036854775807);
EOC
folds($node, $_) foreach 3, 7;
$holder->query_safe('SELECT pg_advisory_unlock(42)');
$holder->quit;
folds($node, 2);
$node->safe_psql('postgres', 'SELECT worker_spi_launch(5)');
$node->poll_query_until('postgres',
	"SELECT string_agg(i::text, ' ') = '4' FROM alerts(patience => '20 s') AS i")
  or die 'alerts do not end';
pass('when the trouble is over so are the alerts');

# ------------------------------------------------------------------------
# At a server start: 2 is in its first cycle, which a prepared transaction holds
# up; 6 never has one; 7 is missing, for want of room beside the server's launcher
# for logical replication.  On a standby nobody has anything to do.
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOC');
BEGIN;
DROP SCHEMA schema6 CASCADE;
CREATE SCHEMA schema6;
CREATE VIEW schema6.counted AS SELECT 1 AS value;
COMMIT;
BEGIN;
SELECT pg_advisory_xact_lock(42);
PREPARE TRANSACTION 'holder';
INSERT INTO schema2.counted (value) VALUES (1);
EOC
$node->append_conf('postgresql.conf', <<'EOC');
worker_spi.naptime = 3600
max_worker_processes = 7
EOC
$node->restart;
wait_for_state($node, $_, 'idle') foreach 1, 3 .. 5;
wait_for_state($node, 6, 'backoff');
is(worker($node, 6, 'folded_until, fold_count, last_sqlstate'),
	'-infinity|0|42809', 'without a cycle, folded_until is minus infinity');
is( $node->safe_psql('postgres',
		"SELECT string_agg(i::text, ' ') FROM alerts() AS i WHERE i <> 6"),
	'7',
	'a worker that is missing raises an alert');
is( $node->safe_psql('postgres', <<'EOC'),
SELECT count(*) FROM alerts(clock_timestamp() + interval '62 min') AS i WHERE i = 6
EOC
	'1',
	'one that never had a cycle is late when it has had time for one');
$node->psql('postgres', 'SELECT worker_spi_fold(6)') foreach 1 .. 5;
$node->poll_query_until('postgres',
	'SELECT count(*) = 1 FROM alerts() AS i WHERE i = 6')
  or die 'worker 6 raises no alert';
pass('and raises an alert before that, since it fails');

is( $node->safe_psql(
		'postgres', <<'EOC'),
SELECT folded_until, state, i FROM worker_spi_workers LEFT JOIN alerts() AS i ON i = index
WHERE index = 2
EOC
	'-infinity|folding|',
	'one that is in its first cycle raises none');
is( $node->safe_psql('postgres', <<'EOC'),
SELECT count(*) FROM alerts(clock_timestamp() + interval '62 min') AS i WHERE i = 2
EOC
	'1',
	'until it is late');

$node->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'backup', has_streaming => 1);
$standby->start;
is( $standby->safe_psql(
		'postgres',
		"SELECT count(*), bool_and(state IN ('down', 'missing')), (SELECT count(*) FROM alerts()) FROM worker_spi_workers"
	),
	'7|t|0',
	'on a standby no worker raises one');
$standby->stop;

$node->safe_psql('postgres', "COMMIT PREPARED 'holder'");
folds($node, 2);

# ------------------------------------------------------------------------
# What is not told.  The detail of a worker's error may show rows: it is for those
# who could act as the worker's role, and not for who has a function that folds.
# ------------------------------------------------------------------------
$node->append_conf('postgresql.conf', 'max_worker_processes = 32');
$node->restart;
$node->safe_psql('postgres', <<'EOC');
CREATE ROLE regress_owner LOGIN;
CREATE ROLE regress_boss LOGIN IN ROLE regress_owner;
CREATE ROLE regress_clerk LOGIN;
GRANT CREATE ON DATABASE postgres TO regress_owner;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO regress_owner;
CREATE SCHEMA stats;
GRANT USAGE ON SCHEMA stats TO PUBLIC;
CREATE FUNCTION stats.fold(index int) RETURNS boolean LANGUAGE sql SECURITY DEFINER
	SET search_path = '' AS 'SELECT public.worker_spi_fold(index)';
CREATE FUNCTION stats.launch(index int) RETURNS int LANGUAGE sql SECURITY DEFINER
	SET search_path = '' AS 'SELECT public.worker_spi_launch(index)';
SELECT worker_spi_launch(8, 0, 'regress_owner'::regrole);
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	RAISE EXCEPTION 'refused' USING DETAIL = 'Failing row contains (secret).', HINT = 'Think.';
END $$;
EOC
foreach my $index (1, 8)
{
	$node->safe_psql('postgres', <<EOC);
CREATE TRIGGER refuse AFTER INSERT OR UPDATE ON schema$index.total
	FOR EACH ROW EXECUTE FUNCTION refuse();
ALTER TABLE schema$index.total ENABLE ALWAYS TRIGGER refuse;
INSERT INTO schema$index.counted (value) VALUES (1);
EOC
}

# Which part of the error of worker $index a session sees, that of $user if it is
# one, after it has run $before.
sub sees
{
	my ($index, $user, $before) = @_;
	my ($ret, $out, $err) = $node->psql(
		'postgres', "$before; SELECT stats.fold($index)",
		extra_params => $user ? [ '-U', $user ] : []);
	return join ' ', map { $err =~ /$_/ ? lc $_ : () }
	  ('ERROR:  refused', 'DETAIL:  Failing row contains', 'HINT:  Think');
}
my $all = 'error:  refused detail:  failing row contains hint:  think';
my $less = 'error:  refused hint:  think';
my $superuser = $node->safe_psql('postgres', 'SELECT current_user');

is(sees(1, undef, ''), $all, 'a superuser sees the detail of an error');
is(sees(8, undef, ''), $all, 'of any worker');
is(sees(1, undef, 'SET ROLE regress_clerk'), $all,
	'also while it acts as somebody else');
is(sees(1, undef, 'SET SESSION AUTHORIZATION regress_clerk'), $less,
	'but not as somebody else');
is(sees(1, 'regress_clerk', ''), $less,
	'who has no more than a function that folds does not see it');
is(sees(8, 'regress_clerk', ''), $less, 'of no worker');
is(sees(8, 'regress_owner', ''), $all, 'the role of a worker sees it');
is(sees(8, 'regress_boss', ''), $all, 'and a member of that role');
is(sees(1, 'regress_boss', ''), $less, 'but not those of others');

# A column of the wrong type is told with a detail, too.
$node->safe_psql('postgres', <<'EOC');
CREATE SCHEMA schema9;
CREATE TABLE schema9.counted (type text, value text NOT NULL);
EOC
foreach my $user ([ 'regress_clerk', 0 ], [ $superuser, 1 ])
{
	my ($name, $sees) = @$user;
	my ($ret, $out, $err) = $node->psql('postgres', 'SELECT stats.launch(9)',
		extra_params => [ '-U', $name ]);

	like($err, qr/ERROR:  column "value" of table "postgres\.schema9\.counted" has type/,
		"$name sees why a launch has failed");
	is(scalar($err =~ /DETAIL/) || 0, $sees,
		$sees ? 'and its detail' : 'and no detail');
}

# Columns are what the library thinks they are, or it would show addresses.
my $columns = $node->safe_psql('postgres', <<'EOC');
SELECT string_agg(name || ' ' || t::regtype, ', ' ORDER BY n)
FROM pg_proc, unnest(proallargtypes, proargnames) WITH ORDINALITY AS u (t, name, n)
WHERE proname = 'worker_spi_get_workers'
EOC
my @columns = split /, /, $columns;
my %others = (
	'one alone' => 'n bigint',
	'one more' => "$columns, more bigint",
	'one less' => join(', ', @columns[ 0 .. $#columns - 1 ]),
	'numbers for texts' => $columns =~ s/ text/ bigint/gr,
	'texts for numbers' => $columns =~ s/ bigint/ text/gr,
	'other numbers' => $columns =~ s/ integer/ bigint/gr,
	'another order' => join(', ', reverse @columns));
my $library = q(AS '$libdir/worker_spi', 'worker_spi_get_workers' LANGUAGE C STRICT);
foreach my $name (sort keys %others)
{
	my $list = $others{$name};

	error_is($node, 'postgres',
		"CREATE FUNCTION pg_temp.w() RETURNS SETOF record $library; SELECT * FROM pg_temp.w() AS t ($list)",
		'42P13', qr/columns/, "other columns are refused: $name");
	error_is($node, 'postgres',
		"CREATE FUNCTION pg_temp.w() RETURNS TABLE ($list) $library; SELECT * FROM pg_temp.w()",
		'42P13', qr/columns/, "and as its own: $name")
	  if $name ne 'one alone';
	error_is($node, 'postgres',
		"CREATE TYPE pg_temp.t AS ($list); CREATE FUNCTION pg_temp.w() RETURNS SETOF pg_temp.t $library; SELECT * FROM pg_temp.w()",
		'42P13', qr/columns/, "and as those of a type: $name");
}
error_is($node, 'postgres',
	"CREATE FUNCTION pg_temp.w(int) RETURNS SETOF record $library; SELECT * FROM pg_temp.w(1) AS t ($columns)",
	'42P13', qr/arguments/, 'and so are other arguments');
is( $node->safe_psql('postgres',
		"CREATE FUNCTION pg_temp.w() RETURNS SETOF record $library; SELECT count(*) FROM pg_temp.w() AS t ($columns)"
	),
	'8',
	'whoever asks for the right ones gets them');

ok(!$node->log_contains(qr/TRAP:|PANIC:|terminated by signal/),
	'no process has crashed');
$node->stop;
done_testing();
