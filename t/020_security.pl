# Who may have a worker, and what the worker may do for it: launching is for
# those it was granted to, as roles they are members of; a worker acts only for
# owners whose role it could take, of all three tables; and in a database that
# belongs to somebody else, nothing that shadows the system is taken for it.
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
CREATE TABLE schema$n.total (PRIMARY KEY (type)) INHERITS (schema$n.counted);
@{[ triggers_on('counted', 'total') =~ s/%s/schema$n/gr ]}
INSERT INTO schema$n.counted VALUES ('delta', 7);
GRANT ALL ON SCHEMA schema$n TO PUBLIC;
GRANT ALL ON schema$n.counted, schema$n.total TO PUBLIC;
EOS
$offset = -s $node->logfile;
error_is($node, 'postgres', "SELECT worker_spi_launch($n, 0, $boss)", '42501',
	qr/"boss".*"attacker".*"postgres\.schema$n\.counted"/s,
	'a worker refuses the tables of one whose role its own could not take');
is(scalar(attacks($node, $offset)), 0, 'no code of those tables has run');
is( $node->safe_psql('postgres', "SELECT to_regclass('schema$n.stuck') IS NULL"),
	't', 'and none was made beside them');

# Nor does it make tables in the schema of such a role.
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
$pid = $node->safe_psql('postgres', "SELECT worker_spi_launch($n, 0, $boss)");
folds($node, $n, 'a worker folds the tables of a role that its own is a member of');
attacks_are($node, $offset, $pid, 'clerk', ['AFTER ROW DELETE'], 'and acts as that role');
is( $node->safe_psql('postgres', <<EOS),
SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class
WHERE relnamespace = 'schema$n'::regnamespace AND relkind = 'r' AND relowner = 'clerk'::regrole
EOS
	'counted stuck total', 'and makes those that were missing as that role');

$node->safe_psql('postgres', <<EOS);
REVOKE clerk FROM boss;
INSERT INTO schema$n.counted VALUES ('delta', 7);
EOS
error_is($node, 'postgres', "SELECT worker_spi_fold($n)", '42501',
	qr/"boss".*"clerk".*schema$n/s,
	'it stops to fold those tables when its role is a member no more');
if ($node->pg_version >= 16)
{
	$node->safe_psql('postgres', 'GRANT clerk TO boss WITH SET FALSE');
	error_is($node, 'postgres', "SELECT worker_spi_fold($n)", '42501',
		qr/"boss".*"clerk".*schema$n/s,
		'a member that may not SET ROLE does not count');
	$node->safe_psql('postgres', 'GRANT clerk TO boss WITH SET TRUE');
}
$node->safe_psql('postgres', 'GRANT clerk TO boss');
folds($node, $n, 'it goes on when it is a member again');
is( $node->safe_psql('postgres', <<EOS),
SELECT sum(value), count(*), (SELECT pid FROM worker_spi_workers WHERE index = $n)
FROM schema$n.counted
EOS
	"14|1|$pid", 'in the same process');

# ------------------------------------------------------------------------
# The owner of one table is that of all three, and may create what is missing.
# ------------------------------------------------------------------------

foreach my $table ('total', 'stuck')
{
	$node->safe_psql('postgres', <<EOS);
INSERT INTO schema$n.counted VALUES ('delta', 1);
ALTER TABLE schema$n.$table OWNER TO alice;
EOS
	$offset = -s $node->logfile;
	error_is($node, 'postgres', "SELECT worker_spi_fold($n)", '42501',
		qr/"postgres\.schema$n\.$table" does not have the owner of "postgres\.schema$n\.counted"/,
		"a table $table that is somebody else's is refused and named");
	is(scalar(attacks($node, $offset)), 0, "a table $table that is somebody else's: no code has run");
	$node->safe_psql('postgres', "ALTER TABLE schema$n.$table OWNER TO clerk");
	folds($node, $n, "a table $table that is given back is folded");
}

