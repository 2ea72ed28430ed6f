#!/usr/bin/env bash
# images.sh: make the cluster's images of programs of this machine, without a
# registry, and import them into containerd. To be called inside.
#
#     pause, busybox, agnhost, glibc   what pods of the tests run; the last three under
#                                      the names that the external storage suite asks for
#     csi-qcow2                        bin/csi-qcow2 and Debian's programs that it calls
#     csi-provisioner ... (sidecars)   one static program each
#
# A sidecar that is neither in SIDECARS nor in BIN nor has a stand-in becomes an
# image that only says so; their names are in STATE/absent.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
repository=$(cd "$HERE/../../.." && pwd)
work=$(mktemp -d "$STATE/images.XXXX")
trap 'rm -rf "$work"' EXIT
path='"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]'

# image ROOT CONFIG TAG...: import the tree as an image of one layer.
image() {
	local root=$1 config=$2 tags digest
	shift 2
	tar --numeric-owner --owner=0 --group=0 --sort=name --mtime=@0 -C "$root" -cf "$work/layer.tar" .
	digest=$(sha256sum <"$work/layer.tar" | cut -d' ' -f1)
	printf '{"architecture":"%s","os":"linux","config":%s,"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
		"$(dpkg --print-architecture)" "$config" "$digest" >"$work/config.json"
	tags=$(printf '"%s",' "$@")
	printf '[{"Config":"config.json","RepoTags":[%s],"Layers":["layer.tar"]}]' "${tags%,}" >"$work/manifest.json"
	tar -C "$work" -cf "$work/image.tar" manifest.json config.json layer.tar
	ctr -a /run/containerd/containerd.sock -n k8s.io images import "$work/image.tar" >/dev/null
	rm -rf "$root"
}

# tree NAME: an empty root with the usual directories; prints its path.
tree() {
	mkdir -p "$work/$1"/{bin,dev,etc,home,proc,root,run,sys,tmp,var}
	chmod 1777 "$work/$1/tmp"
	echo "$work/$1"
}

# program ROOT FILE [TO]: a program and the libraries that it links.
program() {
	local library
	cp -L "$2" "$1/${3:-bin/${2##*/}}"
	{ ldd "$2" 2>/dev/null || true; } | grep -oE '/[^ ]+' | while read -r library; do
		mkdir -p "$1$(dirname "$library")"
		[[ -e $1$library ]] || cp -L "$library" "$1$library"
	done
}

# single FILE CONFIG NAME: an image of one static program, also under the
# version that the manifests want of it.
single() {
	local root versions
	root=$(tree "$3")
	cp "$1" "$root/bin/${1##*/}"
	versions=$(grep -rhoE "image: $3:.+" "$repository/deploy/kubernetes" | cut -d: -f3 | sort -u || true)
	# shellcheck disable=SC2086 # one version per word
	image "$root" "$2" $(printf "localhost/e2e/$3:%s " 1 $versions)
}

single "$BIN/pause" '{"Entrypoint":["/bin/pause"]}' pause

# suite_tags NAME: how the external storage suite calls an image.
suite_images=$("$BIN/e2e.test" --list-images 2>/dev/null || true)
suite_tags() { grep -E "/$1:[0-9]" <<<"$suite_images" | sort -u || true; }

# busybox with a link for each applet. One test of the suite wants nginx, for its shell.
# No user or group is 1000 here: tests read the number from ls.
busybox_tree() {
	local root applet
	root=$(tree "$1")
	program "$root" "$(command -v busybox)"
	for applet in $(busybox --list); do
		[[ $applet == busybox ]] || ln -s /bin/busybox "$root/bin/$applet"
	done
	# shellcheck disable=SC2016 # the shell of the image expands it
	printf '#!/bin/sh\nexec /bin/sh "$@"\n' >"$root/bin/bash"
	chmod 755 "$root/bin/bash"
	printf 'root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n' >"$root/etc/passwd"
	printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
	echo "$root"
}
# What a name without a registry becomes when a pod uses it, as those of README.md do.
library=$(printf 'docker.%s/library' io)
# shellcheck disable=SC2046 # one tag per word
image "$(busybox_tree busybox)" "{\"Cmd\":[\"sh\"],$path}" localhost/e2e/busybox:1 "$library/busybox:1.37" $(suite_tags busybox) $(suite_tags nginx)

root=$(busybox_tree agnhost)
echo 'user-defined-in-image:x:1000:1000::/home:/bin/sh' >>"$root/etc/passwd"
printf 'user-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n' >>"$root/etc/group"
cp "$BIN/agnhost" "$root/agnhost"
ln -s agnhost "$root/agnhost-2"
# shellcheck disable=SC2046 # one tag per word
image "$root" "{\"Entrypoint\":[\"/agnhost\"],\"Cmd\":[\"pause\"],$path}" localhost/e2e/agnhost:1 $(suite_tags agnhost)

# The suite's tests with several volumes want the flags of GNU dd, and blockdev.
root=$(tree glibc)
ln -s . "$root/usr"
for name in bash blockdev mount umount mountpoint base64 cat chmod chown cp date dd df du echo grep head id ln ls md5sum mkdir mv od \
	printf pwd readlink rm rmdir sha256sum sleep stat sync tail test touch tr true wc; do
	program "$root" "$(type -P "$name")"
done
ln -s bash "$root/bin/sh"
printf 'root:x:0:0:root:/:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\n' >"$root/etc/group"
# shellcheck disable=SC2046 # one tag per word
image "$root" "{\"Cmd\":[\"sh\"],$path}" localhost/e2e/glibc:1 $(suite_tags glibc-dns-testing)

# The driver: what deploy/kubernetes/Dockerfile would install, as far as the driver calls it.
root=$(tree csi-qcow2)
ln -s . "$root/usr"
ln -s bin "$root/sbin"
for name in mkfs.ext4 e2fsck resize2fs mkfs.xfs xfs_growfs xfs_repair xfs_db mount umount blkid fsfreeze fstrim modprobe; do
	program "$root" "$(type -P "$name")"
done
cp /etc/mke2fs.conf "$root/etc/"
cp "$repository/bin/csi-qcow2" "$root/bin/"
# Version 2 is what README.md upgrades to; nothing else is newer in it.
image "$root" "{\"Entrypoint\":[\"/bin/csi-qcow2\"],$path}" localhost/e2e/csi-qcow2:{1,2}

# The sidecars. Two have a stand-in with the flags of the original.
: >"$STATE/absent"
for name in csi-provisioner csi-attacher csi-resizer csi-snapshotter csi-snapshot-metadata csi-node-driver-registrar livenessprobe; do
	if [[ $SIDECARS && -x $SIDECARS/$name ]]; then
		single "$SIDECARS/$name" "{\"Entrypoint\":[\"/bin/$name\"]}" "$name"
	elif [[ -x $BIN/$name ]]; then
		single "$BIN/$name" "{\"Entrypoint\":[\"/bin/$name\"]}" "$name"
	else
		single "$BIN/standin" "{\"Entrypoint\":[\"/bin/standin\",\"$name\"]}" "$name"
		"$BIN/standin" "$name" --is-standin || echo "$name" >>"$STATE/absent"
	fi
done
