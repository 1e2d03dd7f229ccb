# A role that may create schemas makes the worker's table first, or adds to it
# later, and puts code wherever a table can have some.  None of that code may
# run as anybody but the table's owner, reach the worker's own role, outlast
# the fold or end the worker; whatever is legitimate must fold all the same.
#
# It waits for worker_spi_fold() wherever code has to have run, and looks at
# pg_locks and pg_stat_activity where code holds the worker up.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::Attacker;
use t::WorkerSpi;

my $node = new_node('owner_code', "worker_spi.total_workers = 0\n");
my $superuser = $node->safe_psql('postgres', 'SELECT current_user');
my $next_index = 100;

arm_attacker($node, 'postgres');

# ------------------------------------------------------------------------
# Code in the table, which the worker meets or finds added.
#
# In each case %s is the schema and %t the table.  The attacker runs "table"
# and "insert" (two deltas, together 7), the superuser launches the worker, the
# attacker runs "later" and "insert" once more.  Without a "table" there is only
# the schema, and nothing to insert into, before the worker.  What then is to
# happen:
#	attacks		places where that code has to have run
#	refused		the error of the launch, if it has to fail
#	fails		the error of the fold after "later", if it has to fail;
#				"cure" then makes it work
# ------------------------------------------------------------------------

my $plain = 'CREATE TABLE %t (type text NOT NULL, value bigint NOT NULL);';
my $plain_insert = "INSERT INTO %t VALUES ('delta', 3), ('delta', 4);";

