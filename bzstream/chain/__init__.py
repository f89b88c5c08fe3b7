"""Blocks, phases, registered hotkeys, keys and signatures; a simulated chain and Bittensor's.

May import: `config`, `errors`, `util`. Only `role.run` loads the Bittensor SDK, and only for a real chain.

Public API: `keys` (SS58, canonical JSON, `verify`, private keys), `proofs` (signed requests), `clock` (phases and
rounds), `state` (what is known of the chain), `round_base` (what a round is scored against), `weights` (scores to
weights), `role` (the process that watches the chain and sets weights).
"""
