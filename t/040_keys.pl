# Key columns: the unique index of the totals of worker 1 says which columns of
# counted make a counter of its own of each combination of values.  Shown here:
# which types and names can be keys, which indexes declare them, what a change of
# the columns does to a running worker, that every key's total is exact, with one
# key and with 100,000, also while others write, and that a fold finds totals by
# their index and deltas by their place, whatever the statistics say.
#
# It waits for worker_spi_fold(), and where the worker is to fold by itself,
# for its tables.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# With auto_explain, the log can show plans, and the settings that made them.
my $explain = -e `pg_config --pkglibdir` =~ s/\n//r . '/auto_explain.so';
my $node = new_node('keys', <<EOC . ($explain ? <<EOC : ''), extra => [ '--encoding=UTF8', '--locale=C.UTF-8' ]);
worker_spi.total_workers = 1
autovacuum = off
EOC
shared_preload_libraries = 'worker_spi, auto_explain'
auto_explain.log_analyze = on
auto_explain.log_timing = off
auto_explain.log_buffers = on
auto_explain.log_settings = on
EOC

# The worker's own tables, without keys, are there when the first fold is done.
folds($node, 1, 'the worker answers');
my $pid = worker($node, 1, 'pid');

# Put tables with these columns, a list of their definitions, in place of the
# worker's; $key is what declares the keys, and $more is run before the worker
# can see them.
sub keyed_table
{
	my ($columns, $key, $more) = @_;

	new_table(
		$node, 1,
		"CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL$columns)",
		key => $key,
		total => $more);
	return;
}

# Run one psql session, in which each fold goes through, and return the last
# line of what it prints.
sub last_line
{
	my ($sql) = @_;
	my @lines = split /\n/, $node->safe_psql('postgres', $sql);
	my $last = pop @lines;
	my $folds = () = $sql =~ /worker_spi_fold/g;

	return 'a fold did not go through' if $folds != grep { $_ eq 't' } @lines;
	return $last;
}

# How many rows of the ledger, which has the same columns as the table, differ
# from the totals, plus the number of deltas that are left.
my $differences = <<'EOC';
SELECT (SELECT count(*) FROM (
	(TABLE expected EXCEPT ALL
	 SELECT * FROM totals) UNION ALL
	(SELECT * FROM totals EXCEPT ALL
	 TABLE expected)) AS d)
	+ (SELECT count(*) FROM schema1.counted) - (SELECT count(*) FROM schema1.total);
EOC

# The same for a table with one key column k, and a ledger of keys and values.
my $differences_k = <<"EOC";
CREATE TEMP TABLE expected AS SELECT k, sum(value) FROM ledger GROUP BY k;
CREATE TEMP TABLE totals AS SELECT k, value FROM schema1.total;
$differences
EOC

# ------------------------------------------------------------------------
# Types
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOC');
CREATE TYPE regress_enum AS ENUM ('low', 'high');
CREATE TYPE regress_pair AS (a int, b text);
CREATE TYPE regress_nested AS (p regress_pair, e regress_enum[]);
CREATE DOMAIN regress_domain AS text CHECK (VALUE <> 'x');
CREATE DOMAIN regress_on_domain AS regress_domain CHECK (VALUE <> 'y');
CREATE DOMAIN regress_on_enum AS regress_enum;
CREATE DOMAIN regress_on_array AS int[];
CREATE DOMAIN regress_on_pair AS regress_pair;
CREATE TYPE regress_text_range AS RANGE (subtype = text, collation = "C");
EOC

