. /tmp/p/lr/env.sh
rm -rf /tmp/p/lr/m; mkdir /tmp/p/lr/m
python - <<'P'
import subprocess, os, shutil
root="/tmp/p/lr/m"
shutil.copytree("/tmp/p/w10/labkit", root+"/labkit", ignore=shutil.ignore_patterns("__pycache__")); shutil.copytree("/tmp/p/w10/tests", root+"/tests", ignore=shutil.ignore_patterns("__pycache__"))
os.symlink("/tmp/p/w10/data", root+"/data"); shutil.copy("/tmp/p/w10/pyproject.toml", root)
src=open(root+"/labkit/lab_report.py").read()
M=[(" + 0 if False else ","X")][:0]+[
 ('    _name_apart(cells)\n','    pass\n'),
 ('.replace("$", r"\\$")',''),
 ('or any(len(columns[name]) != episodes','or 0 and any(len(columns[name]) != episodes'),
]
env={**os.environ,"PYTHONPATH":root}
for a,b in M:
    assert src.count(a)>=1,a
    open(root+"/labkit/lab_report.py","w").write(src.replace(a,b,1))
    r=subprocess.run(["nice","-n","5","python","-m","pytest","-q","-x","-p","no:cacheprovider","tests/test_lab_report.py","--deselect","tests/test_lab_report.py::test_the_command_builds_checks_and_prints_the_rubric"],cwd=root,env=env,capture_output=True,text=True)
    last=[l for l in r.stdout.splitlines() if l.startswith(("FAILED","ERROR"))]
    print("killed" if r.returncode else "SURVIVED", a[:60], last[:1], flush=True)
P
