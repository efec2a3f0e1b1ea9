"""A new folder with a config, a net, a data set, a test and a batch script, which trains as it is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from dist_train.errors import ConfigError
from dist_train.launch.slurm.batch_script import BatchScript
from dist_train.runs.start_options import valid_run_name

_TEMPLATE = Path(__file__).parent / "new_project"


def create_project(name: str) -> list[Path]:
    """Create the folder `name` here; return its files.

    Raises:
        ConfigError: the name is not valid, or taken; or the folder cannot be written.
    """
    if name != valid_run_name(name):
        raise ConfigError(
            f"{name!r}: a name starts with a letter or a digit and contains only letters, digits and _ . = + , -, for "
            f"example {valid_run_name(name)}."
        )
    folder = Path(name)
    script = BatchScript(
        nodes=1, nproc=2, arguments=("-c", "config.yaml"), job_name=name, python=sys.executable,
        usage="Trains the config of this folder. Usage, in this folder: sbatch job.sbatch",
    )  # fmt: skip
    try:
        folder.mkdir()
        for source in sorted(_TEMPLATE.iterdir()):
            if source.is_file():
                shutil.copyfile(source, folder / source.name)
        (folder / "job.sbatch").write_text(script.render())
    except FileExistsError:
        raise ConfigError(f"{name} exists already. Choose another name, or remove it.") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be written: {error.strerror}.") from None
    return sorted(folder.iterdir())
