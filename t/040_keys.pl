# Key columns: the unique index on the totals of schemaN.counted says which of
# its columns make a counter of its own of each combination of values.  Shown
# here: which types and names can be keys, which indexes declare them and which
# do not, what a change of the columns does to a running worker, and that every
# key's total is exact, with one key and with 100,000, also while others write.
#
# It waits for worker_spi_fold(), and where the worker is to fold by itself,
# for its table.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# With auto_explain, the log can show plans.
my $explain = -e `pg_config --pkglibdir` =~ s/\n//r . '/auto_explain.so';
my $node = new_node('keys', <<EOC . ($explain ? <<EOC : ''), extra => [ '--encoding=UTF8', '--locale=C.UTF-8' ]);
worker_spi.total_workers = 1
autovacuum = off
EOC
shared_preload_libraries = 'worker_spi, auto_explain'
auto_explain.log_nested_statements = on
EOC

# The worker's own table, without keys, is there when the first fold is done.
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
my $pid = worker($node, 1, 'pid');

# Put a table with these columns, a list of their definitions, in place of the
# worker's, and declare those in $keys to be keys.  $more is run before the
# worker can see it.
sub keyed_table
{
	my ($columns, $keys, $more) = @_;
	my $index = defined $keys
	  ? "CREATE UNIQUE INDEX ON %t ($keys) NULLS NOT DISTINCT WHERE type = 'total';"
	  : '';

	new_table($node, 1, <<EOC . ($more // ''));
CREATE TABLE %t (
	type text NOT NULL DEFAULT 'delta',
	value bigint NOT NULL$columns);
$index
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

# ------------------------------------------------------------------------
# Types
# ------------------------------------------------------------------------
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
	[ 'bit varying', [qw('01' '1' '' '01')], 3 ],
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
if ($node->safe_psql('postgres', <<'EOC') eq 't')
DO $$
BEGIN
	CREATE COLLATION regress_nocase
		(provider = icu, locale = 'und-u-ks-level2', deterministic = false);
EXCEPTION WHEN feature_not_supported THEN
	NULL;
END
$$;
SELECT EXISTS (SELECT FROM pg_collation WHERE collname = 'regress_nocase');
EOC
{
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
	keyed_table(", k $type", 'k');
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

# Keys of some types can be sorted and not hashed.
keyed_table(', k bit varying NOT NULL', 'k', <<'EOC');
INSERT INTO %t VALUES ('total', 1, '01'), ('total', 2, '1'),
	('delta', 10, '1'), ('delta', 100, ''), ('delta', 1000, '1');
EOC
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
is( rows($node, 1, 'k, type, value'),
	"|total|100\n01|total|1\n1|total|1012",
	'a key that cannot be hashed has exact totals');

# What compares them need not say that joins may use it, and a range has no hash
# where its bounds have none.
$node->safe_psql('postgres', <<'EOC');
CREATE TYPE regress_number;
CREATE FUNCTION number_in(cstring) RETURNS regress_number LANGUAGE internal IMMUTABLE STRICT AS 'int4in';
CREATE FUNCTION number_out(regress_number) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'int4out';
CREATE TYPE regress_number (INPUT = number_in, OUTPUT = number_out, LIKE = integer);
CREATE FUNCTION number_lt(regress_number, regress_number) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'int4lt';
CREATE FUNCTION number_le(regress_number, regress_number) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'int4le';
CREATE FUNCTION number_eq(regress_number, regress_number) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'int4eq';
CREATE FUNCTION number_ge(regress_number, regress_number) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'int4ge';
CREATE FUNCTION number_gt(regress_number, regress_number) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'int4gt';
CREATE FUNCTION number_cmp(regress_number, regress_number) RETURNS integer LANGUAGE internal IMMUTABLE STRICT AS 'btint4cmp';
CREATE OPERATOR < (LEFTARG = regress_number, RIGHTARG = regress_number, FUNCTION = number_lt);
CREATE OPERATOR <= (LEFTARG = regress_number, RIGHTARG = regress_number, FUNCTION = number_le);
CREATE OPERATOR = (LEFTARG = regress_number, RIGHTARG = regress_number, FUNCTION = number_eq);
CREATE OPERATOR >= (LEFTARG = regress_number, RIGHTARG = regress_number, FUNCTION = number_ge);
CREATE OPERATOR > (LEFTARG = regress_number, RIGHTARG = regress_number, FUNCTION = number_gt);
CREATE OPERATOR CLASS regress_number_ops DEFAULT FOR TYPE regress_number USING btree AS
	OPERATOR 1 <, OPERATOR 2 <=, OPERATOR 3 =, OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 number_cmp;
CREATE TYPE regress_bits AS RANGE (subtype = bit varying);
EOC
foreach my $column ('regress_number', 'regress_number NOT NULL',
	'regress_bits', 'regress_bits NOT NULL')
{
	my @keys = $column =~ /bits/ ? ('[0,0]', '[1,1]', '[11,11]') : (7, 8, 9);

	keyed_table(", k $column", 'k', <<EOC);
INSERT INTO %t VALUES ('total', 1, '$keys[0]'), ('total', 2, '$keys[1]'),
	('delta', 10, '$keys[1]'), ('delta', 100, '$keys[2]'), ('delta', 1000, '$keys[1]');
EOC
	$node->psql('postgres', 'SELECT worker_spi_fold(1)');
	is( rows($node, 1, 'k, type, value'),
		"$keys[0]|total|1\n$keys[1]|total|1012\n$keys[2]|total|100",
		"a key of type $column has exact totals");
}

# Types that cannot be compared can be no keys.
keyed_table(', k json', undef, "INSERT INTO %t VALUES ('delta', 3, NULL);");
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
	qr/schema1\.counted/, 'a column that can be no key is refused');
wait_for_state($node, 1, 'backoff');
is(total($node, 1), 3, 'the delta in a table with such a column is kept');
is( last_line(
		'ALTER TABLE schema1.counted DROP COLUMN k; SELECT worker_spi_fold(1); TABLE schema1.counted'
	),
	'total|3',
	'without that column the same worker folds the delta');

# Contents that cannot be indexed: that key is stuck, and no other.
keyed_table(', k text', 'k');
$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema1.counted ALTER k SET STORAGE EXTERNAL;
INSERT INTO schema1.counted VALUES ('delta', 1, repeat('x', 10000)), ('delta', 2, 'y');
EOC
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '54000',
	qr/index row/, 'a key too long for an index is an error');
is( $node->safe_psql('postgres',
		'SELECT type, value FROM schema1.counted ORDER BY value'),
	"delta|1\ntotal|2",
	'its delta is kept, and the other key folded');
is( last_line(<<'EOC'), '2', 'once the long key is cut, all is folded');
UPDATE schema1.counted SET k = left(k, 5) WHERE length(k) > 5;
SELECT worker_spi_fold(1);
SELECT count(*) FROM schema1.counted WHERE type = 'total';
EOC

# ------------------------------------------------------------------------
# NULLs in some keys and not in others
# ------------------------------------------------------------------------
keyed_table(', a text, b int', 'a, b');
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

# ------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------
my @names = (
	'Page', 'select', 'a b', 'quo"te', '""', 'rows', 'k1', 'k3', 'total',
	'deltas', 'excluded', 'totals', 'sum', 'count', 'coalesce', 'max', '$1',
	'Type', 'VALUE', 'user', "it's", 'back\\slash', 'comma, ', '(', 'x' x 63);
my @quoted = map { s/"/""/gr } @names;
my $columns = join ', ', map { qq("$_") } @quoted;

keyed_table(join('', map { qq(, "$_" text) } @quoted), $columns);
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

keyed_table(
	join('', map { ", c$_ int" } 1 .. 32),
	join(', ', map { "c$_" } 1 .. 32),
	"INSERT INTO %t VALUES ('delta', 3), ('delta', 4);");
is( last_line('SELECT worker_spi_fold(1); SELECT type, value FROM schema1.counted'),
	'total|7', 'a table can have 32 key columns, which is as many as an index can');

# ------------------------------------------------------------------------
# Generated and dropped columns
# ------------------------------------------------------------------------
my $virtual =
  $node->pg_version >= 18
  ? ', twice int GENERATED ALWAYS AS (n * 2) VIRTUAL'
  : '';
keyed_table(<<EOC, 'page, n');
, gone1 int, page text, lower text GENERATED ALWAYS AS (lower(page)) STORED,
gone2 int, n int$virtual
EOC
is( $node->safe_psql('postgres', <<'EOC'),
ALTER TABLE schema1.counted DROP COLUMN gone1, DROP COLUMN gone2;
INSERT INTO schema1.counted (type, value, page, n)
	VALUES ('delta', 1, 'A', 1), ('delta', 2, 'a', 1), ('delta', 4, 'A', 1), ('delta', 8, 'A', 2);
SELECT worker_spi_fold(1);
SELECT page, n, lower, value FROM schema1.counted ORDER BY value;
EOC
	"t\na|1|a|2\nA|1|a|5\nA|2|a|8",
	'neither generated nor dropped columns have to be keys');

# ------------------------------------------------------------------------
# Columns that come and go while the worker runs
# ------------------------------------------------------------------------
keyed_table(', page text', 'page',
	"INSERT INTO %t VALUES ('delta', 1, 'a'), ('delta', 2, 'b');");
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
my $offset = -s $node->logfile;
$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema1.counted ADD day date;
INSERT INTO schema1.counted VALUES ('delta', 10, 'a', NULL),
	('delta', 20, 'b', '2024-02-29'), ('delta', 40, 'b', '2024-02-29');
EOC
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
	qr/\bday\b/, 'a fold after a column was added names the one that is no key');
wait_for_state($node, 1, 'backoff');
is(worker($node, 1, 'last_sqlstate'), '42P16', 'the view has the error');
ok($node->log_contains(qr/ERROR:  .*\bday\b/, $offset), 'and so has the log');
is(total($node, 1), 73, 'the count is right all the same');

$node->safe_psql('postgres', <<'EOC');
BEGIN;
DROP INDEX schema1.counted_page_idx;
CREATE UNIQUE INDEX ON schema1.counted (page, day) NULLS NOT DISTINCT WHERE type = 'total';
COMMIT;
EOC
wait_for_fold($node, 1);
is( $node->safe_psql(
		'postgres', 'SELECT page, day, value FROM schema1.counted ORDER BY value'
	),
	"b||2\na||11\nb|2024-02-29|60",
	'once it is declared, the worker folds by itself, with the new key');

# A dropped key column takes the index with it, and may leave two totals for
# one key: that is for the user to say what it means.
$node->safe_psql('postgres', <<'EOC');
INSERT INTO schema1.counted VALUES ('delta', 100, 'a', NULL);
ALTER TABLE schema1.counted DROP COLUMN day;
EOC
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
	qr/HINT:.*CREATE UNIQUE INDEX.*page/s,
	'with a key column its index goes, and what is left is not guessed');
is(total($node, 1), 173, 'nothing is lost');
is( $node->safe_psql('postgres', <<'EOC'),
UPDATE schema1.counted SET type = 'delta';
CREATE UNIQUE INDEX ON schema1.counted (page) NULLS NOT DISTINCT WHERE type = 'total';
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
CREATE UNIQUE INDEX ON schema1.counted (page) NULLS NOT DISTINCT WHERE type = 'total';
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
SELECT value, "Site" FROM schema1.counted ORDER BY 2;
SELECT count(*) FROM pg_index WHERE indrelid = 'schema1.counted'::regclass;
EOC
	"t\nt\n13|a\n175|\n1",
	'after its index was rebuilt the worker folds');

# REINDEX CONCURRENTLY has a second index beside the first until it is done;
# an open snapshot keeps it from being done.
{
	my $snapshot = $node->background_psql('postgres');
	$snapshot->query_safe(
		'BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1;');
	my $reindex = start_psql($node, 'postgres', 'reindex',
		'REINDEX TABLE CONCURRENTLY schema1.counted');
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
	ok((finish_psql($reindex))[2], 'the index is rebuilt');
	is( last_line(
			q(SELECT worker_spi_fold(1); SELECT value FROM schema1.counted WHERE "Site" = 'a')
		),
		14,
		'and serves the next fold');
}

# ------------------------------------------------------------------------
# Tables that have totals, and indexes that the user made
# ------------------------------------------------------------------------
keyed_table(', page text', 'page', <<'EOC');
INSERT INTO %t VALUES ('total', 100, 'a'), ('total', 200, NULL),
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
	[ 'fillfactor',   '(page, day) NULLS NOT DISTINCT WITH (fillfactor = 50)' ],
	[ 'the type among its columns', '(type, page, day) NULLS NOT DISTINCT' ],
	[
		'another with the same keys',
		"(page, day) NULLS NOT DISTINCT WHERE type = 'total'; CREATE UNIQUE INDEX ON schema1.counted (day, page) NULLS NOT DISTINCT"
	])
{
	my ($name, $definition) = @$test;
	keyed_table(', page text, day date', undef, <<EOC);
CREATE UNIQUE INDEX mine ON schema1.counted $definition WHERE type = 'total';
INSERT INTO schema1.counted VALUES ('delta', 1, 'a', NULL), ('delta', 2, 'a', NULL);
EOC
	is( $node->safe_psql('postgres', <<'EOC'),
SELECT worker_spi_fold(1);
INSERT INTO schema1.counted VALUES ('delta', 4, 'a', NULL);
SELECT worker_spi_fold(1);
TABLE schema1.counted;
EOC
		"t\nt\ntotal|7|a|",
		"an index declares keys: $name");
}

