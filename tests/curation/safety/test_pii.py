"""Personal data planted in real sentences, and what only looks like it."""

import pydoc_data.topics
import random
import re
import string
import uuid
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("datatrove")

from datatrove.data import Document

from herd_jax.curation.safety.personal_data import KINDS, find
from herd_jax.curation.safety.pii import Pii, PiiConfig
from herd_jax.errors import UserError

PLANTED, SEED = 200, 5  # of each kind
FRAMES = (
    "Please write to {}.", "You can reach us at {} until Friday.", "({})", "Contact: {}", "{}", "Kontakt: {}, Montag bis Freitag.",
    "Merci d'utiliser {} pour toute question.", "Los datos son {} según el contrato.", "« {} »", "- {}\n", "I lost it: {}!", "联系 {}。",
    "Il dato è {}; grazie.", "Os dados: {} (ver abaixo).",
)  # fmt: skip


def digits(rng: random.Random, n: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(n))


def email(rng):
    first, last = (
        rng.choice(["jane", "Paul", "müller", "o.garcia", "x", "info", "Sven_K"]),
        rng.choice(["doe", "smith99", "li", "da-silva"]),
    )
    host = rng.choice(["gmail.com", "mail.corp.co.uk", "uni-köln.de", "orange.fr", "x.io", "a1.museum", "sub.dept.ac.in"])
    local = rng.choice([f"{first}.{last}", f"{first}+{last}", first, f"{last}{rng.randrange(99)}", f"{first}_{last}"])
    if rng.random() < 0.1:
        return f"{local} at {host.replace('.', ' dot ')}"
    return rng.choice([f"{local}@{host}"] * 8 + [f"{local} [at] {host}", f"{local}(at){host.replace('.', '(dot)')}"])


def ip(rng):
    if rng.random() < 0.3:
        tail = rng.choice([f"::{rng.randrange(1, 65536):x}", ":" + ":".join(f"{rng.randrange(1, 65536):x}" for _ in range(6))])
        return rng.choice(["2a00:1450", "2606:4700", "2001:4860", "2A02:26f0"]) + tail
    address = f"{rng.choice([5, 23, 52, 81, 93, 142, 185, 203])}.{rng.randrange(256)}.{rng.randrange(1, 256)}.{rng.randrange(1, 255)}"
    return address if not address.startswith("203.0.113") else "81.2.69.142"


def ip_text(rng):
    return rng.choice(["{}", "{}", "{}", "[{}]", "http://{}/"])


def iban(rng):
    country, bank = rng.choice([
        ("DE", digits(rng, 18)), ("GB", "NWBK" + digits(rng, 14)), ("FR", digits(rng, 12) + "M02X" + digits(rng, 7)),
        ("ES", digits(rng, 20)), ("IT", "X" + digits(rng, 22)), ("NL", "ABNA" + digits(rng, 10)), ("NO", digits(rng, 11)),
        ("MT", "MALT" + digits(rng, 23)),
    ])  # fmt: skip
    as_number = int("".join(str(string.digits.find(c) if c.isdigit() else ord(c) - 55) for c in bank + country + "00"))
    number = f"{country}{98 - as_number % 97:02}{bank}"
    grouped = " ".join(re.findall(".{1,4}", number))
    return rng.choice([number, grouped, grouped.replace(" ", "\u00a0"), number, grouped, grouped, number, grouped, grouped, number.lower()])


