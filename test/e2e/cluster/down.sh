#!/usr/bin/env bash
# down.sh: end the cluster and remove what it left on the machine. KEEP=1 keeps
# etcd's data, the images and the pools.
set -uo pipefail
. "$(dirname "$0")/lib.sh"

# Loop devices outlive the namespaces: the driver's, and those that the kubelet
# puts on top of them for raw block volumes. The driver's have files that are
# named after their volumes, and these after their pool.
loops=()
if is_up; then
	for uuid in $(inside sh -c 'cat /var/lib/csi-qcow2*/pool.json' 2>/dev/null | grep -o '"uuid":"[0-9a-f]*' | cut -d'"' -f4); do
		mapfile -t -O "${#loops[@]}" loops < <(losetup -l -n -O NAME,BACK-FILE | awk -v volume="/vol-${uuid:0:8}-" 'index($2, volume) { print $1 }')
	done
	kill -9 "$(init_pid)" # the kernel ends the whole pid namespace, and the mounts go with theirs
	for ((i = 0; i < 100; i++)); do
		[[ -d /proc/$(init_pid) ]] || break
		sleep 0.1
	done
fi
dev=$(mountpoint -d /dev)
for loop in "${loops[@]}"; do
	inode=$(stat -c %i "$loop")
	losetup -l -n -O NAME,BACK-INO,BACK-MAJ:MIN | awk -v inode="$inode" -v dev="$dev" '$2 == inode && $3 == dev { print $1 }' | xargs -r -n1 losetup -d
	losetup -d "$loop" 2>/dev/null
done
# Several rounds: a group can be removed only after the groups below it are empty.
for ((i = 0; i < 3; i++)); do
	for group in /sys/fs/cgroup/*/kubepods /sys/fs/cgroup/kubepods /sys/fs/cgroup/*/k8s.io; do
		[[ -d $group ]] && find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null
	done
	sleep 0.3
done
rm -rf "$STATE/init.pid" "$STATE/run" "$STATE/kubelet"
[[ ${KEEP:-} ]] || rm -rf "$STATE"
rmdir /var/lib/kubelet /var/lib/csi-qcow2 /var/lib/csi-qcow2-small /lib/modules 2>/dev/null
exit 0
