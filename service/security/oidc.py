"""Bearer tokens of an OpenID Connect issuer, accepted beside API keys.

A token is a signed JWT. Its signature must be by a key that the issuer publishes now, its issuer
and audience ours, and it must not have expired; who it is for and what it permits are its claims.

References:
    OpenID Connect Discovery 1.0, sections 3 and 4; RFC 7519 (JWT); RFC 8725 (good practice:
    algorithms from a list, never from the token); RFC 6749, section 3.3 (scopes).

Design: docs/design/jobs.md
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import httpx

from bitquota.errors import Forbidden, InvalidInput, MissingDependency, Unauthorized, Unavailable
from bitquota.service.security.keys import Caller, Scope, check_tenant

if TYPE_CHECKING:
    from jwt import PyJWKClient

    from bitquota.canonical import JsonObject
    from bitquota.service.settings import Settings

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
"""Signatures by public keys alone."""

SCOPES = {f"bitquota:{scope}": scope for scope in Scope}
"""What a token's ``scope`` names, and what that permits."""

_LEEWAY_S = 30.0
"""By which clocks may differ."""
_TIMEOUT_S = 5.0
_KEYS_S = 300.0
"""How long published keys are trusted; an unknown key is looked up at once."""


class TokenVerifier:
    """Says who holds a token.

    Args:
        settings: With an issuer, its audience, and the claim that names the tenant.

    Raises:
        InvalidInput: Not all of these are given.
        MissingDependency: The extra ``oidc`` is not installed.
    """

    def __init__(self, settings: Settings) -> None:
        if not settings.oidc_audience:
            msg = (
                "tokens of BITQUOTA_OIDC_ISSUER must name an audience, or tokens for any other "
                "program would be accepted: set BITQUOTA_OIDC_AUDIENCE"
            )
            raise InvalidInput(msg, setting="oidc_audience")
        try:
            import jwt  # noqa: F401  # only whether it is there
        except ImportError as err:
            msg = "tokens need the package PyJWT; install it with: pip install 'bitquota[oidc]'"
            raise MissingDependency(msg, extra="oidc") from err
        self._settings = settings
        self._lock = threading.Lock()
        self._published: PyJWKClient | None = None

    def verify(self, text: str) -> Caller:
        """Return who holds the token ``text``.

        Raises:
            Unauthorized: It is no valid token. Why is not said.
            Forbidden: It is valid, but names no tenant or no scope of ours.
            Unavailable: The issuer's keys cannot be had.
        """
        import jwt

        settings = self._settings
        try:
            key = self._keys().get_signing_key_from_jwt(text).key
            claims: JsonObject = jwt.decode(
                text,
                key,
                algorithms=list(ALGORITHMS),
                audience=settings.oidc_audience,
                issuer=settings.oidc_issuer,
                leeway=_LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWKClientConnectionError as err:
            raise self._unavailable(err) from err
        except jwt.PyJWTError as err:
            msg = "a valid API key or token must be sent as 'Authorization: Bearer …'; it is not"
            raise Unauthorized(msg) from err
        return self._caller(claims)

    def _caller(self, claims: JsonObject) -> Caller:
        claim = self._settings.oidc_tenant_claim
        tenant = claims.get(claim)
        try:
            check_tenant(str(tenant))
        except InvalidInput as err:
            msg = f"the token's claim '{claim}' must name a tenant; it has {tenant!r}: {err}"
            raise Forbidden(msg, claim=claim) from err
        named = str(claims.get("scope", "")).split()
        scopes = frozenset(SCOPES[name] for name in named if name in SCOPES)
        if not scopes:
            msg = f"the token's scope must name one of {', '.join(SCOPES)}; it has {named}"
            raise Forbidden(msg)
        return Caller(tenant=str(tenant), actor=f"oidc:{claims['sub']}", scopes=scopes)

    def _keys(self) -> PyJWKClient:
        """Return the issuer's published keys, found where its discovery document says."""
        import jwt

        with self._lock:
            if self._published is None:
                try:
                    address = _jwks_uri(self._settings.oidc_issuer)
                except (httpx.HTTPError, ValueError) as err:
                    raise self._unavailable(err) from err
                self._published = jwt.PyJWKClient(address, lifespan=_KEYS_S, timeout=_TIMEOUT_S)
            return self._published

    def _unavailable(self, err: Exception) -> Unavailable:
        msg = (
            f"tokens need the published keys of '{self._settings.oidc_issuer}', which cannot be "
            f"had now ({err}): try again, or send an API key"
        )
        return Unavailable(msg)


def _jwks_uri(issuer: str) -> str:
    """Return where an issuer publishes its keys; raises ``ValueError`` for a wrong document."""
    place = f"{issuer.rstrip('/')}/.well-known/openid-configuration"
    told = httpx.get(place, timeout=_TIMEOUT_S).raise_for_status().json()
    if not isinstance(told, dict) or told.get("issuer") != issuer:
        msg = f"{place} does not call itself '{issuer}'"
        raise ValueError(msg)
    address = str(told.get("jwks_uri"))
    if not address.startswith(("https://", "http://")):  # urllib would open files too
        msg = f"{place} names no address of keys"
        raise ValueError(msg)
    return address


def token_verifier(settings: Settings) -> TokenVerifier | None:
    """Return what verifies tokens, or ``None`` where no issuer is set."""
    return TokenVerifier(settings) if settings.oidc_issuer else None
