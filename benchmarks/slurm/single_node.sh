#!/usr/bin/env bash
# Make this machine a Slurm cluster of one node, to try the runner under srun and sbatch.
# Run as root on Debian (tried on 13) or in a container of it; running it again restarts the daemons.
#
#   single_node.sh          install what is missing, write /etc/slurm/slurm.conf, start the daemons
#   single_node.sh stop     end them
#
# Daemons listen on 127.0.0.1 only. There is no accounting and no cgroup, so memory is not enforced.
# TASK_PLUGIN=task/none starts a node that binds no task to CPUs; the default binds.
set -euo pipefail

state=/var/lib/mla-slurm                       # logs, pid files and the controller's state
conf=/etc/slurm/slurm.conf
mark="# written by mla's single_node.sh"       # a configuration without it is somebody's real one
node=$(hostname -s)

stop() {
    for daemon in slurmd slurmctld munged; do
        pid=$(cat "$state/$daemon.pid" 2>/dev/null) || continue
        [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$daemon" ] || continue
        kill "$pid"
        while [ -d "/proc/$pid" ]; do sleep 0.1; done
        echo "stopped $daemon"
    done
}

install_packages() {
    command -v slurmctld slurmd srun munged >/dev/null && return
    apt-get update
    # Without systemd nothing starts by itself; with it, the packages' own services must not.
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
    DEBIAN_FRONTEND=noninteractive apt-get install -y slurmctld slurmd slurm-client munge
    rm /usr/sbin/policy-rc.d
}

write_configuration() {
    if [ -e "$conf" ] && ! grep -qF "$mark" "$conf"; then
        echo "$conf is not this script's: move it away first" >&2
        exit 2
    fi
    facts=$(slurmd -C 2>/dev/null | grep -o 'CPUs=.*RealMemory=[0-9]*')
    cat >"$conf" <<END
$mark
ClusterName=single
SlurmctldHost=$node(127.0.0.1)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=${TASK_PLUGIN:-task/affinity}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=15
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/slurmd
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
NodeName=$node NodeAddr=127.0.0.1 $facts State=UNKNOWN
PartitionName=main Nodes=$node Default=YES MaxTime=1:00:00 OverSubscribe=YES State=UP
END
    echo "CgroupPlugin=disabled" >/etc/slurm/cgroup.conf
}

start() {
    mkdir -p "$state/ctld" "$state/slurmd"
    install -d -o munge -g munge -m 755 /run/munge
    [ -e /etc/munge/munge.key ] || runuser -u munge -- mungekey --create
    # munged refuses a pid file or a log below a folder that others may write to.
    install -d -o munge -g munge -m 755 "$state/munge"
    runuser -u munge -- munged --pid-file="$state/munge/munged.pid" --log-file="$state/munge/munged.log"
    ln -sf munge/munged.pid "$state/munged.pid"
    slurmctld
    slurmd
    for _ in $(seq 100); do
        [ "$(sinfo -h -o %T 2>/dev/null)" = idle ] && break
        sleep 0.1
    done
    sinfo
}

[ "$(id -u)" = 0 ] || { echo "single_node.sh must run as root" >&2; exit 2; }
case ${1:-start} in
start)
    install_packages
    stop
    write_configuration
    start
    ;;
stop) stop ;;
*)
    echo "usage: single_node.sh [start|stop]" >&2
    exit 2
    ;;
esac