# A trigger that keeps something from being written, or writes something else.
sub before_row
{
	my ($event, $result) = @_;
	return <<EOS;
CREATE FUNCTION %s.before_row() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN $result; END';
CREATE TRIGGER before_row BEFORE $event ON %t FOR EACH ROW EXECUTE FUNCTION %s.before_row();
ALTER TABLE %t ENABLE ALWAYS TRIGGER before_row;
EOS
}
my $no_before_row = 'DROP TRIGGER before_row ON %t;';

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
		attacks => [ grep { $_ !~ /UPDATE/ } @trigger_attacks ]
	},
	{
		name => 'deferred constraint triggers',
		table => $plain . <<'EOS',
CREATE CONSTRAINT TRIGGER later AFTER INSERT OR UPDATE OR DELETE ON %t
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.trigger();
ALTER TABLE %t ENABLE ALWAYS TRIGGER later;
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
ALTER TABLE %t ENABLE ALWAYS TRIGGER other;
EOS
		attacks => ['AFTER ROW INSERT']
	},
	{
		name => 'a trigger that defers the constraint triggers',
		table => $plain,
		later => <<'EOS',
CREATE CONSTRAINT TRIGGER later AFTER DELETE ON %t
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.trigger();
ALTER TABLE %t ENABLE ALWAYS TRIGGER later;
CREATE FUNCTION %s.defer() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN SET CONSTRAINTS ALL DEFERRED; RETURN NULL; END';
CREATE TRIGGER defer BEFORE DELETE ON %t EXECUTE FUNCTION %s.defer();
ALTER TABLE %t ENABLE ALWAYS TRIGGER defer;
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
CREATE UNIQUE INDEX ON %t (page) NULLS NOT DISTINCT WHERE type = 'total';
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
CREATE UNIQUE INDEX ON %t (page, kind, pair) NULLS NOT DISTINCT WHERE type = 'total';
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
CREATE UNIQUE INDEX ON %t ("a""; SELECT evil.attack('name'); --", "b'); DROP TABLE %t; --",
	"deltas", "total", "rows", "k3", "%t", "excluded") NULLS NOT DISTINCT WHERE type = 'total';
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
		name => 'a BEFORE ROW trigger that suppresses the delete',
		table => $plain,
		later => before_row('DELETE', 'NULL'),
		fails => [ '42809', qr/before_row/ ],
		cure => $no_before_row
	},
	{
		name => 'a BEFORE ROW trigger that changes the total',
		table => $plain,
		later => before_row('UPDATE', 'OLD'),
		fails => [ '42809', qr/before_row/ ],
		cure => $no_before_row
	},
	{
		name => 'ordinary triggers, which a fold does not fire',
		table => $plain,
		later => ($triggers =~ s/^ALTER .*\n//mgr)
		  . (before_row('DELETE OR UPDATE', 'OLD') =~ s/^ALTER .*\n//mr)
	},
	{
		name => 'a trigger that deletes the deltas first',
		table => $plain,
		later => <<'EOS',
CREATE FUNCTION %s.others() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN DELETE FROM %t WHERE type = ''delta''; RETURN NULL; END';
CREATE TRIGGER others BEFORE DELETE ON %t
WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION %s.others();
ALTER TABLE %t ENABLE ALWAYS TRIGGER others;
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
ALTER TABLE %t ENABLE ALWAYS TRIGGER more;
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
		fails => [ '42809', qr/"%t".*rule/ ],
		cure => 'DROP RULE steal ON %t;'
	},
	{
		name => 'a trigger that renames the table and puts another there',
		table => $plain . 'CREATE TABLE %s.spare (LIKE %t);',
		later => <<'EOS',
CREATE FUNCTION %s.swap() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN ALTER TABLE %t RENAME TO away; ALTER TABLE %s.spare RENAME TO counted; RETURN NULL; END';
CREATE TRIGGER swap AFTER UPDATE ON %t EXECUTE FUNCTION %s.swap();
ALTER TABLE %t ENABLE ALWAYS TRIGGER swap;
EOS
		fails => [ '55006', qr/"%t"/ ],
		cure => 'DROP TRIGGER swap ON %t;'
	},
	{
		name => 'a trigger that asks for a retry for ever',
		table => $plain,
		later => <<'EOS',
CREATE FUNCTION %s.again() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN RAISE ''try again'' USING ERRCODE = ''40001''; END';
CREATE TRIGGER again BEFORE DELETE ON %t EXECUTE FUNCTION %s.again();
ALTER TABLE %t ENABLE ALWAYS TRIGGER again;
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
		refused => [ '42809', qr/"%t"/ ]
	},
	{
		name => 'a materialized view',
		table => "CREATE MATERIALIZED VIEW %t AS SELECT 'delta'::text AS type, 1::bigint AS value;",
		insert => '',
		refused => [ '42809', qr/"%t"/ ]
	},
	{
		name => 'a foreign table',
		table => <<'EOS',
CREATE SERVER %s FOREIGN DATA WRAPPER nothing;
CREATE FOREIGN TABLE %t (type text, value bigint) SERVER %s;
EOS
		insert => '',
		refused => [ '42809', qr/"%t"/ ]
	},
	{
		name => 'a partitioned table',
		table => <<'EOS',
CREATE TABLE %t (type text, value bigint) PARTITION BY LIST (type);
CREATE TABLE %s.part PARTITION OF %t DEFAULT;
EOS
		refused => [ '42809', qr/"%t"/ ]
	},
	{
		name => 'a type',
		table => 'CREATE DOMAIN %t AS text CHECK (evil.yes(VALUE));',
		insert => '',
		refused => [ '42710', qr/"counted"/ ]
	},
	{
		name => 'a value column of a domain',
		table => <<'EOS',
CREATE DOMAIN %s.amount AS bigint CHECK (evil.num('domain', VALUE) > 0);
CREATE TABLE %t (type text, value %s.amount);
EOS
		refused => [ '42804', qr/"value".*"%t"/s ]
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

	as($node, 'attacker', $expand->("CREATE SCHEMA %s; $case->{table}"));
	unless ($case->{table} eq '')
	{
		as($node, 'attacker', $insert);
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
		attacks_are($node, $offset, undef, 'attacker', [], "$name: no code got to anybody else");
		next;
	}

	# What fails here shows below.  A worker is launched before its first fold,
	# and what comes later must come after that.
	my (undef, $pid) =
	  $node->psql('postgres', "SELECT worker_spi_launch($index)");
	$node->psql('postgres', "SELECT worker_spi_fold($index)");

	as($node, 'attacker', $expand->($case->{later} // '') . $insert);
	$sum += 7;

	if ($case->{fails})
	{
		my ($sqlstate, $pattern) = @{ $case->{fails} };
		error_is($node, 'postgres', "SELECT worker_spi_fold($index)",
			$sqlstate, $expand->($pattern), "$name: the fold fails");
		is(total($node, $index), $sum, "$name: the failed fold changed nothing");
		as($node, 'attacker', $expand->($case->{cure}));
	}
	$node->psql('postgres', "SELECT worker_spi_fold($index)");
	is( $node->safe_psql('postgres', $expand->(<<'EOS')),
SELECT count(*) FILTER (WHERE type = 'delta'), sum(value), pg_get_userbyid(relowner)
FROM %t, pg_class c WHERE c.oid = '%t'::regclass GROUP BY relowner
EOS
		"0|$sum|attacker",
		"$name: the deltas are folded");
	is(worker($node, $index, 'pid'), $pid, "$name: the worker is the same process");
	attacks_are($node, $offset, $pid, 'attacker', $case->{attacks} // [],
		"$name: the code ran as the attacker's");
	$node->safe_psql('postgres', "SELECT worker_spi_stop($index)");
}

# ------------------------------------------------------------------------
# Settings that code of the table makes do not outlast the fold.
# ------------------------------------------------------------------------

my $n = $next_index++;
as($node, 'attacker', <<EOS);
CREATE SCHEMA schema$n;
CREATE TABLE schema$n.counted (type text, value bigint);
CREATE TABLE schema$n.seen (settings text);
CREATE FUNCTION schema$n.settings() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	INSERT INTO schema$n.seen SELECT string_agg(current_setting(name, true), ';')
	FROM unnest('{search_path,row_security,synchronous_commit,
		default_transaction_isolation,transaction_isolation,
		quote_all_identifiers}'::text[]) AS name;
	PERFORM set_config('search_path', 'schema$n, public', false),
		set_config('row_security', 'on', false),
		set_config('lock_timeout', '0', false),
		set_config('synchronous_commit', 'on', false),
		set_config('default_transaction_isolation', 'serializable', false),
		set_config('enable_seqscan', 'on', false),
		set_config('quote_all_identifiers', 'on', false);
	RETURN NULL;
END \$\$;
CREATE TRIGGER settings BEFORE INSERT ON schema$n.counted
WHEN (current_setting('application_name') LIKE 'worker%') EXECUTE FUNCTION schema$n.settings();
ALTER TABLE schema$n.counted ENABLE ALWAYS TRIGGER settings;
EOS
$node->safe_psql('postgres', "SELECT worker_spi_launch($n)");
foreach my $round (1 .. 2)
{
	as($node, 'attacker', "INSERT INTO schema$n.counted VALUES ('delta', 1)");
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n)");
}
is( $node->safe_psql('postgres',
		"SELECT settings, count(*) FROM schema$n.seen GROUP BY settings"),
	'pg_catalog, pg_temp;off;off;repeatable read;repeatable read;off|2',
	'settings that a trigger makes are gone in the next fold');
$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");

# ------------------------------------------------------------------------
# Code that never ends is ended with the worker, at the latest.
# ------------------------------------------------------------------------

$n = $next_index++;
as($node, 'attacker', <<EOS);
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
ALTER TABLE schema$n.counted ENABLE ALWAYS TRIGGER hang;
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

# ------------------------------------------------------------------------
# The owner changes between two cycles: the worker acts as the new one.
# ------------------------------------------------------------------------

$n = $next_index++;
as($node, 'attacker', <<EOS);
CREATE SCHEMA schema$n;
CREATE TABLE schema$n.counted (type text, value bigint);
GRANT USAGE ON SCHEMA schema$n TO alice;
CREATE TRIGGER t AFTER DELETE ON schema$n.counted FOR EACH ROW EXECUTE FUNCTION evil.trigger();
ALTER TABLE schema$n.counted ENABLE ALWAYS TRIGGER t;
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
	attacks_are($node, $offset, $pid, $owner, ['AFTER ROW DELETE'],
		"the worker acts as the table's owner, now $owner");
}
$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");

# ------------------------------------------------------------------------
# The table's owner is not the schema's, and who owns the schema renames it
# away and puts another there, with a table of its own, in the middle of a fold.
# ------------------------------------------------------------------------

# A trigger of the victim holds the worker up after its first statement, so
# that the swap comes exactly between two of them.
foreach my $victim ('alice', $superuser)
{
	$n = $next_index++;
	as($node, 'attacker', <<EOS);
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
CREATE TRIGGER r AFTER INSERT OR UPDATE OR DELETE ON mine$n.counted
FOR EACH ROW EXECUTE FUNCTION evil.trigger();
ALTER TABLE mine$n.counted ENABLE ALWAYS TRIGGER s;
ALTER TABLE mine$n.counted ENABLE ALWAYS TRIGGER r;
EOS
	as($node, $victim, <<EOS);
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
ALTER TABLE schema$n.counted ENABLE ALWAYS TRIGGER hold;
EOS
	my $pid = $node->safe_psql('postgres', "SELECT worker_spi_launch($n)");
	as($node, $victim, "INSERT INTO schema$n.counted VALUES ('delta', 2)");
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n)");
	is(total($node, $n), 2, "the table of $victim in the attacker's schema is folded");

	my $holder = $node->background_psql('postgres');
	$holder->query_safe("BEGIN; SELECT pg_advisory_xact_lock($n)");

	my $offset = -s $node->logfile;
	as($node, $victim, "INSERT INTO schema$n.counted VALUES ('delta', 3)");
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n, wait => false)");
	$node->poll_query_until('postgres', <<EOS) or die 'the worker is not held up';
SELECT wait_event = 'advisory' FROM pg_stat_activity WHERE pid = $pid
EOS
	as($node, 'attacker', <<EOS);
BEGIN;
ALTER SCHEMA schema$n RENAME TO away$n;
ALTER SCHEMA mine$n RENAME TO schema$n;
COMMIT;
EOS
	$holder->query_safe('COMMIT');
	$holder->quit;
	$node->poll_query_until('postgres', <<EOS) or die 'the cycle does not end';
SELECT state <> 'folding' FROM worker_spi_workers WHERE index = $n
EOS
	ok( $node->log_contains(
			qr/\[$pid\] .*ERROR:  .*schema$n\.counted/, $offset),
		"a fold of the table of $victim fails when another takes its place");
	attacks_are($node, $offset, $pid, 'attacker', [],
		"code in the table that replaced that of $victim never ran as $victim");
	is( $node->safe_psql('postgres',
			"SELECT count(*), sum(value) FROM away$n.counted"),
		'2|5',
		"the interrupted fold of the table of $victim changed nothing");

	# Now it is the attacker's table, and is folded as such.
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n)");
	attacks_are($node, $offset, $pid, 'attacker', [ 'AFTER ROW DELETE', 'BEFORE STATEMENT DELETE' ],
		"the table that replaced that of $victim is folded as its owner's");
	is(total($node, $n), 1, "and is folded right");

	as($node, 'attacker', <<EOS);
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
	as($node, $victim, "GRANT INSERT ON schema$n.counted TO attacker");
	$offset = -s $node->logfile;
	my $swapper = start_psql($node, 'postgres', 'swapper', <<EOS, '-U', 'attacker');
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
	my (undef, $err, $done) = finish_psql($swapper);
	ok($done, '200 swaps are made while the worker folds') or diag($err);
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n)");
	attacks_are($node, $offset, $pid, 'attacker', [],
		"none of 200 swaps made the attacker's code run as $victim");
	is( $node->safe_psql('postgres', <<EOS),
SELECT (SELECT sum(value) FROM schema$n.counted), (SELECT sum(value) FROM mine$n.counted)
EOS
		'105|101', "neither table has lost or gained a count");
	$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");
}

# ------------------------------------------------------------------------
# All in all
# ------------------------------------------------------------------------
nothing_won($node);

$node->stop;
done_testing();
