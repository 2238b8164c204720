"""Guesses at encodings: sentences of many languages, each in the encodings that hold it."""

import pytest

from bp_data.encodings import guess_encoding
from bp_data.row_checks import guess_language

SENTENCES = {
    "cp1252": [
        "Wie heißt der größte Vögel?",
        "L'été dernier, nous étions à la plage",
        "¿Dónde está el niño?",
        "Preis: 5 €",
    ],
    "cp1250": ["Źródło wody jest za górą i łąką", "Příliš žluťoučký kůň úpěl ďábelské ódy"],
    "cp1251": ["Сколько птиц живёт на этом острове?"],
    "cp1253": ["Πόσα πουλιά ζουν σε αυτό το νησί;"],
    "cp1255": ["כמה ציפורים חיות באי הזה"],
    "shift_jis": ["この島には鳥が何羽いますか"],
    "euc_kr": ["이 섬에는 새가 몇 마리 살고 있습니까"],
    "gb18030": ["这个岛上有多少种鸟？它们吃什么？"],
}
CASES = [(encoding, text) for encoding, texts in SENTENCES.items() for text in texts]


@pytest.mark.parametrize(("encoding", "text"), CASES)
def test_the_guess_decodes_the_text(encoding, text):
    line = text.encode(encoding)
    assert line.decode(guess_encoding([line])) == text


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("English", "What is the name of the bird that sings in the morning?"),
        ("German", "Wie heißt der Vogel, der am Morgen auf dem Baum singt, und was ist das?"),
        ("French", "Quel est le nom de la montagne que vous voyez dans les nuages ?"),
        ("Spanish", "¿Cómo se llama el pájaro que canta por la mañana en los árboles?"),
        ("Portuguese", "Como se chama o pássaro que canta para os filhos em uma manhã?"),
        ("Japanese", "この島には鳥が何羽いますか"),
        ("Chinese", "这个岛上有多少种鸟？它们吃什么？"),
        ("Korean", "이 섬에는 새가 몇 마리 살고 있습니까"),
        ("Cyrillic", "Сколько птиц живёт на этом острове?"),
        ("other", "x = f(y) + 3"),
        ("other", ""),
    ],
)
def test_languages_are_guessed(language, text):
    assert guess_language(text) == language
