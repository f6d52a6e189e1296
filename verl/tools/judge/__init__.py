"""The judge, `python -m verl.tools.judge`: how close students are to the teacher."""
