# shellcheck shell=bash disable=SC2034
# Roihu (CSC): 4 GH200 (96 GB) a node, 288 cores, aarch64. Written from docs.csc.fi/support/tutorials/ml-multi of 2026-08-21;
# not run there.
: "${STEPLADDER_MODULES=purge python-pytorch}"
[[ ! ${SLURM_JOB_ACCOUNT:-} ]] || : "${STEPLADDER_SCRATCH=/scratch/$SLURM_JOB_ACCOUNT/$USER}"
