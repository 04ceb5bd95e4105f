# shellcheck shell=bash
# What the job scripts beside this file share: start torchrun on every node, pass signals on, and end or requeue the job.
#
# Sourced as their last line, with pretrain.py's flags as arguments, from the repository's root. Variables are
# explained on top of pretrain_1b.sbatch; slurm/README.md says which end leads to what.
set -euo pipefail

say() { echo "$(date +%FT%T) job ${SLURM_JOB_ID:-none}: $*"; }
header() { sed -n "s/^#SBATCH --$1=\([0-9]*\).*/\1/p" "$0"; } # for a dry run outside a job

NODES=${SLURM_JOB_NUM_NODES:-$(header nodes)}
PYTHON=${PYTHON:-.venv/bin/python}
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(header gpus-per-node)}} # an exclusive job is on more than its steps see
PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${gpus##*:}} # of "a100:4" the 4
PROGRAM=${PROGRAM:-launcher/pretrain.py}
case ${ENGINE:=fsdp} in
fsdp) flags=(--engine fsdp) ;;
zero[0-3]) flags=(--ds_config "ds_configs/$ENGINE.json") ;;
*) echo "ENGINE=$ENGINE: fsdp, zero0, zero1, zero2 or zero3" >&2 && exit 2 ;;
esac
flags+=(--model "$MODEL" --save_dir "$SAVE_DIR" --timeout "${TIMEOUT:-600}" --continue_from auto "$@")

if [ -n "${DRY_RUN:-}" ]; then # the same ranks and flags on fake tensors: memory, wire, time
    exec "$PYTHON" launcher/plan.py --gpus $((NODES * PROCESSES_PER_NODE)) "${flags[@]}"
fi

# Of an array, SLURM_JOB_ID of one task is the whole array's number: by that, scancel and scontrol would hit all of them.
JOB=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
RESTART=${SLURM_RESTART_COUNT:-0}
export SLURM_EXPORT_ENV=ALL # sbatch --export=NONE would otherwise leave the steps without PATH

# Where the ranks meet: a store on the job's first node. Ports below 32768 are not handed out by the kernel.
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
PORT=$((12000 + SLURM_JOB_ID % 20000))

# Threads: a node's cores shared out over its ranks. Spinning ones would starve the loader and the writer of checkpoints.
threads=$((${SLURM_CPUS_ON_NODE:-1} / PROCESSES_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))} OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1

# NCCL finds InfiniBand (NCCL_IB_HCA), NVLink and the network by itself. Where a node has several networks it may choose one
# that the others cannot reach; then NETWORK_INTERFACE=ib0 names it for NCCL's sockets and for gloo, which carries
# checkpoints and agreements between hosts. NCCL_DEBUG=INFO prints what was chosen.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
[ -z "${NETWORK_INTERFACE:-}" ] || export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE

# On every node, once. Torchrun must outlive the signals that its ranks answer by saving: SLURM sends them to all processes
# of a step, torchrun would die of USR1 and kill its ranks 30 s after TERM. So it ignores both, and the ranks set
# handlers of their own. Ranks are numbered by node name: the same nodes give the same order, and the same bits.
# shellcheck disable=SC2016 # expanded on the node
node='
trap "" USR1 TERM
[ "$SLURM_NODEID" = 0 ] && host=true || host=false
exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$PROCESSES_PER_NODE" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-$RESTART" --rdzv-endpoint "$HEAD:$PORT" \
    --rdzv-conf "is_host=$host,read_timeout=300" --local-addr "$SLURMD_NODENAME" \
    --max-restarts "${MAX_RESTARTS:-3}" --signals-to-handle SIGINT \
    --log-dir "$SAVE_DIR/logs/$SLURM_JOB_ID-$RESTART-$SLURMD_NODENAME" --tee 3 --local-ranks-filter 0 \
    "$PROGRAM" "$@"'

