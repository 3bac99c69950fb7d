"""One valid document of every dialect, written by hand, and the widths of its blocks."""

from __future__ import annotations

from tests.support.threadweaver_traces import TRACE

DOCUMENTS = {
    "threadweaver": TRACE,
    "multiverse": (
        "Two ways.\n<Parallel>\n<Goal>\n<Outline>\n1: Analyze A\n</Outline>\n<Outline>\n2: Analyze B\n</Outline>\n"
        "</Goal>\n<Path>\n1: In parts.<Parallel>\n<Goal>\n<Outline>\n1.1: left\n</Outline>\n<Outline>\n1.2: right\n"
        "</Outline>\n</Goal>\n<Path>\n1.1: l</Path>\n<Path>\n1.2: r</Path>\n<Conclusion>\nboth parts\n</Conclusion>\n"
        "</Parallel> so A.\n</Path>\n<Path>\n2: x < y\n</Path>\n<Conclusion>\nA and B\n</Conclusion>\n</Parallel>\nDone."
    ),
    "npr": (
        "<guideline>\n<plan>1: count</plan>\n<plan>2: guess</plan>\n</guideline>\n<step>\n1: 4\n</step>\n<step>\n2: 5\n"
        "</step>\n<takeaway>\n4 is right\n</takeaway>\n\n<guideline>\n<plan>1: check</plan>\n</guideline>\n<step>\n"
        "1: yes\n</step>\n<takeaway>\nsure\n</takeaway>\nIt is 4."
    ),
    "parallel_r1": (
        "Text before.\n<Parallel><Path>\nfirst view\n</Path><Path>\nsecond view\n</Path></Parallel>\n<Summary>\n"
        "the same\n</Summary>\nFinal Answer: 19"
    ),
    "apr": (
        "Moving to Node #0\nCurrent State: 27:[22, 26, 31, 53], Operations: []\n"
        "Exploring Operation: 53-22=31, Resulting Numbers: [26, 31, 31]\n"
        "Generated Node #0,0: 27:[26, 31, 31] Operation: 53-22=31\n<Calling Sub Searches>\n"
        "<Start Sub Search 0 at level 1> Moving to Node #0,0\n<Start Sub Search 1 at level 1> Moving to Node #0,1\n"
        "<End Calling Sub Searches><Sub Searches>\n<No Solution in Sub Search 0 at level 1 at Node #0,0>\n"
        "<Goal Reached in Sub Search 1 at level 1 at Node #0,1>\nMoving to Node #0,1\n27,27 equal: Goal Reached\n"
        "<End Sub Searches>\nGoal Reached"
    ),
    "spawn": (
        "Two sums.<Spawn>\n<Message>1: 2 + 2</Message>\n<Message>2: 3 + 3</Message>\n</Spawn><Join>\n"
        "<Result>1:4</Result>\n<Result>2:</Result>\n</Join>\nThe first is 4."
    ),
    "asyncthink": (
        "First <FORK-1>2 + 2</FORK-1> and <FORK-2>3 + 3</FORK-2> while I look at it.<JOIN-2>6</JOIN-2> Then "
        "<JOIN-1>4</JOIN-1> so 10."
    ),
    "pasta": (
        'Cities: <promise topic="sights"/> and <promise topic="food"/> follow.<sync/><async>The tower.</async>'
        "<async>Bread.</async> That is all."
    ),
    "parathinker": "<think 1>It is 4.</think 1><think 2>Let me</think 2><summary>4",
}
BRANCHES = {
    "threadweaver": [2],
    "multiverse": [2, 2],
    "npr": [2, 1],
    "parallel_r1": [2],
    "apr": [2],
    "spawn": [2],
    "asyncthink": [2],
    "pasta": [2],
    "parathinker": [2],
}
