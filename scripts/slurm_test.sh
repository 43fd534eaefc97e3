#!/bin/bash
# make test-slurm: starts a SLURM with two nodes on this machine, without accounting, runs the tests in
# tests/end_to_end/test_slurm.py, and removes it. Needs Debian's packages slurm-wlm and munge; as root it installs them.
#   scripts/slurm_test.sh PYTHON [ARGUMENTS OF PYTEST]
set -euo pipefail
python=$1
shift
PATH=$PATH:/usr/sbin:/sbin
needed=(slurmctld slurmd munged sbatch)
if ! command -v "${needed[@]}" >/dev/null || [ "$(command -v "${needed[@]}" | wc -l)" -lt ${#needed[@]} ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "make test-slurm needs SLURM: as root, apt-get install slurm-wlm slurm-wlm-basic-plugins munge" >&2
        exit 2
    fi
    # Keeps Debian from starting the daemons that it installs. Removed afterwards.
    policy=/usr/sbin/policy-rc.d
    [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && trap 'rm -f $policy' EXIT; }
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
        slurm-wlm slurm-wlm-basic-plugins munge >/dev/null
    trap - EXIT
    [ "$(tail -1 $policy 2>/dev/null)" != "exit 101" ] || rm -f $policy
fi

home=$(mktemp -d "${TMPDIR:-/tmp}/hft-slurm-XXXXXX")
chmod 755 "$home"
daemons=()
tests=
set -m # a process group for each daemon, so that Ctrl-C reaches this script only
export SLURM_CONF=$home/slurm.conf

# Remove all jobs, daemons and files, also after a failed test or Ctrl-C.
down() {
    status=$?
    trap '' INT TERM
    trap - EXIT
    if [ -n "$tests" ] && kill -INT -- "-$tests" 2>/dev/null; then
        for _ in $(seq 60); do
            kill -0 -- "-$tests" 2>/dev/null || break
            sleep 0.5
        done
        kill -KILL -- "-$tests" 2>/dev/null || true
    fi
    if [ ${#daemons[@]} -gt 1 ]; then
        scancel --signal=KILL --full --user="$(id -un)" 2>/dev/null || true
        scancel --user="$(id -un)" 2>/dev/null || true
        for _ in $(seq 40); do
            [ -n "$(squeue --noheader 2>/dev/null)" ] || break
            sleep 0.5
        done
    fi
    for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
        kill "${daemons[i]}" 2>/dev/null || true
        wait "${daemons[i]}" 2>/dev/null || true
    done
    for pid in $(pgrep -x slurmstepd || true); do # one that hangs; of this SLURM only
        if grep -zqxF "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ" 2>/dev/null; then
            kill -KILL "$pid"
        fi
    done
    if [ $status -ne 0 ] && [ -n "${HFT_SLURM_KEEP:-}" ]; then
        echo "Kept: $home" >&2
    else
        rm -rf "$home"
    fi
    exit $status
}
trap down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

read -r -a port <<<"$("$python" - <<'END'
import socket
sockets = [socket.socket() for _ in range(3)]
for sock in sockets:
    sock.bind(("127.0.0.1", 0))
print(*(sock.getsockname()[1] for sock in sockets))
END
)"
mkdir "$home/state" "$home/n1" "$home/n2"
user=$(id -un)
cat >"$SLURM_CONF" <<END
ClusterName=hft
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${port[0]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# Seconds after which a requeued job starts again; the default is 120.
AuthInfo=socket=$home/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/%n
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/%n.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=${port[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=${port[2]} CPUs=2 RealMemory=1000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=60 PriorityTier=2
END
dd if=/dev/urandom of="$home/munge.key" bs=128 count=1 status=none
chmod 600 "$home/munge.key"

munged --foreground --force --socket="$home/munge.socket" --key-file="$home/munge.key" \
    --pid-file="$home/munged.pid" --seed-file="$home/munged.seed" --log-file="$home/munged.log" \
    >"$home/munged.out" 2>&1 &
daemons+=($!)
for _ in $(seq 50); do
    [ ! -S "$home/munge.socket" ] || break
    sleep 0.1
done
slurmctld -D >"$home/slurmctld.out" 2>&1 &
daemons+=($!)
for node in n1 n2; do
    slurmd -D -N $node >"$home/$node.out" 2>&1 &
    daemons+=($!)
done
for _ in $(seq 60); do
    [ "$(sinfo --noheader --format=%D --states=idle --partition=all 2>/dev/null)" != 2 ] || break
    sleep 0.5
done
if [ "$(sinfo --noheader --format=%D --states=idle --partition=all 2>/dev/null)" != 2 ]; then
    echo "SLURM did not come up:" >&2
    tail -n 5 "$home"/*.log "$home"/*.out >&2
    exit 1
fi

cd "$(dirname "$0")/.."
HFT_TEST_SLURM=1 "$python" -m pytest tests/end_to_end/test_slurm.py "$@" &
tests=$!
wait "$tests" # in the background, so that this script reacts to a signal at once
