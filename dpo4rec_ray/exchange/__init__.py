"""Preference pairs to other trainers' files, and from them; models as folders that others can load."""

FORMATS = ("trl", "nemo", "sharegpt")  # layouts; preference_files.py says what they are
