"""Words and sentences that the long-context tasks are made of, so that none are downloaded."""

import random
import re
from collections.abc import Iterator

NOUNS = tuple(
    """
    acorn actor airport alley anchor ankle answer apple apron arrow artist aunt autumn avenue
    bakery ball bamboo banjo bank barn basket beach beacon bean bear bell bench berry bicycle
    bird blanket blossom boat book boot bottle bowl bread breeze brick bridge broom brother brush
    bucket bus butter button cabin cabinet cable camel camera canal candle canoe canvas captain
    carpet carrot castle cedar cellar chair chalk chapel cheese cherry chimney circle circus
    clerk cliff clock cloud clover coast coat coffee collar comet compass copper coral corner
    cotton cottage cousin crane crown curtain dairy dancer desert desk diamond dinner doctor dog
    dolphin donkey door dragon drawer dress drum eagle engine evening fabric factory farmer
    feather fence ferry fiddle field finger flag flame flower flute forest fountain fox garden
    garlic gate ghost ginger glacier glove goat grain grape guitar hammer harbor harvest hat
    hawk helmet hill honey horse hotel house island ivory jacket jar jelly jewel judge kettle
    key kitchen kite ladder lake lamp lantern lawyer leaf lemon letter library lighthouse lion
    lizard magnet mango maple marble market meadow melon mirror monkey moon mountain museum
    needle nephew nest notebook oak oar ocean olive onion orchard otter oven owl oyster paddle
    painter palace paper parade parrot path peach pebble pencil pepper piano picture pillow pine
    pirate plate pocket poem pond porch potato pumpkin puppet quarry quilt rabbit raft railway
    rainbow ribbon river robin rocket roof rope rose saddle sailor salmon sandal school scissors
    sculptor shadow shell shepherd ship shoulder singer sister spider spoon stable station stone
    storm stove street sunset sweater table tailor teacher temple theater thunder tiger tomato
    tower train tunnel turtle uncle valley village violin wagon wallet walnut waterfall whale
    wheel whistle window winter wolf wool yard zebra
    """.split()  # noqa: SIM905
)
ADJECTIVES = tuple(
    """
    able ancient angry awake bitter blank bold brave brief bright broad broken busy calm careful
    cheap cheerful clean clever cold common cool crisp crooked curious damp dark dear deep
    distant dizzy double dry dull dusty eager early easy elegant empty even exact faint fair
    famous fancy fast fierce final firm flat fond foreign formal fragile frank free fresh
    friendly frozen funny gentle giant glad golden grand grateful great green grumpy happy hard
    heavy helpful hollow honest humble hungry idle jolly joyful keen kind large late lazy light
    little lively lonely long loud loyal lucky mellow mild modern modest narrow neat new noble
    noisy odd old open ordinary pale patient perfect plain pleasant polite popular precious
    proper proud quick quiet rapid rare ready rich ripe rough round royal rusty sad safe salty
    secret serious shallow sharp shiny short shy silent silver simple sleepy slow small smooth
    soft solid sour special spotless square steady steep stiff strange strict strong sudden
    sunny sweet swift tall tame tender thick thin tidy tiny tired tough tropical useful vast
    velvet vivid warm weak wealthy wet wide wild wise witty wooden worthy young
    """.split()  # noqa: SIM905
)
VERBS = tuple(
    """
    admire borrow build bury buy carry catch chase choose clean collect cook copy count cover
    describe discover draw drop enjoy examine explain explore fetch fill find fix follow forget
    gather grow guard guess hide hold ignore imagine improve invent invite join keep kick lend
    lift like lock lose love measure mend miss mix move name notice offer open order own pack
    paint pass plant polish praise prepare promise protect pull push raise reach receive
    recognize remember remove rent repair return save search sell send share sketch store study
    sweep teach throw touch trade travel trust turn understand visit watch wash weigh welcome
    wrap write
    """.split()  # noqa: SIM905
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_PATTERNS = (
    "The {a} {n} near the {m} is more {b} than anybody in the town would like to admit.",
    "Every {n} that I have seen by the {m} was {a}, and some of them were {b} as well.",
    "It is easy to {v} a {a} {n}, but it takes years to {w} the {m} behind it.",
    "People who {v} the {n} often say that a {m} is {a} only as long as it stays {b}.",
    "When the {n} became {a}, my neighbors began to {v} the {m} again.",
    "There was a time when a {a} {n} meant more to me than any {b} {m}.",
    "If you want to {v} something, start with the {n} and leave the {a} {m} for later.",
    "Nobody could {v} the {a} {n}, so we had to {w} the {m} instead.",
    "The best way to {v} a {n} is to ask somebody who has lost a {a} {m}.",
    "I used to think that the {n} was {a}, until I had to {v} one beside the {m}.",
    "A {n} is {a} because of what people do with it, not because of the {b} {m} on top.",
    "In the end the {m} and the {n} turned out to be equally {a}.",
)


def all_words() -> list[str]:
    """Every single word, each once, in a fixed order."""
    return sorted({*NOUNS, *ADJECTIVES, *VERBS})


def many_words(num: int, rng: random.Random) -> list[str]:
    """Draws `num` different words; joins pairs of nouns where the single words do not suffice.

    Raises:
      ValueError: more words than there are.
    """
    singles = all_words()
    if num <= len(singles):
        return rng.sample(singles, num)
    pairs = sorted({a + b for a in NOUNS for b in NOUNS if a != b} - set(singles))
    if num > len(singles) + len(pairs):
        raise ValueError(f"{num} different words were asked for; there are {len(pairs)}.")
    return rng.sample(singles + rng.sample(pairs, num - len(singles)), num)


def sentences(rng: random.Random) -> Iterator[str]:
    """Yields different sentences without digits, endlessly."""
    while True:
        n, m = rng.sample(NOUNS, 2)
        a, b = rng.sample(ADJECTIVES, 2)
        v, w = rng.sample(VERBS, 2)
        text = rng.choice(_PATTERNS).format(n=n, m=m, a=a, b=b, v=v, w=w)
        yield re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, with its white space as single blanks."""
    return re.split(r"(?<=[.!?]) ", " ".join(text.split()))
