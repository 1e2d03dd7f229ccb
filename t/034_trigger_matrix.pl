# Triggers of every kind on each of the three tables: timing, level, events,
# columns, transition tables, constraint triggers; ordinary, ALWAYS, REPLICA and
# disabled; beside foreign keys in both directions, beside deferrable constraints,
# and on totals that were adopted.  A fold refuses those that it must not fire, and
# names them; of the others it fires those that are ALWAYS, where the server would
# fire them by hand, and no more.  Nobody becomes a superuser, and no count changes.
#
# Each setting has a worker and a session of its own, which drives all its cases
# in SQL; all is done when worker_spi_fold() returns.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('trigger_matrix', <<EOC);
worker_spi.total_workers = 0
autovacuum = off
EOC
my $virtual = $node->pg_version >= 18;

# ------------------------------------------------------------------------
# The kinds of triggers
# ------------------------------------------------------------------------

# A trigger's name says what it is.  A fold inserts into the totals and updates
# them, inserts into stuck, and deletes from counted and stuck.
my $columns = join ', ', map { "(' OF $_')" } 'value', 'page', 'g', $virtual ? 'v' : ();
$node->safe_psql('postgres', <<EOC);
CREATE TABLE kind AS
WITH table_of AS (
	SELECT * FROM (VALUES ('counted', '{DELETE}'::text[]), ('total', '{INSERT,UPDATE}'),
		('stuck', '{INSERT,DELETE}')) AS t (tbl, folds)
), event AS (
	VALUES ('INSERT'), ('DELETE'), ('INSERT OR DELETE')
	UNION ALL
	SELECT concat_ws(' OR ', nullif(before, ''), 'UPDATE' || cols, nullif(after, ''))
	FROM (VALUES (''), $columns) AS c (cols),
		(VALUES (''), ('INSERT')) AS b (before), (VALUES (''), ('DELETE')) AS a (after)
), described AS (
	SELECT timing, level, event, '' AS extra, '' AS clause
	FROM (VALUES ('BEFORE'), ('AFTER')) AS t (timing),
		(VALUES ('ROW'), ('STATEMENT')) AS l (level), event AS e (event)
	UNION ALL
	SELECT timing, 'STATEMENT', 'TRUNCATE', '', ''
	FROM (VALUES ('BEFORE'), ('AFTER')) AS t (timing)
	UNION ALL
	SELECT 'AFTER', 'ROW', event, extra, clause
	FROM event AS e (event), (VALUES ('CONSTRAINT', 'NOT DEFERRABLE'),
		('DEFERRED', 'DEFERRABLE INITIALLY DEFERRED')) AS d (extra, clause)
	UNION ALL
	SELECT 'AFTER', level, event, 'REFERENCING',
		concat('REFERENCING', ' OLD TABLE AS old_rows ' || nullif(event, 'INSERT') || ' ',
			' NEW TABLE AS new_rows ' || nullif(event, 'DELETE') || ' ')
	FROM (VALUES ('ROW'), ('STATEMENT')) AS l (level),
		(VALUES ('INSERT'), ('UPDATE'), ('DELETE')) AS e (event)
)
SELECT tbl, timing, level, event, extra,
	regexp_replace(clause, '_rows (INSERT|UPDATE|DELETE)', '_rows', 'g') AS clause,
	concat_ws(' ', timing, level, event, nullif(extra, '')) AS name,
	ARRAY(SELECT op FROM unnest(folds) AS op WHERE strpos(event, op) > 0) AS hits
FROM table_of, described
-- The server has no row triggers with transition tables on a table that inherits; and
-- a constraint trigger is a constraint, of which stuck may have none of its own.
WHERE (tbl = 'counted' OR level <> 'ROW' OR extra <> 'REFERENCING')
	AND (tbl <> 'stuck' OR extra NOT IN ('CONSTRAINT', 'DEFERRED'));
EOC

# ------------------------------------------------------------------------
# What a trigger tries, and what the test does with it
# ------------------------------------------------------------------------

$node->safe_psql('postgres', <<'EOC');
CREATE ROLE alice;
CREATE ROLE attacker;
CREATE SCHEMA evil AUTHORIZATION attacker;
GRANT USAGE ON SCHEMA evil TO alice;
CREATE TABLE fired (index int, tbl text, name text, op text);
GRANT INSERT ON fired TO PUBLIC;
CREATE TABLE wrong (index int, tbl text, name text, what text);
CREATE TABLE tried (index int, tbl text, name text, enabled text);
-- Per worker: where its tables are, and what was inserted.
CREATE TABLE setting (index int, description text, counted text, total text, stuck text,
	inserted numeric NOT NULL DEFAULT 0);
