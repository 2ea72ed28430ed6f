#!/usr/bin/env bash
# init.sh: pid 1 of the cluster's namespaces. It makes the node what a machine
# would be, a network and the disks of two pools, and reaps orphans. When it is
# killed, the kernel ends everything here.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

mount --make-rshared / # the kubelet and containerd want shared propagation
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/containerd
mount --bind "$STATE/kubelet" /var/lib/kubelet
mount --make-rshared /var/lib/kubelet

# The pools have disks of their own, so that their room is known and can end.
mount -o loop "$STATE/pool.img" /var/lib/csi-qcow2
mount -o loop "$STATE/small.img" /var/lib/csi-qcow2-small

hostname "$NODE"
ip link set lo up
ip addr add "$API_IP/32" dev lo
ip link add br0 type bridge
ip addr add "$NODE_IP/${POD_NET#*/}" dev br0
ip link set br0 up
ip route add default dev br0 # there is no way out, but some want a default route
echo 1 >/proc/sys/net/ipv4/ip_forward
ulimit -n "$(ulimit -Hn)"

touch "$STATE/run/init.ready"
trap 'exit 0' TERM INT
while :; do
	sleep 3600 &
	wait $! || true
done
