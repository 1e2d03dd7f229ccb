# Workers give way to commands that get their database, and to no others.  Any
# role may try: the server locks the database before it finds out that the
# command is denied.  A role that may only log in does so in a loop, with all
# commands that lock a database, and makes others of them wait in a queue; no
# worker may leave for that.  The real command, which fails if workers stay for
# five seconds, still succeeds.
#
# It waits for the sessions to have been denied often enough, and for lock waits
# in pg_locks.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# Whoever leaves stays away for longer than this test.
my $node = new_node('giving_way', <<'EOC');
worker_spi.total_workers = 2
worker_spi.restart_interval = 600
log_statement = none
EOC
$node->safe_psql('postgres', 'CREATE DATABASE busy');
$node->append_conf('postgresql.conf', "worker_spi.database = 'busy'");
$node->restart;
my $busy = database_oid($node, 'busy');
$node->safe_psql('postgres',
	"SELECT worker_spi_launch(3, $busy, interruptible => true)");
folds($node, $_, undef, 'busy') foreach 1 .. 3;
$node->safe_psql('postgres', <<'EOC');
CREATE ROLE regress_nobody LOGIN;
CREATE TABLE done ();
CREATE TABLE denied (n bigint);
GRANT SELECT ON done TO regress_nobody;
GRANT INSERT ON denied TO regress_nobody;
CREATE PROCEDURE try_in_vain() LANGUAGE plpgsql AS $$
DECLARE
	command text;
BEGIN
	WHILE NOT EXISTS (SELECT FROM done) LOOP
		FOREACH command IN ARRAY ARRAY[
			'ALTER DATABASE busy RENAME TO taken',
			'ALTER DATABASE busy OWNER TO regress_nobody',
			'ALTER DATABASE busy CONNECTION LIMIT 0',
			'ALTER DATABASE busy SET naptime = 1',
			'COMMENT ON DATABASE busy IS ''taken''',
			'SECURITY LABEL ON DATABASE busy IS ''taken''',
			'GRANT CONNECT ON DATABASE busy TO regress_nobody']
		LOOP
			BEGIN
				EXECUTE command;
			EXCEPTION WHEN OTHERS THEN
				NULL;
			END;
			INSERT INTO denied VALUES (1);
			COMMIT;
		END LOOP;
	END LOOP;
END
$$;
EOC

sub pids
{
	return $node->safe_psql('postgres',
		"SELECT string_agg(index || ' ' || coalesce(pid::text, state), ', ' ORDER BY index) FROM worker_spi_workers"
	);
}
my $pids = pids();

# ------------------------------------------------------------------------
# Denied, again and again
# ------------------------------------------------------------------------
my @as_nobody = ('-U', 'regress_nobody');
my @sessions;
{
	# Warnings that nobody reads would block the session in the end.
	local $ENV{PGOPTIONS} = '-c client_min_messages=error';
	@sessions = map {
		start_psql($node, 'postgres', "vain_$_", 'CALL try_in_vain()',
			@as_nobody)
	} 1 .. 2;
}

# These cannot be tried in a procedure.
my $commands = join ";\n",
  ('DROP DATABASE busy', 'ALTER DATABASE busy SET TABLESPACE pg_default',
	'CREATE DATABASE taken TEMPLATE busy') x 50;
my ($ret, $out, $err) = $node->psql('postgres', $commands,
	on_error_stop => 0, extra_params => \@as_nobody);
my @denied = $err =~ /ERROR:  (?:must be owner|permission denied)/g;
is(scalar(@denied), 150, 'commands that cannot be in a procedure are denied');
$node->poll_query_until('postgres', 'SELECT count(*) >= 3000 FROM denied')
  or die 'commands are not denied';
is(pids(), $pids, 'commands that are denied in a loop move no worker');
foreach my $index (1 .. 3)
{
	$node->safe_psql('busy', "INSERT INTO schema$index.counted (value) VALUES (1)");
	folds($node, $index, "worker $index folds meanwhile", 'busy');
}

# ------------------------------------------------------------------------
# A connection that takes its time has a lock on the database, and a command that
# will be denied queues behind it.  It takes its time over a table that is locked,
# as any other connection would, so sessions that are there do all until then.
# ------------------------------------------------------------------------
my $holder = $node->background_psql('postgres');
$holder->query_safe('SELECT pg_advisory_lock(1)');
my $rename = start_psql($node, 'postgres', 'queued',
	'ALTER DATABASE busy RENAME TO taken',
	@as_nobody, '-c', 'SELECT pg_advisory_lock_shared(1)');
wait_for_psql($rename);
my $rename_pid = $node->safe_psql('postgres',
	"SELECT pid FROM pg_stat_activity WHERE application_name = 'queued'");

# Wait until somebody waits for such a lock.
sub wait_for_lock
{
	my ($condition) = @_;
	$holder->query_safe(<<EOC);
DO \$\$
BEGIN
	WHILE NOT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND $condition) LOOP
		PERFORM pg_sleep(0.01);
	END LOOP;
END \$\$
EOC
	return;
}
$holder->query_safe('BEGIN; LOCK TABLE pg_db_role_setting');
my $slow = start_psql($node, 'busy', 'slow', 'SELECT 1', @as_nobody);
wait_for_lock("relation = 'pg_db_role_setting'::regclass");
$holder->query_safe('SELECT pg_advisory_unlock(1)');
wait_for_lock("classid = 'pg_database'::regclass AND pid = $rename_pid");
is($holder->query_safe("SELECT worker_spi_fold(1, $busy)"),
	't', 'a worker folds while a command waits');
$holder->query_safe('COMMIT');
$holder->quit;
ok((finish_psql($slow))[2], 'the connection is made');
like((finish_psql($rename))[1], qr/must be owner of database/,
	'a command waits, and is denied');
is(pids(), $pids, 'which moves no worker');

# ------------------------------------------------------------------------
# The real one, in the midst of it
# ------------------------------------------------------------------------
($ret, $out, $err) =
  $node->psql('postgres', 'ALTER DATABASE busy RENAME TO lazy');
is($ret, 0, 'a command that is not denied succeeds') or diag($err);

$node->safe_psql('postgres', 'INSERT INTO done DEFAULT VALUES');
is((finish_psql($_))[1], '', 'no session had another error') foreach @sessions;
is( $node->safe_psql(
		'postgres',
		"SELECT string_agg(index || ' ' || kind || ' ' || state, ', ' ORDER BY index) FROM worker_spi_workers"
	),
	'1 static down, 2 static down',
	'to which all workers have given way, and the interruptible one for good');

$node->stop;
done_testing();
