"""What a model is given to continue."""

from __future__ import annotations

from ..errors import ArgumentError


def chat_prompt(tokenizer, prompt: str) -> str:
    """`prompt` as a user's message in the tokenizer's chat template, up to where the answer begins.

    Raises: ArgumentError for a tokenizer without a chat template, or whose template fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError(
            "this model's tokenizer has no chat template, so it was probably not trained to "
            "answer; leave out --chat to let it continue the prompt"
        )
    message = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program of the model's author
        raise ArgumentError(
            f"the chat template of this model's tokenizer fails on a single question: {error}; "
            "leave out --chat to let the model continue the prompt"
        ) from error
    start = tokenizer.bos_token_id
    if start is not None and tokenizer(text)["input_ids"][:2] == [start, start]:
        # The template wrote the start token, and the tokenizer would write it once more.
        text = text.removeprefix(tokenizer.bos_token)
    return text
