#!/usr/bin/env bash
# readme.sh: do what README.md tells users of Kubernetes, as it is written: the
# lines from nothing to a restored snapshot, those of an upgrade and those of an
# uninstall. To be called inside, on a cluster without the driver.
#
# Only names of images are put in, where the text has placeholders for them.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
repository=$(cd "$HERE/../../.." && pwd)
work=$(mktemp -d "$STATE/readme.XXXX")
trap 'rm -rf "$work"' EXIT

# block FILE HEADING N: the text of the N-th fenced block below a heading.
block() {
	awk -v heading="$2" -v n="$3" '
		/^#/ && !fence { below = $0 == heading }
		!below { next }
		/^ *```/ { fence = !fence; if (fence) { count++; indent = index($0, "`") }; next }
		fence && count == n { print substr($0, indent) }' "$1" | grep . || die "$1 has no block $3 below \"$2\""
}

# run TITLE N: run the N-th block of README.md as a user would type it; the
# output of its last line is in $work/last.
run() {
	local lines line
	mapfile -t lines < <(block "$repository/README.md" '## On Kubernetes' "$2")
	((${#lines[@]})) || exit 1
	echo "readme: $1, ${#lines[@]} lines"
	for line in "${lines[@]}"; do
		echo "readme: $ $line"
		bash -euo pipefail -c "$line" >"$work/last" 2>&1 || {
			cat "$work/last" >&2
			kubectl get events -A --sort-by=.lastTimestamp | tail -40 >&2
			die "this line of README.md failed: $line"
		}
		sed 's/^/readme:   /' "$work/last"
	done
}

# same: the lines that the reader found at its start, before it shows df, are the writer's.
same() {
	local line found=0
	while read -r line; do
		[[ $line == Filesystem* ]] && break
		grep -qxF "$line" "$work/written" || die "the restored volume has a line that nobody wrote: $line"
		found=$((found + 1))
	done < <(kubectl logs reader)
	((found)) || die "the restored volume has no lines: $(kubectl logs reader)"
}

# The user's directory: the repository, and a kustomization as README.md of
# deploy/kubernetes has it.
cp -r "$repository/deploy" "$work/"
mkdir "$work/my-csi-qcow2"
own=$work/my-csi-qcow2/kustomization.yaml
block "$repository/deploy/kubernetes/README.md" '## Install' 1 >"$own"
sed -i 's#REGISTRY/#localhost/e2e/#; s/VERSION/"1"/' "$own"
cd "$work"

run 'from nothing to a restored snapshot' 1
kubectl exec writer -- cat /data/log >"$work/written"
kubectl logs reader | cmp - "$work/last" || die "the last line shows something else than the reader's log"
same
echo "readme: the pod shows what was restored"

# The controller takes the start-up taint off that the kubelet has put on.
[[ $(kubectl get node "$NODE" -o jsonpath='{.spec.taints}') == *agent-not-ready* ]] && die "node $NODE has its start-up taint still"

sed -i 's/"1"/"2"/' "$own"
run upgrade 2
images=$(kubectl -n csi-qcow2 get pod -l app.kubernetes.io/component=node -o jsonpath='{.items[*].spec.containers[?(@.name=="driver")].image}')
[[ $images == localhost/e2e/csi-qcow2:2 ]] || die "after the upgrade the agents run $images"
# The pods that were there have noticed nothing, and the volumes can be used anew.
lines() { kubectl exec writer -- wc -l /data/log | cut -d' ' -f1; }
more() { (($(lines) > before)); }
before=$(lines)
wait_for 60 "more lines of the writer" more
[[ $(kubectl get pod writer reader -o jsonpath='{.items[*].status.containerStatuses[*].restartCount}') == '0 0' ]] || die "a pod was restarted by the upgrade"
kubectl delete pod reader writer --timeout=5m
kubectl apply -f deploy/kubernetes/examples/volume.yaml -f deploy/kubernetes/examples/restore.yaml
kubectl wait --for=condition=Ready pod/writer pod/reader --timeout=5m
kubectl exec writer -- cat /data/log >"$work/after"
head -n "$(wc -l <"$work/written")" "$work/after" | cmp - "$work/written" || die "the writer's volume has lost lines with the upgrade"
same
echo "readme: the pods have gone on, and all data is there after the upgrade"

run uninstall 3
left=$(kubectl get csidriver,namespace,storageclass,volumesnapshotclass,clusterrole,persistentvolume,volumesnapshotcontent -o name | grep -E 'csi-qcow2|persistentvolume/|snapshotcontent' || true)
[[ -z $left ]] || die "left after the uninstall: $left"
left=$(find /var/lib/csi-qcow2/volumes /var/lib/csi-qcow2/incoming -mindepth 1 2>/dev/null || true)
[[ -z $left ]] || die "left in the pool: $left"
echo "readme: nothing is left"
