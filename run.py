"""python run.py key=value ...: trains and evaluates one run. See README.md."""

import sys

try:
    from highrank.cli import run_script
except ModuleNotFoundError as error:
    sys.exit(f'{error}; install the project first: pip install -e ".[test]"')

if __name__ == "__main__":
    sys.exit(run_script())
