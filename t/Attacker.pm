# A role that attacks the worker, for the tests of what it must not get: its
# tools are functions that try everything that role may not do, and report to
# the server log as whom they ran and what they have won.

package t::Attacker;

use strict;
use warnings FATAL => 'all';

use Exporter 'import';
use PostgreSQL::Test::Utils;
use Test::More;

our @EXPORT = qw(arm_attacker as attacks attacks_are nothing_won
  triggers_on @trigger_attacks shadows);

# Triggers that a fold may fire, on these tables of schema %s.  Only those that
# the owner has enabled ALWAYS are fired.
my @triggers = ('BEFORE STATEMENT', 'AFTER ROW', 'AFTER STATEMENT');

sub triggers_on
{
	my (@tables) = @_;
	my $sql = '';

	foreach my $table (@tables)
	{
		foreach my $trigger (@triggers)
		{
			my ($time, $level) = split / /, $trigger;

			$sql .= <<EOS;
CREATE TRIGGER ${time}_$level $time INSERT OR UPDATE OR DELETE ON %s.$table
	FOR EACH $level EXECUTE FUNCTION evil.trigger();
ALTER TABLE %s.$table ENABLE ALWAYS TRIGGER ${time}_$level;
EOS
		}
	}
	return $sql;
}

# The places that they report from, on counted and the totals together.
our @trigger_attacks =
  map { my $trigger = $_; map { "$trigger $_" } ('INSERT', 'UPDATE', 'DELETE') } @triggers;

my $loot = PostgreSQL::Test::Utils::tempdir() . '/loot';

# Make the roles: the attacker, alice and clerk, who use the same databases,
# and boss, a member of clerk.  Nobody is trusted with more than it needs, but
# creating in public, which was everybody's right before server 15.  Give the
# attacker its tools in these databases, and something to break into: a table
# with a limit and a foreign key, which anybody may insert into, and tables that
# an event trigger forbids.
sub arm_attacker
{
	my ($node, @databases) = @_;
	my $superuser = $node->safe_psql('postgres', 'SELECT current_user');

	$node->safe_psql('postgres', <<EOS);
CREATE ROLE attacker LOGIN;
CREATE ROLE alice LOGIN;
CREATE ROLE clerk LOGIN;
CREATE ROLE boss LOGIN;
GRANT clerk TO boss;
CREATE FOREIGN DATA WRAPPER nothing;
GRANT USAGE ON FOREIGN DATA WRAPPER nothing TO attacker;
EOS
	foreach my $db (@databases)
	{
		$node->safe_psql($db, <<EOS);
GRANT CREATE ON SCHEMA public TO attacker;
GRANT CREATE ON DATABASE $db TO attacker, alice, clerk;
CREATE SCHEMA evil AUTHORIZATION attacker;
GRANT USAGE ON SCHEMA evil TO alice, clerk;
CREATE SCHEMA bank;
GRANT USAGE ON SCHEMA bank TO PUBLIC;
CREATE TABLE bank.account (id int PRIMARY KEY);
INSERT INTO bank.account VALUES (1);
CREATE TABLE bank.withdrawal (account int NOT NULL REFERENCES bank.account, amount int NOT NULL, who text);
GRANT INSERT ON bank.withdrawal TO PUBLIC;
CREATE FUNCTION bank.check_limit() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN IF NEW.amount > 100 THEN RAISE ''over the limit''; END IF; RETURN NEW; END';
CREATE TRIGGER check_limit BEFORE INSERT OR UPDATE ON bank.withdrawal
	FOR EACH ROW EXECUTE FUNCTION bank.check_limit();
CREATE FUNCTION bank.forbid() RETURNS event_trigger LANGUAGE plpgsql AS \$\$
BEGIN
	IF EXISTS (SELECT FROM pg_catalog.pg_event_trigger_ddl_commands()
		WHERE object_identity LIKE '%forbidden') THEN
		RAISE 'forbidden';
	END IF;
END \$\$;
CREATE EVENT TRIGGER forbid ON ddl_command_end WHEN TAG IN ('CREATE TABLE')
	EXECUTE FUNCTION bank.forbid();
EOS
		as($node, 'attacker', tools($superuser), $db);
	}
	return;
}

