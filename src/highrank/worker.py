"""One more process of a run, started by process 0: `python -m highrank.worker <run>/config.yaml`."""

import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from highrank.base.console import silent_unless
from highrank.base.errors import UserError
from highrank.config.build import build
from highrank.config.words import register_configs
from highrank.run import execute


def main(config: Path) -> None:
    """Takes part in a run that process 0 has started."""
    register_configs()
    values: Any = OmegaConf.load(config)
    values["run_dir"] = str(config.parent)
    try:
        with silent_unless(False):
            execute(build(values))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
