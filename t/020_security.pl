# A role that may create schemas makes the worker's table first, or adds to it
# later, and puts code wherever a table can have some.  None of that code may
# run as anybody but the table's owner, reach the worker's own role, outlast
# the fold or end the worker; whatever is legitimate must fold all the same.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('security');
my $superuser = $node->safe_psql('postgres', 'SELECT current_user');
my $loot = PostgreSQL::Test::Utils::tempdir() . '/loot';
my $next_index = 100;

# Run $sql as a role.
sub as
{
	my ($role, $sql, $db) = @_;
	return $node->safe_psql($db // 'postgres', $sql,
		extra_params => [ '-U', $role ]);
}

# What the attacker's code has reported to the server log since $offset.
sub attacks
{
	my ($offset) = @_;
	my @found;

	foreach (split /\n/, slurp_file($node->logfile, $offset))
	{
		next unless /\[(\d+)\] .*LOG:  attack\|(.*?)\|(.*?)\|(.*?)\|(.*)$/;
		push @found,
		  { pid => $1, where => $2, user => $3, path => $4, won => $5 };
	}
	return @found;
}

# The code in each of @$expected did run since $offset, in process $pid, and
# all that ran was $role's: with his rights, and nothing else within reach.
sub attacks_are
{
	my ($offset, $pid, $role, $expected, $test) = @_;
	my @found = attacks($offset);
	my %seen = map { $_->{where} => 1 } @found;
	my @missing = grep { !$seen{$_} } @$expected;
	my @wrong = grep {
			 $_->{user} ne $role
		  || $_->{path} ne 'pg_catalog, pg_temp'
		  || $_->{won} ne ''
		  || ($pid && $_->{pid} != $pid)
	} @found;

	ok(!@missing && !@wrong, $test)
	  or diag("missing: @missing; wrong: ",
		map { join('|', %$_) . "\n" } @wrong);
	return;
}

# ---------------------------------------------------------------------------
# The attacker, a plain role, and his tools.
# ---------------------------------------------------------------------------

# The file tells whether COPY ... TO PROGRAM was possible.  Creating in public
# was everybody's right in databases made by servers before 15.
my $setup = <<"EOS";
GRANT CREATE ON SCHEMA public TO attacker;
GRANT CREATE ON DATABASE %db TO attacker, alice, clerk;
CREATE SCHEMA evil AUTHORIZATION attacker;
GRANT USAGE ON SCHEMA evil TO alice, clerk;
EOS
my $tools = <<"EOS";
-- Report who runs this, and what he can do that the attacker cannot.
CREATE FUNCTION evil.attack(place text) RETURNS void LANGUAGE plpgsql AS \$\$
DECLARE
	who text := current_user;
	path text := current_setting('search_path');
	won text := '';
	cmd text;
BEGIN
	IF current_setting('application_name') NOT LIKE 'worker!_spi%' ESCAPE '!' THEN
		RETURN;
	END IF;
	FOREACH cmd IN ARRAY ARRAY[
		'ALTER ROLE attacker SUPERUSER',
		'CREATE ROLE loot SUPERUSER',
		'UPDATE pg_catalog.pg_authid SET rolsuper = true',
		'COPY (SELECT 1) TO PROGRAM ''touch $loot''',
		'SELECT pg_read_file(''PG_VERSION'')',
		'CREATE FUNCTION evil.c() RETURNS void LANGUAGE c AS ''nowhere'', ''f''',
		'SET ROLE "$superuser"',
		'SET ROLE alice',
		'SET ROLE NONE',
		'RESET ROLE',
		'SET SESSION AUTHORIZATION "$superuser"',
		'SET SESSION AUTHORIZATION DEFAULT',
		'RESET SESSION AUTHORIZATION',
		'SELECT set_config(''role'', ''$superuser'', false)',
		'SELECT set_config(''session_authorization'', ''$superuser'', false)',
		'SET session_replication_role = replica',
		'DECLARE later CURSOR WITH HOLD FOR SELECT evil.attack(''cursor'')',
		'PREPARE later AS SELECT evil.attack(''prepared statement'')',
		'CREATE TEMP TABLE later (i int)',
		'LISTEN worker_spi']
	LOOP
		BEGIN
			EXECUTE cmd;
			won := won || cmd || '; ';
		EXCEPTION WHEN OTHERS THEN
		END;
	END LOOP;
	IF current_user <> who THEN
		won := won || 'became ' || current_user;
	END IF;
	RAISE LOG 'attack|%|%|%|%', place, who, path, won;
	FOREACH cmd IN ARRAY ARRAY['pg_cancel_backend', 'pg_terminate_backend'] LOOP
		BEGIN
			EXECUTE format('SELECT %I(pg_backend_pid())', cmd);
		EXCEPTION WHEN OTHERS THEN
		END;
	END LOOP;
END \$\$;

CREATE FUNCTION evil.trigger() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	PERFORM evil.attack(concat_ws(' ', TG_WHEN, TG_LEVEL, TG_OP));
	RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END \$\$;

