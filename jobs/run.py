"""Entry point of dpo4rec_ray/cli/run.py, for `python jobs/run.py` and `ray job submit`."""

import sys

from dpo4rec_ray.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