# It does not matter which of them the superuser has.
$node->safe_psql('postgres', <<EOS);
INSERT INTO schema$n.counted VALUES ('delta', 1);
ALTER TABLE schema$n.counted OWNER TO "$superuser";
EOS
error_is($node, 'postgres', "SELECT worker_spi_fold($n)", '42501',
	qr/"boss".*"$superuser"/s, 'deltas of the superuser are not for a worker of another role');
$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");
error_is($node, 'postgres', "SELECT worker_spi_launch($n)", '42501',
	qr/"postgres\.schema$n\.(total|stuck)" does not have the owner/,
	'nor does one of the superuser mix them with those of others');
is(total($node, $n), 17, 'and all that was inserted is there');

# A launched worker makes what is missing, if its owner may.
$n = $next_index++;
$node->safe_psql('postgres', <<EOS);
CREATE SCHEMA schema$n;
GRANT USAGE ON SCHEMA schema$n TO clerk;
CREATE TABLE schema$n.counted (type text NOT NULL, value bigint NOT NULL);
ALTER TABLE schema$n.counted OWNER TO clerk;
INSERT INTO schema$n.counted VALUES ('delta', 7);
EOS
error_is($node, 'postgres', "SELECT worker_spi_launch($n)", '42501',
	qr/GRANT CREATE ON SCHEMA schema$n TO clerk/,
	'an owner who may not create tables in the schema is told to be granted that');
$node->safe_psql('postgres', "GRANT CREATE ON SCHEMA schema$n TO clerk; SELECT worker_spi_launch($n)");
folds($node, $n, 'that is all it takes');
is(rows($node, $n), 'total|7', 'and the fold is right');

# Later it needs no more than to see its tables.
$node->safe_psql('postgres', <<EOS);
REVOKE CREATE ON SCHEMA schema$n FROM clerk;
INSERT INTO schema$n.counted VALUES ('delta', 1);
EOS
folds($node, $n, 'and later the owner can do without');
$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");

# Names that others have taken: nothing of theirs is touched.
foreach my $table ('total', 'stuck')
{
	$n = $next_index++;
	$node->safe_psql('postgres', <<EOS);
CREATE SCHEMA schema$n;
GRANT ALL ON SCHEMA schema$n TO attacker;
CREATE TABLE schema$n.counted (type text NOT NULL, value bigint NOT NULL);
INSERT INTO schema$n.counted VALUES ('delta', 7);
EOS
	as($node, 'attacker', <<EOS);
CREATE TABLE schema$n.$table (type text PRIMARY KEY, value bigint, sqlstate text, reason text, since timestamptz);
CREATE TRIGGER t BEFORE INSERT OR UPDATE OR DELETE ON schema$n.$table EXECUTE FUNCTION evil.trigger();
ALTER TABLE schema$n.$table ENABLE ALWAYS TRIGGER t;
EOS
	$offset = -s $node->logfile;
	error_is($node, 'postgres', "SELECT worker_spi_launch($n)", '42P07',
		qr/"postgres\.schema$n\.$table" does not inherit.*INHERIT schema$n\.counted/s,
		"a table $table of somebody else's is in the way");
	error_is($node, 'postgres', "ALTER TABLE schema$n.$table INHERIT schema$n.counted", '42501',
		qr/must be owner/, 'nor can its owner put it there', extra_params => [ '-U', 'attacker' ]);
	is(scalar(attacks($node, $offset)), 0, "a table $table of somebody else's: no code of it has run");
	is(total($node, $n), 7, "a table $table of somebody else's: nothing is folded, and nothing lost");
}

# ------------------------------------------------------------------------
# Static workers move to a database of the attacker's, where operators, functions
# and types are waiting in public and in the worker's own schema, put before
# the system's by a search path that is set for the database.
# ------------------------------------------------------------------------