-- For places that take an immutable function only.  The lie is needed.
CREATE FUNCTION evil.num(place text, result bigint) RETURNS bigint
LANGUAGE plpgsql IMMUTABLE AS \$\$
BEGIN
	PERFORM evil.attack(place);
	RETURN result;
END \$\$;
CREATE FUNCTION evil.yes(place text) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE AS \$\$
BEGIN
	PERFORM evil.attack(place);
	RETURN true;
END \$\$;
EOS

# Nobody is trusted with more than he needs: alice and clerk are two who use
# the same database, boss a member of clerk.
$node->safe_psql('postgres', <<EOS);
CREATE ROLE attacker LOGIN;
CREATE ROLE alice LOGIN;
CREATE ROLE clerk LOGIN;
CREATE ROLE boss LOGIN;
GRANT clerk TO boss;
CREATE DATABASE app;
CREATE FOREIGN DATA WRAPPER nothing;
GRANT USAGE ON FOREIGN DATA WRAPPER nothing TO attacker;
EOS
foreach my $db ('postgres', 'app')
{
	$node->safe_psql($db, $setup =~ s/%db/$db/r);
	as('attacker', $tools, $db);
}

# ---------------------------------------------------------------------------
# Launching is for those it was granted to, as roles they are members of.
# ---------------------------------------------------------------------------

error_is($node, 'postgres', 'SELECT worker_spi_launch(99)', '42501',
	qr/permission denied for function worker_spi_launch/,
	'a plain role cannot launch a worker', extra_params => [ '-U', 'attacker' ]);

$node->safe_psql('postgres',
	'GRANT EXECUTE ON FUNCTION worker_spi_launch TO attacker');
error_is($node, 'postgres', 'SELECT worker_spi_launch(99, 0, 10)', '42501',
	qr/permission denied for a worker of role "$superuser"/,
	'one who may launch cannot launch as the superuser',
	extra_params => [ '-U', 'attacker' ]);

as('attacker', 'SELECT worker_spi_launch(99)');
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

# ---------------------------------------------------------------------------
# Code in the table, which the worker meets or finds added.
#
# In each case %s is the schema and %t the table.  The attacker runs "table"
# and "insert" (two deltas, together 7), the superuser launches the worker, the
# attacker runs "later" and "insert" once more.  Without a "table" there is only
# the schema, and nothing to insert into, before the worker.  What then is to
# happen:
#	attacks		places where his code has to have run
#	refused		the error of the launch, if it has to fail
#	fails		the error of the fold after "later", if it has to fail;
#				"cure" then makes it work
# ---------------------------------------------------------------------------

my $plain = 'CREATE TABLE %t (type text NOT NULL, value bigint NOT NULL);';
my $plain_insert = "INSERT INTO %t VALUES ('delta', 3), ('delta', 4);";

# Triggers of each level and time, for the events that a fold causes.
my $triggers = join "\n", map {
	my ($time, $level) = @$_;
	"CREATE TRIGGER ${time}_$level $time INSERT OR UPDATE OR DELETE ON %t"
	  . " FOR EACH $level EXECUTE FUNCTION evil.trigger();"
} ([ 'BEFORE', 'STATEMENT' ], [ 'AFTER', 'STATEMENT' ],
	[ 'BEFORE', 'ROW' ], [ 'AFTER', 'ROW' ]);
my @trigger_attacks;
foreach my $time ('BEFORE', 'AFTER')
{
	foreach my $level ('ROW', 'STATEMENT')
	{
		push @trigger_attacks,
		  map { "$time $level $_" } ('INSERT', 'UPDATE', 'DELETE');
	}
}

# A trigger that keeps something from being written.
sub suppress
{
	my ($event) = @_;
	return <<EOS;
CREATE FUNCTION %s.suppress() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER suppress BEFORE $event ON %t FOR EACH ROW
WHEN (current_setting('application_name') LIKE 'worker%') EXECUTE FUNCTION %s.suppress();
EOS
}
my $unsuppress = 'DROP TRIGGER suppress ON %t;';

