"""Blocks, phases, registered hotkeys, keys and signatures; a simulated chain and Bittensor's.

May import: `config`, `errors`.
"""
