# Triggers on the folded table.  A fold fires those that the table's owner has
# enabled ALWAYS, as the owner, and no others: the TRIGGER privilege gives
# nobody the owner's rights, and no BEFORE trigger changes a count in silence.
# Foreign keys and deferrable constraints hold all the same.
#
# All is done when worker_spi_fold() returns; a session that is to block the
# worker, or to be blocked, is waited for by its wait event.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# The wake trigger is to fire here, and its delay is to keep the worker from
# folding before it is told to.
my $node = new_node('triggers', <<EOC);
worker_spi.total_workers = 1
worker_spi.wake_delay = 10000
autovacuum = off
EOC
my $fold = 'SELECT worker_spi_fold(1)';
my $plain =
  "CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL)";

fold($node, 1);

# What the attacker's functions do: they become superuser if they can.
$node->safe_psql('postgres', <<'EOC');
CREATE ROLE attacker LOGIN;
CREATE SCHEMA evil AUTHORIZATION attacker;
GRANT USAGE ON SCHEMA schema1 TO attacker;
EOC
my @attacker = (extra_params => [ '-U', 'attacker' ]);
$node->safe_psql('postgres', <<'EOC', @attacker);
CREATE FUNCTION evil.attack() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	RAISE LOG 'attack as %', current_user;
	IF current_user <> 'attacker' THEN ALTER ROLE attacker SUPERUSER; END IF;
	RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END $$;
CREATE FUNCTION evil.clamp() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
	NEW.value := least(NEW.value, 10);
	RETURN NEW;
END $$;
EOC

