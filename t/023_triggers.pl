# Triggers on the three tables.  A fold fires those that the tables' owner has
# enabled ALWAYS, as the owner, and no others: it refuses an ordinary one, and
# does not fire one that is REPLICA or disabled.  So the TRIGGER privilege gives
# nobody the owner's rights, and no BEFORE trigger changes a count in silence.
# Foreign keys and deferrable constraints hold all the same.
#
# All kinds of triggers one by one are in 034_trigger_matrix.  All is done when
# worker_spi_fold() returns; a session that is to block the worker, or to be
# blocked, is waited for by its wait event.

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
# that of clients: a process may be kept from its core for longer than it is
deadlock_timeout = 1min
EOC
my $fold = 'SELECT worker_spi_fold(1)';
my $columns = "type text NOT NULL DEFAULT 'delta', value bigint NOT NULL";

folds($node, 1);

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
	IF TG_OP = 'DELETE' THEN RETURN NULL; END IF;
	NEW.value := least(NEW.value, 10);
	RETURN NEW;
END $$;
EOC

# Tables that an attacker may add triggers to, with two deltas that are 42.
sub attacked_tables
{
	my ($more) = @_;
	new_table($node, 1,
		"CREATE TABLE %t ($columns); INSERT INTO %t (value) VALUES (40), (2)");
	$node->safe_psql('postgres',
		'GRANT ALL ON schema1.counted, schema1.total, schema1.stuck TO attacker;'
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

foreach my $test (
	[ 'a row trigger', 'total', 'CREATE TRIGGER t AFTER INSERT OR UPDATE OR DELETE ON %t FOR EACH ROW EXECUTE FUNCTION evil.attack()' ],
	[ 'a BEFORE trigger', 'counted', 'CREATE TRIGGER t BEFORE INSERT OR UPDATE OR DELETE ON %t FOR EACH ROW EXECUTE FUNCTION evil.attack()' ],
	[ 'a statement trigger', 'stuck', 'CREATE TRIGGER t BEFORE INSERT OR UPDATE OR DELETE ON %t EXECUTE FUNCTION evil.attack()' ],
	[ 'a transition table', 'counted', 'CREATE TRIGGER t AFTER DELETE ON %t REFERENCING OLD TABLE AS gone EXECUTE FUNCTION evil.attack()' ],
	[ 'a deferred constraint trigger', 'total', 'CREATE CONSTRAINT TRIGGER t AFTER INSERT OR DELETE ON %t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.attack()' ],
	[ 'a trigger that clamps', 'total', 'CREATE TRIGGER t BEFORE INSERT OR UPDATE ON %t FOR EACH ROW EXECUTE FUNCTION evil.clamp()' ],
	[ 'a trigger with a condition', 'total', 'CREATE TRIGGER t AFTER INSERT ON %t FOR EACH ROW WHEN (NEW.value < 0) EXECUTE FUNCTION evil.attack()' ])
{
	my ($name, $table, $create) = @$test;
	my $offset = -s $node->logfile;

	attacked_tables();
	$create =~ s/%t/schema1.$table/;
	$node->safe_psql('postgres', $create, @attacker);
	error_is($node, 'postgres', $fold, '42809',
		qr/"postgres\.schema1\.$table" has a trigger "t".*ALTER TABLE schema1\.$table DISABLE TRIGGER t, or, .*ENABLE ALWAYS TRIGGER t/s,
		"$name on $table is refused and named");
	is(rows($node, 1), "delta|2\ndelta|40", "$name: nothing is folded, and nothing lost");
	$node->safe_psql('postgres', "ALTER TABLE schema1.$table DISABLE TRIGGER t");
	folds($node, 1, "$name: disabled, it is in nobody's way");
	is(rows($node, 1), 'total|42', "$name: the fold is right");
	ok(!$node->log_contains(qr/attack as/, $offset), "$name: it has never fired");
}
is(attacker_won(), 'f', 'none of that gave anybody the rights of the owner');

# What nobody fires is in nobody's way.
foreach my $test (
	[ 'INSERT on counted', 'counted', 'AFTER INSERT' ],
	[ 'UPDATE and TRUNCATE on counted', 'counted', 'BEFORE UPDATE OR TRUNCATE' ],
	[ 'DELETE on the totals', 'total', 'AFTER DELETE' ],
	[ 'UPDATE on stuck', 'stuck', 'BEFORE UPDATE OF value' ])
{
	my ($name, $table, $events) = @$test;
	my $offset = -s $node->logfile;

	attacked_tables();
	$node->safe_psql('postgres',
		"CREATE TRIGGER t $events ON schema1.$table EXECUTE FUNCTION evil.attack()", @attacker);
	folds($node, 1, "a trigger for $name is no matter of a fold");
	is(rows($node, 1), 'total|42', "a trigger for $name: the fold is right");
	ok(!$node->log_contains(qr/attack as/, $offset), "a trigger for $name does not fire");
}

# Generic functions that do what their arguments say.
foreach my $function ([ 'refint', "check_foreign_key(1, 'cascade', 'value', 'public.precious', 'id')" ],
	[ 'lo', 'lo_manage(type)' ])
{
	my ($extension, $call) = @$function;
  SKIP:
	{
		skip "$extension is not installed", 3
		  if $node->safe_psql('postgres',
			"SELECT count(*) FROM pg_available_extensions WHERE name = '$extension'") == 0;
		$node->safe_psql('postgres', <<EOC);
CREATE EXTENSION IF NOT EXISTS $extension;
CREATE TABLE IF NOT EXISTS precious (id bigint);
TRUNCATE precious;
INSERT INTO precious VALUES (40), (2);
EOC
		attacked_tables();
		$node->safe_psql('postgres',
			"CREATE TRIGGER t BEFORE DELETE ON schema1.counted FOR EACH ROW EXECUTE FUNCTION $call",
			@attacker);
		error_is($node, 'postgres', $fold, '42809', qr/trigger "t"/,
			"a trigger of $extension is refused");
		$node->safe_psql('postgres', 'ALTER TABLE schema1.counted DISABLE TRIGGER t');
		folds($node, 1, "a trigger of $extension that is disabled is ignored");
		is($node->safe_psql('postgres', 'SELECT count(*) FROM precious'),
			'2', "and a trigger of $extension has done nothing as the owner");
	}
}

# An event trigger is a superuser's; it fires when the worker makes its tables.
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
SELECT DISTINCT * FROM made;
SELECT worker_spi_stop(8);
EOC
	"t\nattacker|CREATE TABLE\nt",
	'an event trigger fires as the owner of the schema');

# ------------------------------------------------------------------------
# Partitions: a row trigger of their parent is cloned to each of them
# ------------------------------------------------------------------------

$node->safe_psql('postgres', <<EOC);
CREATE SCHEMA schema9;
CREATE TABLE schema9.parent ($columns) PARTITION BY LIST (type);
CREATE TABLE schema9.counted PARTITION OF schema9.parent DEFAULT;
CREATE TRIGGER cloned AFTER INSERT OR UPDATE OR DELETE ON schema9.parent
	FOR EACH ROW EXECUTE FUNCTION evil.attack();
INSERT INTO schema9.counted (value) SELECT 42 WHERE false;
EOC
error_is($node, 'postgres', 'SELECT worker_spi_launch(9)', '42809',
	qr/"postgres\.schema9\.counted" is not an ordinary table.*partition/s,
	'a partition, to which a trigger may be cloned, is refused');
$node->safe_psql('postgres', 'ALTER TABLE schema9.parent DETACH PARTITION schema9.counted');
$node->safe_psql('postgres', 'SELECT worker_spi_launch(9); INSERT INTO schema9.counted (value) VALUES (42);');
folds($node, 9, 'a partition that was detached is folded');
is(rows($node, 9), 'total|42', 'and right');
is(attacker_won(), 'f', 'without its clone of the trigger');
error_is($node, 'postgres', 'ALTER TABLE schema9.parent ATTACH PARTITION schema9.counted DEFAULT',
	'42809', qr/inherit/, 'it cannot be attached again while it has children');
$node->safe_psql('postgres', 'SELECT worker_spi_stop(9)');

# A constraint trigger is a constraint, and stuck may have none of its own.
attacked_tables();
$node->safe_psql('postgres', <<'EOC', @attacker);
CREATE CONSTRAINT TRIGGER mine AFTER INSERT ON schema1.stuck FOR EACH ROW EXECUTE FUNCTION evil.attack();
EOC
error_is($node, 'postgres', $fold, '42809', qr/"postgres\.schema1\.stuck" has a .*"mine"/,
	'a constraint trigger on stuck is refused and named');

# ------------------------------------------------------------------------
# What the owner has enabled ALWAYS
# ------------------------------------------------------------------------

# A table of one's own that is kept up to date.
new_table($node, 1, "CREATE TABLE %t ($columns, k text NOT NULL)",
	key => 'PRIMARY KEY (k)',
	total => <<'EOC');
CREATE TABLE limits (k text PRIMARY KEY);
INSERT INTO limits VALUES ('a'), ('b');
CREATE TABLE report (k text PRIMARY KEY REFERENCES limits, value bigint);
CREATE FUNCTION report() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO public.report VALUES (NEW.k, NEW.value)
	ON CONFLICT (k) DO UPDATE SET value = excluded.value;
	RETURN NULL;
END $$;
CREATE TRIGGER report AFTER INSERT OR UPDATE ON %s.total FOR EACH ROW EXECUTE FUNCTION report();
ALTER TABLE %s.total ENABLE ALWAYS TRIGGER report;
CREATE TRIGGER wake AFTER INSERT ON %t EXECUTE FUNCTION worker_spi_wake();
GRANT TRIGGER ON %s.total TO attacker;
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
		"SELECT k, value, sqlstate FROM schema1.stuck; SELECT * FROM report ORDER BY k"),
	"c|1|23503\na|13\nb|3",
	'and stop only the key that they refuse');