def luhn(body: str) -> str:
    total = 0
    for place, digit in enumerate(reversed(body)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return body + str(-total % 10)


def card(rng):
    prefix, length = rng.choice(
        [("4", 16), ("51", 16), ("2720", 16), ("34", 15), ("37", 15), ("6011", 16), ("3530", 16), ("36", 14), ("62", 16)]
    )
    number = luhn(prefix + digits(rng, length - 1 - len(prefix)))
    if length == 16:
        groups = re.findall(".{4}", number)
    else:
        groups = [number[:4], number[4:10], number[10:]]
    return rng.choice([number, " ".join(groups), "-".join(groups)])


def national_id(rng):
    def ssn():
        separator = rng.choice("----- ")
        return separator.join((f"{rng.randrange(100, 665)}", f"{rng.randrange(1, 100):02}", f"{rng.randrange(1, 10000):04}"))

    def nino():
        number = rng.choice(["AB", "CE", "JG", "PX"]), *(digits(rng, 2) for _ in range(3)), rng.choice("ABCD")
        return rng.choice(["", " "]).join(number)

    def nir():
        parts = [
            rng.choice("12"),
            digits(rng, 2),
            f"{rng.randrange(1, 13):02}",
            rng.choice(["75", "13", "2A", "2B"]),
            digits(rng, 3),
            digits(rng, 3),
        ]
        number = int("".join(parts).replace("2A", "19").replace("2B", "18"))
        return rng.choice(["", " "]).join([*parts, f"{97 - number % 97:02}"])

    def steuer_id():
        body = rng.sample(string.digits, 10)
        if body[0] == "0":
            body.reverse()
        body[rng.randrange(1, 10)] = body[0]
        carry = 10
        for digit in body:
            summed = (carry + int(digit)) % 10
            carry = (2 * (summed if summed else 10)) % 11
        number = "".join(body) + str((11 - carry) % 10)
        return rng.choice([number, f"{number[:2]} {number[2:5]} {number[5:8]} {number[8:]}"])

    def dni():
        number = rng.randrange(10**7, 10**8)
        return f"{number}{rng.choice(['', '-'])}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"

    def nie():
        letter, number = rng.randrange(3), digits(rng, 7)
        return f"{'XYZ'[letter]}{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[int(str(letter) + number) % 23]}"

    def codice_fiscale():
        return rng.choice(["RSSMRA85T10A562S", "MRTMTT91D08F205J", "RSSMRA80A01H501U"])

    def cpf():
        body = [rng.randrange(10) for _ in range(9)]
        for _ in range(2):
            body.append(-sum(digit * weight for digit, weight in zip(reversed(body), range(2, 12))) % 11 % 10)
        text = "".join(map(str, body))
        return f"{text[:3]}.{text[3:6]}.{text[6:9]}-{text[9:]}"

    return rng.choice([ssn, nino, nir, steuer_id, dni, nie, codice_fiscale, cpf])()


def phone(rng):
    def local(pattern: str) -> str:
        return "".join({"#": rng.choice(string.digits), "N": rng.choice("23456789")}.get(char, char) for char in pattern)

    return local(
        rng.choice([
            "(N##) N##-####", "N##-N##-####", "N##.N##.####", "+1 N##-N##-####", "1-N##-N##-####", "+1 (N##) N##-####", "+1N##N######",
            "+44 20 #### ####", "020 7### ####", "07### ######", "+44 (0)7### ######", "(0161) ### ####",
            "01 N# ## ## ##", "06.N#.##.##.##", "+33 6 ## ## ## ##", "0033 1 ## ## ## ##", "06-N#-##-##-##",
            "+49 30 N######", "030 N#######", "0171/N######", "+49 (0)89 N##### ##", "(030) N## ## ##",
            "+34 6## ### ###", "+39 06 N### ####", "+55 11 9####-####", "(11) 9####-####", "+91 9#### #####", "090-N###-####",
            "+86 138 #### ####",
            "+380 44 ### ## ##", "6## ### ###", "N## N## ####",
        ])
    )  # fmt: skip


def phone_text(rng):
    return rng.choice(["{}", "{}", "{}", "Tel. {}", "Phone: {}", "call {}", "Tél : {}", "WhatsApp {}", "☎ {}"])


PLANT = {"email": email, "ip": ip, "iban": iban, "card": card, "national_id": national_id, "phone": phone}
TEXT = {"ip": ip_text, "phone": phone_text}


def near_miss(rng: random.Random) -> str:
    valid = luhn("4" + digits(rng, 14))
    bad_check = valid[:-1] + str((int(valid[-1]) + rng.randrange(1, 10)) % 10)
    million = f"{rng.randrange(1, 999)}", digits(rng, 3), digits(rng, 3)
    return rng.choice([
        lambda: f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}", lambda: f"192.168.{rng.randrange(256)}.7",
        lambda: "127.0.0.1",
        lambda: f"172.{rng.randrange(16, 32)}.0.{rng.randrange(256)}", lambda: "192.0.2.44", lambda: "2001:db8::8a2e",
        lambda: "fe80::1ff:fe23",
        lambda: f"version 81.{rng.randrange(99)}.2.17", lambda: f"v{rng.randrange(99)}.4.{rng.randrange(40)}.2",
        lambda: f"{rng.randrange(30)}.2.3.4",
        lambda: "1.3.6.1.4.1.311.21", lambda: f"Section 192.{rng.randrange(99)}.1.1", lambda: f"Chrome/{rng.randrange(50, 120)}.0.44.12",
        lambda: "010.020.030.040", lambda: "255.255.255.0", lambda: "195.20.0.0/16",
        lambda: bad_check, lambda: "4111-1111-1111-1112", lambda: digits(rng, 16), lambda: f"17{digits(rng, 11)}", lambda: digits(rng, 20),
        lambda: f"{rng.randrange(1, 29):02}/{rng.randrange(1, 13):02}/20{digits(rng, 2)} {rng.randrange(24):02}:30",
        lambda: f"20{digits(rng, 2)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}T10:22:33",
        lambda: f"19{digits(rng, 2)}–20{digits(rng, 2)}",
        lambda: f"978-{digits(rng, 1)}-{digits(rng, 2)}-{digits(rng, 6)}-{digits(rng, 1)}",
        lambda: f"ISBN 0-{digits(rng, 3)}-{digits(rng, 5)}-2",
        lambda: str(uuid.UUID(int=rng.getrandbits(128))), lambda: f"{rng.getrandbits(160):040x}", lambda: f"0x{rng.getrandbits(64):016X}",
        lambda: f"${','.join(million)}.{digits(rng, 2)}", lambda: f"€ {' '.join(million)}",
        lambda: f"3.{digits(rng, 15)}", lambda: f"{digits(rng, 2)}.{digits(rng, 6)}, -{digits(rng, 2)}.{digits(rng, 6)}",
        lambda: f"line {digits(rng, 7)}:{digits(rng, 2)}",
        lambda: f"https://example.org/id/{digits(rng, 12)}?n={digits(rng, 11)}",
        lambda: f"doi:10.{digits(rng, 4)}/s{digits(rng, 5)}-020-{digits(rng, 4)}-2",
        lambda: "someone@example.com", lambda: "icon@2x.png", lambda: "@staticmethod", lambda: "git checkout HEAD@{2}", lambda: "a @ b.T",
        lambda: ":".join(f"{rng.getrandbits(8):02x}" for _ in range(6)), lambda: "21-15, 15-21, 22-20",
        lambda: f"Boston, MA 0{digits(rng, 4)}-{digits(rng, 4)}",
        lambda: f"1 {digits(rng, 3)} {' '.join(million[1:])} inhabitants", lambda: f"DE{digits(rng, 20)}",
        lambda: f"{digits(rng, 3)}-{digits(rng, 3)} pages",
        lambda: f"[0{digits(rng, 1)} {digits(rng, 2)} {digits(rng, 2)} {digits(rng, 2)}]",
        lambda: f"ISSN {digits(rng, 4)}-{digits(rng, 4)}", lambda: "000-12-3456",
        lambda: f"std::map<2, 3>::at({digits(rng, 5)})", lambda: f"order no. {digits(rng, 10)}", lambda: f"part AB-{digits(rng, 6)}-C",
        lambda: digits(rng, 11),
    ])()  # fmt: skip


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """Of the Python reference, which the standard library carries: full of versions, addresses, numbers and at signs."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return [sentence for sentence in re.split(r"(?<=[.:])\s+", text) if 20 < len(sentence) < 400]


def measure(sentences: list[str]) -> dict[str, tuple[float, float]]:
    """Precision and recall of each kind. A planted one is found where a span of its kind covers it and no more than two characters else."""
    rng = random.Random(SEED)
    found, right, missed = Counter(), Counter(), Counter()
    for kind in KINDS:
        for _ in range(PLANTED):
            planted = PLANT[kind](rng)
            frame = rng.choice(FRAMES).replace("{}", TEXT.get(kind, lambda _: "{}")(rng))
            before = f"{rng.choice(sentences)} {near_miss(rng)} "
            text = f"{before}{frame.format(planted)} {rng.choice(sentences)} {near_miss(rng)}, {near_miss(rng)}"
            start = len(before) + frame.index("{}")
            spans = find(text)
            hits = [
                (a, b, k)
                for a, b, k in spans
                if k == kind and start - 2 <= a <= start and start + len(planted) <= b <= start + len(planted) + 2
            ]
            found.update(k for _, _, k in spans)
            right[kind] += bool(hits)
            missed[kind] += not hits
    return {kind: (right[kind] / found[kind], right[kind] / (right[kind] + missed[kind])) for kind in KINDS}


def test_precision_and_recall(sentences):
    floors = {
        "email": (0.99, 0.85),  # one in ten is written "at" and "dot" in words, too close to prose
        "ip": (0.99, 0.99),
        "iban": (0.98, 0.83),  # one in ten is in small letters
        "card": (0.98, 0.99),
        "national_id": (0.98, 0.96),
        "phone": (0.97, 0.95),
    }
    for kind, (precision, recall) in measure(sentences).items():
        print(f"{kind}: precision {precision:.3f}, recall {recall:.3f}")
        assert precision >= floors[kind][0] and recall >= floors[kind][1], kind


def test_real_text_without_personal_data_stays_as_it_is(sentences):
    found = [text[start:end] for text in sentences for start, end, _ in find(text)]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "y = X@beta.reshape(-1)", "z = A @ B.conj()", "x@w.grad + b", "p = Q@rows.index[0]", "if @pytest.mark.parametrize(", "see foo @bar.com", "by @user.name",
        "git@", "01 02 03 04 05 06 07", "08 09 10 11 12", " 06 07 08 09 10 11 12 ", "03 27 45 61 80 12 44", "+10 000 000", "+1 000 000 people", "+10 000 000 000",
        "case no. 05-20240101", "File 02-1234567", "ref: 030 123456", "kernel 5.15.153.1", "Chrome 120.0.99.5", "driver 31.0.101.44", "call 123456 times",
        "phone 1234567 users",
    ],
)  # fmt: skip
def test_what_is_no_personal_data_stays(text):
    assert judge(f"Before it. {text} And after.")[1] == f"Before it. {text} And after."


@pytest.mark.parametrize(
    "address",
    [
        "jürgen@müller.de", "info@xn--mller-kva.de", "иван@почта.рф", "张三@例子.中国", "用户＠corp.cn", "jane＠corp．jp", "a@b.co", "o'neil+x@sub.corp.museum",
        "who@mail.xn--p1ai", "jane (at) corp (dot) fr", "jane[at]corp.fr", "jane@corp(dot)fr",
    ],
)  # fmt: skip
def test_addresses_of_all_scripts(address):
    assert judge(f"Write to {address} or come.") == (True, "Write to <EMAIL> or come.")
    assert judge(f"写信给 {address}，谢谢")[1] == "写信给 <EMAIL>，谢谢"


CODE = ["x = a@b", "def f(x): return x @ W.T + b", "@app.route('/')", "for i in range(10_000_000):", "print(data @ weights.reshape(3, 4))", "VERSION = '5.15.153.1'"]


def test_precision_and_recall_in_code():
    """Addresses in comments and strings are found; products, decorators and numbers are none."""
    rng, right, found = random.Random(SEED), 0, 0
    for _ in range(300):
        planted = f"{rng.choice(['jane', 'j.doe', 'dev+x'])}@{rng.choice(['corp.fr', 'mail.co.uk', 'müller.de'])}"
        text = "\n".join([*rng.sample(CODE, 3), rng.choice(["# by {}", "AUTHOR = '{}'", "// {}", "    mail({})"]).format(planted), *rng.sample(CODE, 2)])
        masked = judge(text, media_type="text/x-code")[1]
        right += planted not in masked
        found += masked.count("<EMAIL>")
    assert right >= 0.99 * 300 and found == right


def judge(text: str, media_type: str = "text/plain", **config) -> tuple[bool | tuple[bool, str], str]:
    doc = Document(text, "FILE#0", metadata={"media_type": media_type})
    return Pii(PiiConfig(**config)).filter(doc), doc.text


def test_masks_say_what_they_hide_and_leave_the_rest():
    text = "Jane (jane@corp.fr, +33 1 23 45 67 89) paid DE89 3704 0044 0532 0130 00 from 81.2.69.142; 4111 1111 1111 1111, 123-45-6789."
    masked = "Jane (<EMAIL>, <PHONE>) paid <IBAN> from <IP>; <CARD>, <NATIONAL_ID>."
    assert judge(text) == (True, masked)


def test_config_says_which_kinds_and_with_what():
    assert judge("a.b@corp.fr 81.2.69.142", kinds=("ip",), replacement="[hidden]") == (True, "a.b@corp.fr [hidden]")


def test_in_source_code_a_number_is_a_number():
    assert judge("x = 4111111111111111  # jane@corp.fr", media_type="text/x-code") == (True, "x = 4111111111111111  # <EMAIL>")


def test_a_list_of_contacts_is_dropped_and_a_long_text_with_some_is_not():
    contacts = "".join(f"user{index}@corp.fr\n" for index in range(10))
    assert judge(contacts)[0] == (False, "much_personal_data")
    assert judge(contacts[: contacts.index("user9")])[0] is True
    assert judge(contacts + "Prose. " * 400)[0] is True


def test_of_two_that_overlap_the_earlier_kind_counts():
    assert judge("Tel. 3056 930902 5904")[1] == "Tel. <CARD>"
    assert judge("Tel. (0)3056 930902 5904")[1] == "Tel. (0)<CARD>"


@pytest.mark.parametrize("text",
    ["", "1", "@", "\udc80@\udc80.de", "+" * 99, "\u202e٠١٢ 81.2.69.٤", "1" * 10**6, "a@" * 10**5, "@a." * 10**5, "1 " * 10**5,
                                  "+49 " * 10**5, "A1" * 10**5, "2aaa:" * 10**5, "(at)" * 10**5, "\x00" * 1000])  # fmt: skip
def test_any_text_has_a_verdict(text):
    assert judge(text) == (True, text)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.sampled_from(
            ["1", "49", "2001", "a", "@", ".", "-", " ", "(", ")", "+", ":", "/", "de", "DE89", "X", "tel ", "81.2.69.142", "a@b.fr"]
        ),
        max_size=30,
    )
)
def test_spans_are_in_order_apart_and_not_empty(pieces):
    text = "".join(pieces)
    places = [place for start, end, _ in find(text) for place in (start, end)]
    assert places == sorted(places) and all(start < end for start, end, _ in find(text)) and places[-1:] <= [len(text)]


@pytest.mark.parametrize("wrong", [{"kinds": ("name",)}, {"min_count": 0}, {"max_per_thousand_characters": -1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=f"curation pii.{next(iter(wrong))}"):
        PiiConfig(**wrong)
