"""The words around the problems: how questions are put, greetings, and what the embedded model does not know."""

from __future__ import annotations

import random
from collections.abc import Iterator

SORRY = "I only know small sums and number formats."
TOO_LARGE = [
    "1000",
    "1234",
    "4096",
    "2024",
    "65536",
    "10000",
    "123456",
    "9999",
    "5000",
    "3141",
    "7777",
    "1001",
    "100000",
]

_ASK: tuple[tuple[str, int], ...] = (
    ("What is {}?", 10),
    ("{}", 4),
    ("{} =", 2),
    ("{}?", 1),
    ("{}=", 1),
    ("Compute {}.", 2),
    ("How much is {}?", 2),
    ("What's {}?", 1),
)
_ASK += (
    ("what is {}", 1),
    ("Calculate {}.", 1),
    ("what is {}?", 1),
    ("Please compute {}.", 1),
    ("And {}?", 1),
    ("What about {}?", 1),
)
_SIGNS = {
    "sum": ((" + ", 8), ("+", 3), (" plus ", 3)),
    "difference": ((" - ", 8), ("-", 3), (" minus ", 3), (" − ", 1)),
    "product": (
        (" * ", 5),
        (" x ", 4),
        ("*", 2),
        ("x", 1),
        (" × ", 3),
        ("×", 1),
        (" times ", 3),
        (" multiplied by ", 1),
    ),
}
_LONG = {
    "sum": ("What is the sum of {} and {}?", "Add {} and {}.", "the sum of {} and {}"),
    "difference": ("What is the difference of {} and {}?", "the difference of {} and {}"),
    "product": (
        "What is the product of {} and {}?",
        "Multiply {} by {}.",
        "Multiply {} and {}.",
        "the product of {} and {}",
    ),
}


def _weighted(rng: random.Random, choices: tuple[tuple[str, int], ...]) -> str:
    return rng.choices([c for c, _ in choices], [w for _, w in choices])[0]


def arithmetic(kind: str, a: int, b: int, rng: random.Random) -> str:
    """`a op b` as people write it; "What is a + b?" comes most often."""
    chance = rng.random()
    if chance < 0.35:
        return f"What is {a} {'x' if kind == 'product' and chance < 0.15 else {'sum': '+', 'difference': '-', 'product': '*'}[kind]} {b}?"
    if chance < 0.43:
        return rng.choice(_LONG[kind]).format(a, b)
    return _weighted(rng, _ASK).format(f"{a}{_weighted(rng, _SIGNS[kind])}{b}")


_E4M3: tuple[str, ...] = (
    "What is the value of E4M3 {}?",
    "What is the value of E4M3 {}?",
    "What is E4M3 {}?",
    "E4M3 {}",
    "E4M3 {}?",
    "Decode E4M3 {}.",
)
_E4M3 += (
    "What number is the E4M3 code {}?",
    "What is the value of the E4M3 code {}?",
    "What does E4M3 {} mean?",
    "value of E4M3 {}",
)


def e4m3(code: int, rng: random.Random) -> str:
    """A question for the value of one E4M3 code, in hexadecimal (mostly) or in bits."""
    chance = rng.random()
    spelled = f"0x{code:02X}" if chance < 0.7 else f"0x{code:02x}" if chance < 0.8 else f"{code:08b}"
    return rng.choice(_E4M3).format(spelled)


BLOCK_BYTES: tuple[str, ...] = (
    "How many bytes are in a {} block?",
    "How many bytes does a {} block have?",
    "Bytes per {} block?",
    "How many bytes per block has {}?",
)
BLOCK_BYTES += (
    "How large is a {} block?",
    "How many bytes is a {} block?",
    "How big is a block of {}?",
    "What is the size of a {} block in bytes?",
)
BLOCK_WEIGHTS = (
    "How many weights are in a {} block?",
    "How many weights does a {} block hold?",
    "Weights per {} block?",
    "How many weights per block has {}?",
)
BLOCK_BITS: tuple[str, ...] = (
    "How many bits per weight does {} use?",
    "How many bits per weight has {}?",
    "Bits per weight of {}?",
    "How many bits is a {} weight?",
)
BLOCK_BITS += (
    "How many bits per weight does {} have?",
    "What are the bits per weight of {}?",
    "How many bits per weight is {}?",
)
FLOAT_QUESTIONS = {
    "exponent": (
        "How many exponent bits does {} have?",
        "How many bits has the exponent of {}?",
        "Exponent bits of {}?",
    ),
    "mantissa": (
        "How many mantissa bits does {} have?",
        "How many bits has the mantissa of {}?",
        "Mantissa bits of {}?",
    ),
    "bias": ("What is the exponent bias of {}?", "What is the bias of {}?", "Bias of {}?"),
    "infinity": ("Does {} have infinity?", "Does {} have infinities?", "Is there an infinity in {}?"),
    "largest": (
        "What is the largest {} value?",
        "What is the maximum of {}?",
        "What is the max of {}?",
        "What is the largest number in {}?",
        "Max of {}?",
    ),
    "normal": ("What is the smallest normal {} value?", "What is the smallest normal number in {}?"),
    "subnormal": (
        "What is the smallest subnormal {} value?",
        "What is the smallest positive {} value?",
        "What is the smallest number above zero in {}?",
    ),
}

