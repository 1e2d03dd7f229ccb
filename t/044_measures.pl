# Measures: a column of counted that is NOT NULL and whose default changes nothing
# is summed, or the latest or earliest of it is kept.  Shown here: which columns are
# measures, that totals are right with any number of them, for keys that may be NULL
# and for few and many deltas at once, that at every instant the same aggregate over
# all three tables gives the true result, what becomes of sums that do not fit, and
# what an unlogged table means, in a crash as well.  Which columns are refused is shown by
# 038_refusals.pl.  Nothing is waited for but worker_spi_fold().

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('measures', <<EOC, extra => [ '--encoding=UTF8', '--locale=C.UTF-8' ]);
worker_spi.total_workers = 1
autovacuum = off
wal_writer_delay = 10s
EOC
my $standard = "type text NOT NULL DEFAULT 'delta', value bigint NOT NULL";
my $fold = 'SELECT worker_spi_fold(1)';

folds($node, 1, 'the worker answers');

# How many totals of worker 1 are not what the same aggregates over a ledger
# come to, and how many other rows there are.  The ledger has the table's columns.
sub differences
{
	my ($keys, $aggregates, $measures) = @_;
	my $group = $keys ? "GROUP BY $keys" : '';
	my $comma = $keys ? "$keys, " : '';
	return $node->safe_psql('postgres', <<EOC);
WITH expected AS (SELECT ${comma}$aggregates FROM ledger $group),
	totals AS (SELECT ${comma}$measures FROM schema1.total)
SELECT (SELECT count(*) FROM (TABLE expected EXCEPT ALL TABLE totals) AS e)
	+ (SELECT count(*) FROM (TABLE totals EXCEPT ALL TABLE expected) AS t)
	+ (SELECT count(*) FROM schema1.counted) - (SELECT count(*) FROM schema1.total);
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
new_table($node, 1, <<"EOC",
CREATE TABLE %t ($standard, "workflowId" text,
	name varchar(128) NOT NULL, "rootCount" integer NOT NULL DEFAULT 0,
	"latestEvent" timestamptz(3) NOT NULL DEFAULT '-infinity',
	"firstEvent" timestamptz(3) NOT NULL DEFAULT 'infinity',
	day date NOT NULL DEFAULT 'infinity', last timestamp NOT NULL DEFAULT '-infinity',
	twice bigint GENERATED ALWAYS AS (value * 2) STORED)
EOC
	key => 'UNIQUE NULLS NOT DISTINCT ("workflowId", name), FOREIGN KEY ("workflowId") REFERENCES public.workflow ON DELETE CASCADE');
my $columns =
  '"workflowId", name, value, "rootCount", "latestEvent", "firstEvent", day, last';
my @n8n = (
	'"workflowId", name',
	'sum(value)::bigint AS value, sum("rootCount")::integer, max("latestEvent"), min("firstEvent"), min(day), max(last)',
	'value, "rootCount", "latestEvent", "firstEvent", day, last');

# The second time most totals are there, and then few deltas come, and none of some
# measures.
$node->safe_psql('postgres', 'CREATE TABLE ledger (LIKE schema1.counted INCLUDING DEFAULTS)');
foreach my $rows (5000, 100000, 100, 2)
{
	is( $node->safe_psql('postgres', <<EOC),
CREATE TEMP TABLE new AS
SELECT nullif('w' || n % 51, 'w0') AS "workflowId", (ARRAY['ok', 'error', 'new'])[1 + n % 3] AS name,
	(random() * 1000)::bigint AS value, n % 7 AS "rootCount",
	CASE WHEN n % 5 = 0 THEN '-infinity' ELSE timestamptz '2026-01-01' + n * interval '1 min' END AS "latestEvent",
	CASE WHEN n % 5 = 0 THEN 'infinity' ELSE timestamptz '2025-01-01' - n * interval '1 min' END AS "firstEvent",
	date '2025-01-01' + n % 100 AS day, timestamp '2025-01-01' + n * interval '1 h' AS last
FROM generate_series(1, $rows) AS n ORDER BY random();
INSERT INTO schema1.counted ($columns) TABLE new;
INSERT INTO ledger ($columns) TABLE new;
$fold;
EOC
		't',
		"$rows deltas with seven measures are folded");
	is(differences(@n8n), '0', 'and each measure is exact');
}
is( $node->safe_psql('postgres', <<'EOC'),
INSERT INTO schema1.counted (name, value) VALUES ('ok', 0);
SELECT worker_spi_fold(1);
SELECT count(*), count(*) FILTER (WHERE "workflowId" IS NULL), bool_and(twice = 2 * value) FROM schema1.counted;
EOC
	"t\n51|1|t",
	'there is one total for each key, with its generated column');
is(differences(@n8n), '0', 'and a delta that leaves all measures out changes none');
is( $node->safe_psql('postgres', <<'EOC'),
DELETE FROM workflow WHERE id = 'w7';
SELECT count(*) FROM schema1.counted WHERE "workflowId" = 'w7';
EOC
	'0',
	'the cascade of a foreign key takes the totals as well');

# Measures alone, with one total, and a worker that makes what is missing.
$node->safe_psql('postgres', <<"EOC");
CREATE SCHEMA schema3;
CREATE TABLE schema3.counted ($standard, bytes bigint NOT NULL DEFAULT 0, last date NOT NULL DEFAULT '-infinity');
INSERT INTO schema3.counted (value, bytes, last) VALUES (1, 10, '2026-01-01'), (2, 20, '2025-01-01'), (4, -5, '-infinity');
SELECT worker_spi_launch(3);
EOC
folds($node, 3, 'a table with measures and no keys is folded');
is(rows($node, 3, 'tableoid::regclass, type, value, bytes, last'),
	'schema3.total|total|7|25|2026-01-01', 'measures need no key, and have one total');
is( $node->safe_psql('postgres',
		"SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid IN ('schema3.counted'::regclass, 'schema3.total'::regclass, 'schema3.stuck'::regclass)"
	),
	'CREATE UNIQUE INDEX total_pkey ON schema3.total USING btree (type)',
	'the worker makes the totals with their index, and no other');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(3)'), 't', 'that worker stops');

# Every row of counted is a delta.
new_table($node, 1, 'CREATE TABLE %t (type text, value integer)', key => '');
$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema1.total ADD UNIQUE NULLS NOT DISTINCT (type);
INSERT INTO schema1.counted VALUES (NULL, 1), ('delta', 2), ('Total', 4), ('', 8), (NULL, NULL), ('total', NULL), ('total', 16)
EOC
folds($node, 1, 'rows of any type are folded');
is(rows($node, 1, 'tableoid::regclass, type, value'),
	'schema1.total|total|31', 'whatever their type says');

# ------------------------------------------------------------------------
# What makes a measure
# ------------------------------------------------------------------------

# The definition of n, two values of it, and what the total has of them.
foreach my $test (
	[ "bigint NOT NULL DEFAULT 0", 5, 7, 12 ],
	[ "integer NOT NULL DEFAULT 0", 5, 7, 12 ],
	[ "bigint DEFAULT '0' NOT NULL", 5, -7, -2 ],
	[ "integer NOT NULL DEFAULT 0::bigint", 5, 7, 12 ],
	[ "bigint NOT NULL DEFAULT 0::smallint", 5, 7, 12 ],
	[ "bigint NOT NULL DEFAULT -0", 5, 7, 12 ],
	[ "bigint NOT NULL DEFAULT (3 - 1 - 2)", 5, 7, 12 ],
	[ "bigint NOT NULL DEFAULT length('')", 5, 7, 12 ],
	[ "date NOT NULL DEFAULT '-infinity'", '2024-02-29', '2023-01-01', '2024-02-29' ],
	[ "date NOT NULL DEFAULT 'infinity'", '2024-02-29', '2023-01-01', '2023-01-01' ],
	[ "timestamp NOT NULL DEFAULT '-infinity'", '2024-02-29 10:00', '2023-01-01', '2024-02-29 10:00:00' ],
	[ "timestamp NOT NULL DEFAULT '-infinity'::date", '2024-02-29 10:00', '2023-01-01', '2024-02-29 10:00:00' ],
	[ "timestamp NOT NULL DEFAULT 'infinity'", '2024-02-29 10:00', '2023-01-01', '2023-01-01 00:00:00' ],
	[ "timestamptz NOT NULL DEFAULT '-infinity'", '2024-02-29 10:00+00', '2024-02-29 11:00+02', '2024-02-29 10:00:00+00' ],
	[ "timestamptz(0) NOT NULL DEFAULT 'infinity'", '2024-02-29 10:00+00', '2024-02-29 11:00+02', '2024-02-29 09:00:00+00' ],
	[ "timestamptz NOT NULL DEFAULT '-infinity'::timestamptz", '2024-02-29 10:00+00', '-infinity', '2024-02-29 10:00:00+00' ])
{
	my ($definition, $first, $second, $expected) = @$test;

	foreach my $keys ('', ', k text NOT NULL')
	{
		my $key = $keys ? 'PRIMARY KEY (k)' : 'PRIMARY KEY (type)';
		my $k = $keys ? "'a'" : "'delta'";
		my $column = $keys ? 'k' : 'type';

		new_table($node, 1, "CREATE TABLE %t ($standard, n $definition$keys)",
			key => $key);
		is( $node->safe_psql('postgres', <<EOC),
SET timezone = 'UTC';
INSERT INTO schema1.counted (value, n, $column) VALUES (1, '$first', $k);
INSERT INTO schema1.counted (value, $column) VALUES (1, $k);
$fold;
INSERT INTO schema1.counted (value, n, $column) VALUES (1, '$second', $k);
INSERT INTO schema1.counted (value, $column) VALUES (1, $k);
$fold;
SELECT value, n FROM schema1.counted;
EOC
			"t\nt\n4|$expected",
			'a measure' . ($keys ? ' beside a key' : '') . ": $definition");
	}
}

# The column value is summed whatever it is declared as; type and value may be
# missing where there are keys.
foreach my $test (
	[ 'value alone', 'value bigint, k text NOT NULL', 'value', '12' ],
	[ 'an integer value', 'k text NOT NULL, value integer', 'value', '12' ],
	[ 'a value with a default', 'value integer DEFAULT 100, k text NOT NULL', 'value', '12' ],
	[ 'a measure alone', 'k text NOT NULL, n integer NOT NULL DEFAULT 0', 'n', '12' ],
	[ 'type and a measure', "k text NOT NULL, n bigint NOT NULL DEFAULT 0, type text", 'n', '12' ],
	[ 'the latest alone', "last date NOT NULL DEFAULT '-infinity', k text NOT NULL", "last", '2000-01-08' ])
{
	my ($name, $definition, $column, $expected) = @$test;
	my ($five, $seven) = $column eq 'last' ? ("'2000-01-06'", "'2000-01-08'") : (5, 7);

	new_table($node, 1, "CREATE TABLE %t ($definition)", key => 'PRIMARY KEY (k)');
	is( $node->safe_psql('postgres', <<EOC),
INSERT INTO schema1.counted (k, $column) VALUES ('a', $five), ('b', $five);
$fold;
INSERT INTO schema1.counted (k, $column) VALUES ('a', $seven);
$fold;
SELECT $column FROM schema1.counted WHERE k = 'a';
SELECT count(*) FROM schema1.total;
EOC
		"t\nt\n$expected\n2",
		"what is measured: $name");
}

# NULL counts as 0, in a delta and in a total.
new_table($node, 1, 'CREATE TABLE %t (k text NOT NULL, value integer)',
	key => 'PRIMARY KEY (k)',
	total => "INSERT INTO %s.total VALUES ('a', NULL), ('b', 2), ('c', NULL)");
is( $node->safe_psql('postgres', <<EOC),
INSERT INTO schema1.counted VALUES ('a', NULL), ('a', 5), ('b', NULL), ('c', NULL), ('d', NULL), ('e', NULL), ('e', 3);
$fold;
SELECT k, value FROM schema1.counted ORDER BY k;
EOC
	"t\na|5\nb|2\nc|0\nd|0\ne|3",
	'NULL counts as 0');

# Measures can have any name.
my @names = ('Sum', 'select', 'a b', 'quo"te', 'rows', 'gone', 'known', 'total',
	'sums', 'excluded', 'either', 'written', 'count', 'rest', 'parts', 'Value', 'x' x 63);
my @quoted = map { '"' . s/"/""/gr . '"' } @names;
new_table($node, 1, 'CREATE TABLE %t (k text NOT NULL, '
	  . join(', ', map { "$_ bigint NOT NULL DEFAULT 0" } @quoted) . ')',
	key => 'PRIMARY KEY (k), CONSTRAINT small CHECK ("Sum" < 1000000)');
{
	my $list = join ', ', @quoted;
	my $n = 0;
	my $values = join ', ', map { 10 + $n++ } @quoted;
	my $sums = join '|', map { 3 * (10 + $_) } 0 .. $#quoted;

	is( $node->safe_psql('postgres', <<EOC),
INSERT INTO schema1.counted (k, $list) VALUES ('a', $values), ('a', $values);
$fold;
INSERT INTO schema1.counted (k, $list) VALUES ('a', $values);
$fold;
SELECT $list FROM schema1.counted;
EOC
		"t\nt\n$sums",
		'measures with any name are summed');

	# The other ways to fold have names of their own.
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted (k, $list) VALUES ('b', $values), ('a', $values); INSERT INTO schema1.counted (k, \"Sum\") VALUES ('b', 1000000)");
	error_is($node, 'postgres', $fold, '23514', qr/"small"/, 'they can be stuck');
	is( $node->safe_psql('postgres', <<EOC),
INSERT INTO schema1.counted (k, $list) VALUES ('b', $values), ('b', $values);
INSERT INTO schema1.counted (k, "Sum") VALUES ('b', -1000000);
$fold;
SELECT $list FROM schema1.total WHERE k = 'b';
EOC
		"t\n$sums", 'and get through');
}

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
		"CREATE TABLE %t ($standard, $types, hits int NOT NULL DEFAULT 0)",
		key => "UNIQUE NULLS NOT DISTINCT ($keys)");
	$node->safe_psql('postgres',
		"DROP TABLE ledger; CREATE TABLE ledger (value bigint, hits int, $types)");
	foreach my $rows (200, 3, 20000)
	{
		is( $node->safe_psql('postgres', <<EOC), 't', "$rows deltas with $nkeys keys are folded");
CREATE TEMP TABLE new AS
SELECT (random() * 100)::bigint AS value, 1 AS hits, $values FROM generate_series(1, $rows) AS n;
INSERT INTO ledger TABLE new;
INSERT INTO schema1.counted (value, hits, $keys) TABLE new;
$fold;
EOC
		is( differences(
				$keys, 'sum(value)::bigint, sum(hits)::int', 'value, hits'),
			'0',
			'whose totals are exact');
	}
}

