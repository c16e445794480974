"""Collects rationales of several teachers: asks endpoints, keeps every answer, writes rows.

`compact.teachers.collect.collect` is the loop. `spec` reads the teachers, `endpoint` and `local`
ask them, `store` keeps what they answer, and `export` writes the data format of the trainer.
"""
