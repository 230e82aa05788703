"""Rules by language: prose in scripts without spaces, without full stops, of short and of long words stays; menus and repetition go."""

import random

import pytest
from datatrove.data import Document

from herd_jax import config
from herd_jax.curation.heuristics.c4 import C4Config
from herd_jax.curation.heuristics.gopher import GopherQualityConfig
from herd_jax.curation.heuristics.rules import RULES, Rules, prose_blocks
from herd_jax.curation.text import words
from herd_jax.errors import UserError

# language: words of its basic vocabulary, what stands between words, what ends a sentence
LANGUAGES = {
    "th": ("วันนี้ อากาศ ดี มาก เรา จึง ไป เดิน เล่น ที่ สวน ใกล้ บ้าน กับ เพื่อน แล้ว ก็ กิน ข้าว ผัด ปลา ต้ม ดื่ม น้ำ เย็น ร้อน หนังสือ อ่าน เขียน เรียน", "", ""),
    "lo": ("ມື້ນີ້ ອາກາດ ດີ ຫຼາຍ ພວກເຮົາ ໄປ ຍ່າງ ຫຼິ້ນ ຢູ່ ສວນ ໃກ້ ເຮືອນ ກັບ ໝູ່ ແລ້ວ ກິນ ເຂົ້າ ປາ ດື່ມ ນໍ້າ ເຢັນ ຮ້ອນ ປຶ້ມ ອ່ານ ຂຽນ ຮຽນ", "", ""),
    "km": ("ថ្ងៃនេះ អាកាសធាតុ ល្អ ណាស់ យើង ទៅ ដើរ លេង នៅ សួន ជិត ផ្ទះ ជាមួយ មិត្ត ហើយ ញ៉ាំ បាយ ត្រី ផឹក ទឹក ត្រជាក់ ក្តៅ សៀវភៅ អាន សរសេរ រៀន", "", ""),
    "my": ("ဒီနေ့ ရာသီဥတု ကောင်း တယ် ကျွန်တော် တို့ ပန်းခြံ မှာ လမ်းလျှောက် အိမ် နား သူငယ်ချင်း နဲ့ ထမင်း စား ငါး ရေ သောက် အေး ပူ စာအုပ် ဖတ် ရေး သင်", "", ""),
    "bo": ("དེ་རིང་ གནམ་གཤིས་ ཡག་པོ་ འདུག་ ང་ཚོ་ གླིང་ཁ་ ལ་ འགྲོ་ ཁང་པ་ ཉེ་བོར་ གྲོགས་པོ་ མཉམ་དུ་ ཁ་ལག་ ཟ་ ཉ་ ཆུ་ འཐུང་ གྲང་མོ་ ཚ་པོ་ དཔེ་ཆ་ ཀློག་ འབྲི་ སློབ་", "", ""),
    "zh": ("今天 天气 很好 我们 去 公园 散步 离 家 不远 和 朋友 一起 吃饭 做 鱼汤 喝 凉水 热茶 看书 写信 学习 工作 休息 唱歌 下雨 春天 城市 山上 风景", "", "。"),
    "wuu": ("今朝 天气 老好 阿拉 到 公园 荡荡 离 屋里 弗远 搭 朋友 一道 吃饭 烧 鱼汤 吃 冷水 热茶 看书 写信 读书 做生活 歇歇 唱歌 落雨 春天 城里 山浪 风景", "", "。"),
    "yue": ("今日 天氣 好好 我哋 去 公園 行下 離 屋企 唔遠 同 朋友 一齊 食飯 煲 魚湯 飲 凍水 熱茶 睇書 寫信 返學 做嘢 抖下 唱歌 落雨 春天 城市 山頂 風景", "", "。"),
    "ja": ("今日 は とても 天気 が よい ので 公園 へ 散歩 に 行き 家 の 近く で 友人 と 昼食 を 食べ 魚 や 冷たい 水 熱い お茶 本 読み 手紙 書き 学び", "", "。"),
    "ko": ("오늘 날씨 참 좋아 우리 공원 가서 집 앞 친구 같이 밥 먹고 생선 찬 물 차 책 읽고 글 쓰고 배워 봄 비 산 강 꽃 새 길 밤", " ", "."),
    "am": ("ዛሬ የአየር ሁኔታ ጥሩ ነው እኛ ወደ መናፈሻ ሄድን ከቤት አጠገብ ከጓደኛ ጋር ምሳ በላን ዓሣ ውሃ ጠጣን ቀዝቃዛ ሙቅ መጽሐፍ አነበብን ጻፍን ተማርን ተራራ ከተማ", "፡", "።"),
    "hy": ("այսօր եղանակը շատ լավ է մենք գնացինք այգի տան մոտ ընկերոջ հետ ճաշ կերանք ձուկ ջուր խմեցինք սառը տաք գիրք կարդացինք գրեցինք սովորեցինք սար քաղաք", " ", ":"),
    "ml": ("ഇന്നത്തെ കാലാവസ്ഥ വളരെയധികം മനോഹരമായിരുന്നതുകൊണ്ട് ഞങ്ങളെല്ലാവരും പൂന്തോട്ടത്തിലേക്ക് നടക്കാനിറങ്ങി വീട്ടിനടുത്തുള്ള സുഹൃത്തുക്കളോടൊപ്പം ഉച്ചഭക്ഷണം കഴിച്ചുകൊണ്ടിരുന്നു മത്സ്യക്കറിയും തണുത്തവെള്ളവും പുസ്തകങ്ങൾ വായിക്കുകയായിരുന്നു എഴുതുകയായിരുന്നു പഠിക്കുകയായിരുന്നു", " ", "."),
    "ur": ("آج کا دن بہت اچھا ہے ہم سب باغ کو گئے گھر کے پاس دوست سے ملے روٹی چاول مچھلی پانی چائے گرم سرد کتاب خط لکھا پڑھا سیکھا شہر دریا", " ", "۔"),
    "hi": ("आज का मौसम बहुत अच्छा है हम सब बाग में गए घर के पास मित्र से मिले रोटी चावल मछली पानी चाय गरम ठंडा किताब पत्र लिखा पढ़ा सीखा शहर नदी", " ", "|"),
}  # fmt: skip


