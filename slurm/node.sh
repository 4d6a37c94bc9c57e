#!/usr/bin/env bash
# The part of sft.sbatch that runs once on each node: check the node, then start its ranks.
set -euo pipefail
# torchrun's agent would die of USR1 and leave its ranks behind; what is ignored here is ignored there too. The ranks
# set a handler of their own.
trap '' USR1
# Slurm sends TERM to every process: this shell and tee stay until the ranks have saved.
trap : TERM
source slurm/environment.sh
read -ra nodes <<<"$STEPLADDER_NODES"
log="$STEPLADDER_FOLDER/slurm-$SLURM_JOB_ID-$SLURMD_NODENAME.out"

# A faulty node ends the job here, by name, before the others wait for it; a healthy one prints the interface to the others.
if ! interface=$("${inside[@]}" python -m stepladder.cluster.health 2> >(tee -a "$log" >&2)); then exit 1; fi
if [[ $interface ]]; then
    # Else NCCL and gloo may choose an interface without a route (docker0, a management network).
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
fi
# The stage (scripts/stage.py) on the node's own disk, which many files are read from faster than from a shared one.
if [[ ${STEPLADDER_STAGE_LOCAL:-} ]]; then
    here=${SLURM_TMPDIR:?STEPLADDER_STAGE_LOCAL copies the stage there}/stage
    mkdir -p "$here"
    cp -r "${STEPLADDER_STAGE:?STEPLADDER_STAGE_LOCAL copies it}"/{stage.json,hub} "$here"
    export STEPLADDER_STAGE=$here
fi
# NCCL logs warnings and errors only.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# The last collectives of each rank, written when one times out: they show which rank is missing.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# The Python stack of a rank that dies of a signal.
export PYTHONFAULTHANDLER=1
# A node's cores are divided among its ranks; the default would be one thread each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > STEPLADDER_RANKS ? SLURM_CPUS_ON_NODE / STEPLADDER_RANKS : 1))}
# On a GPU node glibc returns freed host memory at once: it kept half of what a load under ZeRO-3 took (docs/planning.md).
if [[ ${SLURM_GPUS_ON_NODE:-} ]]; then export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-131072}; fi
# How long torchrun waits after TERM before it kills its ranks: a step and a save (30 s by default).
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-600}

# SLURM_NODEID is read here, on the node: in the batch shell it is 0 for all (accelerate#2816, open-r1#306).
launch=("${inside[@]}" accelerate launch --config_file "accelerate_configs/$STEPLADDER_STRATEGY.yaml"
    --num_machines "$SLURM_NNODES" --num_processes "$((STEPLADDER_RANKS * SLURM_NNODES))"
    --machine_rank "$SLURM_NODEID" --main_process_ip "${nodes[0]}" --main_process_port "$STEPLADDER_PORT"
    # One address for all, and torchrun for DeepSpeed too: its own launchers need ssh between the nodes.
    --same_network --deepspeed_multinode_launcher standard
    scripts/sft.py "$@")
if [[ $SLURM_NODEID == 0 ]]; then
    "${launch[@]}" 2>&1 | (trap '' TERM && exec tee -a "$log")
else
    "${launch[@]}" >>"$log" 2>&1
fi
