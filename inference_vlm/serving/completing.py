"""What a thread does with a request: read its messages, answer, and say what it sees on the way.

What is special: of the latest conversations the keys and values stay in memory, within a bound. A request goes on from
the one that shares most with its prompt, if it shares enough; nobody has to name it.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from processing.image_files_vlm import BadImage

from ..answering import Answerer, Conversation, Flag, Prepared
from ..asked import PromptTooLong
from ..conversation import marks_of
from .chat_request import ChatRequest, bad_image
from .errors import ApiError
from .settings import ServingSettings


@dataclass(frozen=True)
class Begun:
    """The prompt has been read; what follows are pieces of text, and `Ended`."""

    prompt_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Ended:
    """How it ended: by itself or at a stop string (`stop`), or for want of tokens, positions or time (`length`)."""

    reason: str
    completion_tokens: int
    cached_tokens: int


class Completing:
    """
    Answers requests, in as many threads as call it.

    Args:
        answerer: an `Answerer`.
        settings: what is allowed.
    """

    def __init__(self, answerer: Answerer, settings: ServingSettings):
        self.answerer, self.settings = answerer, settings
        self._kept: list[tuple[str, Conversation]] = []  # with whose they are, the latest last
        self._keeping = threading.Lock()

    def defaults(self) -> dict[str, Any]:
        """The settings of an answer whose request says nothing."""
        config = self.answerer.settings().config
        temperature, top_p = (1 if value is None else value for value in (config.temperature, config.top_p))
        return {
            "temperature": temperature if config.do_sample else 0,
            "top_p": top_p if config.do_sample else 1,
            "max_tokens": self.settings.max_new_tokens,
        }

    def run(self, asked: ChatRequest, client: str, tell: Callable[[Any], None], stopped: Flag) -> None:
        """
        Answer a request.

        Args:
            client: whose it is; only conversations of theirs are gone on with.
            tell: is given `Begun`, pieces of text and `Ended`.
            stopped: ends the answer within a step once it is set.

        Raises:
            ApiError: the request cannot be answered.
        """
        try:
            prepared = self._read(asked.messages)
            settings = self.answerer.settings(
                max_new_tokens=asked.max_tokens, temperature=asked.temperature, top_p=asked.top_p, seed=asked.seed
            )
        except BadImage as error:
            raise bad_image(error) from None
        except PromptTooLong as error:
            raise ApiError(str(error), param="messages", code="context_length_exceeded") from None
        except ValueError as error:
            if not getattr(error, "is_duet_error", False):  # of this package, or of the code that the model came with
                raise
            raise ApiError(str(error), param="messages") from None
        tell(Begun(prepared.prompt_tokens, prepared.image_tokens))
        conversation = self._conversation(client, prepared)
        finish = self.answerer.write(
            prepared, settings, stop=asked.stop, conversation=conversation, cancelled=stopped, tell=tell
        )
        self._keep(client, conversation)
        reason = "stop" if finish.reason == "stop" else "length"
        tell(Ended(reason, finish.completion_tokens, finish.cached_tokens))

    def _read(self, messages: list[dict[str, Any]]) -> Prepared:
        """The prompt; pictures without a word are captioned, which is all that a model of stage 1 can do."""
        images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
        if len(messages) == 1 and len(images) == len(messages[0]["content"]):
            return self.answerer.read_caption(images)
        return self.answerer.read(messages, allow_files=False)

    def _conversation(self, client: str, prepared: Prepared) -> Conversation:
        """The client's own that the prompt goes on with, or repeats half of; else a new one."""
        marks = marks_of(prepared.row, self.answerer.processor.image_token_id, prepared.names, prepared.counts)
        with self._keeping:
            own = [kept for kept in self._kept if kept[0] == client]
            best = max(own, key=lambda kept: kept[1].known(marks), default=None)
            if best is None or best[1].known(marks) * 2 < len(best[1]):
                return Conversation()
            self._kept.remove(best)  # so that no other request goes on with it meanwhile
        return best[1]

    def _keep(self, client: str, conversation: Conversation) -> None:
        with self._keeping:
            if len(conversation):
                self._kept.append((client, conversation))
            while self._kept and (
                len(self._kept) > self.settings.conversations
                or sum(kept.nbytes for _, kept in self._kept) > self.settings.conversations_mb * 1e6
            ):
                del self._kept[0]


__all__ = ["Begun", "Completing", "Ended"]
