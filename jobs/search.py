"""Entry point of dpo4rec_ray/cli/search.py, for `python jobs/search.py` and `ray job submit`."""

import sys

from dpo4rec_ray.cli.search import main

if __name__ == "__main__":
    sys.exit(main())
