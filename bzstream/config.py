"""Every setting: its name, its default, its unit and the reason for the default.

A setting is found in four places, later ones win: the defaults below, a TOML file (`--config bzstream.toml`, one
table a section), the environment (`BZ_<SECTION>_<NAME>`, such as `BZ_HTTP_PORT=8000`), and flags of the command line.
Lists are written as JSON in the environment (`BZ_HTTP_TRUSTED_PROXIES='["10.0.0.0/8"]'`). An unknown name, a wrong
type or a value out of range ends in one sentence that names the setting and the place where it was given. In the
environment a name of no section is somebody else's and left alone, unless it looks like a mistyped section.

Secrets never come from a flag: `BZ_AUTH_TOKEN`, `BZ_TOKENS_FILE` and `BZ_LEDGER` (whose URL may hold a password).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta, Struct

from bzstream.errors import BzstreamError

__all__ = [
    "AuthSettings",
    "ChainSettings",
    "CodingSettings",
    "ConfigError",
    "EvaluationSettings",
    "HttpSettings",
    "LedgerSettings",
    "LogSettings",
    "MetricsSettings",
    "NodeSettings",
    "Settings",
    "ShownAs",
    "StoreSettings",
    "SubmitSettings",
    "environment_name",
    "load",
]

Seconds = Annotated[float, Meta(gt=0, extra={"unit": "seconds"})]
Count = Annotated[int, Meta(ge=1)]
Bytes = Annotated[int, Meta(ge=1, extra={"unit": "bytes"})]
Blocks = Annotated[int, Meta(ge=1, extra={"unit": "blocks"})]
Port = Annotated[int, Meta(ge=0, le=65535)]
ShownAs = Literal["distribute", "train", "commit", "submit"]
"""The phases that the HTTP contract knows."""
PhaseName = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class ConfigError(BzstreamError):
    """A setting is missing, unknown, of the wrong type or out of range; the text names it and where it was given."""


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: immutable, named arguments only, unknown names refused."""


class HttpSettings(_Section, frozen=True):
    """`[http]`: the listener and the limits that keep a hostile client from costing anybody anything."""

    host: str = "127.0.0.1"
    """Address that the node listens on. Loopback, so that nothing is public before somebody decides it."""
    port: Port = 8000
    """TCP port; 0: any free port, written to the log. 8000 is the port of the subnet's first server."""
    workers: Count = 1
    """Processes that share the port. One worker fills 100 Gbit/s of sendfile on current hardware."""
    max_head: Bytes = 16 * 1024
    """Bytes of a request line with its fields. 16 KiB is h11's own default for one incomplete event."""
    max_fields: Count = 100
    """Header fields of one request (Apache's default LimitRequestFields is 100)."""
    head_timeout_s: Seconds = 10.0
    """A request's head must be whole after so long. An honest one is a packet or two, sent at once."""
    max_body: Bytes = 64 * 1024
    """Bytes of a request's body. A submission with a URL of 2048 characters takes 3 KB."""
    body_timeout_s: Seconds = 10.0
    """A request's body must be whole after so long."""
    idle_timeout_s: Seconds = 75.0
    """Keep-alive without a request (nginx's default keepalive_timeout)."""
    stall_timeout_s: Seconds = 60.0
    """A reader that takes no byte for so long is closed (nginx's default send_timeout)."""
    linger_s: Seconds = 2.0
    """After an early final answer input is discarded for so long or `linger_bytes`, then closed (RFC 9112 9.6)."""
    linger_bytes: Bytes = 1024 * 1024
    """Input that is discarded after an early final answer; more than a body that just missed `max_body`."""
    max_connections: Count = 10_000
    """Open connections of one worker. When it is full, the one that has waited longest for a request gives way."""
    max_connections_per_caller: Count = 64
    """Open connections of one caller in one worker: bound or proven hotkey, else peer address (IPv6: its /64)."""
    drain_s: Seconds = 60.0
    """After SIGTERM: downloads under way may go on for so long."""
    tls_cert: str | None = None
    """PEM chain; with `tls_key` the listener speaks TLS. Both files are loaded again when they change."""
    tls_key: str | None = None
    """PEM private key of `tls_cert`, readable by the node alone."""
    trusted_proxies: tuple[str, ...] = ()
    """Networks (CIDR) whose X-Forwarded-For names the peer."""
    backlog: Count = 4096
    """Connections that the kernel queues before they are accepted (its own cap: net.core.somaxconn)."""


