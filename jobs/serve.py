"""Entry point of dpo4rec_ray/cli/serve.py, for `python jobs/serve.py` and `ray job submit`."""

import sys

from dpo4rec_ray.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
