# What a database's owner may SET, and what code of a table may leave behind in
# the session, does a worker no harm: every setting that an ordinary role may
# change, with odd values, alone and all at once; settings and advisory locks
# left by a CHECK function; errors that look like those of a connection.  And a
# clock that is set back.
#
# By default a random choice of the settings is tried, with one value each.
# WORKER_SPI_SETTINGS=all tries every value of each, and WORKER_SPI_SETTINGS_SEED
# repeats an earlier choice.
#
# It waits for worker_spi_fold(), for states in the view and, with the clock set
# back, for the worker's own folds.

use strict;
use warnings FATAL => 'all';

use File::Spec ();
use List::Util qw(shuffle);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

my $all = ($ENV{WORKER_SPI_SETTINGS} // '') eq 'all';
my $seed = $ENV{WORKER_SPI_SETTINGS_SEED} // int(rand(2**31));
srand($seed);
diag("settings with WORKER_SPI_SETTINGS_SEED=$seed");

my $node = new_node('settings', <<'EOC');
worker_spi.total_workers = 0
log_statement = none
autovacuum = off
EOC
$node->safe_psql('postgres', <<'EOC');
CREATE ROLE alice LOGIN;
GRANT pg_read_all_stats TO alice;
EOC
$node->safe_psql('postgres', 'CREATE DATABASE owned OWNER alice');
$node->safe_psql('owned', <<'EOC');
CREATE EXTENSION worker_spi;
CREATE ACCESS METHOD other TYPE TABLE HANDLER heap_tableam_handler;
-- RESET ALL stops at the settings of a transaction, on 19 and later.
CREATE FUNCTION reset_all() RETURNS void LANGUAGE sql SECURITY DEFINER
AS 'DELETE FROM pg_db_role_setting';
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO alice;
EOC

sub as_alice
{
	return $node->safe_psql('owned', $_[0], extra_params => [ '-U', 'alice' ]);
}

# ------------------------------------------------------------------------
# Every setting
# ------------------------------------------------------------------------

# Strings that mean something, and would be in the worker's way if they did.
my %strings = (
	search_path => [ 'public, pg_catalog', '""', 'nowhere' ],
	role => [ 'none', 'alice' ],
	session_authorization => ['alice'],
	client_encoding => [ 'LATIN1', 'SJIS', 'SQL_ASCII' ],
	DateStyle => [ 'German', 'SQL, DMY' ],
	TimeZone => [ 'Pacific/Kiritimati', '-12' ],
	timezone_abbreviations => ['India'],
	default_table_access_method => [ 'heap', 'other' ],
	default_tablespace => ['pg_default'],
	temp_tablespaces => ['pg_global'],
	local_preload_libraries => ['plpgsql'],
	transaction_isolation => [ 'read committed', 'serializable' ]);

# Odd values of a setting: for a number the least, the greatest and one between.
sub odd_values
{
	my ($name, $type, $min, $max, $enum) = @_;

	return ('on', 'off') if $type eq 'bool';
	return split(/,/, $enum) if $type eq 'enum';
	return (@{ $strings{$name} // [] }, '', 'nonsense', 'x' x 200)
	  if $type eq 'string';
	return ($min, $max, int($min + rand() * ($max - $min)))
	  if $type eq 'integer';
	return ($min, $max, $min + rand() * ($max - $min));
}

# Read-only transactions are refused as they should be, see 010.
my %values;
foreach my $line (
	split /\n/,
	$node->safe_psql('owned', <<'EOC'))
SELECT name, vartype, min_val, max_val, array_to_string(enumvals, ',')
FROM pg_settings WHERE context = 'user' AND name !~ 'read_only$' ORDER BY name
EOC
{
	my ($name, @type) = split /\|/, $line, -1;
	$values{$name} = [ odd_values($name, @type) ];
}

my @places =
  ('DATABASE owned', 'ROLE alice', 'ROLE alice IN DATABASE owned');

# A command that sets one of them, anywhere.
sub set_command
{
	my ($name, $value) = @_;
	my $place = $places[ rand @places ];
	return "ALTER $place SET $name = '$value';\n";
}

# Each experiment is the commands for it.
my @experiments;
foreach (1 .. 2)
{
	push @experiments, join '', map
	{
		my $list = $values{$_};
		set_command($_, $list->[ rand @$list ]);
	} sort keys %values;
}
if ($all)
{
	foreach my $name (sort keys %values)
	{
		push @experiments, map { set_command($name, $_) } @{ $values{$name} };
	}
}
else
{
	my @names = shuffle(sort keys %values);
	foreach my $name (@names[ 0 .. 9 ])
	{
		my $list = $values{$name};
		push @experiments, set_command($name, $list->[ rand @$list ]);
	}
}

# In each, a worker that has connected under these settings makes its table,
# folds, fails, and folds again.  One psql does them all.  Its own session has
# begun before any of it.
my $script = '';
foreach my $number (0 .. $#experiments)
{
	$script .= <<EOC;
\\set pid none
\\set now none
\\set sum none
$experiments[$number]
SELECT worker_spi_launch(9) AS pid \\gset
\\set launched :SQLSTATE
INSERT INTO schema9.counted (type, value) VALUES ('delta', 40), ('delta', 2);
SELECT worker_spi_fold(9) AS done \\gset
\\set folded :SQLSTATE
ALTER TABLE schema9.counted ADD CONSTRAINT not_43 CHECK (value <> 43);
INSERT INTO schema9.counted (type, value) VALUES ('delta', 1);
SELECT worker_spi_fold(9) AS done \\gset
\\set failed :SQLSTATE
ALTER TABLE schema9.counted DROP CONSTRAINT not_43;
SELECT worker_spi_fold(9) AS done \\gset
\\set again :SQLSTATE
SELECT count(*) || ' ' || sum(value) AS sum FROM schema9.counted \\gset
SELECT CASE pid WHEN :'pid' THEN 'alive' ELSE 'gone' END AS now
FROM worker_spi_workers WHERE index = 9 \\gset
\\echo result $number :launched :folded :failed :again :sum :now
SELECT worker_spi_stop(9) AS stopped \\gset
DROP SCHEMA schema9 CASCADE;
SELECT reset_all() \\gset
EOC
}

my ($ret, $out, $err) = $node->psql(
	'owned', $script,
	on_error_stop => 0,
	timeout => 20 * $PostgreSQL::Test::Utils::timeout_default,
	extra_params => [ '-U', 'alice' ]);
my %results = $out =~ /^result (\d+) (.*)$/mg;
my $survived = 0;
foreach my $number (0 .. $#experiments)
{
	my $result = $results{$number} // 'nothing';

	if ($result eq '00000 00000 23514 00000 1 43 alive')
	{
		$survived++;
	}
	else
	{
		diag("$result: $experiments[$number]");
	}
}
is($survived, scalar(@experiments),
	'a worker folds, fails and folds under any setting of the owner');
is($ret, 0, 'and those who ask it get their answers');

# ------------------------------------------------------------------------
# What code of the table leaves behind
# ------------------------------------------------------------------------

# A CHECK function that notes all settings, and then sets each that may be set.
# It is called more than once in a fold.  Settings for the current transaction
# alone would end that, one ends the process (see below), and some do nothing
# but fill the log.
$node->safe_psql('owned', 'CREATE TABLE odd (name text, value text);
GRANT SELECT ON odd TO alice;
' . join '', map {
	my $name = $_;
	map { "INSERT INTO odd VALUES ('$name', '$_');\n" } @{ $values{$name} }
} grep { !/^(transaction_|exit_on_error|debug_print_|trace_)/ } sort keys %values);
as_alice(<<'EOC');
CREATE SCHEMA code;
CREATE SEQUENCE code.calls;
CREATE TABLE code.seen (call bigint, xid xid8, pid int, name text, setting text);
CREATE FUNCTION code.leave() RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
	n bigint := nextval('code.calls');
	o record;
BEGIN
	INSERT INTO code.seen
	SELECT n, pg_current_xact_id(), pg_backend_pid(), name, setting
	FROM pg_settings;
	FOR o IN SELECT * FROM public.odd ORDER BY random() LOOP
		BEGIN
			PERFORM set_config(o.name, o.value, false);
		EXCEPTION WHEN OTHERS THEN
		END;
	END LOOP;
	RETURN true;
END $$;
EOC
my $pid = as_alice('SELECT worker_spi_launch(9)');
as_alice(<<'EOC');
ALTER TABLE schema9.counted ADD CONSTRAINT code CHECK (type <> 'total' OR code.leave());
EOC
foreach (1 .. 3)
{
	as_alice(q(INSERT INTO schema9.counted VALUES ('delta', 1)));
	is(as_alice('SELECT worker_spi_fold(9)'), 't', 'code that sets things runs');
}
as_alice(<<EOC);
CREATE VIEW code.at_first AS
SELECT * FROM code.seen AS s WHERE pid = $pid
AND call = (SELECT min(call) FROM code.seen WHERE xid = s.xid)
EOC
is(as_alice('SELECT count(DISTINCT call) FROM code.at_first'),
	'3', 'in each fold');
is( as_alice(<<'EOC'),
SELECT name, string_agg(DISTINCT setting, ', ') FROM code.at_first
GROUP BY name HAVING count(DISTINCT setting) > 1
EOC
	'',
	'and no setting is left for the next fold');

# Advisory locks outlast their transaction, be it committed or not.
as_alice(<<'EOC');
ALTER TABLE schema9.counted DROP CONSTRAINT code;
CREATE FUNCTION code.lock_things(fail boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_advisory_lock((random() * 1e15)::bigint),
		pg_advisory_lock_shared((random() * 1e15)::bigint)
	FROM generate_series(1, 25);
	IF fail THEN
		RAISE SQLSTATE '28000' USING MESSAGE = 'out of here';
	END IF;
	RETURN true;
END $$;
EOC
my $locks =
  "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = $pid";
as_alice(<<'EOC');
ALTER TABLE schema9.counted ADD CONSTRAINT code CHECK (type <> 'total' OR code.lock_things(false));
INSERT INTO schema9.counted VALUES ('delta', 1);
SELECT worker_spi_fold(9);
EOC
is($node->safe_psql('owned', $locks), '0',
	'no advisory lock is left by a fold');
as_alice(<<'EOC');
ALTER TABLE schema9.counted DROP CONSTRAINT code;
ALTER TABLE schema9.counted ADD CONSTRAINT code CHECK (type <> 'total' OR code.lock_things(true)) NOT VALID;
INSERT INTO schema9.counted VALUES ('delta', 1);
EOC

# The error is that of a connection for a role that is gone.
error_is($node, 'owned', 'SELECT worker_spi_fold(9)',
	'28000', qr/out of here/, 'a fold may fail with any error');
is($node->safe_psql('owned', $locks), '0', 'and then none is left either');
is(worker($node, 9, 'pid'), $pid,
	'and the worker does not take it for an error of its connection');

# ------------------------------------------------------------------------
# What stays with the worker of the table
# ------------------------------------------------------------------------

# Such code can end the process, as a backend's own user can.  It comes back,
# a dynamic one too, and no other worker is touched.
as_alice(<<'EOC');
CREATE FUNCTION code.leave_for_good() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	PERFORM set_config('exit_on_error', 'on', false);
	RAISE SQLSTATE '3D000' USING MESSAGE = 'no such database';
END $$;
ALTER TABLE schema9.counted DROP CONSTRAINT code;
ALTER TABLE schema9.counted ADD CONSTRAINT code CHECK (type <> 'total' OR code.leave_for_good()) NOT VALID;
EOC
my $other = as_alice('SELECT worker_spi_launch(8)');
$node->poll_query_until('owned', <<'EOC') or die 'the worker does not come back';
SELECT restart_count > 1 AND last_sqlstate = '3D000' FROM worker_spi_workers
WHERE index = 9
EOC
pass('code can end the process of its own worker, which is started again');
as_alice('ALTER TABLE schema9.counted DROP CONSTRAINT code');
$node->poll_query_until('owned', <<'EOC') or die 'the worker does not fold';
SELECT count(*) = 1 AND sum(value) = 5 FROM schema9.counted
EOC
pass('and folds when that code is gone');
is(deltas($node, 9, 'owned'), '0', 'all that there is');
is(worker($node, 8, 'pid'), $other, 'another worker never noticed');

SKIP:
{
	skip 'no transaction_timeout before 17', 2
	  if $node->pg_version < 17;

	as_alice(<<'EOC');
CREATE FUNCTION code.time_out() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	PERFORM set_config('transaction_timeout', '1ms', false);
	PERFORM pg_sleep(60);
	RETURN true;
END $$;
ALTER TABLE schema9.counted ADD CONSTRAINT code CHECK (type <> 'total' OR code.time_out()) NOT VALID;
INSERT INTO schema9.counted VALUES ('delta', 1);
EOC
	$node->psql('owned', 'SELECT worker_spi_fold(9)');
	as_alice('ALTER TABLE schema9.counted DROP CONSTRAINT code');
	$node->poll_query_until('owned', <<'EOC') or die 'the worker does not fold';
SELECT count(*) = 1 AND sum(value) = 6 FROM schema9.counted
EOC
	pass('a worker that code has timed out folds when that code is gone');
	is(worker($node, 8, 'pid'), $other, 'another worker never noticed');
}
ok( !$node->log_contains(qr/TRAP:|PANIC:|terminated by signal/),
	'no process has crashed');
$node->stop;

# ------------------------------------------------------------------------
# The clock
# ------------------------------------------------------------------------

# A library in front of the server's own reads the clock, and takes an hour off
# while a file exists.
my $dir = File::Spec->rel2abs(PostgreSQL::Test::Utils::tempdir());
append_to_file("$dir/clock.c", <<'EOC');
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/time.h>
#include <unistd.h>

int
gettimeofday(struct timeval *restrict tv, void *restrict tz)
{
	static int	(*real) (struct timeval *, void *);
	int			save_errno = errno;
	int			result;

	if (!real)
		*(void **) &real = dlsym(RTLD_NEXT, "gettimeofday");
	result = real(tv, tz);
	if (getenv("CLOCK_SET_BACK") && access(getenv("CLOCK_SET_BACK"), F_OK) == 0)
		tv->tv_sec -= 3600;
	errno = save_errno;
	return result;
}
EOC
SKIP:
{
	skip 'no C compiler', 5
	  if system("cc -shared -fPIC -o '$dir/clock.so' '$dir/clock.c' -ldl 2>'$dir/err'");

	# The longest nap is that of naptime; a wake is to shorten it.
	$node->append_conf('postgresql.conf', <<'EOC');
worker_spi.naptime = 2
worker_spi.total_workers = 1
EOC
	local $ENV{LD_PRELOAD} = "$dir/clock.so";
	local $ENV{CLOCK_SET_BACK} = "$dir/set_back";
	$node->start;
	delete local $ENV{LD_PRELOAD};
	wait_for_fold($node, 1);

	append_to_file("$dir/set_back", '');
	is( $node->safe_psql(
			'postgres',
			'SELECT now() < worker_start FROM worker_spi_workers WHERE index = 1'
		),
		't',
		'the clock was set back an hour');
	$node->safe_psql('postgres', q(INSERT INTO schema1.counted VALUES ('delta', 1)));
	wait_for_fold($node, 1);
	pass('the worker folds after its naptime');

	unlink "$dir/set_back";
	$node->safe_psql('postgres', q(INSERT INTO schema1.counted VALUES ('delta', 1)));
	wait_for_fold($node, 1);
	$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema1.counted RENAME value TO amount;
INSERT INTO schema1.counted VALUES ('delta', 1);
EOC
	$node->poll_query_until('postgres',
		q(SELECT state = 'backoff' AND last_sqlstate = '42P16' FROM worker_spi_workers WHERE index = 1)
	) or die 'no cycle fails';
	append_to_file("$dir/set_back", '');
	$node->safe_psql('postgres', 'ALTER TABLE schema1.counted RENAME amount TO value');
	wait_for_fold($node, 1);
	pass('and so it does after a cycle that failed before');

	unlink "$dir/set_back";
	$node->safe_psql('postgres', <<'EOC');
ALTER TABLE schema1.counted ADD CONSTRAINT none CHECK (value < 4);
INSERT INTO schema1.counted VALUES ('delta', 1);
EOC
	$node->poll_query_until('postgres',
		q(SELECT stuck_rows = 1 AND last_sqlstate = '23514' FROM worker_spi_workers WHERE index = 1)
	) or die 'nothing is stuck';
	append_to_file("$dir/set_back", '');
	$node->safe_psql('postgres', 'ALTER TABLE schema1.counted DROP CONSTRAINT none');
	wait_for_fold($node, 1);
	pass('and where something got stuck before');

	$node->append_conf('postgresql.conf', <<'EOC');
worker_spi.naptime = 3600
worker_spi.wake_delay = 10000
EOC
	$node->safe_psql('postgres', <<'EOC');
CREATE TRIGGER wake AFTER INSERT ON schema1.counted
	EXECUTE FUNCTION worker_spi_wake();
EOC
	unlink "$dir/set_back";
	$node->reload;
	$node->poll_query_until('postgres', <<'EOC') or die 'no long nap';
SELECT next_fold_time > now() + interval '50 min' FROM worker_spi_workers
WHERE index = 1
EOC
	$node->safe_psql('postgres', q(INSERT INTO schema1.counted VALUES ('delta', 1)));
	$node->poll_query_until('postgres', <<'EOC') or die 'it was not woken';
SELECT next_fold_time < now() + interval '50 min' FROM worker_spi_workers
WHERE index = 1
EOC
	append_to_file("$dir/set_back", '');
	wait_for_fold($node, 1);
	pass('and after the delay of a wake that came before');
	$node->stop;
}

done_testing();
