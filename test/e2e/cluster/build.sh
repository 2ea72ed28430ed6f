#!/usr/bin/env bash
# build.sh [SET...]: build what the cluster runs, from Go modules whose sums are
# committed beside it: kubernetes, etcd, containerd, sidecars, suite (default:
# all). A set that is built already is left alone. PAR packages are compiled at
# once (2). An empty build cache takes a quarter of an hour of two idle processors.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
export CGO_ENABLED=0 GOFLAGS='-mod=readonly -buildvcs=false -trimpath'
modules=$(dirname "$HERE")

# version MODULE: the version that the module of the current directory requires.
version() { go list -m -f '{{.Version}}' "$1"; }

# built SET: nothing that the set is made from has changed.
stamp() { cat go.mod go.sum "$HERE/build.sh" <(go version) <(find . -name '*.go' ! -name '*_test.go' -exec cat {} +) | sha256sum; }
built() { [[ $(stamp) == "$(cat "$E2E/built.$1" 2>/dev/null)" ]]; }

# compile DIR LDFLAGS PACKAGE...: programs named as their packages.
compile() {
	local dir=$1 ldflags=$2 package begin
	shift 2
	mkdir -p "$dir"
	for package in "$@"; do
		begin=$SECONDS
		nice -n 10 go build -p "${PAR:-2}" -ldflags "-s -w $ldflags" -o "$dir/${package##*/}" "$package"
		echo "e2e: built ${package##*/} in $((SECONDS - begin)) s"
	done
}

# kubernetes_version: what Kubernetes says of itself, and the suite compares.
kubernetes_version() {
	local v minor
	v=$(version k8s.io/kubernetes)
	minor=${v#v*.}
	printf -- '-X %s ' "k8s.io/component-base/version.gitVersion=$v" k8s.io/component-base/version.gitMajor=1 \
		"k8s.io/component-base/version.gitMinor=${minor%.*}" k8s.io/component-base/version.gitTreeState=clean \
		"k8s.io/client-go/pkg/version.gitVersion=$v"
}

kubernetes() {
	compile "$BIN" "$(kubernetes_version)" k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kube-scheduler,kubelet,kubectl}
	compile "$BIN" '' k8s.io/kubernetes/test/images/agnhost
}

suite() {
	compile "$BIN" '' github.com/onsi/ginkgo/v2/ginkgo
	local begin=$SECONDS
	nice -n 10 go test -c -p "${PAR:-2}" -ldflags "-s -w $(kubernetes_version)" -o "$BIN/e2e.test" k8s.io/kubernetes/test/e2e
	echo "e2e: built e2e.test in $((SECONDS - begin)) s"
}

etcd() {
	compile "$BIN" '' go.etcd.io/etcd/server/v3
	mv "$BIN/v3" "$BIN/etcd"
}

containerd() {
	local module=github.com/containerd/containerd/v2
	compile "$BIN" "-X $module/version.Version=$(version $module)" $module/cmd/{containerd,ctr,containerd-shim-runc-v2}
}

sidecars() {
	local package
	compile "$BIN" '' ./pause ./standin
	for package in external-provisioner/v6/cmd/csi-provisioner external-attacher/v4/cmd/csi-attacher external-resizer/v2/cmd/csi-resizer \
		external-snapshotter/v8/cmd/csi-snapshotter external-snapshotter/v8/cmd/snapshot-controller; do
		compile "$BIN" '' "github.com/kubernetes-csi/$package"
	done
	mkdir -p "$E2E/crd"
	install -m 644 "$(go list -m -f '{{.Dir}}' github.com/kubernetes-csi/external-snapshotter/client/v8)"/config/crd/*snapshot.storage.k8s.io_*.yaml "$E2E/crd/"
}

declare -A module_of=([kubernetes]=$HERE/kubernetes [suite]=$HERE/kubernetes [etcd]=$HERE/etcd [containerd]=$HERE/containerd [sidecars]=$modules)
sets=("$@")
((${#sets[@]})) || sets=(kubernetes etcd containerd sidecars suite)
mkdir -p "$E2E"
for set in "${sets[@]}"; do
	[[ ${module_of[$set]:-} ]] || die "no set $set; there are: ${!module_of[*]}"
	cd "${module_of[$set]}"
	built "$set" && continue
	"$set"
	stamp >"$E2E/built.$set"
done
