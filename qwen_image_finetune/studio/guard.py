"""Who may ask: the right host, the right page, and, where others can reach the studio, the right token.

A page that a person has open elsewhere can send requests to this machine as well. It cannot choose the headers that are
looked at here: Host (a name of the attacker's that points to this machine, DNS rebinding), Origin and Sec-Fetch-Site.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "qif_studio"
SAFE = ("GET", "HEAD")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """Stands before the application; refuses what does not come from the studio's own page."""

    def __init__(self, app: ASGIApp, host: str | None = None, token: str | None = None) -> None:
        """
        Args:
            host: address that others reach the studio at; None: this machine alone.
            token: what they have to show then.
        """
        self.app, self.host, self.token = app, host, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            refused = self.refuse(scope)
            await (refused or self.app)(scope, receive, _with_headers(send))
        else:
            raise AssertionError(f"no {scope['type']} here")

    def refuse(self, scope: Scope) -> Response | None:
        """The answer to a request that goes no further; None where it does."""
        headers, method = Headers(scope=scope), scope["method"]
        host = headers.get("host", "")
        if not self.is_ours(host):
            return PlainTextResponse(f"This studio is not called {_printable(host)}.", 421)
        site, mode = headers.get("sec-fetch-site", "same-origin"), headers.get("sec-fetch-mode", "")
        if method in SAFE:
            if site == "cross-site" and mode != "navigate":
                return PlainTextResponse("Pages of other sites get nothing from here.", 403)
        elif method != "POST":
            return PlainTextResponse("Only GET and POST.", 405)
        elif headers.get("origin") not in (f"http://{host}", f"https://{host}") or site != "same-origin":
            return PlainTextResponse("Only the studio's own page may change anything.", 403)
        return None if self.token is None else self._ask_token(scope, headers, self.token)

    def is_ours(self, host: str) -> bool:
        """Whether a Host header names this studio. The port may be another one: it may have been forwarded."""
        name, _, port = host.lower().rpartition(":") if not host.endswith("]") else (host.lower(), "", "")
        name = name or port
        if name in LOOPBACK:
            return True
        if self.host is None:
            return False
        if name in (self.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()):
            return True
        try:  # a number cannot be rebound
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def _ask_token(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        given = dict(query).get("token")
        if scope["method"] == "GET" and given is not None and secrets.compare_digest(given.encode(), token.encode()):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            answer = RedirectResponse(scope["path"] + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", max_age=30 * 24 * 3600)
            return answer
        shown = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        if secrets.compare_digest(shown.encode(), token.encode()):
            return None
        return PlainTextResponse("Open the link that `qif studio` has printed: it holds the key.", 401)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.setdefault("content-security-policy", POLICY)
            headers.setdefault("cache-control", "no-store")
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return sending


def _printable(text: str) -> str:
    return "".join(letter for letter in text[:100] if letter.isprintable())