$node->safe_psql('postgres', "INSERT INTO limits VALUES ('c')");
folds($node, 1, 'until they allow it');
is($node->safe_psql('postgres', "SELECT value FROM report WHERE k = 'c'"), '1', 'and it is reported then');

# Somebody with the TRIGGER privilege can only make it an ordinary one.
my $offset = -s $node->logfile;
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted (value, k) VALUES (16, 'a')");
$node->safe_psql('postgres', <<'EOC', @attacker);
CREATE OR REPLACE TRIGGER report AFTER INSERT OR UPDATE ON schema1.total
	FOR EACH ROW EXECUTE FUNCTION evil.attack();
EOC
error_is($node, 'postgres', $fold, '42809', qr/trigger "report"/,
	'a trigger that somebody has replaced is an ordinary one, and refused');
ok(!$node->log_contains(qr/attack as/, $offset), 'it does not fire');
is(attacker_won(), 'f', 'nor give anybody the rights of the owner');
is(total($node, 1), 33, 'and nothing is lost');
error_is($node, 'postgres', 'ALTER TABLE schema1.total ENABLE ALWAYS TRIGGER report',
	'42501', qr/must be owner/, 'nor can that role enable it ALWAYS', @attacker);

# Nobody sees a row before it is written, not even with ALWAYS; and what is
# REPLICA does not fire.
foreach my $test (
	[ 'that clamps new totals', 'total', 'INSERT' ],
	[ 'that clamps totals', 'total', 'UPDATE' ],
	[ 'on a column that the fold does not name', 'total', 'UPDATE OF type' ],
	[ 'that suppresses deletes', 'counted', 'DELETE' ],
	[ 'that clamps what is stuck', 'stuck', 'INSERT' ],
	[ 'that keeps what is stuck', 'stuck', 'DELETE' ])
{
	my ($name, $table, $event) = @$test;

	attacked_tables(
		"CREATE TRIGGER t BEFORE $event ON schema1.$table FOR EACH ROW EXECUTE FUNCTION evil.clamp();"
		  . "ALTER TABLE schema1.$table ENABLE ALWAYS TRIGGER t;");
	error_is($node, 'postgres', $fold, '42809', qr/"postgres\.schema1\.$table" has a BEFORE ROW trigger "t".*DISABLE TRIGGER t/s,
		"a BEFORE ROW trigger $name is refused even if it is ALWAYS");
	is(total($node, 1), 42, "a BEFORE ROW trigger $name: nothing is lost");
	$node->safe_psql('postgres', "ALTER TABLE schema1.$table ENABLE REPLICA TRIGGER t");
	folds($node, 1, "a BEFORE ROW trigger $name that is REPLICA does not fire");
	is(rows($node, 1), 'total|42', "a BEFORE ROW trigger $name that is REPLICA: the fold is right");
}

