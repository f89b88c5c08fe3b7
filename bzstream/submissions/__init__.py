"""The ledger (a durable queue of submissions, with the chain state beside it) and the intake rules.

May import: `chain`, `config`, `errors`.
"""