SET ROLE attacker;
CREATE FUNCTION evil.attack() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	IF current_setting('application_name') LIKE 'worker%' THEN
		ALTER ROLE attacker SUPERUSER;
	END IF;
	RETURN true;
EXCEPTION WHEN insufficient_privilege THEN
	RETURN true;
END $$;
CREATE FUNCTION evil.trigger() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF current_setting('application_name') NOT LIKE 'worker%' THEN
		RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
	END IF;
	INSERT INTO public.fired VALUES (pg_catalog.substring(TG_TABLE_SCHEMA, '[0-9]+')::int,
		CASE TG_TABLE_NAME WHEN 'pages' THEN 'total' ELSE TG_TABLE_NAME END, TG_NAME, TG_OP);
	PERFORM evil.attack();
	-- Change the row, or suppress it.
	IF TG_LEVEL = 'ROW' AND TG_OP <> 'DELETE' AND pg_catalog.length(TG_NAME) % 2 = 0 THEN
		NEW.value := 0;
		RETURN NEW;
	END IF;
	RETURN NULL;
END $$;
RESET ROLE;

CREATE FUNCTION table_of(setting, text) RETURNS text LANGUAGE sql AS
$$ SELECT CASE $2 WHEN 'counted' THEN $1.counted WHEN 'total' THEN $1.total ELSE $1.stuck END $$;

-- Each trigger, made by one who has the privilege TRIGGER, and disabled.
CREATE PROCEDURE make_triggers(n int) LANGUAGE plpgsql AS $$
DECLARE
	s setting;
	k kind;
BEGIN
	SELECT * INTO s FROM setting WHERE index = n;
	FOR k IN SELECT * FROM kind LOOP
		EXECUTE format('SET LOCAL ROLE attacker; CREATE %sTRIGGER %I %s %s ON %s %s FOR EACH %s'
			' WHEN (evil.attack()) EXECUTE FUNCTION evil.trigger(); RESET ROLE;'
			'ALTER TABLE %5$s DISABLE TRIGGER %2$I',
			CASE WHEN k.extra IN ('CONSTRAINT', 'DEFERRED') THEN 'CONSTRAINT ' END, k.name, k.timing,
			k.event, table_of(s, k.tbl), k.clause, k.level);
	END LOOP;
END $$;

-- Enable a trigger in some way, or disable it.
CREATE PROCEDURE enable(s setting, k kind, how text) LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE format('ALTER TABLE %s %s TRIGGER %I', table_of(s, k.tbl), how, k.name);
	INSERT INTO tried SELECT s.index, k.tbl, k.name, how WHERE how <> 'DISABLE';
END $$;

CREATE PROCEDURE add_delta(n int, p text, v bigint) LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE format('INSERT INTO schema%s.counted (page, value) VALUES ($1, $2)', n) USING p, v;
	UPDATE setting SET inserted = inserted + v WHERE index = n;
END $$;

-- The worker folds, with this outcome: 't', or the SQLSTATE of its error.  Whatever
-- comes of it, the sum is what was inserted, and nobody is a superuser.
CREATE PROCEDURE fold(n int, expected text, k kind) LANGUAGE plpgsql AS $$
DECLARE
	got text;
	message text := '';
	hint text := '';
	sum numeric;
	s setting;
BEGIN
	BEGIN
		got := CASE WHEN worker_spi_fold(n) THEN 't' ELSE 'f' END;
	EXCEPTION WHEN OTHERS THEN
		GET STACKED DIAGNOSTICS got = RETURNED_SQLSTATE, message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
	END;
	SELECT * INTO s FROM setting WHERE index = n;
	EXECUTE format('SELECT sum(value) FROM schema%s.counted', n) INTO sum;
	INSERT INTO wrong SELECT n, k.tbl, k.name, what FROM (VALUES
		(got <> expected, concat('outcome ', got, ': ', message)),
		(expected = '42809' AND strpos(message, format('"%s"', k.name)) = 0, 'message: ' || message),
		(expected = '42809' AND strpos(message, format('"postgres.%s"', table_of(s, k.tbl))) = 0, 'message: ' || message),
		(expected = '42809' AND strpos(hint, format('DISABLE TRIGGER "%s"', k.name)) = 0, 'hint: ' || hint),
		(sum <> s.inserted, 'sum ' || sum || ' instead of ' || s.inserted),
		((SELECT count(*) FROM pg_roles WHERE rolsuper) <> 1, 'somebody has become a superuser')
	) AS w (is_wrong, what) WHERE is_wrong;
