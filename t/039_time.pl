# Nobody can make a fold last, or a worker grow, by what he inserts: keys of 200 kB,
# of 60 MB, keys that no index can hold, sums that do not fit, over many rows, each
# among good ones.  The good ones are folded by the first cycle, and later cycles do
# not read again what is too long.  Code of the owner's that takes too long for a
# large share is run for small ones.
#
# It waits for worker_spi_fold().

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('time', "worker_spi.total_workers = 2\nautovacuum = off\n");
wait_for_fold($node, $_) foreach 1, 2;
my $pid = worker($node, 1, 'pid');

# ------------------------------------------------------------------------
# Whatever is inserted
# ------------------------------------------------------------------------
new_table($node, 1,
	'CREATE TABLE %t (k text NOT NULL, value bigint NOT NULL)',
	key => 'PRIMARY KEY (k)');
$node->safe_psql('postgres', <<'EOQ');
CREATE ROLE web LOGIN;
GRANT USAGE ON SCHEMA schema1 TO web;
GRANT INSERT ON schema1.counted TO web;
SET ROLE web;
-- 900 good keys among 100 that compress well enough for the index, 100 that do
-- not, 1,100 that are hardly too long, and one that is 60 MB long
INSERT INTO schema1.counted
SELECT CASE i % 12
		WHEN 0 THEN i || repeat('x', 200000)
		WHEN 1 THEN (SELECT string_agg(md5(i || ':' || j), '') FROM generate_series(1, 6250) AS j)
		WHEN 2 THEN (SELECT string_agg(md5(i || ':' || j), '') FROM generate_series(1, 90) AS j)
		ELSE 'good ' || i % 1000
	END, 1
FROM generate_series(1, 1200) AS i;
INSERT INTO schema1.counted
SELECT (SELECT string_agg(md5(i || '/' || j), '') FROM generate_series(1, 86) AS j), 1
FROM generate_series(1, 1000) AS i;
INSERT INTO schema1.counted VALUES (repeat('y', 60000000), 1);
-- and two keys whose sums do not fit
INSERT INTO schema1.counted
SELECT CASE WHEN i % 3 = 0 THEN 'good ' || i % 1000 ELSE 'large ' || i % 3 END,
	CASE WHEN i % 3 = 0 THEN 1 ELSE 9223372036854775807 END
FROM generate_series(1, 100000) AS i;
EOQ

# The sums of good keys: what is still a delta, and what is in the totals.
my $good = "SELECT (SELECT count(*) FROM ONLY schema1.counted),
	(SELECT sum(value) FROM schema1.total WHERE k LIKE 'good%')";
my $sum = total($node, 1);
my $good_sum = $node->safe_psql('postgres',
	"SELECT sum(value) FROM schema1.counted WHERE k LIKE 'good%'");
my $offset = -s $node->logfile;
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '(?:54000|22003)', qr/./,
	'the first cycle says what is stuck');
is($node->safe_psql('postgres', $good), "0|$good_sum", 'and has folded all that is good');
is(total($node, 1), $sum, 'nothing is lost');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM schema1.total WHERE length(k) > 200000"),
	'100', 'a key is as long as it is stored');
is( $node->safe_psql('postgres',
		"SELECT sqlstate, count(DISTINCT md5(k)) FROM schema1.stuck GROUP BY 1 ORDER BY 1"),
	"22003|2\n54000|1201", 'what is too long, or too large, is stuck');
my @lines = grep { /\bstuck\b/ } server_lines($node, $offset);
cmp_ok(scalar(@lines), '<=', 11, 'the log has a few lines');
cmp_ok(length(join '', @lines), '<', 11 * 1000, 'which are short');

# Blocks of TOAST that were read, by anybody.
my $toast = "SELECT pg_stat_force_next_flush(), sum(heap_blks_read + heap_blks_hit)
	FROM pg_statio_all_tables WHERE relid IN (SELECT reltoastrelid FROM pg_class
		WHERE oid IN ('schema1.stuck'::regclass, 'schema1.counted'::regclass))";
my $toasted = $node->safe_psql('postgres', $toast);
foreach (1 .. 3)
{
	$node->safe_psql('postgres',
		"INSERT INTO schema1.counted SELECT 'good ' || i, 1 FROM generate_series(0, 999) AS i");
	$good_sum += 1000;
	$node->psql('postgres', 'SELECT worker_spi_fold(1)');
}
is($node->safe_psql('postgres', $good), "0|$good_sum", 'later cycles fold what is good');
wait_for_nap($node, 1);
is($node->safe_psql('postgres', $toast), $toasted, 'and do not read long keys again');
is(worker($node, 1, 'pid'), $pid, 'one process has done it');

