# Who may have a worker, and what the worker may do for it: launching is for
# those it was granted to, as roles they are members of; a worker acts only for
# owners whose role it could take; and in a database that belongs to somebody
# else, nothing that shadows the system is taken for it.
#
# It waits for launches and for worker_spi_fold(), and for lines of the log
# where static workers move by themselves.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::Attacker;
use t::WorkerSpi;

my $node = new_node('security');
my $superuser = $node->safe_psql('postgres', 'SELECT current_user');
my ($n, $pid, $offset);
my $next_index = 100;

$node->safe_psql('postgres', 'CREATE DATABASE app');
arm_attacker($node, 'postgres', 'app');

# ------------------------------------------------------------------------
# Launching is for those it was granted to, as roles they are members of.
# ------------------------------------------------------------------------

error_is($node, 'postgres', 'SELECT worker_spi_launch(99)', '42501',
	qr/permission denied for function worker_spi_launch/,
	'a plain role cannot launch a worker', extra_params => [ '-U', 'attacker' ]);

$node->safe_psql('postgres',
	'GRANT EXECUTE ON FUNCTION worker_spi_launch TO attacker');
error_is($node, 'postgres', 'SELECT worker_spi_launch(99, 0, 10)', '42501',
	qr/permission denied for a worker of role "$superuser"/,
	'one who may launch cannot launch as the superuser',
	extra_params => [ '-U', 'attacker' ]);

as($node, 'attacker', 'SELECT worker_spi_launch(99)');
is( $node->safe_psql('postgres', <<EOS),
SELECT w.rolname, a.usename FROM worker_spi_workers w JOIN pg_stat_activity a USING (pid)
WHERE index = 99
EOS
	'attacker|attacker',
	'a worker that a plain role launches is a worker of that role');
$node->safe_psql('postgres', <<EOS);
SELECT worker_spi_stop(99);
REVOKE EXECUTE ON FUNCTION worker_spi_launch FROM attacker;
EOS

# ------------------------------------------------------------------------
# A worker whose role is no superuser acts only as roles it could SET ROLE to.
# ------------------------------------------------------------------------

my $boss = $node->safe_psql('postgres', "SELECT 'boss'::regrole::oid");

$n = $next_index++;
as($node, 'attacker', <<EOS);
CREATE SCHEMA schema$n;
CREATE TABLE schema$n.counted (type text, value bigint);
CREATE TRIGGER t AFTER INSERT ON schema$n.counted EXECUTE FUNCTION evil.trigger();
ALTER TABLE schema$n.counted ENABLE ALWAYS TRIGGER t;
INSERT INTO schema$n.counted VALUES ('delta', 7);
GRANT ALL ON SCHEMA schema$n TO PUBLIC;
GRANT ALL ON schema$n.counted TO PUBLIC;
EOS
$offset = -s $node->logfile;
error_is($node, 'postgres', "SELECT worker_spi_launch($n, 0, $boss)", '42501',
	qr/"boss".*"attacker".*schema$n/s,
	'a worker refuses the table of one whose role its own could not take');
is(scalar(attacks($node, $offset)), 0, 'no code of that table has run');

# Nor does it make a table in the schema of such a role.
$n = $next_index++;
as($node, 'attacker', "CREATE SCHEMA schema$n; GRANT ALL ON SCHEMA schema$n TO PUBLIC");
error_is($node, 'postgres', "SELECT worker_spi_launch($n, 0, $boss)", '42501',
	qr/"boss".*"attacker"/s,
	'a worker makes no table in the schema of one whose role its own could not take');
is( $node->safe_psql('postgres', "SELECT to_regclass('schema$n.counted') IS NULL"),
	't', 'no table was made there');

