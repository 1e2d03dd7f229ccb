# What says which version this is, agrees: the control file, the library, the
# script, META.json, and both changelogs; and META.json is what PGXN takes.
#
# It waits for nothing.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use t::WorkerSpi;

# The first group that $pattern catches in $file.
sub found
{
	my ($file, $pattern) = @_;
	my ($found) = slurp_file($file) =~ $pattern;
	return $found // "nothing in $file";
}

# A semantic version, which is the only kind that PGXN knows.
my $semver = qr/^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?$/;

my $version = found('worker_spi.control', qr/^default_version = '(.+)'$/m);
like($version, qr/^\d+\.\d+$/, 'the control file has a version');

is(found('worker_spi.c', qr/^#define WORKER_SPI_VERSION "(.+)"$/m),
	$version, 'the library has the version of the control file');
ok(-f "worker_spi--$version.sql", 'there is a script of that version');
is(found('Makefile', qr/^DATA\s*=.*\b(worker_spi--\Q$version\E\.sql)\b/m),
	"worker_spi--$version.sql", 'the Makefile installs that script');
is(found('CHANGELOG.md', qr/^## (\S+)/m),
	$version, 'the newest entry of CHANGELOG.md is of that version');
is(found('debian/changelog', qr/\A\S+ \((.+)-[^-]+\)/),
	$version, 'the newest entry of debian/changelog is of that version');

# ------------------------------------------------------------------------
# META.json, by the PGXN meta specification 1.0.0
# ------------------------------------------------------------------------
my $meta = eval { JSON::PP->new->utf8->decode(slurp_file('META.json')) };
is(ref $meta, 'HASH', 'META.json is a JSON object') or diag($@);

foreach my $key (qw(name version abstract maintainer license provides meta-spec))
{
	ok($meta->{$key}, "META.json has the required key $key");
}
like($meta->{name}, qr/^[^\s\\\/[:cntrl:]]{2,}$/, 'its name is one');
like($meta->{version}, $semver, 'its version is a semantic one');
is($meta->{version}, "$version.0",
	'its version is that of the control file, with a zero');
is($meta->{'meta-spec'}{version}, '1.0.0', 'it says which specification it follows');

# the licences that may be named without a URL
my %license = map { $_ => 1 }
  qw(agpl_3 apache_1_1 apache_2_0 artistic_1 artistic_2 bsd freebsd gfdl_1_2
  gfdl_1_3 gpl_1 gpl_2 gpl_3 lgpl_2_1 lgpl_3_0 mit mozilla_1_0 mozilla_1_1
  openssl perl_5 postgresql qpl_1_0 ssleay sun zlib open_source restricted
  unrestricted unknown);
ok($license{ $meta->{license} }, 'its license is one that PGXN knows by name');
like($meta->{release_status}, qr/^(stable|testing|unstable)$/,
	'its release status is one that there is');
ok((ref $meta->{tags} eq 'ARRAY' && !grep { length > 255 || /[\\\/]/ } @{ $meta->{tags} }),
	'its tags are a list of words');

is_deeply([ keys %{ $meta->{provides} } ],
	['worker_spi'], 'it provides this extension');
my $provides = $meta->{provides}{worker_spi};
is($provides->{version}, $meta->{version}, 'in the same version');
is($provides->{file}, "worker_spi--$version.sql", 'from the script of that version');
ok(-f $provides->{docfile}, 'with documentation that is there')
  if exists $provides->{docfile};

is($meta->{prereqs}{runtime}{requires}{PostgreSQL},
	found('worker_spi.h', qr/^#if PG_VERSION_NUM < (\d\d)0000$/m) . '.0.0',
	'it wants the server that the source wants');

# ------------------------------------------------------------------------
# What is installed
# ------------------------------------------------------------------------
my $node = new_node('meta');
is( $node->safe_psql('postgres',
		"SELECT default_version FROM pg_available_extensions WHERE name = 'worker_spi'"),
	$version,
	'the control file that is installed has the same version');

SKIP:
{
	skip 'a server before 18 does not tell the version of a library', 1
	  if $node->pg_version < 18;
	is( $node->safe_psql('postgres',
			"SELECT version FROM pg_get_loaded_modules() WHERE module_name = 'worker_spi'"),
		$version,
		'the library that is installed has the same version');
}

done_testing();
