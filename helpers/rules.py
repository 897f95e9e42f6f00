"""Tickets without a language model: patterns, word counts and logistic regression.

What a fine-tuned model has to beat. The patterns and the lists of words were written from the
labelling guide, from general English and by reading the train split. What to keep was decided by
cross-validation on the train split and by scores on the validation split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from helpers import CourseError
from helpers.data import FIELDS, ticket_json

Row = dict[str, Any]
Span = tuple[int, int] | None  # (start, end) in a message; None is the candidate "there is none"
Features = dict[str, float]

# -- the order number: regular expressions ---------------------------------------------------------

ORDER_WORD = r"\b(?:orders?|ordr|purchase|booking|commande|command|bestellung|pedido|zamówienie)\b"
FILLER = r"(?:[\s:#.,(]|'s\b|\b(?:no|nr|number|ref|reference|is|was|has|the|on|slip|for|it)\b)*"
NUMBER = (
    r"(?P<number>"
    r"(?:\b(?!NO|NR|IS|OF|TO)[A-Z]{1,2} )?"  # a prefix set apart: "PL 77310"
    r"\b(?=[A-Za-z./-]{0,4}\d)[A-Za-z0-9]+(?:[-./][A-Za-z0-9]+)*"  # "4471", "HK.2291.7", "k-31-77"
    r"(?: (?:\d[\d./-]*|[A-HJ-Z]\b(?!'))"  # groups: "20 931 47", "6618 Q"; not "47 I think",
    r"(?![\w:,.]*\d| ?(?:euro|EUR|[ap]m|cm|kg)\b))*"  # and not a time or a price that follows
    r")(?<![./-])(?![\w:%€£]|,\d)"
)
NAMED_BEFORE = re.compile(rf"(?i:{ORDER_WORD}{FILLER}){NUMBER}")  # "order no. 4471"
NAMED_AFTER = re.compile(  # "4471 was my order", "4471 it says on the order slip"
    rf"{NUMBER},? (?i:(?:(?:is|was|that's|on|it says on) )?(?:what )?(?:the|my|our|your|you)\b"
    rf"[^.!?]{{0,20}}{ORDER_WORD}|ordered\b)"
)
UNNAMED = re.compile(NUMBER)
LIKE_A_NUMBER = re.compile(r"\b[A-Za-z0-9]+(?:[-./][A-Za-z0-9]+)*")
LIKE_A_NUMBER = re.compile(r"\b[A-Za-z0-9]+(?:[-./][A-Za-z0-9]+)*")
NAMED_OTHERWISE = re.compile(  # "tracking 4471", "my customer number is 4471"
    r"(?i)(?:track|parcel|invoice|case|ticket|return n|member|customer|phone|number,|ring|code"
    r"|voucher|card|serial|batch|lot|article|receipt n|delivery note|near)\w*\W+(?:\w+\W+){0,3}$"
)
SHAPED_OTHERWISE = re.compile(  # a price, two kinds of date, a size, a phone number
    r"\d+[.,]\d\d|\d{1,2}/\d{2,4}|\d{1,2}\.\d{1,2}\.\d{2,4}|\d+x\d+|0\d{3,4} [\d ]+"
)


def order_by_patterns(message: str) -> str | None:
    """A number that is named an order, or else one that nothing speaks against."""
    for pattern in (NAMED_BEFORE, NAMED_AFTER):
        for match in pattern.finditer(message):
            if len(match["number"]) >= 4:
                return match["number"]
    for match in UNNAMED.finditer(message):
        number = match["number"]
        long = len(number) >= 5 and sum(c.isdigit() for c in number) >= 3
        otherwise = NAMED_OTHERWISE.search(message[: match.start()])
        if long and not otherwise and not SHAPED_OTHERWISE.fullmatch(number):
            return number
    return None


def order_candidates(message: str) -> list[Span]:
    """None, and every place where an order number may stand."""
    spans = {match.span() for match in LIKE_A_NUMBER.finditer(message)}
    for pattern in (NAMED_BEFORE, NAMED_AFTER, UNNAMED):
        spans |= {match.span("number") for match in pattern.finditer(message)}
    return [None, *sorted(s for s in spans if re.search(r"\d", message[slice(*s)]))]


# -- the product -----------------------------------------------------------------------------------

# Frequent words that name no product or that the guide rules out, without their apostrophes.
NO_PRODUCT = """
a about account after afternoon again all already also although always am an and another answer
any app are arrive arrived arrives arriving as ask asked at away back be because been beeps before
bent between bigger billed booking both bought breaks broke broken burn burned burns burnt burst
but buy buying by call came can cancel cancelled cant charge charged charges cheap clean close
closed closes come comes coming cost costs could crack cracked cracks creak creaks cut cuts
damaged day days dead dear deliver delivered delivery did didnt died dies do does doesnt dont each
else enough eur euro euros evening ever every exact exchange expensive extra fall falls feel fell
few find first fit fits fitted flickers for found from gave get give given gives go goes going
gone good goods got had has hasnt hate hates have havent he heats hello help her here hes hi him
his hiss hisses how hums hurt i id if ill im in instead into invoice is isnt it item its ive jam
jammed jams just keep keeps kept kindly know lack lacks last late leak leaked leaking leaks leave
leaves let lets like liked look looks lost love loved lovely madam made make makes many may maybe
me might missing more morning most much must my need needed needs never new newsletter next nice
no none not nothing now nr number of off old on once only open opens or order ordered ordering
orders other our out over own package paid parcel password pay percent please pls pm product
promised purchase put quite rattles really refund refunded reply return returned returns right
said same say says second see seem seems sell sells send sent several shall she shes ship shipped
ships shop should show showed shows since sir smaller smashed smell smells smoke smokes smoking so
some spark sparking sparks split squeaks start started starts still stolen stop stopped stops
stuff such suits swap take taken takes team tell than thank thanks that thats the their them there
theres these they theyre thing think this those though through till to today told tomorrow tonight
too took tore torn turn turned turns twice u under unopened until unused up ur urgent us use used
uses very vibrates wait waiting want wanted wants was wash we website week weeks went were what
whatever whats when whenever where wheres which while who whole why will with without wobble
wobbles wont work worked working works would wrong yesterday yet you your youre
"""
RULED_OUT = frozenset(NO_PRODUCT.split())
TOKEN = re.compile(r"\w+(?:[-'’./&]\w+)*|[^\w\s]")


def ruled_out(word: str) -> bool:
    """Whether a word cannot stand in the name of a product."""
    return re.sub("['’]", "", word.lower()) in RULED_OUT


def product_candidates(message: str) -> list[Span]:
    """None, and every run of one to six words of which none is ruled out."""
    spans: list[Span] = [None]
    tokens = list(TOKEN.finditer(message))
    for index, first in enumerate(tokens):
        end = first.start()
        for token in tokens[index : index + 6]:
            joined = message[end : token.start()] in ("", " ")
            if not joined or not token[0][0].isalnum() or ruled_out(token[0]):
                break
            end = token.end()
            spans.append((first.start(), end))
    return spans


# -- one of several candidates ---------------------------------------------------------------------

WORD = re.compile(r"[^\W\d]+(?:['’-]\w+)*|\d[\w./-]*|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and punctuation, any number as "0"."""
    return ["0" if word[0].isdigit() else word for word in WORD.findall(text)]


