"""Bounds the time that llguidance takes for one step of a client's grammar, which delays every request of a scheduler.

llguidance's own limits bound how many items of its Earley parser a step makes, but not the time of an item, which grows
with the number of rules that complete at one place. So the time is measured as well: once when a grammar is compiled,
in SGLang's thread for it, and at each step.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from sgl_apr.server.hooks import hook_around, require_sglang

# Much more than any step of this package's formats takes, so that a busy or slow machine refuses none of them.
STEP_S = 0.05  # CPU seconds of one step that a grammar may take
EXCESS_S = 1.0  # CPU seconds above `STEP_S`, summed over the steps of a request
BATCH_ROW_S = 0.002  # seconds that an ordinary mask takes, per request of a batch
MAX_ITEMS = 600  # Earley items at one position: an ambiguous grammar of this many takes 14 ms a step
MAX_JSON_ITEMS = 2000  # an object with n optional properties has 4n
MAX_STEP_ITEMS = 10_000  # Earley items of one mask
MAX_REFUSED = 1024

_refused: OrderedDict[str, None] = OrderedDict()  # the grammars that were too slow
_time_each = False  # whether the masks of the next batch are made and timed one by one


def register_hooks() -> None:
    """Set the hooks on SGLang's llguidance backend. Its module is imported when a server uses it."""
    backend = "sglang.srt.constrained.llguidance_backend"
    grammar = f"{backend}:GuidanceGrammar"
    require_sglang("llguidance:LLParserLimits.max_items_in_row")
    require_sglang("llguidance:LLParserLimits.step_max_items")
    hook_around(
        f"{grammar}.__init__", ["llguidance_tokenizer", "serialized_grammar", "ll_matcher"], make_grammar
    )
    hook_around(f"{grammar}.accept_token", ["token"], accept_token)
    hook_around(f"{grammar}.fill_vocab_mask", ["vocab_mask", "idx"], fill_mask)
    hook_around(f"{backend}:fill_token_bitmask_batched", ["entries", "vocab_mask"], fill_masks)
    hook_around(
        "sglang.srt.managers.schedule_batch:Req.update_finish_state", ["new_accepted_len"], update_finish
    )


def make_matcher(tokenizer: Any, grammar: str) -> Any:
    """Compile a grammar with limits, and try its first step.

    Args:
        tokenizer: llguidance's tokenizer.
        grammar: The grammar, as llguidance reads it.

    Raises:
        ValueError: The grammar takes too long.
    """
    from llguidance import LLMatcher, LLParserLimits

    if grammar in _refused:
        raise ValueError(_message("was too slow before"))
    is_json = '"json_schema"' in grammar or "%json" in grammar
    limits = LLParserLimits(
        max_items_in_row=MAX_JSON_ITEMS if is_json else MAX_ITEMS,
        step_max_items=MAX_STEP_ITEMS,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        return matcher  # SGLang reports the error
    start = time.thread_time()
    matcher.deep_copy().compute_bitmask()
    seconds = time.thread_time() - start
    if seconds > STEP_S + EXCESS_S:
        _refuse(grammar)
        raise ValueError(_message(f"takes {seconds:.2f} s for its first token"))
    return matcher


def make_grammar(
    original: Callable[..., Any],
    grammar: Any,
    llguidance_tokenizer: Any,
    serialized_grammar: str,
    *,
    ll_matcher: Any = None,
) -> None:
    """Call SGLang's `GuidanceGrammar.__init__` with a matcher that has limits."""
    if ll_matcher is None:
        ll_matcher = make_matcher(llguidance_tokenizer, serialized_grammar)
    grammar.excess_s = 0.0
    original(grammar, llguidance_tokenizer, serialized_grammar, ll_matcher=ll_matcher)


def accept_token(original: Callable[..., Any], grammar: Any, token: int) -> None:
    """Call SGLang's `GuidanceGrammar.accept_token`.

    In a state of error, llguidance allows the token that ends a text only, and SGLang would take this for the end.

    Raises:
        ValueError: A step of the grammar went beyond a limit. SGLang ends this request with the message.
    """
    if grammar.finished:
        return
    _raise_if_over_limit(grammar)
    start = time.thread_time()
    try:
        original(grammar, token)
    except ValueError:
        _raise_if_over_limit(grammar)
        raise
    _count(grammar, time.thread_time() - start)


def update_finish(original: Callable[..., Any], request: Any, *arguments: Any, **options: Any) -> None:
    """Call SGLang's `Req.update_finish_state`, but abort a request whose grammar went beyond a limit.

    SGLang calls it before `accept_token`, so the token that ends a text would end the request without an error.
    """
    grammar = getattr(request.grammar, "grammar", None) or request.grammar  # SGLang wraps it for reasoning
    if hasattr(grammar, "excess_s") and not request.finished():
        try:
            _raise_if_over_limit(grammar)
        except ValueError as error:
            from sglang.srt.managers.schedule_batch import FINISH_ABORT

            request.to_finish = FINISH_ABORT(str(error), HTTPStatus.BAD_REQUEST, "BadRequestError")
    original(request, *arguments, **options)


def fill_mask(original: Callable[..., Any], grammar: Any, vocab_mask: Any, idx: int) -> None:
    """Call SGLang's `GuidanceGrammar.fill_vocab_mask`, but leave an error to `accept_token`.

    An exception here would end the scheduler.
    """
    if grammar.serialized_grammar in _refused:
        return
    start = time.thread_time()
    try:
        original(grammar, vocab_mask, idx)
    except ValueError:
        if not grammar.ll_matcher.is_error():
            raise
    _count(grammar, time.thread_time() - start)


def fill_masks(original: Callable[..., Any], entries: Sequence[Any], vocab_mask: Any) -> None:
    """Call SGLang's `fill_token_bitmask_batched`, without the grammars that were too slow.

    The masks of a batch are made in threads, so after a slow batch the next one is made mask by mask, to find out
    which grammar is slow.
    """
    global _time_each
    entries = [entry for entry in entries if entry.grammar.serialized_grammar not in _refused]
    if _time_each or len(entries) == 1:
        _time_each = False
        for entry in entries:
            entry.grammar.fill_vocab_mask(vocab_mask, entry.row)
        return
    start = time.perf_counter()
    original(entries, vocab_mask)
    _time_each = time.perf_counter() - start > STEP_S + BATCH_ROW_S * len(entries)


def _count(grammar: Any, seconds: float) -> None:
    if seconds > STEP_S:
        grammar.excess_s += seconds - STEP_S
        if grammar.excess_s > EXCESS_S:
            _refuse(grammar.serialized_grammar)


def _refuse(grammar: str) -> None:
    _refused[grammar] = None
    if len(_refused) > MAX_REFUSED:
        _refused.popitem(last=False)


def _raise_if_over_limit(grammar: Any) -> None:
    is_refused = _refused and grammar.serialized_grammar in _refused
    if not is_refused and not grammar.ll_matcher.is_error():  # called several times for every token
        return
    if is_refused:
        raise ValueError(_message("takes too long for a token"))
    error = grammar.ll_matcher.get_error()
    if "Too many items" in error or "Current row has" in error or "fuel" in error:
        raise ValueError(_message(f"is too ambiguous ({error.splitlines()[0]})"))
    if error:
        raise ValueError(error)


def _message(problem: str) -> str:
    return (
        f"the grammar {problem}: write it without ambiguous or nested repetitions and with fewer alternatives"
    )
