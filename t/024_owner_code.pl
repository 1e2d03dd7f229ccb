# A role that may create schemas makes the worker's tables first, or adds to them
# later, and puts code wherever a table can have some.  None of that code may
# run as anybody but the tables' owner, reach the worker's own role, get past
# other people's triggers, outlast the fold or end the worker; whatever is
# legitimate must fold all the same.
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
# The attacker's code sees what there is to be had: in a session of its own, much.
# ------------------------------------------------------------------------

my $n;
my $control = -s $node->logfile;
$node->psql('postgres', <<'EOS', extra_params => [ '-U', 'attacker' ]);
SET application_name = 'worker_spi control';
LISTEN something;
PREPARE later AS SELECT 1;
BEGIN;
DECLARE later CURSOR WITH HOLD FOR SELECT 1;
COMMIT;
CREATE TEMP TABLE something ();
SET evil.mark = 'left';
SELECT pg_advisory_lock(4711, 1);
SELECT evil.attack('control');
EOS
my ($attack) = attacks($node, $control);
like($attack->{won},
	qr/^left behind: cursor; left behind: prepared statement; left behind: LISTEN; left behind: temporary table; left behind: setting; left behind: advisory lock/,
	'code sees what was left behind');
like($attack->{won}, qr/RESET ROLE; .*RESET SESSION AUTHORIZATION; .*LISTEN worker_spi; /,
	'and what it may do');

# ------------------------------------------------------------------------
# Code in the tables, which the worker meets or finds added.
#
# In each case %s is the schema and %t the table counted.  The attacker runs
# "table" and "insert" (two deltas, together 7), the superuser launches the
# worker, which makes what is missing, and the attacker runs "later" and
# "insert" once more.  Without a "table" there is only the schema, and nothing
# to insert into, before the worker.  What then is to happen:
#	attacks		places where that code has to have run
#	refused		the error of the launch, if it has to fail
#	fails		the error of the fold after "later", if it has to fail;
#				"cure" then makes it work
# ------------------------------------------------------------------------

my $plain = 'CREATE TABLE %t (type text NOT NULL, value bigint NOT NULL);';
my $plain_total = 'CREATE TABLE %s.total (PRIMARY KEY (type)) INHERITS (%t);';
my $plain_insert = "INSERT INTO %t VALUES ('delta', 3), ('delta', 4);";

