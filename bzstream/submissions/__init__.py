"""The ledger (a durable queue of submissions, with the chain state beside it) and the intake rules.

May import: `chain`, `config`, `errors`, `util`.

Public API: `ledger` (`Ledger`, `AsyncLedger`), `intake` (`read_body`, `decide`), `types` (the values between them),
`urls` (where a checkpoint may lie), `states` (the life of a submission).
"""
