#!/usr/bin/env bash
# A Slurm cluster on this machine's loopback interface, for tests: munged, slurmctld and one slurmd for
# each of a few made-up nodes, all as the current user, with everything they write below one folder.
#
#   cluster.sh start DIR [NODES]   starts it, waits until every node is idle, prints `export SLURM_CONF=…`
#   cluster.sh stop DIR            ends its jobs and its daemons; DIR keeps the logs
#
# Two CPUs a node (default two nodes). Partitions: `work` (default) and `urgent`, whose jobs preempt those
# of `work` by requeueing them. It needs Debian's packages slurmctld slurmd slurm-client munge, and neither
# systemd, nor cgroups, nor accounting.
set -euo pipefail

fail() { echo "cluster.sh: $*" >&2; exit 1; }

# Ends the daemon whose process id stands in the file $1, and waits for it.
end() {
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  kill "$pid" 2>/dev/null || return 0
  for _ in $(seq 100); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null || true
}

stop() {
  if [ -e "$dir/slurmctld.pid" ]; then
    # What nobody cancelled ends now; what does not end is killed with its slurmstepd.
    timeout 10 scancel --user="$(id -un)" --signal=KILL --full 2>/dev/null || true
    timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 50); do
      [ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ] || break
      sleep 0.1
    done
  fi
  for pid in "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
    end "$pid"
  done
}

# Prints a TCP port that nothing listens on, of the $1 from a random one on.
free_ports() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    for ((i = 0; i < $1; i++)); do
      (exec 3<>"/dev/tcp/127.0.0.1/$((port + i))") 2>/dev/null && continue 2
    done
    echo "$port"
    return
  done
}

start() {
  local nodes=$1 ports
  for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null ||
      fail "no $program; apt-get install slurmctld slurmd slurm-client munge"
  done
  mkdir -p "$dir/state"
  # munged refuses keys and sockets in folders that others can write.
  chmod 755 "$dir"
  ports=$(free_ports $((nodes + 1)))

  [ -e "$dir/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
  munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" >>"$dir/munged.out" 2>&1 ||
    fail "munged did not start: $(tail -n 3 "$dir/munged.log" "$dir/munged.out")"

  cat >"$dir/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# A requeued job waits until its old credential has expired: two minutes by default.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=$ports
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
StateSaveLocation=$dir/state
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/slurmd-%n.log
SlurmdSpoolDir=$dir/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
# Everything at once: a requeued job may begin again in the same second.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0,preempt_youngest_first
KillWait=5
MinJobAge=300
OverTimeLimit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
  for ((i = 0; i < nodes; i++)); do
    mkdir -p "$dir/spool-n$i"
    echo "NodeName=n$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((ports + 1 + i)) CPUs=2 RealMemory=1000" \
      >>"$dir/slurm.conf"
  done
  cat >>"$dir/slurm.conf" <<CONF
PartitionName=work Nodes=ALL Default=YES PriorityTier=1 MaxTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
CONF
  # Never used, but slurmd wants one; the second version looks for systemd as soon as it is loaded.
  echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"

  slurmctld -i >>"$dir/slurmctld.out" 2>&1 || fail "slurmctld did not start: $(tail -n 5 "$dir/slurmctld.log")"
  for ((i = 0; i < nodes; i++)); do
    slurmd -N "n$i" >>"$dir/slurmd.out" 2>&1 || fail "slurmd did not start: $(tail -n 5 "$dir/slurmd-n$i.log" "$dir/slurmd.out")"
  done
  for _ in $(seq 100); do
    if [ "$(timeout 10 sinfo --noheader --Node --partition=work --states=idle 2>/dev/null | wc -l)" = "$nodes" ]; then
      echo "export SLURM_CONF='$SLURM_CONF'"
      return
    fi
    sleep 0.1
  done
  sinfo >&2 || true
  fail "the nodes did not become idle: $(tail -n 5 "$dir"/*.log)"
}

[ $# -ge 2 ] || fail "use: cluster.sh start DIR [NODES] | cluster.sh stop DIR"
mkdir -p "$2"
dir=$(cd "$2" && pwd)
export SLURM_CONF="$dir/slurm.conf"
case $1 in
  start)
    trap 'stop' EXIT
    start "${3:-2}"
    trap - EXIT
    ;;
  stop) stop ;;
  *) fail "use: cluster.sh start DIR [NODES] | cluster.sh stop DIR" ;;
esac