# The values, as literals, and how many different keys they are.
my @types = (
	[ 'text', [qw('a' 'A' 'a' '')], 3 ],
	[ 'text COLLATE "C"', [qw('a' 'A' 'a' '')], 3 ],
	[ 'varchar(3)', [qw('a' 'abc' 'a')], 2 ],
	[ 'character(3)', [ "'a'", "'a  '" ], 1 ],
	[ '"char"', [qw('a' 'b' 'a')], 2 ],
	[ 'name', [qw('a' 'b' 'a')], 2 ],
	[ 'smallint', [qw(1 -1 1)], 2 ],
	[ 'integer', [qw(1 -1 1 2147483647)], 3 ],
	[ 'bigint', [qw(1 9223372036854775807 1)], 2 ],
	[ 'numeric', [qw(1.0 1.00 'NaN' 'NaN')], 2 ],
	[ 'real', [qw('-0' 0 'NaN')], 2 ],
	[ 'double precision', [qw(0 '-0' 'NaN' 'Infinity' 'NaN')], 3 ],
	[ 'money', [qw(1 2 1)], 2 ],
	[ 'boolean', [qw(true false true)], 2 ],
	[ 'date', [qw('2024-02-29' '2024-03-01' 'infinity')], 3 ],
	[ 'timestamp', [ "'2024-01-01 00:00'", "'2024-01-01'", "'infinity'" ], 2 ],
	[
		'timestamptz',
		[ "'2024-01-01 00:00+00'", "'2024-01-01 02:00+02'", "'-infinity'" ], 2
	],
	[ 'time', [qw('00:00' '24:00' '00:00:00')], 2 ],
	[ 'timetz', [qw('10:00+00' '12:00+02' '10:00+00')], 2 ],
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
	[ 'bit(2)', [qw('01' '10' '01')], 2 ],
	[ 'bit varying', [qw('01' '1' '' '01')], 3 ],
	[ 'inet', [qw('10.0.0.1' '10.0.0.1/32' '10.0.0.1/8' '::1')], 3 ],
	[ 'cidr', [qw('10.0.0.0/8' '10/8' '::1')], 2 ],
	[ 'macaddr', [qw('08:00:2b:01:02:03' '08-00-2B-01-02-03')], 1 ],
	[ 'oid', [qw(1 2 1)], 2 ],
	[ 'pg_lsn', [qw('0/1' '0/01' '1/0')], 2 ],
	[ 'tsvector', [ "'a b'", "'b a'", "''" ], 2 ],
	[ 'regress_enum', [qw('low' 'high' 'low')], 2 ],
	[ 'regress_domain', [qw('a' 'b' 'a')], 2 ],
	[ 'regress_on_domain', [qw('a' 'b' 'a')], 2 ],
	[ 'regress_on_enum', [qw('low' 'high' 'low')], 2 ],
	[ 'regress_on_array', [ "'{1}'", "'[2:2]={1}'", "'{1}'" ], 2 ],
	[ 'regress_on_pair', [ "'(1,a)'", "'(1,)'", "'(1,a)'" ], 2 ],
	[ 'integer[]', [ "'{}'", "'{1,NULL}'", "'{1,2}'", "'{1,NULL}'" ], 3 ],
	[ 'regress_enum[]', [ "'{low}'", "'{high,low}'", "'{low}'" ], 2 ],
	[ 'bit varying[]', [ "'{01}'", "'{1}'", "'{01}'" ], 2 ],
	[
		'jsonb',
		[ q('{"a":1,"b":[]}'), q('{"b": [], "a": 1.0}'), q('null'), q('{}') ],
		3
	],
	[ 'regress_pair', [ "'(1,a)'", "'(1,)'", "'(1,)'", "'(,)'" ], 3 ],
	[ 'regress_nested', [ q('("(1,a)",{low})'), q('(,)'), q('("(1,a)",{low})') ], 2 ],
	[ 'regress_pair[]', [ q('{"(1,a)"}'), q('{"(1,)"}'), q('{"(1,a)"}') ], 2 ],
	[ 'int4range', [ "'[1,3)'", "'[1,2]'", "'empty'" ], 2 ],
	[ 'regress_text_range', [ "'[a,b)'", "'[a,c)'", "'[a,b)'" ], 2 ],
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
	$node->safe_psql('postgres', <<'EOC');
CREATE DOMAIN regress_nocase_domain AS text COLLATE public.regress_nocase;
CREATE TYPE regress_nocase_pair AS (a text COLLATE public.regress_nocase, b int);
EOC
	push @types,
	  [ 'text COLLATE public.regress_nocase', [qw('Ab' 'aB' 'ab' 'b')], 2 ],
	  [ 'varchar(3) COLLATE public.regress_nocase', [qw('Ab' 'aB' 'ab' 'b')], 2 ],
	  [ 'text[] COLLATE public.regress_nocase', [qw('{Ab}' '{aB}' '{b}')], 2 ],
	  [ 'regress_nocase_domain', [qw('Ab' 'aB' 'ab' 'b')], 2 ],
	  [ 'regress_nocase_pair', [ "'(Ab,1)'", "'(aB,1)'", "'(b,1)'" ], 2 ];
}
if ($node->safe_psql('postgres',
		"SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'citext')"
	) eq 't')
{
	$node->safe_psql('postgres', <<'EOC');
CREATE EXTENSION citext;
CREATE DOMAIN regress_email AS citext CHECK (VALUE <> '');
EOC
	push @types,
	  [ 'public.citext', [qw('Ab' 'aB' 'ab' 'b')], 2 ],
	  [ 'public.citext[]', [qw('{Ab}' '{aB}' '{b}')], 2 ],
	  [ 'regress_email', [qw('Ab' 'aB' 'ab' 'b')], 2 ];
}

foreach my $test (@types)
{
	my ($type, $literals, $keys) = @$test;
	my $n = 0;
	my $values = join ', ', map { '(' . 10**$n++ . ", $_)" } @$literals;

	# NULL is one more key, and the second fold meets all the keys again.
	keyed_table(", k $type", 'UNIQUE NULLS NOT DISTINCT (k), CONSTRAINT small CHECK (value < 1000000)');
	my $result = $node->safe_psql('postgres', <<EOC);
CREATE TABLE ledger (value bigint, k $type);
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

	# One of the keys gets stuck; the others go through with it and after it.
	$node->safe_psql('postgres', <<EOC);
INSERT INTO schema1.counted VALUES ('delta', 2000000, $literals->[0]);
INSERT INTO schema1.counted SELECT 'delta', * FROM ledger;
EOC
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '23514',
		qr/"small"/, "one of type $type can be stuck");
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted SELECT 'delta', * FROM ledger");
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '23514',
		qr/"small"/, 'and stays so');
	is( $node->safe_psql('postgres', <<EOC),
SELECT count(*) FROM ONLY schema1.counted;
SELECT count(*) FROM schema1.stuck;
INSERT INTO schema1.counted VALUES ('delta', -2000000, $literals->[0]);
SELECT worker_spi_fold(1);
UPDATE ledger SET value = 3 * value;
$differences_k
DROP TABLE ledger;
EOC
		"0\n1\nt\n0", 'until another delta of it makes it fit');
}

