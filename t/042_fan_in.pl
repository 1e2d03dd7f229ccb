# Fan-in: several servers count, each with its own worker, and a hub has the
# sum of all.  The publishers replicate the table of their totals, so the hub gets
# one row for each key and node, no deltas, and needs no worker.  Shown here: the
# hub's sums are exact once all is folded, whatever was inserted, updated and
# deleted on the publishers, and also if one of them crashed meanwhile; a
# TRUNCATE there does not empty the hub.
#
# It waits for worker_spi_fold() on the publishers, and for the hub to catch
# up with them.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my %pub;
foreach my $name ('paris', 'tokyo')
{
	my $node = $pub{$name} =
	  new_node($name, <<EOC, allows_streaming => 'logical');
worker_spi.total_workers = 0
EOC

	# schema1 has keys that are never NULL, schema2 has one that may be.  The
	# ledger is for this test.
	my %total = (
		1 => 'PRIMARY KEY (node, page)',
		2 => 'UNIQUE NULLS NOT DISTINCT (node, page)');
	foreach my $index (1, 2)
	{
		my $not_null = $index == 1 ? 'NOT NULL' : '';
		$node->safe_psql('postgres', <<EOC);
CREATE SCHEMA schema$index;
CREATE TABLE schema$index.counted (
	value bigint NOT NULL,
	node text NOT NULL DEFAULT '$name',
	page text $not_null);
CREATE TABLE schema$index.total ($total{$index}) INHERITS (schema$index.counted);
CREATE TABLE ledger$index (value bigint, page text);
EOC
	}

	# What may be NULL is no replica identity.
	$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema2.total REPLICA IDENTITY FULL;
CREATE PUBLICATION totals FOR TABLE ONLY schema1.total, ONLY schema2.total
	WITH (publish = 'insert, update, delete');
EOC

	# Static workers, since those are there again after a restart.
	$node->append_conf('postgresql.conf', 'worker_spi.total_workers = 2');
	$node->restart;
	is( $node->safe_psql('postgres',
			'SELECT worker_spi_fold(1), worker_spi_fold(2)'),
		't|t',
		"$name: the workers have adopted the tables");
}

# Something to copy when the subscription begins.
$pub{paris}->safe_psql('postgres', <<'EOC');
INSERT INTO ledger1 VALUES (100, 'old'), (200, 'index');
INSERT INTO schema1.counted (value, page) TABLE ledger1;
SELECT worker_spi_fold(1);
INSERT INTO ledger1 VALUES (1, 'old');
INSERT INTO schema1.counted (value, page) VALUES (1, 'old');
EOC

# The hub does not even have the extension.
my $hub = PostgreSQL::Test::Cluster->new('hub');
$hub->init(allows_streaming => 'logical');
$hub->append_conf('postgresql.conf', 'wal_retrieve_retry_interval = 100ms');
$hub->start;
$hub->safe_psql('postgres', <<'EOC');
CREATE SCHEMA schema1;
CREATE TABLE schema1.total (value bigint, node text, page text, PRIMARY KEY (node, page));
CREATE SCHEMA schema2;
CREATE TABLE schema2.total (value bigint, node text, page text);
EOC
foreach my $name (sort keys %pub)
{
	my $connection = $pub{$name}->connstr . ' dbname=postgres';
	$hub->safe_psql('postgres',
		"CREATE SUBSCRIPTION $name CONNECTION '$connection' PUBLICATION totals"
	);
}
$hub->wait_for_subscription_sync;
is( $hub->safe_psql('postgres',
		'SELECT page, sum(value) FROM schema1.total GROUP BY page ORDER BY page'
	),
	"index|200\nold|100",
	'the hub begins with the totals that are there, without deltas');

# Fold what is left, let the hub catch up, and compare it with the ledgers of
# the publishers.
sub hub_is_exact
{
	my ($test) = @_;

	foreach my $name (sort keys %pub)
	{
		folds($pub{$name}, $_, "$test: worker $_ of $name folds") foreach 1, 2;

		# A worker commits asynchronously, and what is not flushed is not sent.
		$pub{$name}->safe_psql('postgres',
			"SELECT pg_logical_emit_message(true, 'flush', '')");
		$pub{$name}->wait_for_catchup($name);
	}
	foreach my $index (1, 2)
	{
		my %sum;
		my $all = 0;

		foreach my $name (keys %pub)
		{
			my $rows = $pub{$name}->safe_psql('postgres',
				"SELECT coalesce(page, 'NULL'), sum(value) FROM ledger$index GROUP BY page"
			);
			foreach my $row (split /\n/, $rows)
			{
				my ($page, $value) = split /\|/, $row;
				$sum{$page} += $value;
				$all += $value;
			}
		}
		is( $hub->safe_psql('postgres', <<EOC),
SELECT coalesce(page, 'NULL'), sum(value) FROM schema$index.total
GROUP BY page ORDER BY coalesce(page, 'NULL') COLLATE "C";
EOC
			join("\n", map { "$_|$sum{$_}" } sort keys %sum),
			"$test: each page of schema$index has the sum of the nodes");
		is( $hub->safe_psql('postgres',
				"SELECT sum(value), count(*) = count(DISTINCT (node, page)) FROM schema$index.total"
			),
			"$all|t",
			"$test: so has all of schema$index, in one total for each node and page");
	}
	return;
}

