# What README.md says to type, and after it doc/recipes.md, can be typed, in that
# order, on a fresh server, and what they show as output is what comes of it.  The
# commands are taken out of these files; nothing of them is repeated here.
#
# A block of SQL begins as the superuser, in database app of the first server.
# A line such as
#
#	-- on hub, in app, as web
#
# names another server, database or role, as far as it differs; "likewise on
# tokyo" runs what follows a second time, with "tokyo" for the server's name.
# A statement ends with the line that ends with a semicolon.  Behind it, or
# below it, "-->" stands in front of each row of its output, or of its error
# with its hint; a statement without rows shows nothing.  A statement below a
# comment with the word "later", or one that reads the view of the workers, is
# repeated until its output is as shown.
#
# What is different each time: the result of worker_spi_launch(), a process
# id, need only be a number; of a timestamp the format is compared.  The order
# of rows matters if the statement has an ORDER BY.  "host=NAME" in a
# connection string reaches the test's server of that name.
#
# The first server starts with the block of settings, so that the example at the
# top runs; all of its other settings are as initdb leaves them.  So do those of
# "One count over several servers", but for the hub.
#
# Of the shell commands, make and dev/new are run in a copy of the tree; of
# those that install packages and take minutes, it is tested that they are there
# and explain themselves.
#
# It waits for what the README waits for: worker_spi_fold(), and what comes
# "later".

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);
use t::WorkerSpi;

my $readme = slurp_file('README.md');
my $recipes = slurp_file('doc/recipes.md');
my $doc;				# the one that is read

# ------------------------------------------------------------------------
# Servers
# ------------------------------------------------------------------------

my ($settings, $more) = $readme =~ /^```conf\n(.*?)^```$/msg;
die 'README.md must have one block of settings' if !defined $settings || defined $more;

# A server with these settings, an application's database, and the tables of
# the workers there.  The extension is created where the README does, or, for
# any but the first server, where it takes that for granted.
my %node;

sub server
{
	my ($name) = @_;

	return $node{$name} if $node{$name};
	my $node = $node{$name} = PostgreSQL::Test::Cluster->new($name);
	$node->init(allows_streaming => 'logical');
	$node->append_conf('postgresql.conf', $settings) if $name ne 'hub';
	$node->start;
	$node->safe_psql('postgres', 'CREATE DATABASE app');
	if ($name eq 'first')
	{
		$node->safe_psql('postgres', 'CREATE DATABASE legacy');
		$node->safe_psql('legacy', 'CREATE EXTENSION worker_spi');
	}
	elsif ($name ne 'hub')
	{
		$node->safe_psql('app', 'CREATE EXTENSION worker_spi');
	}
	wait_for_tables($node) if $name ne 'hub';
	return $node;
}

# Wait until the static workers of app have made their tables.
sub wait_for_tables
{
	my ($node) = @_;

	$node->poll_query_until('app',
		"SELECT count(to_regclass('schema' || i || '.stuck')) = 3 FROM generate_series(1, 3) AS i"
	) or die 'the static workers did not make their tables';
	return;
}

# ------------------------------------------------------------------------
# SQL
# ------------------------------------------------------------------------

