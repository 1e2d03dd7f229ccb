# What a server can run out of.  Folds that need more of it than there is are done in
# smaller shares; and no key is blamed for it, nor where there are no transaction ids
# left: the cycle fails, and folding goes on when there are some again.
#
# It waits for worker_spi_fold(), and for the server to have ids again.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('resources', "worker_spi.total_workers = 2\n", allows_streaming => 'logical');
wait_for_fold($node, $_) foreach 1, 2;

# ------------------------------------------------------------------------
# Temporary files, memory, locks
# ------------------------------------------------------------------------
# Each share of more than 5,000 deltas would need more than there is.
new_table($node, 1,
	'CREATE TABLE %t (k text NOT NULL, value bigint NOT NULL)',
	key => 'PRIMARY KEY (k)');
$node->safe_psql('postgres', <<'EOQ');
CREATE FUNCTION large() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF (SELECT count(*) > 5000 FROM gone) THEN
		RAISE 'temporary file size exceeds temp_file_limit' USING ERRCODE = '53400';
	END IF;
	RETURN NULL;
END
$$;
CREATE TRIGGER large AFTER DELETE ON schema1.counted REFERENCING OLD TABLE AS gone
	FOR EACH STATEMENT EXECUTE FUNCTION large();
ALTER TABLE schema1.counted ENABLE ALWAYS TRIGGER large;
INSERT INTO schema1.counted SELECT i, 1 FROM generate_series(1, 40000) AS i;
EOQ
folds($node, 1, 'what needs too much for a large share is folded in small ones');
is($node->safe_psql('postgres', 'SELECT count(*), sum(value) FROM schema1.total'),
	'40000|40000', 'all of it');
is(worker($node, 1, 'failed_count, stuck_rows'), '0|0', 'and nothing has failed');
$node->safe_psql('postgres', 'DROP TRIGGER large ON schema1.counted');

# One that is too large in the smallest share is an error of the cycle.
$node->safe_psql('postgres', <<'EOQ');
CREATE OR REPLACE FUNCTION large() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE 'out of it' USING ERRCODE = '53200'; END
$$;
CREATE TRIGGER large AFTER DELETE ON schema1.counted EXECUTE FUNCTION large();
ALTER TABLE schema1.counted ENABLE ALWAYS TRIGGER large;
INSERT INTO schema1.counted SELECT i, 1 FROM generate_series(1, 1000) AS i;
EOQ
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '53200', qr/out of it/,
	'what no share is small enough for fails the cycle');
is(worker($node, 1, 'state, stuck_rows'), 'backoff|0', 'and no key');
$node->safe_psql('postgres', 'DROP TRIGGER large ON schema1.counted');
folds($node, 1, 'until it is to be had');

# ------------------------------------------------------------------------
# Transaction ids
# ------------------------------------------------------------------------
# A replication slot keeps vacuum from making some free.
$node->safe_psql('postgres', <<'EOQ');
INSERT INTO schema1.counted VALUES ('new', 1), ('new', 2);
INSERT INTO schema2.counted (value) VALUES (3);
SELECT pg_create_logical_replication_slot('old', 'pgoutput');
EOQ
my $oldest = $node->safe_psql('postgres',
	"SELECT min(datfrozenxid::text::bigint) FROM pg_database");
$node->append_conf('postgresql.conf', 'worker_spi.total_workers = 0');
$node->stop;

# The server warns of the last 40 million, and has none but for vacuum when
# there are 3 million.
my $next = $oldest + 2**31 - 2_900_000;
system_or_bail('pg_resetwal', '-x', $next, $node->data_dir);
my $segment = sprintf('%s/pg_xact/%04X', $node->data_dir, $next / 2**20);
append_to_file($segment, "\0" x 2**18) if !-e $segment;
$node->start;
$node->safe_psql('postgres', 'SELECT worker_spi_launch(1) > 0');
my $offset = -s $node->logfile;
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)',
	'54000', qr/wraparound/, 'there are no transaction ids');
is(worker($node, 1, 'state, last_sqlstate, stuck_rows, failed_count > 0'),
	'backoff|54000|0|t', 'which fails the cycle');
ok(!$node->log_contains(qr/is stuck/, $offset), 'and no key');
is($node->safe_psql('postgres', 'SELECT sum(value) FROM ONLY schema1.counted'),
	'3', 'the deltas wait');

$node->safe_psql('postgres', "SELECT pg_drop_replication_slot('old')");
my @databases = split /\n/, $node->safe_psql('postgres',
	'SELECT datname FROM pg_database WHERE datallowconn');
$node->safe_psql($_, 'VACUUM FREEZE') foreach @databases;
$node->poll_query_until('postgres', <<'EOQ') or die 'there are still no ids';
SELECT bool_and(age(datfrozenxid) < 1000000000) FROM pg_database
EOQ
$node->poll_query_until('postgres',
	'SELECT NOT EXISTS (SELECT FROM ONLY schema1.counted)')
  or die 'the worker did not fold';
is($node->safe_psql('postgres', "SELECT value FROM schema1.total WHERE k = 'new'"),
	'3', 'when there are some again, they are folded');
is(worker($node, 1, 'state, stuck_rows'), 'idle|0', 'without anybody asking');

$node->stop;
done_testing();
