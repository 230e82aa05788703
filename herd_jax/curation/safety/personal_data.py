"""Finds personal data in text: e-mail and IP addresses, account, card, identity and phone numbers.

A number counts where its form and, where there is one, its checksum say so. Addresses that are nobody's do not: private and documentation
networks, example.com. Time is linear in the text: repetitions are bounded or possessive, and the patterns of numbers are tried only within
the runs of digits that one quick scan finds.
"""

import ipaddress
import re
from collections.abc import Callable

KINDS = ("email", "ip", "iban", "card", "national_id", "phone")  # of two that overlap the earlier kind counts
CODE_KINDS = ("email", "ip")  # in source code a number is a number
_CONTEXT = 32  # characters before a number where a word may say what it is
_LONGEST = 128  # a longer run of digit groups is a table of numbers

Span = tuple[int, int]  # start and end in characters


def find(text: str, kinds: tuple[str, ...] = KINDS) -> list[tuple[int, int, str]]:
    """Returns (start, end, kind) of the personal data in `text`, in order and without overlaps."""
    candidates = []
    for kind, hints, pattern, check in _TEXT_RULES:
        if kind in kinds and any(hint in text for hint in hints):
            candidates += [(*span, KINDS.index(kind)) for span in map(check, pattern.finditer(text)) if span]
    run_rules = [rule for rule in _RUN_RULES if rule[0] in kinds]
    for run in _RUNS.finditer(text):
        if run.end() - run.start() <= _LONGEST:
            # From the letters that an identity number begins with to two characters after, for what must not follow.
            start, end = max(0, run.start() - 6), run.end() + 2
            for kind, pattern, check in run_rules:
                candidates += [(*span, KINDS.index(kind)) for span in map(check, pattern.finditer(text, start, end)) if span]
    found: list[tuple[int, int, int]] = []
    for candidate in sorted(candidates):
        if not found or found[-1][1] <= candidate[0]:
            found.append(candidate)
        elif candidate[2] < found[-1][2]:
            found[-1] = candidate
    return [(start, end, KINDS[kind]) for start, end, kind in found]


def _email(match: re.Match) -> Span | None:
    before, follows = match.string[max(0, match.start() - 66) : match.start()][::-1], match.string[match.end() : match.end() + 1]
    is_plain = match[0][0] in _PLAIN_AT
    gap = 0 if is_plain else len(before) - len(before.lstrip(_SPACES))  # only who writes "(at)" writes spaces
    first = before[gap : gap + 1]
    local = (_LOCAL_REVERSED if first.isascii() else _ANY_LOCAL_REVERSED).match(before, gap)
    name, top = match[1].lower(), match[2].lower()
    if not local or top in _FILE_TYPES or top in _RESERVED_NAMES or f".{name}".endswith(".example."):
        return None
    if is_plain and (top in _ATTRIBUTES or follows in ("(", "[")):  # a product of matrices
        return None
    return match.start() - local.end(), match.end()


def _ipv4(match: re.Match) -> Span | None:
    parts = [int(part) for part in match[0].split(".")]
    # Four small parts are a version or a section (one address in 4096 has them); no host has a last part of 0.
    if max(parts) > 255 or max(parts) < 32 or parts[-1] == 0 or _preceded(match, _VERSION_BEFORE):
        return None
    return _ip(match)


def _ip(match: re.Match) -> Span | None:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return None
    is_host = not match[0].endswith("::")  # which ends the name of a network
    return match.span() if is_host and address.is_global and not address.is_multicast else None


def _iban(match: re.Match) -> Span | None:
    """Returns the first characters of the match, as many as the country's numbers have, if their remainder by 97 is 1 (ISO 13616)."""
    places = [place for place, char in enumerate(match[0], start=match.start()) if char.isalnum()][: _IBAN_LENGTHS.get(match[0][:2])]
    end = places[-1] + 1
    number = "".join(match.string[place] for place in places)
    if len(number) != _IBAN_LENGTHS.get(number[:2]) or match.string[end : end + 1].isalnum():
        return None
    return (match.start(), end) if int("".join(str(int(char, 36)) for char in number[4:] + number[:4])) % 97 == 1 else None


