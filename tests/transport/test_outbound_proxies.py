"""Which proxy leads to which URL: the setting, the environment, and what needs none."""

from __future__ import annotations

import pytest

from trading_push import ConfigurationError
from trading_push.transport.outbound_proxies import OutboundProxies, Proxy

ENVIRONMENT = {
    "HTTPS_PROXY": "http://secure.test:3128",
    "http_proxy": "plain.test:8080",
    "HTTP_PROXY": "http://capitals.test",
    "ALL_PROXY": "socks5://all.test",
}


@pytest.mark.parametrize(
    ("environment", "url", "found"),
    [
        (ENVIRONMENT, "https://host/x", "http://secure.test:3128"),
        (ENVIRONMENT, "wss://host/x", "http://secure.test:3128"),
        (ENVIRONMENT, "http://host/x", "http://plain.test:8080"),
        (ENVIRONMENT, "ws://host", "http://plain.test:8080"),
        ({"ALL_PROXY": "socks5://all.test"}, "wss://host", "socks5://all.test:1080"),
        ({"all_proxy": "socks5h://[2001:db8::1]"}, "http://h", "socks5h://[2001:db8::1]:1080"),
        ({"HTTPS_PROXY": "http://x.test"}, "http://host", None),
        ({"HTTPS_PROXY": "", "ALL_PROXY": "https://a.test"}, "https://host", "https://a.test:443"),
        # A request to a CGI script must not choose the proxy.
        ({"HTTP_PROXY": "http://evil.test", "REQUEST_METHOD": "GET"}, "http://host", None),
        ({}, "https://host", None),
    ],
)
def test_by_the_environment(environment: dict[str, str], url: str, found: str | None) -> None:
    proxy = OutboundProxies(environment=environment).of(url)
    assert (None if proxy is None else proxy.url) == found


def test_the_setting_counts_before_the_environment() -> None:
    proxies = OutboundProxies("socks5://mine.test:9", environment=ENVIRONMENT)
    for scheme in ("http", "https", "ws", "wss"):
        assert proxies.of(f"{scheme}://host") == Proxy("socks5", "mine.test", 9)


@pytest.mark.parametrize(
    ("no_proxy", "direct", "not_direct"),
    [
        ("*", ["anything.test", "10.1.2.3", "[2001:db8::5]"], []),
        ("example.com", ["example.com", "a.example.com", "EXAMPLE.com."], ["badexample.com"]),
        (".example.com", ["example.com", "a.b.example.com"], ["example.com.test"]),
        ("*.example.com", ["a.example.com"], ["example.org"]),
        ("10.0.0.0/8, 192.168.1.5", ["10.200.0.1", "192.168.1.5"], ["11.0.0.1", "192.168.1.6"]),
        ("2001:db8::/32", ["[2001:db8::5]"], ["[2001:db9::5]"]),
        ("[2001:db8::5]:443", ["[2001:db8::5]"], ["[2001:db8::5]:444", "[2001:db8::6]"]),
        ("example.com:8443", ["example.com:8443"], ["example.com", "example.com:443"]),
        ("10.0.0.1:443", ["10.0.0.1"], ["10.0.0.1:80"]),
        (" , ,x.test;", [], ["x.test", "10.0.0.1"]),
        ("10.0.0.0/99 nonsense/8", [], ["10.0.0.1"]),
    ],
)
@pytest.mark.parametrize("place", ["setting", "NO_PROXY", "no_proxy"])
def test_what_needs_no_proxy(
    no_proxy: str, direct: list[str], not_direct: list[str], place: str
) -> None:
    if place == "setting":
        proxies = OutboundProxies("http://p.test", no_proxy, environment={})
    else:
        proxies = OutboundProxies("http://p.test", environment={place: no_proxy})
    assert [host for host in direct if proxies.of(f"https://{host}/x")] == []
    assert [host for host in not_direct if not proxies.of(f"https://{host}/x")] == []


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "[::1]"])
def test_this_machine_never_needs_one(host: str) -> None:
    assert OutboundProxies("http://p.test", environment=ENVIRONMENT).of(f"http://{host}:8/") is None


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://s3cret@host", "socks4://s3cret@host", "http://s3cret@", "http://s3cret@h:0", ""),
        *(
            "http://s3cret@h:99999",
            "http://s3cret@h:x",
            "http://s3cret@h/path",
            "http://s3cret@h?q",
        ),
        *("http://s3cret@höst", "http://s3cret@h o", "http://s3cret@[::1", "http:s3cret"),
    ],
)
def test_what_is_no_proxy(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^proxy\.url is not usable: give one") as caught:
        OutboundProxies(url)
    assert "s3cret" not in str(caught.value)
    if url:
        with pytest.raises(ConfigurationError, match=r"^HTTPS_PROXY is not usable") as caught:
            OutboundProxies(environment={"HTTPS_PROXY": url})
        assert "s3cret" not in str(caught.value)


def test_a_password_is_kept_and_not_shown() -> None:
    proxy = Proxy.of("http://us%20er:pa%3Ass%40@host:3128")
    assert (proxy.username, proxy.password) == ("us er", "pa:ss@")
    assert proxy.whole_url == "http://us%20er:pa%3Ass%40@host:3128"
    assert "pa" not in repr(proxy) + proxy.url
