# A worker whose caches forget all that they know whenever they may, which is
# each time that a lock is taken: it folds all the same, and what it says of a
# table that it cannot fold is right.  Whoever keeps a pointer into a cache for
# too long reads freed memory here, and whoever looks again until nothing has
# changed never comes to an end.
#
# It needs a server with assertions.  It waits for launches and for
# worker_spi_fold().

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('discard', 'worker_spi.total_workers = 0');
if ($node->safe_psql('postgres', <<'EOC') ne 't')
SELECT max_val::int > 0 FROM pg_settings WHERE name = 'debug_discard_caches'
EOC
{
	$node->stop;
	plan skip_all => 'a server without assertions';
}

# Only the worker is to be that slow.
$node->safe_psql('postgres', <<'EOC');
CREATE ROLE slow SUPERUSER LOGIN;
ALTER ROLE slow SET debug_discard_caches = 1;
CREATE TABLE parent (id int PRIMARY KEY);
INSERT INTO parent VALUES (1);
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql
AS 'BEGIN RETURN NULL; END';
EOC
my $fold = 'SELECT worker_spi_fold(1)';

# ------------------------------------------------------------------------
# Folding
# ------------------------------------------------------------------------
is( $node->safe_psql('postgres',
		"SELECT worker_spi_launch(1, roleoid => 'slow'::regrole) > 0"),
	't', 'a worker makes its tables');
is( $node->safe_psql('postgres', <<EOC),
INSERT INTO schema1.counted VALUES ('delta', 40), ('delta', 2);
$fold;
TABLE schema1.counted;
EOC
	"t\ntotal|42", 'and folds');

new_table($node, 1, <<'EOC',
CREATE TABLE %t (type text NOT NULL DEFAULT 'delta',
	value bigint NOT NULL, id int, page text,
	n bigint NOT NULL DEFAULT 0,
	last date NOT NULL DEFAULT '-infinity',
	twice bigint GENERATED ALWAYS AS (value / 2 * 2) STORED)
EOC
	key => 'FOREIGN KEY (id) REFERENCES parent, UNIQUE NULLS NOT DISTINCT (id, page)',
	total => <<'EOC');
ALTER TABLE %s.total ADD own bigserial, ADD CHECK (value <> 13);
CREATE TRIGGER seen AFTER UPDATE ON %s.total EXECUTE FUNCTION nothing();
ALTER TABLE %s.total ENABLE ALWAYS TRIGGER seen
EOC
my $all = 'SELECT type, value, id, page, n, last, twice FROM schema1.counted ORDER BY id, page, value';
is( $node->safe_psql('postgres', <<EOC),
INSERT INTO schema1.counted (value, id, page, n, last) VALUES
	(40, 1, 'a', 1, '2026-01-01'), (2, 1, 'a', 1, '2026-01-02'),
	(3, NULL, 'a', 1, '2026-01-03'), (4, NULL, 'a', 1, '2026-01-03');
$fold;
$all;
EOC
	"t\ntotal|42|1|a|2|2026-01-02|42\ntotal|7||a|2|2026-01-03|6",
	'keys, measures, a foreign key and a trigger');

# Its columns change while it runs.
is( $node->safe_psql('postgres', <<EOC),
ALTER TABLE schema1.counted ADD first date NOT NULL DEFAULT 'infinity';
INSERT INTO schema1.counted (value, id, page, first) VALUES (57, 1, 'a', '2026-01-01');
$fold;
SELECT value, id, page, first FROM schema1.counted ORDER BY id;
EOC
	"t\n99|1|a|2026-01-01\n7||a|infinity", 'a new measure');

# ------------------------------------------------------------------------
# Deltas that are stuck
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<EOC);
INSERT INTO schema1.counted (value, id, page) VALUES
	(1, 2, 'no parent'), (13, 1, 'b'), (9223372036854775807, NULL, 'c'), (1, NULL, 'c'),
	(1, NULL, (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300) AS i)),
	(1, 1, 'a');
EOC
error_is($node, 'postgres', $fold, '54000', qr/key is too long/,
	'what is stuck is reported');
is( $node->safe_psql('postgres',
		'SELECT sqlstate, count(*) FROM schema1.stuck GROUP BY 1 ORDER BY 1'),
	"22003|2\n23503|1\n23514|1\n54000|1", 'each key for its own reason');
