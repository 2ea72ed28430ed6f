#!/usr/bin/env bash
# check.sh: compile dashboard.json against the schema that Grafana publishes.
# What Grafana does not know, misses or would not accept does not compile.
set -euo pipefail
cd "$(dirname "$0")"
command -v npm >/dev/null || { echo "dashboard: npm is missing; install Debian's packages nodejs and npm" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp .npmrc package.json package-lock.json shape.ts "$work/"

# board FILTER NAME: the dashboard, changed, as a program.
board() {
	{
		echo "import type { OurDashboard } from './shape';"
		printf 'export const dashboard: OurDashboard = '
		sed "$1" ../dashboard.json
	} >"$work/$2.ts"
}
compile() { "$work/node_modules/.bin/tsc" --noEmit --strict --skipLibCheck --module esnext --moduleResolution bundler "$work/$1.ts"; }

(cd "$work" && npm ci --silent --no-audit --no-fund)
board '' dashboard
compile dashboard

# A judge that accepts everything would be none: each of these must be refused.
for broken in 's/"expr":/"query":/' 's/"displayMode": "list"/"displayMode": "lists"/' 's/"type": "timeseries"/"type": "graph"/' \
	's/"schemaVersion": /"schemaVersion": "x", "was": /' 's/"gridPos":/"gridpos":/' 's/"unit": "bytes"/"unit": 1/'; do
	board "$broken" broken
	if cmp -s "$work/dashboard.ts" "$work/broken.ts"; then
		echo "dashboard: $broken changes nothing" >&2
		exit 1
	fi
	if compile broken >/dev/null; then
		echo "dashboard: the schema accepts $broken" >&2
		exit 1
	fi
done
echo "dashboard: it is what Grafana's schema $(sed -n 's/.*schema": "\(.*\)",/\1/p' package.json) allows"
