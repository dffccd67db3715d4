"""`WordTokenizer`: a vocabulary of a few words as plain data, for text towers far smaller than their usual ones."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PAD, START, FIRST_WORD = 0, 1, 2
_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def vocabulary_of(texts: Iterable[str]) -> list[str]:
    """The words of some texts, each once, in alphabetical order.

    Example:
        >>> vocabulary_of(["a red wing", "A bird, with a wing-bar."])
        ['a', 'bar', 'bird', 'red', 'wing', 'with']
    """
    return sorted({word for text in texts for word in words_of(text)})


class WordTokenizer:
    """Numbers words. The tokenizers of CLIP models know 49,408 pieces of words, whose embeddings alone take millions.

    A sentence becomes a start token, its words, an end token (the largest number, where CLIP reads the text embedding
    off), and padding. As with CLIP, words beyond ``context_length`` are cut off, and the end token is kept.

    Args:
        vocabulary: The words, in lower case, each once; see `vocabulary_of`.
        context_length: Tokens a sentence, start and end included.

    Attributes:
        size: Number of different tokens: the words, start, end and padding.

    Raises:
        ValueError: The vocabulary is empty, has a repeated word or something that is no single word, or
            ``context_length`` leaves no room for one.

    Example:
        >>> tokenizer = WordTokenizer(["a", "red", "wing"], context_length=6)
        >>> tokenizer(["A red wing.", "wing"])
        tensor([[1, 2, 3, 4, 5, 0],
                [1, 4, 5, 0, 0, 0]])
    """

    def __init__(self, vocabulary: Sequence[str], context_length: int) -> None:
        if isinstance(vocabulary, str) or not vocabulary:
            raise ValueError(f"vocabulary: expected a list of at least one word, got {vocabulary!r}")
        if wrong := [word for word in vocabulary if not isinstance(word, str) or words_of(word) != [word]]:
            raise ValueError(f"vocabulary: expected single words in lower case, got {wrong[:5]}; see vocabulary_of")
        if len(set(vocabulary)) < len(vocabulary):
            repeated = sorted({word for word in vocabulary if list(vocabulary).count(word) > 1})
            raise ValueError(f"vocabulary: each word may come once, repeated are {repeated[:5]}")
        if context_length < 3:
            raise ValueError(f"context_length: expected at least 3 (start, a word, end), got {context_length}")
        self.context_length = context_length
        self.size = FIRST_WORD + len(vocabulary) + 1
        self._number = {word: FIRST_WORD + i for i, word in enumerate(vocabulary)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``[N, context_length]`` token numbers of ``N`` texts; words that the vocabulary lacks are left out."""
        tokens = torch.full((len(texts), self.context_length), PAD)
        for row, text in zip(tokens, texts, strict=True):
            known = [self._number[word] for word in words_of(text) if word in self._number]
            line = [START, *known[: self.context_length - 2], self.size - 1]
            row[: len(line)] = torch.tensor(line)
        return tokens

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """The words of some texts that the vocabulary lacks, each once."""
        return [word for word in vocabulary_of(texts) if word not in self._number]

    def describe_unknown(self, texts: Iterable[str]) -> str | None:
        """A line about the words that the vocabulary lacks, with near matches; None if it has them all."""
        unknown = self.unknown(texts)
        if not unknown:
            return None
        near = difflib.get_close_matches(unknown[0], self._number, n=2)
        hint = f" (near {unknown[0]!r}: {near})" if near else ""
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        return f"the vocabulary of {len(self._number)} words lacks {unknown[:5]}{more}{hint}"
