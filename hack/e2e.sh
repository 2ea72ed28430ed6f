#!/usr/bin/env bash
# e2e.sh [PART...]: run the driver on a real Kubernetes of one node that it
# starts on this machine. Parts, in their order (default: all):
#
#     build    the cluster's programs, once; a quarter of an hour
#     up       the cluster
#     readme   what README.md tells users of Kubernetes, as it is written
#     deploy   the driver, from deploy/kubernetes/overlays/SHAPE (standard)
#     test     our own tests with real pods; RUN=regexp picks some
#     suite    Kubernetes' external storage suite; FOCUS= and SKIP= pick some,
#              SKIP='\[Disruptive\]|\[Slow\]|any volume data source' the quicker ones
#     down     the end of the cluster; always comes last, unless KEEP=1
#
# SIDECARS=DIR has programs of sidecars that go before those built here.
set -uo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
cd "$repository" || exit 1
. test/e2e/cluster/lib.sh
export SHAPE=${SHAPE:-standard}
left_out='\[Disruptive\]|any volume data source' # see docs/e2e.md
overlay=$repository/test/e2e/overlay/$SHAPE

build() {
	hack/deps.sh demo e2e && make --no-print-directory -s build && test/e2e/cluster/build.sh
}

up() { test/e2e/cluster/up.sh; }

# snapshot_controller starts what a cluster has once, whatever its drivers.
snapshot_controller() {
	local distributed=false
	[[ -e $STATE/run/snapshot-controller.cmd ]] && return
	[[ $SHAPE == standard ]] || distributed=true
	inside kubectl apply --server-side -f "$E2E/crd" >/dev/null &&
		inside kubectl wait --for=condition=Established --timeout=60s crd --all >/dev/null &&
		inside bash -c '. "$1"; daemon snapshot-controller snapshot-controller --kubeconfig "$KUBECONFIG" --leader-election=false \
			--enable-distributed-snapshotting="$2" --feature-gates=CSIVolumeGroupSnapshot=true' _ "$repository/test/e2e/cluster/lib.sh" "$distributed"
}

readme() {
	if [[ $SHAPE != standard ]]; then
		echo "e2e: WITHOUT the lines of README.md, which are for the standard shape: the shape is $SHAPE"
		return
	fi
	snapshot_controller && inside "$repository/test/e2e/cluster/readme.sh"
}

deploy() {
	snapshot_controller && inside kubectl apply -k "$overlay" &&
		inside kubectl -n csi-qcow2 rollout status --timeout=180s daemonset/csi-qcow2-node &&
		inside kubectl -n csi-qcow2 wait --for=condition=Ready --timeout=180s pod --all >/dev/null || return
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

# grows are the specs that make a filesystem larger while a pod uses it.
grows='volume-expand|support expansion of pvcs created for ephemeral'

suite() {
	local description=$STATE/testdriver.yaml skip=${SKIP:-$left_out}
	cp test/e2e/testdriver.yaml "$description" || return
	if [[ $SHAPE != standard ]]; then
		echo "e2e: WITHOUT group and pre-provisioned snapshots, which need a leader: the shape is $SHAPE"
		skip+='|Pre-provisioned Snapshot'
		sed -i '/groupSnapshot:/d; /^GroupSnapshotClass:/,+1d' "$description"
	fi
	if [[ ${FOCUS:-} ]] || ((16#$(awk '$1 == "CapBnd:" { print $2 }' /proc/self/status) >> 24 & 1)); then
		SKIP=$skip test/e2e/cluster/suite.sh "$description"
		return
	fi
	echo 'e2e: WITHOUT CAP_SYS_RESOURCE the kernel grows no mounted ext4: these specs run on XFS'
	SKIP="$skip|$grows" test/e2e/cluster/suite.sh "$description" || return
	sed '0,/FromExistingClassName: csi-qcow2/s//FromExistingClassName: xfs/' "$description" >"$STATE/testdriver-xfs.yaml"
	SKIP=$skip FOCUS="External.Storage.*($grows)" REPORT=$E2E/report-xfs test/e2e/cluster/suite.sh "$STATE/testdriver-xfs.yaml"
}

down() { test/e2e/cluster/down.sh; }

main() {
	local parts=("$@") part function begin result failed=0
	((${#parts[@]})) || parts=(build up readme deploy test suite down)
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