# Equal keys need not be identical: the total has the one that came first.
keyed_table(', k numeric NOT NULL', 'PRIMARY KEY (k)');
is( $node->safe_psql('postgres', <<'EOC'),
INSERT INTO schema1.counted VALUES ('delta', 1, 1.0);
SELECT worker_spi_fold(1);
INSERT INTO schema1.counted VALUES ('delta', 10, 1.00), ('delta', 100, 1);
SELECT worker_spi_fold(1);
TABLE schema1.counted;
EOC
	"t\nt\ntotal|111|1.0",
	'keys that are equal and not identical have one total');

# Keys of some types can be sorted and not hashed.
keyed_table(', k bit varying NOT NULL', 'PRIMARY KEY (k)', <<'EOC');
INSERT INTO %s.total VALUES ('total', 1, '01'), ('total', 2, '1');
INSERT INTO %t VALUES ('delta', 10, '1'), ('delta', 100, ''), ('delta', 1000, '1');
EOC
folds($node, 1, 'keys that cannot be hashed are folded');
is( rows($node, 1, 'k, type, value'),
	"|total|100\n01|total|1\n1|total|1012",
	'and have exact totals');

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
CREATE DOMAIN regress_bits_domain AS regress_bits;
EOC
foreach my $column ('regress_number', 'regress_number NOT NULL',
	'regress_bits', 'regress_bits NOT NULL', 'regress_bits_domain')
{
	my @keys = $column =~ /bits/ ? ('[0,0]', '[1,1]', '[11,11]') : (7, 8, 9);

	keyed_table(", k $column", 'UNIQUE NULLS NOT DISTINCT (k)', <<EOC);
INSERT INTO %s.total VALUES ('total', 1, '$keys[0]'), ('total', 2, '$keys[1]');
INSERT INTO %t VALUES ('delta', 10, '$keys[1]'), ('delta', 100, '$keys[2]'), ('delta', 1000, '$keys[1]');
EOC
	folds($node, 1, "a key of type $column is folded");
	is( rows($node, 1, 'k, type, value'),
		"$keys[0]|total|1\n$keys[1]|total|1012\n$keys[2]|total|100",
		'and has exact totals');
}

# Types that cannot be compared can be no keys, even if an index takes them.
$node->safe_psql('postgres', 'CREATE TYPE regress_with_json AS (a int, j json)');
foreach my $type ('json[]', 'regress_with_json', 'regress_with_json[]', 'xml[]')
{
	keyed_table(", k $type", 'UNIQUE NULLS NOT DISTINCT (k)',
		"INSERT INTO %t VALUES ('delta', 3, NULL)");
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
		qr/index "total_k_key".*\bcannot be compared/s, "a key of type $type is refused");
	is(total($node, 1), 3, 'and the delta kept');
}
keyed_table(', k json', 'UNIQUE (type)', "INSERT INTO %t VALUES ('delta', 3, NULL)");
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
	qr/column "k" of table "postgres\.schema1\.counted"/,
	'a column that can be no key is refused');
wait_for_state($node, 1, 'backoff');
is(total($node, 1), 3, 'and the delta kept');
is( last_line(
		'ALTER TABLE schema1.counted DROP COLUMN k; SELECT worker_spi_fold(1); TABLE schema1.counted'
	),
	'total|3',
	'without that column the same worker folds it');

# Contents that cannot be indexed: that key is stuck, and no other.
keyed_table(', k text NOT NULL', 'PRIMARY KEY (k)');
$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema1.counted ALTER k SET STORAGE EXTERNAL;
INSERT INTO schema1.counted SELECT 'delta', 1, string_agg(md5(n::text), '') FROM generate_series(1, 300) AS n;
INSERT INTO schema1.counted VALUES ('delta', 2, 'y');
EOC
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '54000',
	qr/index row/, 'a key too long for an index is an error');
is( $node->safe_psql('postgres',
		'SELECT tableoid::regclass, value FROM schema1.counted ORDER BY value'),
	"schema1.stuck|1\nschema1.total|2",
	'it is stuck, and the other key folded');
is( last_line(<<'EOC'), '2', 'once the long key is cut, all is folded');
UPDATE schema1.stuck SET k = left(k, 5) WHERE length(k) > 5;
SELECT worker_spi_fold(1);
SELECT count(*) FROM schema1.total;
EOC

# ------------------------------------------------------------------------
# NULLs in some keys and not in others
# ------------------------------------------------------------------------
keyed_table(', a text, b int, c date NOT NULL DEFAULT now()', 'UNIQUE NULLS NOT DISTINCT (a, b, c)');
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
	'Page', 'select', 'a b', 'quo"te', '""', 'rows', 'gone', 'known', 'total',
	'sums', 'excluded', 'either', 'written', 'count', 'rest', 'max', '$1',
	'Type', 'VALUE', 'user', "it's", 'back\\slash', 'comma, ', '(', '%1$s',
	'Since', 'stuck', 'counted', 'moved', 'parts', 'x' x 63);