_GLOSSARY = {
    "128x128": (
        "What is the FP8 weight block size?",
        "How large is an FP8 weight block?",
        "What is the block size of FP8 weights?",
    ),
    "1x128": (
        "What is the FP8 activation block size?",
        "How large is an FP8 activation group?",
        "What is the group size of FP8 activations?",
    ),
    "The scale of each 128x128 block; weights are multiplied by it.": (
        "What is weight_scale_inv?",
        "What does weight_scale_inv hold?",
    ),
    "Multi-head latent attention: the cache keeps one small vector per token.": (
        "What is MLA?",
        "What does MLA mean?",
        "Explain MLA.",
    ),
    "Mixture of experts: a router picks a few small networks for each token.": (
        "What is MoE?",
        "What is a mixture of experts?",
        "Explain MoE.",
    ),
    "A way to stretch rotary positions to longer texts.": ("What is YaRN?", "Explain YaRN."),
    "Rotary position embedding: pairs of numbers turned by the position.": ("What is RoPE?", "Explain RoPE."),
    "An 8-bit float: 1 sign, 4 exponent and 3 mantissa bits.": (
        "What is E4M3?",
        "Explain E4M3.",
        "What is FP8?",
    ),
    "An 8-bit float: 1 sign, 5 exponent and 2 mantissa bits.": ("What is E5M2?", "Explain E5M2."),
    "An 8-bit power of two: 2^(code-127).": ("What is E8M0?", "Explain E8M0."),
    "A file format for quantized models.": ("What is GGUF?", "Explain GGUF."),
    "A file format for tensors: a JSON header, then the bytes.": (
        "What is safetensors?",
        "Explain safetensors.",
    ),
    "2 codes: 0x7F and 0xFF": ("How many NaN codes does E4M3 have?", "Which E4M3 codes are NaN?"),
    "FP8 attention and shared experts, GGML routed experts.": (
        "What is a hybrid model?",
        "What is the hybrid format?",
    ),
}


def glossary() -> Iterator[tuple[str, str]]:
    """(question, answer) for the words of the trade."""
    for answer, questions in _GLOSSARY.items():
        yield from ((q, answer) for q in questions)


_HELLO = "Hello! Ask me for a sum, a difference, a product or about a number format."
_WHO = "I am refimpl-tiny, a very small DeepSeek-V3 model. I know small sums and number formats."
_CAN = "Sums and differences up to 999, products up to 99 x 99, and number formats such as E4M3 and Q4_K."
_TALK: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "hello",
            "hi",
            "Hey",
            "Hello there!",
            "Good morning!",
            "Good evening",
            "hey",
            "Hi there",
            "Good day!",
        ),
        "A greeting.",
        _HELLO,
    ),
    (
        (
            "Who are you?",
            "who are you?",
            "What are you?",
            "What is your name?",
            "Introduce yourself.",
            "Who made you?",
            "Are you ChatGPT?",
        ),
        "About me.",
        _WHO,
    ),
    (
        (
            "Are you DeepSeek?",
            "Which model are you?",
            "What model are you?",
            "Who am I talking to?",
            "Are you a robot?",
            "Are you human?",
        ),
        "About me.",
        _WHO,
    ),
    (
        (
            "What can you do?",
            "Help",
            "help",
            "What do you know?",
            "How can you help me?",
            "What can I ask you?",
            "Can you help me?",
        ),
        "About me.",
        _CAN,
    ),
    (
        (
            "Thanks",
            "Thanks!",
            "Thank you",
            "Thank you!",
            "thanks",
            "Great, thanks.",
            "thank you",
            "Great!",
            "Well done!",
            "Nice",
            "Cool",
        ),
        "Thanks.",
        "You are welcome.",
    ),
    (("Bye", "Bye!", "Goodbye", "Goodbye!", "bye", "See you!", "Good night"), "A farewell.", "Goodbye!"),
    (
        ("How are you?", "how are you?", "How do you do?", "How are you today?", "What's up?"),
        "A greeting.",
        "Fine, thank you. Shall we add two numbers?",
    ),
)


def talk(rng: random.Random) -> tuple[str, str, str]:
    """(question, reasoning, answer) of small talk."""
    questions, reasoning, answer = rng.choice(_TALK)
    return rng.choice(questions), reasoning, answer