SKIP:
{
	skip 'no /proc', 1 unless -e "/proc/$pid/status";
	my ($peak) = slurp_file("/proc/$pid/status") =~ /^VmHWM:\s+(\d+) kB/m;
	cmp_ok($peak, '<', 500_000, 'which has never had 500 MB');
}

# ------------------------------------------------------------------------
# Keys that are refused, by the thousand: while they are tried again, others are
# folded.  Each try takes some time, and all of them more than a client needs to see
# that they have begun.
# ------------------------------------------------------------------------
new_table($node, 1, <<'EOC', key => 'PRIMARY KEY (k), CHECK (taken(k))');
CREATE SEQUENCE tries;
CREATE FUNCTION taken(k text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	IF k NOT LIKE 'bad%' THEN
		RETURN true;
	END IF;
	PERFORM nextval('public.tries'), pg_sleep(0.002);
	RETURN false;
END
$$;
CREATE TABLE %t (k text NOT NULL, value bigint NOT NULL);
CREATE TRIGGER wake AFTER INSERT ON %t EXECUTE FUNCTION worker_spi_wake();
INSERT INTO %t SELECT 'bad ' || i || repeat('x', 1000), 1 FROM generate_series(1, 1500) AS i
EOC
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '23514', qr/./, 'keys are refused');
my $tries = 'SELECT last_value FROM tries';
my ($between, $rounds) = (1500, 0);
while ($between >= 1500 && $rounds++ < 5)
{
	my $before = $node->safe_psql('postgres', $tries);
	$node->poll_query_until('postgres', "SELECT last_value > $before FROM tries")
	  or die 'nothing is tried again';
	$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('good $rounds', 1)");
	$node->poll_query_until('postgres', 'SELECT NOT EXISTS (SELECT FROM ONLY schema1.counted)')
	  or die 'the delta is not folded';
	$between = $node->safe_psql('postgres', $tries) - $before;
}
cmp_ok($between, '<', 1500, 'others are folded before all were tried again');
is(worker($node, 1, 'stuck_rows'), '1500', 'which are still stuck');

# ------------------------------------------------------------------------
# More keys that are stuck than a share has the time to read, and deltas in more
# blocks than the first shares fold: to fold less at a time would not help
# ------------------------------------------------------------------------
new_table($node, 2,
	'CREATE TABLE %t (type text NOT NULL, k text NOT NULL, value bigint NOT NULL)',
	key => 'PRIMARY KEY (k)');
$node->safe_psql('postgres', <<'EOQ');
INSERT INTO schema2.stuck SELECT 'delta', 'stuck ' || i, 9223372036854775807, '22003', 'bigint out of range', now()
	FROM generate_series(1, 750000) AS i, generate_series(1, 2);
INSERT INTO schema2.counted SELECT repeat('x', 900), 'good ' || i, 1 FROM generate_series(1, 40000) AS i;
SELECT worker_spi_fold(2, wait => false);
EOQ
$node->poll_query_until('postgres', 'SELECT NOT EXISTS (SELECT FROM ONLY schema2.counted)')
  or die 'the deltas are not folded';
cmp_ok($node->safe_psql('postgres', 'SELECT count(DISTINCT xmin::text) FROM schema2.total'),
	'<=', 20, 'they are folded in some shares');
$node->safe_psql('postgres', 'SELECT worker_spi_stop(2)');
new_table($node, 2, q(CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL)));
$node->safe_psql('postgres', 'SELECT worker_spi_launch(2)');

# ------------------------------------------------------------------------
# Whatever runs in a fold
# ------------------------------------------------------------------------
# It would sleep until somebody cancels it, twice, if the share is large.
$node->safe_psql('postgres', <<'EOQ');
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF (SELECT count(*) > 10000 FROM gone) THEN
		BEGIN
			PERFORM pg_sleep(3600);
		EXCEPTION WHEN query_canceled THEN
			PERFORM pg_sleep(3600);
		END;
	END IF;
	RETURN NULL;
END
$$;
CREATE TRIGGER slow AFTER DELETE ON schema2.counted REFERENCING OLD TABLE AS gone
	FOR EACH STATEMENT EXECUTE FUNCTION slow();
ALTER TABLE schema2.counted ENABLE ALWAYS TRIGGER slow;
INSERT INTO schema2.counted (value) SELECT 1 FROM generate_series(1, 15000);
EOQ
folds($node, 2, 'what is slow for a large share is done in small ones');
is(rows($node, 2), 'total|15000', 'and all is folded');
is(worker($node, 2, 'failed_count'), '0', 'which is no failure');

$node->stop;
done_testing();