my @quoted = map { s/"/""/gr } @names;
my $columns = join ', ', map { qq("$_") } @quoted;

{
	# new_table() replaces %s and %t, which these names are not to have.
	my $definitions = join '', map { qq(, "$_" text) } @quoted;
	(my $sql = <<EOC) =~ s/%1\$s/%1\$s/;
BEGIN;
DROP TABLE schema1.stuck, schema1.total, schema1.counted;
CREATE TABLE schema1.counted (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL$definitions);
CREATE TABLE schema1.total (UNIQUE NULLS NOT DISTINCT ($columns)) INHERITS (schema1.counted);
CREATE TABLE schema1.stuck (sqlstate text, reason text, since timestamptz) INHERITS (schema1.counted);
COMMIT;
EOC
	$node->safe_psql('postgres', $sql);
}

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
CREATE TEMP TABLE totals AS SELECT $columns, value FROM schema1.total;
$differences
EOC
	0,
	'key columns with any name have exact totals');
is($node->safe_psql('postgres', 'SELECT count(*) FROM schema1.counted'),
	@names + 1, 'every one of these columns tells keys apart');

# The other ways to fold have names of their own.
$node->safe_psql('postgres', <<EOC);
ALTER TABLE schema1.total ADD CONSTRAINT small CHECK (value < 1000000);
INSERT INTO schema1.counted (value, "Page") VALUES (1, 'good'), (1000000, 'bad');
EOC
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '23514', qr/"small"/,
	'one with such names can be stuck');
is( last_line(<<'EOC'), 'bad|999999|good|3', 'and get through');
INSERT INTO schema1.counted (value, "Page") VALUES (2, 'good'), (-1, 'bad');
SELECT worker_spi_fold(1);
SELECT string_agg(concat_ws('|', "Page", value), '|' ORDER BY "Page") FROM schema1.total WHERE "Page" ~ 'good|bad';
EOC

