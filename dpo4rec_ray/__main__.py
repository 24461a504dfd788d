"""`python -m dpo4rec_ray`: the same as the command `dpo4rec`."""

import sys

from dpo4rec_ray.cli.front import main

if __name__ == "__main__":
    sys.exit(main())
