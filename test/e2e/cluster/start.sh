#!/usr/bin/env bash
# start.sh: start the parts of the cluster and wait for the node. up.sh calls it inside.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
pki=$STATE/pki
ulimit -n "$(ulimit -Hn)"
begin=$SECONDS

# The cluster is disposable: etcd need not sync.
daemon etcd etcd --data-dir "$STATE/etcd" --unsafe-no-fsync --log-level warn \
	--listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
	--listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
	--initial-cluster default=http://127.0.0.1:2380

# restrict_oom_score_adj: machines without CAP_SYS_RESOURCE cannot lower the score.
cat >"$STATE/containerd.toml" <<TOML
version = 3
root = "$STATE/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs",
  "io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "localhost/e2e/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
  enable_selinux = false
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        SystemdCgroup = false
        BinaryName = "$(command -v runc)"
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["$CNI_BIN"]
    conf_dir = "$STATE/cni"
TOML
cat >"$STATE/cni/10-bridge.conflist" <<JSON
{"cniVersion": "1.0.0", "name": "e2e", "plugins": [
  {"type": "bridge", "bridge": "br0", "isGateway": false, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$STATE/run/ipam",
            "ranges": [[{"subnet": "$POD_NET", "rangeStart": "${NODE_IP%.*.*}.1.0", "gateway": "$NODE_IP"}]],
            "routes": [{"dst": "0.0.0.0/0"}]}}]}
JSON
daemon containerd containerd --config "$STATE/containerd.toml"

wait_for 60 etcd bash -c 'exec 3<>/dev/tcp/127.0.0.1/2379'
daemon kube-apiserver kube-apiserver --etcd-servers http://127.0.0.1:2379 \
	--advertise-address "$NODE_IP" --secure-port 443 --tls-cert-file "$pki/apiserver.crt" --tls-private-key-file "$pki/apiserver.key" \
	--client-ca-file "$pki/ca.crt" --kubelet-certificate-authority "$pki/ca.crt" \
	--kubelet-client-certificate "$pki/admin.crt" --kubelet-client-key "$pki/admin.key" --kubelet-preferred-address-types InternalIP \
	--service-account-key-file "$pki/sa.key" --service-account-signing-key-file "$pki/sa.key" \
	--service-account-issuer https://kubernetes.default.svc --service-cluster-ip-range "${API_IP%.*}.0/24" \
	--authorization-mode Node,RBAC --allow-privileged=true --max-requests-inflight 2000 --max-mutating-requests-inflight 1000
wait_for 240 kube-apiserver kubectl get --raw /readyz
daemon kube-controller-manager kube-controller-manager --kubeconfig "$KUBECONFIG" --leader-elect=false \
	--service-account-private-key-file "$pki/sa.key" --root-ca-file "$pki/ca.crt" \
	--cluster-signing-cert-file "$pki/ca.crt" --cluster-signing-key-file "$pki/ca.key" \
	--use-service-account-credentials=true --kube-api-qps 100 --kube-api-burst 200 --bind-address 127.0.0.1
daemon kube-scheduler kube-scheduler --kubeconfig "$KUBECONFIG" --leader-elect=false --bind-address 127.0.0.1 --kube-api-qps 100 --kube-api-burst 200

wait_for 60 containerd ctr -a /run/containerd/containerd.sock version
"$HERE/images.sh"

cat >"$STATE/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
failSwapOn: false
makeIPTablesUtilChains: false
tlsCertFile: $pki/kubelet.crt
tlsPrivateKeyFile: $pki/kubelet.key
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $pki/ca.crt}}
authorization: {mode: Webhook}
clusterDomain: cluster.local
clusterDNS: [${API_IP%.*}.10]
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, nodefs.inodesFree: 1%, imagefs.available: 1%, imagefs.inodesFree: 1%}
imageGCHighThresholdPercent: 100 # nobody can pull an image again
imageGCLowThresholdPercent: 99
maxPods: 250
kubeAPIQPS: 100
kubeAPIBurst: 200
syncFrequency: 10s
volumeStatsAggPeriod: 10s
YAML
# The standard shape takes this off when the node agent serves.
if [[ ${SHAPE:-} == standard ]]; then
	echo 'registerWithTaints: [{key: csi-qcow2.dev/agent-not-ready, effect: NoExecute}]' >>"$STATE/kubelet.yaml"
fi
daemon kubelet kubelet --config "$STATE/kubelet.yaml" --kubeconfig "$KUBECONFIG" --hostname-override "$NODE" --node-ip "$NODE_IP" \
	--root-dir /var/lib/kubelet
node_ready() { [[ $(kubectl get node "$NODE" -o jsonpath='{.status.conditions[?(@.type=="Ready")].status}') == True ]]; }
wait_for 240 "ready node" node_ready
wait_for 120 "default service account" kubectl -n default get sa default
kubectl label node "$NODE" --overwrite node-role.kubernetes.io/worker= >/dev/null
kubectl get node -o wide
echo "e2e: the cluster is up after $((SECONDS - begin)) s"
