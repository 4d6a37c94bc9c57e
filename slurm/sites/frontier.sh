# shellcheck shell=bash disable=SC2034
# Frontier (OLCF): 4 MI250X a node, which are 8 GPUs of 64 GB; 56 cores. Written from
# docs.olcf.ornl.gov/software/analytics/pytorch_frontier.html of 2026-07-22; not run there.
# The plugin's module also sets what it needs for Slingshot (FI_*, NCCL_NET_GDR_LEVEL).
: "${STEPLADDER_MODULES=PrgEnv-gnu miniforge3/23.11.0-0 rocm/7.1.1 rccl-net-plugin craype-accel-amd-gfx90a}"
: "${NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3}" # if it hangs: hsn0
# RCCL then ends where the plugin is missing, and does not fall back to sockets. A job of one node has no network.
((${SLURM_NNODES:-1} == 1)) || : "${NCCL_NET=OFI}"
: "${MIOPEN_USER_DB_PATH=/tmp/miopen-$USER-${SLURM_JOB_ID:-}}" "${MIOPEN_CUSTOM_CACHE_DIR=$MIOPEN_USER_DB_PATH}"
# The page advises against torchrun: srun starts each rank. Cores 49-55 are beside GPU 0, and so on (Frontier User Guide).
: "${STEPLADDER_TASKS=rank}"
if [[ ${SLURM_GPUS_ON_NODE:-} == 8 && $STEPLADDER_TASKS == rank ]]; then
    : "${STEPLADDER_SRUN=--cpu-bind=mask_cpu:0x00fe000000000000,0xfe00000000000000,0x0000000000fe0000,0x00000000fe000000,\
0x00000000000000fe,0x000000000000fe00,0x000000fe00000000,0x0000fe0000000000}"
fi
