"""Hostile files: is this file exactly the slice it must be? Reads nothing but the one file, in a process of its own.

May import: `evaluation.rejection_codes`, `tensorfile`, `util`. Imports neither torch nor anything that opens the store.
"""