def kind(word: str) -> str:
    """What can be seen of a word without knowing it."""
    if not word[0].isalnum():
        return "edge" if word in "^$" else "."
    if ruled_out(word):
        return "frequent"
    return "0" if word[0].isdigit() else "Name" if word[0].isupper() else "word"


def features(message: str, span: Span, order: str | None) -> Features:
    """What speaks for or against a candidate: the words in and beside it, and their kinds.

    `order` is what the patterns take for the order number. It counts three times, so that few rows
    do not overrule it.
    """
    if span is None:
        found = {f"none beside {word.lower()}" for word in words(message)}
        return dict.fromkeys(found, 1.0) | {"none": 1.0, "by patterns": 3.0 * (order is None)}
    text = message[slice(*span)]
    inside = words(text)
    before = ["^", *words(message[: span[0]])][-1]
    after = [*words(message[span[1] :]), "$"][0]
    found = {
        f"{len(inside)} words",
        f"written {re.sub('[0-9]', '9', text)}",
        f"kinds {' '.join(map(kind, inside))}, first: {before in '^.!?:'}",
        f"kinds beside {kind(before)} {kind(after)}",
    }
    found |= {f"has {word.lower()}" for word in inside}
    for place, word in (("before", before), ("last", inside[-1]), ("after", after)):
        found |= {f"{place} {kind(word)}", f"{place} {word.lower()}"}
        found |= {f"{place} ends with {word.lower()[-n:]}" for n in (2, 3)}
    return dict.fromkeys(found, 1.0) | {"by patterns": 3.0 * (text == order)}


