# shellcheck shell=bash disable=SC2034
# LUMI-G: 4 MI250X a node, which are 8 GPUs of 64 GB; 56 cores. Written from the LUMI AI guide of 2026-05-19
# (github.com/Lumi-supercomputer/LUMI-AI-Guide, chapters 2 and 5) and docs.csc.fi/support/tutorials/ml-multi of
# 2026-08-21; not run there.
: "${STEPLADDER_MODULES=purge /appl/local/laifs/modules lumi-aif-singularity-bindings}"
: "${STEPLADDER_CONTAINER=/appl/local/laifs/containers/lumi-multitorch-latest.sif}"
[[ ! ${SLURM_JOB_ACCOUNT:-} ]] || : "${STEPLADDER_SCRATCH=/scratch/$SLURM_JOB_ACCOUNT/$USER}"
# MIOpen's caches are databases, which do not work on Lustre.
: "${MIOPEN_USER_DB_PATH=/tmp/miopen-$USER-${SLURM_JOB_ID:-}}" "${MIOPEN_CUSTOM_CACHE_DIR=$MIOPEN_USER_DB_PATH}"
# On a whole node srun starts each rank, on the cores beside its GPU: the guide's masks.
[[ ${SLURM_GPUS_ON_NODE:-} != 8 ]] || : "${STEPLADDER_TASKS=rank}"
if [[ ${SLURM_GPUS_ON_NODE:-} == 8 && $STEPLADDER_TASKS == rank ]]; then
    : "${STEPLADDER_SRUN=--cpu-bind=mask_cpu:0x00fe000000000000,0xfe00000000000000,0x0000000000fe0000,0x00000000fe000000,\
0x00000000000000fe,0x000000000000fe00,0x000000fe00000000,0x0000fe0000000000}"
fi
