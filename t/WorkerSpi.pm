# What the TAP tests have in common: a server with worker_spi, and ways to ask
# its workers for what they did without ever sleeping.

package t::WorkerSpi;

use strict;
use warnings FATAL => 'all';

use Exporter 'import';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

our @EXPORT = qw(new_node error_is total wait_for_state worker);

# A started server with the extension in database postgres.  $conf is appended
# to its configuration; naptime is an hour unless it says otherwise, so that
# nothing is folded but by worker_spi_fold(), or at a worker's start.
sub new_node
{
	my ($name, $conf, %init) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init(%init);
	$node->append_conf('postgresql.conf', <<EOC . ($conf // ''));
shared_preload_libraries = 'worker_spi'
max_worker_processes = 32
worker_spi.naptime = 3600
worker_spi.restart_interval = 1
EOC
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION worker_spi');
	return $node;
}

# $sql fails with this SQLSTATE, and with a message, detail or hint like
# $pattern.
sub error_is
{
	my ($node, $db, $sql, $sqlstate, $pattern, $test, %params) = @_;
	my ($ret, $out, $err) =
	  $node->psql($db, "\\set VERBOSITY verbose\n$sql", on_error_stop => 1, %params);

	my $ok = $ret != 0 && $err =~ /ERROR:  $sqlstate: / && $err =~ $pattern;
	ok($ok, $test) or diag("wanted $sqlstate and $pattern, got: $err");
	return;
}

# The sum over a worker's table, which is the count at any time.
sub total
{
	my ($node, $index, $db) = @_;
	return $node->safe_psql($db // 'postgres',
		"SELECT sum(value) FROM schema$index.counted");
}

# One column of worker $index in the view.
sub worker
{
	my ($node, $index, $column) = @_;
	return $node->safe_psql('postgres',
		"SELECT $column FROM worker_spi_workers WHERE index = $index");
}

# Wait until worker $index is in a state.
sub wait_for_state
{
	my ($node, $index, $state) = @_;
	$node->poll_query_until('postgres',
		"SELECT state = '$state' FROM worker_spi_workers WHERE index = $index")
	  or die "worker $index did not become $state";
	return;
}

1;