# What a run did last stands in its heartbeat; one that an earlier job left there says nothing about this one.
mkdir -p "$SAVE_DIR"
newest() {
    ls "$SAVE_DIR" >/dev/null # makes a network file system look again
    cat "$SAVE_DIR/$1" 2>/dev/null || true
}
beat() { newest heartbeat.json; }
checkpoint() { newest latest; }
BEFORE=$(beat) SAVED=$(checkpoint)
state_of_run() {
    [ "$(beat)" = "$BEFORE" ] || beat | "$PYTHON" -c '
import json, sys
beat = json.load(sys.stdin)
print(beat["state"] if str(beat["job"]) == sys.argv[1] else "")' "$SLURM_JOB_ID"
}
preempted() { scontrol show job "$JOB" | grep -q 'PreemptTime=[0-9]'; }
running() { [ "$(squeue --noheader --job "$JOB" --format %T)" = RUNNING ]; }
seconds_left() { # before the time limit strikes
    local end
    end=$(SLURM_TIME_FORMAT=standard squeue --noheader --job "$JOB" --format %e)
    end=$(date --date "${end:-none}" +%s 2>/dev/null) || end=9999999999 # a job without a limit
    echo $((end - $(date +%s)))
}

# Puts the job back into the queue, unless SLURM has decided on it already (it is then COMPLETING): a requeue would
# bring a cancelled job back to life.
requeue() {
    if [ -n "$STOP" ]; then
        say "stopped as asked, not requeued"
    elif running; then
        say "requeued: $1"
        trap '' TERM # its answer
        scontrol requeue "$JOB" || say "cannot be requeued: submit it again, it continues from $SAVE_DIR"
    fi
    exit 75
}

# shellcheck disable=SC2317 # called by traps
ask_to_save() {
    ASKED=1
    local state
    state=$(state_of_run) || state=''
    case $state in saving | interrupted) say "$1, and the ranks save already" && return ;; esac
    say "$1: asking the ranks to save"
    scancel --signal=USR1 "$JOB" # reaches all processes of the steps, not this shell
}
ASKED='' STOP=''
trap 'ask_to_save "the time limit is near"' USR1
trap 'STOP=1; ask_to_save "asked to stop"' USR2
trap 'say "terminated by SLURM: waiting for the ranks to save"' TERM

export NODES PYTHON PROCESSES_PER_NODE PROGRAM RESTART HEAD PORT SAVE_DIR
say "run ${RESTART} of this job: $NODES x $PROCESSES_PER_NODE ranks, meeting at $HEAD:$PORT, folder $SAVE_DIR"
# In the background: bash runs no trap while it waits for a command in the foreground.
srun --label --kill-on-bad-exit=1 --cpu-bind=none bash -c "$node" torchrun "${flags[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do
    sleep 2 &
    wait $! || true # a signal ends the wait, not the sleep
    # A save that takes too long, or a request that struck before the ranks could hear it: the last whole checkpoint has to do.
    if [ -n "$ASKED" ] && [ -z "$STOP" ] && [ "$(seconds_left)" -lt 15 ]; then requeue "no time left to save"; fi
done
status=0
wait "$step" || status=$?
state=$(state_of_run) || state=''
say "step ended with $status, run ${state:-silent}"

# A preempted job that ends before its grace time is over counts as ended for SLURM: nobody else would requeue it.
[ "$state" != finished ] || exit "$status"
[ "$state" != interrupted ] || requeue "interrupted"
# Asked while it prepared its data, it ends before there is anything to save.
if [ -n "$ASKED" ] || preempted; then requeue "ended with $status when asked to"; fi
if [ "$status" != 0 ]; then
    # Did a node die? The step ends at once, but SLURM waits for SlurmdTimeout before it gives up the node and requeues the job.
    if ! timeout 60 srun --overlap --ntasks-per-node=1 true; then
        say "a node does not answer: waiting for SLURM to requeue the job"
        for ((second = 0; second < ${NODE_TIMEOUT:-900}; second += 5)); do
            running || break
            sleep 5 &
            wait $! || true
        done
        requeue "a node does not answer"
    fi
    # A fault. Worth another start if this one has moved the run on; one that comes back at the same place ends the job.
    [ "$(checkpoint)" = "$SAVED" ] || requeue "ended with $status, but has saved $(checkpoint)"
fi
exit "$status"
