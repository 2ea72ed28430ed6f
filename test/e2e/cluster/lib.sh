# lib.sh: settings and helpers of the scripts beside it; they source it.
#
# E2E has everything that the cluster needs and makes. The rest follows from it.
E2E=${E2E:-${XDG_CACHE_HOME:-$HOME/.cache}/csi-qcow2-e2e}
BIN=${BIN:-$E2E/bin}           # Kubernetes, etcd, containerd
SIDECARS=${SIDECARS:-}         # a directory of sidecars that go before those of BIN
STATE=${STATE:-$E2E/state}     # etcd's data, containers, certificates, pools
LOG=${LOG:-$E2E/log}
NODE=${NODE:-node1}
NODE_IP=10.88.0.1              # of the bridge in the cluster's network namespace
POD_NET=10.88.0.0/16
API_IP=10.96.0.1               # of the service "kubernetes"; there is no kube-proxy, the node has this address itself
CNI_BIN=${CNI_BIN:-/usr/lib/cni}
POOL_SIZE=${POOL_SIZE:-24G}    # of the sparse file that is the pool's disk
SMALL_POOL_SIZE=${SMALL_POOL_SIZE:-320M}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export E2E BIN SIDECARS STATE LOG NODE
export PATH=$BIN:$PATH:/usr/sbin:/sbin
export KUBECONFIG=$STATE/pki/admin.kubeconfig

die() {
	echo "e2e: $*" >&2
	exit 1
}

# wait_for SECONDS WHAT COMMAND...: run the command until it succeeds.
wait_for() {
	local seconds=$1 what=$2 i
	shift 2
	for ((i = 0; i < seconds * 5; i++)); do
		"$@" &>/dev/null && return
		sleep 0.2
	done
	die "no $what after $seconds s, see $LOG"
}

# init_pid prints the pid of the cluster's init, as seen from outside.
init_pid() { cat "$STATE/init.pid" 2>/dev/null; }

# is_up: the cluster's init runs.
is_up() {
	local pid
	pid=$(init_pid) && grep -qs init.sh "/proc/$pid/cmdline"
}

# inside COMMAND...: run it in the cluster's namespaces.
inside() { nsenter -t "$(init_pid)" -m -p -n -u -i -- "$@"; }

# daemon NAME COMMAND...: start it below supervise.sh; to be called inside. Its
# log is LOG/NAME.log, its pid (inside) STATE/run/NAME.pid.
daemon() {
	local name=$1
	shift
	printf '%q ' "$@" >"$STATE/run/$name.cmd"
	rm -f "$STATE/run/$name".{pid,stop,restarts}
	setsid nohup "$HERE/supervise.sh" "$name" &>/dev/null </dev/null &
	wait_for 10 "start of $name" test -s "$STATE/run/$name.pid"
}
