"""The stock openai client against a running server: a reply whole, and one streamed by branch.

sgl-apr serve --model MODEL          # e.g. $(sgl-apr model smollm2 --tags threadweaver)
python examples/openai_client.py --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
import json

from openai import OpenAI
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--question", default="Why do people love dogs?")
    options = parser.parse_args()
    client, console = OpenAI(base_url=f"{options.url}/v1", api_key=options.api_key), Console()
    asked = {
        "model": "default",
        "messages": [{"role": "user", "content": options.question}],
        "max_tokens": 300,
    }

    whole = client.chat.completions.create(
        **asked, extra_body={"apr": {**APR, "separate_reasoning": True, "trajectory": True}}
    )
    console.print(
        render_tree(apr.Trajectory.from_json(json.dumps(whole.apr["trajectory"])), options.question)
    )
    console.print("answer:", repr(whole.choices[0].message.content), whole.usage.apr, markup=False)

    written: dict[tuple[int, ...], str] = {}
    for chunk in client.chat.completions.create(**asked, stream=True, extra_body={"apr": APR}):
        (choice,), apr_ = chunk.choices, chunk.apr
        if "event" in apr_:
            console.print(f"{apr_['event']} {apr_.get('path', '')} {apr_.get('outcome', '')}", markup=False)
        elif choice.delta.content:
            path = tuple(apr_["path"])
            written[path] = written.get(path, "") + choice.delta.content
    for path, text in sorted(written.items()):
        console.print(".".join(map(str, path)) or "trunk", repr(text), markup=False)


if __name__ == "__main__":
    main()