my @cases = (
	{
		name => 'row and statement triggers',
		table => $plain . $triggers,
		attacks => \@trigger_attacks
	},
	{
		name => 'triggers on the table that the worker made',
		table => '',
		later => $triggers,
		attacks => [ grep { $_ !~ /ROW UPDATE/ } @trigger_attacks ]
	},
	{
		name => 'deferred constraint triggers',
		table => $plain . <<'EOS',
CREATE CONSTRAINT TRIGGER later AFTER INSERT OR UPDATE OR DELETE ON %t
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.trigger();
EOS
		attacks => [ 'AFTER ROW INSERT', 'AFTER ROW UPDATE', 'AFTER ROW DELETE' ]
	},
	{
		name => 'a deferred constraint trigger on another table',
		table => $plain . <<'EOS',
CREATE TABLE %s.other (i int);
CREATE CONSTRAINT TRIGGER later AFTER INSERT ON %s.other
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.trigger();
CREATE FUNCTION %s.other() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN INSERT INTO %s.other VALUES (1); RETURN NULL; END';
CREATE TRIGGER other AFTER DELETE ON %t EXECUTE FUNCTION %s.other();
EOS
		attacks => ['AFTER ROW INSERT']
	},
	{
		name => 'a trigger that defers the constraint triggers',
		table => $plain,
		later => <<'EOS',
CREATE CONSTRAINT TRIGGER later AFTER DELETE ON %t
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.trigger();
CREATE FUNCTION %s.defer() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN SET CONSTRAINTS ALL DEFERRED; RETURN OLD; END';
CREATE TRIGGER defer BEFORE DELETE ON %t FOR EACH ROW EXECUTE FUNCTION %s.defer();
EOS
		fails => [ '42501', qr/cannot fire deferred trigger within security-restricted operation/ ],
		cure => 'DROP TRIGGER defer ON %t;',
		attacks => ['AFTER ROW DELETE']
	},
	{
		name => 'a deferred foreign key and a deferred unique constraint',
		table => <<'EOS',
CREATE TABLE %s.pages (page text PRIMARY KEY);
INSERT INTO %s.pages VALUES ('home');
CREATE TABLE %t (type text, value bigint, page text
	REFERENCES %s.pages DEFERRABLE INITIALLY DEFERRED,
	UNIQUE (type, value, page) DEFERRABLE INITIALLY DEFERRED);
EOS
		insert => "DELETE FROM %t WHERE type = 'delta';"
		  . "INSERT INTO %t VALUES ('delta', 3, 'home'), ('delta', 4, 'home');"
	},
	{
		name => 'functions in CHECK constraints, generated columns and defaults',
		table => <<'EOS',
CREATE TABLE %t (type text CHECK (evil.num('check', value) = value),
	value bigint DEFAULT evil.num('default', 0),
	double bigint GENERATED ALWAYS AS (evil.num('generated', value)) STORED,
	CHECK (evil.yes('table check')));
EOS
		insert => "INSERT INTO %t (type, value) VALUES ('delta', 3), ('delta', 4);",
		attacks => [ 'check', 'generated', 'table check' ]
	},
	{
		name => 'functions in indexes',
		table => $plain . <<'EOS',
CREATE INDEX ON %t (evil.num('index', value));
CREATE INDEX ON %t (value) WHERE evil.num('predicate', value) > 0;
CREATE UNIQUE INDEX ON %t (evil.num('unique', value)) WHERE type = 'delta' AND evil.yes('constant');
EOS
		attacks => [ 'index', 'predicate', 'constant' ]
	},
	{
		name => 'a partition key function',
		table => <<'EOS',
CREATE TABLE %s.parent (type text, value bigint) PARTITION BY LIST (evil.num('partition ' || type, 1));
CREATE TABLE %t PARTITION OF %s.parent FOR VALUES IN (1);
EOS
		attacks => ['partition total']
	},
	{
		name => 'an inherited CHECK constraint',
		table => <<'EOS',
CREATE TABLE %s.parent (type text, value bigint, CHECK (evil.num('inherited', value) = value));
CREATE TABLE %t () INHERITS (%s.parent);
EOS
		attacks => ['inherited']
	},
	{
		name => 'key columns of a domain, an enum and a composite type',
		table => <<'EOS',
CREATE DOMAIN %s.name AS text CHECK (evil.yes('domain') AND VALUE <> '');
CREATE TYPE %s.kind AS ENUM ('a', 'b');
CREATE TYPE %s.pair AS (x int, y text);
CREATE TABLE %t (type text, value bigint, page %s.name, kind %s.kind, pair %s.pair);
EOS
		insert => "INSERT INTO %t VALUES ('delta', 3, 'p', 'a', (1, '2')),"
		  . "('delta', 4, NULL, 'b', NULL);"
	},
	{
		name => 'key columns with hostile names',
		table => <<'EOS',
CREATE TABLE %t (type text, value bigint,
	"a""; SELECT evil.attack('name'); --" int, "b'); DROP TABLE %t; --" int,
	"deltas" int, "total" int, "rows" int, "k3" int, "%t" int, "excluded" int);
EOS
		insert => "INSERT INTO %t VALUES ('delta', 3), ('delta', 4);"
	},
	{
		name => 'row security that the owner is exempt from',
		table => $plain . <<'EOS'
ALTER TABLE %t ENABLE ROW LEVEL SECURITY;
CREATE POLICY hide ON %t USING (evil.yes('policy') AND value < 4);
EOS
	},
	{
		name => 'row security that hides deltas from the owner too',
		table => $plain . <<'EOS',
CREATE POLICY hide ON %t USING (evil.yes('policy') AND value < 4) WITH CHECK (true);
ALTER TABLE %t ENABLE ROW LEVEL SECURITY;
EOS
		later => 'ALTER TABLE %t FORCE ROW LEVEL SECURITY;',
		fails => [ '42501', qr/query would be affected by row-level security policy for table "counted"/ ],
		cure => 'ALTER TABLE %t NO FORCE ROW LEVEL SECURITY;'
	},
	{
		name => 'a trigger that suppresses the delete',
		table => $plain,
		later => suppress('DELETE'),
		fails => [ '27000', qr/cannot fold table/ ],
		cure => $unsuppress
	},
	{
		name => 'a trigger that suppresses the insert of the total',
		table => $plain . suppress('INSERT'),
		fails => [ '27000', qr/cannot fold table/ ],
		cure => $unsuppress
	},
	{
		name => 'a trigger that suppresses the update of the total',
		table => $plain,
		later => suppress('UPDATE'),
		fails => [ '27000', qr/cannot fold table/ ],
		cure => $unsuppress
	},
	{
		name => 'a trigger that deletes the other deltas first',
		table => $plain,
		later => <<'EOS',
CREATE FUNCTION %s.others() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN DELETE FROM %t WHERE ctid <> OLD.ctid AND type = ''delta''; RETURN OLD; END';
CREATE TRIGGER others BEFORE DELETE ON %t FOR EACH ROW
WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION %s.others();
EOS
		fails => [ '27000', qr/./ ],
		cure => 'DROP TRIGGER others ON %t;'
	},
	{
		name => 'a trigger that calls itself for ever',
		table => $plain,
		later => <<'EOS',
CREATE FUNCTION %s.more() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN UPDATE %t SET value = 0 WHERE type = ''delta''; RETURN NEW; END';
CREATE TRIGGER more AFTER UPDATE ON %t EXECUTE FUNCTION %s.more();
EOS
		fails => [ '54001', qr/stack depth limit exceeded/ ],
		cure => 'DROP TRIGGER more ON %t;'
	},
	{
		name => 'a rule',
		table => $plain,
		later => <<'EOS',
CREATE RULE steal AS ON DELETE TO %t DO ALSO SELECT evil.attack('rule');
EOS
		fails => [ '42809', qr/table "%t" has rules/ ],
		cure => 'DROP RULE steal ON %t;'
	},
	{
		name => 'a trigger that renames the table and puts another there',
		table => $plain . 'CREATE TABLE %s.spare (LIKE %t);',
		later => <<'EOS',
CREATE FUNCTION %s.swap() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN ALTER TABLE %t RENAME TO away; ALTER TABLE %s.spare RENAME TO counted; RETURN NULL; END';
CREATE TRIGGER swap AFTER UPDATE ON %t EXECUTE FUNCTION %s.swap();
EOS
		fails => [ '55006', qr/table "%t" was replaced while it was being folded/ ],
		cure => 'DROP TRIGGER swap ON %t;'
	},
	{
		name => 'a trigger that asks for a retry for ever',
		table => $plain,
		later => <<'EOS',
CREATE FUNCTION %s.again() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN RAISE ''try again'' USING ERRCODE = ''40001''; END';
CREATE TRIGGER again BEFORE DELETE ON %t EXECUTE FUNCTION %s.again();
EOS
		fails => [ '40001', qr/try again/ ],
		cure => 'DROP TRIGGER again ON %t;'
	},
	{
		name => 'a view',
		table => <<'EOS',
CREATE VIEW %t AS SELECT 'delta'::text AS type, evil.num('view', 1) AS value;
CREATE FUNCTION %s.instead() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN PERFORM evil.attack(''view''); RETURN NULL; END';
CREATE TRIGGER instead INSTEAD OF INSERT OR DELETE ON %t FOR EACH ROW EXECUTE FUNCTION %s.instead();
EOS
		insert => '',
		refused => [ '42809', qr/"%t" is not an ordinary table/ ]
	},
	{
		name => 'a materialized view',
		table => "CREATE MATERIALIZED VIEW %t AS SELECT 'delta'::text AS type, 1::bigint AS value;",
		insert => '',
		refused => [ '42809', qr/"%t" is not an ordinary table/ ]
	},
	{
		name => 'a foreign table',
		table => <<'EOS',
CREATE SERVER %s FOREIGN DATA WRAPPER nothing;
CREATE FOREIGN TABLE %t (type text, value bigint) SERVER %s;
EOS
		insert => '',
		refused => [ '42809', qr/"%t" is not an ordinary table/ ]
	},
	{
		name => 'a partitioned table',
		table => <<'EOS',
CREATE TABLE %t (type text, value bigint) PARTITION BY LIST (type);
CREATE TABLE %s.part PARTITION OF %t DEFAULT;
EOS
		refused => [ '42809', qr/"%t" is not an ordinary table/ ]
	},
	{
		name => 'a type',
		table => 'CREATE DOMAIN %t AS text CHECK (evil.yes(VALUE));',
		insert => '',
		refused => [ '42710', qr/type "counted" already exists/ ]
	},
	{
		name => 'a value column of a domain',
		table => <<'EOS',
CREATE DOMAIN %s.amount AS bigint CHECK (evil.num('domain', VALUE) > 0);
CREATE TABLE %t (type text, value %s.amount);
EOS
		refused => [ '42804', qr/column "value" of table "%t" has type/ ]
	});

