#!/usr/bin/env bash
# suite.sh TESTDRIVER.yaml [GINKGO-FLAG...]: run Kubernetes' external storage
# suite against the driver that the file describes.
#
#     FOCUS, SKIP   regular expressions of specs   PROCS   at once (6)
#     REPORT        directory of the results (E2E/report)
#
# Specs that nobody ran are no success: it fails when fewer than MIN (1) passed.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
driver=$(readlink -f "${1:?description of the driver}")
shift
is_up || die "the cluster is not up"
report=${REPORT:-$E2E/report}
mkdir -p "$report"
# KUBERNETES_SERVICE_HOST= : the suite must not take itself for a pod.
inside env KUBERNETES_SERVICE_HOST= "$BIN/ginkgo" -procs="${PROCS:-6}" -timeout=4h --no-color --silence-skips \
	-focus="${FOCUS:-External.Storage}" -skip="${SKIP:-nothing is left out}" "$@" "$BIN/e2e.test" -- \
	-kubeconfig="$KUBECONFIG" -provider=local -storage.testdriver="$driver" -report-dir="$report" -kubectl-path="$BIN/kubectl" \
	-allowed-not-ready-nodes=0 -num-nodes=1 -delete-namespace-on-failure=true -dump-logs-on-failure=false 2>&1 |
	tee "$report/e2e.log" || failed=1
passed=$(grep -oE '[0-9]+ Passed' "$report/e2e.log" | tail -1 | cut -d' ' -f1)
((${passed:-0} >= ${MIN:-1})) || die "only ${passed:-0} specs passed, want at least ${MIN:-1}"
exit "${failed:-0}"
