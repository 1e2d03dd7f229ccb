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
# A connection that takes its time has a lock on the database, and a command
# that will be denied queues behind it.
# ------------------------------------------------------------------------
{
	local $ENV{PGOPTIONS} = '-c post_auth_delay=4';
	push @sessions, start_psql($node, 'busy', 'slow', 'SELECT 1', @as_nobody);
}
# It has no database to show before it has been let in.
$node->poll_query_until('postgres', <<'EOC') or die 'no connection has its lock';
SELECT count(*) > 0 FROM pg_locks
WHERE classid = 'pg_database'::regclass AND granted AND mode = 'RowExclusiveLock'
	AND pid NOT IN (SELECT pid FROM pg_stat_activity WHERE datname IS NOT NULL)
EOC
my $rename = start_psql($node, 'postgres', 'queued',
	'ALTER DATABASE busy RENAME TO taken', @as_nobody);
$node->poll_query_until('postgres', <<'EOC') or die 'nobody waits';
SELECT count(*) > 0 FROM pg_stat_activity
WHERE query LIKE 'ALTER DATABASE busy RENAME%' AND wait_event_type = 'Lock'
EOC
folds($node, 1, 'a worker folds while a command waits', 'busy');
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