# NULLs need no care where there can be none.
keyed_table(', page text NOT NULL, day date NOT NULL', undef, <<'EOC');
CREATE UNIQUE INDEX ON %t (page, day) WHERE type = 'total';
INSERT INTO %t VALUES ('delta', 1, 'a', '2024-02-29'), ('delta', 2, 'a', '2024-02-29');
EOC
is( last_line('SELECT worker_spi_fold(1); TABLE schema1.counted'),
	'total|3|a|2024-02-29',
	'an index without NULLS NOT DISTINCT declares keys that are NOT NULL');

# Of no use, but in nobody's way.
keyed_table(', page text', 'page', <<'EOC');
CREATE INDEX ON schema1.counted (value) WHERE type = 'total';
CREATE INDEX ON schema1.counted (type, page);
CREATE UNIQUE INDEX other ON schema1.counted (value) WHERE type = 'other';
INSERT INTO schema1.counted VALUES ('delta', 1, 'a'), ('delta', 1, 'a');
EOC
is( last_line('SELECT worker_spi_fold(1); TABLE schema1.counted'),
	'total|2|a', 'other indexes declare nothing');

# Without an index, nothing is guessed; and the hint is the command.
keyed_table(', "Q" text, b int', undef,
	"INSERT INTO %t VALUES ('delta', 1, 'q', NULL), ('delta', 2, 'q', NULL);");
{
	my ($ret, $out, $err) =
	  $node->psql('postgres', '\set VERBOSITY verbose
SELECT worker_spi_fold(1)');
	like($err, qr/ERROR:  42P16: .*schema1\.counted/,
		'a table with further columns and no index is refused');
	my ($command) = $err =~ /(CREATE UNIQUE INDEX .*? WHERE [^;\n]*'total'\)?)/;
	$node->safe_psql('postgres', $command // die "no command: $err");
	is( last_line('SELECT worker_spi_fold(1); TABLE schema1.counted'),
		'total|3|q|', 'with the command of the hint it is folded');
}

# Refused, by the worker that runs and by launch.
$node->safe_psql('postgres',
	'CREATE COLLATION regress_other (provider = libc, locale = "C")');
foreach my $test (
	[ 'NULLS DISTINCT', '("Q", b)', qr/In dex/ ],
	[ 'a column less', '("Q") NULLS NOT DISTINCT', qr/\bb\b/ ],
	[ 'an expression', '("Q", (b + 0)) NULLS NOT DISTINCT', qr/In dex/ ],
	[ 'the value', '("Q", b, value) NULLS NOT DISTINCT', qr/In dex/ ],
	[
		'another collation',
		'("Q" COLLATE public.regress_other, b) NULLS NOT DISTINCT', qr/In dex/
	],
	[
		'another operator class',
		'("Q" text_pattern_ops, b) NULLS NOT DISTINCT', qr/In dex/
	],
	[
		'two that contradict each other',
		"(\"Q\", b) NULLS NOT DISTINCT WHERE type = 'total'; CREATE UNIQUE INDEX second ON schema1.counted (b) NULLS NOT DISTINCT",
		qr/(?=.*In dex)(?=.*second)/s
	])
{
	my ($name, $definition, $pattern) = @$test;
	keyed_table(', "Q" text, b int', undef, <<EOC);
CREATE UNIQUE INDEX "In dex" ON schema1.counted $definition WHERE type = 'total';
INSERT INTO schema1.counted VALUES ('delta', 1, NULL, NULL), ('delta', 2, NULL, NULL);
EOC
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
		$pattern, "an index declares no keys: $name");
	is( last_line(<<'EOC'),
DROP INDEX schema1."In dex";
DROP INDEX IF EXISTS schema1.second;
CREATE UNIQUE INDEX ON schema1.counted ("Q", b) NULLS NOT DISTINCT WHERE type = 'total';
SELECT worker_spi_fold(1);
TABLE schema1.counted
EOC
		'total|3||',
		"with another in its place the worker folds: $name");
}