keyed_table(
	join('', map { ", c$_ int" } 1 .. 32),
	'UNIQUE NULLS NOT DISTINCT (' . join(', ', map { "c$_" } 1 .. 32) . ')',
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
keyed_table(<<EOC, 'UNIQUE NULLS NOT DISTINCT (page, n)');
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
keyed_table(', page text', 'UNIQUE NULLS NOT DISTINCT (page)',
	"INSERT INTO %t VALUES ('delta', 1, 'a'), ('delta', 2, 'b');");
folds($node, 1, 'a table with one key is folded');
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

$node->safe_psql('postgres',
	'ALTER TABLE schema1.total DROP CONSTRAINT total_page_key, ADD UNIQUE NULLS NOT DISTINCT (page, day)'
);
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
error_is(
	$node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
	qr/HINT:.*ALTER TABLE schema1\.total ADD UNIQUE NULLS NOT DISTINCT \(page\)/s,
	'with a key column its index goes, and what is left is not guessed');
is(total($node, 1), 173, 'nothing is lost');
is( $node->safe_psql('postgres', <<'EOC'),
BEGIN;
WITH moved AS (DELETE FROM schema1.total RETURNING value, page)
	INSERT INTO schema1.counted (value, page) TABLE moved;
ALTER TABLE schema1.total ADD UNIQUE NULLS NOT DISTINCT (page);
COMMIT;
SELECT worker_spi_fold(1);
SELECT type, page, value FROM schema1.counted ORDER BY page;
EOC
	"t\ntotal|a|111\ntotal|b|62",
	'made into deltas, the totals are merged by the next fold');

# To a table without keys, and back.
is( $node->safe_psql('postgres', <<'EOC'),
BEGIN;
WITH moved AS (DELETE FROM schema1.total RETURNING value)
	INSERT INTO schema1.counted (value) TABLE moved;
ALTER TABLE schema1.counted DROP COLUMN page;
ALTER TABLE schema1.total ADD PRIMARY KEY (type);
COMMIT;
SELECT worker_spi_fold(1);
TABLE schema1.counted;
BEGIN;
ALTER TABLE schema1.counted ADD page text;
ALTER TABLE schema1.total DROP CONSTRAINT total_pkey, ADD UNIQUE NULLS NOT DISTINCT (page);
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
is( last_line(
		q(SELECT worker_spi_fold(1); SELECT string_agg(value || coalesce("Site", '-'), ' ' ORDER BY value) FROM schema1.counted)
	),
	'11a 175-',
	'a renamed and retyped key column goes on as it was');

# Maintenance of the index while the worker runs.
is( $node->safe_psql('postgres', <<'EOC'),
REINDEX TABLE CONCURRENTLY schema1.total;
INSERT INTO schema1.counted VALUES ('delta', 1, 'a');
SELECT worker_spi_fold(1);
REINDEX TABLE schema1.total;
INSERT INTO schema1.counted VALUES ('delta', 1, 'a');
SELECT worker_spi_fold(1);
SELECT value, "Site" FROM schema1.counted ORDER BY 2;
SELECT count(*) FROM pg_index WHERE indrelid = 'schema1.total'::regclass;
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
		'REINDEX TABLE CONCURRENTLY schema1.total');
	$node->poll_query_until('postgres',
		"SELECT EXISTS (SELECT FROM pg_index WHERE indrelid = 'schema1.total'::regclass AND NOT indisvalid)"
	) or die 'REINDEX CONCURRENTLY has made no index';
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted VALUES ('delta', 1, 'a'), ('delta', 1, 'b')");
	folds($node, 1, 'the worker folds while its index is being rebuilt');
	$snapshot->query_safe('COMMIT');
	$snapshot->quit;
	ok((finish_psql($reindex))[2], 'the index is rebuilt');
	is( last_line(
			q(INSERT INTO schema1.counted VALUES ('delta', 1, 'a'); SELECT worker_spi_fold(1); SELECT value FROM schema1.counted WHERE "Site" = 'a')
		),
		15,
		'and serves the next fold');
}

# Another index in its place, without a moment when there is none.
is( last_line(<<'EOC'), '16', 'the index can be replaced while the worker runs');
CREATE UNIQUE INDEX replacement ON schema1.total ("Site") NULLS NOT DISTINCT WITH (fillfactor = 70);
BEGIN;
ALTER TABLE schema1.total DROP CONSTRAINT total_page_key;
INSERT INTO schema1.counted VALUES ('delta', 1, 'a');
COMMIT;
SELECT worker_spi_fold(1);
SELECT value FROM schema1.total WHERE "Site" = 'a';
EOC

# ------------------------------------------------------------------------
# Indexes that declare keys
# ------------------------------------------------------------------------
keyed_table(', page text', 'UNIQUE NULLS NOT DISTINCT (page)', <<'EOC');
INSERT INTO %s.total VALUES ('total', 100, 'a'), ('total', 200, NULL), ('of old', 300, 'c');
INSERT INTO %t VALUES ('delta', 1, 'a'), ('delta', 2, NULL), ('delta', 4, 'b'), ('total', 8, 'c');
EOC
is( $node->safe_psql('postgres', <<'EOC'),
SELECT worker_spi_fold(1);
SELECT type, value, page FROM schema1.counted ORDER BY page;
EOC
	"t\ntotal|101|a\ntotal|4|b\nof old|308|c\ntotal|202|",
	'totals that were there before are gone on with, whatever their type');

# Each as the only index but those that declare nothing.
foreach my $test (
	[ 'a constraint', '', 'ALTER TABLE %s.total ADD UNIQUE NULLS NOT DISTINCT (page, day)' ],
	[ 'any name', '', 'CREATE UNIQUE INDEX "my Index" ON %s.total (page, day) NULLS NOT DISTINCT' ],
	[ 'other order', '', 'CREATE UNIQUE INDEX ON %s.total (day, page) NULLS NOT DISTINCT' ],
	[ 'DESC', '', 'CREATE UNIQUE INDEX ON %s.total (page DESC NULLS LAST, day DESC) NULLS NOT DISTINCT' ],
	[ 'INCLUDE', '', 'CREATE UNIQUE INDEX ON %s.total (page, day) INCLUDE (value, type) NULLS NOT DISTINCT' ],
	[ 'fillfactor', '', 'CREATE UNIQUE INDEX ON %s.total (page, day) NULLS NOT DISTINCT WITH (fillfactor = 50)' ],
	[ 'a primary key', ' NOT NULL', 'ALTER TABLE %s.total ADD PRIMARY KEY (page, day)' ],
	[ 'a primary key with INCLUDE', ' NOT NULL', 'ALTER TABLE %s.total ADD PRIMARY KEY (page, day) INCLUDE (value)' ],
	[ 'NULLs that cannot be', ' NOT NULL', 'CREATE UNIQUE INDEX ON %s.total (page, day)' ],
	[
		'a primary key beside the same',
		' NOT NULL',
		'ALTER TABLE %s.total ADD PRIMARY KEY (page, day); CREATE UNIQUE INDEX ON %s.total (day, page)'
	],
	[
		'a primary key beside a part of it',
		' NOT NULL',
		'ALTER TABLE %s.total ADD PRIMARY KEY (page, day); CREATE UNIQUE INDEX ON %s.total (day)'
	],
	[
		'a primary key that is no key column',
		' NOT NULL',
		'ALTER TABLE %s.total ADD id bigserial PRIMARY KEY, ADD UNIQUE (page, day)'
	],
	[
		'a primary key that is an identity',
		'',
		'ALTER TABLE %s.total ADD id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, ADD UNIQUE NULLS NOT DISTINCT (page, day)'
	],
	[
		'beside others that declare nothing',
		'',
		"ALTER TABLE %s.total ADD note text UNIQUE, ADD UNIQUE NULLS NOT DISTINCT (page, day), ADD UNIQUE (page, note);
		 CREATE INDEX ON %s.total (value); CREATE INDEX ON %s.total USING hash (page); CREATE INDEX ON %s.total (day, page);
		 CREATE UNIQUE INDEX ON %s.total (page) WHERE page = 'nobody'; CREATE UNIQUE INDEX ON %s.total (lower(page), day);
		 CREATE UNIQUE INDEX ON %t (value, page) NULLS NOT DISTINCT;
		 ALTER TABLE %s.total ADD EXCLUDE (type WITH =) WHERE (type = 'other')"
	])
{
	my ($name, $constraint, $sql) = @$test;
	my ($null, $shown) =
	  $constraint ? ("'2024-02-29'", '2024-02-29') : ('NULL', '');

	keyed_table(", page text$constraint, day date$constraint", '', $sql);
	is( last_line(<<EOC),
INSERT INTO schema1.counted VALUES ('delta', 1, 'a', $null), ('delta', 2, 'a', $null);
SELECT worker_spi_fold(1);
INSERT INTO schema1.counted VALUES ('delta', 4, 'a', $null);
SELECT worker_spi_fold(1);
TABLE schema1.counted;
EOC
		"total|7|a|$shown",
		"an index declares keys: $name");
}

# Columns of the totals' own: a fold leaves them alone.
keyed_table(
	', page text NOT NULL', '', <<'EOC');
ALTER TABLE %s.total ADD id bigserial PRIMARY KEY, ADD UNIQUE (page), ADD note text,
	ADD made timestamptz NOT NULL DEFAULT '2024-02-29', ADD number int NOT NULL DEFAULT 7,
	ADD twice bigint GENERATED ALWAYS AS (value * 2) STORED;
INSERT INTO %s.total (type, value, page, id, note, number) VALUES ('total', 1, 'a', -1, 'mine', 8);
EOC
is( $node->safe_psql('postgres', <<'EOC'),
INSERT INTO schema1.counted VALUES ('delta', 10, 'a'), ('delta', 20, 'b');
SELECT worker_spi_fold(1);
SELECT page, value, note, made::date, number, twice, id > 0 FROM schema1.total ORDER BY page;
EOC
	"t\na|11|mine|2024-02-29|8|22|f\nb|20||2024-02-29|7|40|t",
	'columns of the totals\' own keep what they have, or get their default');

# ------------------------------------------------------------------------
# Several unique indexes on the same columns
# ------------------------------------------------------------------------
# What another of them refuses, or takes for equal, is no total of the key.
my @others = (
	[ 'another operator class', 'k text_pattern_ops', '' ],
	[ 'another collation', 'k COLLATE "POSIX"', '' ],
	[ 'an expression', 'lower(k)', 'A' ]);
push @others,
  [ 'a nondeterministic collation', 'k COLLATE public.regress_nocase', 'A' ]
  if $node->safe_psql('postgres', "SELECT to_regcollation('regress_nocase') IS NOT NULL") eq 't';
foreach my $test (@others)
{
	my ($name, $index, $refused) = @$test;
	my $insert = <<'EOC';
INSERT INTO schema1.counted VALUES ('delta', 1, 'a'), ('delta', 20, 'b');
INSERT INTO schema1.counted VALUES ('delta', 300, 'A');
EOC

	# Whichever was made first.
	foreach my $key (
		"ALTER TABLE %s.total ADD PRIMARY KEY (k); CREATE UNIQUE INDEX other ON %s.total ($index)",
		"CREATE UNIQUE INDEX other ON %s.total ($index); ALTER TABLE %s.total ADD PRIMARY KEY (k)")
	{
		keyed_table(', k text NOT NULL', '', $key);
		if (!$refused)
		{
			is(last_line("$insert SELECT worker_spi_fold(1); $insert SELECT worker_spi_fold(1); SELECT string_agg(k || value, ' ' ORDER BY value) FROM schema1.counted"),
				'a2 b40 A600',
				"with $name beside the primary key each delta goes to its own total");
			next;
		}

		# The key that comes second is stuck.
		$node->safe_psql('postgres', "INSERT INTO schema1.total VALUES ('total', 1, 'a'); $insert");
		error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '23505', qr/"other"/,
			"with $name beside the primary key, its error is that of a key");
		is(rows($node, 1, 'k COLLATE "C", value, tableoid::regclass'),
			"A|300|schema1.stuck\na|2|schema1.total\nb|20|schema1.total",
			'and no other total has the deltas of that key');
		is(last_line('DROP INDEX schema1.other; SELECT worker_spi_fold(1); SELECT value FROM schema1.total WHERE k = $$A$$'),
			300, 'which get their own without that index');
	}
}