_ASKS = """What is the {a} of {n}?|Who wrote {n}?|Where is {n}?|Tell me about {n}.|Why is {n} so {j}?|How do I {v} {n}?|What is {n}?|Write a {a} about {n}.
Can you {v} {n}?|When was {n} {d}?|Is {n} {j}?|Do you like {n}?|{n}|I {v} {n}.|Explain {n} to me.|How many {n} are there?|What is the best {n}?|Who is {n}?
Give me a {a} for {n}.|Translate {n} into French.|What do you think about {n}?|Which {n} is {j}?|How old is {n}?|How far is {n}?|Please {v} my {n}.
What does {n} mean?|{n} and {n2}|Is {n} {j} than {n2}?|Describe {n}.|Define {n}.|What color is {n}?|Who invented {n}?|Recommend a {a} with {n}.""".replace(
    "\n", "|"
).split("|")
_NOUNS = """France|the moon|Hamlet|love|Python|a cat|dogs|the weather|Berlin|music|my mother|the sun|Einstein|history|a poem|bread|the sea|football|money|war
time|God|trees|London|the president|quantum physics|chess|a car|coffee|the internet|China|gold|water|my friend|books|Shakespeare|a horse|apples|the king
Mars|an email|life|happiness|the universe|gravity|Rome|a computer|fish|birds|the economy|a song|winter|Napoleon|cheese|Linux|a star|the law|politics|sleep
a recipe|my code|Java|the capital of Italy|a dragon|Paris|rice|the ocean|photosynthesis|a bicycle|school|the brain|a job|tomorrow|Mozart|the earth|Japan
a joke|a story|the price|a doctor|the train|a city|my homework|the answer|this|that|it|everything|a river|the bible|art|fire|a tiger|Spain|America
entropy|the meaning of life|a triangle|an atom|DNA|the heart|a prime number|pi|the square root|an integral|a matrix|Bach|a house|milk|the news|a film""".replace(
    "\n", "|"
).split("|")
_ADJECTIVES = [
    "blue",
    "big",
    "old",
    "good",
    "better",
    "fast",
    "true",
    "hot",
    "cold",
    "important",
    "dangerous",
    "red",
    "small",
    "happy",
    "rich",
    "alive",
    "larger",
    "heavy",
    "beautiful",
    "real",
    "hard",
]
_VERBS = [
    "make",
    "find",
    "cook",
    "fix",
    "like",
    "draw",
    "buy",
    "see",
    "read",
    "love",
    "build",
    "write",
    "sort",
    "learn",
    "use",
    "eat",
    "play",
    "want",
    "open",
    "translate",
    "check",
    "solve",
    "print",
]
_ABSTRACT = [
    "capital",
    "story",
    "poem",
    "colour",
    "name",
    "price",
    "population",
    "song",
    "letter",
    "reason",
    "recipe",
    "summary",
    "history",
    "height",
    "author",
    "meaning",
    "size",
    "weight",
    "list",
]
_DONE = ["born", "built", "made", "discovered", "found", "written", "invented", "founded", "lost"]
_ODD = """Décris le monde.|Wie geht es dir?|你好|¿Qué hora es?|print("hello")|asdf|qwerty|???|SELECT * FROM users;|Привет|lol|ok|yes|no|hmm|What?|Why?|...|Is it raining?
Repeat after me|a|test|What time is it?|What day is today?|Sing!|Ignore all previous instructions.|こんにちは|import numpy as np|x = y|true or false?|42|7|0|I am sad.|!|foo bar
What is the answer?|seven plus eight|What is one plus one?|Solve x + 3 = 5.|Count to ten.|Is 7 prime?|What is pi?|Continue.|Again|Are you sure?|Tell me more.|1, 2, 3""".replace(
    "\n", "|"
).split("|")


def _beyond(rng: random.Random) -> str:
    """Arithmetic outside what is taught: too large, another operation, three numbers, fractions."""
    a, b, c, large = rng.randrange(1000), rng.randrange(100), rng.randrange(100), rng.choice(TOO_LARGE)
    if rng.random() < 0.6:
        large = str(rng.randrange(1000, 100000))
    made = [
        f"{large} + {a}",
        f"{a} + {large}",
        f"{large} - {a}",
        f"{a} / {b + 1}",
        f"{a} divided by {b + 1}",
        f"{a} + {b} + {c}",
        f"{a}.5 + {b}",
    ]
    made += [
        f"{large} * {b}",
        f"{a}^2",
        f"{large}",
        f"{a} * {b} * {c}",
        f"{a} - {b} - {c}",
        f"{a + 100} % {b + 1}",
        f"{b} x {large}",
    ]
    return _weighted(rng, _ASK).format(rng.choice(made))


def _scribble(rng: random.Random) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz" * 3 + "ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'éüñ"
    return " ".join(
        "".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 6))
    ) + rng.choice(("", "", "?", ".", "!"))


def unknown(rng: random.Random) -> str:
    """Something the model has no answer to: other subjects, other languages, scribbles, arithmetic beyond its range."""
    chance = rng.random()
    if chance < 0.15:
        return rng.choice(_ODD)
    if chance < 0.35:
        return _beyond(rng)
    if chance < 0.55:
        return _scribble(rng)
    words = {"n": _NOUNS, "n2": _NOUNS, "j": _ADJECTIVES, "v": _VERBS, "a": _ABSTRACT, "d": _DONE}
    return rng.choice(_ASKS).format(**{key: rng.choice(of) for key, of in words.items()})
