#!/usr/bin/env bash
# The part of sft.sbatch that runs on each node: check the node, then start its ranks. With STEPLADDER_TASKS=rank it runs
# once for each rank, and the first on a node checks it for the others.
set -euo pipefail
# torchrun's agent would die of USR1 and leave its ranks behind; what is ignored here is ignored there too. The ranks
# set a handler of their own.
trap '' USR1
# Slurm sends TERM to every process: this shell and tee stay until the ranks have saved.
trap : TERM
cd "$SLURM_SUBMIT_DIR" # a container of srun may begin in a folder of the image
source slurm/environment.sh
read -ra nodes <<<"$STEPLADDER_NODES"
log="$STEPLADDER_FOLDER/slurm-$SLURM_JOB_ID-$SLURMD_NODENAME.out"

# A faulty node ends the job here, by name, before the others wait for it; a healthy one prints the interfaces to the others.
verdict=/tmp/stepladder-$SLURM_JOB_ID.$SLURM_STEP_ID.${SLURM_RESTART_COUNT:-0}-$SLURMD_NODENAME
if [[ $SLURM_LOCALID != 0 ]]; then
    until [[ -O $verdict ]]; do sleep 0.2; done
    interface=$(<"$verdict")
elif ! interface=$("${inside[@]}" python -m stepladder.cluster.health 2> >(tee -a "$log" >&2)); then
    exit 1
fi
# The stage (stage.py) on the node's own disk, which many files are read from faster than from a shared one.
if [[ ${STEPLADDER_STAGE_LOCAL:-0} != 0 ]]; then
    [[ ${STEPLADDER_STAGE:-} && ${SLURM_TMPDIR:-} ]] ||
        fail "STEPLADDER_STAGE_LOCAL copies \$STEPLADDER_STAGE to \$SLURM_TMPDIR, and one of them is not set" "set both"
    here=$SLURM_TMPDIR/stage
    if [[ $SLURM_LOCALID == 0 ]]; then
        mkdir -p "$here"
        cp -r "$STEPLADDER_STAGE"/{stage.json,hub} "$here"
    fi
    export STEPLADDER_STAGE=$here
fi
if [[ $SLURM_LOCALID == 0 && $STEPLADDER_TASKS == rank ]]; then # the node's other ranks wait for it
    trap 'rm -f "$verdict"' EXIT
    echo "$interface" >"$verdict.part" && mv "$verdict.part" "$verdict"
fi
if [[ $interface ]]; then
    # Else NCCL and gloo may choose an interface without a route (docker0, a management network). NCCL takes all cards of
    # the network (hsn0 to hsn3); gloo would need as many on every node (torch.distributed's documentation).
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-${interface#* }}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-${interface% *}}
fi
# The last collectives of each rank, written when one times out: they show which rank is missing.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# The Python stack of a rank that dies of a signal.
export PYTHONFAULTHANDLER=1
# A node's cores are divided among its ranks; the default would be one thread each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > STEPLADDER_RANKS ? SLURM_CPUS_ON_NODE / STEPLADDER_RANKS : 1))}
# On a GPU node glibc returns freed host memory at once: it kept half of what a load under ZeRO-3 took (docs/planning.md).
if [[ $STEPLADDER_GPUS != 0 ]]; then export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-131072}; fi
# How long torchrun waits after TERM before it kills its ranks: a step and a save (30 s by default).
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-600}

# SLURM_NODEID is read here, on the node: in the batch shell it is 0 for all (accelerate#2816, open-r1#306).
launch=("${inside[@]}" accelerate launch --config_file "accelerate_configs/$STEPLADDER_STRATEGY.yaml"
    --num_machines "$SLURM_NNODES" --num_processes "$((STEPLADDER_RANKS * SLURM_NNODES))"
    --machine_rank "$SLURM_NODEID" --main_process_ip "${nodes[0]}" --main_process_port "$STEPLADDER_PORT"
    # One address for all, and torchrun for DeepSpeed too: its own launchers need ssh between the nodes.
    --same_network --deepspeed_multinode_launcher standard
    -m stepladder.sft "$@")
if [[ $STEPLADDER_TASKS == rank ]]; then
    # Not SLURM_PROCID: a cluster may count its tasks around the nodes, and the ranks of a node follow each other.
    export RANK=$((SLURM_NODEID * STEPLADDER_RANKS + SLURM_LOCALID)) WORLD_SIZE=$((STEPLADDER_RANKS * SLURM_NNODES))
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$STEPLADDER_RANKS MASTER_ADDR=${nodes[0]} MASTER_PORT=$STEPLADDER_PORT
    launch=("${inside[@]}" python -m stepladder.sft "$@")
fi
code=0
if [[ $SLURM_NODEID == 0 && $SLURM_LOCALID == 0 ]]; then
    "${launch[@]}" 2>&1 | (trap '' TERM && exec tee -a "$log") || code=$?
else
    "${launch[@]}" >>"$log" 2>&1 || code=$?
fi
# A rank that has saved (75) must not make srun kill the others, which may still write.
((code == 75)) || exit "$code"
