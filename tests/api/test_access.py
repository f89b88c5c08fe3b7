"""Who may call: shared tokens that rotate, the deny list, proofs that are used once, and whom a request counts for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bzstream.api.access import AccessFiles
from bzstream.api.deny import DenyFileError, DenyList
from bzstream.api.tokens import TokenError
from bzstream.chain.keys import Key
from bzstream.chain.proofs import sign_request
from bzstream.config import AuthSettings
from bzstream.model import publish
from tests.api.desk import Desk, new_key, signed
from tests.model import build
from tests.nodes import TOKEN, Answer, Node, eventually, running_node

FIRST, SECOND, THIRD = ("first-" + "1" * 40, "second-" + "2" * 40, "third-" + "3" * 40)
HOTKEY, OTHER = new_key().ss58_address, new_key().ss58_address


def write(path: Path, *lines: str, mode: int = 0o600) -> str:
    """Replace a file in one step."""
    new = path.with_suffix(".new")
    new.write_text("".join(f"{line}\n" for line in lines))
    new.chmod(mode)
    new.replace(path)
    return str(path)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class Files:
    """AccessFiles over files of a folder, and what it warned of."""

    def __init__(self, folder: Path, **settings: str | None) -> None:
        self.shared, self.bound, self.denied = (folder / name for name in ("shared", "tokens.toml", "denied"))
        self.warnings: list[str] = []
        given = {
            "shared_tokens_file": write(self.shared, FIRST),
            "tokens_file": write(self.bound, f'"{THIRD}" = "{HOTKEY}"'),
            "deny_file": write(self.denied),
        }
        self.access = AccessFiles(AuthSettings(**(given | settings)), self.warnings.append)  # type: ignore[arg-type]

    def known(self) -> dict[str, tuple[bool, str | None]]:
        tokens = {"first": FIRST, "second": SECOND, "third": THIRD, "environment": TOKEN}
        return {name: self.access.tokens.hotkey_of(token) for name, token in tokens.items()}


NOBODY, SHARED, BOUND = (False, None), (True, None), (True, HOTKEY)


def test_a_shared_tokens_file_replaces_the_token_of_the_environment(tmp_path: Path) -> None:
    files = Files(tmp_path, token=TOKEN)
    assert files.known() == {"first": SHARED, "second": NOBODY, "third": BOUND, "environment": NOBODY}
    write(files.shared, "# the old one goes on Monday", FIRST, "", f"  {SECOND}  ")
    assert files.access.refresh()
    assert not files.access.refresh(), "nothing changed since"
    assert files.known() == {"first": SHARED, "second": SHARED, "third": BOUND, "environment": NOBODY}
    write(files.shared, SECOND)
    files.access.refresh()
    assert files.known()["first"] == NOBODY
    assert files.warnings == []


@pytest.mark.parametrize(
    ("lines", "mode", "problem"),
    [
        ((), 0o600, "holds no token"),
        (("# nothing",), 0o600, "holds no token"),
        ((FIRST, "x" * 31), 0o600, "31 characters"),
        ((SECOND, SECOND), 0o600, "twice"),
        (("two words " + "x" * 40,), 0o600, "cannot carry"),
        ((SECOND,), 0o640, "chmod 0600"),
        ((SECOND,), 0o604, "chmod 0600"),
        ((THIRD,), 0o600, "binds a shared token"),
    ],
)
def test_a_bad_tokens_file_is_told_once_and_changes_nothing(
    lines: tuple[str, ...], mode: int, problem: str, tmp_path: Path
) -> None:
    files = Files(tmp_path)
    before = files.known()
    write(files.shared, *lines, mode=mode)
    for _ in range(3):
        files.access.refresh()
        assert files.known() == before
    (warning,) = files.warnings
    assert problem in warning
    assert not any(token in warning for token in (FIRST, SECOND, THIRD)), "no token in a log"
    with pytest.raises(TokenError, match=problem):
        Files(tmp_path, shared_tokens_file=str(write(tmp_path / "other", *lines, mode=mode)))
    write(files.shared, SECOND)
    files.access.refresh()
    assert files.known()["second"] == SHARED
    assert len(files.warnings) == 1


def test_rights_that_are_put_right_are_noticed(tmp_path: Path) -> None:
    files = Files(tmp_path)
    write(files.shared, SECOND, mode=0o644)
    files.access.refresh()
    assert files.known()["second"] == NOBODY
    files.shared.chmod(0o600)
    assert files.access.refresh(), "its content and time are the same, its rights are not"
    assert files.known()["second"] == SHARED


def test_a_file_that_is_gone_or_a_pipe_keeps_the_last_good_one(tmp_path: Path) -> None:
    files = Files(tmp_path)
    before = files.known()
    for path in (files.shared, files.bound, files.denied):
        path.unlink()
    files.access.refresh()
    os.mkfifo(files.shared, 0o600)  # to open it would wait for a writer
    files.access.refresh()
    assert files.known() == before
    assert len(files.warnings) == 3, "one for each file"


def test_each_file_is_followed_while_another_is_bad(tmp_path: Path) -> None:
    files = Files(tmp_path)
    write(files.bound, "no toml", mode=0o600)
    write(files.shared, SECOND)
    write(files.denied, HOTKEY)
    assert files.access.refresh()
    assert files.known() == {"first": NOBODY, "second": SHARED, "third": BOUND, "environment": NOBODY}
    assert files.access.deny.has_hotkey(HOTKEY)


def test_without_a_file_the_token_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match="BZ_AUTH_TOKEN"):
        Files(tmp_path, shared_tokens_file=None)
    with pytest.raises(TokenError, match="31 characters"):
        Files(tmp_path, shared_tokens_file=None, token="x" * 31)
    with pytest.raises(DenyFileError, match=r"deny\.txt cannot be used: .*'nonsense'"):
        Files(tmp_path, deny_file=write(tmp_path / "deny.txt", HOTKEY, "nonsense"))


def test_the_deny_list() -> None:
    deny = DenyList([HOTKEY, "192.0.2.0/24", "198.51.100.7", "2001:db8:1::/48", "::ffff:203.0.113.0/120", "10.1.2.3/8"])
    assert deny.has_hotkey(None, HOTKEY)
    assert not deny.has_hotkey(None, OTHER)
    for address in ("192.0.2.255", "198.51.100.7", "2001:db8:1:2::3", "203.0.113.9", "10.255.0.1"):
        assert deny.has_address(address), address
    for address in ("192.0.3.0", "198.51.100.8", "2001:db8:2::1", "203.0.114.1", "11.0.0.1", "::1"):
        assert not deny.has_address(address), address
    assert not DenyList().has_address("192.0.2.1")
    with pytest.raises(ValueError, match="nonsense"):
        DenyList(["nonsense"])


def test_a_long_deny_list_costs_nothing() -> None:
    """100,000 networks are looked up by their few lengths of prefix, not one by one."""
    deny = DenyList(f"10.{n >> 8 & 255}.{n & 255}.{n >> 16}" for n in range(100_000))
    begun = time.thread_time()
    for _ in range(1000):
        assert not deny.has_address("192.0.2.1")
    assert time.thread_time() - begun < 0.5


# --- a real node ---


@pytest.fixture(scope="module")
def guarded(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A node in the submit phase that checks proofs, with files of shared tokens and of denied callers; behind a proxy
    on this machine."""
    from tests.api.conftest import beside

    place = beside(node, tmp_path_factory.mktemp("guarded"))
    environment = {
        "BZ_AUTH_SHARED_TOKENS_FILE": write(place / "shared", TOKEN),
        "BZ_AUTH_DENY_FILE": write(place / "denied", mode=0o644),
        "BZ_NODE_HOTKEY": RECEIVER,
        "BZ_HTTP_TRUSTED_PROXIES": '["127.0.0.0/8"]',
    }
    with running_node(place, "--ledger", str(place / "ledger.sqlite"), environment=environment) as running:
        desk = Desk(running)
        desk.go_to(Desk.NOW)
        yield desk


