"""The text: a dataset or what every CPython carries, cut into passages, some of them held out."""

import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from loghook.demo.config import DemoConfig
from loghook.errors import ConfigError

MODELS = "a public causal language model's name while online, or a folder of save_pretrained with its tokenizer"
_TEXT = ("text", "content", "document", "passage", "sentence")
_TOPIC = ("topic", "title", "category", "label", "source")
_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class Document(NamedTuple):
    topic: str  # several documents may share one
    text: str


class Passage(NamedTuple):
    """A piece of a document, as the model is trained on it."""

    data_id: str  # "topic#number", what the log knows it by
    topic: str  # of its document
    text: str  # what it says; a topic's passages, joined in order, give its documents back
    tokens: tuple[int, ...]  # its ids, with the start token in front where the tokenizer has one


class Split(NamedTuple):
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
            f"{folder} holds no .py files to pre-train on: use a Python with its library's source, or pass a model "
            "and a dataset."
        )
    return texts


def language_reference() -> list[Document]:
    """Python's language reference as ``help()`` shows it, one document a topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError(
            "this Python has no pydoc_data.topics to fine-tune on: pass a model and a dataset."
        ) from error
    return [Document(topic, text) for topic, text in sorted(topics.items())]


def load_documents(name: str, config: DemoConfig) -> Iterator[Document]:
    """A dataset's texts; their topics are those of a column named like one, else the block of records they are in."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"dataset={name!r} needs the datasets library: pip install 'loghook[hub]', or leave the dataset out to "
            "take Python's own reference."
        ) from error
    file_type = _FILES.get(Path(name).suffix)
    with loading(f"dataset={name!r}", f"a dataset with a train split while online, or a {', '.join(_FILES)} file"):
        data_files = name if file_type else None
        records = datasets.load_dataset(file_type or name, data_files=data_files, split="train", streaming=True)
        first = next(iter(records), None)
    if first is None:
        raise ConfigError(f"dataset={name!r} is empty: give one with a train split that holds text.")
    text = next((column for column in _TEXT if isinstance(first.get(column), str)), None)
    if text is None:
        raise ConfigError(f"dataset={name!r} has columns {sorted(first)}: one of {', '.join(_TEXT)} must hold text.")
    topic = next((column for column in _TOPIC if isinstance(first.get(column), str | int) and column != text), None)
    block = max(config.hold_out * config.group_size, round(config.fraction * config.passages))
    for i, record in enumerate(islice(records, config.passages * config.hold_out)):
        yield Document(str(record[topic]) if topic else f"records from {i // block * block}", record[text] or "")


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    with loading(f"model={model!r}", MODELS):
        return AutoTokenizer.from_pretrained(model)


@contextmanager
def loading(argument: str, remedy: str) -> Iterator[None]:
    """Make one line of whatever the libraries let out: their own errors and their file systems' and connections'."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise ConfigError(f"{argument} cannot be loaded ({reason}): give {remedy}.") from error


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
            f"{type(tokenizer).__name__} does not tell where tokens begin, and passages are cut there: choose a model "
            "with a fast tokenizer (tokenizer.json)."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], [begin for begin, _ in encoded["offset_mapping"]]


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What a passage begins with: the tokenizer's start token, else its end token, else nothing."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return () if start is None else (start,)


def cut(document: Document, tokenizer: Any, length: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Pieces of at most ``length`` tokens, cut at the end of a line where one is near; joined they are the document."""
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
    held_out: dict[str, list[Passage]] = {}
    count: Counter[str] = Counter()  # passages of each topic
    for document in documents:
        for text, ids in cut(document, tokenizer, config.chunk_tokens - len(start)):
            number, tokens = count[document.topic], start + ids
            count[document.topic] += 1
            passage = Passage(f"{document.topic}#{number}", document.topic, text, tokens)
            if number % config.hold_out == config.hold_out // 2 and len(tokens) >= max(2, config.chunk_tokens // 3):
                held_out.setdefault(document.topic, []).append(passage)
            elif len(tokens) >= 2:  # a single token is never predicted
                train.append(passage)
        if len(train) >= config.passages:
            break
    train = train[: config.passages]
    removed = config.fraction * len(train)
    if removed < 1:
        raise ConfigError(
            f"fraction={config.fraction} of {len(train)} passages is none: give more text, a larger fraction or a "
            "smaller chunk_tokens."
        )
    large = [topic for topic in held_out if len(held_out[topic]) >= config.group_size]
    large.sort(key=lambda topic: (abs(count[topic] - removed), topic))
    if len(large) < config.groups:
        raise ConfigError(
            f"{len(large)} topics have group_size={config.group_size} held-out passages and groups={config.groups} are "
            "needed: give more text, fewer groups, a smaller group_size or a smaller chunk_tokens."
        )
    groups = tuple((topic, tuple(held_out[topic][: config.group_size])) for topic in large[: config.groups])
    return Split(tuple(train), groups)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)