# A trigger that is REPLICA writes nothing to other tables past their foreign keys.
attacked_tables(<<'EOC');
TRUNCATE report;
CREATE FUNCTION orphan() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN INSERT INTO public.report VALUES (''nobody'', 1); RETURN NULL; END';
CREATE TRIGGER orphan AFTER DELETE ON schema1.counted EXECUTE FUNCTION orphan();
ALTER TABLE schema1.counted ENABLE REPLICA TRIGGER orphan;
EOC
folds($node, 1, 'a statement trigger that is REPLICA does not fire');
is($node->safe_psql('postgres', 'SELECT count(*) FROM report'), '0', 'nor write anything');

# ------------------------------------------------------------------------
# Foreign keys and deferrable constraints of the tables themselves
# ------------------------------------------------------------------------

my $page = 'page int NOT NULL REFERENCES page ON DELETE CASCADE';
$node->safe_psql('postgres', <<'EOC');
CREATE TABLE page (id int PRIMARY KEY);
INSERT INTO page SELECT generate_series(1, 100);
EOC
new_table($node, 1, "CREATE TABLE %t ($columns, $page)",
	key => 'PRIMARY KEY (page), FOREIGN KEY (page) REFERENCES page ON DELETE CASCADE',
	total => 'CREATE TRIGGER wake AFTER INSERT ON %t EXECUTE FUNCTION worker_spi_wake();');
