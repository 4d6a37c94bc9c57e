# shellcheck shell=bash disable=SC2034
# Puhti (CSC): 4 V100 (32 GB) a node, 40 cores. Written from docs.csc.fi/support/tutorials/ml-multi of 2026-08-21;
# not run there.
: "${STEPLADDER_MODULES=purge pytorch}"
[[ ! ${SLURM_JOB_ACCOUNT:-} ]] || : "${STEPLADDER_SCRATCH=/scratch/$SLURM_JOB_ACCOUNT/$USER}"
