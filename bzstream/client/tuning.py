"""Every number that the client was tuned with, its unit and the reason for it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Tuning"]

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Tuning:
    """Limits and habits of a transfer; the defaults suit everything from loopback to a lossy ocean cable."""

    max_rate: float | None = None
    """Most bytes a second of a transfer, all its connections together; None: as fast as it goes."""
    connect_timeout_s: float = 10.0
    stall_s: float = 15.0
    """A connection without a byte for so long is closed and its work handed to another. There is no total time-out."""
    patience_s: float = 60.0
    """A transfer that gets less than `trickle` bytes from everybody together in this time ends; the next call resumes
    it."""
    trickle: int = 64 * KIB
    """1 kB/s at the least: a modem does more, and a server that drips to hold its clients does not."""
    first_patience_s: float = 5.0
    """The same before the first answer: a wrong URL should not take a minute to be noticed."""
    max_head: int = 32 * KIB
    """Bytes of a response head, interim responses included (nginx and bzstream stay below 1 KiB)."""
    max_manifest: int = 16 * MIB
    """67 bytes a chunk of 8 MiB: enough for 2 TB."""
    max_document: int = 1 * MIB
    """Bytes of any other JSON answer."""
    max_retry_after_s: float = 300.0
    """A longer Retry-After is an outage, and is reported instead of waited for."""
    max_wrong: int = 3
    """The same chunk wrong so often from one URL drops that URL."""
    violations: int = 4
    """Answers against the protocol, without a good chunk in between, that drop a URL."""
    near_workers: int = 8
    """Connections to begin with on a link whose round trip is below `near_rtt_s`: on loopback with two cores 8 are
    10-20% faster than 4, and 16 add nothing."""
    near_hashing_workers: int = 3
    """The same when the SHA-256 follows: it sets the pace, and more would only take processor time from it (on two
    cores 2 or 3 are 5% faster than 4), or get further ahead of it than buffers are kept (with 8, a third of the file
    was read back from the disk)."""
    far_workers: int = 24
    """Connections to begin with on any other link: with 80 ms and 0.1% loss a cubic flow is held to ~10 Mbit/s."""
    near_rtt_s: float = 0.002
    rate_per_worker: float = 8e6
    """Bytes a second for which a transfer with a `max_rate` opens one connection."""
    max_workers: int = 48
    """Most connections that are opened unasked: three quarters of what a node lets one caller have."""
    probe_s: float = 1.0
    """How long new workers have to show what they bring, on a far link `probe_rtts` round trips: they start slowly."""
    probe_rtts: float = 25.0
    buffer: int = 1 * MIB
    """Bytes gathered before a write to disk: fits the second-level cache, and makes a direct write worth its trip."""
    gather_s: float = 0.005
    """A buffer older than this is written as it is, so that a kill loses next to nothing on a slow link."""
    direct_from: int = 256 * KIB
    """Smallest write that bypasses the page cache."""
    memory_piece: int = 2 * MIB
    """Most bytes of one receive into final memory, a huge page: hashed right after it, while they are in the cache. A
    socket seldom holds so much; with less room a receive ends early and the loop around it runs more often."""
    run_s: float = 2.0
    """A range is asked for in runs of about this many seconds, but at least `run_rtts` round trips..."""
    run_rtts: float = 40.0
    """...so that the pause between two requests costs 2.5% of a connection at the most..."""
    max_run: int = 64 * MIB
    """...and on a near link in runs of this, as long as nothing but their number matters."""
    min_run: int = 1 * MIB
    """The last runs on a far link: with 1 MB/s a worker they all end within a second of each other."""
    min_steal: int = 64 * KIB
    """A rest smaller than this is not worth another request."""
    steal_s: float = 0.02
    """A run that ends within this and three round trips is left to its owner."""
    first_claim: int = 64 * KIB
    claim_s: float = 0.1
    """A worker claims what it receives in this time, at least `first_claim` bytes; others can have the rest."""
    stuck_s: float = 2.0
    """When others are idle, a connection without a byte for so long loses its work to them."""
    handoff: int = 96 * MIB
    """Bytes of written buffers kept for the SHA-256 that follows, so that it does not read them back from the disk: the
    backlog, the chunks under way, and a little."""
    backlog: int = 48 * MIB
    """Verified bytes ahead of the SHA-256 at which receiving may pause, if the hash decides when the pull ends."""
    coded_after_s: float = 0.5
    """How long bytes come on a near link before it is decided whether chunks are fetched coded. 0: they always are."""
    coded_part: int = 128 * KIB
    """The smallest part of a coded chunk that a worker asks for; on a far link it is as much as comes in..."""
    coded_part_rtts: float = 20.0
    """...so many round trips, half of what a plain run has at the least: the shorter the parts, the fewer chunks are
    under way at once and have to be decoded after the last byte."""
    sync_s: float = 2.0
    """How often the state file goes to the disk."""
    tick_s: float = 0.1
