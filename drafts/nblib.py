"""Throwaway: cells of a lesson from short calls."""
import nbformat as nf, re
class Lesson:
    def __init__(self): self.n=nf.v4.new_notebook(); self.n.metadata={"kernelspec":{"display_name":"Python 3 (ipykernel)","language":"python","name":"python3"},"language_info":{"name":"python"}}; self.count={}
    def _add(self,cell,role,tags=(),**meta):
        self.count[role]=self.count.get(role,0)+1
        cell.id=f"{role}-{self.count[role]}"; cell.metadata={"tags":[role,*tags],**meta}; self.n.cells.append(cell)
    def md(self,role,text,**meta): self._add(nf.v4.new_markdown_cell(text.strip("\n")),role,**meta)
    def code(self,role,text="",tags=(),**meta): self._add(nf.v4.new_code_cell(text.strip("\n")),role,tags,**meta)
    def exercise(self,id,text): self.code("exercise",text,nbgrader=dict(schema_version=3,grade_id=id,grade=False,solution=True,locked=False,task=False))
    def check(self,id,points,text): self.code("check",text,nbgrader=dict(schema_version=3,grade_id=id+"-check",grade=True,solution=False,locked=True,task=False,points=points))
    def answer(self,id,points,text): self.md("question",text,nbgrader=dict(schema_version=3,grade_id=id,grade=True,solution=True,locked=False,task=False,points=points))
    def write(self,path): nf.validate(self.n); nf.write(self.n,path)
