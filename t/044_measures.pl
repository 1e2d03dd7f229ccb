# Which columns are keys and which are measures: the unique index on the totals
# says the first, NOT NULL and a neutral default the second.  Shown here: that
# totals are right with any number of either, for keys that may be NULL and for
# few and many deltas at once, which tables and indexes are refused with 42P16,
# and that what the hint says cures that.  Nothing is waited for but
# worker_spi_fold().

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('measures', <<EOC, extra => [ '--encoding=UTF8', '--locale=C.UTF-8' ]);
worker_spi.total_workers = 1
autovacuum = off
EOC
my $standard = "type text NOT NULL DEFAULT 'delta', value bigint NOT NULL";

fold($node, 1);

# How many totals of worker 1 are not what the same aggregates over a ledger
# come to, and how many deltas are left.  The ledger has the table's columns.
sub differences
{
	my ($keys, $aggregates, $measures) = @_;
	my $group = $keys ? "GROUP BY $keys" : '';
	my $comma = $keys ? "$keys, " : '';
	return $node->safe_psql('postgres', <<EOC);
WITH expected AS (SELECT ${comma}$aggregates FROM ledger $group),
	totals AS (SELECT ${comma}$measures FROM schema1.counted WHERE type = 'total')
SELECT (SELECT count(*) FROM (TABLE expected EXCEPT ALL TABLE totals) AS e)
	+ (SELECT count(*) FROM (TABLE totals EXCEPT ALL TABLE expected) AS t)
	+ (SELECT count(*) FROM schema1.counted WHERE type IS DISTINCT FROM 'total');
EOC
}

# ------------------------------------------------------------------------
# All kinds of measures, with and without keys
# ------------------------------------------------------------------------

# As n8n keeps its statistics, but for the index and two defaults.
$node->safe_psql('postgres', <<'EOC');
CREATE TABLE workflow (id text PRIMARY KEY);
INSERT INTO workflow SELECT 'w' || n FROM generate_series(1, 50) AS n;
EOC
new_table($node, 1, <<"EOC");
CREATE TABLE %t ($standard, "workflowId" text REFERENCES workflow ON DELETE CASCADE,
	name varchar(128) NOT NULL, "rootCount" integer NOT NULL DEFAULT 0,
	"latestEvent" timestamptz(3) NOT NULL DEFAULT '-infinity',
	"firstEvent" timestamptz(3) NOT NULL DEFAULT 'infinity',
	day date NOT NULL DEFAULT 'infinity', last timestamp NOT NULL DEFAULT '-infinity',
	twice bigint GENERATED ALWAYS AS (value * 2) STORED);
CREATE UNIQUE INDEX ON %t ("workflowId", name) NULLS NOT DISTINCT WHERE type = 'total';
EOC
$node->safe_psql('postgres', <<'EOC');
CREATE TABLE ledger AS
SELECT nullif('w' || n % 51, 'w0') AS "workflowId", CASE n % 3 WHEN 0 THEN 'ok' ELSE 'error' END AS name,
	n::bigint AS value, n % 7 AS "rootCount",
	timestamptz '2026-01-01' + n * interval '1 min' AS "latestEvent",
	timestamptz '2026-01-01' + n * interval '1 min' AS "firstEvent",
	date '2026-01-01' + n AS day, timestamp '2026-01-01' + n * interval '1 h' AS last
FROM generate_series(1, 5000) AS n ORDER BY random();
EOC
my $columns =
  '"workflowId", name, value, "rootCount", "latestEvent", "firstEvent", day, last';
my @n8n = (
	'"workflowId", name',
	'sum(value)::bigint AS value, sum("rootCount")::integer, max("latestEvent"), min("firstEvent"), min(day), max(last)',
	'value, "rootCount", "latestEvent", "firstEvent", day, last');

