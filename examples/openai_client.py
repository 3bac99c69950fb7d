"""The stock openai client against a running server: one complete reply, and one streamed by branch.

sgl-apr serve --model MODEL          # e.g. $(sgl-apr model smollm2 --tags threadweaver)
python examples/openai_client.py --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from rich.console import Console

import sgl_apr as apr
from sgl_apr.views.tree import render_tree

APR = {
    "dialect": "threadweaver",
    "mode": "parallel",
    "budget": {"width": 4, "outline_chars": 40},
    "forbid_angle_brackets": True,
}


def main() -> None:
    """Send the question twice, and show both replies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="default: %(default)s")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--question", default="Why do people love dogs?")
    options = parser.parse_args()
    client, console = OpenAI(base_url=f"{options.url}/v1", api_key=options.api_key), Console()
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": options.question}]

    extra = {"apr": {**APR, "trajectory": True}}
    complete: Any = client.chat.completions.create(
        model="default", messages=messages, max_tokens=300, extra_body=extra
    )
    trajectory = apr.Trajectory.from_json(json.dumps(complete.apr["trajectory"]))
    console.print(render_tree(trajectory, options.question))
    console.print("answer:", repr(complete.choices[0].message.content), complete.usage.apr, markup=False)

    texts: dict[tuple[int, ...], str] = {}
    stream: Any = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=300,
        stream=True,
        extra_body={"apr": {**APR, "stream": "all"}},
    )
    for chunk in stream:
        (choice,), fields = chunk.choices, chunk.apr
        if "event" in fields:
            event = f"{fields['event']} {fields.get('path', '')} {fields.get('outcome', '')}"
            console.print(event, markup=False)
        elif choice.delta.content:
            path = tuple(fields["path"])
            texts[path] = texts.get(path, "") + choice.delta.content
    for path, text in sorted(texts.items()):
        console.print(".".join(map(str, path)) or "trunk", repr(text), markup=False)


if __name__ == "__main__":
    main()
