#!/usr/bin/env bash
# up.sh: start a cluster of one node as processes of this machine, in mount,
# pid, network, uts and ipc namespaces of their own, and wait until the node is
# ready. build.sh must have run.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
((EUID == 0)) || die "needs root"
! is_up || die "the cluster is up already (init is $(init_pid)); run down.sh first"
for program in etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl containerd ctr containerd-shim-runc-v2 \
	runc openssl busybox ip nsenter unshare pgrep mkfs.ext4; do
	command -v "$program" >/dev/null || die "$program is missing; run build.sh and hack/deps.sh demo e2e"
done

mkdir -p "$STATE"/{pki,etcd,containerd,kubelet,run,cni} "$LOG" \
	/var/lib/kubelet /var/lib/csi-qcow2 /var/lib/csi-qcow2-small /lib/modules
rm -f "$STATE/run/init.ready"
for disk in "pool $POOL_SIZE" "small $SMALL_POOL_SIZE"; do
	read -r name size <<<"$disk"
	[[ -e $STATE/$name.img ]] && continue
	truncate -s "$size" "$STATE/$name.img"
	mkfs.ext4 -q -m 0 "$STATE/$name.img"
done
"$HERE/pki.sh"

setsid unshare --mount --pid --net --uts --ipc --fork --mount-proc --propagation private \
	"$HERE/init.sh" &>"$LOG/init.log" </dev/null &
unshared=$!
ready() { [[ -e $STATE/run/init.ready ]] && pgrep -P "$unshared" >"$STATE/init.pid"; }
wait_for 20 "init of the cluster" ready
inside "$HERE/start.sh"
