"""slurm/environment.sh and the files of slurm/sites/ without a cluster: what they set, run and refuse."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT

SITES = sorted(file.stem for file in (ROOT / "slurm/sites").glob("*.sh"))
KNOWN = re.compile(
    r"STEPLADDER_(MODULES|CONTAINER|SCRATCH|SRUN|HEAD|TASKS|VENV|GPUS_PER_NODE)$|NCCL_|FI_|MIOPEN_|WANDB_MODE$"
    # what environment.sh exports for every site
    r"|HF_(HOME|HUB_OFFLINE)$|XDG_CACHE_HOME$|TORCH_EXTENSIONS_DIR$|TRITON_CACHE_DIR$|PYTHON(PATH|NOUSERSITE)$"
)
LOGIN = {"SCRATCH": "/scratch/me", "SYSTEMNAME": "juwelsbooster"}
JOB = LOGIN | {"SLURM_JOB_ID": "7", "SLURM_JOB_ACCOUNT": "project_1", "SLURM_NNODES": "2"}
WORDS = r"""printf '%s\n' "${inside[@]}" -- "${srun_words[@]}" """


class Shell:
    """A folder with a copy of slurm/ and stand-ins of a centre's commands, in which environment.sh is sourced."""

    def __init__(self, folder: Path):
        self.folder, self.tools = folder, folder / "bin"
        shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.sh"))
        self.tools.mkdir()
        for name in ("bash", "env", "id", "sed", "xargs", "printf"):
            (self.tools / name).symlink_to(str(shutil.which(name)))
        self.add("module", 'echo "module $*"')
        self.image = folder / "image.sif"
        self.image.touch()

    def add(self, name: str, script: str) -> None:
        (self.tools / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
        (self.tools / name).chmod(0o755)

    def add_venv(self, name: str) -> Path:
        (self.folder / name / "bin").mkdir(parents=True)
        (self.folder / name / "bin/activate").write_text(f"export VIRTUAL_ENV='{name}'\n")
        return self.folder / name

    def run(self, script: str, prefix: tuple[str, ...] = (), **variables: object) -> subprocess.CompletedProcess[str]:
        env = {"PATH": self.tools, "HOME": self.folder, "USER": "me", **variables}
        words = [*prefix, str(shutil.which("bash")), "-c", f"set -euo pipefail; source slurm/environment.sh; {script}"]
        return subprocess.run(words, cwd=self.folder, env={name: str(value) for name, value in env.items()}, text=True,
                              capture_output=True, timeout=30)  # fmt: skip

    def words(self, prefix: tuple[str, ...] = (), **variables: object) -> tuple[list[str], list[str]]:
        """The words of `inside` and of `srun_words`."""
        done = self.run(WORDS, prefix, **variables)
        assert done.returncode == 0, done
        inside, _, srun = done.stdout.partition("--\n")
        return inside.splitlines(), srun.splitlines()

    def refused(self, **variables: object) -> str:
        done = self.run("echo went on", **variables)
        assert done.returncode == 2 and not done.stdout and done.stderr.startswith("✘ launch: "), done
        assert "\n  help: " in done.stderr
        return done.stderr

    def exported(self, **variables: object) -> dict[str, str]:
        """What environment.sh exports that was not there, or was another."""
        done = self.run("env -0", **variables)
        assert done.returncode == 0, done
        found = dict(line.rsplit("\n", 1)[-1].split("=", 1) for line in done.stdout.split("\0") if line)
        ours = ("PATH", "HOME", "USER", "PWD", "SHLVL", "_", "OLDPWD")
        return {name: value for name, value in found.items() if name not in ours and variables.get(name) != value}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_no_centre_is_missing() -> None:
    assert len(SITES) == 12 and {"lumi", "frontier", "alps", "jsc", "leonardo", "marenostrum5"} <= {*SITES}


@pytest.mark.parametrize("gpus", ["", "4", "8"], ids=["login", "4 GPUs", "8 GPUs"])
@pytest.mark.parametrize("site", SITES)
def test_a_site_sets_what_is_known_and_leaves_what_the_user_has_set(shell: Shell, site: str, gpus: str) -> None:
    """Guards against a site file that ends a job (an unset variable, a failed test), names a variable that nothing
    reads, or overrides the user; and against one that hides where it comes from."""
    shell.add("singularity", "true")
    text = (ROOT / f"slurm/sites/{site}.sh").read_text()
    assert text.count("\n") <= 25
    assert re.search(r"\b20\d\d-\d\d-\d\d\b.*[Nn]ot run there", text.replace("\n# ", " ")), "its page's date"
    variables = {"STEPLADDER_SITE": site} | (JOB | {"SLURM_GPUS_ON_NODE": gpus} if gpus else LOGIN)
    if site == "lumi":
        variables["STEPLADDER_CONTAINER"] = str(shell.image)
    found = shell.exported(**variables)
    assert [name for name in found if not KNOWN.match(name)] == []
    if gpus:
        assert {name for name in found if f"{{{name}=" in text}, "it sets something"
    named = set(re.findall(r"\$\{(\w+)=", text)) - {"STEPLADDER_CONTAINER", "STEPLADDER_VENV"}
    mine = {name: {"STEPLADDER_TASKS": "node", "STEPLADDER_MODULES": "mine"}.get(name, "") for name in named}
    assert not named & set(shell.exported(**variables, **mine)), "an empty one wins too"


def test_the_ranks_of_a_site_get_the_cores_beside_their_gpus(shell: Shell) -> None:
    """Guards the masks of LUMI and Frontier: eight times seven cores, none twice, none of the eight that are the
    system's; by hand from Frontier's guide: GPU 0 is beside cores 49 to 55, GPU 4 beside 1 to 7."""
    for site, more in (("frontier", {}), ("lumi", {"STEPLADDER_CONTAINER": shell.image})):
        shell.add("singularity", "true")
        _, (word,) = shell.words(STEPLADDER_SITE=site, SLURM_GPUS_ON_NODE="8", **JOB, **more)
        masks = [int(mask, 16) for mask in word.removeprefix("--cpu-bind=mask_cpu:").split(",")]
        cores = [[core for core in range(64) if mask >> core & 1] for mask in masks]
        assert (cores[0], cores[4]) == ([*range(49, 56)], [*range(1, 8)])
        assert sorted(core for mine in cores for core in mine) == [core for core in range(64) if core % 8]
        assert shell.words(STEPLADDER_SITE=site, SLURM_GPUS_ON_NODE="4", **JOB, **more)[1] == []


def test_an_unknown_site_is_refused_with_those_that_are_there(shell: Shell) -> None:
    assert shell.refused(STEPLADDER_SITE="lumy").endswith(f"help: {' '.join(SITES)}\n")
    assert "no such file in slurm/sites/" in shell.refused(STEPLADDER_SITE="../site")


def test_the_users_own_file_comes_before_the_centres_and_is_not_committed(shell: Shell) -> None:
    """Guards slurm/site.sh: it may name the site, it wins over it, the shell wins over `${X=…}` in it."""
    (shell.folder / "slurm/site.sh").write_text(': "${STEPLADDER_SITE=roihu}"\nSTEPLADDER_MODULES=mine\nOTHER=1\n')
    found = shell.exported(**JOB)
    assert (found["STEPLADDER_MODULES"], found["OTHER"]) == ("mine", "1")
    assert found["STEPLADDER_SCRATCH"] == "/scratch/project_1/me"
    assert shell.exported(**JOB, STEPLADDER_SITE="vista")["STEPLADDER_SCRATCH"] == "/scratch/me"
    done = subprocess.run(["git", "check-ignore", "slurm/site.sh"], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout == "slurm/site.sh\n"


@pytest.mark.parametrize("line", ["false", "[[ -d /no/folder ]] && X=1", "return 3", "f() { false; }; f", "X=$(false)"])
def test_a_site_that_fails_names_its_line(line: str, shell: Shell) -> None:
    """Guards against a job that ends with 1 and an empty log: bash does not say which command has failed."""
    (shell.folder / "slurm/site.sh").write_text(f"X=0\n{line}\n")
    assert "slurm/site.sh" in shell.refused()
    (shell.folder / "slurm/site.sh").write_text(f"{line.replace('return 3', 'false')} || true\nX=0\n")
    assert shell.run("echo $X").stdout == "0\n"


def test_modules_are_purged_used_and_loaded_in_their_order(shell: Shell) -> None:
    done = shell.run("true", STEPLADDER_MODULES="purge /a/folder gcc/13 cuda")
    assert done.stdout == "module purge\nmodule use /a/folder\nmodule load gcc/13\nmodule load cuda\n", done
    (shell.tools / "module").unlink()
    assert "there is no module command" in shell.refused(STEPLADDER_MODULES="gcc")


def test_words_for_srun_keep_their_spaces_and_run_nothing(shell: Shell) -> None:
    words = shell.words(STEPLADDER_SRUN="--comment='two words' \"--network=a b\" --x=$(touch pwned) --y=\\ ")[1]
    assert words == ["--comment=two words", "--network=a b", "--x=$(touch", "pwned)", "--y= "]
    assert not (shell.folder / "pwned").exists()
    assert shell.words(STEPLADDER_SRUN="  ")[1] == []
    assert "a quote is not closed" in shell.refused(STEPLADDER_SRUN="--comment='two words")


def test_a_container_is_run_by_what_is_there_with_the_nodes_folders(shell: Shell) -> None:
    """Guards sites that have only singularity, nodes without a GPU, and paths that an image has not."""
    scratch = shell.folder / "scratch"
    scratch.mkdir()
    shell.add("singularity", "true")
    inside, _ = shell.words(STEPLADDER_CONTAINER=shell.image, STEPLADDER_SCRATCH=scratch, TMPDIR=scratch)
    assert inside[:2] == [f"{shell.tools}/singularity", "exec"] and inside[-6:-3] == [str(shell.image), "bash", "-c"]
    bound = [after for word, after in itertools.pairwise(inside) if word == "--bind"]
    assert len(bound) == len({*bound}), "Apptainer warns of a folder that is bound twice"
    assert {str(scratch), str(shell.folder)} <= {*bound}
    assert not {"/", "/usr", "/etc", "/proc", "/dev", "/opt", "/lib64"} & {*bound}
    assert {f"/{name}" for name in ("home", "mnt", "media") if os.access(f"/{name}", os.R_OK | os.X_OK)} <= {*bound}
    shell.add("apptainer", "true")
    assert shell.words(STEPLADDER_CONTAINER=shell.image)[0][0] == f"{shell.tools}/apptainer"


@pytest.mark.parametrize(
    ("devices", "flags"),
    [((), []), (("nvidiactl",), ["--nv"]), (("kfd",), ["--rocm"]), (("nvidiactl", "kfd"), ["--nv", "--rocm"])],
)
def test_the_container_takes_the_driver_of_the_nodes_gpus(
    shell: Shell, devices: tuple[str, ...], flags: list[str]
) -> None:
    """Guards against --nv on AMD nodes; /dev is a folder of the test's own, in a mount namespace."""
    shell.add("apptainer", "true")
    (fake := shell.folder / "dev").mkdir()
    for name in ("null", *devices):
        (fake / name).touch()
    (fake / "fd").symlink_to("/proc/self/fd")
    mount = f"mount --bind /dev/null {fake}/null && mount --rbind {fake} /dev && PATH={shell.tools} exec "
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    unshare = (
        str(shutil.which("unshare")),
        *user,
        "--mount",
        "/bin/sh",
        "-c",
        f'PATH=/usr/bin:/bin; {mount}"$@"',
        "sh",
    )
    inside, _ = shell.words(unshare, STEPLADDER_CONTAINER=shell.image)
    assert [word for word in inside if word in ("--nv", "--rocm")] == flags


def test_an_environment_on_top_of_an_image_is_activated_inside(shell: Shell) -> None:
    """Guards container and venv together; .venv, which another Python has made, is not that."""
    shell.add_venv(".venv")
    environment = shell.add_venv("my env")
    shell.add("apptainer", 'while [[ $1 != *.sif ]]; do shift; done; shift; exec "$@"')
    show = """"${inside[@]}" bash -c 'echo "${VIRTUAL_ENV:-none} $1"' bash "a 'b" """
    assert shell.run(show, STEPLADDER_CONTAINER=shell.image, STEPLADDER_VENV=environment).stdout == "my env a 'b\n"
    assert shell.run(show, STEPLADDER_CONTAINER=shell.image).stdout == "none a 'b\n"
    assert shell.run(show).stdout == ".venv a 'b\n"
    assert shell.run(show, STEPLADDER_VENV="my env").stdout == "my env a 'b\n"


def test_a_container_takes_signals_as_a_process_does(shell: Shell) -> None:
    """Guards the launcher, which USR1 would end: Apptainer's child has the default action again (seen with 1.4.5; `env`
    plays it here). And guards it from the TERM that Apptainer passes on to its child, beside the one of Slurm."""
    shell.add("apptainer", 'while [[ $1 != *.sif ]]; do shift; done; shift; exec env --default-signal=USR1,TERM "$@"')
    inside = """trap '' USR1; "${inside[@]}" """
    survived = shell.run(f"{inside} bash -c 'kill -USR1 $$; echo survived'", STEPLADDER_CONTAINER=shell.image)
    assert survived.stdout == "survived\n", survived
    command = """bash -c 'trap "echo twice" TERM; kill -TERM $PPID; read -t 0.3 <> <(:); exit 7'"""
    done = shell.run(f"{inside} {command} || echo $?", STEPLADDER_CONTAINER=shell.image)
    assert done.stdout == "7\n", "its own exit code, and no TERM of its parent's"


def test_what_an_environment_lacks_is_refused(shell: Shell) -> None:
    assert "neither apptainer nor singularity" in shell.refused(STEPLADDER_CONTAINER=shell.image)
    assert "/no/image.sif is not there" in shell.refused(STEPLADDER_CONTAINER="/no/image.sif")
    assert "has no bin/activate" in shell.refused(STEPLADDER_VENV="/no/env")
    assert "there is no conda here" in shell.refused(STEPLADDER_CONDA="base")
    assert "a venv or a container" in shell.refused(STEPLADDER_CONDA="base", STEPLADDER_CONTAINER=shell.image)
    shell.add("apptainer", "true")
    (odd := shell.folder / "a,b").mkdir()
    assert "cannot be bound" in shell.refused(STEPLADDER_CONTAINER=shell.image, STEPLADDER_SCRATCH=odd)
    job = {"SLURM_SUBMIT_DIR": ".", "STEPLADDER_TASKS": "gpu"}
    done = shell.run("bash slurm/sft.sbatch", **job)
    assert done.returncode == 2 and "STEPLADDER_TASKS=gpu" in done.stderr
    for given in ("NONE", "NIL"):
        said = shell.run("bash slurm/sft.sbatch", SLURM_SUBMIT_DIR=".", SLURM_EXPORT_ENV=given).stdout
        assert f"note: --export={given}: none of your shell's variables came along; slurm/site.sh can set them" in said
    assert shell.words(("env", "-u", "USER"), STEPLADDER_SITE="frontier", STEPLADDER_MODULES="", **JOB)[0] == []


def test_a_container_of_srun_holds_the_batch_scripts_commands_too(shell: Shell) -> None:
    """Guards Pyxis and CSCS' --environment, whose batch host has no Python of ours: a step of one task has. In the
    ranks' step itself everything is inside already."""
    shell.add_venv(".venv")
    option = "--container-image=/images/a b.sqsh"
    variables = {"STEPLADDER_SRUN": f"'{option}' --mpi=none", "SLURM_CPUS_ON_NODE": "6"}
    inside, srun = shell.words(**variables, **JOB)
    step = ["srun", "--export=ALL", "--nodes=1", "--ntasks=1", "--cpus-per-task=6"]
    assert inside[:7] == [*step, option, "--mpi=none"] and srun == inside[5:7]
    assert inside[7:9] == ["bash", "-c"] and inside[10:] == ["", str(shell.folder)], "in this folder, not the image's"
    assert shell.words(**variables, **JOB, SLURM_STEP_ID="0")[0] == []
    assert shell.words(**variables)[0] == [], "a login node"
    environment = shell.add_venv("env")
    assert shell.words(**variables, **JOB, STEPLADDER_VENV=environment)[0][-2] == str(environment)
    assert shell.words(STEPLADDER_SRUN="--cpu-bind=none", **JOB)[0] == []


def test_the_page_names_each_site_and_each_variable() -> None:
    """Guards docs/slurm.md against a file or a variable that nobody finds."""
    page = (ROOT / "docs/slurm.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == SITES
    assert {*re.findall(r"STEPLADDER_SITE=(\w+)", page)} <= {*SITES}
    header = (ROOT / "slurm/environment.sh").read_text().split("fail()")[0]
    assert [name for name in re.findall(r"STEPLADDER_\w+", header) if name not in page] == []
