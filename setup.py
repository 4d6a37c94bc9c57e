"""Copies what belongs to the code and is no Python module into the package: see src/stepladder/installation.py."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("scripts", "recipes", "accelerate_configs", "ds_configs", "data", "slurm", "starter")
SUFFIXES = {".py", ".yaml", ".json", ".jsonl", ".sh", ".sbatch", ".md"}
NOT_SHIPPED = ("slurm/site.sh",)  # a user's own


class BuildWithShippedFiles(build_py):
    """`build_py`, and the folders as stepladder/shipped; an editable installation reads those of the clone."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "stepladder" / "shipped"
        if missing := [folder for folder in FOLDERS if not Path(folder).is_dir()]:
            raise SystemExit(f"a package needs {', '.join(missing)} beside setup.py")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for file in (file for folder in FOLDERS for file in sorted(Path(folder).rglob("*"))):
            if file.suffix in SUFFIXES and file.is_file() and file.as_posix() not in NOT_SHIPPED:
                (target / file.parent).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / file)


setup(cmdclass={"build_py": BuildWithShippedFiles})