class AuthSettings(_Section, frozen=True):
    """`[auth]`: who may call."""

    token: str | None = None
    """BZ_AUTH_TOKEN, at least 32 characters: the shared token. `serve` does not start without one."""
    shared_tokens_file: str | None = None
    """Shared tokens that replace `token`, one a line, mode 0600. They rotate without a restart: any of them counts."""
    tokens_file: str | None = None
    """BZ_TOKENS_FILE: TOML, `"<token>" = "<ss58 hotkey>"`, mode 0600."""
    deny_file: str | None = None
    """Hotkeys and networks (CIDR), one a line, that are refused with 403."""
    trust_claimed_hotkey: bool = False
    """Let an X-Hotkey claim count as an identity. For closed networks only."""
    allow_plaintext_tokens: bool = False
    """Accept bound tokens over plain HTTP on an address that is not loopback."""


class NodeSettings(_Section, frozen=True):
    """`[node]`: who this validator is."""

    hotkey: str | None = None
    """Public SS58 address of this node: the receiver that a signed-request proof must name."""
    wallet: str | None = None
    """Key file or Bittensor wallet (`<wallet>/<hotkey>`) that signs manifests and weights."""


class StoreSettings(_Section, frozen=True):
    """`[store]`: the snapshots."""

    path: str | None = None
    """Folder of the snapshots, which `bzstream publish` writes; or `--store`."""
    keep: Count = 3
    """Published versions that stay on disk: the current one, one to roll back to, and one still being downloaded."""


class CodingSettings(_Section, frozen=True):
    """`[coding]`: coded forms of the units, which take fewer bytes (docs/coding.md)."""

    enabled: bool = False
    """Write coded files after each publication, at the lowest priority. They take up to 1.1 times the units' room."""
    bases: Annotated[int, Meta(ge=0, le=16)] = 1
    """Earlier versions to which differences are made. Most miners have the one before."""


class ChainSettings(_Section, frozen=True):
    """`[chain]`: the clock of the subnet and who is registered."""

    file: str | None = None
    """The simulated chain. Without it `endpoint` and `netuid` name a real one."""
    endpoint: tuple[str, ...] = ()
    """WebSocket URLs of Bittensor nodes, tried in turn."""
    netuid: Annotated[int, Meta(ge=0, le=65535)] | None = None
    """Number of the subnet on the chain that `endpoint` names."""
    distribute_blocks: Blocks = 20
    """Blocks of the phase in which miners download; 20 blocks of 12 s are 240 s."""
    train_blocks: Blocks = 300
    """Blocks of the phase in which miners train; 300 blocks are an hour."""
    commit_blocks: Blocks = 20
    """Blocks of the phase in which miners commit to their checkpoints on the chain."""
    submit_blocks: Blocks = 80
    """Blocks of the phase in which miners submit; 80 blocks are 16 minutes."""
    phases: tuple[tuple[PhaseName, Blocks, ShownAs], ...] = ()
    """The phases of a cycle: [name, blocks, shown as] each, in their order. Shown as one of "distribute", "train",
    "commit" and "submit", which is what /health calls `phase`; the name is its `phase_detail`. Empty: these four, with
    the numbers of blocks above."""
    cycle_offset: Annotated[int, Meta(ge=0)] = 0
    """A block at which a cycle begins; the others are whole cycles away."""
    block_s: Seconds = 12.0
    """Seconds a block (Bittensor's finney network)."""
    stale_s: Seconds = 60.0
    """A chain state older than this makes /health degraded and /submit answer 503."""
    min_validator_stake: Annotated[float, Meta(ge=0)] = 0.0
    """Stake below which a hotkey counts as no validator, whatever its permit says: the chain's own sum for this subnet,
    in its alpha (`total_stake` of the metagraph, in which TAO on the root subnet counts by the chain's factor)."""
    validators_allowed: tuple[str, ...] = ()
    """Hotkeys that may count as validators, if they have the permit and the stake. Empty: every hotkey that has."""
    announce: bool = False
    """Announce on the chain, signed by `node.wallet`, that this node is at `external_host` and `external_port`."""
    external_host: str | None = None
    """The IP address at which miners reach this node. The chain keeps no names."""
    external_port: Annotated[int, Meta(ge=1, le=65535)] | None = None
    """Its port there. A client that finds it on the chain speaks TLS to it."""
    set_weights: bool = False
    """Set the weights of every round on the chain, signed by `node.wallet`."""
    weights_top_k: Count = 64
    """Hotkeys that share the weights of a round at the most."""
    weights_alpha: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Part of the newest round in the moving average of weights over rounds; 1: no average."""
    weights_version_key: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """Version key sent with the weights; default: the one that the chain asks for."""
    burn: str | None = None
    """Hotkey that gets the weight nobody earned, or "owner" for the hotkey of the subnet's owner."""
    burn_rate: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Part of every round's weight that goes to `burn`."""
    keep_alive_blocks: Blocks = 4000
    """Weights are set again when ours are so old. Subtensor takes a validator that set none for 5,000 blocks (its
    default ActivityCutoff, 17 h) for inactive."""

    @property
    def cycle_phases(self) -> tuple[tuple[str, int, ShownAs], ...]:
        """The phases of a cycle, whichever way they are given."""
        return self.phases or (
            ("distribute", self.distribute_blocks, "distribute"),
            ("train", self.train_blocks, "train"),
            ("commit", self.commit_blocks, "commit"),
            ("submit", self.submit_blocks, "submit"),
        )


