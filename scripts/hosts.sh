#!/bin/bash
# One run over several hosts, without a scheduler: starts the same `hft train` on each by ssh, and waits for all.
#   scripts/hosts.sh gpu1 gpu2 -- +method=hft model=llama2_70b data=tulu_v2 engine=zero3 engine.num_processes=8 \
#       output_dir=/shared/runs/llama2-70b-hft
# The first host leads. All need ssh without a password, this folder at the same path, with the model, the data and
# output_dir where they all see them, and `hft` on the PATH (or HFT=/path/to/hft). They meet at the first host, under the
# name given here, at ports HFT_PORT (29400) and the next. Ctrl-C ends all with a checkpoint, and the same line goes on.
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

# Node 0 tells the others when it is stopped; its process is known by this file on the first host.
port=${HFT_PORT:-29400}
pid=/tmp/hft-$(id -un)-$port.pid
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

# The status of the first host that ended badly; a signal interrupts `wait`, and then it waits on.
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
