"""Makes the API reference of the docstrings, one page per module: `python docs/reference.py FOLDER`. A warning is an error."""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import highrank

if len(sys.argv) != 2:
    sys.exit("usage: reference.py FOLDER")
warnings.simplefilter("error")
# What torch gives every subclass of Tensor has no source.
warnings.filterwarnings("ignore", message=r"Cannot determine where highrank\.model\.quantised\.QuantisedWeight\.")
pdoc.render.configure(docformat="google")
# What `highrank` gives only when it is asked for is on its page too.
entries = {name: getattr(highrank, name) for name in highrank._LIBRARY}
vars(highrank).update(entries)
modules = [module.name for module in pkgutil.iter_modules(highrank.__path__) if not module.name.startswith("_")]
highrank.__all__ = [*entries, *modules, "methods"]
# The methods are found among the names of highrank, the tasks are not.
pdoc.pdoc("highrank", "highrank.tasks", output_directory=Path(sys.argv[1]))

said = {
    "highrank": [*entries],
    "highrank/model/adapters": [
        f"Adapters.{name}" for name in ("save", "merge", "unmerge", "disabled", "delta_weight", "parameter_groups")
    ],
    "highrank/methods": ["Methods"],
}
for page, names in said.items():
    html = (Path(sys.argv[1]) / f"{page}.html").read_text()
    if missing := [name for name in names if f'id="{name}"' not in html]:
        sys.exit(f"reference: {page} must have an entry for each name of the library, got none for {missing}")
