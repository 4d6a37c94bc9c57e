# shellcheck shell=bash disable=SC2034
# Vista (TACC): 1 GH200 (96 GB) a node, 72 cores, aarch64, InfiniBand. Written from docs.tacc.utexas.edu/hpc/vista of
# 2026-08-12; not run there.
: "${STEPLADDER_MODULES=gcc cuda python3}"
[[ ! ${SCRATCH:-} ]] || : "${STEPLADDER_SCRATCH=$SCRATCH}"
# Slurm knows of no GPUs here, and refuses options that name them.
: "${STEPLADDER_GPUS_PER_NODE=1}"
