. /tmp/p/lr/env.sh
rm -rf /tmp/p/lr/m; mkdir /tmp/p/lr/m
python - <<'P'
import subprocess, os, shutil
root="/tmp/p/lr/m"
shutil.copytree("/tmp/p/w10/labkit", root+"/labkit", ignore=shutil.ignore_patterns("__pycache__")); shutil.copytree("/tmp/p/w10/tests", root+"/tests", ignore=shutil.ignore_patterns("__pycache__"))
os.symlink("/tmp/p/w10/data", root+"/data"); shutil.copy("/tmp/p/w10/pyproject.toml", root)
src=open(root+"/labkit/lab_report.py").read()
M=[("autoescape=True","autoescape=False"),
 ('lambda mark: f"&#{ord(mark.group())};"','lambda mark: mark.group()'),
 ('            cells.append(cell)\n\n    for name','            pass\n\n    for name'),
 ('cells += kept.get(("gap", name), [gap])','cells += kept.get(("gap", name), [gap])[:1]'),
 ('.replace(GAP, " ")))',')))'),
 ('for name in RECORDED if name not in self.stored]','for name in RECORDED if name in self.stored]'),
 ('100 * low:.1f','100 * low + 1:.1f'),
 ('{"m": (1000, "mm")','{"m": (100, "mm")'),
 ('and cell["metadata"][_OURS].get("digest") == _digest(cell["source"])',''),
 ('    _name_apart(cells)\n','    pass\n'),
 ('c.isprintable() or','True or'),
 ('.replace("$", r"\\$")',''),
 ('        if _without_pictures(page.read','        if 0 and _without_pictures(page.read'),
 ('any(there.get(key)','0 and any(there.get(key)'),
 ('or any(len(columns[name]) != episodes','or 0 and any(len(columns[name]) != episodes'),
 ('json.dumps(facts, allow_nan=False)\n        except','json.dumps(facts)\n        except'),
 ('found.append(f"{NOTEBOOK}, {_titled(name)}: its','(lambda x: 0)(f"{NOTEBOOK}, {_titled(name)}: its'),
]
env={**os.environ,"PYTHONPATH":root}
for a,b in M:
    assert src.count(a)>=1,a
    open(root+"/labkit/lab_report.py","w").write(src.replace(a,b,1))
    r=subprocess.run(["nice","-n","5","python","-m","pytest","-q","-x","-p","no:cacheprovider","tests/test_lab_report.py"],cwd=root,env=env,capture_output=True,text=True)
    last=[l for l in r.stdout.splitlines() if l.startswith(("FAILED","ERROR"))]
    print("killed" if r.returncode else "SURVIVED", a[:60], last[:1], flush=True)
P