# Keys that cannot be hashed.
new_table($node, 1,
	"CREATE TABLE %t ($standard, price money, bits bit varying, last date NOT NULL DEFAULT '-infinity')",
	key => 'UNIQUE NULLS NOT DISTINCT (price, bits)');
is( $node->safe_psql('postgres', <<'EOC'),
INSERT INTO schema1.counted (value, price, bits, last)
	SELECT 1, nullif(n % 3, 0)::money, nullif(n % 2, 0)::bit(2), date '2024-01-01' + n FROM generate_series(1, 600) AS n;
SELECT worker_spi_fold(1);
INSERT INTO schema1.counted (value, price, bits) SELECT value, price, bits FROM schema1.counted;
SELECT worker_spi_fold(1);
SELECT count(*), min(value), max(value), min(last), max(last) FROM schema1.counted;
EOC
	"t\nt\n6|200|200|2025-08-18|2025-08-23",
	'keys need not be of a type that can be hashed');

# ------------------------------------------------------------------------
# Sums that do not fit
# ------------------------------------------------------------------------

my %limits = (
	bigint => [ '9223372036854775807', '-9223372036854775808', 'bigint out of range' ],
	integer => [ '2147483647', '-2147483648', 'integer out of range' ]);
foreach my $type (sort keys %limits)
{
	my ($max, $min, $message) = @{ $limits{$type} };

	new_table($node, 1,
		"CREATE TABLE %t (k text NOT NULL, value $type, last date NOT NULL DEFAULT '-infinity')",
		key => 'PRIMARY KEY (k)');

	# Up to the limits all fits, however it comes to that.
	is( $node->safe_psql('postgres', <<EOC),
INSERT INTO schema1.counted VALUES ('high', $max), ('low', $min), ('both', $max), ('both', $min), ('far', $max), ('far', $max), ('far', -$max);
$fold;
INSERT INTO schema1.counted VALUES ('high', -1), ('low', 1), ('both', 1);
$fold;
INSERT INTO schema1.counted VALUES ('high', 1), ('low', -1), ('both', $min);
$fold;
INSERT INTO schema1.counted VALUES ('high', 0), ('low', 0), ('both', $max), ('low', $max), ('low', -$max);
$fold;
SELECT k, value FROM schema1.counted ORDER BY k;
EOC
		"t\nt\nt\nt\nboth|-1\nfar|$max\nhigh|$max\nlow|$min",
		"totals of type $type reach both limits");

	# Beyond them it is stuck, in as few rows as hold it.
	foreach my $test ([ 'high', 1, $max, "-$max", 1 ], [ 'low', -1, $min, $max, 6 ])
	{
		my ($key, $delta, $limit, $opposite, $rest) = @$test;

		$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('$key', $delta, '2024-02-29')");
		error_is($node, 'postgres', $fold, '22003', qr/\Q$message\E/, "one more than $limit does not fit");
		is( $node->safe_psql('postgres',
				"SELECT tableoid::regclass, value, last FROM schema1.counted WHERE k = '$key' ORDER BY 1::text"),
			"schema1.total|$limit|-infinity\nschema1.stuck|$delta|2024-02-29",
			'it is stuck as a whole');
		$node->safe_psql('postgres', "INSERT INTO schema1.counted SELECT '$key', $limit FROM generate_series(1, 5)");
		error_is($node, 'postgres', $fold, '22003', qr/\Q$message\E/, 'what joins it is stuck as well');
		error_is($node, 'postgres', $fold, '22003', qr/\Q$message\E/, 'for good');
		is( $node->safe_psql('postgres', <<EOC),
SELECT count(*), sum(value) = 5 * numeric '$limit' + $delta, max(last) FROM schema1.stuck WHERE k = '$key';
SELECT sum(value) = 6 * numeric '$limit' + $delta FROM schema1.counted WHERE k = '$key';
EOC
			"6|t|2024-02-29\nt", 'in as few rows as hold it');
		is( $node->safe_psql('postgres', <<EOC),
INSERT INTO schema1.counted SELECT '$key', $opposite FROM generate_series(1, 5);
INSERT INTO schema1.counted SELECT '$key', -($delta) FROM generate_series(1, $rest);
$fold;
SELECT value, last FROM schema1.counted WHERE k = '$key';
EOC
			"t\n$limit|2024-02-29", 'until other deltas make it fit');
	}
}

