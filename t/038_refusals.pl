# Tables that cannot be folded are refused, with an SQLSTATE, the name of what is
# wrong, and a hint that is a command wherever one will do: by launch, which leaves
# nothing behind, and by the next cycle of a worker that runs when it comes later.
# When it is mended, the same worker folds, and no delta is lost meanwhile.
#
# Each case is shown by worker 1, which runs all the time, and by worker 2, which is
# launched for it.  Nothing is waited for but worker_spi_launch() and
# worker_spi_fold().

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('refusals', <<EOC, extra => [ '--encoding=UTF8', '--locale=C.UTF-8' ]);
worker_spi.total_workers = 1
autovacuum = off
EOC

# What a command drops along with a schema is nobody's concern.
$ENV{PGOPTIONS} = '-c client_min_messages=warning';

folds($node, 1, 'the worker answers');
my $pid = worker($node, 1, 'pid');

# ------------------------------------------------------------------------
# How a case is shown
# ------------------------------------------------------------------------

my $counted = "type text NOT NULL DEFAULT 'delta', value bigint NOT NULL";
my $insert = "INSERT INTO %s.counted (value, page) VALUES (1, 'a'), (2, 'a')";

# A case.  In all its SQL %s is the schema.
#
#	columns		of counted besides type and value; by default page text NOT NULL
#	counted		SQL that makes counted, if columns will not do
#	key			what the totals have; by default PRIMARY KEY (page)
#	total		SQL that makes the totals, if a key will not do
#	stuck		SQL that makes stuck; by default as the worker does
#	more		SQL that is run after that
#	insert		SQL that inserts two deltas of 1 and 2
#	error		the SQLSTATE
#	like		what the message has, the name of what is wrong above all
#	hint		what the hint has, if anything
#	cure		SQL that mends it; by default the command of the hint, word for word
#	no_launch	only a worker that runs can meet it
#	no_cycle	only launch can meet it
#	result		of query, by default the sum and the number of totals
sub refused
{
	my ($name, %case) = @_;
	my $make_counted = $case{counted}
	  // ("CREATE TABLE %s.counted ($counted"
		. (map { $_ ? ", $_" : '' } $case{columns} // 'page text NOT NULL')[0]
		. ')');
	my $make_total = $case{total}
	  // "CREATE TABLE %s.total (@{[ $case{key} // 'PRIMARY KEY (page)' ]}) INHERITS (%s.counted)";
	my $make_stuck = $case{stuck}
	  // 'CREATE TABLE %s.stuck (sqlstate text, reason text, since timestamptz) INHERITS (%s.counted)';
	my $is_of_stuck = defined $case{stuck} || grep { /\bstuck\b/ } map { $_ // '' } @case{ 'more', 'cure' };
	my $query = $case{query}
	  // 'SELECT sum(value), count(*) FROM %s.counted';
	my $result = $case{result} // '3|1';

	foreach my $index (1, 2)
	{
		my $launch = $index == 2;
		my $where = $launch ? 'by launch' : 'by the next cycle';
		my ($table, $schema) = ("postgres\\.schema$index\\.", "schema$index");
		my ($like, $hint) = map { defined $_ ? s{%t\.}{$table}gr =~ s{%s\b}{$schema}gr : undef } @case{ 'like', 'hint' };

		next if $case{ $launch ? 'no_launch' : 'no_cycle' };

		# Launch is to make stuck when all is well, and not before.
		my $sql = join ";\n", "\\set VERBOSITY verbose\nBEGIN", 'DROP SCHEMA IF EXISTS %s CASCADE',
		  'CREATE SCHEMA %s', $make_counted, $make_total,
		  $launch && !$is_of_stuck ? '' : $make_stuck,
		  $case{more} // '', $case{insert} // $insert, 'COMMIT',
		  "SELECT string_agg(relname, ' ') FROM relations WHERE schema = '%s'",
		  $launch
		  ? ('SELECT worker_spi_launch(2)', <<'EOC')
SELECT (SELECT count(*) FROM worker_spi_workers WHERE index = 2),
	(SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'worker!_spi% 2' ESCAPE '!')
EOC
		  : ('SELECT worker_spi_fold(1)', 'SELECT last_sqlstate FROM worker_spi_workers WHERE index = 1'),
		  "SELECT string_agg(relname, ' ') FROM relations WHERE schema = '%s'";
		my ($ret, $out, $err) = $node->psql('postgres', $sql =~ s/%s/$schema/gr, on_error_stop => 0);
		my ($found_hint) = $err =~ /^HINT:  (.*)$/m;
		ok( $err =~ /^\S+ ERROR:  $case{error}: .*?$like/s
			  && (!defined $hint || ($found_hint // '') =~ /$hint/),
			"refused $where: $name")
		  or diag("wanted $case{error}, $like and hint "
			  . ($hint // '') . ", got $err");
		my ($tables, $state, $tables_then) = split /\n/, $out;
		is($state, $launch ? '0|0' : $case{error},
			$launch ? 'it leaves no worker behind' : 'the view has it');
		is($tables_then, $tables, 'and no table is made');

		my $cure = $case{cure};
		if (!defined $cure)
		{
			($cure) = ($found_hint // '') =~ /^(?:[^:]*: )?((?:ALTER|CREATE|DROP|GRANT) .*)$/;
			$cure //= 'SELECT no_command_in_the_hint';
		}
		$cure = ($cure . ($launch ? '; SELECT worker_spi_launch(2) > 0' : ''))
		  . "; SELECT worker_spi_fold($index); SELECT count(*) FROM ONLY %s.counted; $query; "
		  . ($launch ? 'SELECT worker_spi_stop(2)' : '');
		($ret, $out, $err) = $node->psql('postgres', $cure =~ s/%s/$schema/gr, on_error_stop => 1);
		is("$out$err", $launch ? "t\nt\n0\n$result\nt" : "t\n0\n$result",
			'mended, it is folded');
		$node->psql('postgres', 'SELECT worker_spi_stop(2)') if $launch && $ret != 0;
	}
	return;
}

# The relations of each schema.
$node->safe_psql('postgres', <<'EOC');
CREATE VIEW relations AS SELECT nspname AS schema, relname
FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace ORDER BY relname;
EOC

my $good = <<"EOC";
CREATE TABLE %s.counted ($counted, page text NOT NULL);
CREATE TABLE %s.total (PRIMARY KEY (page)) INHERITS (%s.counted);
CREATE TABLE %s.stuck (sqlstate text, reason text, since timestamptz) INHERITS (%s.counted);
$insert
EOC

# ------------------------------------------------------------------------
# What is not an ordinary table
# ------------------------------------------------------------------------

$node->safe_psql('postgres', <<'EOC');
CREATE ROLE alice;
CREATE ROLE bob;
CREATE FOREIGN DATA WRAPPER nothing;
CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing;
CREATE ACCESS METHOD other TYPE TABLE HANDLER heap_tableam_handler;
CREATE TABLE parts (type text, value bigint, page text) PARTITION BY LIST (page);
CREATE COLLATION other (provider = libc, locale = "POSIX");
CREATE FUNCTION zero() RETURNS bigint IMMUTABLE LANGUAGE sql AS 'SELECT 0::bigint';
CREATE DOMAIN whole AS bigint;
CREATE DOMAIN word AS text;
CREATE SEQUENCE numbers;
EOC

foreach my $test (
	[ 'a view', 'CREATE VIEW %s.counted AS SELECT 1 AS value', 'DROP VIEW %s.counted' ],
	[ 'a materialized view', 'CREATE MATERIALIZED VIEW %s.counted AS SELECT 1 AS value', 'DROP MATERIALIZED VIEW %s.counted' ],
	[ 'a partitioned table', "CREATE TABLE %s.counted ($counted, page text) PARTITION BY LIST (page)", 'DROP TABLE %s.counted' ],
	[ 'a partition', 'CREATE TABLE %s.counted PARTITION OF parts DEFAULT', 'DROP TABLE %s.counted' ],
	[ 'a foreign table', "CREATE FOREIGN TABLE %s.counted ($counted, page text) SERVER nowhere", 'DROP FOREIGN TABLE %s.counted' ],
	[ 'a sequence', 'CREATE SEQUENCE %s.counted', 'DROP SEQUENCE %s.counted' ],
	[ 'a composite type', 'CREATE TYPE %s.counted AS (type text, value bigint)', 'DROP TYPE %s.counted' ])
{
	my ($name, $sql, $drop) = @$test;

	refused(
		"counted is $name",
		counted => $sql,
		total => '',
		stuck => '',
		insert => '',
		error => '42809',
		like => '"%t.counted"',
		cure => "BEGIN; $drop; $good; COMMIT");
}
foreach my $table ('total', 'stuck')
{
	my $own = $table eq 'total' ? '' : 'sqlstate text, reason text, since timestamptz';

	refused(
		"$table is a foreign table",
		$table => "CREATE FOREIGN TABLE %s.$table ($own) INHERITS (%s.counted) SERVER nowhere",
		error => '42809',
		like => "\"%t.$table\"",
		cure => "DROP FOREIGN TABLE %s.$table; CREATE TABLE %s.$table ("
		  . ($own || 'PRIMARY KEY (page)')
		  . ') INHERITS (%s.counted)');
}
error_is($node, 'postgres', 'ALTER TABLE parts INHERIT schema1.counted', '42809', qr/parts|partitioned/,
	'the server keeps partitioned tables from becoming totals');

foreach my $table ('counted', 'total', 'stuck')
{
	refused(
		"$table has another access method",
		more => "ALTER TABLE %s.$table SET ACCESS METHOD other",
		error => '42809',
		like => "\"%t.$table\".*\"heap\"",
		hint => "ALTER TABLE %s\\.$table SET ACCESS METHOD heap");
	refused(
		"$table has a rule",
		more => "CREATE RULE nothing AS ON DELETE TO %s.$table DO INSTEAD NOTHING",
		error => '42809',
		like => "\"%t.$table\" has rules",
		hint => 'rule',
		cure => "DROP RULE nothing ON %s.$table");
}
refused(
	'counted has a rule for INSERT',
	more => 'CREATE TABLE log (v bigint); CREATE RULE also AS ON INSERT TO %s.counted DO ALSO INSERT INTO log VALUES (new.value)',
	error => '42809',
	like => '"%t.counted" has rules',
	cure => 'DROP RULE also ON %s.counted; DROP TABLE log');

# What the worker makes does not depend on the settings of the database.
$node->safe_psql('postgres', 'ALTER DATABASE postgres SET default_table_access_method = other');
is( $node->safe_psql('postgres', <<'EOC'),
SELECT worker_spi_launch(7) > 0;
SELECT string_agg(DISTINCT amname, ' ') FROM pg_class c JOIN pg_am a ON a.oid = relam
WHERE relnamespace = 'schema7'::regnamespace AND relkind = 'r';
SELECT worker_spi_stop(7);
ALTER DATABASE postgres RESET default_table_access_method;
EOC
	"t\nheap\nt", 'what the worker makes is a heap, whatever the default');

# ------------------------------------------------------------------------
# The tree, names and owners
# ------------------------------------------------------------------------

refused(
	'a third child',
	more => 'CREATE TABLE %s."Third" () INHERITS (%s.counted)',
	error => '42809',
	like => '"%t.Third"',
	hint => 'ALTER TABLE %s\."Third" NO INHERIT %s\.counted$');
refused(
	'a third child elsewhere',
	more => 'DROP TABLE IF EXISTS third; CREATE TABLE third () INHERITS (%s.counted)',
	error => '42809',
	like => '"postgres.public.third"');
foreach my $table ('total', 'stuck')
{
	refused(
		"a grandchild by $table",
		more => "CREATE TABLE %s.\"Grand\" () INHERITS (%s.$table)",
		error => '42809',
		like => '"%t.Grand"',
		hint => "ALTER TABLE %s\\.\"Grand\" NO INHERIT %s\\.$table\$");
}
refused(
	'stuck inherits the totals',
	stuck => 'CREATE TABLE %s.stuck (sqlstate text, reason text, since timestamptz) INHERITS (%s.counted, %s.total)',
	error => '42809',
	like => '"%t.stuck"',
	hint => 'ALTER TABLE %s\.stuck NO INHERIT %s\.total$');

# The parent of counted sees all.
is( $node->safe_psql('postgres', <<"EOC"),
CREATE TABLE everything (value bigint NOT NULL);
BEGIN;
DROP SCHEMA schema1 CASCADE;
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted ($counted, page text NOT NULL) INHERITS (everything);
CREATE TABLE schema1.total (PRIMARY KEY (page)) INHERITS (schema1.counted);
CREATE TABLE schema1.stuck (sqlstate text, reason text, since timestamptz) INHERITS (schema1.counted);
INSERT INTO schema1.counted (value, page) VALUES (1, 'a'), (2, 'a'), (4, 'b');
COMMIT;
SELECT worker_spi_fold(1);
SELECT sum(value), count(*) FROM everything;
EOC
	"t\n7|2", 'counted itself may inherit');

foreach my $table ('total', 'stuck')
{
	my $own = $table eq 'total' ? 'PRIMARY KEY (page)' : 'sqlstate text, reason text, since timestamptz';

	refused(
		"$table has another owner",
		more => "ALTER TABLE %s.$table OWNER TO alice",
		error => '42501',
		like => "\"%t.$table\" .*owner",
		hint => 'OWNER',
		cure => "ALTER TABLE %s.$table OWNER TO CURRENT_USER");
	refused(
		"$table is there, and no child",
		$table => "CREATE TABLE %s.$table (LIKE %s.counted INCLUDING ALL, $own)",
		error => '42P07',
		like => "\"%t.$table\".*\"%t.counted\"",
		hint => "ALTER TABLE %s\\.$table INHERIT %s\\.counted");
	refused(
		"the name of $table is that of a view",
		$table => "CREATE VIEW %s.$table AS SELECT 1",
		error => '42P07',
		like => "\"%t.$table\"",
		cure => "DROP VIEW %s.$table; CREATE TABLE %s.$table ($own) INHERITS (%s.counted)");
}
refused(
	'counted has another owner than its children',
	more => 'ALTER TABLE %s.counted OWNER TO alice; GRANT ALL ON SCHEMA %s TO alice',
	error => '42501',
	like => '"%t.(total|stuck)" .*owner',
	cure => 'ALTER TABLE %s.total OWNER TO alice; ALTER TABLE %s.stuck OWNER TO alice');
refused(
	'the owner may not create tables',
	stuck => '',
	more => 'ALTER TABLE %s.counted OWNER TO alice; ALTER TABLE %s.total OWNER TO alice; GRANT USAGE ON SCHEMA %s TO alice',
	error => '42501',
	like => '"%t.counted"',
	hint => '^GRANT CREATE ON SCHEMA %s TO alice$',
	no_cycle => 1);

# A table that is missing is made by launch, and not by a worker that runs.
foreach my $table ('total', 'stuck')
{
	my $own = $table eq 'total' ? 'PRIMARY KEY (type)' : 'sqlstate text, reason text, since timestamptz';

	refused(
		"$table is missing",
		columns => '',
		key => 'PRIMARY KEY (type)',
		$table => '',
		insert => 'INSERT INTO %s.counted (value) VALUES (1), (2)',
		error => '42P01',
		like => "\"%t.$table\" does not exist",
		hint => 'stop the worker and launch it',
		cure => "CREATE TABLE %s.$table ($own) INHERITS (%s.counted)",
		no_launch => 1);
}

# ------------------------------------------------------------------------
# stuck
# ------------------------------------------------------------------------

foreach my $column ('sqlstate', 'reason', 'since')
{
	my $type = $column eq 'since' ? 'timestamptz' : 'text';

	# The worker's own column of that name stays.
	refused(
		"counted has a column $column",
		columns => "page text NOT NULL, $column $type",
		error => '42P16',
		like => "\"%t.counted\" has a column \"$column\"",
		cure => "ALTER TABLE %s.counted DROP $column");
	refused(
		"stuck has no column $column",
		more => "ALTER TABLE %s.stuck DROP $column",
		error => '42P16',
		like => "\"%t.stuck\" has no column \"$column\"",
		cure => "ALTER TABLE %s.stuck ADD $column $type");
}
refused(
	'stuck has such a column of another type',
	more => 'ALTER TABLE %s.stuck ALTER since TYPE date',
	error => '42P16',
	like => '"%t.stuck" has no column "since" of type timestamp with time zone',
	cure => 'ALTER TABLE %s.stuck ALTER since TYPE timestamptz');
refused(
	'stuck has an index',
	more => 'CREATE INDEX "My index" ON %s.stuck (page)',
	error => '42809',
	like => '"%t.stuck" has an index',
	hint => '"My index"',
	cure => 'DROP INDEX %s."My index"');
foreach my $test (
	[ 'a check', 'CHECK (value < 10)' ],
	[ 'a foreign key', 'FOREIGN KEY (page) REFERENCES known' ],
	[ 'a check that is not valid', 'CHECK (value < 10) NOT VALID' ])
{
	my ($name, $definition) = @$test;

	refused(
		"stuck has $name of its own",
		more => "CREATE TABLE IF NOT EXISTS known (page text PRIMARY KEY); ALTER TABLE %s.stuck ADD CONSTRAINT mine $definition",
		error => '42809',
		like => '"%t.stuck" has a constraint "mine"',
		cure => 'ALTER TABLE %s.stuck DROP CONSTRAINT mine');
}
refused(
	'stuck has a unique constraint',
	more => 'ALTER TABLE %s.stuck ADD CONSTRAINT mine UNIQUE (page)',
	error => '42809',
	like => '"%t.stuck" has .*"mine"',
	cure => 'ALTER TABLE %s.stuck DROP CONSTRAINT mine');
refused(
	'stuck may not have a NULL that counted may have',
	columns => 'page text',
	key => 'UNIQUE NULLS NOT DISTINCT (page)',
	more => 'ALTER TABLE %s.stuck ALTER page SET NOT NULL',
	error => '42809',
	like => '"%t.stuck"',
	cure => 'ALTER TABLE %s.stuck ALTER page DROP NOT NULL');
# What it has from counted is its own to keep, and further columns are in nobody's way.
is( $node->safe_psql('postgres', <<"EOC"),
BEGIN;
DROP SCHEMA schema1 CASCADE;
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted ($counted CHECK (value <> 13), page text NOT NULL);
CREATE TABLE schema1.total (PRIMARY KEY (page), CHECK (value < 100)) INHERITS (schema1.counted);
CREATE TABLE schema1.stuck (sqlstate text, reason text, since timestamptz, note text, at timestamptz DEFAULT now()) INHERITS (schema1.counted);
INSERT INTO schema1.counted (value, page) VALUES (1, 'a'), (99, 'b'), (99, 'b');
COMMIT;
DO \$\$ BEGIN PERFORM worker_spi_fold(1); EXCEPTION WHEN check_violation THEN NULL; END \$\$;
SELECT page, value, at IS NOT NULL FROM schema1.stuck;
SELECT page, value FROM schema1.total;
EOC
	"b|198|t\na|1", 'inherited constraints and further columns of stuck are taken');

# ------------------------------------------------------------------------
# Indexes that declare no keys
# ------------------------------------------------------------------------

refused(
	'no unique index',
	key => '',
	error => '42P16',
	like => '"%t.total"',
	hint => 'ALTER TABLE %s\.total ADD PRIMARY KEY \(page\)$');
refused(
	'no unique index, and keys that may be NULL',
	columns => '"Page" text, day date NOT NULL DEFAULT now()',
	key => '',
	insert => q(INSERT INTO %s.counted (value, "Page") VALUES (1, 'a'), (2, 'a')),
	error => '42P16',
	like => '"%t.total"',
	hint => 'ALTER TABLE %s\.total ADD UNIQUE NULLS NOT DISTINCT \("Page", day\)$');
refused(
	'no unique index on tables without keys',
	columns => '',
	key => '',
	insert => 'INSERT INTO %s.counted (value) VALUES (1), (2)',
	error => '42P16',
	like => '"%t.total"',
	hint => 'ALTER TABLE %s\.total ADD PRIMARY KEY \(type\)$');
foreach my $test (
	[ 'one that is not unique', 'CREATE INDEX mine ON %s.total (page)' ],
	[ 'one with a predicate', 'CREATE UNIQUE INDEX mine ON %s.total (page) WHERE value > 0' ],
	[ 'one on an expression', 'CREATE UNIQUE INDEX mine ON %s.total (lower(page))' ],
	[ 'one on a key and an expression', 'CREATE UNIQUE INDEX mine ON %s.total (page, (value + 0))' ],
	[ 'one on a column of the totals\' own', 'ALTER TABLE %s.total ADD id bigserial PRIMARY KEY' ],
	[ 'one on a key and a column of the totals\' own', 'ALTER TABLE %s.total ADD kind text; CREATE UNIQUE INDEX mine ON %s.total (page, kind)' ],
	[ 'an exclusion constraint', 'ALTER TABLE %s.total ADD CONSTRAINT mine EXCLUDE (page WITH =)' ],
	[ 'one on counted', 'CREATE UNIQUE INDEX ON %s.counted (value, page)' ])
{
	my ($name, $sql) = @$test;

	refused(
		"no index of keys but $name",
		key => '',
		more => $sql,
		error => '42P16',
		like => '"%t.total"',
		hint => 'ALTER TABLE %s\.total ADD ',
		($sql =~ /PRIMARY KEY/ ? (cure => 'ALTER TABLE %s.total ADD UNIQUE (page)') : ()));
}

# Not valid: it was built over totals that are not unique.
$node->safe_psql('postgres', <<"EOC");
BEGIN;
DROP SCHEMA schema1 CASCADE;
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted ($counted, page text NOT NULL);
CREATE TABLE schema1.total () INHERITS (schema1.counted);
CREATE TABLE schema1.stuck (sqlstate text, reason text, since timestamptz) INHERITS (schema1.counted);
INSERT INTO schema1.counted (value, page) VALUES (1, 'a'), (2, 'a');
INSERT INTO schema1.total VALUES ('total', 10, 'a'), ('total', 20, 'a');
COMMIT;
EOC
error_is($node, 'postgres', 'CREATE UNIQUE INDEX CONCURRENTLY broken ON schema1.total (page)',
	'23505', qr/broken/, 'totals that are not unique make an index that is not valid');
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16', qr/"postgres\.schema1\.total"/,
	'which declares nothing');
is( $node->safe_psql('postgres', <<'EOC'), "t\ntotal|33|a", 'until it is mended');
UPDATE schema1.total SET value = 30 WHERE value = 20;
DELETE FROM schema1.total WHERE value = 10;
REINDEX INDEX schema1.broken;
SELECT worker_spi_fold(1);
TABLE schema1.counted;
EOC

foreach my $test (
	[ 'another collation', 'CREATE UNIQUE INDEX "My index" ON %s.total (page COLLATE public.other)' ],
	[ 'another operator class', 'CREATE UNIQUE INDEX "My index" ON %s.total (page text_pattern_ops)' ],
	[ 'deferrable', 'ALTER TABLE %s.total ADD CONSTRAINT "My index" UNIQUE (page) DEFERRABLE' ],
	[ 'a primary key, and deferrable', 'ALTER TABLE %s.total ADD CONSTRAINT "My index" PRIMARY KEY (page) DEFERRABLE INITIALLY DEFERRED' ],
	[ 'value alone', 'CREATE UNIQUE INDEX "My index" ON %s.total (value)' ],
	[ 'value beside a key', 'CREATE UNIQUE INDEX "My index" ON %s.total (page, value)' ],
	[ 'another measure', 'CREATE UNIQUE INDEX "My index" ON %s.total (hits, page)' ],
	[ 'type beside a key', 'CREATE UNIQUE INDEX "My index" ON %s.total (type, page)' ])
{
	my ($name, $sql) = @$test;
	my $drop =
	  $sql =~ /CONSTRAINT/
	  ? 'ALTER TABLE %s.total DROP CONSTRAINT "My index"'
	  : 'DROP INDEX %s."My index"';

	refused(
		"an index of keys: $name",
		columns => 'page text NOT NULL, hits integer NOT NULL DEFAULT 0',
		key => '',
		more => $sql,
		error => '42P16',
		like => '"My index".*"%t.total"',
		cure => "BEGIN; $drop; ALTER TABLE %s.total ADD PRIMARY KEY (page); COMMIT");
}
refused(
	'an index of keys: NULLs are distinct',
	columns => 'page text',
	key => 'CONSTRAINT "My index" UNIQUE (page)',
	error => '42P16',
	like => '"My index".*"%t.total".*NULL',
	hint => 'NULLS NOT DISTINCT',
	cure => 'ALTER TABLE %s.total DROP CONSTRAINT "My index", ADD UNIQUE NULLS NOT DISTINCT (page)');
refused(
	'one of several keys may be NULL',
	columns => 'page text NOT NULL, day date',
	key => 'CONSTRAINT "My index" UNIQUE (page, day)',
	error => '42P16',
	like => '"My index".*"%t.total".*NULL',
	cure => 'ALTER TABLE %s.counted ALTER day SET DEFAULT now(); UPDATE %s.counted SET day = now(); ALTER TABLE %s.counted ALTER day SET NOT NULL');
refused(
	'a deferrable index over the keys beside the primary key',
	more => 'ALTER TABLE %s.total ADD CONSTRAINT later UNIQUE (page) DEFERRABLE',
	error => '42P16',
	like => '"later".*"%t.total".*deferrable',
	cure => 'ALTER TABLE %s.total DROP CONSTRAINT later');
refused(
	'two indexes that could be that of the keys',
	columns => 'page text NOT NULL, site text',
	key => 'CONSTRAINT one UNIQUE (page), CONSTRAINT two UNIQUE NULLS NOT DISTINCT (page, site)',
	error => '42P16',
	like => '(?=.*"one")(?=.*"two")(?=.*"%t.total")',
	cure => 'ALTER TABLE %s.total DROP CONSTRAINT one');
refused(
	'two indexes on the same keys',
	key => 'CONSTRAINT one UNIQUE (page), CONSTRAINT two UNIQUE (page) INCLUDE (value)',
	error => '42P16',
	like => '(?=.*"one")(?=.*"two")(?=.*"%t.total")',
	hint => 'primary key',
	cure => 'ALTER TABLE %s.total DROP CONSTRAINT two');
refused(
	'two, beside a primary key that declares nothing',
	key => 'id bigserial PRIMARY KEY, CONSTRAINT one UNIQUE (page), CONSTRAINT two UNIQUE (type, page)',
	error => '42P16',
	like => '(?=.*"one")(?=.*"two")(?=.*"%t.total")',
	cure => 'ALTER TABLE %s.total DROP CONSTRAINT two');
refused(
	'an index on type beside a primary key',
	key => 'PRIMARY KEY (page), CONSTRAINT one UNIQUE (type)',
	error => '42P16',
	like => '"one".*"%t.total"',
	cure => 'ALTER TABLE %s.total DROP CONSTRAINT one');

# ------------------------------------------------------------------------
# type, value, and what must be there
# ------------------------------------------------------------------------

foreach my $type ('varchar', 'name', 'word', '"char"', 'integer')
{
	my $default = $type eq 'integer' ? 0 : "'d'";

	refused(
		"type is of type $type",
		counted => "CREATE TABLE %s.counted (type $type NOT NULL DEFAULT $default, value bigint NOT NULL, page text NOT NULL)",
		error => '42P16',
		like => 'column "type" .*"%t.counted".*type text',
		cure => 'ALTER TABLE %s.counted ALTER type DROP DEFAULT; ALTER TABLE %s.counted ALTER type TYPE text');
}
foreach my $type ('numeric', 'smallint', 'double precision', 'whole', 'text', 'interval')
{
	my ($one, $two) = $type eq 'interval' ? ("'1'", "'2'") : $type eq 'text' ? ("'1'", "'2'") : (1, 2);
	my $using = $type eq 'interval' ? 'extract(epoch FROM value)::bigint' : 'value::bigint';

	refused(
		"value is of type $type",
		counted => "CREATE TABLE %s.counted (type text NOT NULL DEFAULT 'delta', value $type NOT NULL, page text NOT NULL)",
		insert => "INSERT INTO %s.counted (value, page) VALUES ($one, 'a'), ($two, 'a')",
		error => '42P16',
		like => 'column "value" .*"%t.counted".*bigint or integer',
		cure => "ALTER TABLE %s.counted ALTER value TYPE bigint USING $using");
}
refused(
	'value is generated',
	counted => "CREATE TABLE %s.counted (type text NOT NULL DEFAULT 'delta', n bigint NOT NULL DEFAULT 0, value bigint GENERATED ALWAYS AS (n) STORED, page text NOT NULL)",
	insert => q(INSERT INTO %s.counted (n, page) VALUES (1, 'a'), (2, 'a')),
	error => '42P16',
	like => 'column "value" .*"%t.counted".*generated',
	cure => 'ALTER TABLE %s.counted ALTER value DROP EXPRESSION');
refused(
	'the totals have a primary key of their own, and no index of the keys',
	key => 'id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY',
	error => '42P16',
	like => 'table "%t.total" has no unique index that tells its keys');
refused(
	'the totals have a primary key of their own, and an index that lacks a key',
	columns => 'page text NOT NULL, day int NOT NULL DEFAULT 1',
	key => 'id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, UNIQUE (page)',
	error => '42P16',
	like => 'column "day" .*"%t.counted"');
refused(
	'type is generated',
	counted => q(CREATE TABLE %s.counted (type text GENERATED ALWAYS AS ('delta') STORED, value bigint NOT NULL, page text NOT NULL)),
	error => '42P16',
	like => 'column "type" .*"%t.counted".*generated',
	cure => 'ALTER TABLE %s.counted ALTER type DROP EXPRESSION');
refused(
	'neither type nor keys',
	counted => 'CREATE TABLE %s.counted (value bigint NOT NULL)',
	key => 'UNIQUE NULLS NOT DISTINCT (value)',
	insert => 'INSERT INTO %s.counted VALUES (1), (2)',
	error => '42P16',
	like => '"%t.counted".*neither keys nor .*"type"',
	cure => q(ALTER TABLE %s.counted ADD page text NOT NULL DEFAULT 'a'; ALTER TABLE %s.total DROP CONSTRAINT total_value_key, ADD PRIMARY KEY (page)));
refused(
	'no measure',
	counted => q(CREATE TABLE %s.counted (type text NOT NULL DEFAULT 'delta', page text NOT NULL)),
	insert => q(INSERT INTO %s.counted (page) VALUES ('a'), ('a')),
	error => '42P16',
	like => '"%t.counted" has no measure',
	cure => q(ALTER TABLE %s.counted ADD n bigint NOT NULL DEFAULT 0; INSERT INTO %s.counted (page, n) VALUES ('a', 3)),
	query => 'SELECT sum(n), count(*) FROM %s.counted');
refused(
	'a constraint of counted forbids totals',
	counted => "CREATE TABLE %s.counted ($counted, page text NOT NULL, CONSTRAINT kinds CHECK (type IN ('delta', 'other')))",
	error => '42P16',
	like => '"kinds".*"%t.total"',
	cure => 'ALTER TABLE %s.counted DROP CONSTRAINT kinds');
refused(
	'a constraint of the totals forbids them',
	key => q(PRIMARY KEY (page), CONSTRAINT kinds CHECK (type = 'sum')),
	error => '42P16',
	like => '"kinds".*"%t.total".*\'total\'',
	cure => q(ALTER TABLE %s.total DROP CONSTRAINT kinds, ADD CONSTRAINT kinds CHECK (type = 'total')));

# One that is not inherited, or that lets totals in, does not.
is( $node->safe_psql('postgres', <<"EOC"),
BEGIN;
DROP SCHEMA schema1 CASCADE;
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted ($counted, page text NOT NULL, CHECK (type = 'delta') NO INHERIT, CHECK (type IN ('delta', 'total')), CHECK (value < 1000000) NO INHERIT);
CREATE TABLE schema1.total (PRIMARY KEY (page), CHECK (type = 'total'), CHECK (type <> 'total' OR value > 0)) INHERITS (schema1.counted);
CREATE TABLE schema1.stuck (sqlstate text, reason text, since timestamptz) INHERITS (schema1.counted);
INSERT INTO schema1.counted (value, page) VALUES (1, 'a'), (999999, 'a'), (1, 'a');
COMMIT;
SELECT worker_spi_fold(1);
TABLE schema1.counted;
EOC
	"t\ntotal|1000001|a", 'constraints that let totals in are taken');

# ------------------------------------------------------------------------
# Columns that are neither keys nor measures: what they lack
# ------------------------------------------------------------------------

# The definition of n, what it lacks, whether the hint may propose it as a key, and
# what makes a measure of it.
my $not_null = 'ALTER TABLE %s.counted ALTER n SET NOT NULL';
my $types = 'bigint, integer, date, timestamp or timestamptz';
foreach my $test (
	[ 'bigint DEFAULT 0', 'if it were NOT NULL\.', 0, $not_null ],
	[ "date DEFAULT '-infinity'", 'if it were NOT NULL\.', 0, $not_null ],
	[ "timestamptz DEFAULT 'infinity'", 'if it were NOT NULL\.', 0, $not_null ],
	[ 'integer NOT NULL', 'if it had DEFAULT 0\.', 1, 'ALTER TABLE %s.counted ALTER n SET DEFAULT 0', 'value, page, n', '5' ],
	[ 'bigint NOT NULL DEFAULT 1', 'if it had DEFAULT 0\.', 1, 'ALTER TABLE %s.counted ALTER n SET DEFAULT 0' ],
	[ 'bigint NOT NULL DEFAULT public.zero()', 'if it had DEFAULT 0\.', 1, 'ALTER TABLE %s.counted ALTER n SET DEFAULT 0' ],
	[ 'bigint', 'if it were NOT NULL and had DEFAULT 0\.', 1,
		"ALTER TABLE %s.counted ALTER n SET DEFAULT 0; UPDATE ONLY %s.counted SET n = 0; $not_null" ],
	[ 'timestamptz NOT NULL DEFAULT now()', "if it had DEFAULT '-infinity' or 'infinity'", 1,
		"ALTER TABLE %s.counted ALTER n SET DEFAULT '-infinity'" ],
	[ "timestamptz NOT NULL DEFAULT '-infinity'::timestamp", "if it had DEFAULT '-infinity' or 'infinity'", 1,
		"ALTER TABLE %s.counted ALTER n SET DEFAULT '-infinity'" ],
	[ 'date', "if it were NOT NULL and had DEFAULT '-infinity' or 'infinity'", 1,
		"ALTER TABLE %s.counted ALTER n SET DEFAULT 'infinity'; UPDATE ONLY %s.counted SET n = 'infinity'; $not_null" ],
	[ 'numeric NOT NULL DEFAULT 0', "if it were of type $types", 0, 'ALTER TABLE %s.counted ALTER n TYPE bigint' ],
	[ 'smallint NOT NULL DEFAULT 0', "if it were of type $types", 0, 'ALTER TABLE %s.counted ALTER n TYPE integer' ],
	[ 'double precision NOT NULL DEFAULT 0', "if it were of type $types", 0, 'ALTER TABLE %s.counted ALTER n TYPE bigint' ],
	[ 'whole NOT NULL DEFAULT 0', "if it were of type $types", 0, 'ALTER TABLE %s.counted ALTER n TYPE bigint' ],
	[ 'bigserial', 'filled by a sequence', 0, 'ALTER TABLE %s.counted ALTER n SET DEFAULT 0' ],
	[ 'bigint GENERATED BY DEFAULT AS IDENTITY', 'filled by a sequence', 0,
		'ALTER TABLE %s.counted ALTER n DROP IDENTITY, ALTER n SET DEFAULT 0' ],
	[ "bigint NOT NULL DEFAULT nextval('public.numbers')", 'filled by a sequence', 0, 'ALTER TABLE %s.counted ALTER n SET DEFAULT 0' ],
	[ "text NOT NULL DEFAULT 'n' || nextval('public.numbers')", 'filled by a sequence', 0, 'ALTER TABLE %s.counted DROP n' ],
	[ 'text', 'no type that a measure can have', 1, 'ALTER TABLE %s.counted DROP n' ],
	[ 'boolean NOT NULL DEFAULT false', 'no type that a measure can have', 1, 'ALTER TABLE %s.counted DROP n' ])
{
	my ($definition, $lacks, $may_be_key, $cure) = @$test;
	my $fills = $definition eq 'integer NOT NULL';
	my $nullable = $definition =~ /NOT NULL|serial|IDENTITY/ ? '' : 1;
	my $proposed = $nullable ? 'UNIQUE NULLS NOT DISTINCT \(page, n\)' : 'PRIMARY KEY \(page, n\)';

	refused(
		"n $definition",
		columns => "page text NOT NULL, n $definition",
		($fills ? (insert => q(INSERT INTO %s.counted (value, page, n) VALUES (1, 'a', 5), (2, 'a', 5))) : ()),
		error => '42P16',
		like => "column \"n\" of table \"%t.counted\" is neither a key nor a measure.*\\nDETAIL:  .*$lacks",
		hint => $may_be_key
		? "ALTER TABLE %s\\.total DROP CONSTRAINT total_pkey, ADD $proposed\$"
		: '^(?!.*(PRIMARY|UNIQUE))',
		cure => $cure);

	# Where it can be a key, the hint says how, word for word.
	refused(
		"n $definition, to be a key",
		columns => "page text NOT NULL, n $definition",
		($fills ? (insert => q(INSERT INTO %s.counted (value, page, n) VALUES (1, 'a', 5), (2, 'a', 5))) : ()),
		error => '42P16',
		like => 'column "n"') if $may_be_key;
}
refused(
	'an included column',
	columns => 'page text NOT NULL, note text',
	key => 'PRIMARY KEY (page) INCLUDE (note)',
	error => '42P16',
	like => 'column "note" of table "%t.counted"',
	hint => 'DROP CONSTRAINT total_pkey, ADD UNIQUE NULLS NOT DISTINCT \(page, note\)$');
refused(
	'keys of an index that is no constraint',
	columns => 'page text NOT NULL, "Note" text',
	key => '',
	more => 'CREATE UNIQUE INDEX "My index" ON %s.total (page)',
	error => '42P16',
	like => 'column "Note" of table "%t.counted"',
	hint => 'DROP INDEX %s\."My index"; ALTER TABLE %s\.total ADD UNIQUE NULLS NOT DISTINCT \(page, "Note"\)$');

# A column that is added while the worker runs, to tables without keys.
refused(
	'keys that are added to tables without',
	columns => '',
	key => 'PRIMARY KEY (type)',
	more => q(ALTER TABLE %s.counted ADD page text NOT NULL DEFAULT '(before)', ADD "Day" date; ALTER TABLE %s.counted ALTER page DROP DEFAULT),
	error => '42P16',
	like => 'column "page" of table "%t.counted"',
	hint => 'ALTER TABLE %s\.total DROP CONSTRAINT total_pkey, ADD UNIQUE NULLS NOT DISTINCT \(page, "Day"\)$');

# ------------------------------------------------------------------------
# Columns that must be keys, and no totals
# ------------------------------------------------------------------------

# The hint is the whole command, and proposes nothing that would make each delta a
# counter of its own.
foreach my $test (
	[ 'page text NOT NULL', 'PRIMARY KEY \(page\)' ],
	[ 'page text NOT NULL, "Day" date NOT NULL DEFAULT now()', 'PRIMARY KEY \(page, "Day"\)' ],
	[ 'page text, "Day" date', 'UNIQUE NULLS NOT DISTINCT \(page, "Day"\)' ],
	[ 'page text NOT NULL, n int NOT NULL DEFAULT 0', 'PRIMARY KEY \(page\)' ],
	[ "page text NOT NULL, last date NOT NULL DEFAULT '-infinity', \"user\" int", 'UNIQUE NULLS NOT DISTINCT \(page, "user"\)' ],
	[ 'page text NOT NULL, upper text GENERATED ALWAYS AS (upper(page)) STORED', 'PRIMARY KEY \(page\)' ])
{
	my ($columns, $key) = @$test;

	refused(
		"no totals, with $columns",
		columns => $columns,
		total => '',
		error => '42P16',
		like => '"%t.counted"',
		hint => "^CREATE TABLE %s\\.total \\($key\\) INHERITS \\(%s\\.counted\\) WITH \\(fillfactor = 50\\)\$");
}
foreach my $test (
	[ 'bytes bigint DEFAULT 0', 'if it were NOT NULL', 'ALTER TABLE %s.counted ALTER bytes SET NOT NULL' ],
	[ 'bytes numeric NOT NULL DEFAULT 0', 'if it were of type', 'ALTER TABLE %s.counted ALTER bytes TYPE bigint' ],
	[ 'id bigserial', 'filled by a sequence', 'ALTER TABLE %s.counted DROP id' ],
	[ 'id bigint GENERATED ALWAYS AS IDENTITY', 'filled by a sequence', 'ALTER TABLE %s.counted DROP id' ])
{
	my ($column, $lacks, $cure) = @$test;
	my ($name) = $column =~ /^(\w+)/;

	# First the hint for the totals, then the error about what is no key.
	refused(
		"no totals, a key and $column",
		columns => "$column, page text NOT NULL",
		total => '',
		error => '42P16',
		like => '"%t.counted"',
		hint => '^CREATE TABLE %s\.total \(PRIMARY KEY \(page\)\) INHERITS',
		cure => "CREATE TABLE %s.total (PRIMARY KEY (page)) INHERITS (%s.counted); $cure");
	refused(
		"totals, a key and $column",
		columns => "$column, page text NOT NULL",
		error => '42P16',
		like => "column \"$name\" of table \"%t.counted\".*$lacks",
		hint => '^(?!.*(PRIMARY|UNIQUE))',
		cure => $cure);

	# Without a key there is nothing to propose.
	refused(
		"no totals, and $column",
		columns => $column,
		total => '',
		insert => 'INSERT INTO %s.counted (value) VALUES (1), (2)',
		error => '42P16',
		like => "column \"$name\" of table \"%t.counted\".*$lacks",
		hint => '^(?!.*(PRIMARY|UNIQUE))',
		cure => "$cure; CREATE TABLE %s.total (PRIMARY KEY (type)) INHERITS (%s.counted)");
}

# A key may be filled by a sequence, if the user says so.
is( $node->safe_psql('postgres', <<"EOC"),
BEGIN;
DROP SCHEMA schema1 CASCADE;
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted ($counted, k bigint GENERATED ALWAYS AS IDENTITY);
CREATE TABLE schema1.total (PRIMARY KEY (k)) INHERITS (schema1.counted);
CREATE TABLE schema1.stuck (sqlstate text, reason text, since timestamptz) INHERITS (schema1.counted);
INSERT INTO schema1.counted (value) VALUES (1), (2);
COMMIT;
SELECT worker_spi_fold(1);
SELECT type, value, k FROM schema1.counted ORDER BY k;
EOC
	"t\ntotal|1|1\ntotal|2|2", 'a key can be GENERATED ALWAYS AS IDENTITY');

# ------------------------------------------------------------------------
# Columns of the children's own
# ------------------------------------------------------------------------

foreach my $table ('total', 'stuck')
{
	foreach my $test ([ 'takes NULL', 'DROP NOT NULL' ], [ 'has a default', q(SET DEFAULT 'x') ])
	{
		my ($cured, $cure) = @$test;

		# stuck may have no constraint of its own, and on 18 and later NOT NULL is one.
		next if $table eq 'stuck' && $cure =~ /DEFAULT/;
		refused(
			"$table has a column that must be filled, until it $cured",
			more => qq(ALTER TABLE %s.$table ADD "Own" text NOT NULL),
			error => '42P16',
			like => "column \"Own\" of table \"%t.$table\"",
			hint => 'NULL',
			cure => "ALTER TABLE %s.$table ALTER \"Own\" $cure");
	}
}
foreach my $test (
	[ 'serial', '%s.total_id_seq' ],
	[ 'smallserial', '%s.total_id_seq' ],
	[ 'integer GENERATED ALWAYS AS IDENTITY', '%s.total_id_seq' ],
	[ "bigint DEFAULT nextval('%s.\"Small\"')", '%s."Small"' ],
	[ "integer DEFAULT nextval('%s.large')", '%s.large' ])
{
	my ($definition, $sequence) = @$test;

	refused(
		'a narrow sequence: ' . $definition =~ s/%s\.//r,
		total => "CREATE SEQUENCE %s.\"Small\" AS integer; CREATE SEQUENCE %s.large;
			CREATE TABLE %s.total (id $definition, PRIMARY KEY (page)) INHERITS (%s.counted)",
		error => '42P16',
		like => 'column "id" of table "%t.total"',
		hint => '^(ALTER TABLE %s\.total ALTER id TYPE bigint)?(; )?(ALTER SEQUENCE '
		  . quotemeta($sequence) =~ s/\\%s/%s/r
		  . ' AS bigint)?$');
}
foreach my $definition ('bigserial', 'bigint GENERATED ALWAYS AS IDENTITY', 'bigint GENERATED BY DEFAULT AS IDENTITY (MINVALUE -5)',
	'serial, ALTER id DROP DEFAULT', 'numeric DEFAULT nextval($$public.numbers$$)')
{
	my ($type, $alter) = $definition =~ /^(\w.*?)(?:, (ALTER.*))?$/;
	$alter .= ', ALTER id DROP NOT NULL' if $alter;

	is( $node->safe_psql('postgres', <<"EOC"),
BEGIN;
DROP SCHEMA schema1 CASCADE;
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted ($counted, page text NOT NULL);
CREATE TABLE schema1.total (id $type, UNIQUE (page)) INHERITS (schema1.counted);
@{[ $alter ? "ALTER TABLE schema1.total $alter;" : '' ]}
CREATE TABLE schema1.stuck (sqlstate text, reason text, since timestamptz) INHERITS (schema1.counted);
@{[ $insert =~ s/%s/schema1/gr ]};
COMMIT;
SELECT worker_spi_fold(1);
SELECT value FROM schema1.total;
EOC
		"t\n3", "a column of the totals' own that is $definition is taken");
}

# A key that a child computes.  Most servers do not let it become one.
{
	my ($ret, undef, $err) = $node->psql('postgres', <<"EOC");
\\set VERBOSITY verbose
CREATE SCHEMA schema9;
CREATE TABLE schema9.counted ($counted, page text NOT NULL);
CREATE TABLE schema9.total (page text GENERATED ALWAYS AS ('a') STORED PRIMARY KEY) INHERITS (schema9.counted);
EOC
	if ($ret == 0 && $err !~ /ERROR/)
	{
		error_is($node, 'postgres', 'SELECT worker_spi_launch(9)', '42P16', qr/"page".*"postgres\.schema9\.total".*generated/s,
			'a key that the totals compute is refused');
		is( $node->safe_psql('postgres', <<'EOC'), "t\nt\n7|b", 'and folded when they no longer do');
ALTER TABLE schema9.total NO INHERIT schema9.counted;
ALTER TABLE schema9.total ALTER page DROP EXPRESSION;
ALTER TABLE schema9.total INHERIT schema9.counted;
INSERT INTO schema9.counted (value, page) VALUES (7, 'b');
SELECT worker_spi_launch(9) > 0;
SELECT worker_spi_fold(9);
SELECT value, page FROM schema9.counted;
EOC
	}
	else
	{
		like($err, qr/ERROR:  42611: .*"page" specifies generation expression/,
			'the server refuses a key that the totals compute');
	}
}

# ------------------------------------------------------------------------
# In the end
# ------------------------------------------------------------------------

is(worker($node, 1, 'pid'), $pid, 'one process has met all this');
ok(!$node->log_contains(qr/TRAP:|PANIC:|was terminated by signal/), 'and nothing has crashed');

$node->stop;
done_testing();