foreach my $case (@cases)
{
	my $index = $next_index++;
	my $name = $case->{name};
	my $expand = sub {
		my ($text) = @_;
		$text =~ s/%t/schema$index.counted/g;
		$text =~ s/%s/schema$index/g;
		return $text;
	};
	my $insert = $expand->($case->{insert} // $plain_insert);
	my $sum = 0;

	as('attacker', $expand->("CREATE SCHEMA %s; $case->{table}"));
	unless ($case->{table} eq '')
	{
		as('attacker', $insert);
		$sum += 7;
	}

	my $offset = -s $node->logfile;
	if ($case->{refused})
	{
		my ($sqlstate, $pattern) = @{ $case->{refused} };
		error_is($node, 'postgres', "SELECT worker_spi_launch($index)",
			$sqlstate, $expand->($pattern), "$name: the launch is refused");
		is( $node->safe_psql('postgres',
				"SELECT count(*) FROM worker_spi_workers WHERE index = $index"),
			'0',
			"$name: no worker is left");
		attacks_are($offset, undef, 'attacker', [], "$name: no code got to anybody else");
		next;
	}

	# What fails here shows below.
	my (undef, $pid) =
	  $node->psql('postgres', "SELECT worker_spi_launch($index)");

	as('attacker', $expand->($case->{later} // '') . $insert);
	$sum += 7;

	if ($case->{fails})
	{
		my ($sqlstate, $pattern) = @{ $case->{fails} };
		error_is($node, 'postgres', "SELECT worker_spi_fold($index)",
			$sqlstate, $expand->($pattern), "$name: the fold fails");
		is(total($node, $index), $sum, "$name: the failed fold changed nothing");
		as('attacker', $expand->($case->{cure}));
	}
	$node->psql('postgres', "SELECT worker_spi_fold($index)");
	is( $node->safe_psql('postgres', $expand->(<<'EOS')),
SELECT count(*) FILTER (WHERE type = 'delta'), sum(value), pg_get_userbyid(relowner)
FROM %t, pg_class c WHERE c.oid = '%t'::regclass GROUP BY relowner
EOS
		"0|$sum|attacker",
		"$name: the deltas are folded");
	is(worker($node, $index, 'pid'), $pid, "$name: the worker is the same process");
	attacks_are($offset, $pid, 'attacker', $case->{attacks} // [],
		"$name: the code ran as the attacker's");
	$node->safe_psql('postgres', "SELECT worker_spi_stop($index)");
}

# ---------------------------------------------------------------------------
# Settings that code of the table makes do not outlast the fold.
# ---------------------------------------------------------------------------

my $n = $next_index++;
as('attacker', <<EOS);
CREATE SCHEMA schema$n;
CREATE TABLE schema$n.counted (type text, value bigint);
CREATE TABLE schema$n.seen (settings text);
CREATE FUNCTION schema$n.settings() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	INSERT INTO schema$n.seen SELECT string_agg(current_setting(name, true), ';')
	FROM unnest('{search_path,row_security,lock_timeout,synchronous_commit,
		default_transaction_isolation,transaction_isolation,enable_seqscan,
		standard_conforming_strings}'::text[]) AS name;
	PERFORM set_config('search_path', 'schema$n, public', false),
		set_config('row_security', 'on', false),
		set_config('lock_timeout', '0', false),
		set_config('synchronous_commit', 'on', false),
		set_config('default_transaction_isolation', 'serializable', false),
		set_config('enable_seqscan', 'on', false),
		set_config('standard_conforming_strings', 'off', false);
	RETURN NULL;
END \$\$;
CREATE TRIGGER settings BEFORE INSERT ON schema$n.counted
WHEN (current_setting('application_name') LIKE 'worker%') EXECUTE FUNCTION schema$n.settings();
EOS
$node->safe_psql('postgres', "SELECT worker_spi_launch($n)");
foreach my $round (1 .. 2)
{
	as('attacker', "INSERT INTO schema$n.counted VALUES ('delta', 1)");
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n)");
}
is( $node->safe_psql('postgres',
		"SELECT settings, count(*) FROM schema$n.seen GROUP BY settings"),
	'pg_catalog, pg_temp;off;2s;off;repeatable read;repeatable read;off;on|2',
	'settings that a trigger makes are gone in the next fold');
$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");

# ---------------------------------------------------------------------------
# Code that never ends is ended with the worker, at the latest.
# ---------------------------------------------------------------------------

$n = $next_index++;
as('attacker', <<EOS);
CREATE SCHEMA schema$n;
CREATE TABLE schema$n.counted (type text, value bigint);
CREATE FUNCTION schema$n.hang() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	LOOP
		BEGIN
			PERFORM pg_advisory_xact_lock($n);
			LOOP END LOOP;
		EXCEPTION WHEN query_canceled THEN
		END;
	END LOOP;
END \$\$;
CREATE TRIGGER hang BEFORE DELETE ON schema$n.counted EXECUTE FUNCTION schema$n.hang();
INSERT INTO schema$n.counted VALUES ('delta', 7);
EOS
$node->safe_psql('postgres', "SELECT worker_spi_launch($n)");
$node->poll_query_until('postgres', <<EOS) or die 'the trigger does not run';
SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = $n
EOS
my (undef, $stopped) = $node->psql('postgres', <<EOS);
SET statement_timeout = '30s';
SELECT worker_spi_stop($n)
EOS
is($stopped, 't',
	'a trigger that ignores cancel requests cannot keep a worker from being stopped');
is(total($node, $n), 7, 'and the count is as it was');

# ---------------------------------------------------------------------------
# The owner changes between two cycles: the worker acts as the new one.
# ---------------------------------------------------------------------------

$n = $next_index++;
as('attacker', <<EOS);
CREATE SCHEMA schema$n;
CREATE TABLE schema$n.counted (type text, value bigint);
GRANT USAGE ON SCHEMA schema$n TO alice;
CREATE TRIGGER t AFTER DELETE ON schema$n.counted FOR EACH ROW EXECUTE FUNCTION evil.trigger();
EOS
my $pid = $node->safe_psql('postgres', "SELECT worker_spi_launch($n)");
foreach my $owner ('attacker', 'alice', 'attacker')
{
	$node->safe_psql('postgres', <<EOS);
ALTER TABLE schema$n.counted OWNER TO $owner;
INSERT INTO schema$n.counted VALUES ('delta', 1);
EOS
	my $offset = -s $node->logfile;
	$node->psql('postgres', "SELECT worker_spi_fold($n)");
	attacks_are($offset, $pid, $owner, ['AFTER ROW DELETE'],
		"the worker acts as the table's owner, now $owner");
}
$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");

# ---------------------------------------------------------------------------
# The table's owner is not the schema's, and who owns the schema renames it
# away and puts another there, with a table of his, in the middle of a fold.
# ---------------------------------------------------------------------------

# A trigger of the victim holds the worker up after its first statement, so
# that the swap comes exactly between two of them.
foreach my $victim ('alice', $superuser)
{
	$n = $next_index++;
	as('attacker', <<EOS);
CREATE SCHEMA schema$n;
GRANT ALL ON SCHEMA schema$n TO PUBLIC;
CREATE SCHEMA mine$n;
CREATE TABLE mine$n.counted (type text, value bigint);
GRANT ALL ON SCHEMA mine$n TO PUBLIC;
GRANT ALL ON mine$n.counted TO PUBLIC;
CREATE UNIQUE INDEX ON mine$n.counted (type) WHERE type = 'total';
INSERT INTO mine$n.counted VALUES ('delta', 1);
CREATE TRIGGER s BEFORE INSERT OR UPDATE OR DELETE ON mine$n.counted
FOR EACH STATEMENT EXECUTE FUNCTION evil.trigger();
CREATE TRIGGER r BEFORE INSERT OR UPDATE OR DELETE ON mine$n.counted
FOR EACH ROW EXECUTE FUNCTION evil.trigger();
EOS
	as($victim, <<EOS);
CREATE TABLE schema$n.counted (type text, value bigint);
CREATE FUNCTION schema$n.hold() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	SET lock_timeout = 0;
	PERFORM pg_advisory_xact_lock($n);
	-- Locking a table anew makes the worker notice the swap.
	PERFORM FROM pg_catalog.pg_language;
	RETURN NULL;
END \$\$;
CREATE TRIGGER hold AFTER INSERT ON schema$n.counted
WHEN (current_setting('application_name') LIKE 'worker%') EXECUTE FUNCTION schema$n.hold();
EOS
	my $pid = $node->safe_psql('postgres', "SELECT worker_spi_launch($n)");
	as($victim, "INSERT INTO schema$n.counted VALUES ('delta', 2)");
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n)");
	is(total($node, $n), 2, "the table of $victim in the attacker's schema is folded");

	# The lock is held by an open transaction until its psql gets to COMMIT.
	my ($in, $out, $err) = ('', '', '');
	my $holder = IPC::Run::start(
		[
			$node->installed_command('psql'), '-XAtq',
			'-d', $node->connstr('postgres')
		],
		'<', \$in, '>', \$out, '2>', \$err);
	$in .= "BEGIN; SELECT pg_advisory_xact_lock($n);\n\\echo held\n";
	$holder->pump until $out =~ /held/;

	my $offset = -s $node->logfile;
	as($victim, "INSERT INTO schema$n.counted VALUES ('delta', 3)");
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n, wait => false)");
	$node->poll_query_until('postgres', <<EOS) or die 'the worker is not held up';
SELECT wait_event = 'advisory' FROM pg_stat_activity WHERE pid = $pid
EOS
	as('attacker', <<EOS);
BEGIN;
ALTER SCHEMA schema$n RENAME TO away$n;
ALTER SCHEMA mine$n RENAME TO schema$n;
COMMIT;
EOS
	$in .= "COMMIT;\n\\q\n";
	$holder->finish;
	$node->poll_query_until('postgres', <<EOS) or die 'the cycle does not end';
SELECT state <> 'folding' FROM worker_spi_workers WHERE index = $n
EOS
	ok( $node->log_contains(
			qr/\[$pid\] .*ERROR:  table "schema$n.counted" was replaced while it was being folded/,
			$offset),
		"a fold of the table of $victim fails when another takes its place");
	attacks_are($offset, $pid, 'attacker', [],
		"code in the table that replaced that of $victim never ran as $victim");
	is( $node->safe_psql('postgres',
			"SELECT count(*), sum(value) FROM away$n.counted"),
		'2|5',
		"the interrupted fold of the table of $victim changed nothing");

	# Now it is the attacker's table, and is folded as his.
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n)");
	attacks_are($offset, $pid, 'attacker', [ 'BEFORE ROW DELETE', 'BEFORE STATEMENT DELETE' ],
		"the table that replaced that of $victim is folded as its owner's");
	is(total($node, $n), 1, "and is folded right");

	as('attacker', <<EOS);
