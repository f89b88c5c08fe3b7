"""Checkpoints to snapshots: expert map, slicing, hashing, units. Knows nothing of HTTP.

May import: `payload`, `config`, `errors`.
"""
