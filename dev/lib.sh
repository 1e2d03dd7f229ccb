# shellcheck shell=bash
#
# What the commands in dev/ and .ci/ have in common, to be sourced after
# "set -euo pipefail".  All that they need comes from Debian's packages; what
# is installed already is left as it is.

export LANG=C.UTF-8 LC_ALL=C.UTF-8

# How long a test waits for what should happen at once.
export PG_TEST_TIMEOUT_DEFAULT=${PG_TEST_TIMEOUT_DEFAULT:-600}

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The servers that this Debian release does not have: see choose_server.
cache=${WORKER_SPI_CACHE:-/var/tmp/worker_spi}

# What --help says of the choice of a server.
servers_help()
{
	cat <<-EOC
		  VERSION=17     use server 15, 17 or 18, each in a folder with the
		                 Debian release that has it, or 16 or 19, built from
		                 source; made when first needed, in $cache
		                 (as root)
		  WORKER_SPI_SOURCES=FOLDER
		                 where to find postgresql-16.tar.* and the like
		  PG_CONFIG=FILE use the server that this pg_config belongs to
	EOC
}

if [ "$(id -u)" = 0 ]; then
	sudo=()
	as_user=(runuser -u postgres --)	# a server does not run as root
else
	sudo=(sudo)
	as_user=()
fi

say()
{
	printf -- '-- %s\n' "$*"
}

die()
{
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}

usage_error()
{
	printf '%s: %s\nTry "%s --help".\n' "${0##*/}" "$*" "$0" >&2
	exit 2
}

# Run a command, and show what it printed only if it failed.
quietly()
{
	local log rc=0

	log=$(mktemp)
	"$@" </dev/null >"$log" 2>&1 || rc=$?
	[ "$rc" = 0 ] || cat "$log" >&2
	rm -f "$log"
	return "$rc"
}

# Only one apt-get at a time: it does not wait for each of its own locks.
apt_get()
{
	quietly "${sudo[@]}" flock /var/lib/apt env DEBIAN_FRONTEND=noninteractive \
		apt-get -y -o DPkg::Lock::Timeout=600 --no-install-recommends "$@"
}

# Install what is missing of these packages.  The package lists are fetched
# only if those that are there will not do.
install_packages()
{
	local missing=() package

	for package; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
			missing+=("$package")
	done
	[ "${#missing[@]}" -gt 0 ] || return 0

	say "installing ${missing[*]}"
	apt_get install "${missing[@]}" 2>/dev/null ||
		{ apt_get update && apt_get install "${missing[@]}"; }
}

# Start the command that called us again as root, if that is not who we are;
# its arguments are those of this function.
become_root()
{
	[ "${#sudo[@]}" = 0 ] ||
		exec sudo env "VERSION=${VERSION:-}" "WORKER_SPI_CACHE=$cache" \
			"WORKER_SPI_SOURCES=${WORKER_SPI_SOURCES:-}" \
			"PROVE_FLAGS=${PROVE_FLAGS:-}" \
			"COPT=${COPT:-}" "$0" "$@"
}

# -------------------------------------------------------------------------
# Servers
# -------------------------------------------------------------------------

# The Debian release that has server $1.
release_with_server()
{
	case $1 in
		15) echo bookworm ;;
		17) echo trixie ;;
		18) echo testing ;;
		*) return 1 ;;
	esac
}

# The server that the Debian release we run on has.
own_server()
{
	local codename

	# shellcheck source=/dev/null
	codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
	case $codename in
		bookworm) echo 15 ;;
		trixie) echo 17 ;;
		forky) echo 18 ;;
		*) die "this needs Debian 12 or later; anywhere else: make && make install" ;;
	esac
}

