import sys; from pathlib import Path; sys.path.insert(0, str(Path(__file__).parent))
from nblib import Lesson
L=Lesson()
SOLUTIONS = Path(__file__).with_name("notebook10.py").read_text()
def solution(name):
    "The function as a cell has it."
    start = SOLUTIONS.index(f"def {name}("); end = SOLUTIONS.find("\ndef ", start + 1)
    return SOLUTIONS[start : end if end > 0 else None].strip("\n")
L.md("title", r"""
# 10 · Lab: the policy at work, small, in time, watched

**The sheet's recipe for eight bits runs, and says the same to every picture. Mended, eight bits cost this robot nothing; half a second costs it three moving blocks of four. A cache that is generous acts on a table that is gone, and an alarm that is silent proves little. None of this shows in a loss.**

Lecture: lab sheet, *Exercise 2*, steps 5 and 6, report, troubleshooting · week 12

Measured: not yet
""")
L.md("abilities", r"""
## What you will be able to do

- put weights into eight bits, and say what that costs in size, time and success (*Exercise 1*)
- keep what has been computed, and say when it has gone stale (*Exercise 2*)
- put a policy behind HTTP, exchange the generic one for yours by one parameter, and have it stand bad requests
- watch deadlines while the robot works (*Exercise 3*), raise an alarm when the world drifts, and know what it does not see (*Exercise 4*)
- tell a slow policy from an imprecise one (*signature figure*)
- reproduce the sheet's four troubles, and judge its twelve cures by numbers
- make a lab report from your own runs

You need notebooks 0 and 9.
""")
L.code("setup", r"""
import tempfile
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, torch
from labkit import DATA, Tabletop, Variation, check, claims_table, film, load_policy
from labkit import load_sweep, plots, receipt, rollout, set_up, trusted

device, sweep = set_up(seed=0), load_sweep("lab_deployment")
""")
L.md("cold-open", r"""
## Step 6, as printed

The sheet sets a configuration for *static* quantisation, calls `prepare` and calls `convert`. Static means: the range of every number inside is fixed beforehand. `prepare` puts observers in place that measure those ranges, and then somebody must show the model some data. The printed recipe shows it none. (As printed it does not even run; `static_int8` adds the two stubs that each layer needs, and nothing else.)
""")
L.code("cold-open", r"""
from labkit.serving.quantisation import static_int8
from labkit.task_specific_vla import load_waypoint_policy

generic = load_waypoint_policy()
printed = static_int8(generic)  # no calibration
film(printed, task="put", seed=3).animation()
""")
L.code("cold-open", tags=("nbval-check-output",), text=r"""
seen = [Tabletop("put").reset(seed=seed)[0] for seed in range(30)]
for label, policy in (("float32", generic), ("int8, as printed", printed)):
    places = np.unique(policy.decide(seen).waypoints[:, :3].round(3), axis=0)
    print(f"{label:17s} places named for {len(seen)} pictures: {len(places)}")
""")
L.md("cold-open", r"""
Nothing raised, the file is smaller, and the robot points at one place whatever it sees. A test of step 6 that only asks whether the model *runs* passes.
""")
L.md("predict", r"""
## Predict: what do eight bits cost, and what does waiting cost?

Mended, every weight of the towers has 8 bits in place of 32. **Before you run on**, commit: of 100 episodes of `put`, how many more fail? And when a block moves on a belt by 4 cm a second, and the float32 policy answers half a second late: of the episodes that went well without the delay, how many in a hundred are lost?
""")
L.code("predict", r"""
my_guess = {"eight bits": 20, "half a second": 20}  # <- episodes lost, of a hundred
""")
L.md("idea", r"""
## Weights in eight bits

A weight becomes a whole number from -127 to 127 and a scale that turns it back. One scale for a whole matrix is set by its largest entry, wherever that stands; a scale **for each row**, that is for each output of the layer, lets every row use all its steps, and costs one float a row:

$$q_{oi} = \mathrm{round}(w_{oi} / s_o), \qquad s_o = \max_i |w_{oi}| / 127, \qquad \hat w_{oi} = s_o\, q_{oi}$$
""")
L.md("exercise", r"""
**Exercise 1 · 10 minutes · medium · 4 points** Put a matrix into eight bits, with a scale for each row.
""")
L.exercise("lab-int8", solution("int8_weights"))
L.check("lab-int8", 4, "check(int8_weights)")
L.md("hints", r"""
<details><summary>Hint</summary>

`weight.abs().amax(dim=1, keepdim=True)` has the shape (O, 1), and dividing by it divides each row by its own. A row of zeros would divide by zero: put 1 in the scale's place first. `Tensor.norm()` of a matrix is the root of the sum of all squares.
</details>
""")
L.code("bridge", r"""
from labkit.serving.quantisation import int8_per_row

to_int8 = trusted(int8_weights, otherwise=int8_per_row)
small, errors = generic.copy(), {}
for name, layer in small.model.named_modules():
    if isinstance(layer, torch.nn.Linear):
        kept = to_int8(layer.weight.detach())
        layer.weight.data = (kept["scale"][:, None] * kept["q"]).float()
        errors[name] = float(kept["error"])
worst = max(errors, key=errors.get)
print(f"{len(errors)} matrices; the worst, {worst}, is {100 * errors[worst]:.1f} % of its norm off")
print("float32:", whole := rollout(generic, "put"))
print("int8:   ", rollout(small, "put"), f"  (you said {my_guess['eight bits']} fewer)")
""")
L.md("bridge", r"""
That was the effect on the answers alone: the numbers were turned back before they were used. To be smaller in memory and perhaps faster, a library must compute with them. The same policy in every way this course knows, from the stored experiment:
""")
L.code("bridge", tags=("nbval-check-output",), text=r"""
generic_ways = sweep.where(part="ways", policy="generic")
print(f"{'generic policy':28s}put, of 100   MB in memory   time / float32's   mm from float32's answer")
for p in generic_ways:
    print(f"{p['way']:28s}{p['success']['put']:11d}   {p['bytes'] / 1e6:12.2f}   "
          f"{p['ms']['p50'] / p['fp32_ms']['p50']:16.2f}   {p['apart_mm']['mean']:24.1f}")
""")
L.code("bridge", tags=("nbval-check-output",), text=r"""
print("the tiny VLA of the other notebooks, which chooses among 256 tokens for each number:")
for p in sweep.where(part="ways", policy="tiny"):
    print(f"{p['way']:28s}{p['success']['put']:11d}   {p['bytes'] / 1e6:12.2f}")
""")
L.md("bridge", r"""
Read the two tables against each other. For a policy that *regresses* a place, a rounding error is a millimetre, and no way but the uncalibrated one loses an episode. For one that *chooses a token*, the first of 256 wins by a small margin, and **one scale for the matrix** decides otherwise: which scale is not a detail. Calibration of the activations is not one either.

And smaller is not faster by itself. In PyTorch, most of these ways take *longer* than float32 on this machine: unpacking costs more than the small products save. Faster is another runtime, ONNX Runtime, with the same weights; and with int8 on top faster again. (torchao, PyTorch's successor for these functions, was measured beside it and was slower than float32 here.) Now mend the printed recipe, and export the policy:
""")
L.code("bridge", r"""
from labkit.serving.quantisation import answer_difference, onnx_fp32, onnx_int8, weight_bytes

print("calibrated on 30 pictures:", rollout(static_int8(generic, seen), "put", episodes=50))
in_runtime = onnx_fp32(generic)
in_runtime_int8 = onnx_int8(in_runtime)
print("in ONNX Runtime, int8:", answer_difference(in_runtime_int8, generic, seen))
took = np.array([[p.decide([o]).seconds for p in (generic, in_runtime, in_runtime_int8)] for o in seen])
both = {"PyTorch": generic, "ONNX": in_runtime, "ONNX int8": in_runtime_int8}
for (label, policy), column in zip(both.items(), took.T):
    p50, p95 = 1000 * np.percentile(column, [50, 95])
    print(f"{label:10s} p50 {p50:5.2f} ms   p95 {p95:5.2f} ms   {weight_bytes(policy) / 1e6:.2f} MB")
""")
L.md("idea", r"""
## Not computing twice

*"Implement caching mechanisms to reduce redundant computations for similar visual scenes or commands"*, says the sheet. **Exact** is safe: the same bytes have the same encoding. **Similar** saves more and needs a distance and a threshold, and whoever sets the threshold says how far the world may move without the robot noticing.

A cache has room for so many. When it is full, the entry that was used longest ago goes.
""")
L.md("exercise", r"""
**Exercise 2 · 12 minutes · hard · 4 points** Which request's encoding answers each request?
""")
L.exercise("lab-cache", solution("answered_by"))
L.check("lab-cache", 4, "check(answered_by)")
L.md("hints", r"""
<details><summary>Hint</summary>

Keep a list of the requests that were encoded, the one used longest ago first. A request looks for the nearest of them. Near enough: that one answers, and moves to the end of the list. Otherwise the request answers itself and joins the end; then cut the list from the front to `capacity`.
</details>

<details><summary>Hint: what is not kept</summary>

A request that was answered by another is *not* kept under its own place. If it were, the next one could be near to it, and the next to that one, and the cache would walk across the table in small steps with the features of the first picture.
</details>
""")
L.code("bridge", r"""
from labkit.serving.caching import answered_from

places = 100 * torch.from_numpy(np.random.default_rng(0).uniform(-0.12, 0.12, (60, 2))).float()  # cm
figure, panels = plt.subplots(1, 3, figsize=(11, 3.9), sharey=True, layout="constrained")
answers, said = trusted(answered_by, otherwise=answered_from), {}
for panel, threshold in zip(panels, (1.0, 3.0, 8.0)):
    chosen = [int(one) for one in answers(places, 30, threshold)]
    for here, from_where in zip(places, places[chosen]):
        panel.plot(*zip(here, from_where), color=plots.COLOURS[1], marker="", linewidth=1)
    panel.plot(*places.T, "o", color=plots.COLOURS[0], markersize=4)
    hits = sum(n != one for n, one in enumerate(chosen))
    off = float((places - places[chosen]).norm(dim=1).max())
    said[f"threshold {threshold:g} cm"] = f"{hits} of 60 not encoded, the stalest {off:.1f} cm off"
    panel.set(title=f"threshold {threshold:g} cm", xlabel="block's place, x (cm)", aspect="equal")
panels[0].set_ylabel("y (cm)")
plots.show(figure, alt="Sixty places, each joined to the one that answers it.", says=plots.in_words(said))
""")
L.md("bridge", r"""
Each line is a robot that reaches for where another block was. The vacuum cup forgives about a centimetre; the rest is a miss. A camera does not measure centimetres, however. It has grey levels, and the cache compares small pictures of 12 by 12 fields, in the field that changed most. The stored experiment, on the real policy: hits against success, as the threshold grows.
""")
L.code("bridge", r"""
where = {"another table each time": dict(of="pictures", scenes="independent"),
         "a station, block within 3 cm": dict(of="pictures", scenes="3 cm"),
         "a station, block within 6 cm": dict(of="pictures", scenes="6 cm"), "sentences": dict(of="sentences")}
figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
for (label, which), colour, marker in zip(where.items(), plots.COLOURS, plots.MARKERS):
    panel, points = panels[int(label == "sentences")], sweep.where(part="caching", **which)
    hits = [100 * (1 - p["misses"] / (p["exact"] + p["similar"] + p["misses"])) for p in points]
    panel.plot(hits, [p["success"] for p in points], color=colour, marker=marker, label=label)
    for x, p in zip(hits, points):
        if p["threshold"] in (0.35, 1.0, 40, 120) and "3 cm" not in label:
            panel.annotate(f"{p['threshold']:g}", (x, p["success"]), (4, 6), textcoords="offset points",
                           fontsize=9)
for panel, title in zip(panels, ("pictures, thresholds in grey levels", "sentences, in share of words")):
    panel.set(title=title, xlabel="answered from the cache (%)", xlim=(-3, 103), ylim=(-4, 104))
    panel.legend(frameon=False, fontsize=10)
panels[0].set_ylabel("success (% of 100 episodes)")
at = {f"{label}, threshold {p['threshold']}": f"{p['misses']} encoded, {p['success']} of 100 succeed"
      for label, which in where.items() for p in sweep.where(part="caching", **which)
      if p["threshold"] in (40, 120, 0.35)}
plots.show(figure, alt="Success against the share of hits.", says=plots.in_words(at))
""")
L.md("bridge", r"""
Where the tables are independent, there is nothing to save: the threshold that begins to hit begins to fail. At a station where one block comes back to nearly the same place, a threshold saves most of the work at little loss, and **too much of it is no matter within three centimetres and fatal within six**: the right threshold is a property of the workplace, not of the cache. Between sentences, one word of six is a small distance and may be the colour.

What would *you* see? A robot that is sure, quick and late by one table:
""")
L.code("bridge", r"""
from labkit.serving.caching import CachingPolicy

generous = CachingPolicy(generic, picture_threshold=120)
generous.decide([Tabletop("put").reset(seed=20)[0]])  # it has seen one other table
stale = film(generous, task="put", seed=15)
print(generous.pictures.counts, stale.outcome)
stale.animation()
""")
L.md("idea", r"""
## Watching the clock

A mean hides what a robot feels, the decision that came too late. What is watched is the **95th percentile** of the latest decisions, and the share of them that **missed the deadline**. The window slides: what was slow an hour ago is no news.
""")
L.md("exercise", r"""
**Exercise 3 · 8 minutes · easy · 3 points** Percentile and misses over a sliding window.
""")
L.exercise("lab-deadline", solution("latest"))
L.check("lab-deadline", 3, "check(latest)")
L.md("hints", r"""
<details><summary>Hint</summary>

After decision `n` (counted from 1) the window is `seconds[max(0, n - window):n]`. `torch.quantile(recent, 0.95)`, and the mean of `recent > deadline`.
</details>
""")
L.md("bridge", r"""
Now live. The robot picks up one object after another; half-way, its computer is given other work. The picture below is drawn while it works:
""")
L.code("bridge", r"""
from threading import Event, Thread

from labkit.serving.live import LiveMonitor
from labkit.serving.monitor import Monitored, sliding


def other_work(stop):
    while not stop.is_set():
        torch.rand(600, 600) @ torch.rand(600, 600)


deadline, stop = 2 * float(np.median(took[:, 0])), Event()  # twice what it takes when it is alone
monitor = LiveMonitor(deadline, window=40)
robot = Monitored(generic, monitor)
rollout(robot, "pick", episodes=40, batch=1, progress=False)
[Thread(target=other_work, args=(stop,), daemon=True).start() for _ in range(4)]
try:
    rollout(robot, "pick", episodes=40, batch=1, progress=False)
finally:
    stop.set()
    monitor.draw()
""")
L.code("bridge", r"""
seconds = torch.tensor(monitor.times)
found = trusted(latest, otherwise=sliding)(seconds, 40, deadline)
for moment in (len(seconds) // 2 - 1, len(seconds) - 1):
    print(f"after {moment + 1} decisions: p95 {1000 * float(found['p95'][moment]):.1f} ms, "
          f"{100 * float(found['missed'][moment]):.0f} % of the last 40 late; "
          f"mean of all so far {1000 * float(seconds[:moment + 1].mean()):.1f} ms")
""")
L.md("bridge", r"""
## Step 5: into the robot's system

The sheet replaces the generic model with the task-specific one *in the ROS node*. A node is one way in; here the policy stands in a **core** that knows no wire, and around it are a server (HTTP, with the `/act` of OpenVLA), a ROS 2 node, and a client that is itself a policy, so that the same `rollout` drives the robot through it. First a policy of your own, as in notebook 9: fifty demonstrations of `forward`, the text tower and the head.
""")
L.code("bridge", r"""
from labkit.demonstrations import read
from labkit.experiments.lab_task_specific_vla import OURS
from labkit.task_specific_vla import set_trainable
from labkit.waypoint_regression import action_accuracy, fit, waypoint_samples

folder = Path(tempfile.mkdtemp())
splits = ("train", "validation", "test")
forward, stack = ({s: waypoint_samples(read(DATA / "demonstrations" / task, s)) for s in splits}
                  for task in ("forward", "stack"))
mine = generic.copy()
set_trainable(mine.model, "language")
curves = fit(mine, forward["train"], forward["validation"], folder / "run", **OURS)
mine.save(folder / "forward")
print(curves)
""")
L.code("bridge", r"""
from labkit.serving.client import PolicyClient
from labkit.serving.core import PolicyCore, policy_named
from labkit.serving.http import PolicyServer
from labkit.serving.monitor import Monitor


def served(name, **options):
    core = PolicyCore(policy_named(str(name)), monitor=Monitor(deadline), **options)
    with core, PolicyServer(core, port=0).in_background() as server:  # 127.0.0.1, any port that is free
        return server, rollout(PolicyClient(server.url), "forward", episodes=30, batch=1)


through_http = {}
for name in ("generic", folder / "forward"):  # the one parameter
    my_server, through_http[name] = served(name)
    print(f"{Path(name).name:8s} {through_http[name]}\n         {my_server.core.monitor.look()}")
alone = {policy: rollout(policy, "forward", episodes=30, batch=1) for policy in (generic, mine)}
same = np.array_equal(through_http[name].success, alone[mine].success)
print("the same episodes succeed as without a server:", same)
""")
L.md("bridge", r"""
On a command line that is `python -m labkit serve --policy generic`, or `--policy FOLDER`. In ROS it is the node's parameter `policy`; the node is `labkit/serving/ros_node.py`, and starts where ROS 2 is installed (`python -m labkit.serving.ros_node --ros-args -p policy:=FOLDER`).

Eight robots at once, two hundred requests. Those that wait while the policy is busy share its next forward pass:
""")
L.code("bridge", r"""
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

for label, options in (("each alone", dict(max_batch=1)), ("shared", dict())):
    with PolicyCore(generic, **options) as core, PolicyServer(core, port=0).in_background() as server:
        client, begun = PolicyClient(server.url), perf_counter()
        with ThreadPoolExecutor(8) as robots:
            answers = list(robots.map(lambda n: client.act(seen[n % 30]), range(200)))
        seconds = perf_counter() - begun
        forwards = core.metrics.registry.get_sample_value("labkit_forward_seconds_count")
        print(f"{label:11s} {len(answers)} answers, {forwards:.0f} forward passes, {seconds:.1f} s")
""")
L.md("bridge", r"""
A server must stand what clients send, by mistake or on purpose. Each of these gets a sentence, and the next request is answered as if nothing had been. No request can bring code with it: arrays travel as JSON and bytes, never as pickle.
""")
L.code("bridge", r"""
import http.client

bad = {"no JSON": b"{'image': 1}", "no image": b'{"instruction": "pick up the ball"}',
       "words for a picture": b'{"image": "cat", "instruction": "pick up the ball"}',
       "a number for words": b'{"image": [[[0, 0, 0]]], "instruction": 7}',
       "an unknown field": b'{"image": [[[0, 0, 0]]], "instruction": "pick up the ball", "speed": 2}',
       "too large": b"[" + b"0," * 2_500_000 + b"0]"}
with PolicyCore(generic) as core, PolicyServer(core, port=0).in_background() as server:
    for label, body in bad.items():
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/act", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        print(f"{label:20s} {answer.status} {answer.read().decode()[:120]}")
        connection.close()
    print("then:", PolicyClient(server.url).act(seen[0]).round(3))
""")
L.md("idea", r"""
## An alarm for a world that drifts

The robot does not know whether it succeeded. It knows how long it thought, what it said, and how sure it was. Page (1954) and Hinkley (1971): add up how far each number lies above the mean so far, less a tolerance $\delta$ for noise. While nothing changes, the sum keeps falling to new lows; when it has climbed $\lambda$ above its lowest point, the mean has risen:

$$m_t = \sum_{k \le t} (x_k - \bar x_k - \delta), \qquad \text{alarm where } m_t - \min_{k \le t} m_k > \lambda$$
""")
L.md("exercise", r"""
**Exercise 4 · 10 minutes · medium · 4 points** The Page-Hinkley test.
""")
L.exercise("lab-drift", solution("page_hinkley"))
L.check("lab-drift", 4, "check(page_hinkley)")
L.md("hints", r"""
<details><summary>Hint</summary>

`values.cumsum(0) / torch.arange(1, len(values) + 1)` is the mean so far, at each time. `Tensor.cummin(0).values` is the least so far.
</details>
""")
L.md("bridge", r"""
The tiny VLA of the other notebooks says tokens, and each has a probability. What the test sees here is its **doubt**, the mean $-\log p$ of a decision's tokens, in standard deviations. It picks up objects for fifty episodes as trained; then the world stays, or changes:
""")
L.code("bridge", r"""
worlds = {"as before": Variation(), "30 % of the light": Variation(light=0.3),
          "camera 16 cm aside": Variation(camera_shift=(0.16, 0, 0)),
          "camera 10 cm higher": Variation(camera_shift=(0, 0, 0.1))}


class Doubtful:
    "A policy around a policy that keeps the doubt of each decision."

    def __init__(self, policy):
        self.policy, self.doubts = policy, []

    def decide(self, observations, instructions=None):
        decision = self.policy.decide(observations, instructions)
        self.doubts += (-np.log(decision.probabilities).mean(1)).tolist()
        return decision


""")
L.code("bridge", r"""
tiny = load_policy("tiny")


def doubts_in(world, seed):
    robot = Doubtful(tiny)
    result = rollout(robot, "pick", episodes=50, seed=seed, variation=world, progress=False)
    return result, robot.doubts[: result.decisions.sum()]  # the rest was asked for its response time only
""")
L.code("bridge", r"""
from labkit.serving import monitor as library

test = trusted(page_hinkley, otherwise=library.page_hinkley)
usual, steady = doubts_in(Variation(), seed=500)
evidence, said = {}, {}
for n, (label, world) in enumerate(worlds.items()):
    result, doubts = doubts_in(world, seed=600)
    found = test(torch.tensor(steady + doubts) / np.std(steady), 0.5, 15.0)
    evidence[label], at = found["evidence"], found["alarm"]
    said[label] = (f"{result.success.sum()} of 50 succeed, before {usual.success.sum()}; "
                   + (f"alarm {at - len(steady)} decisions after the change" if at >= 0 else "no alarm"))
""")
L.code("bridge", r"""
figure, axes = plt.subplots(figsize=(9, 3.8))
for label, line in evidence.items():
    axes.plot(line, marker="", label=label)
axes.axhline(15, color="black", linestyle="--", linewidth=1)
axes.axvline(len(steady), color="0.5", linewidth=1)
axes.set(xlabel="decision", ylabel="evidence (standard deviations)", ylim=(0, 60))
axes.legend(frameon=False, loc="upper left")
plots.show(figure, alt="Evidence of the test by decision, four worlds.", says=plots.in_words(said))
""")
L.code("bridge", r"""
# The generic policy says a place and no probability: its monitor has only the answers themselves.
watched = Monitor(deadline)
before, after = (rollout(Monitored(generic, watched), "pick", episodes=50, seed=seed, variation=worlds[world],
                         progress=False) for world, seed in (("as before", 500), ("camera 16 cm aside", 600)))
print(f"{before.success.sum()} then {after.success.sum()} of 50 succeed; alarms about what it says:",
      [str(alarm) for alarm in watched.look().alarms if alarm.stream != "response time"])
""")
L.md("bridge", r"""
Doubt tells that pictures have become unlike those it knows, within a few decisions. **It does not tell what that costs**: the camera moved aside costs most episodes, and its evidence climbs most slowly. The policy without probabilities loses its successes in silence, since wrong places are as scattered as right ones. An alarm is a reason to look. Silence is no proof, and neither replaces a count.

(One outlier can lift the plain test over its threshold. The course's `Monitor` cuts every number at three deviations, and waits longer.)
""")
L.md("figure", r"""
## Latency or precision?

OpenVLA's Table 2 has the same policy in three precisions on a real robot: eight bits succeed less than sixteen, and four as much as sixteen. Eight too few, and four enough? Their explanation: the 8-bit kernels were slow, and the robot acted late. We can part the two. A block moves on a belt; the robot looks, thinks for so many milliseconds *of the simulated world*, and reaches. Float32 and int8 (ONNX) are given **the same delay**, on the same four hundred episodes:
""")
L.code("figure", r"""
from labkit.rollouts import wilson
from labkit.sweeps import AcrossSeeds


def of(count, episodes):
    return AcrossSeeds(count / episodes, wilson(count, episodes), 1)
""")
L.code("figure", r"""
from labkit.serving.delay import rollout_with_delay


def line(belt, bits):
    points = [p for p in sweep.where(part="delay", belt=belt) if p["delay"] != "own"]
    return {round(1000 * p["delay"]): of(p["success"][bits], p["episodes"]) for p in points}


lines = {f"{bits}, belt {100 * belt:.0f} cm/s": line(belt, bits)
         for belt in (0.02, 0.04) for bits in ("fp32", "int8")}
on_belt = Variation(belt_speed=0.04, shapes=("block", "cup"))  # a ball would roll
live = rollout_with_delay(in_runtime_int8, "pick", 0.3, episodes=50, variation=on_belt)
figure = plots.success_lines(lines, "delay (ms)", "pick from a belt",
                             live={"int8, belt 4 cm/s": (300, live.rate)})
plots.show(figure, alt="Success against delay, four lines.", says=(
    plots.in_words({f"{label}, {ms} ms": points[ms] for label, points in lines.items() for ms in (0, 500)})
    + f" The star is your robot: {live}."))
""")
L.code("figure", r"""
fast = lines["fp32, belt 4 cm/s"]
lost = 100 * (1 - fast[500].rate / fast[0].rate)
print(f"of those that succeed on time, {lost:.0f} % are lost at 500 ms (you said {my_guess['half a second']})")
for p in sweep.where(part="delay", belt=0.04):
    print(f"delay {p['delay']!s:4s} only float32 succeeds: {p['only']['fp32']:2d}, "
          f"only int8: {p['only']['int8']:2d} (of {p['episodes']})")
p = sweep.where(part="delay", belt=0.04, delay="own")[0]
print("each late by its own time:", {bits: f"{p['late_ms'][bits]} ms, {of(p['success'][bits], p['episodes'])}"
                                     for bits in ("fp32", "int8")})
""")
L.md("figure", r"""
The lines of the two precisions lie on each other, and the few episodes that only one of them wins go either way. **Time costs, bits do not**: on this robot the story holds. Here int8 is the *faster* one, because of its runtime, and at a few milliseconds neither loses anything. Whoever reports success of a quantised policy without its response time has measured both at once.
""")
L.md("figure", r"""
## Troubleshooting

The sheet names four troubles, with three cures each. Here is each trouble in three cells: cause it, see it, try a cure. Then all twelve cures in one table.

**1. Overfitting.** Ten demonstrations of `stack`, everything trains, the last epoch is kept.
""")
L.code("figure", r"""
ten = stack["train"].rows(range(20))  # two decisions each
overfitted, weights = generic.copy(), {}
set_trainable(overfitted.model, "full")
fit(overfitted, ten, stack["validation"], **OURS | {"epochs": 40, "step_size": 20, "pointing": 0.0},
    callbacks=[lambda epoch, policy, curves: weights.update(
        {name: value.clone() for name, value in policy.model.state_dict().items()})])
overfitted.model.load_state_dict(weights)
print(f"kept: the last epoch's {len(weights)} tensors, not the best one's")
""")
L.code("figure", r"""
def how_far_off(policy, samples):
    error = action_accuracy(policy, samples)
    return 1000 * np.sqrt(sum(error[axis]["error"] ** 2 for axis in "xyz"))


for label, policy in (("generic", generic), ("overfitted", overfitted)):
    print(f"{label:11s} {how_far_off(policy, ten):5.1f} mm off on what it trained on, "
          f"{how_far_off(policy, stack['test']):5.1f} mm on test data")
""")
L.code("figure", r"""
smaller = generic.copy()
set_trainable(smaller.model, "frozen")  # less capacity: the head alone
fit(smaller, ten, stack["validation"], **OURS | {"epochs": 40, "step_size": 20})
for label, policy in (("everything", overfitted), ("the head alone", smaller)):
    print(f"{label:15s} {how_far_off(policy, ten):5.1f} mm and {how_far_off(policy, stack['test']):5.1f} mm;",
          rollout(policy, "stack", episodes=50))
""")
L.md("figure", r"""
**2. Slow inference.** The deadline is the one of the live monitor, and the machine has other work.
""")
L.code("figure", r"""
def watched_under_load(policy):
    stop, monitor = Event(), Monitor(deadline)
    [Thread(target=other_work, args=(stop,), daemon=True).start() for _ in range(4)]
    try:
        rollout(Monitored(policy, monitor), "pick", episodes=40, batch=1, progress=False)
    finally:
        stop.set()
    return monitor.look()


print(watched_under_load(generic))
""")
L.code("figure", r"""
def milliseconds(work, times=40):
    begun = perf_counter()
    with torch.no_grad():
        [work() for _ in range(times)]
    return 1000 * (perf_counter() - begun) / times


model, o = generic.model, seen[0]
pixels, words = generic.pixels(o["rgb"][None]), generic.words([o["instruction"]], [False])
layer, states = model.vision_encoder.encoder.layers[0].mlp.fc1, torch.rand(1, 37, 128)
parts = {"picture to numbers": lambda: generic.pixels(o["rgb"][None]),
         "sentence to tokens": lambda: generic.words([o["instruction"]], [False]),
         "vision tower": lambda: model.encode_pictures(pixels),
         "text tower": lambda: model.encode_sentences(**words),
         "one product of the vision tower": lambda: layer(states)}
for label, work in parts.items():
    print(f"{label:32s} {milliseconds(work):6.3f} ms")
""")
L.code("figure", r"""
print(watched_under_load(in_runtime))  # the cure "edge runtime": the same numbers, another program
""")
L.md("figure", r"""
**3. Forgetting.** The policy that you served has learned `forward`. What has become of `put`?
""")
L.code("figure", r"""
print("before:", whole)
print("after: ", forgot := rollout(mine, "put"))
""")
L.code("figure", r"""
# Does it still know what is asked? The command is put; where does it go, a bin or forward?
asked = [Tabletop("put").reset(seed=seed)[0] | {"holding": 1} for seed in range(50)]
moved = answer_difference(mine, generic, asked)
print("holding the object, told to put it into a bin:", moved)
""")
L.code("figure", r"""
from labkit.experiments.lab_deployment import A_COLUMN
from labkit.progressive import old_column, with_column

two = with_column(generic, copied=True, seed=0)  # the old column is frozen; a second one reads it
fit(two, forward["train"], forward["validation"], **A_COLUMN)
print("new column:", rollout(two, "forward", episodes=50))
print("old column:", rollout(old_column(two), "put", episodes=50), "(if somebody tells which task it is)")
""")
L.md("figure", r"""
**4. Too little data.** Ten demonstrations of `forward`, from the towers alone: this head was never a policy.
""")
L.code("figure", r"""
from labkit.task_specific_vla import policy_from_clip

few, little = forward["train"].rows(range(20)), OURS | {"epochs": 30, "step_size": 15}
from_towers = policy_from_clip(seed=0, readout="spatial")
set_trainable(from_towers.model, "frozen")
fit(from_towers, few, forward["validation"], **little)
print(rollout(from_towers, "forward", episodes=50))
""")
L.code("figure", r"""
for label, samples in (("the ten", few), ("test data", forward["test"])):
    print(f"{label:9s} {how_far_off(from_towers, samples):4.0f} mm off")
""")
L.code("figure", r"""
transferred = generic.copy()
set_trainable(transferred.model, "frozen")
fit(transferred, few, forward["validation"], **little)  # the cure "transfer": begin with a policy
print(rollout(transferred, "forward", episodes=50))
""")
L.md("figure", r"""
All of the sheet's cures, with three seeds each, on a hundred episodes of the task that is learned. What stands after a comma is ours. `overfitting` is `stack` from ten demonstrations, `slow` is `forward` from fifty, `forgetting` is `stack` from fifty with `put` beside it, `data` is `forward` from ten:
""")
L.code("figure", tags=("nbval-check-output",), text=r"""
from labkit.experiments.lab_deployment import CURES

BESIDE = {"overfitting": ("off_mm.test", "mm off on test data"), "slow": ("ms.p50", "of float32's time"),
          "forgetting": ("old", "of 50 put"), "data": ("off_mm", "mm off on test data")}
cured = {(trouble, cure): sweep.success("success", part="troubles", trouble=trouble, cure=cure)
         for trouble, cures in CURES.items() for cure in cures}
for (trouble, cure), success in cured.items():
    (result, unit), which = BESIDE[trouble], dict(part="troubles", trouble=trouble, cure=cure)
    values = sweep.values(result, **which)
    if trouble == "slow":
        values = values / sweep.values("fp32_ms.p50", **which)
    beside = " ".join(f"{value:5.{2 * (trouble == 'slow')}f}" for value in values)
    print(f"{trouble if cure == 'none' else '':12s}{cure:30s}{success!s:34s}{beside}  {unit}")
""")
L.md("figure", r"""
Read it as an engineer, not as a list of cures.

- **Overfitting**: more data does most; training *less* (the head alone) comes near it with a quarter of the parameters. Weight decay and dropout do nothing that three seeds could show; a pull towards *where training began* does a little.
- **Slow**: dynamic int8 in PyTorch is as slow as before. Half of the layers are quicker and cost a third of the episodes or more. The other runtime is quicker still and costs nothing.
- **Forgetting**: annealing makes the new task better and keeps nothing of the old one. A pull keeps some of it, on one seed of three most of it. A progressive network keeps the old task *exactly*, since its weights are not touched, and asks for a router; begun at random as in the paper its new column learns little, begun as a copy it learns most of all.
- **Too little data**: augmentation of ten demonstrations does nothing here. To begin with a policy that knows the words does more; with synthetic scenes, whose labels are true, as good as five times the demonstrations.
""")
L.md("figure", r"""
## Your report

The sheet ends with a report. Its numbers come from runs; what they mean comes from you. `LabReport` records the first and leaves gaps for the second:
""")
L.code("figure", r"""
from labkit.lab_report import LabReport

report = LabReport(folder / "report", author="you")
report.dataset(DATA / "demonstrations" / "forward")
report.training(folder / "run", variant="language")
accuracy = tuple(action_accuracy(policy, forward["test"]) for policy in (generic, mine))
report.comparison({"forward": alone[generic], "put": whole}, {"forward": alone[mine], "put": forgot},
                  accuracy, decisions=len(forward["test"]))
report.integration(my_server, through_http[folder / "forward"], alone[mine])
page, notebook = report.build()
print("made:", page.name, notebook.name)
print(*report.check(), sep="\n")
""")
L.md("figure", r"""
What `check` names is left to do; what it cannot judge goes to a person, by the rubric that stands in the page. For your own report choose a folder of your own, `LabReport("my_report")`, run the cells of *your* task, write into `my_report/report.ipynb`, and make the page again: `python -m labkit report my_report`.
""")
L.md("claims", r"""
## The sheet's words and your numbers
""")
L.code("claims", r"""
ways = {p["way"]: p for p in generic_ways}


def ratio(p):
    return p["ms"]["p50"] / p["fp32_ms"]["p50"]


def said_of(trouble):
    return "; ".join(f"{cure}: {cured[trouble, cure]}" for cure in CURES[trouble] if ", " not in cure)


int8, fp32, no_data = (ways[way] for way in ("dynamic int8", "fp32", "static int8, not calibrated"))
station = {s: sweep.where(part="caching", scenes=s, threshold=40)[0] for s in ("3 cm", "6 cm")}
encoded = {s: p["misses"] / (p["exact"] + p["similar"] + p["misses"]) for s, p in station.items()}
""")
L.code("claims", r"""
claims_table({
    "sheet-quantise": f"{fp32['bytes'] / int8['bytes']:.1f} times smaller; {ratio(int8):.2f} of float32's "
                      f"time in PyTorch, {ratio(ways['onnx int8']):.2f} in ONNX Runtime",
    "sheet-static": f"{no_data['places']} place for {no_data['asked']} pictures; of 100 episodes "
                    f"{no_data['success']['put']} succeed, calibrated {ways['static int8']['success']['put']}",
    "sheet-cache": "; ".join(f"block within {s}: {100 * encoded[s]:.0f} % of pictures encoded, "
                             f"{p['success']} of 100 succeed" for s, p in station.items()),
    "openvla-int8": f"at the same delay of 200 ms: float32 {fast[200]}, int8 {lines['int8, belt 4 cm/s'][200]}",
    "sheet-integration": "one parameter: " + ", then ".join(str(found) for found in through_http.values()),
    "sheet-overfitting": said_of("overfitting"),
    "sheet-slow": said_of("slow"),
    "sheet-forgetting": said_of("forgetting"),
    "sheet-transfer": said_of("data"),
})
""")
L.md("play", r"""
## Play: a robot that thinks for a while

The block moves on a belt. Choose which policy decides, how long it takes, and how fast the belt is.
""")
L.code("play", r"""
import ipywidgets
from IPython.display import display


def deploy(who, delay, belt, table):
    policy = {"float32": generic, "int8, ONNX": in_runtime_int8, "int8, as printed": printed}[who]
    world = Variation(belt_speed=belt / 100, shapes=("block", "cup"))
    filmed = film(policy, "pick", seed=table, variation=world, delay=delay / 1000)
    display(filmed.animation())
    print(filmed.describe())
""")
L.code("play", r"""
ipywidgets.interactive(
    deploy, who=["float32", "int8, ONNX", "int8, as printed"],
    delay=ipywidgets.IntSlider(0, 0, 1000, 50, description="delay (ms)", continuous_update=False),
    belt=ipywidgets.IntSlider(4, 0, 8, description="belt (cm/s)", continuous_update=False),
    table=ipywidgets.IntSlider(8, 0, 99, continuous_update=False))
""")
L.md("static-twin", r"""
Without widgets: the same function, called by hand. Change the four arguments.
""")
L.code("static-twin", r"""
deploy("float32", delay=500, belt=4, table=8)
""")
L.md("control", r"""
## What would fool us

We say that a late answer costs success *because the world has moved on*. **What would refute us**: the same delay costs as much where nothing moves. Then waiting itself, or our simulation of it, would be the cause. The belt stands still, half a second goes by before each motion:
""")
L.code("control", r"""
still = Variation(shapes=("block", "cup"))
on_time, late = (rollout_with_delay(generic, "pick", seconds, episodes=50, variation=still)
                 for seconds in (0.0, 0.5))
print("belt at rest, no delay:", on_time)
print("belt at rest, 500 ms:  ", late)
print("episodes that end otherwise:", int((on_time.success != late.success).sum()))
""")
L.md("control", r"""
**And the other half of the claim**, that bits do not cost. Would our measurement notice a policy that *is* imprecise? The tiny VLA with one scale for each matrix is one, in the table above: 8 bits, the same weights, and most episodes of `put` lost with nobody waiting. The claim is about *this* quantisation of *this* policy. It has to be measured again for yours.
""")
L.md("question", r"""
## Question (in your own words, about 150 words)

A team's policy succeeds in 71 of 100 episodes with 16-bit weights and in 58 of 100 with 8-bit weights, on a robot that is to decide five times a second. They conclude that eight bits are too few, and buy a larger computer. Which two measurements would you ask for before you agree, and what would each outcome mean? Support your answer with results of this notebook. Then say which of the sheet's cures for slow inference you would try first on a machine like yours, and what would make you stop using it.

<details><summary>How the answer is marked (5 points)</summary>

- 1: asks for the response times of both policies (p50 and p95), since eight bits may be the slower one
- 1: asks for success of both at the same delay (the world waits, or both answer equally late), which leaves precision alone
- 1: reads both outcomes: equal success then means latency, unequal means precision; in that case asks which scale (for a row or for all) and whether activations were calibrated
- 1: one number with its interval from this notebook for delay, and one for precision
- 1: a cure with its measured ratio of times, what it costs in success, and the measurement that would end it (success, not a loss or an alarm)
</details>
""")
L.answer("lab-deployment-question", 5, r"""
### BEGIN SOLUTION
I would ask, first, how long each of the two takes to answer, at the median and at the 95th percentile, on their computer. Eight bits are smaller, not faster: in our table dynamic int8 in PyTorch takes as long as float32 or longer, and only another runtime makes it quicker. Second, I would ask for the success of both at the same delay: slow the quick one down until both answer equally late, or let the world wait. If they are then equal, latency was the cause, and a faster kernel is the cure. On our belt the two precisions lie on each other at every delay, and half a second costs most of the successes of either. If they still differ, it is precision, and I would ask which scales were used and whether anybody calibrated: our tiny VLA falls from nearly all of a hundred to a sixth with one scale for a matrix, and a static recipe without calibration says one place for every picture. On my machine I would try ONNX Runtime first: about six tenths of the time with the same weights, no episode lost. I would stop using it when closed-loop success on the robot's own task, counted over a hundred episodes, falls below the interval of the float32 policy.
### END SOLUTION
""")
L.md("recap", r"""
## Recap

A deployed policy is a model, a runtime, a clock and a world. Eight bits cost little if every row has its scale and activations were calibrated, and a recipe that omits that step raises nothing. A cache trades work for staleness, and only the workplace knows the rate. A server needs limits, sentences and a deadline. An alarm sees what moves the numbers it watches. And when success falls, ask for the delay before you blame the bits.

Lab sheet: *Exercise 2*, steps 5 and 6, report, troubleshooting. **Next:** your own report.
""")
L.md("receipt", r"""
## Receipt

Save the notebook first (Ctrl+S). The last cell runs your set-up cell and your exercise cells in a fresh process, exactly as the grader does, and says what it found.
""")
L.code("receipt", r"""
receipt("10_lab_deployment.ipynb")
""")
for c in L.n.cells:
    if c.cell_type=="code":
        for l in c.source.split("\n"):
            if len(l)>112: print("LONG",len(l),l)
        if len(c.source.split("\n"))>21: print("CELL",len(c.source.split("\n")),c.source[:60])
L.write(sys.argv[1])
