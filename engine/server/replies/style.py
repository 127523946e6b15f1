"""How the served model writes its replies: whether it reasons first, and in which format it calls tools."""

from collections.abc import Mapping

from triode.engine.server.replies.reader import ReplyReader
from triode.engine.server.replies.reasoning import OPENING, ReasoningSplitter
from triode.engine.server.tools.formats import format_of
from triode.engine.server.tools.plan import ToolPlan
from triode.models.conversation import Conversation
from triode.models.tokenizer import Tokenizer

_PROBE: tuple[dict[str, object], ...] = ({"role": "user", "content": "Hello"},)


class ReplyStyle:
    """Read off the chat template, but for what the configuration says.

    Args:
        tokenizer: has the template.
        reasoning: "auto", "none" or "think".
        tools: "auto", "none" or a format's name.
    """

    def __init__(self, tokenizer: Tokenizer, *, reasoning: str, tools: str) -> None:
        template = tokenizer.chat_template
        self.tool_format = format_of(tools, template)
        self.reasons = reasoning == "think" or (reasoning == "auto" and OPENING in (template or ""))
        self._tokenizer = tokenizer

    def reader(self, plan: ToolPlan, *, starts_inside: bool) -> ReplyReader | None:
        """Reads one reply; None where a reply is only its text."""
        if not self.reasons and plan.form is None:
            return None
        splitter = ReasoningSplitter(starts_inside=starts_inside) if self.reasons else None
        return ReplyReader(splitter, plan.parser())

    def prompt_opens_reasoning(self, options: Mapping[str, object]) -> bool:
        """Whether the template ends the prompt within reasoning, so that the reply begins there.

        Raises:
            ValueError: if the template refuses the options.
        """
        if not self.reasons or not self._tokenizer.has_chat_template:
            return False
        prompt = self._tokenizer.apply_chat_template(Conversation(_PROBE, options=dict(options)))
        return prompt.rstrip().endswith(OPENING)