BEGIN;
ALTER SCHEMA schema$n RENAME TO mine$n;
ALTER SCHEMA away$n RENAME TO schema$n;
COMMIT;
EOS
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n)");
	is( $node->safe_psql('postgres', <<EOS),
SELECT count(*), sum(value) FROM schema$n.counted
EOS
		'1|5', "the table of $victim is folded again once it is back");
	is(worker($node, $n, 'pid'), $pid, "and the worker is the same process");

	# The same at random moments: 200 swaps as fast as they go, with deltas
	# in both tables, while the worker folds without a pause.  A fold that is
	# met by a swap may fail.
	$node->safe_psql('postgres', <<EOS);
DROP TRIGGER hold ON schema$n.counted;
CREATE TABLE swapped$n ();
GRANT ALL ON swapped$n TO attacker;
EOS
	as($victim, "GRANT INSERT ON schema$n.counted TO attacker");
	$offset = -s $node->logfile;
	my $swapper = IPC::Run::start(
		[
			$node->installed_command('psql'), '-XAtq',
			'-v', 'ON_ERROR_STOP=1',
			'-U', 'attacker',
			'-d', $node->connstr('postgres'),
			'-c', <<EOS
DO \$\$
BEGIN
	-- Wait until the folding below has begun.
	WHILE NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = $n) LOOP
	END LOOP;
	FOR i IN 1 .. 100 LOOP
		ALTER SCHEMA schema$n RENAME TO away$n;
		ALTER SCHEMA mine$n RENAME TO schema$n;
		INSERT INTO schema$n.counted VALUES ('delta', 1);
		COMMIT;
		ALTER SCHEMA schema$n RENAME TO mine$n;
		ALTER SCHEMA away$n RENAME TO schema$n;
		INSERT INTO schema$n.counted VALUES ('delta', 1);
		COMMIT;
	END LOOP;
	INSERT INTO swapped$n DEFAULT VALUES;
END \$\$;
EOS
		],
		'<', \undef, '>', \$out, '2>', \$err);
	note('folded, failed while schemas were swapped: ' . $node->safe_psql('postgres', <<EOS));
