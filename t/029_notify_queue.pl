# The queue of notifications is full, since a session listens and does not read:
# the worker folds all the same, says so in the log once, and notifies again when
# there is room.
#
# It needs a server whose queue can be made small, 17 or later, and waits for
# worker_spi_fold(), and for room in the queue.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('notify_queue', <<'EOC');
worker_spi.total_workers = 1
worker_spi.notify = on
EOC
if ($node->safe_psql('postgres', "SELECT current_setting('server_version_num')::int") < 170000)
{
	$node->stop;
	plan skip_all => 'a server whose queue of notifications is large';
}
$node->append_conf('postgresql.conf', 'max_notify_queue_pages = 64');
$node->restart;
is(fold($node, 1), 't', 'the worker has made its table');

my $listener = $node->background_psql('postgres');
$listener->query_safe('LISTEN anything; BEGIN; SELECT 1');
error_is(
	$node, 'postgres',
	"SELECT count(pg_notify('anything', i || repeat('x', 7000))) FROM generate_series(1, 400) AS i",
	'54000', qr/NOTIFY queue/, 'the queue is full');

my $offset = -s $node->logfile;
foreach my $total (1 .. 3)
{
	$node->safe_psql('postgres', 'INSERT INTO schema1.counted (value) VALUES (1)');
	is(fold($node, 1), 't', "fold $total succeeds");
	is(rows($node, 1), "total|$total", 'and has folded');
}
is(worker($node, 1, 'failed_count, last_error'), '0|', 'none has failed');
is( scalar(grep { /folds schema1\.counted without a notification: .*NOTIFY queue/ }
		  server_lines($node, $offset)),
	1, 'one line in the log says what is missing');

# Asking how full it is empties it of what everybody has read.
$listener->query_safe('COMMIT');
$listener->quit;
$node->poll_query_until('postgres', 'SELECT pg_notification_queue_usage() < 0.5')
  or die 'the queue stays full';
my ($ret, $out) = $node->psql('postgres', <<'EOC');
LISTEN worker_spi;
INSERT INTO schema1.counted (value) VALUES (1);
SELECT worker_spi_fold(1);
SELECT 1;
EOC
like($out, qr/payload "schema1\.counted 4"/, 'when there is room, it notifies again');

$node->stop;
done_testing();
