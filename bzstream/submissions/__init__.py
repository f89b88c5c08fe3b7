"""The ledger (a durable queue of submissions, with the chain state beside it) and the intake rules.

May import: `chain`, `config`, `errors`.

The front doors: `ledger` (`Ledger`, `AsyncLedger`), `intake` (`read_body`, `decide`), `records` (the values between
them), `urls` (which places a checkpoint may come from), `states` (the life of a submission).
"""
