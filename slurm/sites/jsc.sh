# shellcheck shell=bash disable=SC2034
# JSC: JUWELS Booster, JURECA-DC (4 A100), JUSUF; JUPITER (4 GH200). Written on 2026-11-30 from what the centre's staff
# say in github.com/pytorch/pytorch/issues/73656 and github.com/HelmholtzAI-FZJ/torchrun_jsc of 2025-11-27, and users in
# github.com/interTwin-eu/itwinai/pull/438; JSC's own pages were not at hand. Not run there.
# A node's InfiniBand address has its name and an i; by the plain name, cells cannot reach each other.
case ${SYSTEMNAME:-} in
    juwels | juwelsbooster | jurecadc | jusuf) : "${STEPLADDER_HEAD=%i}" ;;
esac
[[ ! ${SCRATCH:-} ]] || : "${STEPLADDER_SCRATCH=$SCRATCH/$USER}"
# One stage's Python, which your venv was made with: STEPLADDER_MODULES="Stages/2025 GCC Python CUDA".
