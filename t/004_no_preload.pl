# Without shared_preload_libraries: launching works, with one worker for an
# index as ever; what needs shared memory says so.
#
# There is no view to ask and nobody to tell: it waits until the table shows
# that all is folded, and for lines of the log.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = PostgreSQL::Test::Cluster->new('no_preload');
$node->init;
$node->append_conf('postgresql.conf', <<EOC);
max_worker_processes = 8
worker_spi.naptime = 1
worker_spi.nonsense = 1
autovacuum = off
EOC
$node->start;
$node->safe_psql('postgres', <<EOQ);
CREATE EXTENSION worker_spi;
CREATE DATABASE other;
CREATE DATABASE closed ALLOW_CONNECTIONS false;
CREATE ROLE regress_worker LOGIN;
CREATE ROLE regress_nologin;
GRANT CREATE ON DATABASE other TO regress_worker;
GRANT EXECUTE ON FUNCTION worker_spi_launch TO regress_worker;
EOQ
my %db = map { split /\|/ } split /\n/,
  $node->safe_psql('postgres', 'SELECT datname, oid FROM pg_database');
my ($role, $nologin) = split /\|/, $node->safe_psql('postgres',
	"SELECT 'regress_worker'::regrole::oid, 'regress_nologin'::regrole::oid");

is(process_count($node), '0', 'there are no static workers');

