"""The evaluator: fetches each submitted checkpoint safely, reads it safely, and scores it on the GPU.

`role` is the process, `pipeline` its event loop, `stages` the blocking steps. `fetching` and `spool` bring a file here,
`reading` checks it in a process of its own, `scoring` measures it against `baseline`; `records`, `duplicates` and
`reproduce` are about what is kept in the ledger. `rejection_codes` lists why a submission gets no score.

May import: `model`, `submissions`, `chain`, `client`, `httpclient`, `payload`, `tensorfile`, `config`, `util`,
`errors`.
"""