# A table that an attacker may add triggers to, with two deltas that are 42.
sub attacked_table
{
	my ($more) = @_;
	new_table($node, 1,
		"$plain; INSERT INTO %t (value) VALUES (40), (2);"
		  . 'GRANT ALL ON %t TO attacker;'
		  . ($more // ''));
	return;
}

sub attacker_won
{
	return $node->safe_psql('postgres',
		"SELECT rolsuper FROM pg_roles WHERE rolname = 'attacker'");
}

# ------------------------------------------------------------------------
# The TRIGGER privilege
# ------------------------------------------------------------------------

my %triggers = (
	'a row trigger' => 'CREATE TRIGGER t AFTER INSERT OR UPDATE OR DELETE ON %t FOR EACH ROW EXECUTE FUNCTION evil.attack()',
	'a BEFORE trigger' => 'CREATE TRIGGER t BEFORE INSERT OR UPDATE OR DELETE ON %t FOR EACH ROW EXECUTE FUNCTION evil.attack()',
	'a statement trigger' => 'CREATE TRIGGER t BEFORE INSERT OR UPDATE OR DELETE ON %t EXECUTE FUNCTION evil.attack()',
	'a transition table' => 'CREATE TRIGGER t AFTER DELETE ON %t REFERENCING OLD TABLE AS gone EXECUTE FUNCTION evil.attack()',
	'a deferred constraint trigger' => 'CREATE CONSTRAINT TRIGGER t AFTER INSERT OR DELETE ON %t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.attack()',
	'a trigger that clamps' => 'CREATE TRIGGER t BEFORE INSERT OR UPDATE ON %t FOR EACH ROW EXECUTE FUNCTION evil.clamp()',
);
foreach my $name (sort keys %triggers)
{
	my $create = $triggers{$name} =~ s/%t/schema1.counted/r;
	my $offset = -s $node->logfile;

	attacked_table();
	$node->safe_psql('postgres', $create, @attacker);
	is(fold($node, 1), 't', "a fold ignores $name");
	is(rows($node, 1), 'total|42', 'and is right');
	ok(!$node->log_contains(qr/attack as/, $offset), 'and has not fired it');

	# With a foreign key or an ALWAYS trigger beside it, it would fire.
	attacked_table(
		'CREATE TABLE IF NOT EXISTS parent (id int PRIMARY KEY);'
		  . 'ALTER TABLE %t ADD id int GENERATED ALWAYS AS (NULL::int) STORED REFERENCES parent;'
	);
	$node->safe_psql('postgres', $create, @attacker);
	error_is($node, 'postgres', $fold, '42809', qr/trigger "t".*DISABLE TRIGGER t/s,
		"beside a foreign key, $name is refused and named");
	is(total($node, 1), 42, 'and nothing is lost');
	$node->safe_psql('postgres', 'ALTER TABLE schema1.counted DISABLE TRIGGER t');
	is(fold($node, 1), 't', 'disabled, it is in nobody\'s way');
	is(rows($node, 1), 'total|42', 'and the fold is right');
}
is(attacker_won(), 'f', 'none of that gave anybody the rights of the owner');

# Generic functions that do what their arguments say.
foreach my $function ([ 'refint', "check_foreign_key(1, 'cascade', 'value', 'public.precious', 'id')" ],
	[ 'lo', 'lo_manage(type)' ])
{
	my ($extension, $call) = @$function;
  SKIP:
	{
		skip "$extension is not installed", 2
		  if $node->safe_psql('postgres',
			"SELECT count(*) FROM pg_available_extensions WHERE name = '$extension'") == 0;
		$node->safe_psql('postgres', <<EOC);
CREATE EXTENSION IF NOT EXISTS $extension;
CREATE TABLE IF NOT EXISTS precious (id bigint);
INSERT INTO precious VALUES (40), (2);
EOC
		attacked_table();
		$node->safe_psql('postgres',
			"CREATE TRIGGER t BEFORE DELETE ON schema1.counted FOR EACH ROW EXECUTE FUNCTION $call",
			@attacker);
		is(fold($node, 1), 't', "a trigger of $extension is ignored");
		is($node->safe_psql('postgres', 'SELECT count(*) > 0 FROM precious'),
			't', 'and does nothing as the owner');
	}
}

# An event trigger is a superuser's; it fires when the worker makes its table.
is( $node->safe_psql('postgres', <<'EOC'),
CREATE TABLE made (who name, tag text);
CREATE FUNCTION note_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO public.made VALUES (current_user, tg_tag);
END $$;
CREATE EVENT TRIGGER note ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION note_ddl();
GRANT INSERT ON made TO attacker;
CREATE SCHEMA schema8 AUTHORIZATION attacker;
SELECT worker_spi_launch(8) > 0;
DROP EVENT TRIGGER note;
SELECT * FROM made;
SELECT worker_spi_stop(8);
EOC
	"t\nattacker|CREATE TABLE\nt",
	'an event trigger fires as the owner of the schema');

# ------------------------------------------------------------------------
# What the owner has enabled ALWAYS
# ------------------------------------------------------------------------

# A table of one's own that is kept up to date.
new_table($node, 1, <<'EOC');
CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL, k text NOT NULL);
CREATE UNIQUE INDEX ON %t (k) WHERE type = 'total';
CREATE TABLE limits (k text PRIMARY KEY);
INSERT INTO limits VALUES ('a'), ('b');
CREATE TABLE report (k text PRIMARY KEY REFERENCES limits, value bigint);
CREATE FUNCTION report() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO public.report VALUES (NEW.k, NEW.value)
	ON CONFLICT (k) DO UPDATE SET value = excluded.value;
	RETURN NULL;
END $$;
CREATE TRIGGER report AFTER INSERT OR UPDATE ON %t FOR EACH ROW
	WHEN (NEW.type = 'total') EXECUTE FUNCTION report();
ALTER TABLE %t ENABLE ALWAYS TRIGGER report;
CREATE TRIGGER wake AFTER INSERT ON %t EXECUTE FUNCTION worker_spi_wake();
GRANT TRIGGER ON %t TO attacker;
EOC
is( $node->safe_psql('postgres', <<'EOC'),
INSERT INTO schema1.counted (value, k) VALUES (1, 'a'), (2, 'b'), (4, 'a');
SELECT worker_spi_fold(1);
INSERT INTO schema1.counted (value, k) VALUES (8, 'a');
SELECT worker_spi_fold(1);
SELECT * FROM report ORDER BY k;
EOC
	"t\nt\na|13\nb|2",
	'a trigger enabled ALWAYS fires, beside the wake trigger');

# It writes to a table with a foreign key, which holds.
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted (value, k) VALUES (1, 'c'), (1, 'b')");
error_is($node, 'postgres', $fold, '23503', qr/report_k_fkey/,
	'the foreign keys of the table that it writes to hold');
is( $node->safe_psql('postgres',
		"SELECT k, value FROM schema1.counted WHERE type <> 'total'; TABLE report"),
	"c|1\na|13\nb|3",
	'and stop only the key that they refuse');
$node->safe_psql('postgres', "INSERT INTO limits VALUES ('c')");
is(fold($node, 1), 't', 'until they allow it');

# Somebody with the TRIGGER privilege can only make it an ordinary one.
my $offset = -s $node->logfile;
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted (value, k) VALUES (16, 'a')");
$node->safe_psql('postgres', <<'EOC', @attacker);
CREATE OR REPLACE TRIGGER report AFTER INSERT OR UPDATE OR DELETE ON schema1.counted
	FOR EACH ROW EXECUTE FUNCTION evil.attack();
EOC
is(fold($node, 1), 't', 'a replaced trigger is an ordinary one');
ok(!$node->log_contains(qr/attack as/, $offset), 'and does not fire');
is(attacker_won(), 'f', 'nor give anybody the rights of the owner');

foreach my $test (
	[ 'that clamps', 'BEFORE INSERT OR UPDATE', 'evil.clamp()' ],
	[ 'that may suppress a delete', 'BEFORE DELETE', 'evil.clamp()' ])
{
	my ($name, $events, $function) = @$test;

	attacked_table(
		"CREATE TRIGGER t $events ON %t FOR EACH ROW EXECUTE FUNCTION $function;"
		  . 'ALTER TABLE %t ENABLE ALWAYS TRIGGER t;');
	error_is($node, 'postgres', $fold, '42809', qr/BEFORE ROW trigger "t"/,
		"a BEFORE ROW trigger $name is refused even if it is ALWAYS");
	$node->safe_psql('postgres',
		'ALTER TABLE schema1.counted ENABLE REPLICA TRIGGER t');
	error_is($node, 'postgres', $fold, '42809', qr/BEFORE ROW trigger "t"/,
		'or REPLICA');
	is(total($node, 1), 42, 'and nothing is lost');
}

# On a column that the fold does not update, it does not fire.
new_table($node, 1, <<'EOC');
CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL, k text NOT NULL);
CREATE UNIQUE INDEX ON %t (k) WHERE type = 'total';
CREATE TRIGGER t BEFORE UPDATE OF k ON %t FOR EACH ROW EXECUTE FUNCTION evil.clamp();
ALTER TABLE %t ENABLE ALWAYS TRIGGER t;
INSERT INTO %t (value, k) VALUES (40, 'a'), (2, 'a');
EOC
is(fold($node, 1), 't',
	'a trigger that the fold would not fire is in nobody\'s way');

