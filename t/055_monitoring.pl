# What is in monitoring/: the collector finds each state of a worker, as the role
# that the README makes for it, and gives numbers that the alerts go by; the alerts
# name metrics that are there, how bad it is, and what to do.  (dev/lint has
# Prometheus' own tool read the alerts and play their cases.)
#
# It waits for states in the view.

use strict;
use warnings FATAL => 'all';

use CPAN::Meta::YAML;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# ------------------------------------------------------------------------
# What the files say
# ------------------------------------------------------------------------
my $collector = CPAN::Meta::YAML->read('monitoring/worker_spi.collector.yml')->[0];
my $rules = CPAN::Meta::YAML->read('monitoring/worker_spi.rules.yml')->[0];

is($collector->{collector_name}, 'worker_spi', 'the collector has a name');
my ($query) = @{ $collector->{queries} };
is(scalar(@{ $collector->{queries} }), 1, 'and one query');
my %metric = map { $_->{metric_name} => $_ } @{ $collector->{metrics} };
foreach my $name (sort keys %metric)
{
	my $metric = $metric{$name};

	is("$metric->{query_ref} @{ $metric->{key_labels} }",
		"$query->{query_name} database index kind", "$name comes from it");
	is($metric->{type}, $name =~ /_total$/ ? 'counter' : 'gauge', "$name has the type of its name");
	like($metric->{help}, qr/^[A-Z].*\.$/, "$name is explained");
}

foreach my $rule (map { @{ $_->{rules} } } @{ $rules->{groups} })
{
	my ($name, $text) = ($rule->{alert}, $rule->{annotations});

	is(join(' ', grep { !$metric{$_} } $rule->{expr} =~ /\b(worker_spi_\w+)/g),
		'', "$name goes by metrics that are there");
	like($rule->{labels}{severity}, qr/^(?:warning|critical)$/, "$name says how bad it is");
	like($text->{summary}, qr/\{\{ \$labels\.index \}\}.*\{\{ \$labels\.database \}\}/,
		"$name says which worker it is");
	like($text->{action}, qr/^[A-Z].*\.$/, "$name says what to do");
}

# ------------------------------------------------------------------------
# What the query gives
# ------------------------------------------------------------------------
my $node = new_node('monitoring', <<'EOC');
worker_spi.total_workers = 3
worker_spi.restart_interval = 3600
EOC
$node->safe_psql('postgres', 'CREATE ROLE monitor LOGIN IN ROLE pg_read_all_stats');

# One value of a worker; those of the alerts are to be true or false.
sub value
{
	my ($index, $value) = @_;
	return $node->safe_psql('postgres',
		"SELECT $value FROM ($query->{query}) AS w WHERE index = '$index'",
		extra_params => [ '-U', 'monitor' ]);
}
my $alerts = 'up = 0, late_seconds > 60, backoff_seconds > 10, stuck_rows > 0';

# Each worker has each metric.
sub all_have_values
{
	my ($test) = @_;
	my $columns = join ' AND ',
	  map { "w.$_ IS NOT NULL" } map { (@{ $_->{key_labels} }, @{ $_->{values} }) } values %metric;
	my $values = join ' AND ', map { "w.$_->{values}[0]::float8 BETWEEN -1e9 AND 1e9" } values %metric;
	is( $node->safe_psql('postgres',
			"SELECT bool_and($columns AND $values) FROM ($query->{query}) AS w",
			extra_params => [ '-U', 'monitor' ]),
		't',
		"every metric has a value: $test");
	return;
}

wait_for_state($node, $_, 'idle') foreach 1 .. 3;
is(value($_, $alerts), 'f|f|f|f', "worker $_, which is idle, alerts nobody") foreach 1 .. 3;
all_have_values('idle');

$node->safe_psql('postgres', 'INSERT INTO schema1.counted (value) VALUES (1), (2)');
folds($node, 1);
is(value(1, 'folded_rows, restart_count, failed_count'), '2|0|0', 'what was done is counted');

$node->safe_psql('postgres', 'SELECT worker_spi_stop(1)');
is(value(1, $alerts), 't|f|f|f', 'a worker that is stopped has no process');
all_have_values('stopped');

$node->safe_psql('postgres', 'SELECT pg_terminate_backend(pid) FROM worker_spi_workers WHERE index = 2');
wait_for_state($node, 2, 'down');
is(value(2, $alerts), 't|f|f|f', 'nor has one that is down');
all_have_values('down');

$node->safe_psql('postgres', "INSERT INTO schema3.counted (value) VALUES (9223372036854775807), (1)");
error_is($node, 'postgres', 'SELECT worker_spi_fold(3)', '22003', qr/./, 'some deltas are stuck');
is(value(3, $alerts), 'f|f|f|t', 'which is what the worker alerts of');
$node->safe_psql('postgres', 'TRUNCATE schema3.counted');
folds($node, 3, 'until nothing is stuck');

$node->safe_psql('postgres', 'ALTER TABLE schema3.counted RENAME TO away');
error_is($node, 'postgres', 'SELECT worker_spi_fold(3)', '42P01', qr/./, 'a table is missing');
is(value(3, $alerts), 'f|f|f|f', 'one failed cycle alerts nobody');
foreach (2 .. 6)
{
	my ($ret) = $node->psql('postgres', 'SELECT worker_spi_fold(3)');
	die 'the fold did not fail' if $ret == 0;
}
is(value(3, $alerts), 'f|f|t|f', 'six in a row do');
all_have_values('backoff');

$node->safe_psql('postgres', 'CREATE DATABASE late');
$node->append_conf('postgresql.conf', "worker_spi.database = 'postgres, late'");
$node->reload;
$node->poll_query_until('postgres',
	"SELECT count(*) = 3 FROM worker_spi_workers WHERE state = 'missing'")
  or die 'no worker is missing';
is( $node->safe_psql('postgres',
		"SELECT $alerts FROM ($query->{query}) AS w WHERE database = 'late'"),
	join("\n", ('t|f|f|f') x 3),
	'workers that are missing have no process');
all_have_values('missing');

$node->stop;
done_testing();
