"""Entry point of dpo4rec_ray/cli/pairs.py, for `python jobs/pairs.py` and `ray job submit`."""

import sys

from dpo4rec_ray.cli.pairs import main

if __name__ == "__main__":
    sys.exit(main())
