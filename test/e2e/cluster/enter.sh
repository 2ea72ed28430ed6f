#!/usr/bin/env bash
# enter.sh [COMMAND...]: run a command, or a shell, in the cluster's namespaces:
#
#     test/e2e/cluster/enter.sh kubectl get pods -A
. "$(dirname "$0")/lib.sh"
is_up || die "the cluster is not up"
(($#)) || set -- bash
inside "$@"
