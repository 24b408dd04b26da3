"""Makes the API reference of the docstrings, one page per module: `python docs/reference.py FOLDER`. A warning is an error."""

import sys
import warnings
from pathlib import Path

import pdoc

if len(sys.argv) != 2:
    sys.exit("usage: reference.py FOLDER")
warnings.simplefilter("error")
# What torch gives every subclass of Tensor has no source.
warnings.filterwarnings("ignore", message=r"Cannot determine where highrank\.model\.quantised\.QuantisedWeight\.")
pdoc.render.configure(docformat="google")
# The methods are found among the names of highrank, the tasks are not.
pdoc.pdoc("highrank", "highrank.tasks", output_directory=Path(sys.argv[1]))