# Choose the server that PG_CONFIG or VERSION asks for, by default that of this
# Debian release.  For one of another release, run the command again in the
# folder with that release, and exit; one that has to be built from source,
# build.  The arguments are those of the command.
choose_server()
{
	[ -z "${PG_CONFIG:-}" ] || return 0

	VERSION=${VERSION:-$(own_server)}
	[[ $VERSION =~ ^[0-9]+$ ]] || usage_error "no such server: $VERSION"
	[ "$VERSION" != "$(own_server)" ] || return 0

	if release_with_server "$VERSION" >/dev/null; then
		become_root "$@"
		enter_folder "$VERSION"
		in_folder "$folder" "dev/${0##*/}" "$@"
		exit
	fi

	{ mkdir -p "$cache" && [ -w "$cache" ]; } 2>/dev/null || become_root "$@"
	if [ "${WORKER_SPI_LOCKED:-}" != "$VERSION" ]; then
		# A server that a test left behind must not keep the lock.
		exec flock --close "$cache/$VERSION.lock" \
			env "VERSION=$VERSION" "WORKER_SPI_LOCKED=$VERSION" "$0" "$@"
	fi
	build_server "$VERSION"
	PG_CONFIG=$cache/$VERSION/bin/pg_config
}

# Install what building and running takes, and set $version, $bindir, $make,
# and $as_owner, what a command that installs is to start with.
install_server()
{
	local packages=(make gcc libc6-dev libipc-run-perl)

	if [ -z "${PG_CONFIG:-}" ]; then
		version=$(own_server)
		packages+=("postgresql-$version" "postgresql-server-dev-$version")
		PG_CONFIG=/usr/lib/postgresql/$version/bin/pg_config
	elif [ "${#sudo[@]}" = 0 ] && ! id postgres >/dev/null 2>&1; then
		packages+=(postgresql-common)	# it makes that user
	fi
	if type -t dpkg-query >/dev/null; then
		install_packages "${packages[@]}"
	fi

	version=$("$PG_CONFIG" --version | sed 's/^PostgreSQL \([0-9]*\).*/\1/') ||
		die "cannot run PG_CONFIG=$PG_CONFIG"
	bindir=$("$PG_CONFIG" --bindir)
	as_owner=("${sudo[@]}")
	[ ! -w "$("$PG_CONFIG" --pkglibdir)" ] || as_owner=()

	# Bitcode for JIT would double the time, and serve nobody here.
	make=(make -s "PG_CONFIG=$PG_CONFIG" with_llvm=no)
}

# The value of a variable of the Makefile that the server was built with.
configured()
{
	sed -n "s/^$1[[:space:]]*= *//p" \
		"$(dirname "$("$PG_CONFIG" --pgxs)")/../Makefile.global"
}

# Copy the tree, without what was built in it, to folder $1.
copy_tree()
{
	mkdir -p "$1"
	tar -C "$top" --exclude=./.git --exclude='*.o' --exclude='*.bc' \
		--exclude='*.so' --exclude=./tmp_check --exclude=./results \
		-cf - . | tar -C "$1" --no-same-owner -xf -
}

# Make a temporary folder, in memory if there is room: servers that live for a
# minute write much that nobody will read.  In a folder with another release it
# would go together with the mounts, and with it what a failed test has left.
temporary_folder()
{
	local room

	room=$(df -m --output=avail /dev/shm 2>/dev/null | tail -n 1) || true
	if [ -z "${WORKER_SPI_FOLDER:-}" ] && [ "${room:-0}" -gt 6000 ]; then
		mktemp -d /dev/shm/worker_spi.XXXXXX
	else
		mktemp -d /tmp/worker_spi.XXXXXX
	fi
}

# Make a temporary folder $work that belongs to the user who runs the server,
# and in it build and install a copy of the tree.
build_and_install()
{
	work=$(temporary_folder)
	copy_tree "$work/src"
	[ "${#sudo[@]}" -gt 0 ] || chown -R postgres: "$work"

	cd "$work/src" || return
	export HOME=$work		# nobody's psqlrc or proverc
	quietly "${as_user[@]}" "${make[@]}" "COPT=${COPT:-}"
	quietly "${as_owner[@]}" "${make[@]}" install
}

