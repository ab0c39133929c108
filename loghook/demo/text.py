"""The text: what every CPython carries, cut into passages, some of them held out."""

import importlib.util
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loghook.demo.config import DemoConfig
from loghook.errors import ConfigError


@dataclass(frozen=True)
class Document:
    """A text and its topic; several documents may share one."""

    topic: str
    text: str


@dataclass(frozen=True)
class Passage:
    """A piece of a document, as the model is trained on it."""

    data_id: str  # "topic#number", what the log knows it by
    topic: str  # of its document
    text: str  # what it says; a topic's passages, joined in order, give its documents back
    tokens: tuple[int, ...]  # its ids, with the start token in front where the tokenizer has one


@dataclass(frozen=True)
class Split:
    """Passages to fine-tune on, and groups of held-out ones to ask about: (topic, passages)."""

    train: tuple[Passage, ...]
    groups: tuple[tuple[str, tuple[Passage, ...]], ...]

    @property
    def queries(self) -> tuple[Passage, ...]:
        """Every group's passages, one group after the other."""
        return tuple(passage for _, passages in self.groups for passage in passages)


def library_source(limit: int) -> list[str]:
    """Source of the standard library's top-level modules, by name, until ``limit`` characters are reached."""
    folder, texts, size = Path(sysconfig.get_path("stdlib")), [], 0
    for file in sorted(folder.glob("*.py")):
        texts.append(file.read_text("utf-8", errors="replace"))
        size += len(texts[-1])
        if size >= limit:
            break
    if not texts:
        raise ConfigError(
            f"{folder} holds no .py files, and the demo pre-trains on them: use a Python that comes with its library's "
            "source, or pass a model and a dataset."
        )
    return texts


def language_reference() -> list[Document]:
    """Python's language reference as ``help()`` shows it, one document a topic."""
    if importlib.util.find_spec("pydoc_data.topics") is None:
        raise ConfigError("this Python has no pydoc_data.topics to fine-tune on: pass a model and a dataset.")
    from pydoc_data.topics import topics

    return [Document(topic, text) for topic, text in sorted(topics.items())]


def train_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A byte-level BPE tokenizer (``PreTrainedTokenizerFast``) with a start and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>")


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Ids of a text, without special tokens, and where each begins in it."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} is no fast tokenizer, and passages are cut at tokens' places in the text: "
            "choose a model with a tokenizer.json."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], [begin for begin, _ in encoded["offset_mapping"]]


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What a passage begins with: the tokenizer's start token, else its end token, else nothing."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return () if start is None else (start,)


def cut(document: Document, tokenizer: Any, length: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Cut a document into pieces of at most ``length`` tokens, at the end of a line where one is near.

    Nothing is lost and nothing is repeated: the texts, joined, are the document's.
    """
    ids, begins = tokenize(tokenizer, document.text)
    text, first, begin = document.text, 0, 0
    while first < len(ids):
        last = min(first + length, len(ids))
        if last < len(ids):
            lines = (i for i in range(last, first + length // 2, -1) if "\n" in text[begins[i - 1] : begins[i]])
            last = next(lines, last)
        end = begins[last] if last < len(ids) else len(text)
        yield text[begin:end], tuple(ids[first:last])
        first, begin = last, end


def split(documents: Iterable[Document], tokenizer: Any, config: DemoConfig) -> Split:
    """Cut documents into passages, hold every n-th of a topic out, and choose the groups to ask about.

    The groups' topics are those whose number of passages is nearest to the number that will be removed, so that a
    removal could take out a theme.
    """
    start = start_tokens(tokenizer)
    train: list[Passage] = []
    held: dict[str, list[Passage]] = {}
    count: Counter[str] = Counter()
    for document in documents:
        for text, ids in cut(document, tokenizer, config.chunk_tokens - len(start)):
            number = count[document.topic]
            count[document.topic] += 1
            passage = Passage(f"{document.topic}#{number}", document.topic, text, start + ids)
            if len(passage.tokens) < 2:
                continue
            whole = len(passage.tokens) >= config.chunk_tokens // 3
            if whole and number % config.hold_out == config.hold_out // 2:
                held.setdefault(document.topic, []).append(passage)
            else:
                train.append(passage)
        if len(train) >= config.passages:
            break
    train = train[: config.passages]
    removed = config.fraction * len(train)
    if removed < 1:
        raise ConfigError(
            f"the text gives {len(train)} passages, and fraction={config.fraction} of them is none: give more text, a "
            "larger fraction or a smaller chunk_tokens."
        )
    large = [topic for topic in held if len(held[topic]) >= config.group_size]
    large.sort(key=lambda topic: (abs(count[topic] - removed), topic))
    if len(large) < config.groups:
        raise ConfigError(
            f"{len(large)} topics have group_size={config.group_size} held-out passages, and groups={config.groups} of "
            "them are asked about: give more text, fewer groups, a smaller group_size or a smaller chunk_tokens."
        )
    return Split(tuple(train), tuple((t, tuple(held[t][: config.group_size])) for t in large[: config.groups]))


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of some ids, without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)