# ------------------------------------------------------------------------
# What the log and the view say
# ------------------------------------------------------------------------
keyed_table(', page text, day date', 'UNIQUE NULLS NOT DISTINCT (page, day)');
folds($node, 1, 'empty tables are folded');
my $before = worker($node, 1, 'fold_count || $$ $$ || folded_rows');
$offset = -s $node->logfile;
is( $node->safe_psql('postgres', <<'EOC'), "t\nt", 'twelve keys are folded');
INSERT INTO schema1.counted SELECT 'delta', 1, 'page ' || n % 4, date '2024-01-01' + n % 3
	FROM generate_series(1, 1000) AS n;
SELECT worker_spi_fold(1);
SELECT worker_spi_fold(1);
EOC
ok( $node->log_contains(
		qr/LOG:  worker_spi worker 1: folded 1000 rows into 12 totals of postgres\.schema1\.counted\n/,
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

	keyed_table(', k int', 'UNIQUE NULLS NOT DISTINCT (k)');
	folds($node, 1, "tables for $keys keys are taken");
	my $count = worker($node, 1, 'fold_count');
	my $offset = -s $node->logfile;
	is( last_line(<<EOC),
CREATE TEMP TABLE ledger AS
	SELECT n * 7 % 1000 - 500 AS value, n % $keys AS k FROM generate_series(1, $deltas) AS n;
INSERT INTO schema1.counted SELECT 'delta', * FROM ledger ORDER BY k;
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

	# A total that two transactions wrote counts twice.
	like(
		slurp_file($node->logfile, $offset),
		qr/folded $deltas rows into (\d+) totals of postgres\.schema1\.counted\n/,
		"the log has the number of rows for $keys keys");
}

# Once more over the totals: existing keys, new ones, and few rows among many
# totals.
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

# Totals with NULL in a key are found as well.
keyed_table(', a text, b int', 'UNIQUE NULLS NOT DISTINCT (a, b)', <<'EOC');
INSERT INTO %s.total SELECT 'total', 1, nullif('a' || n / 100, 'a7'), nullif(n % 100, 7)
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
# one of them.  A new process does not know how much it can do at once.  A trigger
# of the owner's notes the transactions.
my $count_before = worker($node, 1, 'fold_count');
is(worker($node, 1, 'pid'),
	$pid, 'all until here was done by one process of the worker');
is($node->safe_psql('postgres', 'SELECT worker_spi_stop(1)'), 't', 'it stops');
keyed_table(', k int', 'UNIQUE NULLS NOT DISTINCT (k)', <<'EOC');
CREATE TABLE transactions (xid xid8);
CREATE FUNCTION note_transaction() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN INSERT INTO public.transactions VALUES (pg_current_xact_id()); RETURN NULL; END';
CREATE TRIGGER note AFTER DELETE ON %t EXECUTE FUNCTION note_transaction();
ALTER TABLE %t ENABLE ALWAYS TRIGGER note;
CREATE TABLE ledger AS
	SELECT n % 100 AS value, (n * n) % 997 AS k FROM generate_series(1::bigint, 500000) AS n;
INSERT INTO %t SELECT 'delta', * FROM ledger;
EOC
$node->safe_psql('postgres', 'SELECT worker_spi_launch(1)');
is(last_line("SELECT worker_spi_fold(1); $differences_k; DROP TABLE ledger"),
	0, 'keys that are met by several transactions of a cycle have exact totals');
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
keyed_table(', k int NOT NULL', 'PRIMARY KEY (k)', <<'EOC');
CREATE INDEX ON %t (k);
INSERT INTO %s.total SELECT 'total', 1, k FROM generate_series(1, 5000) AS k;
ANALYZE %t;
INSERT INTO %t SELECT 'delta', 1, k FROM generate_series(5000, 1, -1) AS k;
EOC
folds($node, 1, 'a table with an index on the deltas is folded');
is( $node->safe_psql('postgres', 'SELECT count(*), sum(value) FROM schema1.counted'),
	'5000|10000', 'it hides none from a fold');

# ------------------------------------------------------------------------
# Plans
# ------------------------------------------------------------------------
# A range of a large counted is read as a range, whatever the statistics say: they
# are of another time, when the table was empty, or full, or there are none.
# No setting forces that.  Totals are found by their index, one by one, and never
# read otherwise.
my %statistics = (
	'no statistics' => '',
	'those of an empty table' => 'VACUUM ANALYZE schema1.counted, schema1.total, schema1.stuck;',
	'those of a full one' =>
	  q(INSERT INTO schema1.counted SELECT 'delta', 1, repeat('x', 900) || k FROM generate_series(1, 10000) AS k;
		ANALYZE schema1.counted; DELETE FROM ONLY schema1.counted;),
	'made up ones' =>
	  q(UPDATE pg_class SET relpages = 1, reltuples = 1 WHERE oid IN ('schema1.counted'::regclass, 'schema1.total'::regclass);));

# The plans of the worker since $offset, as [ statement, plan ].  The lines of
# sessions have the name of the test in front of the level.
sub plans
{
	my ($offset) = @_;
	my $log = slurp_file($node->logfile, $offset);
	my @plans;

	while ($log =~ /\[\d+\] LOG:  duration: [^\n]* plan:\n\tQuery Text: ([^\n]*)\n((?:\t[^\n]*\n)*)/g)
	{
		push @plans, [ $1, $2 ];
	}
	return @plans;
}

# Worker 1 goes on as another process.
sub new_process
{
	$node->safe_psql('postgres', 'SELECT worker_spi_stop(1)');
	$node->safe_psql('postgres', 'SELECT worker_spi_launch(1)');
	return;
}

SKIP:
{
	skip 'no auto_explain', 1 unless $explain;

	reload_settings($node, 'auto_explain.log_min_duration = 0', 1);
	foreach my $name (sort keys %statistics)
	{
		keyed_table(', k text NOT NULL', 'PRIMARY KEY (k), CONSTRAINT small CHECK (value < 1000000)');
		folds($node, 1, "$name: empty tables");
		$node->safe_psql('postgres', $statistics{$name}) if $statistics{$name};
		my $offset = -s $node->logfile;

		# Some 3,000 blocks, three times: the fast way, carefully, since a key is
		# bad, and the safe way, since one is stuck.  A new process begins with
		# small ranges.
		my $insert = "INSERT INTO schema1.counted SELECT repeat('x', 1800), 1, 'key ' || k FROM generate_series(1, 12000) AS k";
		new_process();
		$node->safe_psql('postgres', $insert);
		folds($node, 1, "$name: the fast way");
		$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 1000000, 'bad'); $insert");
		error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '23514', qr/"small"/, "$name: carefully");
		new_process();
		$node->safe_psql('postgres', $insert);
		error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '23514', qr/"small"/, "$name: the safe way");
		is($node->safe_psql('postgres', 'SELECT count(*), min(value), max(value) FROM schema1.total'),
			'12000|3|3', 'each total is right');
		is(deltas($node, 1), 0, 'and no delta is left');

		wait_for_nap($node, 1);
		my @plans = plans($offset);
		my @ranges = grep { $_->[0] =~ /ctid >=.*ctid </ } @plans;
		my %seen = map { ($_->[0] =~ /^(WITH sums|DELETE|WITH gone|WITH locked|SELECT array_agg)/ ? $1 : $_->[0]) => 1 } @ranges;
		is( join(', ', sort keys %seen),
			'DELETE, SELECT array_agg, WITH locked, WITH sums',
			'ranges of counted are read in four statements');
		my @wrong = grep { $_->[1] =~ /(?<!Tid Range )Scan (using \S+ )?on counted/ || $_->[1] !~ /Tid Range Scan on counted/ } @ranges;
		is(scalar(@wrong), 0, 'each of them as a range')
		  or diag(map { "$_->[0]\n$_->[1]\n" } @wrong);
		@wrong = grep { $_->[1] =~ /Scan (using \S+ )?on total/ } @plans;
		is(scalar(@wrong), 0, 'totals are never scanned')
		  or diag(map { "$_->[0]\n$_->[1]\n" } @wrong);
		my @inserts = grep { $_->[1] =~ /Insert on total/ } @plans;
		cmp_ok(scalar(@inserts), '>', 0, 'they are written');
		@wrong = grep { $_->[1] !~ /Insert on total.*?Conflict Arbiter Indexes: total_pkey\n/s } @inserts;
		is(scalar(@wrong), 0, 'and found by their index')
		  or diag(map { "$_->[0]\n$_->[1]\n" } @wrong);
		@wrong = grep { $_->[1] =~ /Settings:.*\benable_/ || $_->[1] !~ /Settings:.*search_path/ } @plans;
		is(scalar(@wrong), 0, 'no plan is made by switching others off')
		  or diag(map { "$_->[0]\n$_->[1]\n" } @wrong);
	}

	# Few deltas beside many totals.
	keyed_table(', k int NOT NULL', 'PRIMARY KEY (k)',
		q(INSERT INTO %s.total SELECT 'total', 1, k FROM generate_series(1, 100000) AS k));
	folds($node, 1, 'tables with 100,000 totals are taken');
	foreach my $analyze ('', 'VACUUM ANALYZE schema1.counted, schema1.total')
	{
		$node->safe_psql('postgres', $analyze) if $analyze;
		$node->safe_psql('postgres',
			q(INSERT INTO schema1.counted SELECT 'delta', 1, k * 9999 FROM generate_series(1, 10) AS k));
		wait_for_nap($node, 1);
		my $blocks = q(SELECT heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit
			FROM pg_statio_all_tables WHERE relid = 'schema1.total'::regclass);
		my $scans = q(SELECT seq_scan FROM pg_stat_all_tables WHERE relid = 'schema1.total'::regclass);
		my ($blocks_before, $scans_before) = map { $node->safe_psql('postgres', $_) } $blocks, $scans;
		folds($node, 1, '10 deltas beside 100,000 totals are folded');
		wait_for_nap($node, 1);
		cmp_ok($node->safe_psql('postgres', $blocks) - $blocks_before,
			'<', 200, 'by reading some blocks for each');
		is($node->safe_psql('postgres', $scans), $scans_before, 'and scanning nothing');
		cmp_ok($node->safe_psql('postgres', $blocks), '>', $blocks_before, 'which the statistics see');
	}
	is($node->safe_psql('postgres', 'SELECT count(*), sum(value) FROM schema1.total'),
		'100000|100020', 'with the right totals');
	reload_settings($node, 'auto_explain.log_min_duration = -1', 1);
}

