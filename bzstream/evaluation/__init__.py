"""Fetch a checkpoint safely, read it safely, score it on the GPU.

May import: `model`, `submissions`, `chain`, `client`, `payload`, `config`, `errors`.
"""
