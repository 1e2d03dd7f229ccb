# Static workers in several databases: each database of the list has its own,
# they come back with the server and with a promotion, and a reload takes the
# list as a set: who is still in it stays, the others take over what is new.
# What is malformed, missing or too much is said in the log and in the view, and
# disturbs nobody.  (053 says more of workers that are missing.)
#
# It waits for the view to show which worker serves what, and for a changed
# naptime where a reload is to change nothing.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('databases', <<'EOC', allows_streaming => 1);
worker_spi.total_workers = 2
restart_after_crash = on
EOC
foreach my $db ('app', 'shop', 'blog')
{
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION worker_spi');
}

# Who naps where: "database:index ..."
sub serving
{
	my ($server) = @_;
	return $server->safe_psql('postgres',
		"SELECT string_agg(datname || ':' || index, ' ' ORDER BY datname COLLATE \"C\", index) FROM worker_spi_workers WHERE state = 'idle'"
	);
}

# Wait until exactly these databases are served, by two workers each.
sub wait_for_databases
{
	my ($server, @databases) = @_;
	my $expected = join ' ', map { ("$_:1", "$_:2") } sort @databases;
	my $tries = 10 * $PostgreSQL::Test::Utils::timeout_default;

	# The names may have quotes, so the comparison is made here.
	while (serving($server) ne $expected && $tries--) { }
	is(serving($server), $expected,
		'workers serve ' . join(' and ', @databases));
	return;
}

# Each worker folds the table of its own database.
sub all_fold
{
	my ($server, $value, @databases) = @_;

	foreach my $db (@databases)
	{
		$server->safe_psql($db, "INSERT INTO schema$_.counted (value) VALUES ($value)")
		  foreach 1, 2;
		is( $server->safe_psql(
				$db,
				'SELECT worker_spi_fold(1), worker_spi_fold(2)'),
			't|t',
			"the workers of $db are the ones that its sessions mean");
		is( $server->safe_psql(
				$db, <<EOQ),
SELECT (SELECT count(*) FROM ONLY schema1.counted), (SELECT count(*) FROM schema1.total),
	(SELECT count(*) FROM ONLY schema2.counted), (SELECT count(*) FROM schema2.total)
EOQ
			'0|1|0|1',
			"and fold its tables");
	}
	return;
}

# The processes, by database.
sub processes
{
	my ($server, @databases) = @_;
	return join ' ',
	  map { "$_: " . worker($server, 1, 'pid', $_) . ' ' . worker($server, 2, 'pid', $_) }
	  @databases;
}

# Change the list, and have the running workers read it.
sub reload_list
{
	my ($list) = @_;
	$node->append_conf('postgresql.conf', "worker_spi.database = '$list'");
	$node->reload;
	return;
}

# ------------------------------------------------------------------------
# At server start
# ------------------------------------------------------------------------
$node->append_conf('postgresql.conf', "worker_spi.database = 'app, shop'");
$node->restart;
wait_for_databases($node, 'app', 'shop');
all_fold($node, 1, 'app', 'shop');
is($node->safe_psql('postgres', 'SELECT worker_spi_fold(1)'),
	'f', 'a database that is not in the list has no worker');
folds($node, 1, 'but its sessions can name those of another', 'shop');
$node->safe_psql('app', 'INSERT INTO schema1.counted (value) VALUES (41)');
folds($node, 1, undef, 'app');
is( rows($node, 1, undef, 'app') . ' ' . rows($node, 1, undef, 'shop'),
	'total|42 total|1',
	'workers of the same index count apart');
is( $node->safe_psql(
		'postgres',
		"SELECT string_agg(DISTINCT kind, ' '), count(DISTINCT pid) FROM worker_spi_workers"
	),
	'static|4',
	'they are four static workers');

# ------------------------------------------------------------------------
# Reloads that move nobody
# ------------------------------------------------------------------------
my $before = processes($node, 'app', 'shop');
foreach my $list ('shop, app', ' app ,shop', '"shop","app"')
{
	reload_settings($node, "worker_spi.database = '$list'", 1, 2);
	is(processes($node, 'app', 'shop'),
		$before, "a reload with the list '$list' moves nobody");
}
my $offset = -s $node->logfile;
reload_settings($node, "worker_spi.database = 'blog, shop, app'", 1, 2);
is(processes($node, 'app', 'shop'),
	$before, 'nor does one that puts another database in front');
