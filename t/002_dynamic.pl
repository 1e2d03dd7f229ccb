# Dynamic workers: where and as whom worker_spi_launch() starts them, what it
# refuses, and that a launch that fails leaves nothing behind.
#
# It waits for launches, which return when the worker is ready, and for lock
# waits in pg_locks and pg_stat_activity where a worker or its caller is to
# hang.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# The logical replication launcher has one of these slots.
my $node = new_node('dynamic', <<EOC);
worker_spi.total_workers = 0
max_worker_processes = 12
EOC
my $superuser = $node->safe_psql('postgres',
	'SELECT rolname FROM pg_roles WHERE oid = 10');

$node->safe_psql('postgres', <<EOQ);
CREATE DATABASE other;
CREATE DATABASE closed ALLOW_CONNECTIONS false;
CREATE ROLE regress_worker LOGIN;
GRANT CREATE ON DATABASE other, closed TO regress_worker;
EOQ
my %db = map { split /\|/ } split /\n/,
  $node->safe_psql('postgres', 'SELECT datname, oid FROM pg_database');
my $role = $node->safe_psql('postgres', "SELECT 'regress_worker'::regrole::oid");

# ------------------------------------------------------------------------
# Another database and role
# ------------------------------------------------------------------------
my $pid = $node->safe_psql('postgres',
	"SELECT worker_spi_launch(7, $db{other}, $role)");
