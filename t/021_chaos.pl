# Clients count without a pause, each in the tables of two workers and in a
# ledger; some UPDATE totals, take deltas back or change them.  Meanwhile faults of
# all kinds hit workers, backends, the server, tables and settings in random order.
# The second table has a thousand skewed keys, some of them NULL, whose pages are
# the same in capitals; its totals have a foreign key and a trigger that mirrors
# them.  In every snapshot both tables agree with the ledger to the last count of
# each key, and the mirror with the totals; in the end one fold of each leaves
# nothing but totals.
#
# WORKER_SPI_CHAOS_SECONDS is how long this goes on (in a minute or more each kind
# of fault comes at least once), WORKER_SPI_CHAOS_SEED repeats the order of an
# earlier run.
#
# It waits for what each fault is to bring about, in the view, the tables or
# the log, and goes on when the writers have.

use strict;
use warnings FATAL => 'all';

use IPC::Run ();
use List::Util qw(shuffle);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);
use t::WorkerSpi;

my $seconds = $ENV{WORKER_SPI_CHAOS_SECONDS} // 15;
my $seed = $ENV{WORKER_SPI_CHAOS_SEED} // int(rand(2**31));
srand($seed);
diag("chaos for $seconds s with WORKER_SPI_CHAOS_SEED=$seed");

my $node = new_node('chaos', <<EOC);
worker_spi.naptime = 1
worker_spi.total_workers = 2
max_prepared_transactions = 2
restart_after_crash = on
log_statement = none
EOC
wait_for_fold($node, $_) foreach 1, 2;

# Text that is the same in capitals: by a collation, if the server has ICU.
my $text = $node->psql('postgres', <<EOS) == 0 ? 'text COLLATE ignore_case' : 'citext';
CREATE COLLATION ignore_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)
EOS
$node->safe_psql('postgres', 'CREATE EXTENSION citext') if $text eq 'citext';

# What is moved aside while the first table is dropped counts as well.  The weight
# of a key tells it from others in a sum.
my $make_trigger = <<EOS;
CREATE TRIGGER wake AFTER INSERT ON schema1.counted EXECUTE FUNCTION worker_spi_wake();
EOS
$node->safe_psql('postgres', <<EOS);
CREATE TABLE ledger (id bigserial, worker int NOT NULL, value bigint NOT NULL, page $text, day int);
CREATE TABLE aside (value bigint NOT NULL);
CREATE TABLE days (day int PRIMARY KEY);
INSERT INTO days SELECT generate_series(1, 10);
CREATE TABLE mirror (id bigint PRIMARY KEY, page $text, day int, value bigint);
CREATE FUNCTION mirror() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	INSERT INTO public.mirror VALUES (NEW.id, NEW.page, NEW.day, NEW.value)
	ON CONFLICT (id) DO UPDATE SET value = excluded.value;
	RETURN NULL;
END
\$\$;
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE FUNCTION weight(page text, day int) RETURNS numeric LANGUAGE sql IMMUTABLE AS
	\$\$ SELECT COALESCE(substring(page COLLATE "C" FROM '[0-9]+')::int, 0) * 1000 + COALESCE(day, 0) + 1 \$\$;
CREATE ROLE regress_denied LOGIN;
$make_trigger
EOS
new_table($node, 2,
	"CREATE TABLE %t (value bigint NOT NULL, page $text, day int)",
	key => <<'EOS', total => <<'EOS');
id bigserial PRIMARY KEY,
CONSTRAINT by_key UNIQUE NULLS NOT DISTINCT (page, day),
FOREIGN KEY (day) REFERENCES days
EOS
CREATE TRIGGER mirror AFTER INSERT OR UPDATE ON %s.total
	FOR EACH ROW EXECUTE FUNCTION mirror();
ALTER TABLE %s.total ENABLE ALWAYS TRIGGER mirror;
EOS

# ------------------------------------------------------------------------
# The writers: pgbench, started again whenever it has lost all its clients.
# ------------------------------------------------------------------------

