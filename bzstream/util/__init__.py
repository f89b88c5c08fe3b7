"""What every package needs once: each module is one small mechanism. May import: `errors`, and nothing else of ours.

`files` and `durable` read and write files, `strict_json` parses JSON from outside, `dtypes` is the table of element
types, `backoff` says how long to wait after failures, `warn_once` keeps a lasting problem from filling the log,
`loops` carries results from a thread to an event loop, `counted` closes what its last user lets go of, `statistics` are
the figures of benches and of `measure`.
"""