# ------------------------------------------------------------------------
# Foreign keys and deferrable constraints of the table itself
# ------------------------------------------------------------------------

new_table($node, 1, <<'EOC');
CREATE TABLE page (id int PRIMARY KEY);
INSERT INTO page SELECT generate_series(1, 100);
CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL,
	page int NOT NULL REFERENCES page ON DELETE CASCADE);
CREATE UNIQUE INDEX ON %t (page) WHERE type = 'total';
CREATE TRIGGER wake AFTER INSERT ON %t EXECUTE FUNCTION worker_spi_wake();
EOC

# The user deletes a parent while the fold makes a total for it.  Who comes
# second waits; it is never the user who is the victim of a deadlock.
foreach my $known ('without a total', 'with a total')
{
	my $page = $known =~ /without/ ? 1 : 2;
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted (value, page) VALUES (1, 2); $fold");
	my $user = $node->background_psql('postgres');
	$user->query_safe("BEGIN; INSERT INTO schema1.counted (value, page) VALUES (1, $page); COMMIT;");
	$user->query_safe("BEGIN; DELETE FROM page WHERE id = $page");
	error_is($node, 'postgres', $fold, '55P03', qr/lock timeout/,
		"a fold does not wait for the end of a cascade, $known");
	$user->query_safe('COMMIT');
	$user->quit;
	is(fold($node, 1), 't', 'nor is anything stuck then');
	is( $node->safe_psql('postgres',
			'SELECT count(*) FROM schema1.counted AS c WHERE NOT EXISTS (SELECT FROM page WHERE id = c.page)'
		),
		'0',
		"and there is no orphan, $known");
}
{
	my $bench = start_pgbench(
		$node,
		[ '-c', 4, '-t', 200 ],
		[ "\\set p random(3, 100)\nINSERT INTO schema1.counted (value, page) SELECT 1, id FROM page WHERE id = :p;\n", 6 ],
		[ "\\set p random(3, 100)\nDELETE FROM page WHERE id = :p;\n", 1 ],
		[ "\\set p random(3, 100)\nINSERT INTO page VALUES (:p) ON CONFLICT DO NOTHING;\n", 1 ],
		[ "SELECT worker_spi_fold(1, wait => false);\n", 2 ]);
	my ($out, $err, $success) = finish_psql($bench);
	unlike($err, qr/deadlock/, 'no user is ever the victim of a deadlock');
	fold($node, 1);
	is( $node->safe_psql('postgres',
			'SELECT count(*) FROM schema1.counted AS c WHERE NOT EXISTS (SELECT FROM page WHERE id = c.page)'
		),
		'0',
		'and no cascade leaves an orphan');
}

new_table($node, 1, <<'EOC');
CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL,
	k int NOT NULL, seen bigint NOT NULL DEFAULT 0, UNIQUE (type, k, seen) DEFERRABLE INITIALLY DEFERRED);
CREATE UNIQUE INDEX ON %t (k) WHERE type = 'total';
INSERT INTO %t (value, k, seen) VALUES (1, 1, 1), (1, 1, 2), (1, 2, 1);
EOC
is(fold($node, 1), 't', 'a table with a deferrable constraint is folded');
is(rows($node, 1, 'type, value, k, seen'),
	"total|1|2|1\ntotal|2|1|3", 'and right');

$node->stop;
done_testing();