class SubmitSettings(_Section, frozen=True):
    """`[submit]`: what a submission may look like."""

    max_per_cycle: Count = 3
    """Submissions of one hotkey in a cycle: the last one counts, and two corrections are enough."""
    max_url: Count = 2048
    """Characters of a checkpoint URL. Presigned URLs of object stores can have more than 1,000."""
    allow_http: bool = False
    """Accept http:// URLs. Without TLS anybody on the way can change the checkpoint."""
    allow_private_urls: bool = False
    """Accept URLs that lead to private addresses. For closed networks only: a miner could probe the inside."""
    ports: tuple[Annotated[int, Meta(ge=1, le=65535)], ...] = ()
    """Ports a checkpoint URL may name; empty: any."""
    signature_schemes: tuple[Literal["ed25519", "sr25519"], ...] = ("ed25519", "sr25519")
    """Accepted kinds of signatures: ed25519 is the contract's, sr25519 that of standard Bittensor hotkeys."""


class LedgerSettings(_Section, frozen=True):
    """`[ledger]`: the database of submissions and chain state."""

    url: str | None = None
    """BZ_LEDGER or `--ledger FILE`: a file for SQLite, or postgresql://user:password@host/db. Default: ledger.sqlite
    inside the store."""


class EvaluationSettings(_Section, frozen=True):
    """`[evaluation]`: how checkpoints are fetched and scored."""

    enabled: bool = True
    """Run evaluators; or `--no-evaluator`. Off: submissions are accepted and wait."""
    data: str | None = None
    """Tokens file (.npy, .bin, .safetensors), text file or folder, or a Hugging Face dataset name."""
    tokenizer: str | None = None
    """Folder with the model's tokenizer.json, for text; or `bytes`. Default: bytes for a vocabulary of at most 300."""
    max_tokens: Count = 20_000_000
    """Tokens after which text is no longer encoded: 300 times the default score's, in 40 MB."""
    model: str | None = None
    """`module:function` that builds the model from the snapshot's config; default: transformers by its config."""
    device: str | None = None
    """Torch device; default: one evaluator per GPU, else `cpu`."""
    windows: Count = 64
    """Windows of tokens a score is the mean of."""
    window_tokens: Annotated[int, Meta(ge=2)] = 1024
    """Tokens of a window. Longer ones take more memory for a forward pass."""
    batch: Count = 4
    """Windows a forward pass."""
    score_timeout_s: Seconds = 600.0
    """Seconds that scoring one submission may take."""
    fetch_grace_blocks: Annotated[int, Meta(ge=0)] = 10
    """Blocks after the submit phase within which a checkpoint must be fetched."""
    fetch_timeout_s: Seconds = 900.0
    """A checkpoint must be fetched after so long: 3.62 GB at 4 MB/s."""
    fetch_stall_s: Seconds = 30.0
    """A fetch that gets no byte for so long is given up and tried again."""
    fetches: Count = 32
    """Checkpoints fetched at once. A slow server holds one place for at most fetch_timeout_s; places are threads."""
    fetch_connections: Count = 4
    """Connections to one server that honours ranges."""
    fetch_attempts: Count = 3
    """Tries of a fetch whose fault may be passing, within one fetch_timeout_s."""
    max_redirects: Annotated[int, Meta(ge=0, le=20)] = 5
    """Redirects that a fetch follows. A model hub needs one, to its storage."""
    spool: str | None = None
    """Folder for fetched checkpoints; default: `spool` inside the store."""
    spool_bytes: Bytes = 256 * 1024**3
    """Bytes that fetched checkpoints may take together: 75 slices of 3.62 GB."""
    read_memory: Bytes = 512 * 1024**2
    """Bytes that the process which reads a hostile file may use above an idle one. The largest honest head takes 30."""
    read_timeout_s: Seconds = 300.0
    """The process that reads a hostile file is ended after so long. It is enough for 3.62 GB at 12 MB/s."""
    lease_s: Seconds = 120.0
    """A claimed job goes back to the queue when its evaluator has not renewed the lease for so long."""
    poll_s: Seconds = 0.5
    """How often the evaluator looks for new submissions, snapshots and blocks."""
    copy_distance: Annotated[float, Meta(ge=0)] = 0.2
    """Two submissions nearer than this (relative L2 distance of their changes to the baseline) are copies. Measured:
    two runs over different batches of one text differ by 0.7, a copy with noise in bfloat16's last bit by 0.1."""