# The second time all totals are there, and the third a few deltas come.
foreach my $rows (5000, 5000, 3)
{
	$node->safe_psql('postgres', <<EOC);
INSERT INTO schema1.counted ($columns) SELECT $columns FROM ledger LIMIT $rows;
SELECT worker_spi_fold(1);
EOC
	$node->safe_psql('postgres',
		"INSERT INTO ledger SELECT * FROM ledger LIMIT $rows") if $rows < 5000;
}
$node->safe_psql('postgres', <<'EOC');
TRUNCATE ledger;
INSERT INTO ledger SELECT "workflowId", name, value, "rootCount", "latestEvent", "firstEvent", day, last
FROM schema1.counted;
EOC
is( $node->safe_psql('postgres',
		'SELECT count(*), sum(value) > 2 * 12502500, count(*) FILTER (WHERE "workflowId" IS NULL) FROM schema1.counted'
	),
	'51|t|1',
	'a table like those of n8n has one total for each key');

foreach my $rows (100, 100000, 2)
{
	$node->safe_psql('postgres', <<EOC);
CREATE TEMP TABLE new AS
SELECT nullif('w' || n % 51, 'w0') AS "workflowId", (ARRAY['ok', 'error', 'new'])[1 + n % 3] AS name,
	(random() * 1000)::bigint AS value, n % 7 AS "rootCount",
	timestamptz '2026-01-01' + n * interval '1 min' AS "latestEvent",
	timestamptz '2025-01-01' + n * interval '1 min' AS "firstEvent",
	date '2025-01-01' + n % 100 AS day, timestamp '2025-01-01' + n * interval '1 h' AS last
FROM generate_series(1, $rows) AS n;
INSERT INTO schema1.counted ($columns) TABLE new;
INSERT INTO ledger TABLE new;
SELECT worker_spi_fold(1);
EOC
	is(differences(@n8n), '0',
		"each measure is exact after $rows deltas of it");
}
is( $node->safe_psql('postgres', <<'EOC'),
DELETE FROM workflow WHERE id = 'w7';
SELECT count(*) FROM schema1.counted WHERE "workflowId" = 'w7';
EOC
	'0',
	'the cascade of its foreign key takes the totals as well');

# Measures alone: the worker makes the index, and one total.
new_table($node, 1, <<"EOC");
CREATE TABLE %t ($standard, bytes bigint NOT NULL DEFAULT 0, last date NOT NULL DEFAULT '-infinity');
INSERT INTO %t (value, bytes, last) VALUES (1, 10, '2026-01-01'), (2, 20, '2025-01-01'), (4, -5, '-infinity')
EOC
fold($node, 1);
is(rows($node, 1, 'type, value, bytes, last'),
	'total|7|25|2026-01-01', 'measures need no key');
is( $node->safe_psql('postgres',
		"SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = 'schema1.counted'::regclass"
	),
	"CREATE UNIQUE INDEX counted_type_idx ON schema1.counted USING btree (type) WHERE (type = 'total'::text)",
	'and the worker makes the index');

# Every row that is not a total is a delta.
new_table($node, 1, 'CREATE TABLE %t (type text, value integer)');
$node->safe_psql('postgres',
	"INSERT INTO schema1.counted VALUES (NULL, 1), ('delta', 2), ('Total', 4), ('', 8), (NULL, NULL), ('total', NULL)"
);
fold($node, 1);
is(rows($node, 1), 'total|15', 'whatever its type says');

# ------------------------------------------------------------------------
# Keys that may be NULL, few and many, and deltas few and many
# ------------------------------------------------------------------------

