# Tables of other kinds than a worker makes: with another access method, which are
# refused, whatever the database's default; published ones, which need a replica
# identity; and unlogged ones, which are taken with a warning, and of which a crash
# takes nothing that was folded.
#
# It waits for worker_spi_fold() and worker_spi_launch().

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# A commit that nobody waits for is on disk ten seconds later.
my $node = new_node('kinds', <<'EOC');
worker_spi.total_workers = 0
wal_level = logical
wal_writer_delay = 10s
autovacuum = off
log_statement = none
EOC

sub sql
{
	my ($sql) = @_;
	return $node->safe_psql('postgres', $sql);
}

# What the hint of a failed fold says to type.
sub hint
{
	my ($ret, $out, $err) = $node->psql('postgres', 'SELECT worker_spi_fold(1)');
	return $err =~ /^HINT:  (.*)$/m ? $1 : 'none';
}

my @tables = ('counted', 'total', 'stuck');

# ------------------------------------------------------------------------
# Access methods.  The other one is the heap under another name.
# ------------------------------------------------------------------------
sql(<<'EOC');
CREATE ACCESS METHOD other TYPE TABLE HANDLER heap_tableam_handler;
ALTER DATABASE postgres SET default_table_access_method = other;
EOC
sql('SELECT worker_spi_launch(1)');
is( sql(q(SELECT string_agg(relname || ' ' || amname, ', ' ORDER BY relname) FROM pg_class AS c JOIN pg_am AS a ON a.oid = c.relam WHERE relnamespace = 'schema1'::regnamespace AND relkind = 'r')),
	'counted heap, stuck heap, total heap',
	q(a worker's tables are heaps, whatever the database's default));
sql('ALTER DATABASE postgres RESET default_table_access_method');

foreach my $table (@tables)
{
	sql(<<EOC);
ALTER TABLE schema1.$table SET ACCESS METHOD other;
INSERT INTO schema1.counted (value) VALUES (1);
EOC
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '42809',
		qr/table "postgres\.schema1\.$table" .*access method/,
		"$table with another access method is refused");
	my $hint = hint();
	is($hint, "ALTER TABLE schema1.$table SET ACCESS METHOD heap",
		'with a hint that is the command to mend it');
	sql($hint);
	folds($node, 1, "$table as a heap is folded");
}
is(rows($node, 1), 'total|3', 'and nothing was lost');

sql('CREATE SCHEMA schema2; CREATE TABLE schema2.counted (type text, value bigint) USING other');
error_is($node, 'postgres', 'SELECT worker_spi_launch(2)', '42809',
	qr/table "postgres\.schema2\.counted"/,
	'nor is one adopted');
sql('DROP SCHEMA schema2 CASCADE');

# ------------------------------------------------------------------------
# Publications
# ------------------------------------------------------------------------

# Worker 1 folds, deltas get stuck, and stuck ones are folded.
sub all_is_folded
{
	my ($test) = @_;
	my $before = total($node, 1) || 0;

	sql('INSERT INTO schema1.counted (value) VALUES (1)');
	folds($node, 1, "$test: deltas are folded");
	sql('INSERT INTO schema1.counted (value) VALUES (9223372036854775807), (1)');
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '22003', qr/./,
		"$test: what does not fit gets stuck");
	sql('INSERT INTO schema1.counted (value) VALUES (-9223372036854775807)');
	folds($node, 1, "$test: until it fits");
	is( rows($node, 1), 'total|' . ($before + 2), "$test: the count is right");
	return;
}

