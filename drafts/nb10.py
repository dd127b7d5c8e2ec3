import sys; from pathlib import Path; sys.path.insert(0, str(Path(__file__).parent))
from nblib import Lesson
L=Lesson()
SOLUTIONS = Path(__file__).with_name("notebook10.py").read_text()
def solution(name):
    "The function as a cell has it."
    start = SOLUTIONS.index(f"def {name}("); end = SOLUTIONS.find("\ndef ", start + 1)
    return SOLUTIONS[start : end if end > 0 else None].strip("\n")
L.md("title", r"""
# 10 · Lab: the policy at work, small, fast, watched

**A smaller policy costs no success here; a late one does. The sheet's recipe for int8 makes a robot that says the same to every picture, a cache that is too generous one that sees yesterday's table, and no number tells you either unless somebody counts successes.**

Lecture: lab sheet, *Exercise 2*, steps 5 and 6, report, troubleshooting · week 12

Measured: not yet
""")
L.md("abilities", r"""
## What you will be able to do

- put weights into 8 bits, a scale for each output, and say what that costs (*Exercise 1*)
- keep encodings of pictures, by equality and by likeness, and say when likeness goes stale (*Exercise 2*)
- watch deadlines while a robot works (*Exercise 3*), and raise an alarm when the world drifts (*Exercise 4*)
- serve a policy over HTTP and drive a robot through it; exchange the generic one for yours by one parameter
- tell a slow policy from an imprecise one by their success (*signature figure*)
- try each cure of the sheet's troubleshooting, and write the report from your own runs

You need notebooks 0 and 9.
""")
L.code("setup", r"""
import tempfile
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, torch
from labkit import Tabletop, Variation, check, claims_table, film
from labkit import load_sweep, plots, receipt, rollout, set_up, trusted, wilson

device, sweep = set_up(seed=0), load_sweep("lab_deployment")
""")
L.md("cold-open", r"""
## Step 6, as printed

The sheet prepares the model for static quantisation and converts it. Between the two, a static recipe must *see some data*: it has to learn how large the numbers inside become. The printed one shows it none. With the stubs added without which it raises, it runs:
""")
L.code("cold-open", r"""
from labkit.serving.quantisation import answer_difference, static_int8
from labkit.task_specific_vla import load_waypoint_policy

generic = load_waypoint_policy()
printed = static_int8(generic)  # no calibration
film(printed, task="put", seed=3).animation()
""")
L.code("cold-open", r"""
seen = [Tabletop("put").reset(seed=seed)[0] for seed in range(30)]
for label, policy in (("float32", generic), ("int8, as printed", printed)):
    places = {tuple(w.round(3)) for w in policy.decide(seen).waypoints[:, :3]}
    print(f"{label:17s} {len(places)} places for {len(seen)} pictures")
""")
L.md("cold-open", r"""
Nothing raised. Every number inside was rounded to one of 256 steps of a range that nobody had measured, and what a picture says was lost on the way.
""")
L.md("predict", r"""
## Predict: what do 8 bits cost?

Mended, the weights of every linear layer have 8 bits in place of 32. **Before you run on**, commit: of 100 episodes of `put`, how many more fail than with float32? And how many fail if the float32 policy answers half a second late, while the block moves on a belt?
""")
L.code("predict", r"""
my_guess = {"int8": 20, "half a second late": 20}  # <- episodes of 100 lost
""")
L.md("idea", r"""
## Weights in 8 bits

A weight becomes a whole number from -127 to 127 and a scale. One scale for a whole matrix is set by its largest entry, wherever that stands; one **for each row** (output channel) lets every row use all its steps:

$$q_{oi} = \mathrm{round}(w_{oi} / s_o), \qquad s_o = \max_i |w_{oi}| / 127, \qquad \hat w_{oi} = s_o\, q_{oi}$$
""")
L.md("exercise", r"""
**Exercise 1 · 10 minutes · medium · 4 points** Put a matrix into 8 bits, a scale for each row.
""")
L.exercise("lab-int8", solution("int8_weights"))
L.check("lab-int8", 4, "check(int8_weights)")
L.md("hints", r"""
<details><summary>Hint</summary>

`weight.abs().amax(dim=1, keepdim=True)` is the largest entry of each row, with shape (O, 1), and divides the rows as it should. A row of zeros has scale 0; put 1 in its place before you divide.
</details>
""")
L.code("bridge", r"""
ways = {w: sweep.where(part="ways", policy="generic", way=w)[0] for w in dict.fromkeys(
    p["way"] for p in sweep.where(part="ways", policy="generic"))}
print(f"{'generic policy':28s} put of 100   MB in memory   time / float32   mm from float32")
for way, p in ways.items():
    print(f"{way:28s} {p['success']['put']:10d}   {p['bytes'] / 1e6:12.2f}   "
          f"{p['ms']['p50'] / p['fp32_ms']['p50']:14.2f}   {p['apart_mm']['mean']:15.1f}")
""")
L.code("bridge", r"""
print("the tiny VLA, whose head chooses among 256 tokens:")
for p in sweep.where(part="ways", policy="tiny"):
    print(f"{p['way']:28s} put {p['success']['put']:3d} of 100, {p['bytes'] / 1e6:.2f} MB")
""")
L.md("bridge", r"""
Eight bits cost this policy nothing, one scale or many; calibrated static int8 and even four bits are as good. The tiny VLA is another case: its head compares 256 tokens by small differences, and one scale for the whole matrix drowns them. *Which* scale is not a detail.

Smaller is not faster by itself: in PyTorch most of these ways cost time here. What is smaller **and** faster is the same model exported to ONNX Runtime.
""")
L.md("idea", r"""
## Not computing twice

Between two decisions the picture often stays, and the sentence nearly always. Their encodings can be kept. **Exact**: the same bytes, the same answer, bit for bit. **Similar**: near enough counts as the same, which saves more, and answers for a table that is no longer there.
""")
L.md("exercise", r"""
**Exercise 2 · 12 minutes · hard · 4 points** A cache of the least recently used, with a threshold.
""")
L.exercise("lab-cache", solution("answered_by"))
L.check("lab-cache", 4, "check(answered_by)")
L.code("bridge", r"""
figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
where = {"independent tables": dict(of="pictures", scenes="independent"), "a block within 3 cm": dict(of="pictures", scenes="3 cm"),
         "a block within 6 cm": dict(of="pictures", scenes="6 cm"), "sentences": dict(of="sentences")}
for (label, found), colour, marker in zip(where.items(), plots.COLOURS, plots.MARKERS):
    points = sweep.where(part="caching", **found)
    hits = [100 * (p["exact"] + p["similar"]) / (p["exact"] + p["similar"] + p["misses"]) for p in points]
    panel = panels[int(label == "sentences")]
    panel.plot(hits, [p["success"] for p in points], color=colour, marker=marker, label=label)
for panel in panels:
    panel.set(xlabel="hits (% of encodings)", ylabel="success (% of 100 episodes)", ylim=(-4, 104))
    panel.legend(frameon=False, fontsize=10)
plots.show(figure, alt="Success against the share of hits, for pictures and for sentences.")
""")
L.md("idea", r"""
## Watching the clock

A mean hides what a robot feels: the decision that came too late. Watched are the 95th percentile of the last decisions and the share that missed the deadline.
""")
L.md("exercise", r"""
**Exercise 3 · 8 minutes · easy · 3 points** Percentile and misses over a sliding window.
""")
L.exercise("lab-deadline", solution("latest"))
L.check("lab-deadline", 3, "check(latest)")
L.md("bridge", r"""
Now the real thing: the policy behind HTTP, in OpenVLA's protocol, and a client that is a policy itself, so that the same `rollout` drives the robot through it. Which policy answers is **one parameter**.
""")
L.code("bridge", r"""
from labkit.serving.client import PolicyClient
from labkit.serving.core import PolicyCore, policy_named
from labkit.serving.http import PolicyServer
from labkit.serving.monitor import Monitor

monitor = Monitor(deadline=0.05)
with PolicyCore(policy_named("generic"), monitor=monitor) as core:
    with PolicyServer(core, port=0).in_background() as server:
        client, first_server = PolicyClient(server.url), server
        print(client.health())
        served = rollout(client, "put", episodes=30)
alone = rollout(generic, "put", episodes=30)
print("through HTTP:", served)
print("the same episodes succeed:", np.array_equal(served.success, alone.success))
print(monitor.look())
""")
L.md("bridge", r"""
A server must stand what clients send. Each of these gets a 4xx and one sentence, and the next request is answered as if nothing had been:
""")
L.code("bridge", r"""
import http.client, json

BAD = {"no JSON": b"{'image': 1}", "no image": b'{"instruction": "pick up the ball"}',
       "a picture of text": b'{"image": "cat", "instruction": "pick up the ball"}',
       "numbers for words": b'{"image": [[[0, 0, 0]]], "instruction": 7}',
       "too large": b"[" + b"0," * 3_000_000 + b"0]"}
with PolicyCore(policy_named("generic")) as core, PolicyServer(core, port=0).in_background() as server:
    for label, body in BAD.items():
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        try:
            connection.request("POST", "/act", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            print(f"{label:18s} {answer.status} {answer.read().decode()[:150]}")
        except (BrokenPipeError, ConnectionResetError):
            print(f"{label:18s} refused while it was being sent")
    print("still there:", PolicyClient(server.url).health())
""")
L.md("idea", r"""
## An alarm for a world that drifts

Page (1954) and Hinkley (1971): add up how far each number lies above the mean so far, less a tolerance $\delta$; as long as nothing has changed, the sum keeps falling back to its own minimum. When it has climbed a threshold above that, the mean has moved:

$$m_t = \sum_{k \le t} (x_k - \bar x_k - \delta), \qquad \text{alarm where } m_t - \min_{k \le t} m_k > \lambda$$
""")
L.md("exercise", r"""
**Exercise 4 · 10 minutes · medium · 4 points** The Page-Hinkley test.
""")
L.exercise("lab-drift", solution("page_hinkley"))
L.check("lab-drift", 4, "check(page_hinkley)")
L.md("figure", r"""
## Latency or precision?

The block moves on a belt; the robot looks, thinks for so many milliseconds, and reaches for where the block *was*.
""")
L.code("figure", r"""
from labkit.sweeps import AcrossSeeds

figure_rows = {}
for belt in (0.02, 0.04):
    for bits in ("fp32", "int8"):
        points = [p for p in sweep.where(part="delay", belt=belt) if p["delay"] != "own"]
        figure_rows[f"{bits}, belt {100 * belt:.0f} cm/s"] = {
            1000 * p["delay"]: AcrossSeeds(p["success"][bits] / p["episodes"], wilson(p["success"][bits], p["episodes"]), 1)
            for p in points}
figure = plots.success_lines(figure_rows, "delay (ms)", "pick from a belt, each decision late")
plots.show(figure, alt="Success against delay, four lines.", says=plots.in_words(
    {f"{label}, {ms:.0f} ms": line[ms] for label, line in figure_rows.items() for ms in (0, 500)}))
""")
L.md("figure", r"""
The lines of float32 and int8 lie on each other; the delay costs what it costs. OpenVLA's table had int8 as the worse policy, and its appendix the reason: it was the *slower* one. Here int8 in ONNX Runtime is the faster one, and pays nothing.
""")
L.md("figure", r"""
## Troubleshooting

The sheet's four troubles and its cures, each tried (three seeds). What stands after a comma is not the sheet's.
""")
L.code("figure", r"""
for p in sweep.where(part="troubles", seed=0):
    print(p)  # TODO: one table: trouble, cure, success with interval, what it costs
""")
L.md("figure", r"""
## Your report

Numbers are filled in from what you ran; what they mean is left to you. `check` finds what is missing or does not agree; a person reads the rest by the rubric.
""")
L.code("figure", r"""
from labkit import DATA
from labkit.lab_report import LabReport

report = LabReport(Path(tempfile.mkdtemp()), author="you")
report.dataset(DATA / "demonstrations" / "forward")
report.integration(first_server, served, alone)
page, notebook = report.build()
print(page.name, notebook.name)
print(*report.check(), sep="\n")
""")
L.md("play", r"""
## Play: a robot under watch

TODO: sliders for delay and belt; the monitor's line beside the film.
""")
L.md("control", r"""
## What would fool us

TODO: (1) is it the late answer, or the belt? the same delays with the belt at rest; (2) a cache that never hits costs what it looks up.
""")
L.md("question", r"""
## Question (in your own words, about 150 words)

A team's policy succeeds in 71 of 100 episodes with 16-bit weights and in 58 with 8-bit weights, on a robot that controls five times a second. They conclude that 8 bits are too few. Which two measurements would you ask for before you agree, and what would each outcome mean? Support your answer with results of this notebook. Then say which of the sheet's three cures for slow inference you would try first on a machine like yours, and why.

<details><summary>How the answer is marked (5 points)</summary>

- 1: asks for the response time of both policies (p50 and p95), since 8 bits may be slower
- 1: asks for success of both with the same waiting (the robot stands still while it thinks), which leaves precision alone
- 1: reads both outcomes: equal success then means latency, unequal means precision; says which scale (per row or one) and whether it was calibrated
- 1: a number with its interval from this notebook for delay and one for precision
- 1: a cure with its measured ratio of times, and what it costs in success
</details>
""")
out=sys.argv[1]
L.write(out)