is( $node->safe_psql(
		'postgres',
		"SELECT string_agg(datname || ':' || index, ' ' ORDER BY index) FROM worker_spi_workers WHERE state = 'missing'"
	),
	'blog:1 blog:2',
	'the workers of which are missing');
my @lines =
  grep { /worker_spi\.database.*server start/ } server_lines($node, $offset);
is(scalar(@lines), 1, 'as one line of the log says');
like($lines[0], qr/WARNING:  .*names 3 databases.*workers for 2.*next server start/,
	'which is a warning that tells when they come');

foreach my $list ('app, shop, app', 'app, "shop', 'app,,shop', 'app shop')
{
	$offset = -s $node->logfile;
	reload_settings($node, "worker_spi.database = '$list'", 1, 2);
	is(processes($node, 'app', 'shop'),
		$before, "the list '$list' is refused, and moves nobody");
	ok( $node->log_contains(
			qr/invalid value for parameter "worker_spi\.database"/, $offset),
		'which the log says');
}

# ------------------------------------------------------------------------
# Longer at the next start, and then others, and fewer
# ------------------------------------------------------------------------
reload_settings($node, "worker_spi.database = 'blog, shop, app'", 1, 2);
$node->restart;
wait_for_databases($node, 'blog', 'shop', 'app');
all_fold($node, 1, 'blog', 'shop', 'app');

$before = processes($node, 'app', 'blog');
$node->safe_psql('postgres', 'CREATE DATABASE wiki');
$node->safe_psql('wiki', 'CREATE EXTENSION worker_spi');
reload_list('wiki, app, blog');
wait_for_databases($node, 'wiki', 'app', 'blog');
is(processes($node, 'app', 'blog'),
	$before, 'workers of what has left the list take over what is new, and nobody else moves');
all_fold($node, 1, 'wiki', 'app', 'blog');

$before = processes($node, 'app');
reload_list('app');
$node->poll_query_until('postgres',
	"SELECT count(*) = 4 FROM worker_spi_workers WHERE state = 'stopped'")
  or die 'workers did not stop';
is(serving($node), 'app:1 app:2', 'with a shorter list, only its workers are left');
is(processes($node, 'app'), $before, 'as they were');
error_is($node, 'blog', 'SELECT worker_spi_fold(1)', '55000', qr/./,
	'the others are stopped');
is( $node->safe_psql(
		'blog', 'SELECT worker_spi_launch(1) > 0, worker_spi_fold(1)'),
	't|t',
	'and can be launched again');
is(worker($node, 1, 'kind', 'blog'), 'static', 'as static workers');
$node->restart;
wait_for_databases($node, 'app');
is(worker($node, 1, 'count(*)'), '1', 'at the next start they are forgotten');

# ------------------------------------------------------------------------
# Databases that are not there
# ------------------------------------------------------------------------
reload_list('app, later');
$node->restart;
$node->poll_query_until('postgres',
	"SELECT count(*) = 2 FROM worker_spi_workers WHERE datname = 'later' AND last_sqlstate = '3D000'"
) or die 'no worker has missed its database';
all_fold($node, 1, 'app');
$before = processes($node, 'app');
$node->safe_psql('postgres', 'CREATE DATABASE later');
wait_for_databases($node, 'app', 'later');
is(processes($node, 'app'), $before,
	'workers of a database that is missing wait for it, and hinder nobody');
$node->safe_psql('later', 'CREATE EXTENSION worker_spi');
all_fold($node, 1, 'later');

$node->safe_psql('postgres', 'DROP DATABASE later WITH (FORCE)');
$node->poll_query_until('postgres',
	"SELECT count(*) = 2 FROM worker_spi_workers WHERE datname = 'later' AND state = 'down'"
) or die 'workers are not down';
reload_list('shop, app');
wait_for_databases($node, 'app', 'shop');
is(processes($node, 'app'), $before,
	'who has lost its database takes over another one of the list');

