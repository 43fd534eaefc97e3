#!/bin/bash
# One run on several hosts without a scheduler: starts the same `hft train` on each host by ssh, and waits for all.
#   scripts/hosts.sh gpu1 gpu2 -- +method=hft model=llama2_70b data=tulu_v2 engine=zero3 engine.num_processes=8 \
#       output_dir=/shared/runs/llama2-70b-hft
# The first host leads. All hosts need ssh without a password, this folder at the same path, `hft` on the PATH (or
# HFT=/path/to/hft), and must see the model, the data and output_dir. They meet at the first host, by the name given
# here, at port HFT_PORT (29400) and the next one. Ctrl-C stops all with a checkpoint, and the same command continues.
set -u
hosts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    hosts+=("$1")
    shift
done
if [ ${#hosts[@]} -eq 0 ] || [ $# -lt 2 ]; then
    echo "hft: scripts/hosts.sh HOST… -- ARGUMENTS OF hft train" >&2
    exit 2
fi
shift
case " $*" in
*" output_dir="*) ;;
*)
    echo "hft: give output_dir=…, a folder that all hosts see." >&2
    exit 2
    ;;
esac

# A signal to node 0 stops all nodes. The number of its process is in this file on the first host, where no other user
# can put one.
port=${HFT_PORT:-29400}
pid="\"\$HOME\"/.hft-$port.pid"
trap 'ssh "${hosts[0]}" "kill -TERM \$(cat $pid)"' INT TERM

started=()
for i in "${!hosts[@]}"; do
    words=("${HFT:-hft}" train "$@" "engine.num_nodes=${#hosts[@]}" "engine.node_rank=$i"
        "engine.rendezvous=${hosts[0]#*@}:$port")
    line="cd $(printf %q "$PWD") && exec $(printf '%q ' "${words[@]}")"
    [ "$i" -gt 0 ] || line="rm -f $pid; echo \$\$ >$pid && $line"
    ssh "${hosts[i]}" "$line" </dev/null &
    started+=($!)
done

# Exit with the status of the first host that failed. A signal interrupts `wait`, so wait again.
status=0
for one in "${started[@]}"; do
    wait "$one"
    ended=$?
    while kill -0 "$one" 2>/dev/null; do
        wait "$one"
        ended=$?
    done
    [ $status -ne 0 ] || status=$ended
done
exit $status
