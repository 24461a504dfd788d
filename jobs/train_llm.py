"""Entry point of dpo4rec_ray/cli/train_llm.py, for `python jobs/train_llm.py` and `ray job submit`."""

import sys

from dpo4rec_ray.cli.train_llm import main

if __name__ == "__main__":
    sys.exit(main())