$n = $next_index++;
as($node, 'clerk', <<EOS);
CREATE SCHEMA schema$n;
CREATE TABLE schema$n.counted (type text, value bigint);
CREATE TRIGGER t AFTER DELETE ON schema$n.counted FOR EACH ROW EXECUTE FUNCTION evil.trigger();
ALTER TABLE schema$n.counted ENABLE ALWAYS TRIGGER t;
INSERT INTO schema$n.counted VALUES ('delta', 7);
GRANT USAGE ON SCHEMA schema$n TO boss;
EOS
$offset = -s $node->logfile;
$pid = $node->safe_psql('postgres', <<EOS);
SELECT worker_spi_launch($n, 0, $boss) \\gset
SELECT worker_spi_fold($n) \\gset
\\echo :worker_spi_launch
EOS
attacks_are($node, $offset, $pid, 'clerk', ['AFTER ROW DELETE'],
	'a worker folds the table of a role that its own is a member of, as that role');

$node->safe_psql('postgres', <<EOS);
REVOKE clerk FROM boss;
INSERT INTO schema$n.counted VALUES ('delta', 7);
EOS
error_is($node, 'postgres', "SELECT worker_spi_fold($n)", '42501',
	qr/"boss".*"clerk".*schema$n/s,
	'it stops to fold that table when its role is a member no more');
if ($node->pg_version >= 16)
{
	$node->safe_psql('postgres', 'GRANT clerk TO boss WITH SET FALSE');
	error_is($node, 'postgres', "SELECT worker_spi_fold($n)", '42501',
		qr/"boss".*"clerk".*schema$n/s,
		'a member that may not SET ROLE does not count');
	$node->safe_psql('postgres', 'GRANT clerk TO boss WITH SET TRUE');
}
$node->safe_psql('postgres', <<EOS);
GRANT clerk TO boss;
SELECT worker_spi_fold($n);
EOS
is( $node->safe_psql('postgres', <<EOS),
SELECT sum(value), count(*), (SELECT pid FROM worker_spi_workers WHERE index = $n)
FROM schema$n.counted
EOS
	"14|1|$pid", 'and goes on, in the same process, when it is a member again');
$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");

# ------------------------------------------------------------------------
# Static workers move to a database of the attacker's, where operators, functions
# and types are waiting in public and in the worker's own schema, put before
# the system's by a search path that is set for the database.
# ------------------------------------------------------------------------

my $fakes = '';
my $nops = 0;
foreach my $op ([ '=', 'text' ], [ '=', 'tid' ], [ '>=', 'tid' ],
	[ '<', 'tid' ], [ '+', 'bigint', 'bigint' ])
{
	my ($name, $type, $result) = @$op;
	my $function = '%s.op' . ++$nops;
	$result //= 'boolean';
	$fakes .= <<EOS;
CREATE FUNCTION $function($type, $type) RETURNS $result LANGUAGE plpgsql AS
	'BEGIN PERFORM evil.attack(''operator''); RETURN NULL; END';
CREATE OPERATOR %s.$name (LEFTARG = $type, RIGHTARG = $type, FUNCTION = $function);
EOS
}
$fakes .= <<EOS;
CREATE FUNCTION %s.step(bigint, bigint) RETURNS bigint LANGUAGE plpgsql AS
	'BEGIN PERFORM evil.attack(''aggregate''); RETURN 0; END';
CREATE FUNCTION %s.step(bigint) RETURNS bigint LANGUAGE plpgsql AS
	'BEGIN PERFORM evil.attack(''aggregate''); RETURN 0; END';
