# Key columns: every column of schemaN.counted besides type and value makes a
# counter of its own of each combination of values.  Shown here: which types
# and names can be keys, what a change of the columns does to a running worker,
# which indexes are adopted, and that every key's total is exact, with one key
# and with 100,000, also while others write.

use strict;
use warnings FATAL => 'all';

use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('keys', <<EOC, extra => [ '--encoding=UTF8', '--locale=C.UTF-8' ]);
worker_spi.total_workers = 1
autovacuum = off
EOC

# The worker's own table, without keys, is there when the first fold is done.
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
my $pid = worker($node, 1, 'pid');

# Put another table in place of the worker's, in one transaction, so that the
# worker never finds it missing.  $more is run before the worker can see it.
sub new_table
{
	my ($columns, $more) = @_;
	$node->safe_psql('postgres', <<EOC . ($more // '') . "\nCOMMIT;");
BEGIN;
DROP TABLE schema1.counted;
CREATE TABLE schema1.counted (
	type text NOT NULL CHECK (type IN ('total', 'delta')),
	value bigint NOT NULL$columns);
EOC
	return;
}

# Run one psql session and return the last line of what it prints.
sub last_line
{
	my ($sql) = @_;
	return (split /\n/, $node->safe_psql('postgres', $sql))[-1];
}

# How many rows of the ledger, which has the same columns as the table, differ
# from the totals, plus the number of deltas that are left.
my $differences = <<'EOC';
SELECT (SELECT count(*) FROM (
	(TABLE expected EXCEPT ALL
	 SELECT * FROM totals) UNION ALL
	(SELECT * FROM totals EXCEPT ALL
	 TABLE expected)) AS d) + (SELECT count(*) FROM schema1.counted WHERE type <> 'total');
EOC

# The same for a table with one key column k, and a ledger of keys and values.
my $differences_k = <<"EOC";
CREATE TEMP TABLE expected AS SELECT k, sum(value) FROM ledger GROUP BY k;
CREATE TEMP TABLE totals AS SELECT k, value FROM schema1.counted WHERE type = 'total';
$differences
EOC

###############################################################################
# Types

$node->safe_psql('postgres', <<'EOC');
CREATE TYPE regress_enum AS ENUM ('low', 'high');
CREATE TYPE regress_pair AS (a int, b text);
CREATE DOMAIN regress_domain AS text CHECK (VALUE <> 'x');
EOC

# The values, as literals, and how many different keys they are.
my @types = (
	[ 'text', [qw('a' 'A' 'a' '')], 3 ],
	[ 'varchar(3)', [qw('a' 'abc' 'a')], 2 ],
	[ 'character(3)', [ "'a'", "'a  '" ], 1 ],
	[ 'integer', [qw(1 -1 1 2147483647)], 3 ],
	[ 'bigint', [qw(1 9223372036854775807 1)], 2 ],
	[ 'numeric', [qw(1.0 1.00 'NaN' 'NaN')], 2 ],
	[ 'double precision', [qw(0 '-0' 'NaN' 'Infinity' 'NaN')], 3 ],
	[ 'boolean', [qw(true false true)], 2 ],
	[ 'date', [qw('2024-02-29' '2024-03-01' 'infinity')], 3 ],
	[
		'timestamptz',
		[ "'2024-01-01 00:00+00'", "'2024-01-01 02:00+02'", "'-infinity'" ], 2
	],
	[ 'interval', [ "'1 day'", "'24 hours'", "'1 hour'" ], 2 ],
	[
		'uuid',
		[
			"'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",
			"'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'",
			"'00000000-0000-0000-0000-000000000000'"
		],
		2
	],
	[ 'bytea', [qw('\x00' '\x' '\x00ff' '\x00')], 3 ],
	[ 'inet', [qw('10.0.0.1' '10.0.0.1/32' '10.0.0.1/8' '::1')], 3 ],
	[ 'regress_enum', [qw('low' 'high' 'low')], 2 ],
	[ 'regress_domain', [qw('a' 'b' 'a')], 2 ],
	[ 'integer[]', [ "'{}'", "'{1,NULL}'", "'{1,2}'", "'{1,NULL}'" ], 3 ],
	[
		'jsonb',
		[ q('{"a":1,"b":[]}'), q('{"b": [], "a": 1.0}'), q('null'), q('{}') ],
		3
	],
	[ 'regress_pair', [ "'(1,a)'", "'(1,)'", "'(1,)'", "'(,)'" ], 3 ],
	[ 'int4range', [ "'[1,3)'", "'[1,2]'", "'empty'" ], 2 ],
	[ 'int4multirange', [ "'{[1,2],[3,4]}'", "'{[1,4]}'", "'{}'" ], 2 ]);

# What some servers have and others have not.
if ($node->safe_psql('postgres',
		"SELECT EXISTS (SELECT FROM pg_collation WHERE collprovider = 'i')") eq
	't')
{
	$node->safe_psql('postgres', <<'EOC');
CREATE COLLATION regress_nocase
	(provider = icu, locale = 'und-u-ks-level2', deterministic = false);
EOC
	push @types,
	  [ 'text COLLATE public.regress_nocase', [qw('Ab' 'aB' 'ab' 'b')], 2 ];
}
if ($node->safe_psql('postgres',
		"SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'citext')"
	) eq 't')
{
	$node->safe_psql('postgres', 'CREATE EXTENSION citext');
	push @types, [ 'public.citext', [qw('Ab' 'aB' 'ab' 'b')], 2 ];
}

foreach my $test (@types)
{
	my ($type, $literals, $keys) = @$test;
	my $n = 0;
	my $values = join ', ', map { '(' . 10**$n++ . ", $_)" } @$literals;

	# NULL is one more key, and the second fold meets all the keys again.
	new_table(", k $type");
	my $result = $node->safe_psql('postgres', <<EOC);
CREATE TEMP TABLE ledger (value bigint, k $type);
INSERT INTO ledger VALUES $values, (5, NULL), (6, NULL);
INSERT INTO schema1.counted SELECT 'delta', * FROM ledger;
SELECT worker_spi_fold(1);
SELECT count(*) FROM schema1.counted;
INSERT INTO schema1.counted SELECT 'delta', * FROM ledger ORDER BY ledger.ctid DESC;
INSERT INTO ledger TABLE ledger;
SELECT worker_spi_fold(1);
SELECT count(*) FROM schema1.counted;
$differences_k
EOC
	is( $result,
		join("\n", 't', $keys + 1, 't', $keys + 1, 0),
		"a key of type $type has $keys exact totals, and one for NULL");
}

# Types that cannot be compared are refused in the words of the server.
foreach my $type ('json', 'point', 'xid')
{
	new_table(", k $type",
		"INSERT INTO schema1.counted VALUES ('delta', 3, NULL);");
	error_is(
		$node, 'postgres', 'SELECT worker_spi_fold(1)', '42704',
		qr/data type $type has no default operator class for access method "btree"/,
		"a key of type $type is refused with the server's own error");
	wait_for_state($node, 1, 'backoff');
	is(total($node, 1), 3, "the delta with a key of type $type is kept");
}
is( last_line(
		'ALTER TABLE schema1.counted DROP COLUMN k; SELECT worker_spi_fold(1); TABLE schema1.counted'
	),
	'total|3',
	'without that column the same worker folds the delta');

# Contents that cannot be compared or indexed: the error comes with the row.
new_table(', k text');
$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema1.counted ALTER k SET STORAGE EXTERNAL;
INSERT INTO schema1.counted VALUES ('delta', 1, repeat('x', 10000)), ('delta', 2, 'y');
EOC
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '54000',
	qr/index row/, 'a key too long for an index fails the cycle');
is(total($node, 1), 3, 'nothing is lost by a key that is too long');
is( last_line(<<'EOC'), '2', 'once the long key is cut, all is folded');
UPDATE schema1.counted SET k = left(k, 5) WHERE length(k) > 5;
SELECT worker_spi_fold(1);
SELECT count(*) FROM schema1.counted WHERE type = 'total';
EOC

###############################################################################
# NULLs in some keys and not in others

new_table(', a text, b int');
is( $node->safe_psql('postgres', <<'EOC'),
INSERT INTO schema1.counted VALUES
	('delta', 1, NULL, NULL), ('delta', 10, NULL, NULL), ('delta', 100, 'x', NULL),
	('delta', 1000, NULL, 1), ('delta', 10000, 'x', 1), ('delta', 100000, '', NULL);
SELECT worker_spi_fold(1);
INSERT INTO schema1.counted SELECT 'delta', 2, a, b FROM schema1.counted;
SELECT worker_spi_fold(1);
SELECT coalesce(a, '-'), coalesce(b, 0), value FROM schema1.counted ORDER BY value;
EOC
	"t\nt\n-|0|13\nx|0|102\n-|1|1002\nx|1|10002\n|0|100002",
	'each combination of NULL and other keys has one total');

###############################################################################
# Names

my @names = (
	'Page', 'select', 'a b', 'quo"te', '""', 'rows', 'k1', 'k3', 'total',
	'deltas', 'excluded', 'totals', 'sum', 'count', 'coalesce', 'max', '$1',
	'Type', 'VALUE', 'user', "it's", 'back\\slash', 'comma, ', '(', 'x' x 63);
my @quoted = map { s/"/""/gr } @names;
my $columns = join ', ', map { qq("$_") } @quoted;

new_table(join '', map { qq(, "$_" text) } @quoted);
# In row n the first n key columns are n, the rest are 0.
$node->safe_psql('postgres',
	    "INSERT INTO schema1.counted (type, value, $columns) SELECT 'delta', n, "
	  . join(', ',
		map { "CASE WHEN n >= $_ THEN n ELSE 0 END" } 1 .. scalar(@names))
	  . ' FROM generate_series(0, '
	  . scalar(@names)
	  . ') AS n, generate_series(1, 3)');
is( last_line(<<EOC),
CREATE TEMP TABLE expected AS SELECT $columns, sum(value) AS value FROM schema1.counted GROUP BY $columns;
SELECT worker_spi_fold(1);
CREATE TEMP TABLE totals AS SELECT $columns, value FROM schema1.counted WHERE type = 'total';
$differences
EOC
	0,
	'key columns with any name have exact totals');
is($node->safe_psql('postgres', 'SELECT count(*) FROM schema1.counted'),
	@names + 1, 'every one of these columns tells keys apart');

foreach my $n (32, 33)
{
	new_table(join('', map { ", c$_ int" } 1 .. $n),
		"INSERT INTO schema1.counted VALUES ('delta', 3), ('delta', 4);");
	if ($n == 32)
	{
		is(last_line('SELECT worker_spi_fold(1); SELECT type, value FROM schema1.counted'),
			'total|7', 'a table can have 32 key columns');
	}
	else
	{
		error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '54011',
			qr/cannot use more than 32 columns in an index/,
			'one more is refused with the server\'s own error');
	}
}

###############################################################################
# Generated and dropped columns

my $virtual =
  $node->pg_version >= 18
  ? ', twice int GENERATED ALWAYS AS (n * 2) VIRTUAL'
  : '';
new_table(<<EOC);
, gone1 int, page text, lower text GENERATED ALWAYS AS (lower(page)) STORED,
gone2 int, n int$virtual
EOC
is( $node->safe_psql('postgres', <<'EOC'),
ALTER TABLE schema1.counted DROP COLUMN gone1, DROP COLUMN gone2;
INSERT INTO schema1.counted (type, value, page, n)
	VALUES ('delta', 1, 'A', 1), ('delta', 2, 'a', 1), ('delta', 4, 'A', 1), ('delta', 8, 'A', 2);
SELECT worker_spi_fold(1);
SELECT page, n, lower, value FROM schema1.counted ORDER BY value;
SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = 'schema1.counted'::regclass;
EOC
	"t\na|1|a|2\nA|1|a|5\nA|2|a|8\n"
	  . "CREATE UNIQUE INDEX counted_page_n_idx ON schema1.counted USING btree"
	  . " (page, n) NULLS NOT DISTINCT WHERE (type = 'total'::text)",
	'neither generated nor dropped columns are keys');

###############################################################################
# Columns that come and go while the worker runs

new_table(', page text',
	"INSERT INTO schema1.counted VALUES ('delta', 1, 'a'), ('delta', 2, 'b');");
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
my $offset = -s $node->logfile;
$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema1.counted ADD day date;
INSERT INTO schema1.counted VALUES ('delta', 10, 'a', NULL),
	('delta', 20, 'b', '2024-02-29'), ('delta', 40, 'b', '2024-02-29');
EOC
error_is(
	$node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
	qr/index "counted_page_idx" contradicts the key columns of table "schema1\.counted"/,
	'a fold after a key column was added names the index that contradicts it');
wait_for_state($node, 1, 'backoff');
is(worker($node, 1, 'last_sqlstate'), '42P16', 'the view has the error');
ok( $node->log_contains(
		qr/HINT:  Drop index schema1\.counted_page_idx; the worker then makes the one it needs\./,
		$offset),
	'the hint in the log names the index to drop');
is(total($node, 1), 73, 'the count is right all the same');

$node->safe_psql('postgres', 'DROP INDEX schema1.counted_page_idx');
$node->poll_query_until('postgres',
	"SELECT count(*) = 3 FROM schema1.counted WHERE type = 'total'")
  or die 'not folded after DROP INDEX';
is( $node->safe_psql(
		'postgres', 'SELECT page, day, value FROM schema1.counted ORDER BY value'
	),
	"b||2\na||11\nb|2024-02-29|60",
	'after that the worker folds by itself, with the new column as a key');
is( $node->safe_psql('postgres',
		"SELECT indexrelid::regclass FROM pg_index WHERE indrelid = 'schema1.counted'::regclass"
	),
	'schema1.counted_page_day_idx',
	'and has made the index that it needs');

# A dropped key column takes the index with it, and may leave two totals for
# one key: that is for the user to say what it means.
$node->safe_psql('postgres', <<'EOC');
INSERT INTO schema1.counted VALUES ('delta', 100, 'a', NULL);
ALTER TABLE schema1.counted DROP COLUMN day;
EOC
error_is(
	$node, 'postgres', 'SELECT worker_spi_fold(1)', '23505',
	qr/could not create unique index "counted_page_idx"/,
	'totals that a dropped key column kept apart are not merged in silence');
is(total($node, 1), 173, 'and nothing is lost');
is( $node->safe_psql('postgres', <<'EOC'),
UPDATE schema1.counted SET type = 'delta';
SELECT worker_spi_fold(1);
SELECT type, page, value FROM schema1.counted ORDER BY page;
EOC
	"t\ntotal|a|111\ntotal|b|62",
	'made into deltas, the totals are merged by the next fold');

# To a table without keys, and back.
is( $node->safe_psql('postgres', <<'EOC'),
BEGIN;
UPDATE schema1.counted SET type = 'delta';
ALTER TABLE schema1.counted DROP COLUMN page;
COMMIT;
SELECT worker_spi_fold(1);
TABLE schema1.counted;
BEGIN;
ALTER TABLE schema1.counted ADD page text;
DROP INDEX schema1.counted_type_idx;
INSERT INTO schema1.counted VALUES ('delta', 1, 'a'), ('delta', 2, NULL);
COMMIT;
SELECT worker_spi_fold(1);
SELECT value, page FROM schema1.counted ORDER BY page;
EOC
	"t\ntotal|173\nt\n1|a\n175|",
	'a table can lose its last key, and a total without key be that of NULL');

$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema1.counted RENAME page TO "Site";
ALTER TABLE schema1.counted ALTER "Site" TYPE varchar(10);
INSERT INTO schema1.counted VALUES ('delta', 10, 'a');
EOC
is( $node->safe_psql(
		'postgres',
		'SELECT worker_spi_fold(1); SELECT value, "Site" FROM schema1.counted ORDER BY 2'
	),
	"t\n11|a\n175|",
	'a renamed and retyped key column goes on as it was');

# Maintenance of the index while the worker runs.
is( $node->safe_psql('postgres', <<'EOC'),
REINDEX TABLE CONCURRENTLY schema1.counted;
INSERT INTO schema1.counted VALUES ('delta', 1, 'a');
SELECT worker_spi_fold(1);
REINDEX TABLE schema1.counted;
INSERT INTO schema1.counted VALUES ('delta', 1, 'a');
SELECT worker_spi_fold(1);
DROP INDEX schema1.counted_page_idx;
INSERT INTO schema1.counted VALUES ('delta', 1, 'a');
SELECT worker_spi_fold(1);
SELECT value, "Site" FROM schema1.counted ORDER BY 2;
SELECT count(*) FROM pg_index WHERE indrelid = 'schema1.counted'::regclass;
EOC
	"t\nt\nt\n14|a\n175|\n1",
	'after its index was rebuilt, and after it was dropped, the worker folds');

# REINDEX CONCURRENTLY has a second index beside the first until it is done;
# an open snapshot keeps it from being done.
{
	my $snapshot = $node->background_psql('postgres');
	$snapshot->query_safe(
		'BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1;');
	my $reindex = IPC::Run::start(
		[
			'psql', '-X', '-q', '-d', $node->connstr('postgres'), '-c',
			'REINDEX TABLE CONCURRENTLY schema1.counted'
		],
		'<', \undef);
	$node->poll_query_until('postgres',
		"SELECT EXISTS (SELECT FROM pg_index WHERE indrelid = 'schema1.counted'::regclass AND NOT indisvalid)"
	) or die 'REINDEX CONCURRENTLY has made no index';
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted VALUES ('delta', 1, 'a')");
	my ($ret, $out, $err) =
	  $node->psql('postgres', 'SELECT worker_spi_fold(1)');
	is("$out$err", 't', 'the worker folds while its index is being rebuilt');
	$snapshot->query_safe('COMMIT');
	$snapshot->quit;
	ok($reindex->finish, 'the index is rebuilt');
	is( last_line(
			q(SELECT worker_spi_fold(1); SELECT value FROM schema1.counted WHERE "Site" = 'a')
		),
		15,
		'and serves the next fold');
}

###############################################################################
# Tables that have totals, and indexes that the user made

new_table(', page text', <<'EOC');
INSERT INTO schema1.counted VALUES ('total', 100, 'a'), ('total', 200, NULL),
	('delta', 1, 'a'), ('delta', 2, NULL), ('delta', 4, 'b');
EOC
is( $node->safe_psql('postgres', <<'EOC'),
SELECT worker_spi_fold(1);
SELECT value, page FROM schema1.counted ORDER BY page;
EOC
	"t\n101|a\n4|b\n202|",
	'totals that were there before are gone on with');

# Adopted, each as the only index.
foreach my $test (
	[ 'the same index under another name', '(page, day) NULLS NOT DISTINCT' ],
	[ 'other order',  '(day DESC, page) NULLS NOT DISTINCT' ],
	[ 'INCLUDE',      '(page, day) INCLUDE (value) NULLS NOT DISTINCT' ],
	[ 'fillfactor',   '(page, day) NULLS NOT DISTINCT WITH (fillfactor = 50)' ])
{
	my ($name, $definition) = @$test;
	new_table(', page text, day date', <<EOC);
CREATE UNIQUE INDEX mine ON schema1.counted $definition WHERE type = 'total';
INSERT INTO schema1.counted VALUES ('delta', 1, 'a', NULL), ('delta', 2, 'a', NULL);
EOC
	is( $node->safe_psql('postgres', <<'EOC'),
SELECT worker_spi_fold(1);
INSERT INTO schema1.counted VALUES ('delta', 4, 'a', NULL);
SELECT worker_spi_fold(1);
TABLE schema1.counted;
SELECT indexrelid::regclass FROM pg_index WHERE indrelid = 'schema1.counted'::regclass;
EOC
		"t\nt\ntotal|7|a|\nschema1.mine",
		"a user's index is adopted: $name");
}

# Of no use, but in nobody's way.
new_table(', page text', <<'EOC');
CREATE INDEX ON schema1.counted (page) WHERE type = 'total';
CREATE INDEX ON schema1.counted (type, page);
CREATE UNIQUE INDEX other ON schema1.counted (value) WHERE type = 'other';
INSERT INTO schema1.counted VALUES ('delta', 1, 'a'), ('delta', 1, 'a');
EOC
is( $node->safe_psql('postgres', <<'EOC'),
SELECT worker_spi_fold(1);
TABLE schema1.counted;
SELECT count(*) FROM pg_index WHERE indrelid = 'schema1.counted'::regclass;
EOC
	"t\ntotal|2|a\n4",
	'beside other indexes the worker makes its own');

# Refused, by the worker that runs and by launch.
foreach my $test (
	[ 'NULLS DISTINCT', '("Q", b)', ],
	[ 'a column less',  '("Q") NULLS NOT DISTINCT' ],
	[ 'a column more',  '("Q", b, type) NULLS NOT DISTINCT' ],
	[ 'an expression',  '("Q", (b + 0)) NULLS NOT DISTINCT' ])
{
	my ($name, $definition) = @$test;
	new_table(', "Q" text, b int', <<EOC);
CREATE UNIQUE INDEX "In dex" ON schema1.counted $definition WHERE type = 'total';
INSERT INTO schema1.counted VALUES ('delta', 1, NULL, NULL), ('delta', 2, NULL, NULL);
EOC
	error_is(
		$node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
		qr/index "In dex" contradicts the key columns of table "schema1\.counted".*HINT:  Drop index schema1\."In dex";/s,
		"a user's index is refused: $name");
	is( $node->safe_psql('postgres', <<'EOC'),
DROP INDEX schema1."In dex"; SELECT worker_spi_fold(1); TABLE schema1.counted;
EOC
		"t\ntotal|3||",
		"what the hint says helps: $name");
}

$node->safe_psql('postgres', <<'EOC');
CREATE SCHEMA schema9;
CREATE TABLE schema9.counted (type text, value bigint, page text);
CREATE UNIQUE INDEX i9 ON schema9.counted (type) WHERE type = 'total';
EOC
error_is($node, 'postgres', 'SELECT worker_spi_launch(9)',
	'42P16',
	qr/index "i9" contradicts the key columns of table "schema9\.counted"/,
	'launch raises the same error');
is($node->safe_psql('postgres', 'SELECT count(*) FROM worker_spi_workers'),
	1, 'and leaves no worker behind');

###############################################################################
# What the log and the view say

new_table(', page text, day date');
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
my $before = worker($node, 1, 'fold_count || $$ $$ || folded_rows');
$offset = -s $node->logfile;
$node->safe_psql('postgres', <<'EOC');
INSERT INTO schema1.counted SELECT 'delta', 1, 'page ' || n % 4, date '2024-01-01' + n % 3
	FROM generate_series(1, 1000) AS n;
SELECT worker_spi_fold(1);
SELECT worker_spi_fold(1);
EOC
ok( $node->log_contains(
		qr/LOG:  worker_spi worker 1: folded 1000 rows into 12 totals of schema1\.counted\n/,
		$offset),
	'the log says how many rows went into how many totals');
my @lines = slurp_file($node->logfile, $offset) =~ /worker_spi worker 1:/g;
is(scalar(@lines), 1, 'once, since the second fold found nothing');
my ($folds, $rows) = split / /, $before;
is( worker($node, 1, 'fold_count || $$ $$ || folded_rows'),
	($folds + 1) . ' ' . ($rows + 1000),
	'the view counts the fold and the rows');

###############################################################################
# One key, a thousand, a hundred thousand: all in one cycle each

foreach my $keys (1, 1000, 100_000)
{
	my $deltas = 2 * $keys + 10;

	new_table(', k int');
	$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
	my $count = worker($node, 1, 'fold_count');
	my $offset = -s $node->logfile;
	is( last_line(<<EOC),
CREATE TEMP TABLE ledger AS
	SELECT n * 7 % 1000 - 500 AS value, n % $keys AS k FROM generate_series(1, $deltas) AS n;
INSERT INTO schema1.counted SELECT 'delta', * FROM ledger;
SELECT worker_spi_fold(1);
$differences_k
EOC
		0,
		"with $keys keys, each total is that of the ledger");
	is( $node->safe_psql('postgres',
			'SELECT count(*), count(DISTINCT k) FROM schema1.counted'),
		"$keys|$keys",
		"there is one total for each of $keys keys");
	is(worker($node, 1, 'fold_count'),
		$count + 1, "one cycle did it for $keys keys");
	like(
		slurp_file($node->logfile, $offset),
		qr/folded $deltas rows into $keys totals of schema1\.counted\n/,
		"the log has the numbers for $keys keys");
}

# Once more over the totals, which are now all over the table: existing keys,
# new ones, and few rows among many totals.
is( last_line(<<EOC),
CREATE TEMP TABLE ledger AS SELECT value, k FROM schema1.counted;
WITH new AS (
	INSERT INTO ledger SELECT n, n * 1000 FROM generate_series(1, 200) AS n RETURNING *)
INSERT INTO schema1.counted SELECT 'delta', * FROM new;
SELECT worker_spi_fold(1);
$differences_k
EOC
	0,
	'deltas for old and new keys among 100,000 totals are folded right');

# One transaction folds 8000 blocks of a table with keys.  With rows as long as
# these, few do for more; most keys are met by both transactions.
new_table(<<'EOC');
, k int, filler text GENERATED ALWAYS AS (repeat('x', 1900)) STORED
EOC
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
my $count_before = worker($node, 1, 'fold_count');
is( last_line(<<EOC),
CREATE TEMP TABLE ledger AS
	SELECT n % 100 AS value, (n * n) % 997 AS k FROM generate_series(1::bigint, 36000) AS n;
INSERT INTO schema1.counted SELECT 'delta', * FROM ledger;
SELECT worker_spi_fold(1);
$differences_k
EOC
	0,
	'keys that are met by several transactions of a cycle have exact totals');
is(worker($node, 1, 'fold_count'), $count_before + 1, 'of one cycle');
cmp_ok(
	$node->safe_psql('postgres',
		"SELECT pg_relation_size('schema1.counted') / current_setting('block_size')::int"
	),
	'>', 8000 + 500, 'that took several transactions');

###############################################################################
# Others write while folds run

new_table(', k int', 'CREATE TABLE ledger (value bigint, k int);');
my $script = $node->basedir . '/insert.sql';
append_to_file($script, <<'EOC');
\set v random(-1000, 1000)
\set k random(1, 50)
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', :v, nullif(:k, 50));
INSERT INTO ledger VALUES (:v, nullif(:k, 50));
END;
EOC
$count_before = worker($node, 1, 'fold_count');
my $pgbench = IPC::Run::start(
	[
		'pgbench', '-n', '-c', '4', '-t', '500', '-f', $script,
		$node->connstr('postgres')
	],
	'<', \undef, '>', \my $bench_out, '2>', \my $bench_err);
my $wrong = 0;
while ($pgbench->pumpable)
{
	$pgbench->pump_nb;

	# One snapshot sees both tables.
	my $equal = last_line(<<'EOC');
SELECT worker_spi_fold(1);
SELECT NOT EXISTS (
	SELECT k, sum(value) FROM schema1.counted GROUP BY k
	EXCEPT SELECT k, sum(value) FROM ledger GROUP BY k)
AND NOT EXISTS (
	SELECT k, sum(value) FROM ledger GROUP BY k
	EXCEPT SELECT k, sum(value) FROM schema1.counted GROUP BY k);
EOC
	$wrong++ if $equal ne 't';
}
ok($pgbench->finish, 'four clients wrote while the worker folded')
  or diag($bench_err);
is($wrong, 0, 'no snapshot had a key whose sum was wrong');
cmp_ok(worker($node, 1, 'fold_count'),
	'>', $count_before + 1, 'there were several folds meanwhile');
is( last_line("SELECT worker_spi_fold(1);\n$differences_k"),
	0, 'in the end each total is that of the ledger');
is($node->safe_psql('postgres', 'SELECT count(*) FROM ledger'),
	2000, 'all of the clients\' rows are in the ledger');
is(worker($node, 1, 'pid'),
	$pid, 'one process of the worker has done all this');

$node->stop;
done_testing();
