"""The arithmetic of the method in plain numpy and torch: no ray, no files, no run config.

Departs from the paper only where each module's first lines say so.
"""
