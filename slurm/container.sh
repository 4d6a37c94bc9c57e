# shellcheck shell=bash disable=SC2034,SC2154,SC2016 # a part of environment.sh; bash expands $0 and $@ in the container
# Commands inside a container: of Apptainer or Singularity by STEPLADDER_CONTAINER, or of srun itself (Pyxis, CSCS).
within=()
# An environment on top of an image is activated inside: its python is a link into the image.
[[ ! ${STEPLADDER_VENV:-} ]] || within=(bash -c 'source "$0/bin/activate" && exec "$@"' "$STEPLADDER_VENV")
if [[ $contained == image ]]; then
    [[ -e $STEPLADDER_CONTAINER ]] ||
        fail "STEPLADDER_CONTAINER=$STEPLADDER_CONTAINER is not there" "an image or a sandbox folder (docs/slurm.md)"
    tool=$(type -P apptainer || type -P singularity) ||
        fail "STEPLADDER_CONTAINER, and neither apptainer nor singularity here" "STEPLADDER_MODULES=apptainer"
    options=(--pwd "$PWD")
    [[ ! -e /dev/nvidiactl ]] || options+=(--nv)
    [[ ! -e /dev/kfd ]] || options+=(--rocm)
    # What the node has and an image has not: every folder under / but the system's own; then folders that may lie there.
    for folder in /* "$PWD" "${SLURM_TMPDIR:-}" "${TMPDIR:-}" "${HF_HOME:-}" "${STEPLADDER_SCRATCH:-}" \
        "${STEPLADDER_VENV:-}" "${STEPLADDER_STAGE:-}" "${STEPLADDER_FOLDER:-}"; do
        [[ $folder =~ ^/(bin|boot|dev|etc|lib.*|lost\+found|opt|proc|root|run|sbin|srv|sys|tmp|usr|var)$ ]] && continue
        [[ $folder == /* && -d $folder && -r $folder && -x $folder ]] || continue
        [[ $folder != *[:,]* ]] || fail "$folder cannot be bound into a container" "a path without a colon or comma"
        options+=(--bind "$folder")
    done
    # What lies in ~/.local would come before the image's packages.
    export PYTHONNOUSERSITE=${PYTHONNOUSERSITE:-1}
    inside=("$tool" exec "${options[@]}" "$STEPLADDER_CONTAINER" "${within[@]}")
elif [[ $contained == later && ${SLURM_JOB_ID:-} ]]; then
    # The ranks' container begins with srun: the batch script's own commands are steps of one task in it, which may
    # begin in a folder of the image.
    inside=(srun --export=ALL --nodes=1 --ntasks=1 "${srun_words[@]}" bash -c 'cd "$0" && exec "$@"' "$PWD" "${within[@]}")
fi