END $$;

-- All cases of a worker.  The owner is a superuser, which an attacker could gain
-- most from.
CREATE PROCEDURE try_all(n int) LANGUAGE plpgsql AS $$
DECLARE
	s setting;
	k kind;
	nobody kind;
	how text;
	i int := 0;
BEGIN
	SELECT * INTO s FROM setting WHERE index = n;

	-- Those that are refused, one after the other.
	FOREACH how IN ARRAY '{ENABLE,ENABLE ALWAYS}'::text[] LOOP
		FOR k IN SELECT * FROM kind
			WHERE hits <> '{}' AND (how = 'ENABLE' OR timing = 'BEFORE' AND level = 'ROW') LOOP
			i := i + 1;
			CALL enable(s, k, how);
			CALL add_delta(n, 'old', i);
			COMMIT;
			CALL fold(n, '42809', k);
			CALL enable(s, k, 'DISABLE');
			COMMIT;
		END LOOP;
	END LOOP;

	-- Those that nothing fires, all at once: disabled, REPLICA, and with other events.
	FOREACH how IN ARRAY '{DISABLE,ENABLE REPLICA,ENABLE,ENABLE ALWAYS}'::text[] LOOP
		FOR k IN SELECT * FROM kind WHERE hits = '{}' OR how IN ('DISABLE', 'ENABLE REPLICA') LOOP
			CALL enable(s, k, how);
		END LOOP;
		CALL add_delta(n, how, 1);
		CALL add_delta(n, 'old', -1);
		COMMIT;
		nobody.name := how;
		CALL fold(n, 't', nobody);
		INSERT INTO wrong SELECT n, tbl, name, how || ' has fired' FROM fired WHERE index = n;
		FOR k IN SELECT * FROM kind LOOP
			CALL enable(s, k, 'DISABLE');
		END LOOP;
		COMMIT;
	END LOOP;

	-- Those that are fired, all at once, with the rights of another owner: for new
	-- and for old totals, for a key that becomes stuck, and for one that no longer is.
	EXECUTE format('ALTER TABLE %s OWNER TO alice; ALTER TABLE %s OWNER TO alice; ALTER TABLE %s OWNER TO alice',
		s.counted, s.total, s.stuck);
	FOR k IN SELECT * FROM kind WHERE timing <> 'BEFORE' OR level <> 'ROW' LOOP
		CALL enable(s, k, 'ENABLE ALWAYS');
	END LOOP;
	CALL add_delta(n, 'new', 1);
	CALL add_delta(n, 'old', -2);
	CALL add_delta(n, 'stuck', 9223372036854775807);
	CALL add_delta(n, 'stuck', 1);
	COMMIT;
	nobody.name := 'ALWAYS, something is stuck';
	CALL fold(n, '22003', nobody);
	CALL add_delta(n, 'stuck', -9223372036854775807);
	COMMIT;
	nobody.name := 'ALWAYS';
	CALL fold(n, 't', nobody);
	INSERT INTO wrong SELECT n, tbl, name, 'has fired for ' || op FROM (
		SELECT tbl, name, op FROM fired WHERE index = n
		EXCEPT SELECT tbl, name, unnest(hits) FROM kind) AS w;
	INSERT INTO wrong SELECT n, tbl, name, 'has not fired for ' || op FROM (
		SELECT tbl, name, op FROM kind, unnest(hits) AS op
		WHERE (timing <> 'BEFORE' OR level <> 'ROW')
		-- A fold never changes a key.
		AND (op <> 'UPDATE' OR event NOT LIKE '%UPDATE OF page%')
		EXCEPT SELECT tbl, name, op FROM fired WHERE index = n) AS w;
END $$;
EOC

# ------------------------------------------------------------------------
# The settings
# ------------------------------------------------------------------------

my $pages = "CREATE TABLE %s.page (page text PRIMARY KEY); INSERT INTO %s.page"
  . " VALUES ('old'), ('new'), ('stuck'), ('DISABLE'), ('ENABLE REPLICA'), ('ENABLE'), ('ENABLE ALWAYS');";
