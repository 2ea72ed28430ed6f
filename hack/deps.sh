#!/usr/bin/env bash
# deps.sh SET...: install Debian's packages of these sets of hack/packages that
# are missing. It asks nothing, and uses the network only if something is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v go >/dev/null || { echo "deps: Go is missing; install the version that go.mod names" >&2; exit 1; }

wanted=$(awk -v sets=" $* " '!/^#/ && NF && index(sets, " " $1 " ") { print $2 }' hack/packages)
missing=()
for package in $wanted; do
	[[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
unknown=()
for package in $(awk -v sets=" $* " 'index(sets, " test ") && $1 == "source" { print $2 }' hack/packages); do
	apt-cache show "$package" &>/dev/null || unknown+=("$package")
done
((${#missing[@]} + ${#unknown[@]})) || exit 0

echo "deps: installing ${missing[*]:-nothing}, updating the list of packages"
if ((EUID != 0)); then
	echo "deps: not root; run: apt-get install --no-install-recommends ${missing[*]}" >&2
	exit 1
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
# A held lock is another install on this machine: wait for it.
wait_for_lock=(-o DPkg::Lock::Timeout=300)
if ! { apt-get "${wait_for_lock[@]}" -q update &&
	{ ! ((${#missing[@]})) || apt-get "${wait_for_lock[@]}" -q -y install --no-install-recommends "${missing[@]}"; }; } >"$log" 2>&1; then
	cat "$log" >&2
	echo "deps: apt-get failed; the packages above are needed" >&2
	exit 1
fi