my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/count.sql", <<'EOS');
\set value random(-1000, 1000)
\set letter 80 + 32 * random(0, 1)
\set page random_zipfian(1, 100, 1.2)
\set day random(1, 10)
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', :value);
WITH inserted AS (
	INSERT INTO schema2.counted (value, page, day)
	VALUES (:value, nullif(chr(:letter) || :page, 'p3'), nullif(:day, 3)) RETURNING *
) INSERT INTO ledger (worker, value, page, day)
	SELECT 2, value, page, day FROM inserted UNION ALL SELECT 1, :value, NULL, NULL;
END;
EOS
append_to_file("$dir/update_totals.sql", <<'EOS');
\set value random(-1000, 1000)
\set page random_zipfian(1, 100, 1.2)
\set day random(1, 4)
BEGIN;
WITH updated AS (
	UPDATE schema2.total SET value = value + :value
	WHERE page = 'P:page' AND day = :day RETURNING *
) INSERT INTO ledger (worker, value, page, day) SELECT 2, :value, page, day FROM updated;
WITH updated AS (
	UPDATE schema1.total SET value = value - :value
	WHERE value BETWEEN -1e15 AND 1e15 RETURNING 1
) INSERT INTO ledger (worker, value) SELECT 1, 0 - :value FROM updated;
END;
EOS
append_to_file("$dir/change_deltas.sql", <<'EOS');
\set value random(-1000, 1000)
BEGIN;
WITH deleted AS (
	DELETE FROM ONLY schema2.counted WHERE ctid = (
		SELECT ctid FROM ONLY schema2.counted WHERE value BETWEEN -1e15 AND 1e15
		LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING *
) INSERT INTO ledger (worker, value, page, day) SELECT 2, -value, page, day FROM deleted;
WITH updated AS (
	UPDATE ONLY schema1.counted SET value = value + :value WHERE ctid = (
		SELECT ctid FROM ONLY schema1.counted WHERE value BETWEEN -1e15 AND 1e15
		LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING 1
) INSERT INTO ledger (worker, value) SELECT 1, :value FROM updated;
END;
EOS
my @scripts = map { "$dir/$_.sql" } 'count', 'update_totals', 'change_deltas';
$node->command_ok([ 'pgbench', '-n', '-t', 20, (map { ('-f', $_) } @scripts), 'postgres' ],
	'the writers write');
my @writers = map {
	IPC::Run::start(
		[
			'sh', '-c',
			'while [ -d "$1" ] && [ ! -e "$1/stop" ]; do PGAPPNAME=writer "$2" -n -R 200 -c 2 -T 1'
			  . ' -f "$5@8" -f "$6" -f "$7" -h "$3" -p "$4" postgres; done',
			'writer', $dir, $node->installed_command('pgbench'),
			$node->host, $node->port, @scripts
		],
		'<', \undef, '>', '/dev/null', '2>', '/dev/null')
} 1 .. 2;

# ------------------------------------------------------------------------
# What is true at all times.
# ------------------------------------------------------------------------

my $snapshots = 0;
my @wrong;

# Compare the tables with the ledger, in one snapshot; returns how far the
# ledger has got.
sub compare
{
	my $row = $node->safe_psql('postgres', <<EOS);
SELECT COALESCE((SELECT sum(value) FROM (TABLE aside UNION ALL SELECT value FROM schema1.counted) AS a), 0),
	COALESCE((SELECT sum(value) FROM ledger WHERE worker = 1), 0),
	COALESCE((SELECT sum(value * weight(page, day)) FROM schema2.counted), 0),
	COALESCE((SELECT sum(value * weight(page, day)) FROM ledger WHERE worker = 2), 0),
	COALESCE((SELECT sum(value * weight(page, day)) FROM mirror), 0),
	COALESCE((SELECT sum(value * weight(page, day)) FROM schema2.total), 0),
	(SELECT last_value FROM ledger_id_seq)
EOS
	my ($one, $ledger1, $two, $ledger2, $mirror, $totals, $last) = split /\|/, $row;

	$snapshots++;
	push @wrong, $row if $one ne $ledger1 || $two ne $ledger2 || $mirror ne $totals;
	return $last;
}

# Let the writers go on for a while, and look all the time.  A crash leaves a
# gap of up to 32 in the sequence.
sub let_write
{
	my $enough = compare() + 50 + int(rand(100));
	my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;

	do { die 'the writers do not get on' if time > $deadline } while (compare() < $enough);
	return 1;
}

sub run { return $node->safe_psql('postgres', $_[0]); }

# Commands in one transaction, in which nobody else changes this table.
sub alone
{
	my ($table, $sql) = @_;
	return "BEGIN; LOCK TABLE $table IN ACCESS EXCLUSIVE MODE;\n$sql;\nCOMMIT;\n";
}

# The process of a worker, the first if not said, as soon as there is one.
sub worker_pid
{
	my $index = $_[0] // 1;

	$node->poll_query_until('postgres',
		"SELECT pid IS NOT NULL FROM worker_spi_workers WHERE index = $index")
	  or die 'the worker does not come back';
	return worker($node, $index, 'pid');
}

# The SQLSTATE with which a fold of this worker fails, if it does.
sub fold_error
{
	my ($index) = @_;

	worker_pid($index);
	my (undef, undef, $err) = $node->psql('postgres',
		"\\set VERBOSITY verbose\nSELECT worker_spi_fold($index)");
	return $err =~ /ERROR:  (\w{5}):/ ? $1 : '';
}

sub folds_at_last
{
	return $node->poll_query_until('postgres', "SELECT worker_spi_fold($_[0])")
	  || die "worker $_[0] does not fold";
}

# Insert deltas into the second table, and into the ledger.
sub insert_deltas
{
	my ($values) = @_;

	return run(<<EOS);
BEGIN READ WRITE;
WITH inserted AS (INSERT INTO schema2.counted (value, page, day) $values RETURNING *)
INSERT INTO ledger (worker, value, page, day) SELECT 2, value, page, day FROM inserted;
COMMIT;
EOS
}

sub restart { $node->stop($_[0]); $node->start; return 1; }

# Change a setting, let everybody see it, do something and take it back.
sub with_setting
{
	my ($name, $value, $between) = @_;

	run("ALTER SYSTEM SET $name = $value; SELECT pg_reload_conf()");
	$node->poll_query_until('postgres',
		"SELECT setting = '$value' FROM pg_settings WHERE name = '$name'")
	  or die "$name does not change";
	my $hit = $between->();
	run("ALTER SYSTEM RESET $name; SELECT pg_reload_conf()");
	return $hit;
}

# ------------------------------------------------------------------------
# The faults.  Each returns whether it has hit what it was to hit.
# ------------------------------------------------------------------------

# Commands that a fold has to live with; the writers go on between them.
my %commands = (
	'table altered' => ['ALTER TABLE schema1.counted ALTER value TYPE bigint USING value + 0'],
	'measure added and dropped' => [
		'ALTER TABLE schema2.counted ADD hits bigint NOT NULL DEFAULT 0',
		'ALTER TABLE schema2.counted DROP hits'
	],
	'index made and dropped concurrently' => [
		'CREATE INDEX CONCURRENTLY another ON schema2.total (value)',
		'DROP INDEX CONCURRENTLY schema2.another'
	],
	'indexes of the keys rebuilt' => [
		'REINDEX INDEX CONCURRENTLY schema2.by_key',
		'REINDEX INDEX CONCURRENTLY schema1.total_pkey'
	],
	'extension dropped' =>
	  [ 'DROP EXTENSION worker_spi CASCADE', "CREATE EXTENSION worker_spi; $make_trigger" ],
	'deltas truncated' => [ alone('ONLY schema2.counted', <<EOS) ],
INSERT INTO ledger (worker, value, page, day) SELECT 2, -value, page, day FROM ONLY schema2.counted;
TRUNCATE ONLY schema2.counted
EOS
	'schema dropped, and made again at once' => [ alone('schema1.counted', <<EOS) ]);
CREATE TEMP TABLE kept ON COMMIT DROP AS SELECT value FROM schema1.counted;
DROP SCHEMA schema1 CASCADE;
CREATE SCHEMA schema1;
CREATE TABLE schema1.counted (type text, value bigint);
CREATE TABLE schema1.total (PRIMARY KEY (type)) INHERITS (schema1.counted);
CREATE TABLE schema1.stuck (sqlstate text, reason text, since timestamptz) INHERITS (schema1.counted);
INSERT INTO schema1.counted SELECT 'delta', value FROM kept;
$make_trigger
EOS
foreach my $table ('counted', 'total', 'stuck')
{
	$commands{"VACUUM FULL of $table"} = [ map { "VACUUM FULL schema$_.$table" } 1, 2 ];
	$commands{"CLUSTER of $table"} = [ map { alone("ONLY schema$_.$table", <<EOS) } 1, 2 ];
CREATE INDEX by_value ON schema$_.$table (value);
CLUSTER schema$_.$table USING by_value;
DROP INDEX schema$_.by_value
EOS
}

# What a fold of a worker fails with after a command, and what mends it.
my %refusals = (
	'keys refused' => [
		2, '23514',
		'ALTER TABLE schema2.total ADD CONSTRAINT refused CHECK (day <> 7) NOT VALID',
		'ALTER TABLE schema2.total DROP CONSTRAINT refused'
	],
	'trigger that a fold would fire' => [
		1, '42809',
		'CREATE TRIGGER ordinary AFTER DELETE ON schema1.counted EXECUTE FUNCTION nothing()',
		'DROP TRIGGER ordinary ON schema1.counted'
	],
	'trigger that fails' =>
	  [ 2, '42P01', 'ALTER TABLE mirror RENAME TO away', 'ALTER TABLE away RENAME TO mirror' ],
	'index of the keys dropped' => [
		2, '42P16',
		'ALTER TABLE schema2.total DROP CONSTRAINT by_key',
		'ALTER TABLE schema2.total ADD CONSTRAINT by_key UNIQUE NULLS NOT DISTINCT (page, day)'
	],
	'column added that is neither key nor measure' => [
		2, '42P16',
		'ALTER TABLE schema2.counted ADD other text',
		'ALTER TABLE schema2.counted DROP other'
	],
	'schema renamed away and back' => [
		1, '42P01', 'ALTER SCHEMA schema1 RENAME TO away', 'ALTER SCHEMA away RENAME TO schema1'
	],
	'schema dropped, and made by a launch' => [ 1, '42P01', alone('schema1.counted', <<EOS), <<EOS ]);
INSERT INTO aside SELECT value FROM schema1.counted;
DROP SCHEMA schema1 CASCADE
EOS
SELECT worker_spi_stop(1);
SELECT worker_spi_launch(1);
$make_trigger
WITH back AS (DELETE FROM aside RETURNING value)
INSERT INTO schema1.counted SELECT 'delta', value FROM back;
EOS

my %settings = (
	'worker_spi.naptime' => 3, 'worker_spi.log_folds' => 'off',
	'worker_spi.notify' => 'on', 'worker_spi.wake_delay' => 0);

sub survive_commands
{
	foreach my $command (@_) { run($command); let_write(); }
	return 1;
}

sub survive_refusal
{
	my ($index, $sqlstate, $command, $mend) = @_;

	run($command);
	insert_deltas("VALUES (1, 'p1', 7)");
	my $hit = fold_error($index) eq $sqlstate;
	run($mend);
	return $hit;
}

# Cancel the first worker while it folds, up to so often; the log has to tell of it.
sub cancel
{
	my ($times) = @_;
	my $pid = worker_pid();
	my $offset = -s $node->logfile;

	$node->psql('postgres', <<EOS);
DO \$\$ DECLARE cancels int := 0; BEGIN FOR i IN 1 .. 5000 LOOP
		PERFORM worker_spi_fold(1, wait => false);
		COMMIT;
		cancels := cancels + (SELECT count(*) FROM pg_stat_activity WHERE pid = $pid
			AND CASE WHEN state = 'active' THEN pg_cancel_backend(pid) END);
		EXIT WHEN cancels >= $times;
END LOOP; END \$\$
EOS
	return $node->log_contains(qr/\[$pid\] ERROR:  canceling statement due to user/, $offset);
}

my %faults = (
	(map { my $name = $_; $name => sub { survive_commands(@{ $commands{$name} }) } } keys %commands),
	(map { my $name = $_; $name => sub { survive_refusal(@{ $refusals{$name} }) } } keys %refusals),
	(map { my $name = $_; "$name changed" => sub { with_setting($name, $settings{$name}, \&let_write) } }
		keys %settings),
	'worker terminated' =>
	  sub { return run('SELECT pg_terminate_backend(' . worker_pid() . ')') eq 't'; },
	'worker cancelled' => sub { return cancel(5); },
	'worker cancelled in a burst' => sub { return cancel(50); },
	'worker stopped and launched' => sub {
		return 0 unless run('SELECT worker_spi_stop(2)') eq 't';
		let_write();
		return run('SELECT worker_spi_launch(2)') > 0;
	},
	'database commands denied' => sub {
		$node->psql('template1', 'ALTER DATABASE postgres RENAME TO taken;' x 200,
			on_error_stop => 0, extra_params => [ '-U', 'regress_denied' ]);
		return 1;
	},

	# Until somebody has met it.  The locks are released before the session ends:
	# psql does not wait for its server process.
	'lock table full' => sub {
		my $offset = -s $node->logfile;
		$node->psql('postgres', <<EOS);
DO \$\$
BEGIN
	PERFORM pg_advisory_lock(i) FROM generate_series(1, 1000000) AS i;
EXCEPTION WHEN out_of_memory THEN
	PERFORM pg_sleep(0.2);
END \$\$;
SELECT pg_advisory_unlock_all();
EOS
		return slurp_file($node->logfile, $offset) =~ /out of shared memory/;
	},
	'worker killed' => sub { return crash($node, worker_pid()); },

	# The youngest, which is not about to end anyway.
	'client process killed' => sub {
		return crash($node, run(q(SELECT pid FROM pg_stat_activity
			WHERE application_name = 'writer' ORDER BY backend_start DESC LIMIT 1)));
	},
	'all clients terminated' => sub {
		return run(q(SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
			WHERE application_name = 'writer')) > 0;
	},
	'server restarted, fast' => sub { return restart('fast'); },
	'server restarted, immediate' => sub { return restart('immediate'); },

	# Deltas that cannot be folded until something cures them.  What overflows
	# leaves room: the sum of what is stuck has to fit again, not only the total.
	'overflow' => sub {
		my $put = <<EOS;
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', %1);
INSERT INTO schema2.counted VALUES (%1, 'p200');
INSERT INTO ledger (worker, value, page) VALUES (1, %1, NULL), (2, %1, 'p200');
COMMIT;
EOS
		run($put =~ s/%1/9000000000000000000/gr) foreach 1, 2;
		let_write();
		my @errors = map { fold_error($_) } 1, 2;
		run($put =~ s/%1/-9000000000000000000/gr) foreach 1, 2;
		folds_at_last($_) foreach 1, 2;
		return "@errors" eq '22003 22003';
	},
	'key without a parent' => sub {
		my $day = run('SELECT max(day) + 1 FROM (SELECT day FROM days UNION SELECT day FROM ledger) AS d');

		insert_deltas("VALUES (3, 'p1', $day), (4, 'P1', $day)");
		my $error = fold_error(2);
		let_write();
		run(rand() < 0.5 ? "INSERT INTO days VALUES ($day)" : alone('schema2.counted', <<EOS));
WITH gone AS (DELETE FROM schema2.counted WHERE day = $day RETURNING *)
INSERT INTO ledger (worker, value, page, day) SELECT 2, -value, page, day FROM gone
EOS
		return $error eq '23503';
	},
	'key too long' => sub {
		insert_deltas(q(SELECT 3, 'p1 ' || string_agg(md5(i::text), ''), 1 FROM generate_series(1, 300) AS i));
		my $error = fold_error(2);
		let_write();
		run(alone('schema2.counted', <<EOS));
UPDATE schema2.counted SET page = 'p1' WHERE length(page::text) > 1000;
UPDATE ledger SET page = 'p1' WHERE length(page::text) > 1000
EOS
		return $error eq '54000';
	},

	# Until the worker or a client has run into it.
	'table locked' => sub {
		my (undef, $out) = $node->psql('postgres', <<EOS);
DO \$\$
BEGIN
	LOCK TABLE schema1.counted;
	PERFORM worker_spi_fold(1, wait => false);
	WHILE NOT EXISTS (SELECT FROM pg_locks
		WHERE relation = 'schema1.counted'::regclass AND NOT granted) LOOP END LOOP;
END \$\$;
SELECT 'waits'
EOS
		return $out eq 'waits';
	},

	# A total and deltas of the first table are held by it; the second has a delta
	# for each total that is.
	'transaction prepared' => sub {
		run(<<EOS);
BEGIN;
INSERT INTO schema1.counted VALUES ('delta', 5);
INSERT INTO schema2.counted (value, page, day) VALUES (5, 'p5', 5);
INSERT INTO ledger (worker, value, page, day) VALUES (1, 5, NULL, NULL), (2, 5, 'p5', 5);
WITH gone AS (DELETE FROM ONLY schema1.counted RETURNING value)
INSERT INTO ledger (worker, value) SELECT 1, -value FROM gone;
WITH updated AS (UPDATE schema2.total SET value = value + 5 WHERE day = 5 RETURNING *)
INSERT INTO ledger (worker, value, page, day) SELECT 2, 5, page, day FROM updated;
PREPARE TRANSACTION 'held';
EOS
		insert_deltas('SELECT 1, page, day FROM schema2.total WHERE day = 5');
		my $hit = fold_error(2) eq '55P03';
		restart('immediate') if rand() < 0.5;
		let_write();
		run((rand() < 0.5 ? 'COMMIT' : 'ROLLBACK') . " PREPARED 'held'");
		return $hit;
	},

	# One delta gets there all the same, and cannot be folded.
	'everything read-only' => sub {
		return with_setting('default_transaction_read_only', 'on', sub {
			insert_deltas("VALUES (1, 'p1', 7)");
			return fold_error(2) eq '25006';
		});
	});

# ------------------------------------------------------------------------
# Chaos, and order after it.
# ------------------------------------------------------------------------

my $long = $seconds >= 60;
my %survived = map { $_ => 0 } keys %faults;
my %tried;
my $end = time + $seconds;
my @deck;

let_write();
while (time < $end || ($long && grep { $_ == 0 } values %survived))
{
	@deck = shuffle(sort keys %faults) unless @deck;
	my $fault = shift @deck;

	my $hit = $faults{$fault}->();
	note($fault . ($hit ? '' : ', and missed'));
	let_write();
	$survived{$fault}++ if $hit;
	last if ++$tried{$fault} > 5 && !$survived{$fault};
}

append_to_file("$dir/stop", '');
$_->finish foreach @writers;
folds_at_last($_) foreach 1, 2;

diag("survived $survived{$_} times: $_") foreach sort keys %survived;
diag("compared $snapshots snapshots, " . compare() . ' entries of the ledger');
is(join(', ', grep { $survived{$_} == 0 } sort keys %survived), '', 'each fault has hit')
  if $long;
is("@wrong", '', 'the tables agreed with the ledger, and the mirror with the totals, in each snapshot');
is( rows($node, 1),
	'total|' . run('SELECT sum(value) FROM ledger WHERE worker = 1'),
	'in the end nothing is left of the first table but the total, and it is that of the ledger');

# A key may have a total of 0, or none, if its deltas were taken back in time.
my ($ledger, $total) =
  map { "SELECT page, day, sum(value) FROM $_ GROUP BY page, day HAVING sum(value) <> 0" }
  'ledger WHERE worker = 2', 'ONLY schema2.total';
is( run(<<EOS), '0|0|0|0', 'nor of the second but a total for each key, those of the ledger');
SELECT (SELECT count(*) FROM ONLY schema2.counted), (SELECT count(*) FROM schema2.stuck),
	(SELECT count(*) FROM ($ledger EXCEPT ALL $total) AS missing),
	(SELECT count(*) FROM ($total EXCEPT ALL $ledger) AS wrong)
EOS
ok( !$node->log_contains(qr/TRAP:|PANIC:|terminated by signal (?!9)/),
	'no process has crashed but those that were killed');

$node->stop;
done_testing();
