#!/usr/bin/env bash
# fuzz.sh REGEXP TIME: run every fuzz target whose name matches REGEXP for TIME.
set -euo pipefail
cd "$(dirname "$0")/.."

found=0
for package in $(go list ./...); do
	for target in $(go test -list "^Fuzz.*($1)" "$package" | grep '^Fuzz' || true); do
		found=1
		echo "=== $package $target"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$2" "$package"
	done
done
((found)) || { echo "fuzz: no target matches $1" >&2; exit 1; }
