"""Measure a stage against its peer in the same run: python benchmarks/bench.py STAGE [--help]; STAGES lists them.

Prints Markdown tables and writes the results as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

# Stage and what is measured. The file of the same name has `add_arguments(parser)` and `run(options, folder)`.
STAGES = {
    "prepare": "raw Amazon reviews to candidate lists, against pandas",
    "score": "rewards of 10,000 texts, against a plain loop over lists",
    "generate": "samples per second, against vLLM and transformers alone",
    "dpo": "pairs per second and first steps, against TRL's DPOTrainer",
    "grpo": "prompts per second and first steps, against TRL's GRPOTrainer",
    "belief": "how often texts are believed that say nothing, and counted ones, by the metric and by the likelihood",
    "channel": "what texts add to a backbone, by encoder, way and adapter, against the backbone",
    "beside": "what an LLM's texts bring beside counted ones, in a finished run",
    "ablation": "one round by reader, reward, pairs, learner and turns, judged by the same rerankers",
    "waiting": "how long engines and trainer wait for each other in a run with turns, and on 1:1 to 8:1 GPUs",
    "plan": "times that `dpo4rec plan` reckons from a small run, against a run of ten times the size",
    "balance": "a late engine and a slow one, against the ideal",
    "scaling": "1 to 32 engines, and memory of the driver by users",
    "chain": "all stages at Amazon-Books' size, with texts that nobody wrote",
    "serve": "requests per second, against a no-op deployment and bare FastAPI",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/bench.py", description="Measure a stage against its peer."
    )
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, text in STAGES.items():
        stage = stages.add_parser(name, help=text, description=text)
        if name in sys.argv[1:2]:  # the others are not imported
            module = importlib.import_module(name)
            stage.add_argument("--folder", default="runs/bench", help="for inputs and results")
            module.add_arguments(stage)
            stage.set_defaults(run=module.run)
    options = parser.parse_args()
    return options.run(options, Path(options.folder).resolve())


if __name__ == "__main__":
    sys.exit(main())