is( $node->safe_psql('postgres', <<EOC),
DELETE FROM schema1.stuck WHERE sqlstate = '54000';
INSERT INTO parent VALUES (2);
INSERT INTO schema1.counted (value, id, page) VALUES (1, 1, 'b'), (-1, NULL, 'c');
$fold;
SELECT value, id, page FROM ONLY schema1.total ORDER BY id, page;
EOC
	"t
100|1|a
14|1|b
1|2|no parent
7||a
9223372036854775807||c",
	'and folded when it is cured');

# ------------------------------------------------------------------------
# What cannot be folded
# ------------------------------------------------------------------------
my $plain = "CREATE TABLE %t (type text NOT NULL, value bigint NOT NULL)";
my $page = "CREATE TABLE %t (type text NOT NULL, value bigint NOT NULL, page text NOT NULL";
my @refused = (
	[
		'an ordinary trigger beside a foreign key', '42809',
		qr/hint: +.* DISABLE TRIGGER an_ordinary_trigger, .* ENABLE ALWAYS TRIGGER an_ordinary_trigger\./i,
		"$page, id int NOT NULL)",
		key => 'PRIMARY KEY (id, page), FOREIGN KEY (id) REFERENCES parent',
		total => 'CREATE TRIGGER an_ordinary_trigger AFTER INSERT ON %s.total EXECUTE FUNCTION nothing()'
	],
	[
		'a BEFORE trigger', '42809', qr/BEFORE ROW trigger "Odd name"/,
		"$plain;
		 CREATE TRIGGER \"Odd name\" BEFORE DELETE ON %t FOR EACH ROW EXECUTE FUNCTION nothing();
		 ALTER TABLE %t ENABLE ALWAYS TRIGGER \"Odd name\""
	],
	[
		'no index', '42P16',
		qr/ALTER TABLE schema1\.total ADD UNIQUE NULLS NOT DISTINCT \(page, "Day"\)/,
		"$page, \"Day\" date)", key => ''
	],
	[
		'two indexes', '42P16',
		qr/indexes "total_page_day_key" and "total_page_key" .* both be that of its keys/,
		"$page, day date NOT NULL)",
		key => 'UNIQUE (page, day), UNIQUE (page)'
	],
	[
		'an index with another collation', '42P16',
		qr/index "by_page" cannot be .* compare keys/s,
		"$page)",
		key => '',
		total => 'CREATE UNIQUE INDEX by_page ON %s.total (page COLLATE "C")'
	],
	[
		'a column too many', '42P16',
		qr/column "other" .* neither a key nor a measure.*DROP CONSTRAINT total_pkey, ADD UNIQUE/s,
		"$page, other text)", key => 'PRIMARY KEY (page)'
	],
	[
		'a narrow sequence', '42P16',
		qr/column "id" of table .* sequence.*ALTER SEQUENCE schema1\.total_id_seq AS bigint/s,
		"$page)", key => 'id serial, PRIMARY KEY (page)'
	],
	[
		'a check on the type of the totals', '42P16', qr/constraint "odd" .* forbids totals/,
		$plain, key => "PRIMARY KEY (type), CONSTRAINT odd CHECK (type <> 'total')"
	],
	[
		'a third child', '42809', qr/NO INHERIT schema1\.counted/,
		"$plain; CREATE TABLE public.third () INHERITS (%t)"
	],
	[
		'a foreign key that follows', '42809', qr/foreign key "child_id_fkey" of table "child" would follow/,
		"$page)",
		key => 'id bigserial UNIQUE, PRIMARY KEY (page)',
		total => 'CREATE TABLE public.child (id bigint REFERENCES %s.total (id) ON UPDATE CASCADE)'
	]);
foreach my $case (@refused)
{
	my ($name, $sqlstate, $pattern, $definition, %params) = @$case;

	# What depends on the tables of the case before goes with them.
	$node->safe_psql('postgres', 'DROP TABLE IF EXISTS third');
	new_table($node, 1, $definition, %params);
	error_is($node, 'postgres', $fold, $sqlstate, $pattern, "refused: $name");
}

$node->stop;
done_testing();