# One measure that does not fit holds up its key, and no other measure is torn off.
new_table($node, 1,
	'CREATE TABLE %t (k text NOT NULL, hits integer NOT NULL DEFAULT 0, bytes bigint NOT NULL DEFAULT 0)',
	key => 'PRIMARY KEY (k)');
$node->safe_psql('postgres',
	q(INSERT INTO schema1.counted VALUES ('a', 2147483647, 10), ('a', 2147483647, 20), ('a', 2, 31), ('b', 1, 1)));
error_is($node, 'postgres', $fold, '22003', qr/out of range/, 'one of two measures does not fit');
is( $node->safe_psql('postgres', <<'EOC'),
SELECT k, sum(hits), sum(bytes), count(*), tableoid::regclass FROM schema1.counted GROUP BY k, tableoid ORDER BY k;
EOC
	"a|4294967296|61|3|schema1.stuck\nb|1|1|1|schema1.total",
	'its key is stuck with both, in as few rows as hold them');

# ------------------------------------------------------------------------
# At every instant
# ------------------------------------------------------------------------

new_table($node, 1, <<'EOC',
CREATE TABLE %t (page text NOT NULL, hits integer NOT NULL DEFAULT 0,
	first timestamptz NOT NULL DEFAULT 'infinity', last timestamptz NOT NULL DEFAULT '-infinity')
EOC
	key => 'PRIMARY KEY (page)');