my $orphans = 'SELECT count(*) FROM schema1.counted AS c WHERE NOT EXISTS (SELECT FROM page WHERE id = c.page)';

# The user deletes a parent while the fold makes a total for it.  Who comes
# second waits; it is never the user who is the victim of a deadlock.
foreach my $known ('without a total', 'with a total')
{
	my $id = $known =~ /without/ ? 1 : 2;
	$node->safe_psql('postgres',
		'INSERT INTO schema1.counted (value, page) VALUES (1, 2)');
	folds($node, 1);
	my $user = $node->background_psql('postgres');
	$user->query_safe("INSERT INTO schema1.counted (value, page) VALUES (1, $id), (1, 50)");
	$user->query_safe("BEGIN; DELETE FROM page WHERE id = $id");
	error_is($node, 'postgres', $fold, '55P03', qr/could not fold all of "postgres\.schema1\.counted"/,
		"a fold does not wait for the end of a cascade, $known");
	is($node->safe_psql('postgres', 'SELECT count(*) FROM ONLY schema1.counted WHERE page = 50'),
		'0', "and folds all else, $known");
	$user->query_safe('COMMIT');
	$user->quit;
	folds($node, 1, "nor is anything stuck then, $known");
	is($node->safe_psql('postgres', $orphans), '0', "and there is no orphan, $known");
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
	folds($node, 1, 'what remains is folded');
	is($node->safe_psql('postgres', $orphans), '0', 'and no cascade leaves an orphan');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM schema1.stuck'), '0', 'nor anything that is stuck');
}

# A key without a parent is stuck, alone, until it has one.
new_table($node, 1, "CREATE TABLE %t ($columns, page int NOT NULL)",
	key => 'PRIMARY KEY (page), CONSTRAINT known FOREIGN KEY (page) REFERENCES page DEFERRABLE INITIALLY DEFERRED',
	total => 'INSERT INTO %t (value, page) VALUES (1, 1000), (2, 50), (4, 1000);');
$node->safe_psql('postgres', 'INSERT INTO page VALUES (50) ON CONFLICT DO NOTHING');
error_is($node, 'postgres', $fold, '23503', qr/"known"/,
	'a deferred foreign key of the totals holds');
is(rows($node, 1, 'type, page, value'), "delta|1000|5\ntotal|50|2", 'and stops only the key that it refuses');
$node->safe_psql('postgres', 'INSERT INTO page VALUES (1000)');
folds($node, 1, 'until it allows it');
is(rows($node, 1, 'type, page, value'), "total|50|2\ntotal|1000|5", 'and the count is right');

