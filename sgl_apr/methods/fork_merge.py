"""The merge after the branches of a fork: it reads their results as text, or continues after them in the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sgl_apr.errors import UnsupportedEngine
from sgl_apr.methods.fork_prompts import PromptRenderer, TokenIds, with_text_before
from sgl_apr.methods.fork_result import TaskResult, TokenUsage, render_results
from sgl_apr.methods.fork_task import ForkTask, Merge
from sgl_apr.methods.fork_tools import decoding_prompt
from sgl_apr.methods.session import MethodSession
from sgl_apr.runtime.branch_group import BranchGroup

MERGE_NAME = "merge"


class ForkMerger:
    """Runs the merge of one fork.

    Args:
        session: Of the fork.
        renderer: Renders the prompt of the merge.
        merge: The merge.
        tasks: The tasks of the branches.
    """

    def __init__(
        self, session: MethodSession, renderer: PromptRenderer, merge: Merge, tasks: Sequence[ForkTask]
    ) -> None:
        self.session, self.requests, self.trunk = session, session.requests, session.root.sequence
        self.renderer, self.merge, self.tasks = renderer, merge, tasks
        self._outlines = [task.outline for task in tasks]

    @property
    def joins_kv(self) -> bool:
        """Whether it continues after the branches in the KV cache."""
        return self.merge.join == "kv"

    async def prompt_tokens(self, prompts: Sequence[TokenIds], context: TokenIds) -> int:
        """Tokens of the context of the merge, without what the branches write.

        Args:
            prompts: The prompts of the branches.
            context: What the trunk begins with.
        """
        if self.joins_kv:
            own = await self.renderer.render_after_branch(self.merge, self.tasks[0])
            return len(own) + sum(map(len, prompts)) - (len(prompts) - 1) * len(context)
        empty = [TaskResult(task.name, "", "stop") for task in self.tasks]
        return len(await self.renderer.render_merge(self.merge, render_results(empty, self._outlines)))

    async def run(self, group: BranchGroup, results: Sequence[TaskResult]) -> TaskResult:
        """Continue after branches that have ended.

        Args:
            group: The branches.
            results: What they returned.
        """
        trunk, request_log = self.trunk, self.requests.recorder.request_log
        ends: tuple[int, ...] = ()
        if self.joins_kv:
            ids = await self._join_kv(group, results)
        else:
            ids, ends = (
                await self._read_results(results),
                tuple(i for b in group.branches for i in b.frontier),
            )
        text = trunk.graph.tokenizer.decode(ids, trunk.context)
        trunk.inject("tail", text, waits_for=ends, charged=False, token_ids=ids)
        group.joined()
        engine, calls = self.session.root.engine, len(request_log.calls)
        assert engine is not None
        prompt = decoding_prompt(engine, self.merge)
        completion = await self.requests.decode(engine, trunk, prompt, self.requests.allowance.tokens)
        usage = TokenUsage.of_calls([call for call in request_log.calls[calls:] if not call.path])
        text = without_stop(completion.text, self.merge.stops)
        return TaskResult(MERGE_NAME, text, completion.finish, usage)

    async def _read_results(self, results: Sequence[TaskResult]) -> TokenIds:
        """What follows the trunk's context where the merge reads results.

        Raises:
            UnsupportedEngine: The chat template writes the conversation differently then.
        """
        merge, context = replace(self.merge, join="text"), self.trunk.context
        complete = await self.renderer.render_merge(merge, render_results(results, self._outlines))
        if complete[: len(context)] != context:
            raise UnsupportedEngine(
                "the chat template writes the conversation before the merge differently, expected a template that "
                "begins with the conversation"
            )
        return complete[len(context) :]

    async def _join_kv(self, group: BranchGroup, results: Sequence[TaskResult]) -> TokenIds:
        """Let the trunk continue after the branches that did not fail, and return what follows them."""
        joined = [branch for branch in group.branches if branch.finish != "failed"]
        if not joined:
            return await self._read_results(results)
        merge, pairs = self.merge, zip(results, self._outlines, strict=True)
        if failed := [pair for pair in pairs if pair[0].finish == "failed"]:
            listing = render_results(*zip(*failed, strict=True))
            merge = replace(merge, prompt=with_text_before(merge.prompt, listing))
        ids = await self.renderer.render_after_branch(merge, self.tasks[0])
        self.requests.runner.kv_joiner.join(self.trunk, len(self.trunk.context), joined)
        self.trunk.append_branches(joined)
        return ids


def without_stop(text: str, stops: Sequence[str]) -> str:
    """A text up to the stop text that ended it. The last token may hold more than the stop text."""
    positions = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(positions, default=len(text))]
