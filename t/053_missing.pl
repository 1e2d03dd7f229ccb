# Workers that the settings ask for and that are not there, and two that ask for
# the same place.
#
# A static worker that the server has not registered, since it has no room for it
# or since a reload has added its database, shows in the view as missing, whatever
# happens to the server, until it is launched or the server starts anew.  A static
# worker that comes back to a database where a dynamic one has its index waits as
# stopped, and all that names this index there means the one that runs.
#
# It waits for states in the view, and after a crash for the other workers to be
# back.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('missing', <<'EOC');
worker_spi.total_workers = 3
worker_spi.restart_interval = 600
restart_after_crash = on
EOC
my $superuser = $node->safe_psql('postgres', 'SELECT current_user');
foreach my $db ('app', 'shop', 'blog')
{
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION worker_spi');
}

# All workers that are in the view, as "database:index kind state", those that
# nap only as "database:index kind".
my $workers = <<'EOC';
SELECT string_agg(datname || ':' || index || ' ' || kind
		|| CASE state WHEN 'idle' THEN '' ELSE ' ' || state END, ', '
	ORDER BY datname COLLATE "C", index, kind)
FROM worker_spi_workers
EOC

# Wait until the view has these and no others.
sub workers_are
{
	my ($expected, $test) = @_;

	ok( $node->poll_query_until('postgres', $workers, $expected), $test)
	  or diag('got ' . $node->safe_psql('postgres', $workers));
	return;
}

# A backend crashes, and the server is back.
sub crash_something
{
	my $victim = $node->background_psql('postgres');

	crash($node, $victim->query_safe('SELECT pg_backend_pid()')) or die 'no crash';
	eval { $victim->quit };
	return;
}

# $sql is false, with a warning that there is no worker $index in database $db.
sub is_nobody
{
	my ($session_db, $sql, $index, $db, $test) = @_;
	my ($ret, $out, $err) = $node->psql($session_db, $sql);

	is($out, 'f', $test);
	like($err, qr/WARNING:  there is no worker with index $index in database "$db"/,
		"$test: a warning says so");
	return;
}

# Restart the server; its warnings about workers.
sub restart_warnings
{
	my $offset = -s $node->logfile;

	$node->restart;
	return grep { /WARNING:/ && /worker_spi/ } server_lines($node, $offset);
}

# ------------------------------------------------------------------------
# No room: the server's launcher for logical replication has a slot as well
# ------------------------------------------------------------------------
$node->append_conf('postgresql.conf', <<'EOC');
worker_spi.database = 'app, shop'
max_worker_processes = 5
EOC
my @lines = restart_warnings();
is(scalar(@lines), 1, 'a server without room for all static workers warns once');
like($lines[0],
	qr/starts only 4 of 6 static workers: "max_worker_processes" is 5 and must be at least 7/,
	'with all that there is to know');
workers_are(
	'app:1 static, app:2 static, app:3 static, shop:1 static, shop:2 static missing, shop:3 static missing',
	'workers without a place are in the view');
is( $node->safe_psql(
		'postgres',
		"SELECT string_agg(json_strip_nulls(row_to_json(w))::text, ' ' ORDER BY index) FROM worker_spi_workers AS w WHERE state = 'missing'"
	),
	join(' ', map { qq({"index":$_,"kind":"static","datname":"shop","rolname":"$superuser","state":"missing"}) } 2, 3),
	'with what is known of them and nothing else');