class Chooser:
    """Choose one of a message's candidates: logistic regression over the candidates of a message.

    A candidate's score is a weighted sum of its features. Softmax makes probabilities of the scores
    of all candidates of one message; training makes the right ones likely.
    """

    PENALTY = 0.1  # on large weights

    def __init__(self, candidates: Callable[[str], list[Span]]) -> None:
        self.candidates = candidates

    def _describe(self, message: str) -> tuple[list[str | None], list[Features]]:
        spans = self.candidates(message)
        order = order_by_patterns(message)
        texts = [None if span is None else message[slice(*span)] for span in spans]
        return texts, [features(message, span, order) for span in spans]

    def fit(self, messages: Sequence[str], answers: Sequence[str | None]) -> Chooser:
        """Learn from messages and their answers, leaving out answers that are no candidates."""
        from scipy.optimize import minimize
        from sklearn.feature_extraction import DictVectorizer

        described: list[Features] = []
        right, sizes = [], []
        for message, answer in zip(messages, answers, strict=True):
            texts, found = self._describe(message)
            if answer in texts:
                right.append(len(described) + texts.index(answer))
                sizes.append(len(found))
                described += found
        self.vectorizer = DictVectorizer()
        table = self.vectorizer.fit_transform(described)
        starts = np.cumsum([0, *sizes[:-1]])

        def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
            scores = table @ weights
            scores = np.exp(scores - np.repeat(np.maximum.reduceat(scores, starts), sizes))
            probabilities = scores / np.repeat(np.add.reduceat(scores, starts), sizes)
            loss = -np.log(probabilities[right]).sum() + self.PENALTY / 2 * weights @ weights
            probabilities[right] -= 1
            return loss, table.T @ probabilities + self.PENALTY * weights

        start = np.zeros(table.shape[1])
        self.weights = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B").x
        return self

    def choose(self, message: str) -> str | None:
        """The candidate with the highest score."""
        texts, found = self._describe(message)
        return texts[int(np.argmax(self.vectorizer.transform(found) @ self.weights))]


# -- category and urgency --------------------------------------------------------------------------