foreach my $nkeys (1, 2, 3, 4, 6)
{
	my $keys = join ', ', map { "k$_" } 1 .. $nkeys;
	my $types = join ', ', map { "k$_ " . ($_ % 2 ? 'text' : 'int') } 1 .. $nkeys;
	my $values = join ', ', map {
		$_ % 2
		  ? "nullif('v' || n * $_ % 7, 'v0') AS k$_"
		  : "nullif(n * $_ % 5, 0) AS k$_"
	} 1 .. $nkeys;

	new_table($node, 1,
		"CREATE TABLE %t ($standard, $types, hits int NOT NULL DEFAULT 0);"
		  . "CREATE UNIQUE INDEX ON %t ($keys) NULLS NOT DISTINCT WHERE type = 'total'");
	$node->safe_psql('postgres',
		"DROP TABLE ledger; CREATE TABLE ledger (value bigint, hits int, $types)");
	foreach my $rows (200, 3, 20000)
	{
		$node->safe_psql('postgres', <<EOC);
CREATE TEMP TABLE new AS
SELECT (random() * 100)::bigint AS value, 1 AS hits, $values FROM generate_series(1, $rows) AS n;
INSERT INTO ledger TABLE new;
INSERT INTO schema1.counted (value, hits, $keys) TABLE new;
SELECT worker_spi_fold(1);
EOC
		is( differences(
				$keys, 'sum(value)::bigint, sum(hits)::int', 'value, hits'),
			'0',
			"$nkeys keys that may be NULL have exact totals after $rows deltas");
	}
}

# A key that cannot be hashed.
new_table($node, 1,
	"CREATE TABLE %t ($standard, price money, bits bit varying);"
	  . "CREATE UNIQUE INDEX ON %t (price, bits) NULLS NOT DISTINCT WHERE type = 'total'");
is( $node->safe_psql('postgres', <<'EOC'),
INSERT INTO schema1.counted (value, price, bits)
	SELECT 1, nullif(n % 3, 0)::money, nullif(n % 2, 0)::bit(2) FROM generate_series(1, 600) AS n;
SELECT worker_spi_fold(1);
INSERT INTO schema1.counted (value, price, bits) SELECT value, price, bits FROM schema1.counted;
SELECT worker_spi_fold(1);
SELECT count(*), min(value), max(value) FROM schema1.counted;
EOC
	"t\nt\n6|200|200",
	'keys need not be of a type that can be hashed');

# ------------------------------------------------------------------------
# What is refused, and how it is cured
# ------------------------------------------------------------------------