is( $node->safe_psql('other',
		"SELECT relname, relowner::regrole FROM pg_class
		 WHERE relnamespace = 'schema7'::regnamespace AND relkind = 'r' ORDER BY relname"),
	join("\n", map { "$_|regress_worker" } 'counted', 'stuck', 'total'),
	'the tables exist when a launch returns, made as that role');
is($node->safe_psql('postgres', "SELECT worker_spi_fold(7, $db{other})"),
	't', 'the worker can be told to fold from another database');
is( $node->safe_psql(
		'postgres',
		'SELECT index, kind, datname, rolname, pid, state, restart_count
		 FROM worker_spi_workers'),
	"7|dynamic|other|regress_worker|$pid|idle|0",
	'the view shows the database and role that it was launched for');
is( $node->safe_psql(
		'postgres',
		"SELECT backend_type, application_name, datname, usename
		 FROM pg_stat_activity WHERE pid = $pid"),
	'worker_spi dynamic|worker_spi dynamic worker 7|other|regress_worker',
	'and so does pg_stat_activity');
like(
	slurp_file($node->logfile),
	qr/LOG:  worker_spi dynamic worker 7 initialized with other\.schema7\.counted$/m,
	'the log says that it is there');
$node->safe_psql('other', "INSERT INTO schema7.counted VALUES ('delta', 17)");
folds($node, 7, 'it folds', 'other');
is($node->safe_psql('other', 'TABLE schema7.counted'), 'total|17', 'a delta into a total');
ok( $node->log_contains(
		qr/LOG:  worker_spi dynamic worker 7: count in other\.schema7\.counted is now 17$/m),
	'and logs it under its name');

is($node->safe_psql('postgres', 'SELECT worker_spi_launch(7) > 0'),
	't', 'the same index is free in another database');
is( $node->safe_psql(
		'postgres',
		"SELECT datname, rolname FROM worker_spi_workers WHERE index = 7
		 ORDER BY datname"),
	"other|regress_worker\npostgres|$superuser",
	'where a superuser\'s worker runs as the bootstrap superuser');
error_is($node, 'postgres',
	"SELECT worker_spi_launch(7, $db{other})",
	'42710', qr/index 7 already runs/, 'but not in the same one');
is( $node->safe_psql('postgres',
		"SELECT worker_spi_stop(7), worker_spi_stop(7, $db{other})"),
	't|t',
	'each is stopped by itself');
nothing_left($node, 7, 'and then both are gone');

# ------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------
error_is($node, 'postgres',
	"SELECT worker_spi_launch(8, $db{closed})",
	'55000', qr/not currently accepting connections/,
	'a database that allows no connections refuses a worker');
nothing_left($node, 8, 'of which nothing is left');
is( $node->safe_psql(
		'postgres', "SELECT worker_spi_launch(8, $db{closed}, flags => '{ALLOWCONN}') > 0,
			worker_spi_fold(8, $db{closed}), worker_spi_stop(8, $db{closed})"),
	't|t|t',
	'unless it has the flag ALLOWCONN');

$node->safe_psql('postgres',
	'ALTER ROLE regress_worker NOLOGIN');
error_is($node, 'postgres',
	"SELECT worker_spi_launch(8, $db{other}, $role)",
	'28000', qr/not permitted to log in/,
	'a role that may not log in cannot have a worker');
nothing_left($node, 8, 'of which nothing is left');
if ($node->pg_version >= 17)
{
	is( $node->safe_psql(
			'postgres', "SELECT worker_spi_launch(8, $db{other}, $role, '{ROLELOGINCHECK}') > 0,
				worker_spi_fold(8, $db{other}), worker_spi_stop(8, $db{other})"),
		't|t|t',
		'unless it has the flag ROLELOGINCHECK');
	is( $node->safe_psql(
			'postgres', "SELECT worker_spi_launch(18, $db{closed}, $role, '{ROLELOGINCHECK,ALLOWCONN}') > 0,
				worker_spi_stop(18, $db{closed})"),
		't|t',
		'the flags work together');
}
else
{
	error_is($node, 'postgres',
		"SELECT worker_spi_launch(8, $db{other}, $role, '{ROLELOGINCHECK}')",
		'22023', qr/unrecognized flag "ROLELOGINCHECK"/,
		'the flag ROLELOGINCHECK needs a newer server');
}
$node->safe_psql('postgres', 'ALTER ROLE regress_worker LOGIN');

# ------------------------------------------------------------------------
# Errors on the way to readiness
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<EOQ);
CREATE SCHEMA schema8;
CREATE VIEW schema8.counted AS SELECT 'delta'::text AS type, 1 AS value;
CREATE SCHEMA schema9;
CREATE TABLE schema9.counted (type text, value text);
EOQ
error_is($node, 'postgres', 'SELECT worker_spi_launch(8)', '42809',
	qr/"postgres\.schema8\.counted" is not an ordinary table/,
	'the caller gets the error that keeps a worker from its table');
nothing_left($node, 8, 'and no worker');
error_is($node, 'postgres', 'SELECT worker_spi_launch(9)', '42P16',
	qr/column "value" of table "postgres\.schema9\.counted" has type text/,
	'the error names the column that is wrong');
$node->safe_psql('postgres', 'DROP VIEW schema8.counted');
is( $node->safe_psql('postgres',
		'SELECT worker_spi_launch(8) > 0, worker_spi_stop(8)'),
	't|t',
	'a launch works as soon as the cause is gone');

my $holder = $node->background_psql('postgres');
$holder->query_safe('BEGIN; LOCK TABLE schema8.counted IN ACCESS EXCLUSIVE MODE');
error_is($node, 'postgres', 'SELECT worker_spi_launch(8)', '55P03',
	qr/./, 'a locked table ends in a lock timeout, not in a hang');
nothing_left($node, 8, 'and in no worker');
$holder->query_safe('ROLLBACK');

# ------------------------------------------------------------------------
# The caller goes away while it waits.  The uncommitted RENAME keeps a worker
# from its database for as long as it takes.
# ------------------------------------------------------------------------
foreach my $how ('cancel', 'terminate')
{
	$holder->query_safe('BEGIN; ALTER DATABASE other RENAME TO another');
	my $caller = start_psql($node, 'postgres', "caller_$how",
		"SELECT worker_spi_launch(8, $db{other})");
	wait_for_psql($caller);
	$node->poll_query_until('postgres',
		'SELECT pid IN (SELECT pid FROM pg_locks WHERE NOT granted)
		 FROM worker_spi_workers WHERE index = 8')
	  or die 'worker does not wait for its database';
	is(worker($node, 8, 'state'), 'starting', 'a worker hangs as it starts');
	my $worker_pid = worker($node, 8, 'pid');

	$node->safe_psql('postgres',
		"SELECT pg_${how}_backend(pid) FROM pg_stat_activity
		 WHERE application_name = 'caller_$how'");
	my (undef, $err) = finish_psql($caller);
	like( $err,
		$how eq 'cancel' ? qr/57014: canceling/ : qr/57P01: terminating/,
		"$how its caller");
	$node->poll_query_until('postgres',
		"SELECT count(*) = 0 FROM pg_stat_activity
		 WHERE application_name = 'caller_$how'")
	  or die 'caller did not end';
	nothing_left($node, 8, "and no registration is left after $how");
	ok(!kill(0, $worker_pid), "nor a process after $how");
	$holder->query_safe('ROLLBACK');
	is( $node->safe_psql(
			'postgres', "SELECT worker_spi_launch(8, $db{other}) > 0,
				worker_spi_stop(8, $db{other})"),
		't|t',
		"and the index is free after $how");
}

# So does a caller that is cancelled while its worker waits for the table.
$holder->query_safe('BEGIN; LOCK TABLE schema8.counted IN ACCESS EXCLUSIVE MODE');
error_is($node, 'postgres',
	"SET statement_timeout = '500ms'; SELECT worker_spi_launch(8)",
	'57014', qr/statement timeout/, 'a launch ends with its statement');
nothing_left($node, 8, 'and leaves nothing');
$holder->query_safe('ROLLBACK');
$holder->quit;

# A database that is gone
error_is($node, 'postgres', 'SELECT worker_spi_launch(8, 4294967295)',
	'3D000', qr/database with OID 4294967295 does not exist/,
	'a database that does not exist');
reload_settings_dynamic("worker_spi.database = 'nowhere'");
$node->safe_psql('other', 'CREATE EXTENSION worker_spi');
foreach my $db ('postgres', 'other')
{
	is( $node->safe_psql(
			$db, 'SELECT worker_spi_launch(8) > 0,
				(SELECT datname FROM worker_spi_workers), worker_spi_stop(8)'),
		"t|$db|t",
		"a launch without a database takes the one of the caller: $db");
}
reload_settings_dynamic("worker_spi.database = 'postgres'");

# What the caller itself keeps from the worker: it would wait for the caller,
# and the caller for it.
$node->safe_psql('postgres', 'CREATE SCHEMA schema10');
foreach my $case (
	[
		'CREATE TABLE schema10.counted (type text, value bigint)',
		'SELECT worker_spi_launch(10)'
	],
	[ 'CREATE SCHEMA schema11', 'SELECT worker_spi_launch(11)' ],
	[ 'LOCK TABLE schema8.counted', 'SELECT worker_spi_launch(8)' ],
	[
		'ALTER DATABASE other RENAME TO another',
		"SELECT worker_spi_launch(8, $db{other})"
	])
{
	my ($before, $launch) = @$case;

	error_is($node, 'postgres', "BEGIN; $before; $launch",
		'55P03', qr/HINT:.*[Cc]ommit/s,
		"a launch in the way of which its own caller stands: $before");
	nothing_left($node, $_, 'and leaves nothing') foreach 8, 10, 11;
}

# One slot after another, until none is left
error_is($node, 'postgres',
	'SELECT worker_spi_launch(100 + i) FROM generate_series(1, 12) i',
	'53400',
	qr/no background worker slot is left.*HINT:.*"max_worker_processes", which is 12/s,
	'when no slot is left, the hint names the setting and its value');
my $launched = $node->safe_psql('postgres',
	'SELECT count(*) FROM worker_spi_workers');
cmp_ok($launched, '>=', 10, 'all slots that were free have workers');
error_is($node, 'postgres', 'SELECT worker_spi_launch(8)', '53400',
	qr/no background worker slot/, 'the next launch fails in the same way');
is( $node->safe_psql(
		'postgres',
		'SELECT count(*) FROM worker_spi_workers WHERE worker_spi_stop(index)'),
	$launched,
	'all are stopped');
is( $node->safe_psql('postgres',
		'SELECT worker_spi_launch(8) > 0, worker_spi_stop(8)'),
	't|t',
	'and their slots are free again');

# 20 at once
my $winner = launch_20_at_once($node, 20);
is(worker($node, 20, 'pid'), $winner, 'it is the one that runs');
is( $node->safe_psql(
		'postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'worker_spi dynamic'"),
	'1',
	'and the only one');

# ------------------------------------------------------------------------
# Permissions, as those see them who log in
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<EOQ);
CREATE ROLE regress_none LOGIN;
CREATE ROLE regress_granted LOGIN;
CREATE ROLE regress_member LOGIN NOINHERIT;
CREATE ROLE regress_reader LOGIN;
GRANT regress_worker TO regress_member;
GRANT pg_read_all_stats TO regress_reader;
GRANT EXECUTE ON FUNCTION worker_spi_launch, worker_spi_fold, worker_spi_stop
	TO regress_granted, regress_member;
CREATE SCHEMA schema30 AUTHORIZATION regress_worker;
CREATE SCHEMA schema31 AUTHORIZATION regress_granted;
CREATE SCHEMA schema32;
GRANT USAGE ON SCHEMA schema32 TO regress_granted;
CREATE DATABASE private;
REVOKE CONNECT ON DATABASE private FROM PUBLIC;
EOQ
my $private = database_oid($node, 'private');
my @none = (extra_params => [ '-U', 'regress_none' ]);
my @granted = (extra_params => [ '-U', 'regress_granted' ]);
my @member = (extra_params => [ '-U', 'regress_member' ]);
my @reader = (extra_params => [ '-U', 'regress_reader' ]);

error_is($node, 'postgres', $_, '42501', qr/permission denied for/,
	"without a grant: $_", @none)
  foreach 'SELECT worker_spi_launch(30)', 'SELECT worker_spi_fold(20)',
  'SELECT worker_spi_stop(20)', 'SELECT worker_spi_get_workers()',
  'SELECT * FROM worker_spi_workers',
  'CREATE TEMP TABLE t (); CREATE TRIGGER t AFTER INSERT ON t EXECUTE FUNCTION worker_spi_wake()';

error_is($node, 'postgres', "SELECT worker_spi_launch(30, 0, $role)",
	'42501', qr/permission denied for a worker of role "regress_worker"/,
	'with a grant, but not for a role that one is no member of', @granted);
error_is($node, 'postgres', 'SELECT worker_spi_launch(30, 0, 10)',
	'42501', qr/permission denied for a worker of role/,
	'least of all for the bootstrap superuser', @granted);
error_is($node, 'postgres', 'SELECT worker_spi_fold(20)',
	'42501', qr/permission denied for a worker of role/,
	'nor may it have such a worker fold', @granted);
error_is($node, 'postgres', 'SELECT worker_spi_stop(20)',
	'42501', qr/permission denied for a worker of role/,
	'nor stop it', @granted);
error_is($node, 'postgres', "SELECT worker_spi_launch(30, 0, 0, '{ALLOWCONN}')",
	'42501', qr/permission denied to use flags/,
	'flags are for superusers', @granted);
error_is($node, 'postgres', "SELECT worker_spi_launch(30, $private)",
	'42501', qr/permission denied for database private/,
	'a database that one may not connect to', @granted);
error_is($node, 'postgres', 'SELECT worker_spi_launch(32)',
	'42501', qr/"regress_granted".*"\Q$superuser\E"/,
	'a schema of somebody else', @granted);
error_is($node, 'postgres', 'SELECT worker_spi_launch(33)',
	'42501', qr/permission denied for database postgres/,
	'a schema that one may not create', @granted);
error_is($node, 'postgres', 'SELECT * FROM worker_spi_workers',
	'42501', qr/permission denied for view/,
	'the view takes more than a grant on the functions', @granted);
is( $node->safe_psql('postgres', 'SELECT worker_spi_launch(31) > 0', @granted),
	't', 'a role may launch a worker for itself');
is(worker($node, 31, 'rolname'), 'regress_granted',
	'which runs as that role');
is( $node->safe_psql('postgres',
		'SELECT worker_spi_fold(31), worker_spi_stop(31)', @granted),
	't|t',
	'have it fold, and stop it');

is( $node->safe_psql(
		'postgres', "SELECT worker_spi_launch(30, 0, $role) > 0", @member),
	't', 'a member of a role may launch a worker for it');
is(worker($node, 30, 'rolname'), 'regress_worker', 'which runs as that role');
is( $node->safe_psql(
		'postgres', "SELECT DISTINCT relowner::regrole FROM pg_class
			WHERE relnamespace = 'schema30'::regnamespace AND relkind = 'r'"),
	'regress_worker',
	'as whom it makes its tables');
is($node->safe_psql('postgres', 'SELECT worker_spi_fold(30)', @member),
	't', 'a member may have it fold');
error_is($node, 'postgres', 'SELECT worker_spi_stop(30)',
	'42501', qr/permission denied for a worker of role "regress_worker"/,
	'others may not stop it', @granted);
is( $node->safe_psql('postgres',
		'SELECT index FROM worker_spi_workers ORDER BY index', @reader),
	"20\n30",
	'a member of pg_read_all_stats sees all workers');
error_is($node, 'postgres', 'SELECT worker_spi_stop(30)',
	'42501', qr/permission denied for function worker_spi_stop/,
	'and can do no more', @reader);
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(30)', @member),
	't', 'a member may stop it');
if ($node->pg_version >= 16)
{
	$node->safe_psql('postgres',
		'GRANT regress_worker TO regress_member WITH SET FALSE');
	error_is($node, 'postgres', "SELECT worker_spi_launch(30, 0, $role)",
		'42501', qr/permission denied for a worker of role "regress_worker"/,
		'a member that may not SET ROLE may not launch', @member);
}

# the role of the settings
reload_settings_dynamic("worker_spi.role = 'regress_worker'");
error_is($node, 'postgres', 'SELECT worker_spi_launch(31)',
	'42501', qr/permission denied for a worker of role "regress_worker"/,
	'the default role of the settings is not for everybody', @granted);
is( $node->safe_psql(
		'postgres', "SELECT worker_spi_launch(30) > 0,
			(SELECT rolname FROM worker_spi_workers WHERE index = 30),
			worker_spi_stop(30)"),
	't|regress_worker|t',
	'a superuser\'s worker has it');
reload_settings_dynamic("worker_spi.role = 'nobody'");
error_is($node, 'postgres', 'SELECT worker_spi_launch(30)', '42704',
	qr/role "nobody" does not exist/, 'a default role that does not exist');

# Change the settings of new sessions.
sub reload_settings_dynamic
{
	my ($conf) = @_;
	my ($name, $value) = $conf =~ /(\S+) = '(.*)'/;

	$node->append_conf('postgresql.conf', $conf);
	$node->reload;
	$node->poll_query_until('postgres',
		"SELECT current_setting('$name') = '$value'")
	  or die "$name did not change";
	return;
}

done_testing();