# ------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------
my $pid = $node->safe_psql('postgres', 'SELECT worker_spi_launch(1)');
is( $node->safe_psql(
		'postgres',
		"SELECT backend_type, application_name, datname,
			usename = (SELECT rolname FROM pg_roles WHERE oid = 10)
		 FROM pg_stat_activity WHERE pid = $pid"),
	'worker_spi dynamic|worker_spi dynamic worker 1|postgres|t',
	'a worker is launched');
wait_for_fold($node, 1);
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted SELECT 'delta', i FROM generate_series(1, 10) i");
wait_for_fold($node, 1);
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|55', 'it folds after each nap');
ok( $node->log_contains(
		qr/LOG:  worker_spi dynamic worker 1 initialized with postgres\.schema1\.counted$/m),
	'and logs its start');
$node->wait_for_log(
	qr/LOG:  worker_spi dynamic worker 1: count in postgres\.schema1\.counted is now 55$/m);
pass('and its folds');

error_is($node, 'postgres', 'SELECT worker_spi_launch(1)',
	'42710', qr/a worker with index 1 already runs/,
	'a second one is refused');
is(process_count($node), '1', 'and not started');

is($node->safe_psql('postgres',
		"SELECT worker_spi_launch(1, $db{other}, $role) > 0"),
	't', 'the index is free in another database');
wait_for_fold($node, 1, 'other');
is( $node->safe_psql('other',
		"SELECT relowner::regrole FROM pg_class
		 WHERE oid = 'schema1.counted'::regclass"),
	'regress_worker',
	'where the worker has the role that was asked for');

# a cycle that fails
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES ('delta', 9223372036854775807)");
$node->wait_for_log(qr/22003/);
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES ('delta', -9223372036854775807)");
wait_for_fold($node, 1);
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|55', 'what was stuck is folded when it fits');
$node->safe_psql('postgres', <<EOQ);
ALTER TABLE schema1.counted RENAME value TO amount;
INSERT INTO schema1.counted VALUES ('delta', 0);
EOQ
$node->wait_for_log(qr/ERROR:  .*schema1\.counted" has no measure/);
$node->safe_psql('postgres',
	'ALTER TABLE schema1.counted RENAME amount TO value');
wait_for_fold($node, 1);
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|55', 'a worker survives a failed cycle');
is($node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE pid = $pid"),
	'1', 'as the same process');
error_is($node, 'postgres', 'SELECT worker_spi_launch(1)',
	'42710', qr/already runs/, 'and is still the only one of its index');

# a reload
$node->append_conf('postgresql.conf', 'worker_spi.log_folds = off');
$node->reload;
$node->append_conf('postgresql.conf', 'worker_spi.naptime = 3600');
$node->reload;
$node->append_conf('postgresql.conf', 'worker_spi.naptime = 1');
$node->reload;
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 1)");
wait_for_fold($node, 1);
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|56', 'and several reloads');

# ------------------------------------------------------------------------
# What ends a worker ends it for good
# ------------------------------------------------------------------------
my $offset = -s $node->logfile;
is($node->safe_psql('postgres', "SELECT pg_terminate_backend($pid, 60000)"),
	't', 'a worker is terminated');
is( $node->safe_psql(
		'postgres', "SELECT count(*) FROM pg_stat_activity
			WHERE application_name = 'worker_spi dynamic worker 1' AND datname = 'postgres'"),
	'0',
	'and gone');
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 1)");
is($node->safe_psql('postgres', 'SELECT worker_spi_launch(1) > 0'),
	't', 'its index is free again');
wait_for_fold($node, 1);
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|57', 'for a worker that goes on');
is( $node->safe_psql(
		'postgres', "SELECT count(*) FROM pg_stat_activity
			WHERE application_name = 'worker_spi dynamic worker 1' AND datname = 'postgres'"),
	'1',
	'the server has not restarted the other');

# ------------------------------------------------------------------------
# A launch that fails, and 20 at once
# ------------------------------------------------------------------------
$offset = -s $node->logfile;
error_is($node, 'postgres', "SELECT worker_spi_launch(2, $db{closed})",
	'53000', qr/could not start worker_spi dynamic worker 2.*HINT:.*server log/s,
	'a worker that cannot connect is an error');
ok( $node->log_contains(
		qr/FATAL:  database "closed" is not currently accepting connections/,
		$offset),
	'and the log says why');
is(process_count($node), '2', 'nothing is left of it');
is( $node->safe_psql('postgres',
		"SELECT worker_spi_launch(2, $db{closed}, flags => '{ALLOWCONN}') > 0"),
	't',
	'flags work');
error_is($node, 'postgres', "SELECT worker_spi_launch(2, 0, $nologin)",
	'53000', qr/could not start/, 'a role that may not log in');
error_is($node, 'postgres', "SELECT worker_spi_launch(2, 0, 10)",
	'42501', qr/permission denied for a worker of role/,
	'permissions are checked', extra_params => [ '-U', 'regress_worker' ]);

my $winner = launch_20_at_once($node, 20);
is( $node->safe_psql(
		'postgres', "SELECT pid FROM pg_stat_activity
			WHERE application_name = 'worker_spi dynamic worker 20'"),
	$winner,
	'it is the only one');

# a caller that is cancelled while its worker hangs before it is ready
my $starter = $node->background_psql('postgres');
$starter->query_safe('BEGIN; ALTER DATABASE template1 RENAME TO another');
my $caller = start_psql($node, 'postgres', 'caller',
	"SELECT worker_spi_launch(3, $db{template1})");
$node->poll_query_until('postgres',
	"SELECT count(*) = 2 FROM pg_locks
	 WHERE NOT granted AND locktype = 'object'
			AND classid = 'pg_database'::regclass
		OR granted AND locktype = 'object' AND classid = 22355 AND objid = 3")
  or die 'worker does not wait for its database';
$node->safe_psql('postgres',
	"SELECT pg_cancel_backend(pid) FROM pg_stat_activity
	 WHERE application_name = 'caller'");
like((finish_psql($caller))[1],
	qr/57014: canceling/, 'a caller that waits is cancelled');
is( $node->safe_psql(
		'postgres', "SELECT count(*) FROM pg_locks
			WHERE NOT granted OR locktype = 'object' AND classid = 22355 AND objid = 3"),
	'0',
	'which leaves no worker and no lock');
$starter->query_safe('ROLLBACK');
is($node->safe_psql('postgres', "SELECT worker_spi_launch(3, $db{template1}) > 0"),
	't', 'so that the index is free');
$starter->quit;

# slots
error_is($node, 'postgres',
	'SELECT worker_spi_launch(100 + i) FROM generate_series(1, 8) i',
	'53400', qr/HINT:.*"max_worker_processes", which is 8/s,
	'when no slot is left, the hint names the setting and its value');

# ------------------------------------------------------------------------
# What needs shared memory
# ------------------------------------------------------------------------
error_is($node, 'postgres', $_, '55000',
	qr/must be loaded via "shared_preload_libraries".*HINT:  Add worker_spi/s,
	"needs preload: $_")
  foreach 'SELECT worker_spi_fold(1)', 'SELECT worker_spi_fold(1, wait => false)',
  'SELECT worker_spi_stop(1)', 'SELECT * FROM worker_spi_workers';

is( $node->safe_psql(
		'postgres',
		"LOAD 'worker_spi';
		 SELECT name, setting FROM pg_settings WHERE name LIKE 'worker\\_spi.%'
		 ORDER BY name"),
	"worker_spi.database|postgres\nworker_spi.log_folds|off\n"
	  . "worker_spi.naptime|1\nworker_spi.notify|off\nworker_spi.role|\n"
	  . 'worker_spi.wake_delay|50',
	'the settings of the server start are not there, the others are');
error_is($node, 'postgres',
	"LOAD 'worker_spi'; SET worker_spi.nonsense = 1",
	'42602', qr/reserved prefix/, 'the prefix is reserved');

# the trigger does nothing, but is there
is( $node->safe_psql('postgres', <<EOQ), '', 'a wake trigger does not disturb');
CREATE TRIGGER wake AFTER INSERT ON schema1.counted
	FOR EACH STATEMENT EXECUTE FUNCTION worker_spi_wake();
INSERT INTO schema1.counted VALUES ('delta', 1);
EOQ
wait_for_fold($node, 1);
is($node->safe_psql('postgres', 'TABLE schema1.counted'),
	'total|58', 'what it counts is folded after the nap');

# A launch is for the database of the caller; the role is that of the settings.
$node->append_conf('postgresql.conf',
	"worker_spi.database = 'nowhere'\nworker_spi.role = 'regress_worker'");
$node->restart;
$node->safe_psql('other', 'CREATE EXTENSION worker_spi');
$pid = $node->safe_psql('other', 'SELECT worker_spi_launch(1)');
is( $node->safe_psql(
		'postgres',
		"SELECT datname, usename FROM pg_stat_activity WHERE pid = $pid"),
	'other|regress_worker',
	'a launch takes the database of the caller and the role of the settings');
is(process_count($node), '1',
	'no worker of before has survived the restart');

done_testing();