$node->safe_psql('postgres', <<'EOC');
CREATE SCHEMA schema9;
CREATE TABLE schema9.counted (type text, value bigint, page text);
CREATE UNIQUE INDEX i9 ON schema9.counted (type) WHERE type = 'total';
EOC
error_is($node, 'postgres', 'SELECT worker_spi_launch(9)',
	'42P16', qr/\bpage\b/, 'launch raises the same error');
is($node->safe_psql('postgres', 'SELECT count(*) FROM worker_spi_workers'),
	1, 'and leaves no worker behind');

# ------------------------------------------------------------------------
# What the log and the view say
# ------------------------------------------------------------------------
keyed_table(', page text, day date', 'page, day');
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

# ------------------------------------------------------------------------
# One key, a thousand, a hundred thousand: all in one cycle each
# ------------------------------------------------------------------------
foreach my $keys (1, 1000, 100_000)
{
	my $deltas = 2 * $keys + 10;

	keyed_table(', k int', 'k');
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

# Totals with NULL in a key are found as well where the others are looked up.
keyed_table(', a text, b int', 'a, b', <<'EOC');
INSERT INTO %t SELECT 'total', 1, nullif('a' || n / 100, 'a7'), nullif(n % 100, 7)
	FROM generate_series(1, 20000) AS n;
CREATE TABLE few AS SELECT 'delta' AS type, 10 AS value, a, b FROM (VALUES
	(NULL, NULL), (NULL, 5), ('a5', NULL), ('a5', 5), ('new', NULL), (NULL, 1000)) AS k (a, b);
EOC
my $rollbacks = "SELECT xact_rollback FROM pg_stat_database WHERE datname = 'postgres'";
wait_for_nap($node, 1);
my $rolled_back = $node->safe_psql('postgres', $rollbacks);
is( $node->safe_psql('postgres', <<'EOC'),
SELECT worker_spi_fold(1);
INSERT INTO schema1.counted TABLE few;
INSERT INTO schema1.counted TABLE few;
SELECT worker_spi_fold(1);
SELECT a, b, value FROM schema1.counted WHERE value > 1 ORDER BY a, b;
EOC
	"t\nt\na5|5|21\na5||21\nnew||20\n|5|21\n|1000|20\n||21",
	'a few deltas with NULL keys among 20,000 totals are folded right');

wait_for_nap($node, 1);
is($node->safe_psql('postgres', $rollbacks), $rolled_back, 'at the first try');

# A large backlog takes several transactions, and most keys are met by more than
# one of them.  A trigger of the owner's notes them.
keyed_table(', k int', 'k', <<'EOC');
CREATE TABLE transactions (xid xid8);
CREATE FUNCTION note_transaction() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN INSERT INTO public.transactions VALUES (pg_current_xact_id()); RETURN NULL; END';
CREATE TRIGGER note AFTER DELETE ON %t EXECUTE FUNCTION note_transaction();
ALTER TABLE %t ENABLE ALWAYS TRIGGER note;
EOC
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
my $count_before = worker($node, 1, 'fold_count');
is( last_line(<<EOC),
CREATE TEMP TABLE ledger AS
	SELECT n % 100 AS value, (n * n) % 997 AS k FROM generate_series(1::bigint, 500000) AS n;
INSERT INTO schema1.counted SELECT 'delta', * FROM ledger;
SELECT worker_spi_fold(1);
$differences_k
EOC
	0,
	'keys that are met by several transactions of a cycle have exact totals');
is(worker($node, 1, 'fold_count'), $count_before + 1, 'of one cycle');
cmp_ok(
	$node->safe_psql('postgres',
		'SELECT count(DISTINCT xid) FROM transactions'),
	'>', 1, 'that took several transactions');

# ------------------------------------------------------------------------
# An index on the deltas
# ------------------------------------------------------------------------
# Its order is not that of the table.  Statistics of a table without deltas let
# the server think that reading the index is the cheapest way to find them.
keyed_table(', k int NOT NULL', 'k', <<'EOC');
CREATE INDEX ON %t (k) WHERE type <> 'total';
INSERT INTO %t SELECT 'total', 1, k FROM generate_series(1, 5000) AS k;
ANALYZE %t;
INSERT INTO %t SELECT 'delta', 1, k FROM generate_series(5000, 1, -1) AS k;
EOC
$node->safe_psql('postgres', 'SELECT worker_spi_fold(1)');
is( $node->safe_psql('postgres', 'SELECT count(*), sum(value) FROM schema1.counted'),
	'5000|10000', 'an index on the deltas hides none from a fold');

# ------------------------------------------------------------------------
# Plans
# ------------------------------------------------------------------------
# The totals of many keys are all read, and joined with the deltas by a hash,
# also where keys may be NULL; to look each of them up, or to sort them by a
# collation, would take several times as long.  The statistics are of another
# time: of a table that was empty, or had nothing but totals, or nothing but
# deltas.
my %contents = (
	empty => '',
	totals => q(INSERT INTO %t SELECT 'total', 1, 'key ' || k FROM generate_series(1, 2000) AS k;),
	deltas => q(INSERT INTO %t SELECT 'delta', 1, 'key ' || k FROM generate_series(1, 2000) AS k;));
SKIP:
{
	skip 'no auto_explain', 4 * keys %contents unless $explain;

	reload_settings($node, 'auto_explain.log_min_duration = 0', 1);
	foreach my $case (map { ("$_, NOT NULL", "$_, ") } sort keys %contents)
	{
		my ($state, $constraint) = split /, /, $case, 2;
		keyed_table(", k text $constraint", 'k', $contents{$state});
		my $offset = -s $node->logfile;
		is( last_line(<<'EOC'),
VACUUM ANALYZE schema1.counted;
INSERT INTO schema1.counted SELECT 'delta', 1, 'key ' || k % 2000 FROM generate_series(1, 5000) AS k;
SELECT worker_spi_fold(1);
SELECT sum(value) IN (5000, 7000) FROM schema1.counted;
EOC
			't',
			"$case: many keys are folded");
		my $log = slurp_file($node->logfile, $offset);
		my @plans = $log =~ /duration: [^\n]*plan:\n(\tQuery Text: WITH sums.*?)\n(?!\t)/gs;
		ok(@plans == 1
			  && $plans[0] =~ /Hash Full Join/
			  && $plans[0] =~ /HashAggregate/
			  && $plans[0] =~ /Bitmap Heap Scan/
			  && $plans[0] !~ /Merge Join|GroupAggregate|Group Key.*Sort Key|Index (Only )?Scan using/s
			  && $plans[0] =~ /Nested Loop(?!.*Nested Loop).*Tid Scan/s,
			"$case: by a hash, and each total by its ctid")
		  or diag(join "\n", @plans);
	}
	reload_settings($node, 'auto_explain.log_min_duration = -1', 1);
}

# ------------------------------------------------------------------------
# Others write while folds run
# ------------------------------------------------------------------------
keyed_table(', k int', 'k', 'CREATE TABLE ledger (value bigint, k int);');
my $insert = <<'EOC';
\set v random(-1000, 1000)
\set k random(1, 50)
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', :v, nullif(:k, 50));
INSERT INTO ledger VALUES (:v, nullif(:k, 50));
END;
EOC

# One snapshot sees both tables.
my $fold_and_compare = <<'EOC';
SELECT worker_spi_fold(1);
SELECT 1 / (NOT EXISTS (
	SELECT k, sum(value) FROM schema1.counted GROUP BY k
	EXCEPT SELECT k, sum(value) FROM ledger GROUP BY k)
AND NOT EXISTS (
	SELECT k, sum(value) FROM ledger GROUP BY k
	EXCEPT SELECT k, sum(value) FROM schema1.counted GROUP BY k))::int;
EOC
$count_before = worker($node, 1, 'fold_count');
my $pgbench = start_pgbench($node, [ '-c', 4, '-t', 500 ],
	[ $insert, 9 ], [ $fold_and_compare, 1 ]);
my ($bench_out, $bench_err, $success) = finish_psql($pgbench);
ok($success,
	'while four clients write and fold, no snapshot has a key whose sum is wrong')
  or diag($bench_err);
cmp_ok(worker($node, 1, 'fold_count'),
	'>', $count_before + 1, 'there were several folds meanwhile');
is( last_line("SELECT worker_spi_fold(1);\n$differences_k"),
	0, 'in the end each total is that of the ledger');
my ($inserts) = $bench_out =~ /SQL script 1:.*?(\d+) transactions/s;
is($node->safe_psql('postgres', 'SELECT count(*) FROM ledger'),
	$inserts, 'all of the clients\' rows are in the ledger');
is(worker($node, 1, 'pid'),
	$pid, 'one process of the worker has done all this');

$node->stop;
done_testing();
