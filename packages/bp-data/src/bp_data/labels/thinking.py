"""Where an answer begins otherwise in training than when the model is asked: forced and empty thoughts."""

from __future__ import annotations

from typing import Final

from bp_data.labels.renderer import PROBE, ChatRenderer
from bp_data.labels.spans import common_prefix
from bp_data.templates.engine import ChatTemplate

_QUESTION: Final = [{"role": "user", "content": "Qquestionx"}]


def compare_prompts(template: ChatTemplate) -> str | None:
    """How the default prompt differs from what answers without reasoning are trained on; None if it doesn't.

    Returns:
        A sentence with what to do, for a notice.
    """
    renderer = ChatRenderer(template)
    prompt = renderer.try_render(_QUESTION, add_generation_prompt=True)
    answered = renderer.try_render([*_QUESTION, {"role": "assistant", "content": PROBE}])
    if prompt is None or answered is None or PROBE not in answered:
        return None
    shared = common_prefix(prompt, answered)
    prompted, trained = prompt[shared:].strip(), answered[shared : answered.find(PROBE)].strip()
    if "think" in prompted:
        return (
            f"Prompts end with {prompted!r}, and examples without reasoning are trained on without it. "
            "Add reasoning to them, or generate with enable_thinking=false."
        )
    if "think" in trained:
        return (
            f"Examples without reasoning are trained on with {trained!r} before the answer, so the model learns not to "
            "think. Add reasoning to them, or generate with enable_thinking=false."
        )
    return None
