#!/usr/bin/env bash
# pki.sh: make the cluster's authority, its certificates and an administrator's
# kubeconfig, unless they are there.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$STATE/pki"
[[ -e admin.kubeconfig ]] && exit 0

openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=e2e -keyout ca.key -out ca.crt 2>/dev/null

# leaf NAME SUBJECT [NAMES]: a key and a certificate for servers and clients.
leaf() {
	openssl req -newkey rsa:2048 -nodes -subj "$2" -keyout "$1.key" -out "$1.csr" 2>/dev/null
	{
		echo 'basicConstraints=CA:FALSE'
		echo 'keyUsage=digitalSignature,keyEncipherment'
		echo 'extendedKeyUsage=serverAuth,clientAuth'
		if [[ ${3:-} ]]; then echo "subjectAltName=$3"; fi
	} >"$1.ext"
	openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -extfile "$1.ext" -out "$1.crt" 2>/dev/null
	rm "$1.csr" "$1.ext"
}

leaf apiserver /CN=kube-apiserver \
	"DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:$NODE,IP:127.0.0.1,IP:$NODE_IP,IP:$API_IP"
leaf kubelet "/O=system:nodes/CN=system:node:$NODE" "DNS:$NODE,IP:127.0.0.1,IP:$NODE_IP"
leaf admin /O=system:masters/CN=admin
openssl genrsa -out sa.key 2048 2>/dev/null

inline() { base64 -w0 <"$1"; }
cat >admin.kubeconfig.new <<YAML
apiVersion: v1
kind: Config
clusters:
  - name: e2e
    cluster: {server: "https://$NODE_IP", certificate-authority-data: $(inline ca.crt)}
users:
  - name: admin
    user: {client-certificate-data: $(inline admin.crt), client-key-data: $(inline admin.key)}
contexts:
  - name: e2e
    context: {cluster: e2e, user: admin}
current-context: e2e
YAML
mv admin.kubeconfig.new admin.kubeconfig
