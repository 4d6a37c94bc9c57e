# shellcheck shell=bash disable=SC2034
# Alliance Canada: Fir, Nibi, Rorqual, Trillium, Narval. Written on 2026-11-30 from users' scripts, which follow
# docs.alliancecan.ca/wiki/Python; the wiki itself was not at hand. Not run there.
: "${STEPLADDER_MODULES=python/3.11 arrow cuda}"
[[ ! ${SCRATCH:-} ]] || : "${STEPLADDER_SCRATCH=$SCRATCH}"
# A job makes its environment on each node's own disk, from the wheels of a stage (docs/slurm.md): the centre's own
# collection has other versions than constraints.txt.
if [[ -d ${STEPLADDER_STAGE:-}/wheels && ${SLURM_TMPDIR:-} ]]; then
    : "${STEPLADDER_VENV=$SLURM_TMPDIR/env}"
    if [[ ! -f $STEPLADDER_VENV/bin/activate ]]; then
        set +u && module load python/3.11 && set -u
        virtualenv --no-download "$STEPLADDER_VENV"
        "$STEPLADDER_VENV/bin/pip" install --quiet --no-index "$STEPLADDER_STAGE"/wheels/*.whl
    fi
fi