my @cases = (
	{
		name => 'row and statement triggers',
		table => $plain . $plain_total . triggers_on('counted', 'total'),
		attacks => \@trigger_attacks
	},
	{
		name => 'triggers on the tables that the worker made',
		table => '',
		later => triggers_on('counted', 'total'),
		attacks => [ grep { $_ ne 'AFTER ROW UPDATE' } @trigger_attacks ]
	},
	{
		name => 'triggers on stuck, where deltas come and go',
		table => $plain,
		later => triggers_on('stuck')
		  . 'ALTER TABLE %s.total ADD CONSTRAINT small CHECK (value < 10);',
		fails => [ '23514', qr/"small"/ ],
		cure => 'ALTER TABLE %s.total DROP CONSTRAINT small;',
		attacks => [ grep { $_ !~ /UPDATE/ } @trigger_attacks ]
	},
	{
		name => 'deferred constraint triggers',
		table => $plain . $plain_total . <<'EOS',
CREATE CONSTRAINT TRIGGER later AFTER DELETE ON %t
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.trigger();
ALTER TABLE %t ENABLE ALWAYS TRIGGER later;
CREATE CONSTRAINT TRIGGER later AFTER INSERT OR UPDATE ON %s.total
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.trigger();
ALTER TABLE %s.total ENABLE ALWAYS TRIGGER later;
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
CREATE TABLE %t (type text, value bigint, page text NOT NULL);
CREATE TABLE %s.total (PRIMARY KEY (page),
	FOREIGN KEY (page) REFERENCES %s.pages DEFERRABLE INITIALLY DEFERRED,
	UNIQUE (type, value, page) DEFERRABLE INITIALLY DEFERRED) INHERITS (%t);
EOS
		insert => "INSERT INTO %t VALUES ('delta', 3, 'home'), ('delta', 4, 'home');"
	},
	{
		name => 'functions in CHECK constraints, domains, generated columns and defaults',
		table => <<'EOS',
CREATE DOMAIN %s.tag AS text CHECK (evil.yes('domain of ' || coalesce(VALUE, 'NULL')));
CREATE TABLE %t (type text CHECK (evil.yes('check on ' || type)),
	value bigint DEFAULT evil.num('default of a measure', 0),
	double bigint GENERATED ALWAYS AS (evil.num('generated', value)) STORED,
	CHECK (evil.yes('table check')));
CREATE TABLE %s.total (tag %s.tag DEFAULT 'mine', nothing %s.tag,
	number bigint DEFAULT evil.num('default', 0),
	own bigint GENERATED ALWAYS AS (evil.num('own generated', value)) STORED,
	CHECK (evil.num('own check', value) = value), PRIMARY KEY (type)) INHERITS (%t);
EOS
		insert => "INSERT INTO %t (type, value) VALUES ('delta', 3), ('delta', 4);",
		attacks => [
			'domain of mine', 'domain of NULL', 'check on total', 'generated', 'table check',
			'default', 'own generated', 'own check'
		]
	},
	{
		name => 'functions in indexes and statistics',
		table => $plain . $plain_total . <<'EOS',
CREATE INDEX ON %s.total (evil.num('index', value));
CREATE INDEX ON %s.total (value) WHERE evil.num('predicate', value) > 0;
CREATE UNIQUE INDEX ON %s.total (evil.num('unique', value)) WHERE type = 'total' AND evil.yes('constant');
CREATE UNIQUE INDEX ON %s.total (value) WHERE evil.yes('constant alone');
CREATE STATISTICS %s.statistics ON (value + evil.num('statistics', 1)), type FROM %t;
EOS
		attacks => [ 'index', 'predicate', 'unique', 'constant', 'constant alone', 'statistics' ]
	},
	{
		name => 'an inherited CHECK constraint',
		table => <<'EOS',
CREATE TABLE %s.parent (type text NOT NULL, value bigint, CHECK (evil.num('inherited', value) = value));
CREATE TABLE %t () INHERITS (%s.parent);
EOS
		attacks => ['inherited']
	},
	{
		name => 'casts',
		table => <<'EOS',
CREATE TYPE %s.kind AS ENUM ('a', 'b');
CREATE FUNCTION %s.to_text(%s.kind) RETURNS text LANGUAGE plpgsql IMMUTABLE AS
	'BEGIN PERFORM evil.attack(''cast''); RETURN ''text''; END';
CREATE CAST (%s.kind AS text) WITH FUNCTION %s.to_text AS IMPLICIT;
CREATE FUNCTION %s.to_kind(bigint) RETURNS %s.kind LANGUAGE plpgsql IMMUTABLE AS
	'BEGIN PERFORM evil.attack(''cast of a default''); RETURN ''a''; END';
CREATE CAST (bigint AS %s.kind) WITH FUNCTION %s.to_kind AS ASSIGNMENT;
CREATE TABLE %t (value bigint, kind %s.kind, CHECK (kind::text <> ''));
CREATE TABLE %s.total (UNIQUE NULLS NOT DISTINCT (kind),
	own %s.kind DEFAULT 1::bigint) INHERITS (%t);
EOS
		insert => "INSERT INTO %t VALUES (3, 'a'), (4, NULL);",
		attacks => [ 'cast', 'cast of a default' ]
	},
	{
		name => 'key columns of a domain, an enum and a composite type',
		table => <<'EOS',
CREATE DOMAIN %s.name AS text CHECK (evil.yes(VALUE) AND VALUE <> '');
CREATE TYPE %s.kind AS ENUM ('a', 'b');
CREATE TYPE %s.pair AS (x int, y text);
CREATE TABLE %t (type text, value bigint, page %s.name, kind %s.kind, pair %s.pair);
CREATE TABLE %s.total (UNIQUE NULLS NOT DISTINCT (page, kind, pair)) INHERITS (%t);
EOS
		insert => "INSERT INTO %t VALUES ('delta', 3, 'p', 'a', (1, '2')),"
		  . "('delta', 4, NULL, 'b', NULL);"
	},
	{
		name => 'key columns with hostile names',
		table => do
		{
			my @names = (
				q("a""; SELECT evil.attack('name'); --"), q{"b'); DROP TABLE %t; --"}, '"%t"',
				'"%1$s %n"', map { "\"$_\"" } 'sums', 'total', 'rows', 'gone', 'known',
				'written', 'rest', 'excluded');
			my $columns = join ', ', map { "$_ int" } @names;
			my $keys = join ', ', @names;

			"CREATE TABLE %t (type text, value bigint, $columns);"
			  . "CREATE TABLE %s.total (UNIQUE NULLS NOT DISTINCT ($keys)) INHERITS (%t);";
		},
	},
	{
		name => 'row security that the owner is exempt from',
		table => $plain . $plain_total . <<'EOS'
ALTER TABLE %t ENABLE ROW LEVEL SECURITY;
CREATE POLICY hide ON %t USING (evil.yes('policy') AND value < 4);
ALTER TABLE %s.total ENABLE ROW LEVEL SECURITY;
CREATE POLICY hide ON %s.total USING (evil.yes('policy') AND value < 4);
EOS
	},
	(
		map {
			{
				name => "row security that hides rows of $_ from the owner too",
				table => $plain,
				later => <<"EOS",
CREATE POLICY hide ON %s.$_ USING (evil.yes('policy') AND value < 4) WITH CHECK (true);
ALTER TABLE %s.$_ ENABLE ROW LEVEL SECURITY;
ALTER TABLE %s.$_ FORCE ROW LEVEL SECURITY;
EOS
				fails => [ '42501', qr/query would be affected by row-level security policy for table "$_"/ ],
				cure => "ALTER TABLE %s.$_ NO FORCE ROW LEVEL SECURITY;"
			}
		} 'counted', 'total'
	),
	{
		name => 'row security that forbids the owner to read and write stuck',
		table => $plain,
		later => <<'EOS',
CREATE POLICY hide ON %s.stuck USING (evil.yes('policy') AND value < 4);
ALTER TABLE %s.stuck ENABLE ROW LEVEL SECURITY;
ALTER TABLE %s.stuck FORCE ROW LEVEL SECURITY;
ALTER TABLE %s.total ADD CONSTRAINT small CHECK (value < 10);
EOS
		fails => [ '42501', qr/query would be affected by row-level security policy for table "stuck"/ ],
		cure => 'ALTER TABLE %s.stuck NO FORCE ROW LEVEL SECURITY; ALTER TABLE %s.total DROP CONSTRAINT small;'
	},
	{
		name => 'a trigger that deletes the deltas first',
		table => $plain,
		later => <<'EOS',
CREATE FUNCTION %s.others() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN DELETE FROM ONLY %t; RETURN NULL; END';
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
	'BEGIN UPDATE %s.total SET value = 0; RETURN NULL; END';
CREATE TRIGGER more AFTER UPDATE ON %s.total EXECUTE FUNCTION %s.more();
ALTER TABLE %s.total ENABLE ALWAYS TRIGGER more;
EOS
		fails => [ '54001', qr/stack depth limit exceeded/ ],
		cure => 'DROP TRIGGER more ON %s.total;'
	},
	{
		name => 'a rule',
		table => $plain,
		later => <<'EOS',
CREATE RULE steal AS ON DELETE TO %t DO ALSO SELECT evil.attack('rule');
EOS
		fails => [ '42809', qr/"postgres\.%t" has rules/ ],
		cure => 'DROP RULE steal ON %t;'
	},
	{
		name => 'a trigger that renames the table and puts another there',
		table => $plain . 'CREATE TABLE %s.spare (LIKE %t);',
		later => <<'EOS',
CREATE FUNCTION %s.swap() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN ALTER TABLE %t RENAME TO away; ALTER TABLE %s.spare RENAME TO counted; RETURN NULL; END';
CREATE TRIGGER swap AFTER UPDATE ON %s.total EXECUTE FUNCTION %s.swap();
ALTER TABLE %s.total ENABLE ALWAYS TRIGGER swap;
EOS
		fails => [ '55006', qr/a table of "postgres\.%t" was replaced/ ],
		cure => 'DROP TRIGGER swap ON %s.total;'
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
		refused => [ '42809', qr/"postgres\.%t"/ ]
	},
	{
		name => 'a materialized view',
		table => "CREATE MATERIALIZED VIEW %t AS SELECT 'delta'::text AS type, 1::bigint AS value;",
		insert => '',
		refused => [ '42809', qr/"postgres\.%t"/ ]
	},
	{
		name => 'a foreign table',
		table => <<'EOS',
CREATE SERVER %s FOREIGN DATA WRAPPER nothing;
CREATE FOREIGN TABLE %t (type text, value bigint) SERVER %s;
EOS
		insert => '',
		refused => [ '42809', qr/"postgres\.%t"/ ]
	},
	(
		map {
			{
				name => "a foreign table as $_",
				table => $plain
				  . "CREATE SERVER %s FOREIGN DATA WRAPPER nothing;"
				  . "CREATE FOREIGN TABLE %s.$_ () INHERITS (%t) SERVER %s;",
				refused => [ '42809', qr/"postgres\.%s\.$_"/ ]
			}
		} 'total', 'stuck'
	),
	{
		name => 'a partitioned table',
		table => <<'EOS',
CREATE TABLE %t (type text, value bigint) PARTITION BY LIST (type);
CREATE TABLE %s.part PARTITION OF %t DEFAULT;
EOS
		refused => [ '42809', qr/"postgres\.%t"/ ]
	},
	{
		name => 'a partition',
		table => <<'EOS',
CREATE TABLE %s.parent (type text, value bigint) PARTITION BY LIST (evil.num('partition ' || type, 1));
CREATE TABLE %t PARTITION OF %s.parent FOR VALUES IN (1);
EOS
		refused => [ '42809', qr/"postgres\.%t"/ ]
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
		refused => [ '42P16', qr/"value".*"postgres\.%t"/s ]
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
		is(scalar(attacks($node, $offset)), 0, "$name: no code has run");
		next;
	}

	# What comes later must come after the first fold.
	my $pid = $node->safe_psql('postgres', "SELECT worker_spi_launch($index)");
	folds($node, $index, "$name: the worker folds");

	as($node, 'attacker', $expand->($case->{later} // '') . $insert);
	$sum += 7;

	if ($case->{fails})
	{
		my ($sqlstate, $pattern) = @{ $case->{fails} };
		error_is($node, 'postgres', "SELECT worker_spi_fold($index)",
			$sqlstate, $expand->($pattern), "$name: the fold fails");
		is(total($node, $index), $sum, "$name: the failed fold has lost nothing");
		as($node, 'attacker', $expand->($case->{cure}));
	}
	folds($node, $index, "$name: it folds what came later");
	is( $node->safe_psql('postgres', $expand->(<<'EOS')),
SELECT (SELECT count(*) FROM ONLY %t), (SELECT count(*) FROM %s.stuck), (SELECT sum(value) FROM %t),
	string_agg(DISTINCT relowner::regrole::text, ' ')
FROM pg_class WHERE relnamespace = '%s'::regnamespace AND relkind = 'r'
EOS
		"0|0|$sum|attacker",
		"$name: the sum is right, and all tables are the attacker's");
	is(worker($node, $index, 'pid'), $pid, "$name: the worker is the same process");
	attacks_are($node, $offset, $pid, 'attacker', $case->{attacks} // [],
		"$name: the code ran as the attacker's");
	is($case->{attacks} ? 0 : scalar(attacks($node, $offset)), 0,
		"$name: no other code has run");
	$node->safe_psql('postgres', "SELECT worker_spi_stop($index)");
}

# ------------------------------------------------------------------------
# Settings that code of the tables makes do not outlast the fold, whatever they
# are: each fold finds what the first has found.
# ------------------------------------------------------------------------

$n = $next_index++;
as($node, 'attacker', <<EOS);
CREATE SCHEMA schema$n;
CREATE TABLE schema$n.counted (type text NOT NULL, value bigint);
CREATE TABLE schema$n.total (PRIMARY KEY (type)) INHERITS (schema$n.counted);
CREATE TABLE schema$n.seen (round int, found text, made text, pinned text);
CREATE FUNCTION schema$n.all_settings() RETURNS text LANGUAGE sql AS
	'SELECT string_agg(name || ''='' || setting, '';'' ORDER BY name) FROM pg_settings';
CREATE FUNCTION schema$n.settings() RETURNS trigger LANGUAGE plpgsql AS \$\$
DECLARE
	found text := schema$n.all_settings();
	pinned text := (SELECT string_agg(current_setting(name), ';')
		FROM unnest('{search_path,row_security,session_replication_role}'::text[]) AS name);
BEGIN
	PERFORM set_config(name, value, false)
	FROM (VALUES ('search_path', 'schema$n, public'), ('row_security', 'on'),
		('lock_timeout', '0'), ('statement_timeout', '1d'), ('synchronous_commit', 'local'),
		('default_transaction_isolation', 'serializable'), ('enable_seqscan', 'off'),
		('work_mem', '64kB'), ('quote_all_identifiers', 'on'), ('DateStyle', 'German'),
		('xmlbinary', 'hex'), ('check_function_bodies', 'off')) AS made (name, value);
	INSERT INTO schema$n.seen VALUES
		((SELECT count(*) FROM schema$n.seen) + 1, found, schema$n.all_settings(), pinned);
	RETURN NULL;
END \$\$;
CREATE TRIGGER settings BEFORE INSERT ON schema$n.total EXECUTE FUNCTION schema$n.settings();
ALTER TABLE schema$n.total ENABLE ALWAYS TRIGGER settings;
INSERT INTO schema$n.counted VALUES ('delta', 1);
EOS
$node->safe_psql('postgres', "SELECT worker_spi_launch($n)");
folds($node, $n, 'tables with a trigger that makes settings are folded');
foreach my $round (2 .. 3)
{
	as($node, 'attacker', "INSERT INTO schema$n.counted VALUES ('delta', 1)");
	folds($node, $n, "they are folded, round $round");
}
is( $node->safe_psql('postgres',
		"SELECT count(*), count(DISTINCT found), bool_and(found <> made), string_agg(DISTINCT pinned, ' ') FROM schema$n.seen"
	),
	'3|1|t|pg_catalog, pg_temp;off;origin',
	'settings that a trigger makes are gone in the next fold');
$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");

# ------------------------------------------------------------------------
# Code that never ends is ended with the worker, at the latest.
# ------------------------------------------------------------------------

$n = $next_index++;
as($node, 'attacker', <<EOS);
CREATE SCHEMA schema$n;
CREATE TABLE schema$n.counted (type text NOT NULL, value bigint);
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
CREATE TABLE schema$n.counted (type text NOT NULL, value bigint);
GRANT USAGE ON SCHEMA schema$n TO alice;
CREATE TRIGGER t AFTER DELETE ON schema$n.counted FOR EACH ROW EXECUTE FUNCTION evil.trigger();
ALTER TABLE schema$n.counted ENABLE ALWAYS TRIGGER t;
EOS
my $pid = $node->safe_psql('postgres', "SELECT worker_spi_launch($n)");
foreach my $owner ('attacker', 'alice', 'attacker')
{
	$node->safe_psql('postgres', <<EOS);
BEGIN;
ALTER TABLE schema$n.counted OWNER TO $owner;
ALTER TABLE schema$n.total OWNER TO $owner;
ALTER TABLE schema$n.stuck OWNER TO $owner;
INSERT INTO schema$n.counted VALUES ('delta', 1);
COMMIT;
EOS
	my $offset = -s $node->logfile;
	folds($node, $n, "the tables are folded, now $owner\'s");
	attacks_are($node, $offset, $pid, $owner, ['AFTER ROW DELETE'],
		"the worker acts as the tables' owner, now $owner");
}
$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");

# ------------------------------------------------------------------------
# The tables' owner is not the schema's, and who owns the schema renames it
# away and puts another there, with tables of its own, in the middle of a fold.
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
CREATE TABLE mine$n.counted (type text NOT NULL, value bigint);
CREATE TABLE mine$n.total (PRIMARY KEY (type)) INHERITS (mine$n.counted);
CREATE TABLE mine$n.stuck (sqlstate text, reason text, since timestamptz) INHERITS (mine$n.counted);
GRANT ALL ON SCHEMA mine$n TO PUBLIC;
GRANT ALL ON mine$n.counted, mine$n.total, mine$n.stuck TO PUBLIC;
INSERT INTO mine$n.counted VALUES ('delta', 1);
@{[ triggers_on('counted', 'total', 'stuck') =~ s/%s/mine$n/gr ]}
EOS
	as($node, $victim, <<EOS);
CREATE TABLE schema$n.counted (type text NOT NULL, value bigint);
CREATE TABLE schema$n.total (PRIMARY KEY (type)) INHERITS (schema$n.counted);
CREATE FUNCTION schema$n.hold() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	SET lock_timeout = 0;
	PERFORM pg_advisory_xact_lock($n);
	-- Locking a table anew makes the worker notice the swap.
	PERFORM FROM pg_catalog.pg_language;
	RETURN NULL;
END \$\$;
CREATE TRIGGER hold AFTER INSERT ON schema$n.total EXECUTE FUNCTION schema$n.hold();
ALTER TABLE schema$n.total ENABLE ALWAYS TRIGGER hold;
EOS
	my $pid = $node->safe_psql('postgres', "SELECT worker_spi_launch($n)");
	as($node, $victim, "INSERT INTO schema$n.counted VALUES ('delta', 2)");
	folds($node, $n, "tables of $victim in the attacker's schema are folded");

	# The swap is made by a session that waits for the worker, since a share that
	# is held up for three seconds is begun anew.
	as($node, $victim, "INSERT INTO schema$n.counted VALUES ('delta', 3)");
	my $swap = start_psql($node, 'postgres', 'swap', <<EOS, '-U', 'attacker');
DO \$\$
BEGIN
	PERFORM pg_advisory_lock($n);
	WHILE NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = $pid) LOOP
		PERFORM pg_sleep(0.01);
	END LOOP;
	ALTER SCHEMA schema$n RENAME TO away$n;
	ALTER SCHEMA mine$n RENAME TO schema$n;
	COMMIT;
	PERFORM pg_advisory_unlock($n);
END
\$\$
EOS
	$node->poll_query_until('postgres',
		"SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = $n AND granted")
	  or die 'nobody waits for the worker';
	my $offset = -s $node->logfile;
	$node->safe_psql('postgres', "SELECT worker_spi_fold($n, wait => false)");
	ok((finish_psql($swap))[2], 'schemas are swapped when the worker is held up');
	$node->poll_query_until('postgres', <<EOS) or die 'the cycle does not end';
SELECT state <> 'folding' FROM worker_spi_workers WHERE index = $n
EOS
	my ($until_noticed) = slurp_file($node->logfile, $offset) =~
	  /\A(.*?\[$pid\] [^\n]*ERROR:  a table of "postgres\.schema$n\.counted" was replaced)/s;
	ok(defined $until_noticed,
		"a fold of tables of $victim fails when others take their place");
	unlike($until_noticed // '', qr/LOG:  attack\|/,
		"code in the tables that replaced those of $victim never ran in that fold");

	# A second later the worker comes again, to what are the attacker's tables by now.
	attacks_are($node, $offset, undef, 'attacker', [],
		"code in the tables that replaced those of $victim never ran as theirs");
	is( $node->safe_psql('postgres',
			"SELECT (SELECT count(*) FROM ONLY away$n.counted), (SELECT sum(value) FROM away$n.total)"),
		'1|2',
		"the interrupted fold of tables of $victim changed nothing");

	# Now they are the attacker's tables, and are folded as such.
	folds($node, $n, "the tables that replaced those of $victim are folded");
	attacks_are($node, $offset, $pid, 'attacker', [ 'AFTER ROW DELETE', 'AFTER ROW INSERT' ],
		"the tables that replaced those of $victim are folded as their owner's");
	is(rows($node, $n), 'total|1', 'and are folded right');

	as($node, 'attacker', <<EOS);
BEGIN;
ALTER SCHEMA schema$n RENAME TO mine$n;
ALTER SCHEMA away$n RENAME TO schema$n;
COMMIT;
EOS
	folds($node, $n, "tables of $victim are folded again once they are back");
	is(rows($node, $n), 'total|5', "the total of $victim is right");
	is(worker($node, $n, 'pid'), $pid, "and the worker is the same process");

	# The same at random moments: 200 swaps and more as fast as they go, with
	# deltas in both tables, until the worker has folded 40 times without a
	# pause.  A fold that is met by a swap may fail.
	$node->safe_psql('postgres', <<EOS);
DROP TRIGGER hold ON schema$n.total;
CREATE TABLE swapped$n (rounds int);
CREATE SEQUENCE folds$n;
GRANT ALL ON swapped$n, folds$n TO attacker;
EOS
	as($node, $victim, "GRANT INSERT ON schema$n.counted TO attacker");
	$offset = -s $node->logfile;
	my $swapper = start_psql($node, 'postgres', 'swapper', <<EOS, '-U', 'attacker');
DO \$\$
DECLARE
	rounds int := 0;
BEGIN
	WHILE rounds < 100 OR (SELECT last_value FROM folds$n) < 40 LOOP
		ALTER SCHEMA schema$n RENAME TO away$n;
		ALTER SCHEMA mine$n RENAME TO schema$n;
		INSERT INTO schema$n.counted VALUES ('delta', 1);
		COMMIT;
		ALTER SCHEMA schema$n RENAME TO mine$n;
		ALTER SCHEMA away$n RENAME TO schema$n;
		INSERT INTO schema$n.counted VALUES ('delta', 1);
		COMMIT;
		rounds := rounds + 1;
	END LOOP;
	INSERT INTO swapped$n VALUES (rounds);
END \$\$;
EOS
	note('how often folds ended how: ' . $node->safe_psql('postgres', <<EOS));
CREATE TEMP TABLE folds (sqlstate text);
DO \$\$
BEGIN
	WHILE NOT EXISTS (SELECT FROM swapped$n) LOOP
		PERFORM nextval('folds$n');
		BEGIN
			PERFORM worker_spi_fold($n);
			INSERT INTO folds VALUES ('00000');
		EXCEPTION WHEN OTHERS THEN
			INSERT INTO folds VALUES (SQLSTATE);
		END;
	END LOOP;
END \$\$;
SELECT sqlstate, count(*) FROM folds GROUP BY sqlstate;
EOS
	my (undef, $err, $done) = finish_psql($swapper);
	ok($done, 'schemas are swapped while the worker folds') or diag($err);
	# After some failures in a row the worker begins afresh.
	$node->poll_query_until('postgres',
		"SELECT state NOT IN ('starting', 'down', 'folding') FROM worker_spi_workers WHERE index = $n")
	  or die "worker $n did not come back";
	folds($node, $n, "tables of $victim are folded after the swaps");
	attacks_are($node, $offset, undef, 'attacker', [],
		"none of the swaps made the attacker's code run as $victim");
	is( $node->safe_psql('postgres', <<EOS),
SELECT (SELECT sum(value) FROM schema$n.counted) - rounds, (SELECT sum(value) FROM mine$n.counted) - rounds
FROM swapped$n
EOS
		'5|1', "neither tables have lost or gained a count");
	$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");
}

