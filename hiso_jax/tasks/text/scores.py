"""Scores of answers: macro-F1 of labels, exact match and F1 of spans, ROUGE of summaries."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def macro_f1(predicted: Int[np.ndarray, "n"], labels: Int[np.ndarray, "n"], classes: int) -> float:
    """The mean over the classes of F1 = 2·TP / (2·TP + FP + FN); a class that never occurs counts zero."""
    scores = []
    for label in range(classes):
        hits = np.sum((predicted == label) & (labels == label))
        missed = np.sum(predicted == label) + np.sum(labels == label)
        scores.append(2 * hits / missed if missed else 0.0)
    return float(np.mean(scores))


def normalized(text: str) -> str:
    """The text in SQuAD's normal form (arXiv 1606.05250): lower case, no punctuation, articles or extra white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, golden: Sequence[str]) -> float:
    """1.0 if the answer equals a golden answer, both normalised, else 0.0."""
    return float(any(normalized(answer) == normalized(gold) for gold in golden))


def token_f1(answer: str, golden: Sequence[str]) -> float:
    """The best F1 of the answer's words against the words of a golden answer, both normalised."""

    def against(gold: str) -> float:
        ours, theirs = normalized(answer).split(), normalized(gold).split()
        if not ours or not theirs:
            return float(ours == theirs)
        shared = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * shared / (len(ours) + len(theirs))

    return max(map(against, golden))


def rouge(answers: Sequence[str], golden: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F-measures (Lin, 2004), each against the best golden text, with stemming.

    Raises:
      ValueError: the package ``rouge-score`` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise ValueError("xsum needs the packages of the extra lm: pip install '.[lm]'") from error
    names = ("rouge1", "rouge2", "rougeL")
    if not answers:
        return dict.fromkeys(names, 0.0)
    scorer = RougeScorer(names, use_stemmer=True)
    best = [scorer.score_multi(list(gold), answer) for answer, gold in zip(answers, golden, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in best])) for name in names}
