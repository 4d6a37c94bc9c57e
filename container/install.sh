#!/usr/bin/env bash
# What container/Dockerfile and container/stepladder.def install, as root on Debian 12, in a folder that holds
# pyproject.toml, setup.py with the folders that it names, constraints.txt and src/: the packages of `make install` but
# for a developer's, for the system's own Python, so that an environment on top of the image (python -m venv
# --system-site-packages) has them too.
#
#   VARIANT=cuda   PyPI's torch, with CUDA's libraries, and the kernels of the extra `gpu`
#   VARIANT=cpu    torch's build for CPUs, from where pip finds it: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS
set -euo pipefail
case $VARIANT in
    cuda) torch=torch extras=monitoring,gpu ;;
    cpu) torch=$(grep '^torch==' constraints.txt)+cpu extras=monitoring ;;
    *) echo "✘ VARIANT=$VARIANT: cuda or cpu" >&2 && exit 2 ;;
esac
export DEBIAN_FRONTEND=noninteractive PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1
apt-get update -qq
# A compiler and Python's headers: DeepSpeed and Triton compile when they are first used.
apt-get install -y -qq --no-install-recommends ca-certificates g++ libtcmalloc-minimal4 python3 python3-dev python3-pip \
    python3-venv python-is-python3
rm -rf /var/lib/apt/lists/*
# As in the Makefile: torch comes first and by the constraint, since DeepSpeed's build imports it.
python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
python -m pip install --quiet --constraint constraints.txt "$torch"
python -m pip install --quiet --constraint constraints.txt ".[$extras]"
DS_ACCELERATOR=cpu python -m pip install --quiet --constraint constraints.txt --no-build-isolation ".[deepspeed]"
rm -rf build