sql('CREATE PUBLICATION everything FOR ALL TABLES');
all_is_folded(q(a worker's own tables, FOR ALL TABLES));

# Who makes tables by hand learns what they lack.
my @made = (
	q(CREATE TABLE %t (type text NOT NULL DEFAULT 'delta', value bigint NOT NULL)),
	key => 'UNIQUE NULLS NOT DISTINCT (type)');
foreach my $publication ('ALL TABLES', 'TABLES IN SCHEMA schema1', 'TABLE schema1.counted')
{
	sql('DROP PUBLICATION everything');
	new_table($node, 1, @made);
	sql(<<EOC);
CREATE PUBLICATION everything FOR $publication;
INSERT INTO schema1.counted VALUES ('delta', 1);
EOC
	my %said;
	foreach my $n (1 .. @tables)
	{
		my $hint = hint();
		my ($table) = $hint =~ /^ALTER TABLE schema1\.(\w+) REPLICA IDENTITY FULL$/
		  or last;

		error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '55000',
			qr/table "postgres\.schema1\.$table" is published/,
			"FOR $publication: $table needs a replica identity");
		$said{$table} = 1;
		sql($hint);
	}
	is(join(' ', sort keys %said), 'counted stuck total',
		"FOR $publication: each hint is a command for the table that lacks one");
	all_is_folded("FOR $publication");
}

# What is not published need not be told apart.
sql(<<'EOC');
DROP PUBLICATION everything;
ALTER TABLE schema1.counted REPLICA IDENTITY NOTHING;
ALTER TABLE schema1.stuck REPLICA IDENTITY NOTHING;
ALTER TABLE schema1.total REPLICA IDENTITY NOTHING;
CREATE PUBLICATION everything FOR ALL TABLES WITH (publish = insert);
EOC
all_is_folded('FOR ALL TABLES, but inserts only');
sql(q(DROP PUBLICATION everything; SELECT worker_spi_stop(1); DROP SCHEMA schema1 CASCADE));

# ------------------------------------------------------------------------
# Unlogged tables: what the worker says of them, and what it makes beside them
# ------------------------------------------------------------------------

# For each table, how often the worker's process has warned since $offset.
sub warnings
{
	my ($offset, $pid) = @_;
	my $log = slurp_file($node->logfile, $offset);
	my %count;

	$count{$1}++
	  while $log =~ /\[$pid\] WARNING:  table "postgres\.schema1\.(\w+)" is unlogged\n.*DETAIL:  .*crash.*\bstandby\b/g;
	return join ' ', map { "$_:$count{$_}" } sort keys %count;
}

my $offset = -s $node->logfile;
sql('CREATE SCHEMA schema1; CREATE UNLOGGED TABLE schema1.counted (type text NOT NULL DEFAULT $$delta$$, value bigint NOT NULL)');
my $pid = sql('SELECT worker_spi_launch(1)');
is( sql(q(SELECT string_agg(relname || ' ' || relpersistence::text, ', ' ORDER BY relname) FROM pg_class WHERE relnamespace = 'schema1'::regnamespace AND relkind = 'r')),
	'counted u, stuck p, total p',
	'beside an unlogged table the worker makes logged ones');
all_is_folded('counted unlogged');
sql('COMMENT ON TABLE schema1.counted IS $$looked at again$$; ANALYZE schema1.total');
all_is_folded('and again');
is(warnings($offset, $pid), 'counted:1', 'one warning says that it is');
sql("ALTER TABLE schema1.$_ SET UNLOGGED") foreach 'total', 'stuck';
all_is_folded('all unlogged');
all_is_folded('and once more');
is(warnings($offset, $pid), 'counted:1 stuck:1 total:1', 'one for each table');
sql("ALTER TABLE schema1.$_ SET LOGGED") foreach @tables;
$offset = -s $node->logfile;
all_is_folded('all logged');
is(warnings($offset, $pid), '', 'no warning is about logged tables');

# ------------------------------------------------------------------------
# A crash takes what is in an unlogged table, and nothing that was taken out of it.
# Nobody waits for a fold's commit where it does not matter, and then it is on disk
# much later.
# ------------------------------------------------------------------------

# Crash as soon as $sql and a fold are done; the totals then.
sub total_after_crash
{
	my ($sql) = @_;

	sql("$sql; SELECT worker_spi_fold(1)");
	$node->stop('immediate');
	$offset = -s $node->logfile;
	$node->start;
	$pid = sql('SELECT worker_spi_launch(1)');
	return sql('SELECT coalesce(sum(value), 0) FROM schema1.total');
}

foreach my $round (1 .. 3)
{
	my $before = sql('ALTER TABLE schema1.counted SET UNLOGGED; SELECT worker_spi_fold(1); SELECT value FROM schema1.total')
	  =~ s/^t\n//r;

	is( total_after_crash('INSERT INTO schema1.counted (value) VALUES (10), (20), (12)'),
		$before + 42,
		"round $round: what was folded out of unlogged deltas is there after a crash");
	is(warnings($offset, $pid), 'counted:1', 'and the warning, too');
	is( total_after_crash('INSERT INTO schema1.counted (value) SELECT 1 FROM generate_series(1, 20000)'),
		$before + 20042,
		"round $round: also a larger number");

	$before += 20042;
	sql(<<'EOC');
ALTER TABLE schema1.counted SET LOGGED;
ALTER TABLE schema1.stuck SET UNLOGGED;
INSERT INTO schema1.counted (value) VALUES (9223372036854775807), (1);
EOC
	error_is($node, 'postgres', 'SELECT worker_spi_fold(1)', '22003', qr/./,
		"round $round: deltas are stuck in an unlogged table");
	is( total_after_crash('INSERT INTO schema1.counted (value) VALUES (-9223372036854775807)'),
		$before + 1,
		"round $round: and in the totals after a crash when they have been folded");
	is(warnings($offset, $pid), 'stuck:1', 'the warning is there');

	# Not in the totals, so gone.
	sql('ALTER TABLE schema1.stuck SET LOGGED; ALTER TABLE schema1.counted SET UNLOGGED');
	sql('SELECT worker_spi_stop(1); INSERT INTO schema1.counted (value) VALUES (1000)');
	$node->stop('immediate');
	$node->start;
	sql('SELECT worker_spi_launch(1)');
	folds($node, 1);
	is(rows($node, 1), 'total|' . ($before + 1),
		"round $round: what was not folded is gone");
}

ok(!$node->log_contains(qr/TRAP:|PANIC:/), 'no process has crashed');
$node->stop;
done_testing();
