"""The protocol without I/O: request heads, bodies, ranges, conditions, dates, responses. Pure functions and values."""