new_table($node, 1, <<EOC, key => 'PRIMARY KEY (k), UNIQUE (k, seen) DEFERRABLE INITIALLY DEFERRED');
CREATE TABLE %t ($columns,
	k int NOT NULL, seen bigint NOT NULL DEFAULT 0, UNIQUE (type, k, seen) DEFERRABLE INITIALLY DEFERRED);
INSERT INTO %t (value, k, seen) VALUES (1, 1, 1), (1, 1, 2), (1, 2, 1);
EOC
folds($node, 1, 'tables with deferrable constraints are folded');
is(rows($node, 1, 'type, value, k, seen'),
	"total|1|2|1\ntotal|2|1|3", 'and right');

# ------------------------------------------------------------------------
# Foreign keys of others, whose actions would run their triggers as the owner
# ------------------------------------------------------------------------

# Whoever may REFERENCE a table decides what becomes of his own rows, and has
# triggers on them.
foreach my $test (
	[ 'counted', 'ON DELETE CASCADE' ], [ 'counted', 'ON DELETE SET NULL' ],
	[ 'counted', 'ON DELETE SET DEFAULT' ],
	[ 'total', 'ON UPDATE CASCADE' ], [ 'total', 'ON UPDATE SET NULL' ])
{
	my ($table, $action) = @$test;
	my $name = "a foreign key to $table, $action";

	$offset = -s $node->logfile;
	new_table($node, 1, "CREATE TABLE %t ($columns, k int NOT NULL, UNIQUE (k, value))",
		key => 'PRIMARY KEY (k), UNIQUE (k, value)',
		total => 'GRANT ALL ON %t, %s.total TO attacker; INSERT INTO %t (value, k) VALUES (40, 1)');
	folds($node, 1);
	$node->safe_psql('postgres', 'INSERT INTO schema1.counted (value, k) VALUES (2, 1)');
	my $value = $table eq 'counted' ? 2 : 40;
	$node->safe_psql('postgres', <<EOC, @attacker);
CREATE TABLE evil.mine (k int, value bigint DEFAULT NULL,
	CONSTRAINT trap FOREIGN KEY (k, value) REFERENCES schema1.$table (k, value) $action);
CREATE TRIGGER t AFTER UPDATE OR DELETE ON evil.mine FOR EACH ROW EXECUTE FUNCTION evil.attack();
INSERT INTO evil.mine VALUES (1, $value);
EOC
	error_is($node, 'postgres', $fold, '42809', qr/"trap"/, "$name is refused and named");
	ok(!$node->log_contains(qr/attack as/, $offset), "$name: no trigger of its table has fired");
	is(attacker_won(), 'f', "$name gives nobody the rights of the owner");
	is(rows($node, 1, 'type, value'), "delta|2\ntotal|40", "$name: nothing is lost");
	$node->safe_psql('postgres', 'DROP TABLE evil.mine; ALTER ROLE attacker NOSUPERUSER');
	folds($node, 1, "$name: without it, the table is folded");
}

# What keeps a row, and no more, is a constraint like others.
new_table($node, 1, "CREATE TABLE %t ($columns, k int NOT NULL, UNIQUE (k, value))",
	key => 'PRIMARY KEY (k)', total => 'INSERT INTO %t (value, k) VALUES (40, 1), (1, 2)');
$node->safe_psql('postgres', <<'EOC');
CREATE TABLE evil.detail (k int REFERENCES schema1.total ON UPDATE CASCADE ON DELETE CASCADE);
CREATE TABLE evil.waits (k int, value bigint, CONSTRAINT waits FOREIGN KEY (k, value) REFERENCES schema1.counted (k, value));
INSERT INTO evil.waits VALUES (1, 40);
EOC
error_is($node, 'postgres', $fold, '23503', qr/"waits"/, 'a delta that somebody refers to stays');
is(total($node, 1), 41, 'and counts');
$node->safe_psql('postgres', 'DELETE FROM evil.waits');
folds($node, 1, 'until nobody does');
is(rows($node, 1, 'type, value, k'), "total|1|2\ntotal|40|1", 'and is folded then');

is(attacker_won(), 'f', 'nobody has got the rights of the owner');

$node->stop;
done_testing();
