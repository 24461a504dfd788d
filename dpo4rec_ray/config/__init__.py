"""One TOML recipe becomes one frozen Config. Nothing here imports torch or ray: a typo costs milliseconds.

A value is declared once, in the section of its family, and a component takes that section as it is.
"""

from dpo4rec_ray.config.load import default_config, is_fragment, load_config, read_config
from dpo4rec_ray.config.recipe import Config

__all__ = ["Config", "default_config", "is_fragment", "load_config", "read_config"]
