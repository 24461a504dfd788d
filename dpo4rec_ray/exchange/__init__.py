"""Preference pairs to other trainers' files, and from them."""
