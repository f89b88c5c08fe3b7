"""Blocks, phases, registered hotkeys, keys and signatures; a simulated chain and Bittensor's.

May import: `config`, `errors`. The Bittensor SDK is loaded by `role.run` alone, and only for a real chain.

The front doors: `keys` (SS58, canonical JSON, `verify`, private keys), `proofs` (signed requests), `clock` (phases),
`state` (what is known of the chain), `role` (the process that watches it), `weights` (scores to weights).
"""
