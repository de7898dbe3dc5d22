"""What a potential is worth: errors, properties of materials, stability, speed and memory.

Everything but `errors` takes any ASE calculator, so that student, control and teacher stand side
by side; every result is a small frozen dataclass with `to_json()`.
"""
