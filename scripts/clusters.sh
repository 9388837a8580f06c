#!/bin/bash
# Sweeps and runs on real clusters, disturbed: Slurm with and without accounting, Ray, MLflow on PostgreSQL and MariaDB,
# torchrun. On a Debian machine, as root; half an hour on two idle cores:
#
#     scripts/clusters.sh [FOLDER [GROUP[:CASE]...]]     # a new temporary folder; all of scripts/cluster_cases.py
#
# Installs slurm-wlm, slurmdbd, munge, mariadb-server and postgresql by apt-get, and the extras slurm and ray, psycopg and
# PyMySQL into .venv. Daemons are started by hand, with files in FOLDER and ports of their own: neither systemd nor
# cgroups are needed, and nothing of the system's own configuration is touched but two lines of /etc/hosts, the nodes'
# names. Prints the table of what was seen (FOLDER/table.md), and ends all that it started.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD PYTHON=$PWD/.venv/bin/python HOST=$(hostname)
FOLDER=${1:-$(mktemp -d -t clusters.XXXX)}
GROUPS_ASKED=("${@:2}")
[ ${#GROUPS_ASKED[@]} -gt 0 ] || GROUPS_ASKED=(slurm accounting ray postgresql mariadb torchrun)
SLURMCTLD_PORT=26817 SLURMDBD_PORT=26819 NODE_PORTS=[26821-26822] MARIADB_PORT=26823 POSTGRESQL_PORT=26824
export RAY_PORT=26825 SLURM_CONF=$FOLDER/slurm/slurm.conf
POSTGRESQL=$(echo /usr/lib/postgresql/*/bin | tr ' ' '\n' | tail -1)
MARKER="# moepp clusters"

install_packages() {
    local packages=(slurm-wlm slurmdbd munge mariadb-server postgresql)
    if ! dpkg -s "${packages[@]}" > /dev/null 2>&1; then
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${packages[@]}"
    fi
    "$PYTHON" -m pip install -q "submitit>=1.5" "ray>=2.50" "psycopg[binary]" pymysql
    POSTGRESQL=$(echo /usr/lib/postgresql/*/bin | tr ' ' '\n' | tail -1)
}

until_ok() {  # a command, for two minutes
    for _ in $(seq 240); do "$@" > /dev/null 2>&1 && return 0; sleep 0.5; done
    echo "not within two minutes: $*" >&2; return 1
}

end() {  # the process of each pid file, and then waits for it
    local file process
    for file in "$@"; do
        process=$(head -1 "$file" 2> /dev/null) || continue
        kill "$process" 2> /dev/null || true
        until_ok gone "$process" || kill -9 "$process" || true
        rm -f "$file"
    done
}

gone() { ! kill -0 "$1" 2> /dev/null; }

# Slurm: two nodes that are this machine

write_slurm_conf() {  # none or slurmdbd
    cat > "$SLURM_CONF" << END
ClusterName=clusters
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmctldPort=$SLURMCTLD_PORT
AuthType=auth/munge
AuthInfo=socket=$FOLDER/slurm/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$FOLDER/slurm/state
SlurmdSpoolDir=$FOLDER/slurm/spool-%n
SlurmctldPidFile=$FOLDER/slurm/slurmctld.pid
SlurmdPidFile=$FOLDER/slurm/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/slurm/slurmctld.log
SlurmdLogFile=$FOLDER/slurm/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=20
MinJobAge=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/$1
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$SLURMDBD_PORT
AccountingStoragePass=$FOLDER/slurm/munge.socket
NodeName=n[1-2] NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$NODE_PORTS CPUs=4 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
END
}

start_munge() {
    mkdir -p "$FOLDER/slurm/state"
    head -c 1024 /dev/urandom > "$FOLDER/slurm/munge.key"
    chmod 400 "$FOLDER/slurm/munge.key"
    munged --force --key-file="$FOLDER/slurm/munge.key" --socket="$FOLDER/slurm/munge.socket" \
        --pid-file="$FOLDER/slurm/munge.pid" --log-file="$FOLDER/slurm/munged.log" --seed-file="$FOLDER/slurm/munge.seed"
    echo "127.0.0.1 n1 n2 $MARKER" >> /etc/hosts
}

start_slurm() {
    write_slurm_conf "$1"
    slurmctld
    slurmd -N n1
    slurmd -N n2
    until_ok eval '[ "$(sinfo --noheader --format=%t | sort -u)" = idle ]'
}

start_slurmdbd() {
    [ ! -s "$FOLDER/slurm/slurmdbd.pid" ] || return 0
    mariadb --socket="$FOLDER/mariadb/socket" -e "create database slurm"
    cat > "$FOLDER/slurm/slurmdbd.conf" << END
AuthType=auth/munge
AuthInfo=socket=$FOLDER/slurm/munge.socket
DbdHost=$HOST
DbdAddr=127.0.0.1
DbdPort=$SLURMDBD_PORT
SlurmUser=root
PidFile=$FOLDER/slurm/slurmdbd.pid
LogFile=$FOLDER/slurm/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$MARIADB_PORT
StorageUser=clusters
StoragePass=clusters
StorageLoc=slurm
END
    chmod 600 "$FOLDER/slurm/slurmdbd.conf"
    slurmdbd
    until_ok sacctmgr -i add cluster clusters || until_ok sacctmgr -n show cluster
}

stop_slurm() {
    end "$FOLDER"/slurm/slurmctld.pid "$FOLDER"/slurm/slurmd-*.pid
}

# Ray: a head on loopback, and a second node

start_ray() {
    export RAY_USAGE_STATS_ENABLED=0
    [ ! -f ~/.ray/auth_token ] || export RAY_AUTH_MODE=token  # a head shows it unasked, other nodes do not
    ray_node --head --port="$RAY_PORT" --include-dashboard=false --temp-dir="$FOLDER/r"
    until_ok eval "echo > /dev/tcp/127.0.0.1/$RAY_PORT"
    ray_node --address="127.0.0.1:$RAY_PORT"
    sleep 10
}

ray_node() {
    setsid "$ROOT/.venv/bin/ray" start "$@" --node-ip-address=127.0.0.1 --num-cpus=1 --block >> "$FOLDER/ray.log" 2>&1 &
    echo $! >> "$FOLDER/ray.pids"
}

stop_ray() {
    [ -s "$FOLDER/ray.pids" ] || return 0
    while read -r leader; do kill -9 -- "-$leader" 2> /dev/null || true; done < "$FOLDER/ray.pids"
    rm "$FOLDER/ray.pids"
}

# Databases; the cases kill and start them by FOLDER/restart-*

start_postgresql() {
    [ ! -d "$FOLDER/postgresql" ] || return 0
    install -d -o postgres "$FOLDER/postgresql"
    runuser -u postgres -- "$POSTGRESQL/initdb" -D "$FOLDER/postgresql" --auth=trust > /dev/null
    cat > "$FOLDER/restart-postgresql" << END
#!/bin/sh
cd /
runuser -u postgres -- $POSTGRESQL/pg_ctl -D $FOLDER/postgresql stop -m immediate > /dev/null 2>&1
sleep 10
exec runuser -u postgres -- $POSTGRESQL/pg_ctl -D $FOLDER/postgresql -w -l $FOLDER/postgresql/log \\
    -o "-p $POSTGRESQL_PORT -k $FOLDER/postgresql -c listen_addresses=127.0.0.1" start > /dev/null
END
    chmod +x "$FOLDER/restart-postgresql"
    "$FOLDER/restart-postgresql"
    runuser -u postgres -- "$POSTGRESQL/createdb" -h 127.0.0.1 -p "$POSTGRESQL_PORT" mlflow
}

start_mariadb() {
    [ ! -d "$FOLDER/mariadb" ] || return 0
    install -d -o mysql "$FOLDER/mariadb"
    mariadb-install-db --user=mysql --datadir="$FOLDER/mariadb/data" --skip-test-db > /dev/null
    cat > "$FOLDER/restart-mariadb" << END
#!/bin/sh
[ ! -s $FOLDER/mariadb/pid ] || kill -9 \$(cat $FOLDER/mariadb/pid)
sleep 10
setsid mariadbd --no-defaults --user=mysql --datadir=$FOLDER/mariadb/data --socket=$FOLDER/mariadb/socket \\
    --pid-file=$FOLDER/mariadb/pid --port=$MARIADB_PORT --bind-address=127.0.0.1 \\
    --innodb-lock-wait-timeout=900 > $FOLDER/mariadb/log 2>&1 &
for _ in \$(seq 60); do mariadb --socket=$FOLDER/mariadb/socket -e "select 1" > /dev/null 2>&1 && exit; sleep 0.5; done
exit 1
END
    chmod +x "$FOLDER/restart-mariadb"
    "$FOLDER/restart-mariadb"
    mariadb --socket="$FOLDER/mariadb/socket" -e "create database mlflow; create user clusters@'%' identified by \
        'clusters'; grant all on *.* to clusters@'%'; create user clusters@localhost identified by 'clusters';\
        grant all on *.* to clusters@localhost"
}

stop_databases() {
    if [ -s "$FOLDER/postgresql/postmaster.pid" ]; then
        (cd / && runuser -u postgres -- "$POSTGRESQL/pg_ctl" -D "$FOLDER/postgresql" stop -m fast > /dev/null) || true
    fi
    end "$FOLDER/mariadb/pid"
}

stop() {
    kill "$cases" 2> /dev/null || true
    stop_ray
    [ ! -s "$FOLDER/slurm/slurmctld.pid" ] || scancel --user=root || true
    stop_slurm
    end "$FOLDER/slurm/slurmdbd.pid" "$FOLDER/slurm/munge.pid"
    stop_databases
    sed "/$MARKER/d" /etc/hosts > "$FOLDER/hosts" && cat "$FOLDER/hosts" > /etc/hosts  # a container's cannot be renamed
}

try() {  # a group, or one of its cases
    local group=${1%:*} only=
    [ "$group" = "$1" ] || only=${1#*:}
    case $group in
        slurm) [ -s "$FOLDER/slurm/slurmctld.pid" ] || start_slurm none ;;
        accounting) start_mariadb; stop_slurm; write_slurm_conf slurmdbd; start_slurmdbd; start_slurm slurmdbd ;;
        ray) [ -s "$FOLDER/ray.pids" ] || start_ray ;;
        postgresql) start_postgresql; export TRACKER=postgresql://postgres@127.0.0.1:$POSTGRESQL_PORT/mlflow ;;
        mariadb) start_mariadb; export TRACKER=mysql+pymysql://clusters:clusters@127.0.0.1:$MARIADB_PORT/mlflow ;;
    esac
    TRACKER_RESTART=$FOLDER/restart-$group "$PYTHON" scripts/cluster_cases.py "$group" "$FOLDER/cases" $only &
    cases=$!
    wait "$cases" || failures=$((failures + $?))
}

install_packages
mkdir -p "$FOLDER"
chmod 711 "$FOLDER"  # databases run as users of their own
cases=
trap stop EXIT
start_munge
failures=0
for asked in "${GROUPS_ASKED[@]}"; do try "$asked"; done
echo
echo "| done | expected | seen |"
echo "|---|---|---|"
cat "$FOLDER/cases/table.md"
echo
echo "$failures cases were seen otherwise than expected; $(slurmd -V), $("$PYTHON" -c 'import ray; print("Ray", ray.__version__)'), $("$POSTGRESQL/postgres" --version), $(mariadbd --version | grep -o "[0-9.]*-MariaDB")"
exit "$failures"