# Both count, and one of them crashes meanwhile.  What a client had not yet
# been told when the server crashed is in both the table and the ledger, or in
# neither.
my $script = <<'EOC';
\set v random(1, 1000)
\set p random(1, 20)
BEGIN;
INSERT INTO schema1.counted (value, page) VALUES (:v, 'page ' || :p);
INSERT INTO ledger1 VALUES (:v, 'page ' || :p);
INSERT INTO schema2.counted (value, page) VALUES (:v, nullif('page ' || :p, 'page 1'));
INSERT INTO ledger2 VALUES (:v, nullif('page ' || :p, 'page 1'));
END;
EOC

sub start_clients
{
	my ($node, $transactions) = @_;
	return start_pgbench($node, [ '-c', 2, '-t', $transactions ], $script);
}
my $bench_paris = start_clients($pub{paris}, 300);
my $bench_tokyo = start_clients($pub{tokyo}, 100_000);

# The crash comes when the hub has seen some of tokyo's totals.
fold_some($pub{tokyo});
$hub->poll_query_until('postgres',
	"SELECT count(*) >= 10 FROM schema2.total WHERE node = 'tokyo'")
  or die 'nothing of tokyo came';
$pub{tokyo}->stop('immediate');
ok(!(finish_psql($bench_tokyo))[2], 'the clients of tokyo are cut off by the crash');
$pub{tokyo}->start;
$bench_tokyo = start_clients($pub{tokyo}, 300);
while ($bench_paris->{run}->pumpable || $bench_tokyo->{run}->pumpable)
{
	$_->{run}->pumpable && $_->{run}->pump_nb foreach $bench_paris, $bench_tokyo;
	fold_some($_) foreach values %pub;
}
ok((finish_psql($_))[2], 'the other clients are done')
  foreach $bench_paris, $bench_tokyo;

# Make both workers fold what has been committed so far.
sub fold_some
{
	my ($node) = @_;
	$node->poll_query_until('postgres',
		"SELECT count(*) > 100 FROM ledger2")
	  or die 'nothing was counted';
	return $node->safe_psql('postgres',
		'SELECT worker_spi_fold(1) AND worker_spi_fold(2)') eq 't';
}
hub_is_exact('after a crash');
is( $hub->safe_psql('postgres',
		'SELECT node, count(*) FROM schema2.total GROUP BY node ORDER BY node'
	),
	"paris|20\ntokyo|20",
	'both have sent the totals of all pages, that of NULL among them');

# What users do to their totals.
$pub{paris}->safe_psql('postgres', <<'EOC');
DELETE FROM schema1.total WHERE page = 'old';
DELETE FROM ledger1 WHERE page = 'old';
UPDATE schema1.total SET page = 'home' WHERE page = 'index';
UPDATE ledger1 SET page = 'home' WHERE page = 'index';
UPDATE schema2.total SET page = 'new' WHERE page IS NULL;
UPDATE ledger2 SET page = 'new' WHERE page IS NULL;
UPDATE schema2.total SET value = value + 5 WHERE page = 'page 2';
INSERT INTO ledger2 VALUES (5, 'page 2');
EOC
hub_is_exact('after DELETE and UPDATE of totals');

# It would take the rows of all nodes.
$pub{paris}->safe_psql('postgres',
	'VACUUM FULL schema2.total; TRUNCATE schema1.counted');
$pub{paris}->safe_psql('postgres',
	"INSERT INTO schema1.counted (value, page) VALUES (1, 'after')");
folds($pub{paris}, 1);
$pub{paris}->safe_psql('postgres',
	"SELECT pg_logical_emit_message(true, 'flush', '')");
$pub{paris}->wait_for_catchup('paris');
is( $hub->safe_psql(
		'postgres',
		"SELECT count(*) FROM schema1.total WHERE node = 'tokyo' AND page LIKE 'page%'"
	),
	20,
	'TRUNCATE on one node leaves the totals of the others on the hub');

# Without the replica identity the server would refuse the worker's statements.
$pub{paris}->safe_psql('postgres', <<'EOC');
ALTER TABLE schema2.total REPLICA IDENTITY DEFAULT;
INSERT INTO schema2.counted (value, page) VALUES (7, 'page 2');
INSERT INTO ledger2 VALUES (7, 'page 2');
EOC
error_is($pub{paris}, 'postgres', 'SELECT worker_spi_fold(2)', '55000',
	qr/HINT:  ALTER TABLE schema2\.total REPLICA IDENTITY FULL/,
	'a published table without a replica identity is named');
$pub{paris}->safe_psql('postgres',
	'ALTER TABLE schema2.total REPLICA IDENTITY FULL');
folds($pub{paris}, 2, 'once it has one, the delta is folded that was kept');
is( $pub{paris}->safe_psql('postgres',
		'SELECT (SELECT sum(value) FROM schema2.counted) = (SELECT sum(value) FROM ledger2)'
	),
	't', 'and counted');

foreach my $node ($hub, values %pub)
{
	my @errors =
	  grep { /ERROR:/ && !/could not (connect|receive|send)|replication origin with ID \d+ is already active/ }
	  split /\n/, slurp_file($node->logfile);
	is(join("\n", grep { !/has no replica identity/ } @errors),
		'', 'no other error in the log of ' . $node->name);
	$node->stop;
}

done_testing();