CREATE AGGREGATE %s.sum(bigint) (SFUNC = %s.step, STYPE = bigint);
CREATE AGGREGATE %s.max(bigint) (SFUNC = %s.step, STYPE = bigint);
CREATE AGGREGATE %s.count(*) (SFUNC = %s.step, STYPE = bigint);
CREATE DOMAIN %s.text AS pg_catalog.text CHECK (evil.yes('domain'));
CREATE DOMAIN %s.int8 AS pg_catalog.int8 CHECK (evil.yes('domain'));
CREATE DOMAIN %s.bool AS pg_catalog.bool CHECK (evil.yes('domain'));
EOS
as($node, 'attacker', <<EOS . $fakes =~ s/%s/schema1/gr . $fakes =~ s/%s/public/gr, 'app');
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted (type text, value bigint);
INSERT INTO schema1.counted VALUES ('delta', 7);
@{[ $triggers =~ s/%t/schema1.counted/gr ]}
CREATE SCHEMA schema2;
CREATE VIEW schema2.counted AS SELECT 'delta'::text AS type, evil.num('view', 1) AS value;
EOS
$node->safe_psql('postgres', <<EOS);
ALTER DATABASE app OWNER TO attacker;
ALTER ROLE "$superuser" IN DATABASE app SET search_path = schema1, public, pg_catalog;
EOS
as($node, 'attacker', <<EOS);
ALTER DATABASE app SET search_path = schema1, public, pg_catalog;
ALTER DATABASE app SET row_security = on;
ALTER DATABASE app SET role = attacker;
ALTER DATABASE app SET SESSION AUTHORIZATION attacker;
EOS
$offset = -s $node->logfile;
$node->append_conf('postgresql.conf', "worker_spi.database = 'app'");
$node->reload;
$node->wait_for_log(qr/worker_spi worker 1 initialized with schema1\.counted/, $offset);
$node->wait_for_log(qr/ERROR:  "schema2\.counted" is not an ordinary table/, $offset);
fold($node, 1, 'app');
is(worker($node, 1, 'rolname'), $superuser,
	'the owner of a database has no say in the role of its workers');
$pid = worker($node, 1, 'pid');
my $pid2 = worker($node, 2, 'pid');
# With its own search path the attacker would run into its own trap.
as($node, 'attacker', <<EOS, 'app');
SET search_path = pg_catalog;
INSERT INTO schema1.counted VALUES ('delta', 7);
EOS
fold($node, 1, 'app');
attacks_are($node, $offset, undef, 'attacker', \@trigger_attacks,
	'nothing that shadows the system runs in a static worker, and triggers run as the attacker');
is( scalar(grep { $_->{where} =~ /operator|aggregate|domain|view/ } attacks($node, $offset)),
	0, 'no operator, aggregate, type or view of the attacker was taken for another');
is( $node->safe_psql('app', <<EOS),
SELECT type, value FROM schema1.counted WHERE type OPERATOR(pg_catalog.<>) ''
EOS
	'total|14', 'a static worker folds the table that was there before it');
my $app = database_oid($node, 'app');
error_is($node, 'postgres', "SELECT worker_spi_fold(2, $app)", '42809',
	qr/"schema2\.counted" is not an ordinary table/,
	'a static worker refuses the view that was there before it');
is(worker($node, 2, 'pid'), $pid2, 'and is still there');
as($node, 'attacker', 'DROP VIEW schema2.counted', 'app');
fold($node, 2, 'app');
is( $node->safe_psql('app',
		q(SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = 'schema2.counted'::regclass)),
	'attacker',
	"a missing table is made as the schema's owner");
is(worker($node, 1, 'pid'), $pid, 'the first static worker is still there, too');

# ------------------------------------------------------------------------
# The highest index.
# ------------------------------------------------------------------------

$node->safe_psql('postgres', <<EOS);
SELECT worker_spi_launch(2147483647);
INSERT INTO schema2147483647.counted VALUES ('delta', 7);
SELECT worker_spi_fold(2147483647);
EOS
is( $node->safe_psql('postgres', 'SELECT type, value FROM schema2147483647.counted'),
	'total|7', 'the worker with the highest index folds');
is( $node->safe_psql('postgres', <<EOS),
SELECT application_name FROM pg_stat_activity
JOIN worker_spi_workers USING (pid) WHERE index = 2147483647
EOS
	'worker_spi dynamic worker 2147483647', 'its name is not cut off');

# ------------------------------------------------------------------------
# All in all
# ------------------------------------------------------------------------
nothing_won($node);

$node->stop;
done_testing();