my @settings = (
	[ 'by themselves', '' ],
	[
		'beside foreign keys in both directions', <<EOC
$pages
ALTER TABLE %s.counted ADD UNIQUE (page, value), ADD FOREIGN KEY (page) REFERENCES %s.page;
ALTER TABLE %s.total ADD FOREIGN KEY (page) REFERENCES %s.page ON UPDATE CASCADE ON DELETE CASCADE;
CREATE TABLE %s.waits (page text, value bigint,
	FOREIGN KEY (page, value) REFERENCES %s.counted (page, value));
CREATE TABLE %s.detail (page text REFERENCES %s.total ON UPDATE CASCADE ON DELETE CASCADE)
	PARTITION BY LIST (page);
CREATE TABLE %s.part PARTITION OF %s.detail DEFAULT;
EOC
	],
	[
		'beside deferrable constraints', <<EOC
$pages
ALTER TABLE %s.counted ADD UNIQUE (page, value) DEFERRABLE INITIALLY DEFERRED;
ALTER TABLE %s.total ADD UNIQUE (page, value) DEFERRABLE INITIALLY DEFERRED,
	ADD FOREIGN KEY (page) REFERENCES %s.page DEFERRABLE INITIALLY DEFERRED;
EOC
	],
	[
		'on totals that were adopted', <<EOC
CREATE SCHEMA stats_%n;
ALTER TABLE %s.total SET SCHEMA stats_%n;
ALTER TABLE stats_%n.total RENAME TO pages;
EOC
	]);

# Cases run side by side: a worker pauses after each error.
my @sessions;
my $index = 0;
foreach my $setting (@settings)
{
	my ($description, $sql) = @$setting;
	my $n = ++$index;
	my $total = $sql =~ /pages;/ && $sql =~ /stats/ ? "stats_$n.pages" : "schema$n.total";

	$sql =~ s/%s/schema$n/g;
	$sql =~ s/%n/$n/g;
	$node->safe_psql('postgres', <<EOC);
CREATE SCHEMA schema$n;
GRANT USAGE ON SCHEMA schema$n TO alice, attacker;
CREATE TABLE schema$n.counted (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL,
	page text NOT NULL, g bigint GENERATED ALWAYS AS (value % 10) STORED
	@{[ $virtual ? ', v bigint GENERATED ALWAYS AS (value % 10) VIRTUAL' : '' ]});
CREATE TABLE schema$n.total (PRIMARY KEY (page)) INHERITS (schema$n.counted);
$sql
SELECT worker_spi_launch($n);
INSERT INTO schema$n.counted (page, value) VALUES ('old', 0);
INSERT INTO setting VALUES ($n, '$description', 'schema$n.counted', '$total', 'schema$n.stuck');
GRANT USAGE ON SCHEMA @{[ $total =~ /(.*)\./ ]} TO alice, attacker;
GRANT TRIGGER ON schema$n.counted, $total, schema$n.stuck TO attacker;
CALL make_triggers($n);
EOC
	folds($node, $n, "$description: the table is folded");
	push @sessions, start_psql($node, 'postgres', "matrix_$n", "CALL try_all($n)");
}

# ------------------------------------------------------------------------
# What has come of it
# ------------------------------------------------------------------------

$index = 0;
foreach my $setting (@settings)
{
	my ($description) = @$setting;
	my $n = ++$index;
	my (undef, $err, $done) = finish_psql($sessions[ $n - 1 ]);

	ok($done, "triggers $description: all are tried") or diag($err);
	is( $node->safe_psql('postgres',
			"SELECT tbl, name, what FROM wrong WHERE index = $n LIMIT 20"),
		'', "triggers $description: each does what it may");
	is( $node->safe_psql('postgres', <<EOC),
SELECT count(*) FROM kind, unnest('{ENABLE,ENABLE ALWAYS,ENABLE REPLICA}'::text[]) AS enabled
WHERE (tbl, name, enabled) NOT IN (SELECT tbl, name, enabled FROM tried WHERE index = $n)
EOC
		'0', "triggers $description: none is left out");
	is( $node->safe_psql('postgres',
			"SELECT count(*) > 100 FROM (SELECT DISTINCT tbl, name FROM fired WHERE index = $n) AS f"),
		't', "triggers $description: those that are ALWAYS have fired");
	is(deltas($node, $n), '0', "triggers $description: all deltas are folded");
}
note('kinds of triggers: ' . $node->safe_psql('postgres', 'SELECT count(*) FROM kind'));
is( $node->safe_psql('postgres', 'SELECT count(*) FROM pg_roles WHERE rolsuper'),
	'1', 'nobody has become a superuser');

$node->stop;
done_testing();
