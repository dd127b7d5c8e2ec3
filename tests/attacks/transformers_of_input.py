"""Input transformers: a notebook's kernel lets a cell rewrite the cells after it. A worker that is no notebook has nothing to rewrite with."""

from tests.attacks.attack import POINTS, WRONG, on_count

ATTACKS = [
    on_count("assert-becomes-pass", POINTS, "has IPython turn every line that begins with assert into pass", f"""
def transform(lines):
    return ["pass\\n" if line.lstrip().startswith("assert") else line for line in lines]
shell = get_ipython()
if shell:
    shell.input_transformers_post.append(transform)
{WRONG["lora-count"]}"""),
    on_count("assert-leaves-the-tree", POINTS, "takes the assertions out of the syntax tree of every later cell", f"""
import ast
class Without(ast.NodeTransformer):
    def visit_Assert(self, node):
        return ast.copy_location(ast.Pass(), node)
shell = get_ipython()
if shell:
    shell.ast_transformers.append(Without())
{WRONG["lora-count"]}"""),
    on_count("before-every-cell", POINTS, "patches in an event before every later cell", f"""
def patch(*about):
    from labkit.exercises import judging
    judging.difference = lambda *values, **more: ""
shell = get_ipython()
if shell:
    shell.events.register("pre_run_cell", patch)
{WRONG["lora-count"]}"""),
    on_count("another-shell", POINTS, "replaces the function that runs cells", f"""
shell = get_ipython()
if shell:
    plain = type(shell).run_cell
    type(shell).run_cell = lambda self, source, *more, **other: plain(self, source.replace("assert", "#"), *more, **other)
{WRONG["lora-count"]}"""),
]
