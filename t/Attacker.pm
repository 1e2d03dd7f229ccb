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
  $triggers @trigger_attacks);

# Triggers that a fold may fire, on %t, and the places that they report from.
# Only those that the owner has enabled ALWAYS are fired.
our $triggers = '';
our @trigger_attacks;
foreach my $trigger ('BEFORE STATEMENT', 'AFTER ROW', 'AFTER STATEMENT')
{
	my ($time, $level) = split / /, $trigger;

	$triggers .= <<EOS;
CREATE TRIGGER ${time}_$level $time INSERT OR UPDATE OR DELETE ON %t
	FOR EACH $level EXECUTE FUNCTION evil.trigger();
ALTER TABLE %t ENABLE ALWAYS TRIGGER ${time}_$level;
EOS
	push @trigger_attacks, map { "$trigger $_" } ('INSERT', 'UPDATE', 'DELETE');
}

my $loot = PostgreSQL::Test::Utils::tempdir() . '/loot';

# Make the roles: the attacker, alice and clerk, who use the same databases,
# and boss, a member of clerk.  Nobody is trusted with more than it needs, but
# creating in public, which was everybody's right before server 15.  Give the
# attacker its tools in these databases.
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

# Nobody has become a superuser but the one who was, and nothing has crashed.
sub nothing_won
{
	my ($node) = @_;

	is( $node->safe_psql('postgres',
			q(SELECT string_agg(rolname, ' ' ORDER BY rolname) = current_user FROM pg_roles WHERE rolsuper)),
		't',
		'nobody has become a superuser');
	ok(!-e $loot, 'no program was run');
	ok(!$node->log_contains(qr/was terminated by signal|TRAP:|PANIC:/),
		'no process has crashed');
	return;
}

# The tools, as SQL.  The file $loot tells whether COPY ... TO PROGRAM was
# possible.
sub tools
{
	my ($superuser) = @_;
	return <<"EOS";
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
}

1;
