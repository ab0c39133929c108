"""A model and a dataset by name, from the hub or from a folder, in place of the small model and Python's reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from loghook.demo.config import DemoConfig
from loghook.demo.text import Document
from loghook.errors import ConfigError

_TEXT = ("text", "content", "document", "passage", "sentence")
_TOPIC = ("topic", "title", "category", "label", "source")
_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a named model; a ConfigError if there is none to be had."""
    from transformers import AutoTokenizer

    with _loading(name):
        return AutoTokenizer.from_pretrained(name)


def load_model(name: str, device: str) -> Any:
    """A causal language model in float32; a ConfigError if there is none to be had."""
    from transformers import AutoModelForCausalLM

    with _loading(name):
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.to(device)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model={name!r} cannot be loaded ({_first_line(error)}): give the name of a public causal language model "
            "while there is a network, or a folder that save_pretrained wrote, with its tokenizer."
        ) from error


def load_documents(name: str, config: DemoConfig) -> Iterator[Document]:
    """A dataset's texts, with a topic each.

    The topic is what a column of that name, or title, category, label or source, says; without one, it is the block of
    records that the text is in.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"dataset={name!r} needs the datasets library: pip install 'loghook[hub]', or leave the dataset out to "
            "take Python's own reference."
        ) from error
    kind = _FILES.get(Path(name).suffix)
    try:
        records = datasets.load_dataset(kind or name, data_files=name if kind else None, split="train", streaming=True)
        first = next(iter(records))
    except StopIteration as error:
        raise ConfigError(f"dataset={name!r} is empty: give one with a train split that holds text.") from error
    except Exception as error:  # the library lets out those of its file systems, parsers and connections
        raise ConfigError(
            f"dataset={name!r} cannot be loaded ({_first_line(error)}): give a dataset with a train split while there "
            f"is a network, or a {', '.join(_FILES)} file."
        ) from error
    text = next((column for column in _TEXT if isinstance(first.get(column), str)), None)
    if text is None:
        raise ConfigError(f"dataset={name!r} has columns {sorted(first)}: one of {', '.join(_TEXT)} must hold text.")
    topic = next((column for column in _TOPIC if isinstance(first.get(column), str | int) and column != text), None)
    block = max(config.hold_out * config.group_size, round(config.fraction * config.passages))
    for i, record in enumerate(islice(records, config.passages * config.hold_out)):
        about = str(record[topic]) if topic else f"records from {i // block * block}"
        yield Document(about, record[text] or "")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