# ------------------------------------------------------------------------
# The same when the swap comes before the first statement: what takes the place
# of a table is a view, which has a column ctid and calls a function.  The worker
# is held up by a lock on its totals, for which it does not wait long; if the
# swap comes too late, it is made once more.
# ------------------------------------------------------------------------

foreach my $table ('counted', 'stuck')
{
	$n = $next_index++;
	as($node, 'attacker', <<EOS);
CREATE SCHEMA schema$n;
CREATE SCHEMA mine$n;
CREATE FUNCTION mine$n.tid() RETURNS tid LANGUAGE plpgsql AS
	'BEGIN PERFORM evil.attack(''view''); RETURN ''(0,1)''; END';
@{[ $table eq 'stuck' ? "CREATE TABLE mine$n.counted (type text NOT NULL, value bigint NOT NULL);" : '' ]}
CREATE VIEW mine$n.$table AS SELECT 1::bigint AS value, '22003'::text AS sqlstate,
	''::text AS reason, now() AS since, mine$n.tid() AS ctid;
EOS
	$node->safe_psql('postgres', <<EOS);
CREATE TABLE schema$n.counted (type text NOT NULL, value bigint NOT NULL);
INSERT INTO schema$n.counted VALUES ('delta', 9223372036854775807), ('delta', 1);
SELECT worker_spi_launch($n);
EOS

	# Rows in stuck are counted at the beginning of a cycle, after a look for deltas.
	error_is($node, 'postgres', "SELECT worker_spi_fold($n)", '22003', qr/out of range/,
		"before there is a view $table, a row is stuck");

	my $offset = -s $node->logfile;
	my $holder = $node->background_psql('postgres');
	my $attacker = $node->background_psql('postgres', extra_params => [ '-U', 'attacker' ]);
	my $noticed;
	foreach my $try (1 .. 20)
	{
		$holder->query_safe("BEGIN; LOCK TABLE schema$n.total IN SHARE MODE");
		$node->safe_psql('postgres', <<EOS);
INSERT INTO schema$n.counted VALUES ('delta', 2);
SELECT worker_spi_fold($n, wait => false);
EOS
		$node->poll_query_until('postgres', <<EOS) or die 'the worker is not held up';
SELECT wait_event_type = 'Lock' FROM pg_stat_activity JOIN worker_spi_workers USING (pid) WHERE index = $n
EOS
		$attacker->query_safe(
			"BEGIN; ALTER SCHEMA schema$n RENAME TO away$n; ALTER SCHEMA mine$n RENAME TO schema$n; COMMIT");
		$holder->query_safe('COMMIT');
		$node->poll_query_until('postgres',
			"SELECT state IN ('idle', 'backoff') FROM worker_spi_workers WHERE index = $n")
		  or die 'the cycle does not end';
		$noticed = $node->log_contains(
			qr/ERROR:  a table of "postgres\.schema$n\.counted" was replaced/, $offset);
		last if $noticed || attacks($node, $offset);
		$attacker->query_safe(
			"BEGIN; ALTER SCHEMA schema$n RENAME TO mine$n; ALTER SCHEMA away$n RENAME TO schema$n; COMMIT");
	}
	ok($noticed, "a view in place of $table is noticed");
	is(scalar(attacks($node, $offset)), 0, "a view in place of $table is not read");
	$holder->quit;
	$attacker->quit;
	$node->safe_psql('postgres', "SELECT worker_spi_stop($n)");
}

# ------------------------------------------------------------------------
# All in all
# ------------------------------------------------------------------------
nothing_won($node, 'postgres');

$node->stop;
done_testing();
