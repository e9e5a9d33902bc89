#!/usr/bin/env bash
# A Slurm of one node for tests: controller, daemon and munge of its own, without systemd and beside any other Slurm.
#   slurm.sh start FOLDER   leaves FOLDER/slurm.conf, to be given to the client commands in SLURM_CONF
#   slurm.sh stop FOLDER
# Needs slurmctld, slurmd, sbatch (Debian: slurm-wlm) and munged (munge). FOLDER must be short: a socket lies in it.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
action=$1 folder=$2
host=$(hostname -s)
user=$(id -un)

configure() {
	local port=$((20000 + RANDOM % 12000))
	mkdir -p "$folder/state" "$folder/spool"
	chmod a+x "$folder" # munged wants its socket to be within everyone's reach
	cat > "$folder/slurm.conf" <<-CONF
		ClusterName=test
		SlurmctldHost=$host(127.0.0.1)
		SlurmctldPort=$port
		SlurmdPort=$((port + 1))
		AuthType=auth/munge
		# a requeued job starts when its credential has expired; the default is two minutes
		AuthInfo=socket=$folder/munge.socket,cred_expire=5
		MpiDefault=none
		ProctrackType=proctrack/linuxproc
		TaskPlugin=task/none
		SwitchType=switch/none
		ReturnToService=2
		SlurmUser=$user
		SlurmdUser=$user
		SlurmctldPidFile=$folder/slurmctld.pid
		SlurmdPidFile=$folder/slurmd.pid
		StateSaveLocation=$folder/state
		SlurmdSpoolDir=$folder/spool
		SlurmctldLogFile=$folder/slurmctld.log
		SlurmdLogFile=$folder/slurmd.log
		SchedulerType=sched/backfill
		SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
		SelectType=select/cons_tres
		SelectTypeParameters=CR_Core
		# seconds between SIGTERM and SIGKILL
		KillWait=2
		NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
		PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
	CONF
}

start() {
	configure
	(umask 077 && head -c 128 /dev/urandom > "$folder/munge.key")
	munged --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
		--log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
	slurmctld -f "$folder/slurm.conf"
	slurmd -f "$folder/slurm.conf"
	for _ in $(seq 60); do
		[ "$(SLURM_CONF="$folder/slurm.conf" timeout 5 sinfo -h -o %T 2> /dev/null)" = idle ] && return
		sleep 0.25
	done
	tail -n 20 "$folder"/*.log >&2
	exit 1
}

stop() {
	for daemon in slurmd slurmctld munged; do
		[ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" 2> /dev/null || true
	done
}

$action
