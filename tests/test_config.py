"""Settings: where they come from, which place wins, and what a bad one says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from bzstream.config import ConfigError, Settings, load


def test_later_places_win(tmp_path: Path) -> None:
    file = tmp_path / "bzstream.toml"
    file.write_text('[http]\nport = 1\nworkers = 2\nhost = "::1"\n[auth]\ntrust_claimed_hotkey = true\n')
    environment = {"BZ_HTTP_PORT": "3", "BZ_HTTP_WORKERS": "4", "PATH": "/bin"}
    settings = load(file=file, environment=environment, flags={"http.port": 5, "http.backlog": None})
    assert (settings.http.port, settings.http.workers, settings.http.host) == (5, 4, "::1")
    assert settings.auth.trust_claimed_hotkey
    assert settings.http.backlog == Settings().http.backlog, "a flag that was not given changes nothing"


def test_the_contract_names_of_secrets() -> None:
    environment = {"BZ_AUTH_TOKEN": "t", "BZ_TOKENS_FILE": "f", "BZ_LEDGER": "postgresql://u:p@h/d"}
    settings = load(environment=environment)
    assert (settings.auth.token, settings.auth.tokens_file, settings.ledger.url) == tuple(environment.values())


def test_lists_are_json_in_the_environment() -> None:
    settings = load(environment={"BZ_HTTP_TRUSTED_PROXIES": '["10.0.0.0/8"]', "BZ_LOG_JSON": "true"})
    assert settings.http.trusted_proxies == ("10.0.0.0/8",)
    assert settings.log.json


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"BZ_HTTP_PORT": "many"}, ("http.port", "BZ_HTTP_PORT", "'many'")),
        ({"BZ_HTTP_PORT": "99999"}, ("http.port", "65535")),
        ({"BZ_HTTP_PROT": "80"}, ("http.prot", "BZ_HTTP_PROT", "port")),
        ({"BZ_HTPP_PORT": "80"}, ("htpp", "BZ_HTPP_PORT", "http")),
        ({"BZ_HTTP_TRUSTED_PROXIES": "10.0.0.0/8"}, ("http.trusted_proxies",)),
        ({"BZ_SUBMIT_SIGNATURE_SCHEMES": '["rsa"]'}, ("submit.signature_schemes", "rsa")),
    ],
)
def test_a_bad_setting_explains_itself(environment: dict[str, str], says: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environment=environment)
    for part in says:
        assert part in str(caught.value)


def test_variables_of_others_are_left_alone() -> None:
    kubernetes = {"BZ_SERVICE_HOST": "10.0.0.1", "BZ_PORT": "tcp://10.0.0.1:80", "BZ_PORT_80_TCP_ADDR": "10.0.0.1"}
    assert load(environment={**kubernetes, "BZ_URL": "https://x", "BZ_": "", "BZ_TEST_LONG": "1"}) == Settings()


def test_a_bad_file_explains_itself(tmp_path: Path) -> None:
    file = tmp_path / "bzstream.toml"
    for text, says in (("port = 80", "no table"), ("[http", "not valid TOML"), ("[http]\nport = true", "http.port")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            load(file=file)


def test_a_secret_is_never_quoted() -> None:
    secret = "postgresql://user:hunter2@host/db"
    with pytest.raises(ConfigError) as caught:
        load(flags={"ledger.url": [secret]})
    assert "hunter2" not in str(caught.value)