def _card(match: re.Match) -> Span | None:
    digits = _digits(match[0])
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    is_valid = _CARD_ISSUERS.fullmatch(digits) and (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0  # Luhn, ISO/IEC 7812
    return match.span() if is_valid else None


def _social_security_number(match: re.Match) -> Span | None:
    return match.span()  # United States: no check digit, but a form of its own


def _cpf(match: re.Match) -> Span | None:
    """Checks a number of Brazil: two check digits by 11."""
    digits = [int(digit) for digit in _digits(match[0])]
    checks = [sum(weight * digit for weight, digit in zip(range(n + 1, 1, -1), digits)) * 10 % 11 % 10 for n in (9, 10)]
    return match.span() if digits[9:] == checks and len(set(digits)) > 1 else None


def _steuer_id(match: re.Match) -> Span | None:
    """Checks a tax number of Germany: ISO 7064 MOD 11,10, and of the first ten digits one comes twice or thrice and the others once."""
    digits = _digits(match[0])
    product = 10
    for digit in digits[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return match.span() if (11 - product) % 10 == int(digits[10]) and len(set(digits[:10])) in (8, 9) else None


def _lettered_id(match: re.Match) -> Span | None:
    """Checks the numbers of France (key by 97), Spain (letter by 23), United Kingdom (form only), Italy (letter by 26)."""
    compact = re.sub(r"[^0-9A-Z]", "", match[0])
    is_valid = True
    if match.lastgroup == "nir":
        number = compact[:13].replace("2A", "19").replace("2B", "18") if compact[5:7] in ("2A", "2B") else compact[:13]
        is_valid = 97 - int(number) % 97 == int(compact[13:])
    elif match.lastgroup == "dni":
        number = compact[:-1].translate(str.maketrans("XYZ", "012"))
        is_valid = "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == compact[-1]
    elif match.lastgroup == "codice_fiscale":
        odd = sum(_FISCALE_ODD[char] for char in compact[:15:2])
        even = sum(int(char) if char.isdigit() else ord(char) - ord("A") for char in compact[1:15:2])
        is_valid = (odd + even) % 26 == ord(compact[15]) - ord("A")
    return match.span() if is_valid else None


def _phone(match: re.Match) -> Span | None:
    # E.164 has 15 digits at most, a national number fewer; 0012345678 may be anything.
    least, most = (8, 15) if match[0].startswith(("+", "00")) else (9, 11)
    digits = _digits(match[0])
    is_phone = least <= len(digits) <= most and not match[0].isdigit() and not _is_other_number(match)
    if match[0].startswith(("+1", "001")) and (digits.removeprefix("00")[1:2] not in "23456789" or len(digits.removeprefix("00")) != 11):
        return None  # North America's: ten digits behind the 1, of which the first is none of these
    return match.span() if is_phone and not _preceded(match, _REFERENCE_BEFORE) and not _is_row_of_numbers(match) else None


def _announced_phone(match: re.Match) -> Span | None:
    is_phone = 6 <= len(_digits(match[0])) <= 15 and not _is_other_number(match) and _preceded(match, _PHONE_BEFORE)
    return match.span() if is_phone and not _COUNTED.match(match.string, match.end()) else None


def _is_row_of_numbers(match: re.Match) -> bool:
    """Returns whether the groups of two digits are a part of more of them, or count up: a row of a calendar or a table."""
    groups = re.findall(r"[0-9]+", match[0])
    if any(len(group) != 2 for group in groups):
        return False
    counts_up = {int(later) - int(earlier) for earlier, later in zip(groups, groups[1:])} == {1}
    return counts_up or bool(_MORE_GROUPS.match(match.string, match.end()))


def _is_other_number(match: re.Match) -> bool:
    return bool(_DATE.match(match[0]) or _ZIP_CODE_OR_DECIMAL.fullmatch(match[0]) or _IPV4.fullmatch(match[0]))


def _digits(text: str) -> str:
    return re.sub(r"[^0-9]", "", text)


def _preceded(match: re.Match, words: re.Pattern) -> bool:
    return bool(words.search(match.string[max(0, match.start() - _CONTEXT) : match.start()]))


_SPACE = r"[ \u00a0\u2009\u202f]"
_GAP = r"[ \u00a0\u2009\u202f\-\u2010-\u2013]"
_DOT_OR_GAP = r"[ \u00a0\u2009\u202f\-\u2010-\u2013.]"
_ALONE = r"(?<![\w.,/=#$€£+-])"
_ENDS = r"(?![\w$€£%-]|[.,/][0-9])"

# Digits in groups, with the capitals that account and identity numbers have among them.
_RUNS = re.compile(r"[0-9](?:[ \u00a0\u2009\u202f\-\u2010-\u2013./()]{0,3}+(?:[0-9]|[A-Z]{1,4}+(?![A-Za-z]))){4,}+")

_LETTER = "A-Za-z0-9À-ÖØ-öø-ž"
_SPACES = " \u00a0\u2009\u202f"
_PLAIN_AT = "@＠﹫"
_DOT = rf"(?:[.．]|{_SPACE}?[(\[](?:dot|DOT)[)\]]{_SPACE}?)"
_AT_SIGNS = (*_PLAIN_AT, "(at)", "[at]", "(AT)", "[AT]")
_AT_DOMAIN = re.compile(
    rf"[{_PLAIN_AT}(\[](?:(?<=[{_PLAIN_AT}])|(?:at|AT)[)\]]{_SPACE}?)((?:[^\W_](?:[^\W_]|-){{0,62}}{_DOT}){{1,8}})"
    rf"((?:xn--[A-Za-z0-9-]{{2,59}}|[A-Za-z]{{2,24}})(?![{_LETTER}_@])|[^\W\d_A-Za-z]{{2,24}}(?![\w@]))"
)
_LOCAL_REVERSED = re.compile(rf"[{_LETTER}_](?:[{_LETTER}._%+'-]{{0,62}}[{_LETTER}_])?")
_ANY_LOCAL_REVERSED = re.compile(r"\w(?:[\w.%+'-]{0,62}\w)?")
_ATTRIBUTES = frozenset(  # of arrays: x@w.T is none with two letters, x@w.grad is
    "shape dtype conj real imag size ndim grad values index copy mean sum dot todense toarray numpy item flat flatten ravel transpose astype".split()
)
_FILE_TYPES = frozenset("png jpg jpeg gif svg webp bmp ico css js htm html json xml".split())  # logo@2x.png
_RESERVED_NAMES = frozenset("example test invalid localhost local".split())  # RFC 2606, RFC 6762

_IPV4 = re.compile(r"(?<![\w.-])[1-9][0-9]{0,2}(?:\.(?:0|[1-9][0-9]{0,2})){3}(?![\w-]|\.[0-9])")
_IPV6 = re.compile(r"[23](?<![\w:.].)[0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}+(?![\w:])")
_VERSION_BEFORE = re.compile(
    r"(?:\b(?:v|ver|vers\w*|rel\w*|rev\w*|kernel|linux|driver|python|java|node|php|openssl|chrome|firefox|windows|android|ios|macos|ubuntu|debian"
    r"|patch|update|upgrade|package|pkg|build|firmware|oid|\w*identifier|sec\w*|se[çz]\w*|abschnitt|chap\w*|cap\w*|kapitel|fig\w*|abb\w*"
    r"|tab\w*|clause|rule)[.:]?|§)[\s:=(\"']*$|\w/$",
    re.IGNORECASE,
)

_IBAN = re.compile(rf"[A-Z](?<!\w.)[A-Z][0-9]{{2}}(?:{_SPACE}?[A-Z0-9]){{11,30}}+")
_IBAN_LENGTHS = {
    entry[:2]: int(entry[2:])
    for entry in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 FO18 FR27 GB22 GE22 "
        "GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 "
        "MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SD18 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 "
        "XK20"
    ).split()
}

_CARD = re.compile(
    rf"{_ALONE}(?:[0-9]{{12,19}}|[0-9]{{4}}({_DOT_OR_GAP})[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{2,4}}(?:\1[0-9]{{3}})?"
    rf"|[0-9]{{4}}({_GAP})[0-9]{{6}}\2[0-9]{{4,5}}){_ENDS}"
)
_CARD_ISSUERS = re.compile(  # Visa, Mastercard, American Express, Discover, Diners Club, JCB, UnionPay, Maestro
    r"4(?:\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|(?:6011|64[4-9]\d|65\d\d)\d{12}"
    r"|(?:30[0-5]|36\d|3[89]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14}|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{8,15}"
)

_SOCIAL_SECURITY = re.compile(rf"{_ALONE}(?!000|666|9)[0-9]{{3}}-(?!00)[0-9]{{2}}-(?!0000)[0-9]{{4}}{_ENDS}")
_CPF = re.compile(rf"{_ALONE}[0-9]{{3}}\.[0-9]{{3}}\.[0-9]{{3}}-[0-9]{{2}}{_ENDS}")
_STEUER_ID = re.compile(rf"{_ALONE}[1-9][0-9](?:[0-9]{{9}}|({_SPACE})[0-9]{{3}}\1[0-9]{{3}}\1[0-9]{{3}}){_ENDS}")
_LETTERED_IDS = re.compile(
    rf"{_ALONE}(?:"
    rf"(?P<nir>[12]{_SPACE}?[0-9]{{2}}{_SPACE}?(?:0[1-9]|1[0-2]|[2-9][0-9]){_SPACE}?(?:[0-9]{{2}}|2[AB])"
    rf"{_SPACE}?[0-9]{{3}}{_SPACE}?[0-9]{{3}}{_SPACE}?[0-9]{{2}})"
    r"|(?P<dni>(?:[0-9]{8}|[XYZ]-?[0-9]{7})-?[A-HJ-NP-TV-Z])"
    rf"|(?P<nino>(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?:{_SPACE}?[0-9]{{2}}){{3}}{_SPACE}?[A-D])"
    r"|(?P<codice_fiscale>[A-Z]{6}[0-9LMNP-V]{2}[A-EHLMPRST][0-9LMNP-V]{2}[A-Z][0-9LMNP-V]{3}[A-Z])"
    rf"){_ENDS}"
)
_FISCALE_ODD = dict(
    zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23))
)
_FISCALE_ODD |= {str(digit): _FISCALE_ODD[letter] for digit, letter in enumerate("ABCDEFGHIJ")}

