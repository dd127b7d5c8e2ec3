"""The attack corpus: submissions that want points without knowledge, somebody else's work, or simply harm. What an attack is stands in attack.py,
a grader that falls for all of them in naive.py, and the test that ours falls for none in tests/test_grading_attacks.py.

What is no attack: to copy the answer into the cell from a book, a friend, or a library that lies on the student's own disk. No sandbox sees that.
"""

from tests.attacks import (
    files,
    introspection,
    liars,
    metadata,
    network,
    output,
    patching,
    processes,
    resources,
    serialisation,
    shadowing,
    transformers_of_input,
)

FAMILIES = {
    "patching": patching.ATTACKS, "liars": liars.ATTACKS, "introspection": introspection.ATTACKS, "files": files.ATTACKS,
    "processes": processes.ATTACKS, "resources": resources.ATTACKS, "network": network.ATTACKS, "metadata": metadata.ATTACKS,
    "serialisation": serialisation.ATTACKS, "shadowing": shadowing.ATTACKS, "output": output.ATTACKS,
    "input transformers": transformers_of_input.ATTACKS,
}  # fmt: skip
