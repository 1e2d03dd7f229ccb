# The queue of notifications is full, since a session listens and does not read:
# the worker folds all the same, says so in the log once, and notifies again when
# there is room.  A share whose notification finds no room is rolled back and done
# again, and what it had found out, say that a key is stuck, is found out again.
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
worker_spi.total_workers = 2
worker_spi.notify = on
EOC
if ($node->safe_psql('postgres', "SELECT current_setting('server_version_num')::int") < 170000)
{
	$node->stop;
	plan skip_all => 'a server whose queue of notifications is large';
}
$node->append_conf('postgresql.conf', 'max_notify_queue_pages = 64');
$node->restart;
folds($node, $_, "worker $_ has made its tables") for (1 .. 2);

# Worker 2 has keys, one of which is refused.
new_table(
	$node, 2,
	'CREATE TABLE %t (page text NOT NULL, value bigint NOT NULL)',
	key => 'PRIMARY KEY (page)',
	total => q(ALTER TABLE %s.total ADD CONSTRAINT refused CHECK (page <> 'bad')));
folds($node, 2);

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
	folds($node, 1, "fold $total succeeds");
	is(rows($node, 1), "total|$total", 'and has folded');
}
is(worker($node, 1, 'failed_count, last_error'), '0|', 'none has failed');
is( scalar(grep { /folds postgres\.schema1\.counted without a notification: .*NOTIFY queue/ }
		  server_lines($node, $offset)),
	1, 'one line in the log says what is missing');

# ------------------------------------------------------------------------
# One key is stuck, and nothing can be told
# ------------------------------------------------------------------------

# What the tables say, and what the view says of them.
sub stuck_is
{
	my ($expected, $test) = @_;
	is( $node->safe_psql(
			'postgres', <<'EOC'),
SELECT (SELECT string_agg(page || '=' || value, ' ' ORDER BY page) FROM schema2.total),
	(SELECT count(*) FROM ONLY schema2.counted),
	(SELECT string_agg(page || '=' || value || ' ' || sqlstate, ' ') FROM schema2.stuck),
	stuck_rows
FROM worker_spi_workers WHERE index = 2
EOC
		$expected, $test);
	return;
}

$offset = -s $node->logfile;
$node->safe_psql('postgres',
	"INSERT INTO schema2.counted VALUES ('bad', 1), ('good', 2), ('bad', 3), ('fine', 4)");
error_is($node, 'postgres', 'SELECT worker_spi_fold(2)', '23514', qr/"refused"/,
	'a fold says that a key is stuck, though it cannot notify');
stuck_is('fine=4 good=2|0|bad=4 23514|1', 'and that key is in stuck, all else in the totals');
$node->safe_psql('postgres',
	"INSERT INTO schema2.counted VALUES ('bad', 5), ('good', 6)");
error_is($node, 'postgres', 'SELECT worker_spi_fold(2)', '23514', qr/"refused"/,
	'it is not forgotten by the next fold');
stuck_is('fine=4 good=8|0|bad=9 23514|1', 'which folds all else, and lets the key grow');
my @lines = server_lines($node, $offset);
is(scalar(grep { /key \(bad\) of postgres\.schema2\.counted is stuck: .*23514/ } @lines),
	1, 'the log names the key once');
is(scalar(grep { /folds postgres\.schema2\.counted without a notification/ } @lines),
	1, 'and says once that notifications are missing');
$node->safe_psql('postgres', 'ALTER TABLE schema2.total DROP CONSTRAINT refused');
folds($node, 2, 'without its cause, it is folded');
stuck_is('bad=9 fine=4 good=8|0||0', 'and nothing is left in stuck');
is(scalar(grep { /key \(bad\) of postgres\.schema2\.counted is no longer stuck/ } server_lines($node, $offset)),
	1, 'which the log says once');
is(worker($node, 2, 'failed_count'), '0', 'no cycle has failed');

# ------------------------------------------------------------------------
# Room again
# ------------------------------------------------------------------------

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
