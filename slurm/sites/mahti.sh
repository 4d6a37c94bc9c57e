# shellcheck shell=bash disable=SC2034
# Mahti (CSC): 4 A100 (40 GB) a node, 128 cores. Written from docs.csc.fi/support/tutorials/ml-multi of 2026-08-21;
# not run there.
: "${STEPLADDER_MODULES=purge pytorch}"
[[ ! ${SLURM_JOB_ACCOUNT:-} ]] || : "${STEPLADDER_SCRATCH=/scratch/$SLURM_JOB_ACCOUNT/$USER}"