RECEIVER = Key.from_seed(b"\x05" * 32).ss58_address


def code(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json["code"]


def test_shared_tokens_rotate(guarded: Desk) -> None:
    node, file = guarded.node, guarded.node.folder / "shared"

    def taken(token: str) -> bool:
        return node.get("/model", bearer(token)).status == 200

    try:
        write(file, TOKEN, SECOND)
        eventually(lambda: taken(SECOND), "the new token counts")
        assert taken(TOKEN), "beside the old one"
        write(file, SECOND)
        eventually(lambda: not taken(TOKEN), "the old one no longer counts")
        write(file, "short")
        eventually(lambda: "5 characters" in node.log(), "the warning")
        assert taken(SECOND), "what was last good stays in force"
    finally:
        write(file, TOKEN)
        eventually(lambda: taken(TOKEN), "the token of the other tests")
    assert node.log().count("5 characters") == 1
    assert SECOND not in node.log()


def test_denied_callers(guarded: Desk) -> None:
    node, file, denied = guarded.node, guarded.node.folder / "denied", (403, "denied")
    miner = node.headers(0)
    key = new_key()
    behind = {**miner, "X-Forwarded-For": "203.0.113.9"}
    assert node.get("/model/partial", behind).status == 200
    write(file, "# abuse, 12 May", node.hotkey, node.validator.ss58_address, key.ss58_address, "203.0.113.0/24")
    eventually(lambda: code(node.get("/model/full", miner)) == denied, "a claim is refused")
    try:
        assert code(node.get("/model/partial", miner)) == denied
        assert code(node.get("/model/full", node.as_validator())) == denied, "a bound token"
        assert code(node.get("/model", {**bearer(TOKEN), "X-Forwarded-For": "203.0.113.9"})) == denied, "an address"
        proof = sign_request(key, "GET", "/model", RECEIVER)
        assert code(node.get("/model", {**bearer(TOKEN), **proof})) == denied, "a proof"
        assert code(guarded.submit(signed(key, Desk.NOW))) == denied, "whoever signed the body"
        body = signed(new_key(), Desk.NOW)
        assert code(guarded.submit(body, {**bearer(TOKEN), "X-Hotkey": node.hotkey})) == denied
        assert code(guarded.submit(body, {**bearer(TOKEN), "X-Forwarded-For": "203.0.113.9"})) == denied
        assert code(node.get("/scores", miner)) == denied
        other = {**bearer(TOKEN), "X-Forwarded-For": "198.51.100.1"}
        assert node.get("/model", other).status == 200
        write(file, "127.0.0.1")
        eventually(lambda: node.get("/model", other).status == 403, "the address of the connection itself")
        write(file, node.hotkey)
        eventually(lambda: node.get("/model", bearer(TOKEN)).status == 200, "only the hotkey is denied")
        # Checks that come before it in the contract's order come before it.
        assert node.get("/nowhere", miner).status == 404
        assert code(node.get("/model/partial?format=x", miner)) == (400, "invalid_format")
        assert node.get("/model", bearer("x" * 40)).status == 401
        # Everybody else goes on, and so does what needs no token.
        assert node.get("/model", bearer(TOKEN)).status == 200
        assert node.get("/health", {"X-Forwarded-For": "203.0.113.9"}).status == 200
        write(file, "nonsense")
        eventually(lambda: "deny file" in node.log(), "the warning")
        assert code(node.get("/model/partial", miner)) == denied, "what was last good stays in force"
    finally:
        write(file)
        eventually(lambda: node.get("/model/partial", miner).status == 200, "nobody is denied")
    assert guarded.submit(body).status == 202, "what was refused has left no trace"


def test_a_refused_request_uses_no_proof_up(guarded: Desk) -> None:
    node, key = guarded.node, new_key()

    def ask(target: str, proof: dict[str, str], **more: str) -> Answer:
        return node.get(target, {**bearer(TOKEN), **proof, **{name.replace("_", "-"): v for name, v in more.items()}})

    for target, wrong, status in (
        ("/model/shared", {"X_Hotkey": OTHER}, 403),
        ("/model/partial", {"X_Hotkey": key.ss58_address, "X_Expert_Group": "x"}, 400),
        ("/model/partial", {"X_Hotkey": key.ss58_address, "X_Expert_Group": "77"}, 404),
    ):
        proof = sign_request(key, "GET", target, RECEIVER)
        for _ in range(2):
            assert ask(target, proof, **wrong).status == status
        right = {"X_Hotkey": key.ss58_address, "X_Expert_Group": "0"}
        assert ask(target, proof, **right).status == 200, f"nothing was spent by {status}"
        assert code(ask(target, proof, **right)) == (401, "invalid_proof"), "now it is"
    target = "/submissions/550e8400-e29b-41d4-a716-446655440000"
    proof = sign_request(key, "GET", target, RECEIVER)
    assert [ask(target, proof).status for _ in range(2)] == [404, 404], "handlers that wait, too"
    proof = sign_request(key, "GET", "/model", RECEIVER)
    assert [ask("/model", proof).status for _ in range(2)] == [200, 401]


def test_the_index_names_the_node_and_says_what_is_signed(guarded: Desk, tmp_path: Path) -> None:
    index = guarded.node.get("/model", bearer(TOKEN)).json
    assert index["validator_hotkey"] == RECEIVER
    assert [version["signed"] for version in index["versions"]] == [False]
    specs = build.fused(experts=8)
    build.write_checkpoint(tmp_path / "model", specs, build.contents(specs))
    publish(tmp_path / "model", tmp_path / "store", block=1, version="signed", groups=4, signer=new_key())
    with running_node(tmp_path) as node:
        (version,) = node.get("/model", bearer(TOKEN)).json["versions"]
        assert version["signed"] is True


def test_a_reload_takes_the_tokens_of_the_new_settings(place: Path) -> None:
    """SIGHUP: a token or a file that can be used is in force; one that cannot leaves the old ones, and says so."""
    config = place / "bzstream.toml"
    config.write_text(f'[auth]\nshared_tokens_file = "{write(place / "shared", FIRST)}"\n')
    with running_node(place, "--ledger", str(place / "ledger.sqlite"), "--config", str(config)) as node:
        assert node.get("/model", bearer(TOKEN)).status == 401, "replaced by the file"
        assert node.get("/model", bearer(FIRST)).status == 200
        config.write_text(f'[auth]\nshared_tokens_file = "{write(place / "other", SECOND)}"\n')
        node.process.send_signal(signal.SIGHUP)
        eventually(lambda: node.get("/model", bearer(SECOND)).status == 200, "the file of the new settings")
        assert node.get("/model", bearer(FIRST)).status == 401
        config.write_text(f'[auth]\nshared_tokens_file = "{place / "missing"}"\n[log]\nlevel = "debug"\n')
        node.process.send_signal(signal.SIGHUP)
        eventually(lambda: "those before stay in force" in node.log(), "the warning")
        assert node.get("/model", bearer(SECOND)).status == 200
        config.write_text("")
        node.process.send_signal(signal.SIGHUP)
        eventually(lambda: node.get("/model", bearer(TOKEN)).status == 200, "the token of the environment")
        assert node.get("/model", bearer(SECOND)).status == 401
