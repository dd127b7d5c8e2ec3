import sys, shutil, json
import numpy as np
from labkit.paths import DATA
from labkit.lab_report import LabReport
from labkit.rollouts import Rollouts
from labkit.waypoint_regression import Curves
from labkit.serving.core import PolicyCore
from labkit.serving.http import PolicyServer
from labkit.serving.client import PolicyClient
from labkit.policy import Decision
out="/tmp/p/lr/demo"; shutil.rmtree(out, ignore_errors=True)
rng=np.random.default_rng(3)
def run(task,p,n=60,ms=20): return Rollouts(task, rng.random(n)<p, np.arange(n)+1_000_000, rng.integers(1,6,n), rng.random(n)/20, ms+rng.exponential(3,20), 12.5)
r=LabReport(out, author="Ada <script>alert(1)</script> Lovelace")
r.dataset(DATA/"demonstrations"/"align")
c=Curves(trainable=12345,total=456789,seconds=83.2)
for e in range(20):
    c.rates.append({"head":1e-3*.5**(e//10),"towers":3e-4*.5**(e//10)}); c.add(0.4*0.85**e+0.01, 0.4*0.85**e+0.02+0.003*max(0,e-11))
r.training(c, {"epochs":20,"batch_size":16,"head_rate":1e-3,"tower_rate":3e-4,"loss":"l1","patience":None,"variant":"last-layers"})
gen={w:run("align",p) for w,p in {"as trained":.2,"camera":.15,"30 % of the light":.1,"phrasing | <b>held</b> $out$":.2}.items()}
tun={w:run("align",p) for w,p in {"as trained":.8,"camera":.5,"30 % of the light":.3,"phrasing | <b>held</b> $out$":.7}.items()}
acc=lambda k:{a:{"error":k*e,"unit":u} for a,e,u in zip(("x","y","z","roll","pitch","yaw","grip"),(.01,.012,.006,.001,.001,.12,.03),("m","m","m","rad","rad","rad",""))}
r.comparison(gen,tun,(acc(3),acc(1)),decisions=44)
class Stub:
    name="align, fine-tuned"
    def decide(self, o, i=None):
        n=len(o); w=np.tile([0,.3,.3,0,0,0,0.],(n,1))
        return Decision(np.zeros((n,4),int), w[:,[0,1,2,6]], w, np.full((n,4),np.nan), 1e-3)
with PolicyCore(Stub()) as core, PolicyServer(core,port=0).in_background() as server:
    cl=PolicyClient(server.url)
    for i in range(30): cl.decide([{"rgb":np.zeros((48,48,3),np.uint8),"instruction":"pick up the red block","holding":0}])
    cl.close()
    alone=run("align",.8); r.integration(server, run("align",.8,ms=23), alone)
print(r.missing(), r.build()); print(*r.check(), sep="\n")