# Run $sql as a role.
sub as
{
	my ($node, $role, $sql, $db) = @_;
	return $node->safe_psql($db // 'postgres', $sql,
		extra_params => [ '-U', $role ]);
}

# What the attacker's code has reported to the server log since $offset.
sub attacks
{
	my ($node, $offset) = @_;
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
# all that ran was $role's: with its rights, and nothing else within reach.
sub attacks_are
{
	my ($node, $offset, $pid, $role, $expected, $test) = @_;
	my @found = attacks($node, $offset);
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

# Nobody has become a superuser but the one who was, and nothing has crashed;
# and in these databases nobody has got past what guards them.
sub nothing_won
{
	my ($node, @databases) = @_;

	is( $node->safe_psql('postgres',
			q(SELECT string_agg(rolname, ' ' ORDER BY rolname) = current_user FROM pg_roles WHERE rolsuper)),
		't',
		'nobody has become a superuser');
	ok(!-e $loot, 'no program was run');
	foreach my $db (@databases)
	{
		is( $node->safe_psql($db, <<EOS),
SET search_path = pg_catalog;
SELECT count(*) > 0, count(*) FILTER (WHERE amount > 100 OR account <> 1) FROM bank.withdrawal
EOS
			't|0',
			"in $db nobody has got past a trigger or a foreign key");
		is( $node->safe_psql($db,
				"SET search_path = pg_catalog; SELECT count(*) FROM pg_class WHERE relname = 'forbidden'"),
			'0',
			"in $db nobody has got past an event trigger");
	}
	ok(!$node->log_contains(qr/was terminated by signal|TRAP:|PANIC:/),
		'no process has crashed');
	return;
}

# Objects for schema %s that have the names of what is in pg_catalog: operators,
# functions, aggregates and types, each of which reports where it runs.
# Operators are for these types, and for those that every fold compares.
sub shadows
{
	my (@types) = @_;
	my $sql = '';
	my $n = 0;

	push @types, 'tid', 'bigint', 'int', 'numeric', 'text', 'boolean', 'timestamptz';
	foreach my $type (@types)
	{
		foreach my $name ('=', '<>', '<', '<=', '>', '>=')
		{
			my $function = '%s.operator_' . ++$n;
			$sql .= <<EOS;
CREATE FUNCTION $function($type, $type) RETURNS boolean LANGUAGE plpgsql AS
	'BEGIN PERFORM evil.attack(''operator''); RETURN NULL; END';
CREATE OPERATOR %s.$name (LEFTARG = $type, RIGHTARG = $type, FUNCTION = $function);
EOS
		}
	}
	foreach my $operator ('+', '-', '%', '/')
	{
		foreach my $type ('bigint', 'int', 'numeric')
		{
			my $function = '%s.operator_' . ++$n;
			$sql .= <<EOS;
CREATE FUNCTION $function($type, $type) RETURNS $type LANGUAGE plpgsql AS
	'BEGIN PERFORM evil.attack(''operator''); RETURN 0; END';
CREATE OPERATOR %s.$operator (LEFTARG = $type, RIGHTARG = $type, FUNCTION = $function);
EOS
		}
	}
	$sql .= <<EOS;
CREATE FUNCTION %s.step(bigint) RETURNS bigint LANGUAGE plpgsql AS
	'BEGIN PERFORM evil.attack(''aggregate''); RETURN 0; END';
CREATE AGGREGATE %s.count(*) (SFUNC = %s.step, STYPE = bigint);
EOS
	foreach my $type (@types)
	{
		my $function = '%s.step_' . ++$n;
		$sql .= <<EOS;
CREATE FUNCTION $function($type, $type) RETURNS $type LANGUAGE plpgsql AS
	'BEGIN PERFORM evil.attack(''aggregate''); RETURN NULL; END';
EOS
		$sql .= "CREATE AGGREGATE %s.$_($type) (SFUNC = $function, STYPE = $type);\n"
		  foreach ('sum', 'max', 'min', 'count', 'array_agg', 'bool_or');
	}
	my @functions = (
		[ 'now', '', 'timestamptz' ], [ 'div', 'numeric, numeric', 'numeric' ],
		[ 'mod', 'numeric, numeric', 'numeric' ], [ 'abs', 'numeric', 'numeric' ],
		[ 'sign', 'numeric', 'numeric' ], [ 'left', 'text, int', 'text' ],
		[ 'generate_series', 'int, bigint', 'SETOF bigint' ],
		[ 'generate_series', 'bigint, bigint', 'SETOF bigint' ],
		[ 'unnest', 'tid[]', 'SETOF tid' ], [ 'int8', 'numeric', 'bigint' ],
		[ 'numeric', 'bigint', 'numeric' ],
		map { ([ 'pg_column_size', $_, 'int' ], [ 'text', $_, 'text' ],
			[ '"coalesce"', "$_, $_", $_ ], [ '"greatest"', "$_, $_", $_ ]) } @types);
	foreach my $function (@functions)
	{
		my ($name, $arguments, $result) = @$function;
		my $return = $result =~ /SETOF/ ? 'RETURN' : 'RETURN NULL';
		$sql .= <<EOS;
CREATE FUNCTION %s.$name($arguments) RETURNS $result LANGUAGE plpgsql AS
	'BEGIN PERFORM evil.attack(''function $name''); $return; END';
EOS
	}
	$sql .= "CREATE DOMAIN %s.$_ AS pg_catalog.$_ CHECK (evil.yes('domain $_'));\n"
	  foreach ('text', 'int8', 'bool', 'tid', 'numeric', 'timestamptz', 'oid');
	return $sql;
}

# The tools, as SQL.  The file $loot tells whether COPY ... TO PROGRAM was
# possible.
sub tools
{
	my ($superuser) = @_;
	return <<"EOS";
-- What an earlier transaction has left behind in this session.
CREATE FUNCTION evil.left_behind() RETURNS text LANGUAGE sql AS \$\$
	SELECT string_agg('left behind: ' || what, '; ') FROM (
		SELECT 'cursor' FROM pg_cursors WHERE name = 'later'
		UNION ALL SELECT 'prepared statement' FROM pg_prepared_statements WHERE name = 'later'
		UNION ALL SELECT 'LISTEN' FROM pg_listening_channels()
		UNION ALL SELECT 'temporary table' WHERE pg_my_temp_schema() <> 0
		UNION ALL SELECT 'setting'
			WHERE current_setting('evil.mark', true) NOT IN ('', pg_current_xact_id()::text)
		UNION ALL SELECT 'replication role' WHERE current_setting('session_replication_role') <> 'origin'
		UNION ALL SELECT 'advisory lock' FROM pg_locks
			WHERE pid = pg_backend_pid() AND locktype = 'advisory' AND classid = 4711
			AND objid::text <> pg_current_xact_id()::text
	) AS w (what)
\$\$;

-- Report who runs this, and what it can do that the attacker cannot.
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
	won := COALESCE(evil.left_behind(), '');
	PERFORM set_config('evil.mark', pg_current_xact_id()::text, false),
		pg_advisory_lock(4711, pg_current_xact_id()::text::int);
	-- This anybody may do.
	INSERT INTO bank.withdrawal VALUES (1, 1, who);
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
		'LISTEN worker_spi',
		'INSERT INTO bank.withdrawal VALUES (1, 1000)',
		'INSERT INTO bank.withdrawal VALUES (2, 1)',
		'ALTER TABLE bank.withdrawal DISABLE TRIGGER ALL',
		'DROP EVENT TRIGGER forbid',
		'CREATE TABLE evil.forbidden (i int)']
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
}

1;