# ------------------------------------------------------------------------
# Names that the statements have, and that are no longer those of the same things
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOC');
CREATE SCHEMA here;
CREATE SCHEMA there;
CREATE COLLATION here.plain FROM "C";
CREATE EXTENSION IF NOT EXISTS citext;
ALTER EXTENSION citext SET SCHEMA here;
EOC
keyed_table(', a text COLLATE here.plain, b here.citext', 'UNIQUE NULLS NOT DISTINCT (a, b)');
foreach my $change (
	'',
	'ALTER COLLATION here.plain RENAME TO simple',
	'ALTER EXTENSION citext SET SCHEMA there',
	'ALTER SCHEMA here RENAME TO hither',
	'ALTER COLLATION hither.simple SET SCHEMA there',
	'ALTER COLLATION there.simple RENAME TO other; CREATE COLLATION there.simple FROM "POSIX"')
{
	$node->safe_psql('postgres', "$change; INSERT INTO schema1.counted VALUES ('delta', 1, 'x', 'Y'), ('delta', 1, 'x', 'y')");
	folds($node, 1, "another name: $change");
}
is($node->safe_psql('postgres', 'SELECT sum(value), count(*) FROM schema1.total'),
	'12|1', 'all have gone into one total');

# ------------------------------------------------------------------------
# Others write while folds run
# ------------------------------------------------------------------------
keyed_table(', k int', 'UNIQUE NULLS NOT DISTINCT (k)', 'CREATE TABLE ledger (value bigint, k int);');
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
SELECT 1 / worker_spi_fold(1)::int;
SELECT 1 / (NOT EXISTS (
	SELECT k, sum(value) FROM schema1.counted GROUP BY k
	EXCEPT SELECT k, sum(value) FROM ledger GROUP BY k)
AND NOT EXISTS (
	SELECT k, sum(value) FROM ledger GROUP BY k
	EXCEPT SELECT k, sum(value) FROM schema1.counted GROUP BY k))::int;
EOC
$pid = worker($node, 1, 'pid');
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
	$pid, 'and one process of the worker did them');

$node->stop;
done_testing();