CREATE TEMP TABLE folds (ok boolean);
SELECT pg_advisory_lock($n) \\gset
DO \$\$
BEGIN
	FOR i IN 1 .. 100000 LOOP
		EXIT WHEN EXISTS (SELECT FROM swapped$n);
		BEGIN
			PERFORM worker_spi_fold($n);
			INSERT INTO folds VALUES (true);
		EXCEPTION WHEN OTHERS THEN
			INSERT INTO folds VALUES (false);
		END;
	END LOOP;
END \$\$;
SELECT count(*) FILTER (WHERE ok), count(*) FILTER (WHERE NOT ok) FROM folds;
EOS
	ok($swapper->finish, '200 swaps are made while the worker folds') or diag($err);
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n)");
	attacks_are($offset, $pid, 'attacker', [],
		"none of 200 swaps made the attacker's code run as $victim");
	is( $node->safe_psql('postgres', <<EOS),
SELECT (SELECT sum(value) FROM schema$n.counted), (SELECT sum(value) FROM mine$n.counted)
EOS
		'105|101', "neither table has lost or gained a count");
	$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");
}

# ---------------------------------------------------------------------------
# A worker whose role is no superuser acts only as roles it could SET ROLE to.
# ---------------------------------------------------------------------------

my $boss = $node->safe_psql('postgres', "SELECT 'boss'::regrole::oid");

