"""Preference pairs to other trainers' files, and from them."""

FORMATS = ("trl", "nemo", "sharegpt")  # layouts; preference_files.py says what they are
