"""The pin of a certificate's key: SHA-256 of its SubjectPublicKeyInfo, as RFC 7469 defines it. Pure.

A validator announces the pin of its TLS key on the chain (`chain.announce`), and a client that found the address there
compares it (`client.axon`). A certificate may be renewed without a new pin, as long as its key stays.
"""

from __future__ import annotations

import hashlib

__all__ = ["PIN_ALGORITHM", "key_pin"]

PIN_ALGORITHM = 83
"""First byte of what is announced ("S" for SPKI). The chain keeps it beside the key and gives it no meaning."""


def key_pin(certificate: bytes) -> bytes:
    """The 32-byte pin of a certificate in DER. Raises ValueError when it is none."""
    _, tbs, _ = _element(certificate, 0)  # Certificate ::= SEQUENCE (RFC 5280 4.1)
    _, at, _ = _element(certificate, tbs)  # TBSCertificate ::= SEQUENCE
    tag, _, end = _element(certificate, at)
    if tag == 0xA0:  # version [0] EXPLICIT, absent in version 1
        at = end
    for _ in range(5):  # serialNumber, signature, issuer, validity, subject
        _, _, at = _element(certificate, at)
    _, _, end = _element(certificate, at)
    return hashlib.sha256(certificate[at:end]).digest()


def _element(data: bytes, at: int) -> tuple[int, int, int]:
    """Tag, start of the content and end of the DER element (X.690 8.1) at a position."""
    if at + 2 > len(data):
        raise ValueError("this is no certificate in DER")
    tag, size, start = data[at], data[at + 1], at + 2
    if size >= 0x80:
        count = size & 0x7F
        size, start = int.from_bytes(data[start : start + count], "big"), start + count
    if start + size > len(data):
        raise ValueError("this is no certificate in DER")
    return tag, start, start + size