# Regular expressions, set apart by spaces; "_" stands for a space, and see SHORTHANDS below.
SIGNS = {
    "delivery": r"""NOT_(yet_)?(been_)?(come|came|arrived?|turned_up|shown?_up|left|moved?|here)
        received deliver\w* courier driver postman tracking transit dispatch\w* on_(its|the)_way
        where_?(is|are|'s) (still|been)_waiting lost_in nowhere late stuck depot redirect
        neighbou?r add?ress doorstep reach(es)?_(us|me) get_here only_\w+_(\w+_)?(came|arrived)
        will_\w+_(\w+_)?(come|arrive|ship) eta when_(does|will) \w+_missing missing_one""",
    "billing": r"""(over)?charged? charg(es|ing) bill(ed|ing)? refund\w* invoice\w* receipt\w* vat
        tax price\w* discount coupon voucher codes? promo\w* gift_cards? payments? checkout
        debited euros? eur pounds? quid paid pay postage fees? owed took cost money bank balance
        instal?lments? cheaper""",
    "return": r"""return_(label|it|this|these|them|window) send_\w+_(\w+_)?back send_back
        take_(it_)?back goes?_back give_(it|them)_back
        wrong_(colou?r|size|shade|model|thing|one|item|kind) by_mistake
        too_(?!many|much|late|few)\w+ chang\w+_(my|our)_mind swap\w* exchang\w* cancel instead_of
        rather_than (do|does|did|is)_?n'?t_(want|like|need|fit|wanted|suit|go_with) (not|un)wanted
        duplicate already_(has|have|owns?|got) (ordered|wanted|asked_for)_(a_|an_|the_)?\w+
        (bigger|smaller)_one a_size""",
    "defect": r"""broken? crack\w* leak\w* drip\w* stop(s|ped) dead died
        dies smok(e|es|ing) spark\w* torn tore tears rip(s|ped) snap(s|ped) split dent(ed)?
        scratch\w* smashed shattered chip(s|ped)? (fell|falls|came|comes|fallen)_(off|apart|out)
        does_?n'?t wo_?n'?t burn\w* smell\w* fault\w* wobbl\w* err errors? loose rust\w* creak\w*
        squeak\w* rattl\w* crackl\w* peel\w* frayed fad(ed|es|ing) melt\w* shock damaged
        without_(its|the|instructions) went_(dead|silent) defect\w* bent jams? jammed hole
        overheat\w* flicker\w* no_longer dried useless missing_from screws?""",
    "account": r"""accounts? log_?in log-in logg(ed|ing) sign(ed|ing)?_in locked_out passwords?
        reset profile newsletters? text(s|ing) membership member_since (personal|my|your)_data
        unsubscribe\w* mailing_list surname birth_(date|day) user_?name e-?mails? mails hack\w*
        points delete privacy registered stored?""",
    "question": r"""(is|are|can|does|do|how|what|which|will|would|should|may)_[^.!,]*\?
        suggestions? thanks?(_you)? praise (wanted|want)_to_say saying love[ds]? in_stock
        how_(long|many|do|should|much|often) which what_(size|age|kind|colou?r)
        do_you_(have|sell|stock) suits? open compatible recommend advise difference""",
    "deadline": r"""today tonights? tonite to?mm?orr?ow
        this_(afternoon|evening|morning|minute|moment|week) midnight noon (right|just)_now
        (on|by|before|until|till|this|is|for)_(the_|this_|next_)?DAY
        (two|three|0|a_few|an?)_(days|hours?) by_0 at_0_?pm weekend""",
    "danger": r"""smok(e|es|ing) spark\w* shocks? burn\w* fire flames? gas leak\w* cut bleed\w*
        blood rash swell\w* swollen chok\w* allerg\w* hot fumes explod\w* injur\w* poison\w* dizzy
        vomit\w* hospital sharp flood\w*""",
    "intruder": r"""somebody someone strangers? hack\w* (unknown|other)_person thief he_is
        as_i_(type|speak|write) stolen taken_over""",
    "need": r"""bab(y|ies) newborn infant toddlers? insulin wheelchair heating cooking formula
        sick ill disabled medic\w* (stands?|standing)_still without_(it|them) no_other
        can_?n?'?t_(walk|work|eat|hear|see|sleep) hungry has_nothing have_nothing""",
    "patience": r"""(no|not|without|zero|any|is_?n'?t|nothing|never|do_?n'?t|low)_(\w+_){0,3}HURRY
        whenever when_(you|u|someone|things|it_suits|convenient)
        (at|in)_(your|ur)_(\w+_)?(leisure|convenience|time)
        (take|takes|taking)_(\w+_)?(your|ur|the|as)_(time|long)
        (can|could|may|will|happy_to)_(\w+_)?wait some_?(day|time) one_(of_these_days|day)
        eventually curi(ous|osity) any_?time do_?n'?t_mind in_due_course""",
}
SHORTHANDS = {
    "NOT": "(not|never|no|(ha[sd]|have|did|does|is|are|wo)_?n'?t)",
    "DAY": "(mon|tues|wednes|thurs|fri|satur|sun)day",
    "HURRY": "(rush|hurry|hurried|haste|stress|urgen\\w*|press(es|ing|ure)|important|deadline"
    "|priority|worry|worries|bothered|matter)",
    "_": " ",
}


