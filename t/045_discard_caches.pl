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
	't', 'a worker makes its table');
is( $node->safe_psql('postgres', <<EOC),
INSERT INTO schema1.counted VALUES ('delta', 40), ('delta', 2);
$fold;
TABLE schema1.counted;
EOC
	"t\ntotal|42", 'and folds');

new_table($node, 1, <<'EOC');
CREATE TABLE %t (type text NOT NULL DEFAULT 'delta',
	value bigint NOT NULL, id int REFERENCES parent, page text,
	n bigint NOT NULL DEFAULT 0,
	last date NOT NULL DEFAULT '-infinity',
	twice bigint GENERATED ALWAYS AS (value * 2) STORED);
CREATE UNIQUE INDEX ON %t (id, page) NULLS NOT DISTINCT WHERE type = 'total';
CREATE TRIGGER seen AFTER UPDATE ON %t EXECUTE FUNCTION nothing();
ALTER TABLE %t ENABLE ALWAYS TRIGGER seen;
EOC
my $all = 'TABLE schema1.counted ORDER BY id, page, value';
is( $node->safe_psql('postgres', <<EOC),
INSERT INTO schema1.counted (value, id, page, n, last) VALUES
	(40, 1, 'a', 1, '2026-01-01'), (2, 1, 'a', 1, '2026-01-02'),
	(3, NULL, 'a', 1, '2026-01-03'), (4, NULL, 'a', 1, '2026-01-03');
$fold;
$all;
EOC
	"t\ntotal|42|1|a|2|2026-01-02|84\ntotal|7||a|2|2026-01-03|14",
	'keys, measures and triggers');

# Its columns change while it runs.
is( $node->safe_psql('postgres', <<EOC),
ALTER TABLE schema1.counted ADD first date NOT NULL DEFAULT 'infinity';
INSERT INTO schema1.counted (value, id, page, first) VALUES (57, 1, 'a', '2026-01-01');
$fold;
$all;
EOC
	't
total|99|1|a|2|2026-01-02|198|2026-01-01
total|7||a|2|2026-01-03|14|infinity',
	'a new measure');

# ------------------------------------------------------------------------
# What cannot be folded
# ------------------------------------------------------------------------
my $columns = "type text NOT NULL, value bigint NOT NULL";
my @refused = (
	[
		'triggers beside a foreign key', '42809',
		qr/hint: +.* TRIGGER an_ordinary_trigger, .* TRIGGER an_ordinary_trigger\./i,
		"CREATE TABLE %t ($columns, id int REFERENCES parent DEFAULT 1);
		 CREATE UNIQUE INDEX ON %t (id) NULLS NOT DISTINCT WHERE type = 'total';
		 CREATE TRIGGER an_ordinary_trigger AFTER INSERT ON %t EXECUTE FUNCTION nothing()"
	],
	[
		'a BEFORE trigger', '42809', qr/BEFORE ROW trigger "Odd name"/,
		"CREATE TABLE %t ($columns);
		 CREATE TRIGGER \"Odd name\" BEFORE DELETE ON %t FOR EACH ROW EXECUTE FUNCTION nothing();
		 ALTER TABLE %t ENABLE ALWAYS TRIGGER \"Odd name\""
	],
	[
		'no index', '42P16',
		qr/make each of them a key: .*\(page, "Day"\) NULLS NOT DISTINCT/,
		"CREATE TABLE %t ($columns, page text, \"Day\" date)"
	],
	[
		'two indexes', '42P16', qr/indexes "by_page_day" and "by_page" .* disagree/,
		"CREATE TABLE %t ($columns, page text NOT NULL, day date NOT NULL);
		 CREATE UNIQUE INDEX by_page_day ON %t (page, day) WHERE type = 'total';
		 CREATE UNIQUE INDEX by_page ON %t (page) WHERE type = 'total'"
	],
	[
		'an index with another collation', '42P16',
		qr/index "by_page" cannot hold .* compare keys/s,
		"CREATE TABLE %t ($columns, page text NOT NULL);
		 CREATE UNIQUE INDEX by_page ON %t (page COLLATE \"C\") WHERE type = 'total'"
	],
	[
		'a column too many', '42P16', qr/column "other" .* neither a key nor a measure/,
		"CREATE TABLE %t ($columns, page text NOT NULL, other text);
		 CREATE UNIQUE INDEX ON %t (page) WHERE type = 'total'"
	]);
foreach my $case (@refused)
{
	my ($name, $sqlstate, $pattern, $definition) = @$case;

	new_table($node, 1, $definition);
	error_is($node, 'postgres', $fold, $sqlstate, $pattern, "refused: $name");
}

$node->stop;
done_testing();