class ScoringSettings(_Section, frozen=True):
    """`[scoring]`: what submissions earn (docs/scoring.md)."""

    independent_share: Annotated[float, Meta(ge=0, le=1)] = 0.25
    """Part of what new work would earn alone that it earns at least, when others have added the same before it. At 0
    most honest miners who come later earn nothing; at 1 every hotkey of somebody who can make work that looks new at
    little cost is paid like an honest miner. Lower it where hotkeys are cheap."""


class LogSettings(_Section, frozen=True):
    """`[log]`: the lines on standard error."""

    json: bool = False
    """One JSON object a line, for collectors; or `--log-json`. Off: lines for people."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important lines that are written. `info` has one line a request."""


class MetricsSettings(_Section, frozen=True):
    """`[metrics]`: Prometheus text on a listener of its own."""

    host: str = "127.0.0.1"
    """Address of the metrics listener. It asks for no token, so nobody outside of the machine gets there."""
    port: Port | None = None
    """None: no metrics listener. 0: any free port, written to the log."""


class Settings(_Section, frozen=True):
    """All sections."""

    http: HttpSettings = HttpSettings()
    auth: AuthSettings = AuthSettings()
    node: NodeSettings = NodeSettings()
    store: StoreSettings = StoreSettings()
    coding: CodingSettings = CodingSettings()
    chain: ChainSettings = ChainSettings()
    submit: SubmitSettings = SubmitSettings()
    ledger: LedgerSettings = LedgerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    scoring: ScoringSettings = ScoringSettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()

    def store_path(self) -> Path:
        """The store. Raises ConfigError when none is named."""
        if self.store.path is None:
            raise ConfigError("no store is named; give --store, the folder that `bzstream publish` writes")
        return Path(self.store.path)

    def ledger_location(self) -> str:
        """A file for SQLite, or a postgresql:// URL."""
        return self.ledger.url or str(self.store_path() / "ledger.sqlite")


_ALIASES = {"BZ_TOKENS_FILE": ("auth", "tokens_file"), "BZ_LEDGER": ("ledger", "url")}
"""Environment names of the contract that do not follow BZ_<SECTION>_<NAME>."""