my $shop = database_oid($node, 'shop');
foreach my $call ('fold(2)', 'fold(2, wait => false)', 'stop(2)')
{
	is_nobody('shop', "SELECT worker_spi_$call", 2, 'shop', "$call of one that is missing");
	my $from_afar = $call =~ s/\(2/(2, $shop/r;
	is_nobody('postgres', "SELECT worker_spi_$from_afar", 2, 'shop',
		"$call of one that is missing, from another database");
}
error_is($node, 'shop', 'SELECT worker_spi_launch(2)', '53400',
	qr/HINT:  .*"max_worker_processes", which is 5\./,
	'it cannot be launched while there is no slot');
workers_are(
	'app:1 static, app:2 static, app:3 static, shop:1 static, shop:2 static missing, shop:3 static missing',
	'which changes nothing');
crash_something();
workers_are(
	'app:1 static, app:2 static, app:3 static, shop:1 static, shop:2 static missing, shop:3 static missing',
	'over a crash it stays so');

# A place for one of them
is( $node->safe_psql('app', 'SELECT worker_spi_stop(3)'),
	't', 'another worker is stopped');
my $pid = $node->safe_psql('shop', 'SELECT worker_spi_launch(2)');
workers_are(
	'app:1 static, app:2 static, app:3 static stopped, shop:1 static, shop:2 dynamic, shop:3 static missing',
	'one that is missing is launched as a dynamic worker, which takes its place in the view');
is(worker($node, 2, 'pid', 'shop'), $pid, 'it is that process');
$node->safe_psql('shop', 'INSERT INTO schema2.counted (value) VALUES (42)');
folds($node, 2, 'which folds', 'shop');
is(rows($node, 2, undef, 'shop'), 'total|42', 'what there is');
error_is($node, 'shop', 'SELECT worker_spi_launch(2)', '42710', qr/./,
	'there is no other of its index');
crash_something();
workers_are(
	'app:1 static, app:2 static, app:3 static stopped, shop:1 static, shop:2 dynamic, shop:3 static missing',
	'over a crash it stays so');
is($node->safe_psql('shop', 'SELECT worker_spi_stop(2)'), 't', 'it is stopped');
workers_are(
	'app:1 static, app:2 static, app:3 static stopped, shop:1 static, shop:2 static missing, shop:3 static missing',
	'and then the static one is missing as before');

$node->append_conf('postgresql.conf', 'max_worker_processes = 7');
@lines = restart_warnings();
is(scalar(@lines), 0, 'a server with room for all does not warn');
workers_are(
	join(', ', map { my $db = $_; map { "$db:$_ static" } 1 .. 3 } 'app', 'shop'),
	'and none is missing');
is(rows($node, 2, undef, 'shop'), 'total|42', 'the static one has the tables');

# ------------------------------------------------------------------------
# A database that has joined the list
# ------------------------------------------------------------------------
$node->append_conf('postgresql.conf', <<'EOC');
worker_spi.total_workers = 1
max_worker_processes = 32
worker_spi.database = 'app'
EOC
$node->restart;
workers_are('app:1 static', 'a server with one worker');

# What the log tells of a reload is shown in 050.
sub reload_to
{
	my ($conf) = @_;
	$node->append_conf('postgresql.conf', $conf);
	$node->reload;
	return;
}
reload_to(q(worker_spi.database = 'app, "no, such", blog, shop'));
workers_are(
	'app:1 static, blog:1 static missing, no, such:1 static missing, shop:1 static missing',
	'workers of databases that have joined the list are missing, also if there is no such database');
crash_something();
workers_are(
	'app:1 static, blog:1 static missing, no, such:1 static missing, shop:1 static missing',
	'over a crash it stays so');

$node->safe_psql('postgres', 'CREATE ROLE regress_counter LOGIN');
reload_to("worker_spi.role = 'regress_counter'");
$node->poll_query_until('postgres',
	"SELECT count(*) = 3 AND min(rolname) = 'regress_counter' FROM worker_spi_workers WHERE state = 'missing'"
) or die 'no role is shown';
pass('they have the role of static workers');
reload_to("worker_spi.role = 'regress_nobody'");
$node->poll_query_until('postgres',
	"SELECT count(*) = 3 AND count(rolname) = 0 FROM worker_spi_workers WHERE state = 'missing'"
) or die 'a role is shown';
pass('and none if there is no such role');
reload_to("worker_spi.role = ''");
$node->restart;
workers_are(
	'app:1 static, blog:1 static, no, such:1 static down, shop:1 static',
	'at the next start the server has them');

reload_to("worker_spi.database = 'app'");
workers_are(
	'app:1 static, blog:1 static stopped, no, such:1 static down, shop:1 static stopped',
	'what leaves the list is stopped');
$node->restart;
reload_to("worker_spi.database = 'app, shop'");
workers_are('app:1 static, shop:1 static missing', 'one is missing again');
$node->safe_psql('shop', 'SELECT worker_spi_launch(1)');
workers_are('app:1 static, shop:1 dynamic', 'until it is launched');
reload_to("worker_spi.database = 'app'");
reload_settings($node, 'worker_spi.log_folds = off', 1);
workers_are('app:1 static, shop:1 dynamic', 'as a dynamic worker, which the list does not concern');
is($node->safe_psql('shop', 'SELECT worker_spi_stop(1)'), 't', 'it is stopped');
workers_are('app:1 static', 'and nobody is missing who is not in the list');

# Who is stopped where the list has room for him is not missing, and not moved.
reload_to("worker_spi.database = 'shop'");
$node->restart;
$node->safe_psql('shop', 'SELECT worker_spi_stop(1)');
reload_to("worker_spi.database = 'shop, app'");
workers_are('app:1 static missing, shop:1 static stopped',
	'one that is stopped is not missing');

# ------------------------------------------------------------------------
# A static and a dynamic worker of one index
# ------------------------------------------------------------------------
reload_to("worker_spi.database = 'app'");
reload_to("worker_spi.restart_interval = 1");
reload_to("worker_spi.total_workers = 2");
$node->restart;
workers_are('app:1 static, app:2 static', 'two static workers');
reload_to("worker_spi.database = 'shop'");
workers_are('shop:1 static, shop:2 static', 'move to another database');
$pid = $node->safe_psql('app', 'SELECT worker_spi_launch(2)');
workers_are('app:2 dynamic, shop:1 static, shop:2 static',
	'a dynamic one takes the place of one of them');

my $offset = -s $node->logfile;
reload_to("worker_spi.database = 'app'");
workers_are('app:1 static, app:2 dynamic, app:2 static stopped',
	'the static one of its index comes back, and waits');
is( scalar(grep { /a worker with index 2 already runs in this database/ }
		  server_lines($node, $offset)),
	1,
	'which one line of the log says');

# Whatever names worker 2 means the dynamic one.
sub dynamic_is_meant
{
	my ($test) = @_;
	my $before = total($node, 2, 'app') || 0;

	$node->safe_psql('app', 'INSERT INTO schema2.counted (value) VALUES (1)');
	folds($node, 2, "$test: fold reaches the one that runs", 'app');
	is(deltas($node, 2, 'app') . ' ' . total($node, 2, 'app'),
		'0 ' . ($before + 1), "$test: and it folds");
	error_is($node, 'app', 'SELECT worker_spi_launch(2)', '42710',
		qr/index 2/, "$test: launch finds that it runs");
	workers_are('app:1 static, app:2 dynamic, app:2 static stopped',
		"$test: all are as they were");
	return;
}
dynamic_is_meant('of two with one index');
is( $node->safe_psql('postgres',
		"SELECT pid FROM worker_spi_workers WHERE kind = 'dynamic'"),
	$pid,
	'it is the process that was launched');
$node->safe_psql('app', <<'EOC');
CREATE TRIGGER wake AFTER INSERT ON schema2.counted
	FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();
INSERT INTO schema2.counted (value) VALUES (1);
EOC
wait_for_fold($node, 2, 'app');
is(rows($node, 2, undef, 'app'), 'total|2', 'a commit wakes it');
$node->safe_psql('app', 'DROP TRIGGER wake ON schema2.counted');
reload_settings($node, 'worker_spi.log_folds = on', 1);
dynamic_is_meant('after a reload');

# It ends and is started again: its place is still its own.
$pid = $node->safe_psql('postgres',
	"SELECT pid FROM worker_spi_workers WHERE kind = 'dynamic'");
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
$node->poll_query_until('postgres',
	"SELECT count(*) = 1 FROM worker_spi_workers WHERE kind = 'dynamic' AND pid <> $pid AND state = 'idle'"
) or die 'the dynamic worker did not come back';
dynamic_is_meant('after its restart');
crash_something();
dynamic_is_meant('after a crash');

is($node->safe_psql('app', 'SELECT worker_spi_stop(2)'), 't', 'stop ends it');
workers_are('app:1 static, app:2 static stopped', 'it is the dynamic one that is gone');
error_is($node, 'app', 'SELECT worker_spi_fold(2)', '55000', qr/index 2/,
	'fold then means the static one, which is stopped');
is_nobody('app', 'SELECT worker_spi_stop(2)', 2, 'app', 'and so does stop');
is( $node->safe_psql('app', 'SELECT worker_spi_launch(2) > 0, worker_spi_fold(2)'),
	't|t', 'and launch');
workers_are('app:1 static, app:2 static', 'which starts it');
is(rows($node, 2, undef, 'app'), 'total|5', 'and nothing was lost');

# ------------------------------------------------------------------------
# Who has moved, and what is stopped, stays what it is over a crash, although the
# server has registered it for another database.
# ------------------------------------------------------------------------
reload_to("worker_spi.database = 'shop'");
workers_are('shop:1 static, shop:2 static', 'two workers have moved');
is($node->safe_psql('shop', 'SELECT worker_spi_stop(2)'), 't', 'one is stopped');
$node->safe_psql('shop', 'ALTER SCHEMA schema1 RENAME TO pages');
crash_something();
workers_are('shop:1 static backoff, shop:2 static stopped',
	'after a crash they are where they were');
is( $node->safe_psql('shop', "SELECT to_regnamespace('schema1') IS NULL")
	  . worker($node, 1, 'last_sqlstate'),
	't42P01',
	'and what was renamed is not made anew');
error_is($node, 'shop', 'SELECT worker_spi_fold(2)', '55000', qr/index 2/,
	'the one that was stopped is');

ok(!$node->log_contains(qr/TRAP:|PANIC:/), 'nothing has crashed that was not to');
$node->stop;
done_testing();
