"""HTTP/1.1 on raw sockets: h11 state machine, router, ranges, zero-copy send. Knows nothing of models or chains.

May import: `payload`, `config`, `errors`.
"""