def environment_name(section: str, name: str) -> str:
    """The environment variable of a setting."""
    own = [variable for variable, setting in _ALIASES.items() if setting == (section, name)]
    return own[0] if own else f"BZ_{section}_{name}".upper()


def load(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Settings:
    """The settings from a TOML file, the environment and flags, in rising precedence.

    `flags` maps `"section.name"` to a value; a value of None means that the flag was not given.
    Raises ConfigError with one sentence that names the setting and where it came from.
    """
    values: dict[str, dict[str, Any]] = {}
    if file is not None:
        for (section, name), value in _from_toml(file):
            _put(values, section, name, value, f"in {file}", text=False)
    for variable, value in sorted((environment or {}).items()):
        if variable.startswith("BZ_"):
            section, name = _ALIASES.get(variable) or _split(variable)
            # Kubernetes sets BZ_SERVICE_HOST for a Service named bz, and a user may have a BZ_URL of their own.
            if section not in _sections() and not get_close_matches(section, _sections(), cutoff=0.7):
                continue
            _put(values, section, name, value, f"in the environment ({variable})", text=True)
    for flag, flag_value in (flags or {}).items():
        if flag_value is not None:
            section, name = flag.split(".")
            _put(values, section, name, flag_value, f"on the command line ({flag})", text=False)
    settings = msgspec.convert(values, Settings)
    _check_phases(settings.chain)
    return settings


def _check_phases(chain: ChainSettings) -> None:
    """Raise ConfigError unless rounds can be told from the phases: see `chain.clock`."""
    shown = [as_ for _, _, as_ in chain.cycle_phases]
    runs = [as_ for i, as_ in enumerate(shown) if i == 0 or shown[i - 1] != as_]
    if runs[0] != "distribute" or runs.count("submit") != 1:
        raise ConfigError(
            'chain.phases must begin with a phase shown as "distribute" and have its phases shown as "submit" side by'
            " side, at least one"
        )
    names = [name for name, _, _ in chain.cycle_phases]
    if len(set(names)) != len(names):
        raise ConfigError("chain.phases has a name twice; give every phase a name of its own")


def _sections() -> dict[str, type[_Section]]:
    return {field.name: field.type for field in msgspec.structs.fields(Settings)}


def _from_toml(file: Path) -> list[tuple[tuple[str, str], object]]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the settings file {file} cannot be read: {error.strerror}; check --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings file {file} is not valid TOML: {error}") from None
    found: list[tuple[tuple[str, str], object]] = []
    for section, table in document.items():
        if not isinstance(table, dict):
            known = ", ".join(f"[{name}]" for name in _sections())
            raise ConfigError(f"{section!r} in {file} stands in no table; put it under one of {known}")
        found += [((section, name), value) for name, value in table.items()]
    return found


def _split(variable: str) -> tuple[str, str]:
    section, _, name = variable.removeprefix("BZ_").lower().partition("_")
    return section, name


def _put(values: dict[str, dict[str, Any]], section: str, name: str, value: object, place: str, *, text: bool) -> None:
    """Check one setting on its own, so that the error can say where it was given, and put it among the values."""
    sections = _sections()
    if section not in sections:
        raise ConfigError(f"there is no section {section!r}, given {place}; the sections are {', '.join(sections)}")
    kind = sections[section]
    hints = get_type_hints(kind, include_extras=True)
    fields = [field.name for field in msgspec.structs.fields(kind)]
    if name not in fields:
        raise ConfigError(f"there is no setting {section}.{name}, given {place}; [{section}] has {', '.join(fields)}")
    secret = (section, name) in {("auth", "token"), ("ledger", "url")}
    try:
        if text and str(hints[name]).startswith("tuple"):
            value = json.loads(str(value))
        checked = msgspec.convert(value, hints[name], strict=not text)
    except (msgspec.ValidationError, json.JSONDecodeError) as error:
        shown = "" if secret else f" (it is {value!r})"
        raise ConfigError(f"{section}.{name}, given {place}, is not usable{shown}: {error}") from None
    values.setdefault(section, {})[name] = checked
