# Whose operators: the statements of a fold name nothing but what is the server's
# own.  For keys of all kinds of types, a role that may create in every schema
# involved plants operators, functions, aggregates, casts, types, collations and
# operator classes of the names that a fold has a use for.  A fold runs none of
# them, whichever way it goes, and its sums are right.  Types that cannot be
# compared are refused as keys when the tables are looked at.
#
# Whatever is planted takes a number from a sequence, which no rollback gives
# back.  All is done when worker_spi_fold() returns.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::Attacker;
use t::WorkerSpi;

my $node = new_node('names', "worker_spi.total_workers = 1\n");
my $fold = 'SELECT worker_spi_fold(1)';
my @schemas = ('public', 'schema1', 'ext');
my $has_citext =
  $node->safe_psql('postgres', "SELECT count(*) FROM pg_available_extensions WHERE name = 'citext'");

# The attacker runs $sql for each of these schemas, %s.
sub plant
{
	my ($sql, @in) = @_;
	return as($node, 'attacker', join '', map { $sql =~ s/%s/$_/gr } @in);
}

# How many calls of what is planted there were.
sub calls
{
	return $node->safe_psql('postgres', 'SELECT last_value, is_called FROM evil.calls');
}

folds($node, 1, 'the worker makes its tables');

# ------------------------------------------------------------------------
# The types of keys.  Of each, two literals that are equal, and another one.
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOS');
CREATE ROLE attacker LOGIN;
CREATE SCHEMA evil;
CREATE SCHEMA ext;
GRANT ALL ON SCHEMA public, schema1, ext, evil TO attacker;
CREATE SEQUENCE evil.calls;
CREATE FUNCTION evil.attack(place text) RETURNS void LANGUAGE plpgsql AS
	'BEGIN PERFORM pg_catalog.nextval(''evil.calls''); RAISE LOG ''planted: %'', place; END';
