"""The miner's and the peer's side: pull, submit, measure.

May import: `chain` (keys and proofs), `payload`, `config`, `errors`. Never api, http or evaluation.
"""
