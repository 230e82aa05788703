"""URLs as what they name: one reading for deduplication and for block lists."""

import dataclasses
import functools
import re
import string

HOST_CHARACTERS = 253  # the most that a name may have (RFC 1035)
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*:)?//")
_PLAIN_HOST = re.compile(rf"[a-z0-9][a-z0-9.-]{{,{HOST_CHARACTERS - 2}}}[a-z0-9]")
_ESCAPE = re.compile(r"%([0-9a-fA-F]{2})")
_NOT_ESCAPED = re.compile(r"[^\x21-\x7e]")
_UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")  # an escape of these says the same (RFC 3986, section 6.2.2.2)
_DEFAULT_PORTS = {"http:": "80", "https:": "443", "ftp:": "21"}
_PORTS = frozenset(_DEFAULT_PORTS.values())


@dataclasses.dataclass(frozen=True)
class WebAddress:
    """The parts of a URL, without its scheme and user. `port` is empty where it is the scheme's own; `path` begins with a slash; `query` and
    `fragment` have no mark before them."""

    host: str
    port: str
    path: str
    query: str
    fragment: str

    @classmethod
    def parse(cls, url: str) -> "WebAddress":
        """Reads a URL, or the line of a list, with or without its scheme. Never fails."""
        scheme, authority, rest = _split(url)
        authority = authority.rpartition("@")[2]
        host, port = authority, ""
        if authority.startswith("["):
            host, _, port = authority[1:].partition("]")
            port = port.removeprefix(":")
        elif authority.count(":") == 1:  # more of them are an IPv6 address
            host, _, port = authority.partition(":")
        if port in _PORTS and _DEFAULT_PORTS.get(scheme, port) == port:
            port = ""
        rest, _, fragment = rest.partition("#")
        path, _, query = rest.partition("?")
        return cls(_host(host), port, _without_dots(_escape(path)), _escape(query), fragment)

    @property
    def page(self) -> str:
        """Returns what tells pages, and parts of them that have a name, apart."""
        port, query, fragment = (mark + part if part else "" for mark, part in ((":", self.port), ("?", self.query), ("#", self.fragment)))
        return f"{self.host}{port}{self.path}{query}{fragment}"


def host_of(url: str) -> str:
    """Returns the host of a URL or of a line of a list: lower case, international names as in DNS, an address without brackets; "" for none."""
    return url if _PLAIN_HOST.fullmatch(url) else WebAddress.parse(url).host  # nearly every line of a list of domains is plain


def normalise(url: str) -> str:
    """Returns a text that is the same for URLs that name the same; of what has no host, as it is written."""
    address = WebAddress.parse(url) if _SCHEME.match(url.strip()) else None
    return address.page if address and address.host else url.strip()


def without_fragment(url: str) -> str:
    """Returns the URL of a crawled page, whose fragment names a place in it, but for one that names the page itself ("#!")."""
    page, mark, fragment = url.partition("#")
    return url if fragment.startswith("!") else page


def _split(url: str) -> tuple[str, str, str]:
    """Returns the scheme with its colon, the authority, and the rest from the path on."""
    url = url.strip().replace("\t", "").replace("\n", "").replace("\r", "")
    scheme = _SCHEME.match(url)
    rest = url[scheme.end() :] if scheme else url
    end = min((place for place in map(rest.find, "/?#\\") if place >= 0), default=len(rest))
    return (scheme[1] or "").lower() if scheme else "", rest[:end], rest[end:].replace("\\", "/") if rest[end : end + 1] == "\\" else rest[end:]


@functools.lru_cache(maxsize=2**14)
def _host(host: str) -> str:
    host = _ESCAPE.sub(lambda escape: chr(int(escape[1], 16)) if escape[1] < "8" else escape[0], host).strip(".").lower()
    if len(host) > HOST_CHARACTERS:
        return ""
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii").strip(".")
        except UnicodeError:
            pass  # no name that DNS knows: compared as it is written
    return host


def _escape(part: str) -> str:
    """Writes each character in one way: an escape of what needs none is undone, of what needs one is made, in capitals."""
    if "%" in part:
        part = _ESCAPE.sub(lambda escape: character if (character := chr(int(escape[1], 16))) in _UNRESERVED else escape[0].upper(), part)
    return _NOT_ESCAPED.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass")), part)


def _without_dots(path: str) -> str:
    """Resolves "." and ".." (RFC 3986, section 5.2.4); an empty path is that of the root."""
    if "/." not in path:
        return path or "/"
    parts: list[str] = []
    *directories, last = path.split("/")[1:]
    for part in directories:
        if part == "..":
            del parts[-1:]
        elif part != ".":
            parts.append(part)
    if last == "..":
        del parts[-1:]
    return "/".join(["", *parts, "" if last in (".", "..") else last])
