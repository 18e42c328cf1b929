"""The scores of generated texts: by hand on tiny corpora, and as the E2E Challenge's tools give."""

import math
import shutil

import pytest
import sacrebleu

from train.tasks import nlg_metrics as metrics
from train.tasks.nlg_metrics import cider, coco_tokens, has_meteor, mteval_tokens, nist, rouge_l

A, B, C = "abcd", "abxy", "efgh"  # texts of four one-letter words


@pytest.fixture(autouse=True)
def no_meteor(monkeypatch):
    """Java takes seconds to start; its own test brings it back."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_words_are_those_of_both_evaluations():
    sentence = "It's a kids-friendly café, £20-25 (not cheap). Don't  go!"
    expected = "it's a kids-friendly café , £20 - 25 ( not cheap ) . don't go !"
    assert mteval_tokens(sentence) == expected.split()
    for text, words in (
        (sentence, "it 's a kids-friendly café £ 20-25 not cheap do n't go"),
        ("1,000 seats,near 3.5 stars; the cat's", "1,000 seats near 3.5 stars the cat 's"),
    ):
        assert coco_tokens(text) == words.split()


def test_nist_by_hand():
    # counts: all 4, a 2, b 1, c 1, ab 1, ac 1; so a tells 1 bit, b 2, ab 1
    assert nist(["ab"], [["ab", "ac"]]) == pytest.approx((1 + 2) / 2 + 1 / 1)
    # two a's in one reference: both count; the third does not. a: log2(4 / 3) bits; aa: log2 3
    information = 2 * math.log2(4 / 3) / 3 + math.log2(3) / 2
    assert nist(["aaa"], [["aa", "ab"]]) == pytest.approx(information)
    # half for two thirds of the length. a: log2(3 / 2) bits; 1.5 words on average
    assert nist(["a"], [["ab", "a"]]) == pytest.approx(math.log2(3 / 2) / 2)
    longer = nist(["azz"], [["ab", "a"]])
    assert longer == pytest.approx(math.log2(3 / 2) / 3)  # no reward, no penalty


def test_rouge_l_by_hand():
    assert rouge_l([A], [["acdx"]]) == pytest.approx(0.75)  # a c d of four, both ways
    # precision 3/4 by the first, recall 1 by the second
    both = 2.44 * 0.75 / (1 + 1.44 * 0.75)
    assert rouge_l([A], [["acdx", "bd"]]) == pytest.approx(both)
    assert rouge_l([A, C], [["acdx", "bd"], [A]]) == pytest.approx(both / 2)  # the mean
    assert rouge_l(["dcba"], [[A]]) == pytest.approx(0.25)  # in order


def test_cider_by_hand():
    assert cider([A, C], [[A], [C]]) == pytest.approx(10)
    # all words equally rare. Common are 2 of 4 words, 1 of 3 pairs, and nothing longer
    partly = 10 * (2 / 4 + 1 / 3) / 4
    assert cider([A, C], [[B], [C]]) == pytest.approx((partly + 10) / 2)
    assert cider([A, C], [[B, A], [C]]) == pytest.approx(((partly + 10) / 2 + 10) / 2)


def test_cider_of_another_length_and_of_repeated_words():
    # 4/5 of the words' norm, and so on; sigma is 6
    longer = sum(math.sqrt(n / (n + 1)) for n in (4, 3, 2, 1)) / 4 * math.exp(-1 / 72)
    # z is in no reference: it has the weight of a word in one of them
    assert cider([[*A, "z"], C], [[A], [C]]) == pytest.approx((10 * longer + 10) / 2)
    # clipped: of three a's one counts. The vectors (3) and (1, 1) of words, nothing longer
    repeated = 10 / 4 * 1 / (3 * math.sqrt(2)) * math.exp(-1 / 72)
    assert cider(["aaa", C], [["ab"], [C]]) == pytest.approx((repeated + 10) / 2)
    # words of every reference tell nothing
    assert cider([A], [[A]]) == cider([A, A], [[A], [A]]) == 0


OUTPUTS = [
    "The Mill is a cheap pub, near Café Sicilia. It isn't family-friendly.",
    "Cotto serves Italian food for £20-25 in the city centre.",
    "There is a coffee shop called Zizzi by the river.",
]
REFERENCES = [
    [
        "The Mill is a cheap pub near Café Sicilia; it is not family-friendly.",
        "Near Café Sicilia there's a cheap pub, The Mill. Families aren't welcome.",
    ],
    ["In the city centre, Cotto serves Italian food. Prices are £20-25."],
    [
        "Zizzi is a coffee shop by the river.",
        "By the river you find Zizzi, a coffee shop.",
        "A coffee shop called Zizzi is by the river with a 5 out of 5 rating.",
    ],
]
# by the challenge's pymteval, and by pycocoevalcap 1.2 after Stanford's tokenizer
CHALLENGE = {
    "bleu": 53.33533340626671,
    "nist": 5.2639252556889495,
    "rouge_l": 76.11272769556729,
    "cider": 4.971223843821303,
}
METEOR = 50.69232691390597


@pytest.mark.claim("scores are those of the challenge")
@pytest.mark.control("scores are those of the challenge")
def test_they_are_those_of_the_challenge():
    expected = CHALLENGE
    assert metrics.nlg_metrics(OUTPUTS, REFERENCES) == pytest.approx(expected, rel=1e-9)
    # neither case nor the order of references matters to any
    shouted = [text.upper() for text in OUTPUTS]
    turned = [texts[::-1] for texts in REFERENCES]
    assert metrics.nlg_metrics(shouted, turned) == pytest.approx(expected, rel=1e-9)
    # control: with the first reference alone all are others
    alone = metrics.nlg_metrics(OUTPUTS, [texts[:1] for texts in REFERENCES])
    assert all(abs(alone[name] / value - 1) > 1e-3 for name, value in expected.items())


def test_extremes():
    same = [texts[-1] for texts in REFERENCES]
    best = metrics.nlg_metrics(same, REFERENCES)
    assert best["bleu"] == pytest.approx(100) and best["rouge_l"] == pytest.approx(100)
    only = metrics.nlg_metrics(same, [[text] for text in same])
    assert only["cider"] == pytest.approx(10)
    unended = [[text.strip(".") for text in texts] for texts in REFERENCES]
    for nothing in ("qq ww rr tt zz", "", "!!!"):
        scores = metrics.nlg_metrics([nothing] * 3, unended)
        assert scores == dict.fromkeys(scores, 0.0)
    one_empty = metrics.nlg_metrics(["", *OUTPUTS[1:]], REFERENCES)
    whole = metrics.nlg_metrics(OUTPUTS, REFERENCES)
    assert all(0 < one_empty[name] < value for name, value in whole.items())
    # BLEU is not smoothed, as sacrebleu does by default
    outputs, texts = ["the mill by the sea"], [["the mill in the town"]]
    assert metrics.nlg_metrics(outputs, texts)["bleu"] == 0
    assert sacrebleu.corpus_bleu(outputs, [texts[0]]).score > 5


@pytest.mark.parametrize("outputs, references", [([], []), (["a"], []), (["a", "b"], [["a"], []])])
def test_outputs_without_references_are_refused(outputs, references):
    with pytest.raises(ValueError, match=f"{len(outputs)} outputs and references for"):
        metrics.nlg_metrics(outputs, references)


def test_meteor_is_absent_without_java():
    assert not has_meteor()
    assert "meteor" not in metrics.nlg_metrics(OUTPUTS, REFERENCES)


@pytest.mark.full
def test_meteor_is_its_authors(monkeypatch):
    monkeypatch.undo()
    if not has_meteor():
        pytest.skip("needs Java and pip install pycocoevalcap")
    scores = metrics.nlg_metrics(OUTPUTS, REFERENCES)
    assert scores["meteor"] == pytest.approx(METEOR, rel=1e-6)
    same = [texts[0] for texts in REFERENCES]
    assert metrics.nlg_metrics(same, REFERENCES)["meteor"] == pytest.approx(100)
