import ast, re, sys, warnings
warnings.filterwarnings("ignore")
sys.path[:0] = ["/tmp/p/w10/tests"]
from itertools import chain
import torch
from labkit.exercises import lab_deployment
from labkit.exercises.exercise import exercises_of, Raised, PUBLIC
from labkit.exercises.judging import judge, difference, WRONG, CORRECT
from labkit.exercises.asking import answer
from second_solutions import lab_deployment as S
from mutants import mutants_of, at_most, FILENAME
SECRETS = ["a secret", "another", "2026 autumn", "", "ünïcode"]
text = open("/tmp/p/lr/notebook10.py").read()
ns = {}; exec(compile(text, "<cell>", "exec"), ns)
cells = {n.name: ast.get_source_segment(text, n) for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
lines = text.splitlines()
cells = {n.name: "\n".join(lines[n.lineno-1:n.end_lineno+1]) for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
bad = 0
def want(ok, *said):
    global bad
    if not ok: bad += 1; print("XX", *said)
def v(e, f, secret=PUBLIC, hidden=False): return judge(e, lambda c: answer(f, c), secret, hidden)
from mutants import *
for e in exercises_of("10_lab_deployment"):
    if len(sys.argv) > 2 and e.id != sys.argv[2]: continue
    for f in (ns[e.entry], getattr(S, e.entry)):
        for s, h in [(PUBLIC, False)] + [(f"student {n}", True) for n in range(30)] + [(x, True) for x in SECRETS]:
            r = v(e, f, s, h); want(r.status == CORRECT, e.id, f.__module__, s, r.sentence)
    for sentence, m in e.misconceptions.items():
        r = v(e, m); want(r.misconception == sentence, e.id, m.__name__, r.sentence[:200])
        want(not [1 for c in e.drawn() if isinstance(answer(m, c), Raised)], m.__name__, "raises")
        for s in SECRETS: want(v(e, m, s, True).status == WRONG, e.id, m.__name__, s)
    for f in S.ALMOST_RIGHT[e.entry]:
        for s in SECRETS: want(v(e, f, s, True).status == WRONG, e.id, f.__name__, s)
        print("   public:", f.__name__, v(e, f).status)
    for c in chain(e.drawn(), *(e.drawn(s, True) for s in SECRETS)):
        said = [s.format(**c.facts) for s in e.misconceptions]; must, says = c.must.format(**c.facts), c.says.format(**c.facts)
        want(len(set(said)) == len(said))
        want([s for s in [*said, must] if not re.fullmatch(r"[^{}\n]+[^.{}]\.", s)] == [], said, must)
        want(re.fullmatch(r"[^{}\n]+[^.{}]", says), says)
    seen = {str([{k: (x.tolist() if hasattr(x, "tolist") else x) for k, x in c.arguments.items()} for c in e.drawn(s, True)]) for s in [PUBLIC, *SECRETS]}
    want(len(seen) == 6, e.id, "cases repeat")
    pub, hid = e.drawn(), e.drawn(SECRETS[0], True)
    for a, b in zip(pub, hid):
        want((a.says, a.must, list(a.arguments)) == (b.says, b.must, list(b.arguments)), e.id, "structure")
        want(str([x.tolist() if hasattr(x,"tolist") else x for x in a.arguments.values()]) != str([x.tolist() if hasattr(x,"tolist") else x for x in b.arguments.values()]), "same")
        want(all(x.shape == y.shape for x, y in zip(a.arguments.values(), b.arguments.values()) if hasattr(x, "shape")), "shape")
    public = [(c, e.expected(c)) for c in e.drawn()]; hidden = [(c, e.expected(c)) for c in e.drawn(SECRETS[0], True)]
    for c, x in public: print("   ", c.says.format(**c.facts), {k: (y if not hasattr(y, 'tolist') else y.tolist()) for k, y in (x.items() if isinstance(x, dict) else [("", x)])})
    if len(sys.argv) > 1 and sys.argv[1] == "mutants":
        fate = {}
        for m in mutants_of(cells[e.entry]):
            def noticed(cases):
                with at_most():
                    n = {"torch": torch}; exec(compile(m.source, FILENAME, "exec"), n)
                    return any(difference(answer(n[e.entry], c), x, e.close) for c, x in cases)
            by = "public" if noticed(public) else "hidden" if noticed(hidden) else None
            fate[m.what] = by if m.what not in fate or by is None else fate[m.what]
        print(e.id, {b: list(fate.values()).count(b) for b in ("public", "hidden", None)})
        for w, b in fate.items():
            if b is None: print("   survivor:", w)
print("bad", bad)
