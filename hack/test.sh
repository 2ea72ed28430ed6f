#!/usr/bin/env bash
# test.sh [PART...]: run the parts of `make test` (default: all), each to its
# end even when an earlier one failed, and say at last what held. Exit status 0
# only if everything did.
set -uo pipefail
cd "$(dirname "$0")/.."

parts=("$@")
((${#parts[@]})) || parts=(lint unit crash sabotage sanity kernel demo manifests)

# Packages with a part of their own: they need a device, a machine, or long.
apart='/(test/.*|internal/demo)$'

lint() {
	local unformatted
	unformatted=$(git -c safe.directory='*' ls-files '*.go' | xargs -r gofmt -l) || return
	if [[ $unformatted ]]; then
		printf 'not formatted, run make fmt:\n%s\n' "$unformatted"
		return 1
	fi
	local tags=kernel,sabotage # of tests that only their own part runs
	go vet -tags "$tags" ./... &&
		go tool -modfile=hack/tools/go.mod staticcheck -tags "$tags" ./... &&
		go test ./internal/lint
}

unit() {
	local packages
	packages=$(go list ./...) || return
	# shellcheck disable=SC2046 # one word per package
	go test -race -timeout 1h $(grep -Ev "$apart" <<<"$packages")
}

# crash enumerates what a power loss or a kill can leave, and fails every
# operation in every way: N states each (20000), a tenth of them judged by qemu-img.
# Then it cuts the power under a pool on a real filesystem. Before all that, it
# kills every operation of a pool at each of its steps.
crash() {
	local n=${N:-20000}
	go test -count=1 -timeout 1h -v ./volume -run '^TestKilledAtEveryStep$' | grep -Ev '^=== (RUN|PAUSE|CONT|NAME)' || return
	go test -count=1 -timeout 1h -v ./test/powerloss | grep -Ev '^=== (RUN|PAUSE|CONT|NAME)' || return
	go test -count=1 -timeout 6h -v ./qcow2 \
		-run '^(TestPowerLoss|TestKilledAnywhere|TestFaultAtEveryOperation)$' \
		-crash "$n" -crash-qemu $((n / 10)) -kill "$n" -faults-all |
		grep -Ev '^=== (RUN|PAUSE|CONT|NAME)'
}

sabotage() {
	go test -count=1 -timeout 30m -tags sabotage -parallel 2 -v ./test/sabotage |
		grep -Ev '^=== (RUN|PAUSE|CONT|NAME)'
}

sanity() { go test -count=1 -timeout 1h ./test/sanity/...; }

kernel() { go test -count=1 -timeout 40m -tags kernel -v ./test/kernel | grep -Ev '^=== (RUN|PAUSE|CONT)'; }

# restart kills the node process N times (200) while filesystems on its volumes
# are written to and verified, in the virtual machine.
restart() {
	go test -count=1 -timeout 24h -tags kernel -v ./test/kernel -run '^TestRestart$' -args -kills "${N:-200}" |
		grep -Ev '^=== (RUN|PAUSE|CONT)|Possible stuck request'
}

demo() {
	go test -count=1 -timeout 1h ./internal/demo
}

manifests() {
	(cd deploy/kubernetes/check && go vet ./... && go test -count=1 ./...)
}

# failures prints of a part's output what belongs to tests that failed: what came
# before the line that says so (as in verbose output), and what came after.
failures() {
	awk '
		/kernel_test.go:[0-9]+: \[/ { next } # the console of a virtual machine
		/ noticed in / { next }              # a mutant that was caught
		/--- FAIL|^(kernel_test.go:[0-9]+: )?(FAIL|panic:)/ { printf "%s", block; block = ""; print; after = 1; next }
		/--- (PASS|SKIP)|^(ok|PASS)/ { block = ""; after = 0; next }
		after { print; next }
		{ block = block $0 "\n" }
		END { printf "%s", block }' "$1" | cut -c1-500 | tail -n 100
}

output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT
summary=()
failed=()
for part in "${parts[@]}"; do
	if [[ $(type -t "$part") != function ]]; then
		echo "test.sh: no part $part" >&2
		exit 2
	fi
	printf '\n=== %s\n' "$part"
	begin=$SECONDS
	result=ok
	if ! "$part" 2>&1 | tee "$output/$part"; then
		result=FAILED
		failed+=("$part")
	fi
	summary+=("$(printf '%-10s %-7s %4d s' "$part" "$result" $((SECONDS - begin)))")
done

# Once more and at the end, where people look, and tools that keep only that.
for part in "${failed[@]}"; do
	printf '\n=== what failed of %s\n' "$part"
	failures "$output/$part"
done
printf '\n'
printf '%s\n' "${summary[@]}"
if ((${#failed[@]})); then
	echo "make test: something does not hold, see FAILED above"
	exit 1
fi
echo "make test: everything holds, ${SECONDS} s"