$node->safe_psql('postgres',
	'DROP TABLE ledger; CREATE TABLE ledger (page text, hits integer, at timestamptz)');
my $insert = <<'EOC';
\set n random(1, 20)
\set minutes random(-100000, 100000)
BEGIN;
INSERT INTO schema1.counted VALUES ('p' || :n, :n, timestamptz '2024-01-01' + :minutes * interval '1 min', timestamptz '2024-01-01' + :minutes * interval '1 min');
INSERT INTO ledger VALUES ('p' || :n, :n, timestamptz '2024-01-01' + :minutes * interval '1 min');
END;
EOC
my $compare = <<'EOC';
WITH counted AS (SELECT page, sum(hits) AS hits, min(first) AS first, max(last) AS last FROM schema1.counted GROUP BY page),
	expected AS (SELECT page, sum(hits) AS hits, min(at) AS first, max(at) AS last FROM ledger GROUP BY page)
SELECT 1 / (NOT EXISTS (TABLE counted EXCEPT TABLE expected) AND NOT EXISTS (TABLE expected EXCEPT TABLE counted))::int;
EOC
my $before = worker($node, 1, 'fold_count');
my $pgbench = start_pgbench($node, [ '-c', 4, '-t', 500 ],
	[ $insert, 8 ], [ $compare, 1 ], [ 'SELECT 1 / worker_spi_fold(1)::int;', 1 ]);