# Take a block apart: a list of statements, each with where it is run, and the
# output that is shown.
sub statements
{
	my ($block, $line) = @_;
	my (@statements, @lines);
	my %place = (on => ['first'], in => 'app', as => undef);
	my $later = 0;

	foreach my $text (split /\n/, $block)
	{
		$line++;
		if (!@lines && $text =~ /^-- (?=on |in |as )(?:on (\w+)(?:, likewise on (\w+))?(?:, |$))?(?:in (\w+)(?:, |$))?(?:as (\w+))?$/)
		{
			%place = (on => [ $1 // 'first', $2 // () ], in => $3 // 'app', as => $4);
			next;
		}
		if (!@lines && $text =~ /^--> (.*)$/)
		{
			push @{ $statements[-1]{shown} }, $1;
			next;
		}
		if (!@lines && $text =~ /^(--.*)?$/)
		{
			$later = 1 if $text =~ /\blater\b/;
			next;
		}
		push @lines, $text;
		my $shown = $lines[-1] =~ s/;\s+--> (.*)$/;/ ? $1 : undef;
		my $bare = join "\n", @lines;
		$bare =~ s/\s+--[^\n]*$//;
		next if $bare !~ /;$/ || (() = $bare =~ /\$\$/g) % 2;
		push @statements,
		  {
			%place,
			sql => join("\n", @lines),
			line => $line - $#lines,
			later => ($later || $bare =~ /\bFROM worker_spi_workers\b/) ? 1 : 0,
			shown => defined $shown ? [$shown] : []
		  };
		@lines = ();
		$later = 0;
	}
	die "$doc:$line: a statement without an end" if @lines;
	return @statements;
}

# Run statements in one session.  What came of each, as the README shows it.
sub run_statements
{
	my ($node, $statements) = @_;
	my ($in, $as) = @{ $statements->[0] }{qw(in as)};
	my $script = '';

	foreach my $statement (@$statements)
	{
		$script .= "$statement->{sql}\n\\echo \x01:SQLSTATE :LAST_ERROR_MESSAGE\n";
	}
	$script =~ s/host=(\w+) /server($1)->connstr . ' '/ge;

	my ($out, $err) = ('', '');
	IPC::Run::run(
		[
			$node->installed_command('psql'), '-XAtq', '-F', ' | ',
			'-d', $node->connstr($in) . (defined $as ? " user=$as" : '')
		],
		'<', \$script, '>', \$out, '2>', \$err,
		IPC::Run::timeout(2 * $PostgreSQL::Test::Utils::timeout_default));

	my @results;
	my @hints = $err =~ /^HINT:  (.*)$/mg;
	while ($out =~ /\G(.*?)\x01(\w+) ([^\n]*)\n/gs)
	{
		my ($rows, $sqlstate, $message) = ($1, $2, $3);
		my @rows = split /\n/, $rows;

		push @rows, "ERROR $sqlstate: $message" if $sqlstate ne '00000';
		push @results, \@rows;
	}
	return (\@results, \@hints, $err);
}

# Take out what is different each time.
sub normalize
{
	my ($statement, @rows) = @_;

	foreach (@rows)
	{
		s/\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?[+-]\d\d\b/TIMESTAMP/g;
		s/^\d+$/PID/ if $statement->{sql} =~ /\bworker_spi_launch\(/;
	}
	@rows = sort @rows unless $statement->{sql} =~ /\bORDER BY\b/;
	return join "\n", @rows;
}

# Does a statement do what the README shows?  What is shown in place of it.
sub difference
{
	my ($statement, $result, $hints) = @_;
	my @shown = grep { !/^HINT: / } @{ $statement->{shown} };
	my $got = normalize($statement, @$result);

	return "got:\n$got" if normalize($statement, @shown) ne $got;
	foreach (grep { /^HINT: / } @{ $statement->{shown} })
	{
		my $hint = s/^HINT: +//r;
		return "hints:\n@$hints" unless grep { $_ eq $hint } @$hints;
	}
	return;
}

sub run_and_compare
{
	my ($node, @statements) = @_;
	my ($results, $hints, $err) = run_statements($node, \@statements);

	foreach my $statement (@statements)
	{
		my $result = shift @$results // ['nothing: psql has ended'];
		my $difference = difference($statement, $result, $hints);
		my ($first_line) = $statement->{sql} =~ /^(.*)/;

		is($difference, undef, "$doc:$statement->{line}: $first_line")
		  or diag($err);
	}
	return;
}

sub test_sql
{
	my ($block, $line) = @_;
	my @statements = statements($block, $line);

	while (@statements)
	{
		# as many as run in the same session
		my @session = shift @statements;
		my %place = %{ $session[0] };
		while (@statements && !$session[0]{later} && !$statements[0]{later}
			&& "@{$statements[0]{on}}" eq "@{$place{on}}"
			&& $statements[0]{in} eq $place{in}
			&& ($statements[0]{as} // '') eq ($place{as} // ''))
		{
			push @session, shift @statements;
		}

		foreach my $name (@{ $place{on} })
		{
			my $node = server($name);
			my @here = map { {%$_} } @session;

			$_->{sql} =~ s/\b$place{on}[0]\b/$name/g foreach @here;
			if ($place{later})
			{
				my $tries = 10 * $PostgreSQL::Test::Utils::timeout_default;
				while ($tries--)
				{
					my ($results, $hints) = run_statements($node, \@here);
					last
					  unless defined difference($here[0], $results->[0] // [], $hints);
					usleep(100_000);
				}
			}
			run_and_compare($node, @here);
		}
	}
	return;
}

# ------------------------------------------------------------------------
# Shell commands
# ------------------------------------------------------------------------

my $tree;

sub test_shell
{
	my ($block, $line) = @_;

	unless ($tree)
	{
		$tree = PostgreSQL::Test::Utils::tempdir . '/worker_spi';
		mkdir $tree or die "$tree: $!";
		system_or_bail('sh', '-c',
			'tar -cf - --exclude=./tmp_check --exclude=./.git . | tar -xf - -C "$1"',
			'sh', $tree);
	}
	foreach (split /\n/, $block)
	{
		$line++;
		s/\s+#.*//;
		next if $_ eq '';
		test_command($_, "$doc:$line: $_");
	}
	return;
}

# One shell command.  What is built goes into a folder of this test.
sub test_command
{
	my ($command, $test) = @_;
	my $out = '';

	if ($command =~ /^make\b/ || $command =~ /^dev\/new\b/)
	{
	  SKIP:
		{
			skip 'no compiler', 1 if $command =~ /^make/ && system('cc --version >/dev/null 2>&1') != 0;
			local @ENV{qw(MAKEFLAGS MAKELEVEL)} = ('', '');
			$command =~ s/^make\b/make with_llvm=no DESTDIR=$tree\/installed/;
			$command =~ s/PG_CONFIG=\S+/PG_CONFIG=pg_config/;
			ok( IPC::Run::run([ 'sh', '-c', "cd $tree && $command" ],
					'<', \undef, '>', \$out, '2>&1'),
				$test) or diag($out);
		}
		return;
	}
	my ($file) = $command =~ /^(\S+)/;
	ok( IPC::Run::run([ "./$file", '--help' ], '<', \undef, '>', \$out, '2>&1')
		  && $out =~ /^Usage: .*\b\Q$file\E\b/m,
		$test) or diag($out);
	return;
}

# ------------------------------------------------------------------------
# From the first line to the last
# ------------------------------------------------------------------------
my %test = (sql => \&test_sql, sh => \&test_shell);

foreach ([ 'README.md', $readme ], [ 'doc/recipes.md', $recipes ])
{
	($doc, my $text) = @$_;
	while ($text =~ /^```(\w*)\n(.*?)^```$/msg)
	{
		my ($kind, $block, $start) = ($1, $2, $-[0]);
		my $line = 1 + (substr($text, 0, $start) =~ tr/\n//);

		if ($test{$kind})
		{
			$test{$kind}->($block, $line);
		}
		elsif ($kind ne 'conf')
		{
			fail("$doc:$line: a block that this test runs");
		}
	}
}

# ------------------------------------------------------------------------
# The text
# ------------------------------------------------------------------------
cmp_ok($readme =~ tr/\n//, '<=', 420, 'README.md has no more than 420 lines');

# Every file that is named is there, and so is every test.
my @named = $readme =~ /\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)/g;
push @named, map { "t/$_.pl" } $readme =~ /\b(\d\d\d_[a-z_]+)\b/g;
my %seen;
foreach my $file (grep { !$seen{$_}++ } @named)
{
	ok(-e $file, "README.md names $file, which is there");
}

# Every link within it leads to a section.
my %section = map { lc(s/[^\w\- ]//gr =~ s/ /-/gr) => 1 } $readme =~ /^#+ (.*)$/mg;
foreach my $anchor ($readme =~ /\]\(#([^)]+)\)/g)
{
	ok($section{$anchor}, "README.md has a section #$anchor");
}

# Every setting of the server's has its row.
my $all = $node{first}->safe_psql('app',
	"SELECT name FROM pg_settings WHERE name LIKE 'worker\\_spi.%' ORDER BY name");
foreach my $name (split /\n/, $all)
{
	like($readme, qr/^\| `\Q$name\E` \|/m, "README.md explains $name");
}

done_testing();