# Start a server in $work/$1 with the settings $2.  It listens on a socket in
# $work alone; the superuser is postgres, whoever runs it.
start_server()
{
	local data=$work/$1/data

	"${as_user[@]}" mkdir "$work/$1"
	quietly "${as_user[@]}" "$bindir/initdb" -D "$data" -U postgres -A trust \
		--no-sync
	"${as_user[@]}" tee -a "$data/postgresql.conf" >/dev/null <<-EOC
		listen_addresses = ''
		unix_socket_directories = '$work'
		fsync = off
		$2
	EOC
	quietly "${as_user[@]}" "$bindir/pg_ctl" -D "$data" -l "$work/$1/log" \
		-w start || { cat "$work/$1/log" >&2; return 1; }
	export PGHOST=$work PGPORT=5432 PGUSER=postgres PGDATABASE=postgres
}

stop_server()
{
	[ ! -e "$work/$1/data/postmaster.pid" ] ||
		quietly "${as_user[@]}" "$bindir/pg_ctl" -D "$work/$1/data" -m fast \
			-w stop
}

# -------------------------------------------------------------------------
# Servers that no Debian release has, built from source
# -------------------------------------------------------------------------

# Build server $1 in $cache, if it is not there as this source and the function
# below would make it.
build_server()
{
	local dir=$cache/$1 archive sum new rc=0

	archive=$(find -L "${WORKER_SPI_SOURCES:-/nowhere}" -maxdepth 1 \
		-name "postgresql-$1[!0-9]*tar.*" 2>/dev/null | sort -V | tail -n 1) || true
	if [ -z "$archive" ]; then
		[ ! -x "$dir/bin/pg_config" ] || return 0
		die "server $1 is left out: no Debian release has it, and there is no" \
			"source of it in the folder WORKER_SPI_SOURCES=${WORKER_SPI_SOURCES:-}"
	fi
	sum=$({ cat "$archive"; declare -f make_server; } | sha256sum)
	[ "$sum" != "$(cat "$dir/made_of" 2>/dev/null)" ] || return 0

	install_packages make gcc libc6-dev bison flex perl libipc-run-perl xz-utils
	say "building $dir from $archive"
	rm -rf "$dir".??????			# of a build that was ended
	new=$(mktemp -d "$dir.XXXXXX")
	quietly make_server "$1" "$archive" "$new" "$dir" || rc=$?
	if [ "$rc" = 0 ]; then
		echo "$sum" >"$new/root$dir/made_of"
		rm -rf "$dir"
		mv "$new/root$dir" "$dir"
	fi
	rm -rf "$new"
	[ "$rc" = 0 ] || die "could not build $dir"
}

# What finds mistakes is on, what only makes users happy is off.  16 starts each
# process anew instead of forking it, as servers on Windows do: each loads the
# library again.
make_server()
{
	local version=$1 archive=$2 new=$3 dir=$4 options module

	options=(--prefix="$dir" --enable-cassert --enable-debug --enable-tap-tests
		--without-icu --without-readline --without-zlib)
	[ "$version" -lt 17 ] || options+=(--enable-injection-points)
	[ "$version" != 16 ] || options+=(CPPFLAGS=-DEXEC_BACKEND)

	chmod 755 "$new" &&
		mkdir "$new/src" && tar -C "$new/src" --strip-components=1 -xf "$archive" &&
		cd "$new/src" &&
		./configure -q "${options[@]}" CFLAGS="-O1 -g" &&
		make -s -j "$(nproc)" &&
		make -s install DESTDIR="$new/root" || return

	for module in contrib/{auto_explain,citext,lo,pageinspect,pg_stat_statements} \
		contrib/{pg_visibility,pgrowlocks,spi} src/test/modules/injection_points; do
		[ -d "$module" ] || continue
		make -s -C "$module" install DESTDIR="$new/root" || return
	done
}

# -------------------------------------------------------------------------
# Folders with other Debian releases, for servers that this one does not have
# -------------------------------------------------------------------------