sub refused
{
	my ($columns, $index, $pattern, $test) = @_;
	new_table($node, 1,
		"CREATE TABLE %t ($standard, $columns); INSERT INTO %t (value) VALUES (3);"
		  . ($index // ''));
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
		$pattern, $test);
	is(total($node, 1), 3, "and nothing is lost: $test");
	return;
}

my %hints = (
	'page text, "Day" date' => 'page, "Day"\) NULLS NOT DISTINCT',
	'page text NOT NULL DEFAULT \'\', n int NOT NULL DEFAULT 0' => 'page\)',
	'a int DEFAULT 0, b numeric NOT NULL DEFAULT 0' =>
	  'a, b\) NULLS NOT DISTINCT',
	'a bigint NOT NULL DEFAULT 1' => 'a\)',);
foreach my $columns (sort keys %hints)
{
	refused($columns, undef,
		qr/CREATE UNIQUE INDEX ON schema1\.counted \($hints{$columns} WHERE type = 'total'/,
		"no index with $columns");
	my (undef, undef, $err) =
	  $node->psql('postgres', 'SELECT worker_spi_fold(1)');
	my ($command) = $err =~ /(CREATE UNIQUE INDEX.*)/;
	$node->safe_psql('postgres', $command);
	is(fold($node, 1), 't', 'the command in the hint is the cure');
	is( $node->safe_psql(
			'postgres', "SELECT type, value FROM schema1.counted"),
		'total|3',
		'and all is folded then');
}

my $total = "WHERE type = 'total'";
foreach my $test (
	[
		'a column that is neither', 'page text NOT NULL, note text',
		"(page)", qr/column "note" of table "schema1\.counted" is neither a key nor a measure/
	],
	[
		'an included column', 'page text NOT NULL, note text',
		"(page) INCLUDE (note)", qr/column "note"/
	],
	[ 'a key that may be NULL', 'page text', '(page)', qr/NULL/ ],
	[
		'an expression', 'page text', '(lower(page)) NULLS NOT DISTINCT',
		qr/index "i" .*not an expression/s
	],
	[ 'value as a key', 'a int', '(a, value) NULLS NOT DISTINCT', qr/"value" cannot be a key/ ],
	[
		'another operator class', 'page text NOT NULL',
		'(page text_pattern_ops)', qr/index "i" .*does not compare/s
	],
	[
		'another collation', 'page text COLLATE "C" NOT NULL',
		'(page COLLATE "POSIX")', qr/index "i" .*does not compare/s
	],
	[
		'a generated key', 'page text NOT NULL GENERATED ALWAYS AS (type) STORED',
		'(page)', qr/generated/
	],
	[
		'a default that a function of a user makes',
		'page text NOT NULL, n bigint NOT NULL DEFAULT public.zero()',
		'(page)', qr/column "n" /
	],
	[
		'a measure of a domain', 'page text NOT NULL, n public.whole NOT NULL DEFAULT 0',
		'(page)', qr/column "n" /
	],
	[
		'a measure with an identity',
		'page text NOT NULL, n bigint GENERATED BY DEFAULT AS IDENTITY',
		'(page)', qr/column "n" /
	])
{
	my ($name, $columns, $index, $pattern) = @$test;
	$node->safe_psql('postgres', <<'EOC') if $name =~ /function/;
CREATE FUNCTION zero() RETURNS bigint IMMUTABLE LANGUAGE sql AS 'SELECT 0::bigint';
CREATE DOMAIN whole AS bigint;
EOC

	# A row for keys that are not declared NOT NULL.
	new_table($node, 1,
		"CREATE TABLE %t ($standard, $columns); CREATE UNIQUE INDEX i ON %t $index $total"
	);
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
		$pattern, "refused: $name");
}

refused(
	'a int, b int',
	"CREATE UNIQUE INDEX i ON %t (a) NULLS NOT DISTINCT $total; CREATE UNIQUE INDEX j ON %t (b) NULLS NOT DISTINCT $total",
	qr/"i" and "j"|"j" and "i"/,
	'two indexes that disagree are both named');
$node->safe_psql('postgres', <<"EOC");
DROP INDEX schema1.j;
CREATE UNIQUE INDEX j ON schema1.counted (a, type) INCLUDE (b) NULLS NOT DISTINCT $total;
ALTER TABLE schema1.counted DROP COLUMN b;
EOC
is(fold($node, 1), 't', 'two that agree are none too many');

# At the next cycle, if it comes later.
$node->safe_psql('postgres',
	"ALTER TABLE schema1.counted ADD c int; INSERT INTO schema1.counted (value) VALUES (4)");
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
	qr/column "c" of/, 'a column that is added later is refused then');
$node->safe_psql('postgres',
	'ALTER TABLE schema1.counted ALTER c SET DEFAULT 0; UPDATE schema1.counted SET c = 0; ALTER TABLE schema1.counted ALTER c SET NOT NULL'
);
is(fold($node, 1), 't', 'and folded as a measure once it is one');
is(rows($node, 1, 'type, value, c'), 'total|7|0', 'with all there was');

# A key that is an identity column.
new_table($node, 1,
	"CREATE TABLE %t ($standard, k bigint GENERATED ALWAYS AS IDENTITY); CREATE UNIQUE INDEX ON %t (k) $total"
);
$node->safe_psql('postgres',
	'INSERT INTO schema1.counted (value) VALUES (1), (2); SELECT worker_spi_fold(1)'
);
is(rows($node, 1, 'type, value, k'),
	"total|1|1\ntotal|2|2", 'a key can be GENERATED ALWAYS AS IDENTITY');

# ------------------------------------------------------------------------
# Unlogged
# ------------------------------------------------------------------------

my $offset = -s $node->logfile;
new_table($node, 1, "CREATE UNLOGGED TABLE %t ($standard)");
fold($node, 1) foreach 1 .. 3;
my @warnings =
  slurp_file($node->logfile, $offset) =~ /(WARNING:  table "schema1\.counted" is unlogged)/g;
is(scalar(@warnings), 1, 'an unlogged table is adopted with one warning');

$node->stop;
done_testing();
