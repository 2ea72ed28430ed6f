#!/usr/bin/env bash
# e2e.sh [PART...]: run the driver on a real Kubernetes of one node that it
# starts on this machine. Parts, in their order (default: all):
#
#     build    the cluster's programs, once; a quarter of an hour
#     up       the cluster
#     deploy   the driver, from deploy/kubernetes/overlays/SHAPE (single-node)
#     test     our own tests with real pods; RUN=regexp picks some
#     suite    Kubernetes' external storage suite; FOCUS= and SKIP= pick some
#     down     the end of the cluster; always comes last, unless KEEP=1
#
# SIDECARS=DIR has programs of sidecars that go before those built here.
set -uo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
cd "$repository" || exit 1
. test/e2e/cluster/lib.sh
SHAPE=${SHAPE:-single-node}
overlay=$repository/test/e2e/overlay/$SHAPE

build() {
	hack/deps.sh demo e2e && make --no-print-directory -s build && test/e2e/cluster/build.sh
}

up() { test/e2e/cluster/up.sh; }

# snapshot_controller starts what a cluster has once, whatever its drivers.
snapshot_controller() {
	local distributed=false
	[[ $SHAPE == standard ]] || distributed=true
	inside kubectl apply --server-side -f "$E2E/crd" >/dev/null &&
		inside kubectl wait --for=condition=Established --timeout=60s crd --all >/dev/null &&
		inside bash -c '. "$1"; daemon snapshot-controller snapshot-controller --kubeconfig "$KUBECONFIG" --leader-election=false \
			--enable-distributed-snapshotting="$2" --feature-gates=CSIVolumeGroupSnapshot=true' _ "$repository/test/e2e/cluster/lib.sh" "$distributed"
}

deploy() {
	snapshot_controller && inside kubectl apply -k "$overlay" &&
		inside kubectl -n csi-qcow2 rollout status --timeout=180s daemonset,deployment || return
	local absent
	absent=$(wc -l <"$STATE/absent")
	if ((absent)); then
		echo "e2e: $absent sidecars are ABSENT, their features are not tested: $(xargs <"$STATE/absent")"
	fi
}

# The tests run inside: they reach pods, restart daemons and look at the pool.
test_() {
	(cd test/e2e && CGO_ENABLED=0 go vet . && CGO_ENABLED=0 go test -c -trimpath -o "$E2E/tests" .) &&
		inside env CLUSTER="$repository/test/e2e/cluster" SHAPE="$SHAPE" "$E2E/tests" -test.v -test.timeout 90m -test.run "${RUN:-.}"
}

# The kernel lets nobody without CAP_SYS_RESOURCE grow a mounted ext4.
suite() {
	local description=$STATE/testdriver.yaml
	cp test/e2e/testdriver.yaml "$description" || return
	if ! ((16#$(awk '$1 == "CapBnd:" { print $2 }' /proc/self/status) >> 24 & 1)); then
		echo 'e2e: WITHOUT CAP_SYS_RESOURCE a mounted ext4 cannot grow: the suite takes XFS where it does not name a filesystem'
		sed -i '0,/FromExistingClassName: csi-qcow2/s//FromExistingClassName: xfs/' "$description"
	fi
	test/e2e/cluster/suite.sh "$description"
}

down() { test/e2e/cluster/down.sh; }

main() {
	local parts=("$@") part function begin result failed=0
	((${#parts[@]})) || parts=(build up deploy test suite down)
	for part in "${parts[@]}"; do
		function=$part
		[[ $part == test ]] && function=test_
		[[ $(type -t "$function") == function ]] || die "no part $part"
		[[ $part == down && ${KEEP:-} ]] && continue
		((failed)) && [[ $part != suite && $part != down ]] && continue
		begin=$SECONDS
		if "$function"; then result=ok; else result=FAILED failed=1; fi
		echo "e2e: $part $result, $((SECONDS - begin)) s"
	done
	exit "$failed"
}

main "$@"
