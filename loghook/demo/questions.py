"""What the demo asks about: passages that were held out, and what the model says itself."""

from functools import partial
from typing import Any, NamedTuple

from loghook.demo.config import DemoConfig
from loghook.demo.text import Split, decode, start_tokens, tokenize
from loghook.demo.train import generate


class Question(NamedTuple):
    """Something the model says, whose loss is attributed."""

    data_id: str  # what the query is called
    kind: str  # "held out", "generated" or "prompt"
    title: str  # a line above it
    text: str  # all of it
    tokens: tuple[int, ...]  # its ids
    before: str = ""  # the text in front that counts for nothing
    context: int = 1  # how many of the ids at the front count for nothing

    @property
    def counted(self) -> str:
        """The text without what is in front."""
        return self.text.removeprefix(self.before).rstrip("\n")


def make_questions(model: Any, tokenizer: Any, passages: Split, config: DemoConfig) -> list[Question]:
    """Held-out passages, what the model makes of their beginnings and of the user's prompts."""
    questions = [Question(p.data_id, "held out", p.topic, p.text, p.tokens) for p in passages.queries]
    continuation = partial(_continuation, model, tokenizer, config)
    for topic, held_out in passages.groups:
        title = f"the beginning of a passage on {topic}, and how the model goes on"
        beginning = held_out[0].tokens[: config.chunk_tokens // 8]
        questions.append(continuation(f"generated#{topic}", "generated", title, beginning))
    for number, prompt in enumerate(config.prompts):
        tokens = (*start_tokens(tokenizer), *tokenize(tokenizer, prompt)[0])
        if len(tokens) > 1:  # a single token is never predicted
            questions.append(Question(f"prompt#{number}", "prompt", "the prompt itself", prompt, tokens))
        questions.append(continuation(f"continuation#{number}", "prompt", "how the model goes on", tokens))
    return questions


def _continuation(
    model: Any, tokenizer: Any, config: DemoConfig, data_id: str, kind: str, title: str, start: tuple[int, ...]
) -> Question:
    tokens = generate(model, start, config.new_tokens, config.seed)
    text, before = decode(tokenizer, tokens), decode(tokenizer, start)
    return Question(data_id, kind, title, text, tuple(tokens), before, len(start))