$n = $next_index++;
as('attacker', <<EOS);
CREATE SCHEMA schema$n;
CREATE TABLE schema$n.counted (type text, value bigint);
CREATE TRIGGER t AFTER INSERT ON schema$n.counted EXECUTE FUNCTION evil.trigger();
INSERT INTO schema$n.counted VALUES ('delta', 7);
GRANT ALL ON SCHEMA schema$n TO PUBLIC;
GRANT ALL ON schema$n.counted TO PUBLIC;
EOS
my $offset = -s $node->logfile;
error_is($node, 'postgres', "SELECT worker_spi_launch($n, 0, $boss)", '42501',
	qr/role "boss" cannot act as "attacker", who owns "schema$n.counted"/,
	'a worker refuses the table of one whose role its own could not take');
is(scalar(attacks($offset)), 0, 'no code of that table has run');

# Nor does it make a table for him in his schema.
$n = $next_index++;
as('attacker', "CREATE SCHEMA schema$n; GRANT ALL ON SCHEMA schema$n TO PUBLIC");
error_is($node, 'postgres', "SELECT worker_spi_launch($n, 0, $boss)", '42501',
	qr/role "boss" cannot act as "attacker"/,
	'a worker makes no table in the schema of one whose role its own could not take');
is( $node->safe_psql('postgres', "SELECT to_regclass('schema$n.counted') IS NULL"),
	't', 'no table was made there');

