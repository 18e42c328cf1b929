"""How like several references texts are: the five scores of the E2E NLG Challenge.

As its script measures them (github.com/tuetschek/e2e-metrics): BLEU and NIST by mteval-v13a, in
lower case; the others by the MS-COCO caption evaluation. BLEU is sacrebleu's. The others are here:
nltk's NIST counts against the one reference that suits an output best, not against all of them (in
our test 4.71 where the script says 5.26), and fails on outputs of less than five words; rouge-score
has another F-measure; pycocoevalcap, which has ROUGE-L and CIDEr, brings 100 MB of Java.
"""

import importlib
import math
import operator
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

import sacrebleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

Tokens = list[str]


def nlg_metrics(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of a corpus: "bleu", "nist", "rouge_l", "cider", and "meteor" where it is installed.

    BLEU, ROUGE-L and METEOR in %, 100 for an output that is one of its references; NIST and CIDEr
    have no such bound. 0 for an output that shares no word with them, and for an empty one.
    BLEU is not smoothed: without a common sequence of four words in the whole corpus it is 0.

    Args:
        outputs: one text for each thing to say.
        references: for each output at least one text, of people.

    Raises:
        ValueError: no outputs, another number of references, an output without any.
    """
    if not outputs or len(outputs) != len(references) or not all(references):
        raise ValueError(
            f"{len(outputs)} outputs and references for {sum(map(bool, references))} of them, "
            "expected at least one output, and one reference or more for each"
        )
    streams: Any = [*zip_longest(*references)]
    bleu = sacrebleu.corpus_bleu(outputs, streams, lowercase=True, smooth_method="none").score
    mteval = _tokenized(outputs, references, mteval_tokens)
    coco = _tokenized(outputs, references, coco_tokens)
    scores = {
        "bleu": bleu,
        "nist": nist(*mteval),
        "rouge_l": 100 * rouge_l(*coco),
        "cider": cider(*coco),
    }
    return scores | ({"meteor": 100 * meteor(*coco)} if has_meteor() else {})


def _tokenized(outputs, references, tokens) -> tuple[list[Tokens], list[list[Tokens]]]:
    return [tokens(text) for text in outputs], [
        [tokens(text) for text in texts] for texts in references
    ]


def mteval_tokens(text: str) -> Tokens:
    """Words and punctuation, in lower case, as mteval-v13a has them: "it's", "£20", ","."""
    return _MTEVAL(text.lower()).split()


def coco_tokens(text: str) -> Tokens:
    """Words in lower case, as the MS-COCO evaluation has them: no punctuation, "it 's", "do n't".

    Its tokenizer is Stanford's, in Java. Of the 4,693 references in E2E's test split this one
    splits 6 in another way ("city center., near"); and there a pound sign becomes "#".
    """
    parts = _CLITIC.sub(r" \1", text.lower())
    return [token for token in _WORD.findall(parts) if token not in _PUNCTUATION]


_MTEVAL = Tokenizer13a()
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
_WORD = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:(?:[-./']|(?<=\d),(?=\d))\w+)*|[^\w\s]")
_PUNCTUATION = set("'`.?!,:-;\"()[]{}")


def _ngrams(tokens: Tokens, n: int) -> Counter:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def nist(outputs: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Doddington (2002), n = 1 .. 5: matches weighted by what they tell.

    sum_n (sum of info over the n-grams found in a reference) / (number of n-grams), times a penalty
    of outputs shorter than the mean reference; info(w_1 .. w_n) = log2(count(w_1 .. w_{n-1}) /
    count(w_1 .. w_n)) over all references.
    """
    counts = Counter()
    for reference in (each for texts in references for each in texts):
        counts[()] += len(reference)
        for n in range(1, 6):
            counts.update(_ngrams(reference, n))
    score = 0.0
    for n in range(1, 6):
        information, total = 0.0, 0
        for output, texts in zip(outputs, references, strict=True):
            own = _ngrams(output, n)
            # an n-gram counts as often as in the reference that has most of it
            hits = own & reduce(operator.or_, (_ngrams(text, n) for text in texts))
            information += sum(k * math.log2(counts[g[:-1]] / counts[g]) for g, k in hits.items())
            total += own.total()
        score += information / total if total else 0.0
    length = sum(map(len, outputs))
    expected = sum(sum(map(len, texts)) / len(texts) for texts in references)
    if not length or length >= expected:
        return score
    # half the score at two thirds of the length
    return score * 0.5 ** ((math.log(length / expected) / math.log(1.5)) ** 2)


def rouge_l(outputs: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Mean over outputs of the F-measure of the longest common subsequence, beta = 1.2.

    Precision and recall are each the best over the references, as in the MS-COCO evaluation.
    """
    beta2, scores = 1.2**2, []
    for output, texts in zip(outputs, references, strict=True):
        common = [_longest_common(output, text) for text in texts]
        if not any(common):
            scores.append(0.0)
            continue
        precision = max(common) / len(output)
        recall = max(c / len(text) for c, text in zip(common, texts, strict=True) if c)
        scores.append((1 + beta2) * precision * recall / (recall + beta2 * precision))
    return sum(scores) / len(scores)


def _longest_common(a: Tokens, b: Tokens) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for i, y in enumerate(b):
            row.append(before[i] + 1 if x == y else max(before[i + 1], row[i]))
    return row[-1]


def cider(outputs: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """CIDEr-D (Vedantam et al., arXiv 1411.5726), 0 to 10: cosines of tf-idf vectors, n = 1 .. 4.

    A word that every output's references have tells nothing; so a single output scores 0.
    """
    frequency = Counter()
    for texts in references:
        frequency.update({g for text in texts for n in range(1, 5) for g in _ngrams(text, n)})

    def weights(tokens: Tokens, n: int) -> dict:
        counts = _ngrams(tokens, n).items()
        return {g: k * math.log(len(outputs) / max(1, frequency[g])) for g, k in counts}

    def similarity(output: Tokens, text: Tokens) -> float:
        total = 0.0
        for n in range(1, 5):
            own, other = weights(output, n), weights(text, n)
            norm = math.hypot(*own.values()) * math.hypot(*other.values())
            # clipped: a word said more often than in the reference gains nothing
            product = sum(min(own[g], other[g]) * other[g] for g in own.keys() & other.keys())
            total += product / norm if norm else 0.0
        return total / 4 * math.exp(-((len(output) - len(text)) ** 2) / (2 * 6.0**2))

    scores = [
        sum(similarity(output, text) for text in texts) / len(texts)
        for output, texts in zip(outputs, references, strict=True)
    ]
    return 10 * sum(scores) / len(scores)


def has_meteor() -> bool:
    """Whether METEOR 1.5 is here: Java, and the package pycocoevalcap, which brings it."""
    return shutil.which("java") is not None and find_spec("pycocoevalcap") is not None


def meteor(outputs: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """METEOR 1.5 of the corpus, 0 to 1, by its authors' program. Needs `has_meteor`."""
    scorer = importlib.import_module("pycocoevalcap.meteor.meteor").Meteor()
    texts = {i: [" ".join(each) for each in group] for i, group in enumerate(references)}
    own = {i: [" ".join(each)] for i, each in enumerate(outputs)}
    return float(scorer.compute_score(texts, own)[0])