_COUNTRY = (
    r"(?:[17]|2(?:[07]|[1-69][0-9])|3(?:[0-469]|[578][0-9])|4(?:[013-9]|2[0-9])|5(?:[1-8]|[09][0-9])|6(?:[0-6]|[7-9][0-9])"
    r"|8(?:[1246]|[058][0-9])|9(?:[0-58]|[679][0-9]))"
)
_GROUP = rf"[/.]?{_GAP}?(?:[0-9]{{1,5}}|\([0-9]{{1,5}}\))"
_PHONE = re.compile(
    rf"(?<![\w.,=#$€£+-])(?<![\w/]/)(?:"
    rf"(?:\+|00){_COUNTRY}\)?(?:{_GROUP}){{2,6}}+"  # +49 (0)30 123456, 0033.1.23.45.67.89
    rf"|(?:1{_DOT_OR_GAP})?\([2-9][0-9]{{2}}\){_GAP}?[2-9][0-9]{{2}}{_DOT_OR_GAP}[0-9]{{4}}"  # 1 (212) 555-0123
    rf"|(?:1{_DOT_OR_GAP})?[2-9][0-9]{{2}}(?P<same>[\-.‑])[2-9][0-9]{{2}}(?P=same)[0-9]{{4}}"  # 212.555.0123
    rf"|\(0[1-9][0-9]{{0,3}}\){_SPACE}?[0-9]{{2,8}}(?:{_GAP}[0-9]{{2,4}}){{0,3}}"  # (020) 7946 0958
    rf"|\([1-9][0-9]\){_SPACE}?9?[0-9]{{4}}-[0-9]{{4}}"  # (11) 91234-5678
    rf"|(?<![0-9]{_GAP})0[1-9](?:{_DOT_OR_GAP}[0-9]{{2}}){{4}}"  # 01 23 45 67 89, no part of 2 010 203 040
    rf"|(?<![0-9]{_GAP})0[1-9][0-9]{{0,3}}(?:{_GAP}|{_SPACE}?/{_SPACE}?)[0-9]{{3,8}}(?:{_GAP}[0-9]{{2,4}}){{0,3}}"  # 030 / 123 456 78
    rf"){_ENDS}"
)
_ANNOUNCED_PHONE = re.compile(rf"(?<![\w.,=#$€£+-])\+?(?:{_GROUP}){{2,7}}+{_ENDS}")
_PHONE_BEFORE = re.compile(
    r"(?:\b(?:t[eé]l|t[eé]l[eé](?:ph?one|f[oa])\w*|phone|fone|fax|mobil\w*|m[oó]vil|cell\w*|celular|portable|handy\w*|rufnummer|hotline"
    r"|whatsapp|call)(?:\s(?:number|nummer|no|nr|us|me|at))*|[☎☏✆📞📱])[\s.:)#–-]*$",
    re.IGNORECASE,
)
_REFERENCE_BEFORE = re.compile(
    r"(?:\b(?:case|file|ref\w*|order|invoice|ticket|docket|article|item|part|serial|id|az|aktenzeichen|dossier|no|nr|num|n°|№)[.:#]?|#)[\s.:#]*$", re.IGNORECASE
)
_COUNTED = re.compile(r"[ \u00a0](?:times|mal|fois|veces|volte|people|users|items|bytes|calls|requests|lines|rows|points|%)(?!\w)", re.IGNORECASE)
_MORE_GROUPS = re.compile(rf"{_DOT_OR_GAP}+[0-9]{{2}}(?![0-9])")
_ZIP_CODE_OR_DECIMAL = re.compile(r"[0-9]{5}-[0-9]{4}|\+?[0-9]+\.[0-9]+")
_DATE = re.compile(  # of day, month and year, or from year to year
    r"[(+]*(?:[0-3]?[0-9][./ –-][0-3]?[0-9][./ –-](?:1[89]|20)[0-9]{2}|(?:1[89]|20)[0-9]{2}[./ –-][01]?[0-9][./ –-][0-3]?[0-9]"
    r"|(?:1[0-9]|20)[0-9]{2}[–-](?:1[0-9]|20)[0-9]{2})(?![0-9])"
)

Check = Callable[[re.Match], Span | None]
_TEXT_RULES: tuple[tuple[str, tuple[str, ...], re.Pattern, Check], ...] = (  # kind, one of these must be in the text, form, check
    ("email", _AT_SIGNS, _AT_DOMAIN, _email),
    ("ip", (":",), _IPV6, _ip),
)
_RUN_RULES: tuple[tuple[str, re.Pattern, Check], ...] = (  # kind, form, check
    ("ip", _IPV4, _ipv4),
    ("iban", _IBAN, _iban),
    ("card", _CARD, _card),
    ("national_id", _SOCIAL_SECURITY, _social_security_number),
    ("national_id", _CPF, _cpf),
    ("national_id", _STEUER_ID, _steuer_id),
    ("national_id", _LETTERED_IDS, _lettered_id),
    ("phone", _PHONE, _phone),
    ("phone", _ANNOUNCED_PHONE, _announced_phone),
)