$n = $next_index++;
as('clerk', <<EOS);
CREATE SCHEMA schema$n;
CREATE TABLE schema$n.counted (type text, value bigint);
CREATE TRIGGER t AFTER DELETE ON schema$n.counted FOR EACH ROW EXECUTE FUNCTION evil.trigger();
INSERT INTO schema$n.counted VALUES ('delta', 7);
GRANT USAGE ON SCHEMA schema$n TO boss;
EOS
$offset = -s $node->logfile;
$pid = $node->safe_psql('postgres', <<EOS);
SELECT worker_spi_launch($n, 0, $boss) \\gset
SELECT worker_spi_fold($n) \\gset
\\echo :worker_spi_launch
EOS
attacks_are($offset, $pid, 'clerk', ['AFTER ROW DELETE'],
	'a worker folds the table of a role that its own is a member of, as that role');

$node->safe_psql('postgres', <<EOS);
REVOKE clerk FROM boss;
INSERT INTO schema$n.counted VALUES ('delta', 7);
EOS
error_is($node, 'postgres', "SELECT worker_spi_fold($n)", '42501',
	qr/role "boss" cannot act as "clerk", who owns "schema$n.counted"/,
	'it stops to fold that table when its role is a member no more');
if ($node->pg_version >= 16)
{
	$node->safe_psql('postgres', 'GRANT clerk TO boss WITH SET FALSE');
	error_is($node, 'postgres', "SELECT worker_spi_fold($n)", '42501',
		qr/role "boss" cannot act as "clerk", who owns "schema$n.counted"/,
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

# ---------------------------------------------------------------------------
# Static workers move to a database of the attacker's, where operators, functions
# and types are waiting in public and in the worker's own schema, put before
# the system's by a search path that is set for the database.
# ---------------------------------------------------------------------------

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
as('attacker', <<EOS . $fakes =~ s/%s/schema1/gr . $fakes =~ s/%s/public/gr, 'app');
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
as('attacker', <<EOS);
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
is(worker($node, 1, 'rolname'), $superuser,
	'the owner of a database has no say in the role of its workers');
$pid = worker($node, 1, 'pid');
my $pid2 = worker($node, 2, 'pid');
# With his own search path he would run into his own trap.
as('attacker', <<EOS, 'app');
SET search_path = pg_catalog;
INSERT INTO schema1.counted VALUES ('delta', 7);
EOS
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
attacks_are($offset, undef, 'attacker', \@trigger_attacks,
	'nothing that shadows the system runs in a static worker, and triggers run as the attacker');
is( scalar(grep { $_->{where} =~ /operator|aggregate|domain|view/ } attacks($offset)),
	0, 'no operator, aggregate, type or view of the attacker was taken for another');
is( $node->safe_psql('app', <<EOS),
SELECT type, value FROM schema1.counted WHERE type OPERATOR(pg_catalog.<>) ''
EOS
	'total|14', 'a static worker folds the table that was there before it');
error_is($node, 'postgres', 'SELECT worker_spi_fold(2)', '42809',
	qr/"schema2\.counted" is not an ordinary table/,
	'a static worker refuses the view that was there before it');
is(worker($node, 2, 'pid'), $pid2, 'and is still there');
as('attacker', 'DROP VIEW schema2.counted', 'app');
$node->safe_psql('postgres', 'SELECT worker_spi_fold(2)');
is( $node->safe_psql('app',
		q(SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = 'schema2.counted'::regclass)),
	'attacker',
	"a missing table is made as the schema's owner");
is(worker($node, 1, 'pid'), $pid, 'the first static worker is still there, too');

# ---------------------------------------------------------------------------
# The highest index.
# ---------------------------------------------------------------------------

$node->safe_psql('postgres', <<EOS);
SELECT worker_spi_launch(2147483647, oid) FROM pg_database WHERE datname = 'postgres';
INSERT INTO schema2147483647.counted VALUES ('delta', 7);
SELECT worker_spi_fold(2147483647, oid) FROM pg_database WHERE datname = 'postgres';
EOS
is( $node->safe_psql('postgres', 'SELECT type, value FROM schema2147483647.counted'),
	'total|7', 'the worker with the highest index folds');
is( $node->safe_psql('postgres', <<EOS),
SELECT application_name FROM pg_stat_activity
JOIN worker_spi_workers USING (pid) WHERE index = 2147483647
EOS
	'worker_spi dynamic worker 2147483647', 'its name is not cut off');

# ---------------------------------------------------------------------------
# All in all.
# ---------------------------------------------------------------------------

is( $node->safe_psql('postgres',
		q(SELECT string_agg(rolname, ' ' ORDER BY rolname) FROM pg_roles WHERE rolsuper)),
	$superuser,
	'nobody has become a superuser');
ok(!-e $loot, 'no program was run');
ok(!$node->log_contains(qr/was terminated by signal|TRAP:|PANIC:/),
	'no process has crashed');

$node->stop;
done_testing();
