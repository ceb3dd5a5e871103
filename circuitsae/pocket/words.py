"""The word lists of the corpus, slots that fill templates from them, and the hash that holds combinations out."""

# ruff: noqa: SIM905 - lists of words read best as text
import random
import zlib

HELD_OUT_ONE_IN = 10

MEN = (
    "John Tom James Dan Sid Martin Paul Peter Robert Michael David Daniel Kevin Brian Steven Scott Eric Simon Adam "
    "Mark Luke Jack Henry Oscar Felix Hugo Leo Max Sam Ben Alex Nick Andrew Anthony Edward Frank George Harry Ivan "
    "Jason Joseph Kyle Larry Matthew Nathan Oliver Patrick Philip Ralph Richard Roger Ryan Sean Thomas Victor Walter"
).split()
WOMEN = (
    "Mary Amy Anna Alice Emma Laura Sarah Jane Kate Lucy Julia Susan Karen Lisa Linda Maria Nancy Nina Olivia Paula "
    "Rachel Rebecca Ruth Sandra Sophie Tina Vera Wendy Zoe Bella Clara Diana Elena Emily Ella Fiona Hannah Irene "
    "Jessica Joan Judy Kelly Lily Martha Megan Monica Molly Nora Pamela Rosa Sally Sharon Stella Teresa"
).split()
NAMES = tuple(MEN + WOMEN)

PLACES = (
    "store park school office library market garden station restaurant hospital museum beach cafe theater farm bank "
    "church harbor castle bakery gym zoo hotel stadium workshop"
).split()
OBJECTS = (
    "drink book ring ball kiss basketball bone computer necklace snack letter present ticket pencil coat map lamp "
    "hat box camera flower phone guitar bottle bag card key cup watch puzzle radio toy blanket basket coin"
).split()
SPANS = (
    "war battle siege campaign conflict crisis reign rule dynasty empire voyage journey expedition trial strike "
    "drought famine plague epidemic festival project program study survey experiment construction repair "
    "negotiation treaty alliance partnership marriage friendship career tour tournament debate dispute protest "
    "rebellion revolt revolution occupation exile peace truce migration recession"
).split()
CENTURIES = tuple(range(11, 20))

SINGULAR = (
    "key cabinet author senator picture teacher doctor window door table chair manager lawyer student farmer driver "
    "painter singer pilot guard customer officer engineer tree house boat letter bottle truck horse robot tower "
    "bridge flower dog cat player dancer writer neighbor judge king rock bird road"
).split()
PLURAL = [noun + "s" for noun in SINGULAR]
PREPOSITIONS = ("to", "near", "behind", "beside", "above", "below", "with", "across from", "in front of", "next to")
VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("seems", "seem"), ("looks", "look"))

ADJECTIVES = (
    "old new red blue green small big tall quiet loud happy sad cold warm bright dark heavy light clean dirty strange "
    "famous kind brave tired hungry angry gentle clever lazy lovely simple broken empty"
).split()
ANIMALS = "dog cat horse bird fox rabbit bear wolf mouse duck sheep goat frog turtle lion tiger owl pony".split()
FOODS = "bread soup cake rice cheese fish salad pasta pie fruit honey butter corn tea coffee milk juice meat".split()
WEATHER = "sunny rainy windy cloudy snowy foggy stormy cool hot dry".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TIMES = "morning afternoon evening night spring summer autumn winter".split()
THINGS = (
    "river hill forest stone wall boat wheel song story picture dream lake field cloud moon star candle mirror "
    "wagon rope shoe ladder hammer spoon knife paper brush drum bell clock pillow carpet shelf bucket"
).split()
RELATIVES = "mother father sister brother aunt uncle friend teacher neighbor cousin grandmother grandfather".split()
FEELINGS = "happy sad proud angry afraid surprised tired glad nervous calm sorry excited".split()
ACTIONS = "ran walked jumped danced sang laughed slept waited worked played smiled cried".split()
TRADES = "farmer teacher doctor painter singer baker sailor writer pilot driver lawyer builder nurse tailor".split()
COLORS = "red blue green white black yellow brown purple orange pink gray silver".split()
NUMBERS = [str(number) for number in range(10, 100)]
SMALL = "two three four five six seven eight nine ten".split()

WORDS = {
    "name": NAMES,
    "place": PLACES,
    "object": OBJECTS,
    "span": SPANS,
    "one": SINGULAR,
    "many": PLURAL,
    "prep": PREPOSITIONS,
    "adj": ADJECTIVES,
    "animal": ANIMALS,
    "food": FOODS,
    "weather": WEATHER,
    "day": DAYS,
    "time": TIMES,
    "thing": THINGS,
    "kin": RELATIVES,
    "feeling": FEELINGS,
    "action": ACTIONS,
    "trade": TRADES,
    "color": COLORS,
    "num": NUMBERS,
    "small": SMALL,
}
INDUCTION_WORDS = tuple(
    dict.fromkeys([*OBJECTS, *PLACES, *THINGS, *ADJECTIVES, *ANIMALS, *FOODS, *SINGULAR, *PLURAL, *COLORS, *NAMES])
)


def held_out(*parts: object) -> bool:
    """Whether this combination belongs to the evaluation prompts: one in ten, by CRC-32 of its parts."""
    return zlib.crc32("|".join(map(str, parts)).encode()) % HELD_OUT_ONE_IN == 0


def pair_held_out(first: str, second: str) -> bool:
    """Whether training never casts two names together: one pair in ten, and John and Mary of the demonstration."""
    low, high = sorted((first, second))
    return (low, high) == ("John", "Mary") or held_out("pair", low, high)


def name_pair(rng: random.Random, *, evaluation: bool = False) -> tuple[str, str]:
    """Two different names, drawn from the training pairs or from the held-out ones."""
    while True:
        first, second = rng.choice(NAMES), rng.choice(NAMES)
        if first != second and pair_held_out(first, second) == evaluation:
            return first, second


class Slots(dict[str, str]):
    """Values for a template's slots, drawn when first asked for: `{adj}` and `{adj2}` are two draws of one list."""

    def __init__(self, rng: random.Random, **given: str) -> None:
        super().__init__(given)
        self._rng = rng

    def __missing__(self, key: str) -> str:
        value = self[key] = self._rng.choice(WORDS[key.rstrip("0123456789")])
        return value
