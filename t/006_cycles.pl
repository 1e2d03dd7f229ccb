# Cycles that do not go straight through: one that loses against another
# transaction, or fails, after it has committed a part; one whose trigger asks
# for itself; and a worker whose errors are not for the log.
#
# It waits for worker_spi_fold() alone.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $node = new_node('cycles', <<EOC);
worker_spi.total_workers = 1
worker_spi.notify = on
EOC
fold($node, 1);

# The second transaction of a fold fails with this SQLSTATE: once, or "= 2", or
# with all that come after it, ">= 2".  A sequence counts what is rolled back,
# too.  The deltas have long types, so that they are on 2000 pages: a process
# that is new to the table takes half of them at once.
sub fail_second_transaction
{
	my ($sqlstate, $which) = @_;

	$node->safe_psql('postgres', <<EOQ);
DROP SEQUENCE IF EXISTS transactions;
CREATE SEQUENCE transactions;
GRANT ALL ON transactions TO PUBLIC;
CREATE OR REPLACE FUNCTION fail_second() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	IF nextval('public.transactions') $which THEN
		RAISE 'second transaction' USING ERRCODE = '$sqlstate';
	END IF;
	RETURN NULL;
END
\$\$;
DROP TRIGGER IF EXISTS fail_second ON schema1.counted;
CREATE TRIGGER fail_second AFTER DELETE ON schema1.counted
	EXECUTE FUNCTION fail_second();
ALTER TABLE schema1.counted ENABLE ALWAYS TRIGGER fail_second;
TRUNCATE ONLY schema1.counted;
INSERT INTO schema1.counted SELECT repeat('x', 1500), 1 FROM generate_series(1, 10000);
EOQ
	return;
}

# What the log says of counts since $offset.
sub counts_in_log
{
	my ($offset) = @_;
	my $log = substr slurp_file($node->logfile), $offset;
	return join ', ', $log =~ /LOG:  worker_spi worker 1: (count .*)/g;
}

# ------------------------------------------------------------------------
# Lost against another transaction: the retry is part of the cycle.
# ------------------------------------------------------------------------
fail_second_transaction('40001', '= 2');
my $offset = -s $node->logfile;
my ($ret, $out, $err) = $node->psql('postgres',
	"LISTEN worker_spi;\nSELECT worker_spi_fold(1);\nSELECT 1;");
is($ret, 0, 'a cycle whose second transaction has to be tried again succeeds');
my @notified = $out =~ /payload "(.*?)"/g;
like(
	"@notified",
	qr/^schema1\.counted \d+ schema1\.counted 10000$/,
	'it notifies once for each transaction that goes through');
is(counts_in_log($offset), 'count in postgres.schema1.counted is now 10000',
	'it logs once');
is(worker($node, 1, "concat_ws(' ', fold_count, folded_rows, failed_count)"),
	'1 10000 0', 'it counts as one, with the rows of both tries');

# ------------------------------------------------------------------------
# Failed: what was committed before is folded, notified, logged and counted.
# ------------------------------------------------------------------------
# Another process, which knows no more than the first how much it can do at once.
my $pid = worker($node, 1, 'pid');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
wait_for_restart($node, 1, $pid);
fail_second_transaction('58030', '>= 2');
$offset = -s $node->logfile;
($ret, $out, $err) = $node->psql('postgres',
	"LISTEN worker_spi;\nSELECT worker_spi_fold(1);\nSELECT 1;");
like($err, qr/ERROR:  second transaction/, 'a cycle fails in its second transaction');
my $total = $node->safe_psql('postgres', 'SELECT value FROM schema1.total');
cmp_ok($total, '>', 10000, 'its first transaction has folded a part');
is(total($node, 1), '20000', 'the sum is right');
@notified = $out =~ /payload "(.*?)"/g;
is("@notified", "schema1.counted $total", 'it notifies of that part');
is(counts_in_log($offset), "count in postgres.schema1.counted is now $total",
	'the log tells of that part');
is(worker($node, 1, "concat_ws(' ', fold_count, folded_rows, failed_count > 0)"),
	"2 $total t", 'and so does the view');

# The worker may try again at any time.
($ret, $out, $err) = $node->psql('postgres', <<'EOQ');
LISTEN worker_spi;
BEGIN;
DROP TRIGGER fail_second ON schema1.counted;
DELETE FROM ONLY schema1.counted;
COMMIT;
SELECT worker_spi_fold(1);
SELECT 1;
EOQ
is($ret, 0, 'the next cycle has nothing to fold');
unlike($out, qr/payload/, 'and notifies nobody');

# ------------------------------------------------------------------------
# A trigger that asks for the fold it is part of would wait for ever.
# ------------------------------------------------------------------------
$node->safe_psql('postgres', <<'EOQ');
CREATE FUNCTION ask() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN PERFORM public.worker_spi_fold(1); RETURN NULL; END';
CREATE TRIGGER ask AFTER DELETE ON schema1.counted EXECUTE FUNCTION ask();
ALTER TABLE schema1.counted ENABLE ALWAYS TRIGGER ask;
INSERT INTO schema1.counted VALUES ('delta', 1);
EOQ
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '55000',
	qr/worker/,
	'a trigger cannot wait for the fold that has fired it');
$node->safe_psql('postgres', 'DROP TRIGGER ask ON schema1.counted');
folds($node, 1, 'without it, folding goes on');

# ------------------------------------------------------------------------
# Tables made anew with a column that is no key: the statements of those before
# are not run on them.
# ------------------------------------------------------------------------
new_table($node, 1, 'CREATE TABLE %t (type text, value bigint, place text)');
$node->safe_psql('postgres', "INSERT INTO schema1.counted VALUES ('delta', 1)");
error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42P16',
	qr/HINT:.*ADD UNIQUE NULLS NOT DISTINCT \(place\)/s,
	"$_ error is that of the new table")
  foreach ('the first', 'the second');

# ------------------------------------------------------------------------
# The launcher gets its worker's error whatever is logged.
# ------------------------------------------------------------------------
$node->safe_psql('postgres', 'CREATE ROLE regress_nologin');
$node->append_conf('postgresql.conf', 'log_min_messages = panic');
$node->restart;
error_is($node, 'postgres',
	"SELECT worker_spi_launch(7, 0, 'regress_nologin'::regrole)",
	'28000', qr/role "regress_nologin" is not permitted to log in/,
	'the error of a worker reaches the launcher if only panics are logged');

$node->stop;
done_testing();
