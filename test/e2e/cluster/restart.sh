#!/usr/bin/env bash
# restart.sh DAEMON [SIGNAL]: end a daemon of the cluster with a signal (KILL)
# and wait until its supervisor has started it again. To be called inside.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
name=${1:?name of the daemon} signal=${2:-KILL}
run=$STATE/run/$name
[[ -e $run.cmd ]] || die "no daemon $name; there are: $(cd "$STATE/run" && ls -- *.cmd | sed 's/\.cmd$//' | xargs)"
old=$(cat "$run.pid")
replaced() {
	local new
	new=$(cat "$run.pid")
	[[ $new && $new != "$old" && -d /proc/$new ]]
}
kill -"$signal" "$old"
wait_for 30 "restart of $name" replaced