# ------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------
my %names = (
	'Capital' => 'Capital',
	'with space' => '"with space"',
	'com,ma' => '"com,ma"',
	'qu"ote' => '"qu""ote"',
	"it's" => "it's",
	'select' => 'select');
$node->safe_psql('postgres', 'CREATE DATABASE ' . '"' . s/"/""/gr . '"')
  foreach sort keys %names;
my $list = join ', ', map { $names{$_} } sort keys %names;
$node->append_conf('postgresql.conf',
	"worker_spi.database = '" . ($list =~ s/'/''/gr) . "'");
$node->restart;
wait_for_databases($node, sort keys %names);
is( $node->safe_psql(
		'postgres',
		"SELECT count(*) FROM worker_spi_workers JOIN pg_stat_activity AS a USING (pid, datname)"
	),
	'12',
	'whatever their names, databases have workers of their own');

# ------------------------------------------------------------------------
# A list that cannot be used at server start
# ------------------------------------------------------------------------
foreach my $list ('app, shop, app', '"app')
{
	$node->append_conf('postgresql.conf', "worker_spi.database = '$list'");
	$offset = -s $node->logfile;
	$node->restart;
	is($node->safe_psql('postgres', 'SELECT count(*) FROM worker_spi_workers'),
		'0', "a server started with the list '$list' has no static worker");
	is( scalar(
			grep { /worker_spi/ && /database/ } server_lines($node, $offset)),
		1,
		'and one line of the log says why');
	is(process_count($node), '0', 'in no database');
	is( $node->safe_psql('app', 'SELECT worker_spi_launch(1) > 0, worker_spi_stop(1)'),
		't|t',
		'dynamic workers are possible all the same');
}

# ------------------------------------------------------------------------
# More workers than the server has room for.  Its own launcher for logical
# replication needs one, too.
# ------------------------------------------------------------------------
$node->append_conf('postgresql.conf', <<'EOC');
worker_spi.database = 'app, shop, blog'
max_worker_processes = 4
EOC
$offset = -s $node->logfile;
$node->restart;
$node->poll_query_until('postgres',
	"SELECT count(*) = 3 FROM worker_spi_workers WHERE state = 'idle'")
  or die 'not three workers';
@lines =
  grep { /max_worker_processes/ } server_lines($node, $offset);
is(scalar(@lines), 1, 'too few max_worker_processes are one line in the log');
like($lines[0], qr/WARNING:  .*\b7\b/, 'a warning, which has the number that is needed');
$node->append_conf('postgresql.conf', 'max_worker_processes = 7');
$offset = -s $node->logfile;
$node->restart;
wait_for_databases($node, 'app', 'shop', 'blog');
ok(!$node->log_contains(qr/max_worker_processes/, $offset),
	'and is enough');

# ------------------------------------------------------------------------
# A crash, and a promotion
# ------------------------------------------------------------------------
my $victim = $node->background_psql('postgres');
crash($node, $victim->query_safe('SELECT pg_backend_pid()'))
  or die 'no crash';
eval { $victim->quit };
wait_for_databases($node, 'app', 'shop', 'blog');
all_fold($node, 1, 'app', 'shop', 'blog');

$node->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'backup', has_streaming => 1);
$standby->start;
$node->safe_psql($_, 'INSERT INTO schema2.counted (value) VALUES (100)')
  foreach 'app', 'shop', 'blog';
$node->wait_for_catchup($standby, 'replay', $node->lsn('insert'));
is( $standby->safe_psql(
		'postgres',
		"SELECT count(*) FROM worker_spi_workers WHERE kind = 'static' AND pid IS NULL"
	),
	'6',
	'the standby has all of them yet to start');
my $sum = total($standby, 2, 'shop');
$standby->promote;
foreach my $db ('app', 'shop', 'blog')
{
	wait_for_fold($standby, 2, $db);
}
wait_for_databases($standby, 'app', 'shop', 'blog');
is(rows($standby, 2, undef, 'shop'), "total|$sum",
	'after the promotion all are folded');

$standby->stop;
$node->stop;
done_testing();
