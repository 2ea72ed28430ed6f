#!/usr/bin/env bash
# supervise.sh NAME: keep a daemon running, as systemd would: the kubelet ends
# when containerd does not answer at its start. STATE/run/NAME.stop ends it.
. "$(dirname "$0")/lib.sh"
run=$STATE/run/$1
eval "command=($(cat "$run.cmd"))"
restarts=0
while [[ ! -e $run.stop ]]; do
	"${command[@]}" >>"$LOG/$1.log" 2>&1 </dev/null &
	echo $! >"$run.pid"
	wait $!
	echo "supervise: $1 ended with $?" >>"$LOG/$1.log"
	echo $((++restarts)) >"$run.restarts"
	sleep 0.5
done