as($node, 'attacker', <<EOS, 'app');
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted (type text, value bigint);
CREATE TABLE schema1.total (PRIMARY KEY (type)) INHERITS (schema1.counted);
INSERT INTO schema1.counted VALUES ('delta', 7);
@{[ triggers_on('counted', 'total') =~ s/%s/schema1/gr ]}
CREATE SCHEMA schema2;
CREATE VIEW schema2.counted AS SELECT 'delta'::text AS type, evil.num('view', 1) AS value;
@{[ shadows() =~ s/%s/schema1/gr ]}
@{[ shadows() =~ s/%s/public/gr ]}
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
$node->wait_for_log(qr/worker_spi worker 1 initialized with app\.schema1\.counted/, $offset);
$node->wait_for_log(qr/ERROR:  "app\.schema2\.counted" is not an ordinary table/, $offset);
folds($node, 1, 'the static worker folds in that database', 'app');
is(worker($node, 1, 'rolname'), $superuser,
	'the owner of a database has no say in the role of its workers');
$pid = worker($node, 1, 'pid');
my $pid2 = worker($node, 2, 'pid');
# With its own search path the attacker runs into its own trap, over and over.
error_is($node, 'app',
	"SET application_name = 'worker_spi control'; SELECT FROM schema1.counted WHERE type = 'total'",
	'54001', qr/function evil\.attack/, 'what shadows the system is taken for it where it may be',
	extra_params => [ '-U', 'attacker' ]);
as($node, 'attacker', <<EOS, 'app');
SET search_path = pg_catalog;
INSERT INTO schema1.counted VALUES ('delta', 7);
EOS
folds($node, 1, 'and once more', 'app');
# Something that does not fit goes other ways.
as($node, 'attacker', <<EOS, 'app');
SET search_path = pg_catalog;
INSERT INTO schema1.counted VALUES ('delta', 9223372036854775807);
EOS
my $app = database_oid($node, 'app');
error_is($node, 'postgres', "SELECT worker_spi_fold(1, $app)", '22003', qr/out of range/,
	'a sum that does not fit is stuck');
as($node, 'attacker', <<EOS, 'app');
SET search_path = pg_catalog;
INSERT INTO schema1.counted VALUES ('delta', -9223372036854775807);
EOS
folds($node, 1, 'until it does', 'app');
attacks_are($node, $offset, undef, 'attacker', \@trigger_attacks,
	'nothing that shadows the system runs in a static worker, and triggers run as the attacker');
is( scalar(grep { $_->{where} =~ /operator|aggregate|function|domain|view/ } attacks($node, $offset)),
	0, 'no operator, function, type or view of the attacker was taken for another');
is( $node->safe_psql('app', <<EOS),
SELECT type, value FROM schema1.counted WHERE type OPERATOR(pg_catalog.<>) ''
EOS
	'total|14', 'a static worker folds the table that was there before it');
error_is($node, 'postgres', "SELECT worker_spi_fold(2, $app)", '42809',
	qr/"app\.schema2\.counted" is not an ordinary table/,
	'a static worker refuses the view that was there before it');
is(worker($node, 2, 'pid'), $pid2, 'and is still there');
as($node, 'attacker', 'DROP VIEW schema2.counted', 'app');
folds($node, 2, 'without the view it makes its tables', 'app');
is( $node->safe_psql('app', <<EOS),
SET search_path = pg_catalog;
SELECT string_agg(relname || ' ' || pg_get_userbyid(relowner), ' ' ORDER BY relname)
FROM pg_class WHERE relnamespace = 'schema2'::regnamespace AND relkind = 'r'
EOS
	'counted attacker stuck attacker total attacker',
	"missing tables are made as the schema's owner");
is(worker($node, 1, 'pid'), $pid, 'the first static worker is still there, too');

# ------------------------------------------------------------------------
# The highest index.
# ------------------------------------------------------------------------

$node->safe_psql('postgres', <<EOS);
SELECT worker_spi_launch(2147483647);
INSERT INTO schema2147483647.counted VALUES ('delta', 7);
EOS
folds($node, 2147483647);
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
$node->safe_psql('postgres', 'ALTER DATABASE app RESET ALL');
nothing_won($node, 'postgres', 'app');

$node->stop;
done_testing();