my (undef, $err, $success) = finish_psql($pgbench);
ok($success, 'while others write and folds run, sum, max and min over all rows of a key are true')
  or diag($err);
cmp_ok(worker($node, 1, 'fold_count'), '>', $before + 1, 'there were several folds meanwhile');
folds($node, 1, 'the rest is folded');
is( differences('page', 'sum(hits)::int AS hits, min(at), max(at)', 'hits, first, last'),
	'0', 'in the end each total is that of the ledger');

# ------------------------------------------------------------------------
# Unlogged
# ------------------------------------------------------------------------

foreach my $table ('counted', 'total', 'stuck')
{
	my $offset = -s $node->logfile;
	new_table($node, 1, "CREATE TABLE %t ($standard)",
		total => $table eq 'total' ? 'ALTER TABLE %s.total SET UNLOGGED'
		: $table eq 'counted' ? 'ALTER TABLE %t SET UNLOGGED'
		: '');
	$node->safe_psql('postgres', 'ALTER TABLE schema1.stuck SET UNLOGGED') if $table eq 'stuck';
	foreach (1 .. 3)
	{
		$node->safe_psql('postgres', 'INSERT INTO schema1.counted (value) VALUES (1)');
		folds($node, 1, "with $table unlogged the worker folds");
	}
	is(rows($node, 1), 'total|3', 'as ever');
	my $log = slurp_file($node->logfile, $offset);
	my @warnings = $log =~ /(WARNING:  table "postgres\.schema1\.\w+" is unlogged)/g;
	is_deeply(
		\@warnings,
		[qq(WARNING:  table "postgres.schema1.$table" is unlogged)],
		"that $table is unlogged is said once");
	like(
		$log,
		$table eq 'total'
		? qr/DETAIL:  [^\n]*crash[^\n]*\n/
		: qr/DETAIL:  [^\n]*crash[^\n]*standby[^\n]*\n/,
		'with what it means');

	# A crash empties what is unlogged.  What was folded out of it is not lost.
	next if $table eq 'total';
	$node->safe_psql('postgres', 'INSERT INTO schema1.counted (value) VALUES (5)');
	folds($node, 1, "with $table unlogged the worker folds once more");
	$node->stop('immediate');
	$node->start;
	is(total($node, 1), 8, 'and after a crash the count is the same');
}

$node->stop;
done_testing();