CREATE FUNCTION evil.yes(place text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS
	'BEGIN PERFORM evil.attack(place); RETURN true; END';
EOS
as($node, 'attacker', <<'EOS');
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE DOMAIN humor AS mood;
CREATE DOMAIN word AS text;
CREATE DOMAIN short_word AS word CHECK (length(VALUE) < 30000);
CREATE TYPE pair AS (w word, m mood);
CREATE DOMAIN good_pair AS pair;
CREATE TYPE span AS RANGE (subtype = text, multirange_type_name = spans);
CREATE DOMAIN good_span AS span;
EOS
my @nocase = ("'a'", "'A'", "'b'");
my @keys = (
	map({ [ $_, '', "'a'", "'a'", "'A'" ] } 'text', 'public.word', 'public.short_word'),
	map({ [ $_, '', "'sad'", "'sad'", "'happy'" ] } 'public.mood', 'public.humor'),
	[ 'text[]', '', "'{a}'", "'{\"a\"}'", "'{a,b}'" ],
	[ 'public.humor[]', '', "'{sad}'", "'{\"sad\"}'", "'{}'" ],
	map({ [ $_, '', "'(a,sad)'", "'(\"a\",sad)'", "'(,)'" ] } 'public.pair', 'public.good_pair'),
	[ 'public.pair[]', '', "'{\"(a,sad)\"}'", "'{\"(a,sad)\"}'", "'{}'" ],
	map({ [ $_, '', "'[a,b)'", "'[a,\"b\")'", "'empty'" ] } 'public.span', 'public.good_span'),
	[ 'public.spans', '', "'{[a,b)}'", "'{[a,b),empty}'", "'{}'" ],
	[ 'int4range', '', "'[1,3)'", "'[1,2]'", "'empty'" ]);
if ($has_citext)
{
	$node->safe_psql('postgres', 'CREATE EXTENSION citext SCHEMA ext');
	as($node, 'attacker', <<'EOS');
CREATE DOMAIN email AS ext.citext;
CREATE DOMAIN work_email AS email;
CREATE TYPE contact AS (e email, m mood);
CREATE TYPE emails AS RANGE (subtype = ext.citext);
EOS
	push @keys,
	  map({ [ $_, '', @nocase ] } 'ext.citext', 'public.email', 'public.work_email'),
	  map({ [ $_, '', "'{a}'", "'{A}'", "'{b}'" ] } 'ext.citext[]', 'public.email[]'),
	  [ 'public.contact', '', "'(a,sad)'", "'(A,sad)'", "'(b,)'" ],
	  [ 'public.emails', '', "'[a,b)'", "'[A,B)'", "'empty'" ];
}
my ($no_icu, undef, $error) = $node->psql('postgres',
	"CREATE COLLATION ext.nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false)");
like($error, qr/ICU is not supported/, 'this server has no nondeterministic collations') if $no_icu;
unless ($no_icu)
{
	as($node, 'attacker', 'CREATE DOMAIN nocase_word AS text COLLATE ext.nocase');
	push @keys,
	  [ 'text', 'COLLATE ext.nocase', @nocase ],
	  [ 'public.nocase_word', '', @nocase ],
	  [ 'text[]', 'COLLATE ext.nocase', "'{a}'", "'{A}'", "'{b}'" ];
}

# ------------------------------------------------------------------------
# What is planted
# ------------------------------------------------------------------------
# shadows() has text besides, and ext what belongs to citext.
my %types = map { $_->[0] => 1 } grep { $_->[0] ne 'text' } @keys;
plant(shadows(sort keys %types), 'public', 'schema1');
plant(shadows(sort grep { $_ ne 'ext.citext' } keys %types), 'ext');

# Types and collations, where the name is free.
plant("CREATE DOMAIN %s.$_ AS text CHECK (evil.yes('type'));", 'schema1', 'ext')
  foreach 'word', 'mood', 'pair', 'span', 'email';
plant("CREATE DOMAIN %s.citext AS text CHECK (evil.yes('type'));", 'public', 'schema1');
plant('CREATE COLLATION %s."default" FROM "C"; CREATE COLLATION %s."C" FROM "POSIX";', @schemas);
plant('CREATE COLLATION %s.nocase FROM "C";', 'public', 'schema1');

# Casts from and to the attacker's own types.
foreach my $type ('mood', 'pair', 'span')
{
	as($node, 'attacker', <<EOS) foreach map { ("$type $_", "$_ $type") } 'text', 'bigint', 'numeric', 'boolean';
CREATE FUNCTION cast_@{[ s/ /_/r ]}(@{[ s/ .*//r ]}) RETURNS @{[ s/.* //r ]} LANGUAGE plpgsql IMMUTABLE AS
	'BEGIN PERFORM evil.attack(''cast''); RETURN NULL; END';
CREATE CAST (@{[ s/ / AS /r ]}) WITH FUNCTION cast_@{[ s/ /_/r ]} AS IMPLICIT;
EOS
}

# Only a superuser may make operator classes.
my @classes = ([ 'text_ops', 'text' ], [ 'enum_ops', 'public.mood' ], [ 'record_ops', 'public.pair' ],
	[ 'array_ops', 'text[]' ], [ 'range_ops', 'public.span' ], [ 'multirange_ops', 'public.spans' ]);
push @classes, [ 'citext_ops', 'ext.citext' ] if $has_citext;
foreach my $class (@classes)
{
	my ($name, $type) = @$class;
	$node->safe_psql('postgres', <<EOS) foreach grep { "$_.$name" ne 'ext.citext_ops' } @schemas;
CREATE FUNCTION $_.compare($type, $type) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
	'BEGIN PERFORM evil.attack(''operator class''); RETURN 0; END';
CREATE OPERATOR CLASS $_.$name FOR TYPE $type USING btree AS OPERATOR 1 $_.<, OPERATOR 2 $_.<=,
	OPERATOR 3 $_.=, OPERATOR 4 $_.>=, OPERATOR 5 $_.>, FUNCTION 1 $_.compare($type, $type);
EOS
}

# What is planted is live: it is taken where it is named.
my $planted = -s $node->logfile;
$node->safe_psql('postgres', <<'EOS');
SELECT 'sad'::public.mood::text, 'sad'::text::public.mood, 'a'::schema1.word;
CREATE TABLE evil.sorted AS SELECT 'a'::text AS k UNION ALL SELECT 'b';
CREATE INDEX ON evil.sorted (k schema1.text_ops);
EOS
ok($node->log_contains(qr/planted: $_$/m, $planted), "a planted $_ works where it is named")
  foreach 'cast', 'type', 'operator class';

# ------------------------------------------------------------------------
# Folds, in all ways
# ------------------------------------------------------------------------
my $columns =
  q(value bigint NOT NULL, seen timestamptz NOT NULL DEFAULT '-infinity', first date NOT NULL DEFAULT 'infinity');
foreach my $key (@keys)
{
	my ($type, $collate, $one, $same, $other) = @$key;
	my $name = "a key of type $type" . ($collate && " $collate");
	my $may_be_long = $type =~ /^text$|word$|citext$|email$/;
	my $offset = -s $node->logfile;
	my $insert = <<EOS;
INSERT INTO schema1.counted VALUES (1, '2024-01-01', '2024-01-02', $one), (10, '2024-01-02', '2024-01-01', $same),
	(100, '2024-01-03', '2024-01-03', $other), (1000, '2024-01-04', '2024-01-04', NULL);
EOS

	# Where a search path has it first, what is planted is taken.
	new_table($node, 1, "CREATE TABLE %t ($columns, k $type $collate); $insert",
		key => 'UNIQUE NULLS NOT DISTINCT (k), CONSTRAINT small CHECK (value <> 666)');
	$node->safe_psql('postgres', <<'EOS');
SET search_path = schema1, public, pg_catalog;
SELECT max(k), pg_column_size(min(k)) FROM schema1.counted WHERE k = k OR k IS NOT NULL GROUP BY value;
EOS
	like(slurp_file($node->logfile, $offset),
		qr/planted: operator.*planted: aggregate.*planted: function pg_column_size/s,
		"$name: what is planted works");

	my $before = calls();
	folds($node, 1, "$name: totals are made");
	is($node->safe_psql('postgres', "$insert $fold"), 't', "$name: totals are changed");

	# A sum that does not fit, an error of another key, and one that is too long.
	error_is($node, 'postgres',
		"INSERT INTO schema1.counted (value, k) VALUES (9223372036854775807, $one), (1, $same); $fold",
		'22003', qr/out of range/, "$name: one is stuck");
	$node->safe_psql('postgres', <<EOS) if $may_be_long;
INSERT INTO schema1.counted (value, k)
SELECT 5, string_agg(encode(sha256(i::text::bytea), 'hex'), '') FROM generate_series(1, 300) AS i;
EOS
	error_is($node, 'postgres',
		"INSERT INTO schema1.counted (value, k) VALUES (366, $other); $insert $fold",
		'22003', qr/out of range/, "$name: others, too");
	is( $node->safe_psql('postgres', <<EOS),
SELECT string_agg(DISTINCT sqlstate, ' ') FROM schema1.stuck;
DELETE FROM schema1.stuck WHERE sqlstate = '54000';
INSERT INTO schema1.counted (value, k) VALUES (-9223372036854775807, $one), (-366, $other);
$fold
EOS
		'22003 23514' . ($may_be_long ? ' 54000' : '') . "\nt",
		"$name: each for its own reason, until they fit");
	is( rows($node, 1, 'value, seen::date, first'),
		"34|2024-01-02|2024-01-01\n300|2024-01-03|2024-01-03\n3000|2024-01-04|2024-01-04",
		"$name: the totals are right");
	is(calls(), $before, "$name: nothing that is planted was run");
}

# ------------------------------------------------------------------------
# Types that cannot be keys, whatever index takes them
# ------------------------------------------------------------------------
as($node, 'attacker', <<'EOS');
CREATE TYPE with_json AS (a int, j json);
CREATE TYPE deep AS (a int, w with_json[]);
CREATE DOMAIN many_json AS json[];
CREATE DOMAIN good_json AS with_json;
EOS
foreach my $type ('json[]', 'xml[]', 'public.with_json', 'public.with_json[]', 'public.deep',
	'public.many_json', 'public.good_json')
{
	# There is no delta whose folding could fail.
	new_table($node, 1, "CREATE TABLE %t ($columns, k $type)", key => 'UNIQUE NULLS NOT DISTINCT (k)');
	error_is($node, 'postgres', $fold, '42P16', qr/index "total_k_key".*type \S+ cannot be compared/s,
		"a key of type $type is refused");
	is( $node->safe_psql('postgres', <<EOS), "t\n42", "what was of type $type is folded as text");
INSERT INTO schema1.counted VALUES (42);
ALTER TABLE schema1.counted ALTER k TYPE text USING k::text;
$fold;
SELECT value FROM schema1.total;
EOS
}

# One that becomes such a type is looked at again.
new_table($node, 1, "CREATE TABLE %t ($columns, k public.pair)", key => 'UNIQUE NULLS NOT DISTINCT (k)');
$node->safe_psql('postgres', "INSERT INTO schema1.counted (value, k) VALUES (40, '(a,sad)')");
folds($node, 1, 'a composite key is folded');
as($node, 'attacker', 'ALTER TYPE pair ADD ATTRIBUTE j json');
$node->safe_psql('postgres', "INSERT INTO schema1.counted (value, k) VALUES (2, '(a,sad,)')");
error_is($node, 'postgres', $fold, '42P16', qr/type \S+ cannot be compared/, 'with json in it it is refused');
as($node, 'attacker', 'ALTER TYPE pair DROP ATTRIBUTE j');
folds($node, 1, 'without it, it is folded');
is(rows($node, 1, 'value, k'), '42|(a,sad)', 'with the right sum');

$node->stop;
done_testing();