# Run a command where it may mount what it likes: the mounts, and all processes
# that it leaves behind, end with it, and it ends with us.
in_namespace()
{
	local options

	# The second is for a chroot, the root of which is not a mount.
	for options in "" "--propagation unchanged"; do
		# shellcheck disable=SC2086	# words
		if unshare --mount $options true 2>/dev/null; then
			setpriv --pdeathsig KILL unshare --mount $options --pid --fork \
				--kill-child "$@"
			return
		fi
	done
	"$@"
}

# Run a command as root in folder $1, in the copy of the tree there.
in_folder()
{
	local folder=$1

	shift
	cp -L /etc/resolv.conf "$folder/etc/"
	# What may not be mounted is done without: the server has other means.
	# Nothing that happens to this /dev may happen to the machine's.
	# shellcheck disable=SC2016	# expanded by the inner shell
	in_namespace bash -c '
		{
			mount -t proc proc "$0/proc"
			mount --rbind /dev "$0/dev" && mount --make-rprivate "$0/dev" &&
				mount -t tmpfs tmpfs "$0/dev/shm"
		} 2>/dev/null
		chroot "$0" "$@"
		rc=$?
		umount -l "$0/dev/shm" "$0/dev" "$0/proc" 2>/dev/null
		exit "$rc"' "$folder" \
		env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
		LANG=C.UTF-8 LC_ALL=C.UTF-8 "WORKER_SPI_FOLDER=$folder" \
		"COPT=${COPT:-}" "PROVE_FLAGS=${PROVE_FLAGS:-}" \
		"http_proxy=${http_proxy:-}" "https_proxy=${https_proxy:-}" \
		bash -c 'cd /src && exec "$@"' bash "$@" 9>&-
}

# Set $folder to that of the Debian release with server $1, lock it, and copy
# the tree into it.
enter_folder()
{
	local release

	release=$(release_with_server "$1") ||
		die "no Debian release is known for server $1"
	need_folder "$release" "$release" prepare_folder
}

# The same with a folder that has nothing but what that release calls required,
# from its main archive.  Whoever wants it to stay so works in a copy.
enter_bare_folder()
{
	need_folder "$(release_with_server "$1")" "$(release_with_server "$1").bare" :
}

# Set $folder to one with Debian release $1, by name $2, and lock it.  If there
# is none, make it, and have command $3 complete it; it gets its name when that
# is done.
need_folder()
{
	local release=$1 complete=$3 new rc=0

	folder=$cache/$2
	mkdir -p "$cache"
	exec 9>"$folder.lock"
	flock 9

	if [ ! -d "$folder" ]; then
		install_packages debootstrap
		say "making $folder"
		rm -rf --one-file-system "$folder".??????	# of one that was ended
		new=$(mktemp -d "$folder.XXXXXX")
		make_folder "$release" "$new" && "$complete" "$new" || rc=$?
		if [ "$rc" != 0 ]; then
			rm -rf "$new"
			die "could not make $folder"
		fi
		mv "$new" "$folder"
	fi
	rm -rf "$folder/src"
	copy_tree "$folder/src"
}

make_folder()
{
	local release=$1 new=$2 mirror

	# shellcheck disable=SC2016	# for apt-get to expand
	mirror=$(apt-get indextargets --format '$(SITE)' \
		'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | sed -n 1p)
	chmod 755 "$new"
	# The script of trixie serves newer releases too.
	quietly in_namespace debootstrap --variant=minbase \
		--include=ca-certificates "$release" "$new" "$mirror" trixie ||
		return

	# A mirror may stand still.
	echo 'Acquire::Check-Valid-Until "false";' \
		>"$new/etc/apt/apt.conf.d/worker_spi"
}

# No server but those of tests is wanted in folder $1.
prepare_folder()
{
	mkdir -p "$1/etc/postgresql-common/createcluster.d"
	echo 'create_main_cluster = false' \
		>"$1/etc/postgresql-common/createcluster.d/worker_spi.conf"
	copy_tree "$1/src"
	in_folder "$1" bash -euc '. dev/lib.sh; install_server'
}