def _compile(patterns: str) -> re.Pattern[str]:
    text = "|".join(patterns.split())
    for short, long in SHORTHANDS.items():
        text = text.replace(short, long)
    return re.compile(rf"\b(?:{text})(?!\w)")


PATTERNS = [_compile(patterns) for patterns in SIGNS.values()]


def simplify(message: str) -> str:
    """Lower case, every digit a 0."""
    return re.sub(r"\d", "0", message.lower().replace("’", "'"))


def signs_in(messages: Iterable[str]) -> np.ndarray:
    """(messages, signs): 1 where a message has a sign, otherwise 0."""
    simple = map(simplify, messages)
    return np.array([[float(bool(p.search(text))) for p in PATTERNS] for text in simple])


# -- the ticket ------------------------------------------------------------------------------------


class Rules:
    """Patterns, and what was learned from labelled rows."""

    @classmethod
    def fit(cls, rows: Iterable[Row]) -> Rules:
        """Learn from labelled rows, in seconds. The same rows always give the same rules.

        Raises:
            CourseError: scikit-learn is missing.
        """
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline, make_union
            from sklearn.preprocessing import FunctionTransformer
        except ImportError as error:
            raise CourseError(
                "The rules need scikit-learn, which is not installed. Run: pip install scikit-learn"
            ) from error
        rows = list(rows)
        messages = [row["message"] for row in rows]
        values = {name: [row[name] for row in rows] for name in FIELDS}
        rules = cls()
        rules.choosers = {
            "product": Chooser(product_candidates).fit(messages, values["product"]),
            "order": Chooser(order_candidates).fit(messages, values["order"]),
        }
        rules.classifiers = {}
        counts: dict[str, Any] = {"preprocessor": simplify, "sublinear_tf": True}
        for field in ("category", "urgency"):
            views = make_union(
                TfidfVectorizer(token_pattern=r"\w[\w']*", ngram_range=(1, 2), **counts),
                TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **counts),
                FunctionTransformer(signs_in),
            )
            classifier = make_pipeline(views, LogisticRegression(C=10, max_iter=1000))
            rules.classifiers[field] = classifier.fit(messages, values[field])
        return rules

    def answer(self, messages: Sequence[str]) -> list[str]:
        """The ticket of each message, as JSON in the form of the reference answers."""
        category, urgency = self.classifiers["category"], self.classifiers["urgency"]
        probabilities = zip(
            category.predict_proba(messages), urgency.predict_proba(messages), strict=True
        )
        tickets = []
        for message, (of_category, of_urgency) in zip(messages, probabilities, strict=True):
            pairs = {
                (c, u): p * q
                for c, p in zip(category.classes_, of_category, strict=True)
                for u, q in zip(urgency.classes_, of_urgency, strict=True)
                if (c, u) != ("question", "normal")  # by the guide a question is low or high
            }
            ticket = dict(zip(("category", "urgency"), max(pairs, key=pairs.get), strict=True))
            ticket |= {field: chooser.choose(message) for field, chooser in self.choosers.items()}
            tickets.append(ticket_json(ticket))
        return tickets