def prose(language: str, sentences: int = 24, words_per_sentence: int = 9) -> list[str]:
    vocabulary, space, stop = LANGUAGES[language]
    source = random.Random(language)
    return [space.join(source.sample(vocabulary.split(), words_per_sentence)) + stop for _ in range(sentences)]


def verdict(text: str, language: str, rules=RULES) -> tuple[str, str]:
    """Why a text goes ("": it stays), and what is left of it."""
    doc = Document(text, "", metadata={"media_type": "text/plain", "language": language})
    for block in prose_blocks(rules):
        found = block.filter(doc)
        if found is not True:
            return f"{block.name}:{found[1]}", ""
    return "", doc.text


@pytest.mark.parametrize("language", LANGUAGES)
def test_prose_stays(language):
    sentences = prose(language)
    paragraph = (" " if LANGUAGES[language][1] != "፡" else "").join(sentences)
    for text in ("\n".join(sentences), "\n".join([paragraph, *prose(language, 28)[24:]])):  # one sentence a paragraph, and a long one
        assert verdict(text, language) == ("", text)


@pytest.mark.parametrize("language", ["lo", "km", "yue", "ko", "am", "ml"])
def test_rules_for_another_language_drop_it(language):
    """They differ where it matters: without rules of its own, such prose goes."""
    assert verdict("\n".join(prose(language)), language, (Rules(),))[0]


@pytest.mark.parametrize("language", ["th", "my", "bo", "ja", "yue", "ko", "ml"])
def test_menus_and_repetition_go_in_every_script(language):
    vocabulary = LANGUAGES[language][0].split()
    assert verdict("\n".join(vocabulary * 3), language)[0]
    assert verdict("\n".join(prose(language, 3) * 8), language)[0]
    repeated = LANGUAGES[language][1].join(vocabulary[:20])
    assert verdict("\n".join(f"{repeated}{number}{LANGUAGES[language][2]}" for number in range(9)), language)[0].startswith("repetition:")


def test_words_of_scripts_with_signs_between_them():
    def found(text):
        cut = words.split(text)
        return [text[start:end] for start, end in zip(cut.starts, cut.ends)]

    assert found("བོད་ཡིག་འབྲི།") == ["བོད", "ཡིག", "འབྲི", "།"]
    assert found("ሰላም፡ለዓለም። ቤት፣") == ["ሰላም", "ለዓለም", "።", "ቤት", "፣"]
    assert found("Բարեւ՝ ձեզ։") == ["Բարեւ", "՝", "ձեզ", "։"]
    assert found("ｱﾒﾘｶ") == list("ｱﾒﾘｶ") and found("ꦗꦮ") == ["ꦗ", "ꦮ"] and found("ꆈꌠ") == ["ꆈ", "ꌠ"] and found("ㄅㄆ") == ["ㄅ", "ㄆ"]


def test_the_mean_length_is_that_of_words_between_spaces():
    gopher = (Rules(repetition=None, quality=GopherQualityConfig(min_alphabetic_words=0.1, min_stop_words=None, stop_words=())),)
    letters = " ".join(random.Random(0).choices("abcdefghij", k=60))
    assert verdict(letters, "xx", gopher)[0] == "gopher_quality:gopher_below_avg_threshold"
    assert verdict(f"{letters} {''.join(prose('zh'))}", "xx", gopher)[0] != "gopher_quality:gopher_below_avg_threshold"


def test_line_ends_of_none_keep_lines_that_end_with_any_sign():
    assert config.parse(C4Config, {"line_ends": "none"}).line_ends is None
    with pytest.raises(UserError, match="none for any sign"):
        C4Config(line_ends="")
